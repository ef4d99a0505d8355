"""What a training run can be told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import get_type_hints

from mmfused.models.fields import check_field

MODELS = ("fluid", "uniecs", "unica", "moon2", "unite")
MODALITIES = ("both", "image", "text")
PRECISIONS = ("auto", "bf16", "off")
# The papers' own settings, where a preset has any; what is given on the command line goes before
# them.
RECIPES = {
    **{
        ("fluid", name): {
            "lr": 2e-5,
            "weight_decay": 0.01,
            "epochs": 15,
            "batch_size": 128,
            "max_length": 512,
        }
        for name in ("paper", "code")
    },
    **{
        ("uniecs", name): {"lr": 1e-6, "weight_decay": 0.01, "epochs": 50, "batch_size": 256}
        for name in ("paper", "code")
    },
    ("unica", "paper"): {
        "lr": 2e-5,
        "epochs": 5,
        "batch_size": 640,
        "max_length": 109,
    },  # of VISTA, its host
    ("moon2", "paper"): {"lr": 1e-5, "epochs": 1, "batch_size": 256},
    **{
        ("unite", name): {"lr": 2e-5, "epochs": 1, "batch_size": 1024, "max_length": 2048}
        for name in ("paper", "code")
    },
}
# What may differ when a run goes on: where it runs and how much of it is shown or kept, not what it
# computes. Data are known by their content, wherever they lie.
FREE = {
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
}


@dataclass
class TrainConfig:
    """What one run needs; ``out`` is its folder. Lengths of training: ``steps``, or else
    ``epochs``.

    A step is one update of the weights, from ``accumulate`` batches of ``batch_size``. ``amp``:
    "bf16" computes under autocast, "auto" does so on CUDA cards that have bf16. A checkpoint every
    ``save_every`` steps (None: at every validation) and at the end; the ``keep`` newest stay.
    ``resume`` goes on from the newest one, if there is any. ``image_encoder``, ``text_encoder``
    and, for MOON2.0 and UNITE, ``host``: pretrained ones to begin with, folders or names. ``init``:
    a run or checkpoint of the same model whose weights and tokenizer to begin with, as for UNITE's
    second stage. ``products``: the catalogue that retrieval models look in, else the data
    themselves. ``text_column``: of the data, not of the products. ``grad_cache``: items of a batch
    encoded at a time. Over several ranks (``torchrun``) ``batch_size`` is of all. Raises ValueError
    for values out of range."""

    out: str
    data: str = "generated"
    val: str | None = None
    products: str | None = None
    text_column: str = "text"
    model: str = "fluid"
    preset: str = "tiny"
    model_options: dict = field(default_factory=dict)
    image_encoder: str | None = None
    text_encoder: str | None = None
    host: str | None = None
    init: str | None = None
    backend: str = "auto"
    amp: str = "auto"
    modalities: str = "both"
    steps: int | None = None
    epochs: float = 60
    batch_size: int = 64
    accumulate: int = 1
    grad_cache: int | None = None
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    augment: bool | None = None
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

    def __post_init__(self):
        kinds = get_type_hints(type(self))
        for entry in fields(self):
            check_field(entry.name, getattr(self, entry.name), kinds[entry.name])
        self.betas = tuple(self.betas)
        if "\0" in self.out:
            raise ValueError(f"out: got {self.out!r}, expected a folder")
        for name in "out data val products text_column image_encoder text_encoder host init tokenizer".split():
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name}: got {value!r}, expected a text that is not empty")
        for name, choices in (("model", MODELS), ("modalities", MODALITIES), ("amp", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        for name in ("epochs", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        if self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            got = f"{self.weight_decay} and {self.betas}"
            raise ValueError(
                f"weight_decay and betas: got {got}, take a number of at least 0, and two from 0 to below 1"
            )
        for name in ("swap_text", "drop_image", "drop_text", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected a fraction from 0 to 1"
                )
        if self.drop_image + self.drop_text > 1:
            raise ValueError(
                f"drop_image and drop_text: got {self.drop_image} and {self.drop_text}, take a sum of at most 1"
            )
        for name, absent in (("image_encoder", "text"), ("text_encoder", "image")):
            if getattr(self, name) and self.modalities == absent:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with modalities {absent!r}, expected modalities that use it"
                )
        for name in ("image_encoder", "text_encoder", "host", "tokenizer"):
            if self.init and getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with init, expected none: the run has its own"
                )
        for name in ("image_encoder", "host"):
            if getattr(self, name) and self.patch_size:
                raise ValueError(
                    f"patch_size: got {self.patch_size} with {name}, expected none: it has its own"
                )
        self.check_task()
        if self.overwrite and self.resume:
            raise ValueError(
                "overwrite and resume: got both, take one: a run is begun anew or gone on with"
            )

    def check_task(self):
        """Raises ValueError for what the model has no use for."""
        hosted = self.model in ("moon2", "unite")
        for name, fits, takes in (
            ("products", self.model != "fluid", "a retrieval model"),
            ("grad_cache", self.model != "fluid", "a retrieval model"),
            ("host", hosted, "moon2 or unite"),
            ("image_encoder", not hosted, "fluid, uniecs or unica; moon2 and unite take a host"),
            ("text_encoder", not hosted, "fluid, uniecs or unica; moon2 and unite take a host"),
        ):
            if getattr(self, name) is not None and not fits:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with model {self.model!r}, expected {takes}"
                )
        if self.model != "fluid" and self.modalities != "both":
            raise ValueError(
                f"modalities: got {self.modalities!r} with model {self.model!r}, expected 'both': it embeds each view"
            )
        if self.grad_cache and self.accumulate > 1:
            raise ValueError(
                f"accumulate: got {self.accumulate} with grad_cache, expected 1: the batch is one, in chunks"
            )

    def to_dict(self) -> dict:
        """Plain values that JSON holds and gives back the same."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """The inverse of :meth:`to_dict`. Raises ValueError for an unknown name, and as the class."""
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown or "out" not in values:
            raise ValueError(
                f"{', '.join(unknown)}: a training has no such setting"
                if unknown
                else "out is missing"
            )
        return cls(**values)

    def check_same(self, saved: dict, where) -> None:
        """Raises ValueError naming the first value that differs from ``saved``, the ``to_dict`` of
        the run in ``where``.
        """
        for name, value in self.to_dict().items():
            if name in saved and name not in FREE and saved[name] != value:
                raise ValueError(
                    f"resume: {name} is {value!r}, but {where} was trained with {saved[name]!r}; take that one"
                )
