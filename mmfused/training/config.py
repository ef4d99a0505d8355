"""The settings of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from mmfused.library import Backend
from mmfused.models.fields import Options, check_field
from mmfused.models.lora import check_lora

ModelName: TypeAlias = Literal["fluid", "uniecs", "unica", "moon2", "unite"]
Modalities: TypeAlias = Literal["both", "image", "text"]
Precision: TypeAlias = Literal["auto", "bf16", "off"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
Augment: TypeAlias = Literal["none", "light", "strong"]
Labels: TypeAlias = Literal["auto", "index", "name"]

# The models on a Qwen2-VL; the others have an image and a text encoder.
HOSTED = ("moon2", "unite")

# Settings that may differ when a run is resumed. The folders ``data``, ``val`` and ``products`` may
# be moved, but `check_rows` requires the same contents.
FREE_ON_RESUME = {
    "out",
    "data",
    "val",
    "products",
    "threads",
    "device",
    "progress",
    "overwrite",
    "resume",
    "save_every",
    "keep",
    "grad_checkpointing",
    "stream",
    "workers",
}
COLUMNS = ("image", "text", "label", "coarse_label")
_NEVER_EMPTY = (
    "out",
    "data",
    "val",
    "products",
    "text_column",
    "format",
    "split",
    "image_encoder",
    "text_encoder",
    "host",
    "adapter",
    "init",
    "tokenizer",
)


@dataclass
class TrainConfig:
    """The settings of one training run.

    A step is one update of the weights, from ``accumulate`` batches of ``batch_size`` items. With
    several ranks (``torchrun``), ``batch_size`` counts the items of all ranks. A checkpoint is
    written every ``save_every`` steps and at the end. The optimizer is AdamW. The defaults below
    are for the preset "tiny"; ``mmfused train`` replaces some of them by the papers' for "paper"
    and "code".

    Args:
        out: the folder of the run.
        data: the training set, in a format of :func:`mmfused.data.open_table` or, for retrieval
            models, of :func:`mmfused.data.open_pairs`; or "generated".
        val: the validation set, or the fraction of ``data`` that becomes the validation set, as a
            string such as "0.1". None takes the split for validation or test that ``data`` holds;
            it is required if there is none, and must be None with "generated".
        products: the catalogue that retrieval models search. If None, the catalogue is ``data`` in
            training and ``val`` in validation.
        text_column: text column of ``data`` and ``val``, if ``columns`` names none.
        format: format of ``data`` and ``val``; None detects it.
        split: the part of ``data`` to train with; None is "train", if ``data`` has splits.
        columns: names of columns in ``data`` and ``val`` by "image", "text", "label" and
            "coarse_label".
        products_columns: the same in ``products``.
        labels: what labels are: an "index" from 0, or a "name" of a class; "auto" is what the
            format says, or most labels are.
        stream: whether pictures are decoded when a batch needs them, instead of all at the start.
            None decides by the memory that they would take.
        workers: number of threads that decode pictures; None takes the CPU's, at most 8.
        num_negatives: number of hard negatives of a query, for UniCA and UNITE.
        mix_tasks: whether a batch may have pairs of several tasks, for pairs with tasks.
        model: "fluid", "uniecs", "unica", "moon2" or "unite".
        preset: "tiny", "paper" (the paper's sizes) or "code" (the public code's sizes). With
            ``init``, the sizes are those of its run.
        model_options: fields of the model's config. A dict updates the field's dict.
        image_encoder: folder or name of a pretrained image encoder.
        text_encoder: folder or name of a pretrained text encoder.
        host: folder or name of a pretrained Qwen2-VL, for MOON2.0 and UNITE.
        adapter: folder of a LoRA adapter of ``host``, which is merged into it before training.
        init: folder of a run or checkpoint of the same model; training starts with its config,
            weights and tokenizer. ``model_options`` override fields of the config, and
            ``image_encoder``, ``text_encoder`` and ``host`` replace parts of the model.
        lora: options of :func:`mmfused.models.lora.add_lora`, which trains adapters in place of the
            transformers' weights. None goes on with the adapters of ``init``, if it has some.
            Options start new adapters, and "none" trains without; both merge those of ``init``.
        grad_checkpointing: keep only the inputs of the transformers' layers, and compute the rest
            again in the backward pass; this saves memory and does not change the gradients.
        backend: backend of the ops, see :class:`mmfused.backend`.
        amp: "bf16" trains under bfloat16 autocast, and "off" trains in float32. "auto" is "bf16" on
            CUDA devices that support bfloat16, otherwise "off".
        modalities: the modalities that FLUID sees: "both", "image" or "text".
        steps: number of steps; None takes as many as ``epochs`` need.
        epochs: number of passes over the training set.
        batch_size: number of items per batch.
        accumulate: number of batches per step.
        grad_cache: number of items of a batch that are encoded at a time, and lie on the device;
            None encodes all at once. For retrieval models only.
        lr: peak of the learning rate, which first rises linearly.
        lr_image: the same for the image encoder, or the vision tower of the host; None: ``lr``.
        lr_text: the same for the text encoder, or the language model of the host; None: ``lr``.
        schedule: after its peak, the learning rate falls to 0 as a "cosine" or on a line
            ("linear"), or stays ("constant").
        betas: the betas of AdamW.
        weight_decay: weight decay of AdamW; norms, biases and vectors have none.
        warmup: fraction of the steps in which the learning rate rises.
        clip: largest norm of the gradient.
        seed: seed of all random draws.
        augment: how strongly to augment training pictures: "none", "light" or "strong" (see
            ``mmfused.data.augment``). None is "strong", but "none" for generated pictures, because
            the texts describe their colours. True is "strong", and False is "none".
        swap_text: fraction of the texts, in training and validation, that are replaced by a text of
            another class.
        drop_image: fraction of the training items whose image is hidden.
        drop_text: fraction of the training items whose text is hidden.
        image_size: side of the model's pictures in pixels. None takes the side of ``init`` or of
            the preset or, with "tiny", the side of the stored pictures, at most 96.
        patch_size: side of a patch in pixels, not with ``init``. None takes the preset's side or,
            with "tiny", 8 for pictures of up to 32 pixels, else 16.
        max_length: largest number of tokens of a text.
        vocab_size: largest vocabulary of a new tokenizer.
        tokenizer: folder or name of a tokenizer. None takes the tokenizer of ``text_encoder``,
            ``host`` or ``init``; without these, a new tokenizer is trained on the texts.
        threads: number of CPU threads; None takes torch's.
        device: name of a torch device; "auto" is "cuda" if it is available, else "cpu".
        log_every: number of steps between records in ``metrics.jsonl``.
        val_every: number of steps between validations; None takes a tenth of all steps, rounded up.
        save_every: number of steps between checkpoints; None takes ``val_every``.
        keep: number of checkpoints to keep.
        progress: whether to show a progress bar.
        overwrite: replace the run in ``out``.
        resume: continue from the newest checkpoint in ``out``, if there is one.

    Raises:
        ValueError: a value is invalid, or two values exclude each other.

    Examples:
        >>> from mmfused.training.config import TrainConfig
        >>> config = TrainConfig(
        ...     out="runs/mugs", data="mugs/train", val="mugs/val", model="uniecs", batch_size=32
        ... )
        >>> TrainConfig.from_dict(config.to_dict()) == config
        True
        >>> TrainConfig("runs/mugs", model="uniecs", modalities="image")
        Traceback (most recent call last):
            ...
        ValueError: modalities: got 'image' with model 'uniecs', expected 'both': ...
    """

    out: str
    data: str = "generated"
    val: str | None = None
    products: str | None = None
    text_column: str = "text"
    format: str | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    products_columns: dict[str, str] | None = None
    labels: Labels = "auto"
    stream: bool | None = None
    workers: int | None = None
    num_negatives: int = 1
    mix_tasks: bool = False
    model: ModelName = "fluid"
    preset: str = "tiny"
    model_options: dict[str, Any] = field(default_factory=dict)
    image_encoder: str | None = None
    text_encoder: str | None = None
    host: str | None = None
    adapter: str | None = None
    init: str | None = None
    lora: Options | Literal["none"] | None = None
    grad_checkpointing: bool = False
    backend: Backend = "auto"
    amp: Precision = "auto"
    modalities: Modalities = "both"
    steps: int | None = None
    epochs: float = 60
    batch_size: int = 64
    accumulate: int = 1
    grad_cache: int | None = None
    lr: float = 1e-3
    lr_image: float | None = None
    lr_text: float | None = None
    schedule: Schedule = "cosine"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    augment: Augment | None = None
    swap_text: float = 0.0
    drop_image: float = 0.0
    drop_text: float = 0.0
    image_size: int | None = None
    patch_size: int | None = None
    max_length: int = 64
    vocab_size: int = 2000
    tokenizer: str | None = None
    threads: int | None = None
    device: str = "auto"
    log_every: int = 1
    val_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    progress: bool = True
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.augment, bool):
            self.augment = _strength(self.augment, self.data)
        self._check_types()
        first, second = self.betas
        self.betas = (first, second)
        if self.lora == "none" and self.init is None:  # there are no adapters to merge
            self.lora = None
        self._check_strings()
        self._check_ranges()
        self._check_pretrained()
        self._check_model()
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume: got both, expected at most one of the two")

    def _check_types(self) -> None:
        kinds = get_type_hints(type(self))
        for entry in fields(self):
            value, kind = getattr(self, entry.name), kinds[entry.name]
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            if not choices:
                check_field(entry.name, value, kind)
            elif value not in choices:
                raise ValueError(
                    f"{entry.name}: got {value!r:.80}, expected one of {', '.join(choices)}"
                )

    def _check_strings(self) -> None:
        if "\0" in self.out:
            raise ValueError(f"out: got {self.out!r}, expected a folder")
        for name in _NEVER_EMPTY:
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name}: got {value!r}, expected a non-empty string")

    def _check_ranges(self) -> None:
        for name in ("epochs", "lr", "lr_image", "lr_text", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected a number above 0")
        if self.weight_decay < 0:
            raise ValueError(
                f"weight_decay: got {self.weight_decay}, expected a number of at least 0"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers from 0 to below 1")
        self._check_data()
        for name in ("swap_text", "drop_image", "drop_text", "warmup"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, expected a fraction from 0 to 1")
        if self.drop_image + self.drop_text > 1:
            raise ValueError(
                f"drop_image and drop_text: got {self.drop_image} and {self.drop_text}, "
                "expected a sum of at most 1"
            )

    def _check_data(self) -> None:
        for setting in ("columns", "products_columns"):
            for name, column in (getattr(self, setting) or {}).items():
                if name not in COLUMNS:
                    raise ValueError(
                        f"{setting}: got {name!r}, expected some of {', '.join(COLUMNS)}"
                    )
                # "" reads no column.
                is_name = isinstance(column, str) and (not column or bool(column.strip()))
                if not is_name or (name == "label" and not column):
                    raise ValueError(
                        f"{setting}: {name}: got {column!r}, expected the name of a column"
                    )
        if self.columns and "text" in self.columns and self.text_column != "text":
            raise ValueError(
                f"text_column: got {self.text_column!r} with columns that name the text, "
                "expected one of the two"
            )
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(
                f"val: got {self.val!r}, expected a folder, or a fraction above 0 and below 1"
            )

    @property
    def val_fraction(self) -> float | None:
        """The fraction of ``data`` that becomes the validation set, or None."""
        try:
            return None if self.val is None else float(self.val)
        except ValueError:
            return None

    @property
    def column_names(self) -> dict[str, str] | None:
        """The ``columns``, with ``text_column``."""
        if self.text_column == "text":
            return self.columns
        return {"text": self.text_column, **(self.columns or {})}

    def _check_pretrained(self) -> None:
        for name, absent in (("image_encoder", "text"), ("text_encoder", "image")):
            if getattr(self, name) and self.modalities == absent:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with modalities {absent!r}, "
                    "expected modalities that use it"
                )
        for name, owner in (
            ("image_encoder", "image_encoder"),
            ("host", "host"),
            ("init", "the run in init"),
        ):
            if getattr(self, name) and self.patch_size:
                raise ValueError(
                    f"patch_size: got {self.patch_size} with {name}, "
                    f"expected no patch_size: {owner} has its own"
                )

        if self.adapter and not self.host:
            raise ValueError(
                f"adapter: got {self.adapter!r} without host, "
                "expected a host, into which the adapter is merged"
            )
        if isinstance(self.lora, dict):
            check_lora(self.lora)

    def _check_model(self) -> None:
        """Raise ValueError for settings that the model does not use."""
        hosted = self.model in HOSTED
        encoders = "fluid, uniecs or unica; moon2 and unite take a host"
        for name, fits, expected in (
            ("products", self.model != "fluid", "a retrieval model"),
            ("products_columns", self.products is not None, "products"),
            ("grad_cache", self.model != "fluid", "a retrieval model"),
            ("num_negatives", self.model in ("unica", "unite"), "unica or unite"),
            ("host", hosted, "moon2 or unite"),
            ("image_encoder", not hosted, encoders),
            ("text_encoder", not hosted, encoders),
        ):
            value = getattr(self, name)
            if value not in (None, getattr(type(self), name)) and not fits:
                raise ValueError(
                    f"{name}: got {value!r} with model {self.model!r}, expected {expected}"
                )
        if self.model != "fluid" and self.modalities != "both":
            raise ValueError(
                f"modalities: got {self.modalities!r} with model {self.model!r}, "
                "expected 'both': retrieval models embed images, texts and both"
            )
        if self.grad_cache and self.accumulate > 1:
            raise ValueError(
                f"accumulate: got {self.accumulate} with grad_cache, "
                "expected 1: grad_cache splits one batch into chunks"
            )

    @property
    def strength(self) -> Augment:
        """How strongly training pictures are augmented."""
        return _strength(self.augment, self.data)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON can represent."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config with these ``values``, as from :meth:`to_dict`.

        Raises:
            ValueError: a setting is unknown, "out" is missing, or a value is invalid.
        """
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        if "out" not in values:
            raise ValueError("out is missing")
        return cls(**values)

    def check_same(self, saved: Mapping[str, Any], where: str | PathLike[str]) -> None:
        """Raise ValueError if a setting that is not in ``FREE_ON_RESUME`` differs from ``saved``.

        Args:
            saved: the settings of a run or checkpoint, perhaps of an earlier version.
            where: folder of the run or checkpoint, for the error message.
        """
        defaults = type(self)(self.out).to_dict()  # of settings that an earlier version lacks
        saved = {**saved, "augment": _strength(saved.get("augment"), self.data)}
        for name, value in {**self.to_dict(), "augment": self.strength}.items():
            expected = saved.get(name, defaults[name])
            if name not in FREE_ON_RESUME and value != expected:
                raise ValueError(
                    f"resume: {name}: got {value!r}, expected {expected!r}, "
                    f"with which {where} was trained"
                )


def _strength(augment: Augment | bool | None, data: str) -> Augment:
    """Return how strongly pictures are augmented; earlier versions had True, False and None."""
    if isinstance(augment, bool):
        return "strong" if augment else "none"
    return augment or ("none" if data == "generated" else "strong")
