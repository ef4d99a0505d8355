"""Load a trained model and its tokenizer, and make batches for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.models.adapters import CONFIG, WEIGHTS
from mmfused.models.config import meta_model
from mmfused.models.weights import find_folder
from mmfused.training.config import HOSTED, TrainConfig
from mmfused.training.datasets import HELD_OUT, Source, as_named, load_pairs, load_products
from mmfused.training.files import sha256
from mmfused.training.initial import (
    build_model,
    check_start,
    load_start,
    load_tokenizer,
    model_config,
    warn_of_random,
)
from mmfused.training.recipes import recipe
from mmfused.training.run_folder import load_saved, read_settings
from mmfused.training.setup import (
    VAL_BATCH_SIZE,
    check_backend,
    make_collate,
    make_reader,
    make_val_batches,
    pick_device,
    use_amp,
)


class Trained:
    r"""A trained model with its tokenizer and settings.

    Args:
        folder: folder of the run or checkpoint.
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer.
        settings: the settings saved in ``folder``.
        device: device to which the model is moved.
        weights: the files of a host and adapter; None is ``model.safetensors`` of a run.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.training.load import load_trained
        >>> from mmfused.training.run import TrainConfig, train
        >>> rows = "file_name,text,label\n,red mug,0\n,blue plate,1\n"
        >>> options = dict(modalities="text", batch_size=2, steps=1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = pathlib.Path(folder, "metadata.csv").write_text(rows)
        ...     config = TrainConfig(f"{folder}/run", data=folder, val=folder, **options)
        ...     summary = train(config)
        ...     trained = load_trained(config.out, device="cpu")
        ...     dataset, batches = trained.batches(folder)
        >>> trained.name, trained.task, len(dataset)
        ('fluid', 'classification', 2)
        >>> [list(trained.model(input_ids=batch["input_ids"]).logits.shape) for batch in batches]
        [[2, 2]]
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        settings: dict[str, Any],
        device: torch.device,
        weights: Sequence[Path] | None = None,
    ) -> None:
        self.folder = folder
        self.weights = weights
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = device
        self.model: Any = model.to(device)
        self.name: str = settings["training"]["model"]
        self.task: str = MODELS[self.name].task
        self.amp: bool = use_amp(settings["training"].get("amp", "off"), device)

    @property
    def identity(self) -> dict[str, Any]:
        """What the embeddings of an item depend on, as JSON can represent it.

        For a run, it is the SHA-256 of ``model.safetensors``, and how pictures are resized. For a
        host, it is the SHA-256 of each file, and the options.
        """
        if self.weights is None:
            config = self.settings["model"]
            # Settings of earlier versions lack these fields, and their identities too.
            resizing = {name: config[name] for name in ("resize", "resample") if name in config}
            return {"checkpoint": sha256(self.folder / "model.safetensors"), **resizing}
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # those of the last call
            words.pop(name)
        return {
            "files": [sha256(path) for path in self.weights],
            "tokenizer": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
            "max_length": self.settings["training"]["max_length"],
            "seed": self.settings["training"]["seed"],  # of weights that the files lack
            "model": self.name,
            "config": self.settings["model"],
        }

    def check_is_retrieval_model(self, command: str) -> None:
        """Raise ValueError unless the model is a retrieval model."""
        if self.task != "retrieval":
            raise ValueError(
                f"{command}: checkpoint: got {self.folder}, which holds {self.name}, a classifier, "
                "expected a retrieval model"
            )

    def batches(
        self,
        data: str,
        batch_size: int | None = None,
        text_column: str = "text",
        num_classes: int | None = None,
        name: str = "data",
        workers: int | None = None,
        **reading: Any,
    ) -> tuple[Any, product_data.Batches]:
        """Return a data set and the batches of its items.

        The set is a :class:`~mmfused.data.ProductFolder`, a :class:`~mmfused.data.PairSet`, whose
        batches are those of its distinct items, or the generated validation set.

        Args:
            data: the data set, or "generated".
            batch_size: items per batch; None takes ``VAL_BATCH_SIZE``.
            text_column: text column, if ``columns`` names none.
            num_classes: rows with a label of at least ``num_classes`` are skipped.
            name: name of the argument ``data`` in error messages.
            workers: number of threads that decode pictures.
            reading: columns, format, labels, split, stream and needs_label, as for
                :class:`~mmfused.data.ProductFolder`. If no split is given, it is the one for test
                or validation, if the set has one.
        """
        dataset = self.load_set(data, text_column, num_classes, name, **reading)
        return dataset, self.batches_of(dataset, batch_size, workers)

    def load_set(
        self,
        data: str,
        text_column: str = "text",
        num_classes: int | None = None,
        name: str = "data",
        columns: Mapping[str, str] | None = None,
        like: Any = None,
        **reading: Any,
    ) -> Any:
        """Return a data set; see `batches`. If labels of ``like`` are names, its labels are too."""
        if data == "generated":
            return product_data.GeneratedProducts("val")
        if text_column != "text":
            columns = {"text": text_column, **(columns or {})}
        source = Source(name, data, columns=columns, **{"splits": HELD_OUT, **reading})
        if isinstance(like, product_data.ProductFolder):
            source = as_named(source, like)
        if source.holds_pairs:
            if self.task != "retrieval":
                raise ValueError(
                    f"{name}: got {data!r}, which holds pairs, with the classifier {self.name}, "
                    "expected products with labels"
                )
            return load_pairs(source)
        names = self.settings.get("class_names") if self.task == "classification" else None
        if self.task == "classification" and names is None:
            if source.labels == "name":
                raise ValueError(
                    f"labels: got 'name' with {self.folder}, whose classes have no names, expected "
                    "'index'"
                )
            # The names of other data would become classes in an order of their own.
            source = source._replace(labels="index")
        size, config = self.model.picture_size, self.model.config
        return load_products(source, size, num_classes, config, names)

    def batches_of(
        self,
        dataset: Any,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> product_data.Batches:
        """Return the batches of a data set from `load_set`, in order."""
        size, config = self.model.picture_size, self.model.config
        max_length = self.settings["training"]["max_length"]
        items, make = dataset, partial(make_collate, self.tokenizer)
        if isinstance(dataset, product_data.PairSet):
            items, make = dataset.items, partial(make_reader, self.name, self.tokenizer)
        reader = make(size, max_length, config)
        return make_val_batches(items, reader, batch_size or VAL_BATCH_SIZE, workers)


def load_trained(
    folder: str,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Trained:
    r"""Load the model of the finished run or checkpoint in ``folder``.

    Args:
        folder: the folder of the run or of the checkpoint.
        backend: backend with which the model will run; only checked, not set.
        device: name of a torch device; "auto" is "cuda" if it is available, else "cpu".
        threads: number of CPU threads; None takes torch's.

    Raises:
        FileNotFoundError: ``folder`` holds neither a finished run nor a checkpoint.
        ValueError: a file is damaged (see :func:`mmfused.training.run_folder.load_run`), or the
            backend or the device is not available.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.training.load import load_trained
        >>> from mmfused.training.run import TrainConfig, train
        >>> rows = "file_name,text,label\n,red mug,0\n,blue plate,1\n"
        >>> options = dict(modalities="text", batch_size=2, steps=1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = pathlib.Path(folder, "metadata.csv").write_text(rows)
        ...     config = TrainConfig(f"{folder}/run", data=folder, val=folder, **options)
        ...     summary = train(config)
        ...     trained = load_trained(config.out, device="cpu")
        >>> trained.model.training, trained.device
        (False, device(type='cpu'))
    """
    chosen = pick_device(device)
    settings = read_settings(Path(folder))
    model, tokenizer = load_saved(Path(folder), settings)
    trained = Trained(Path(folder), model, tokenizer, settings, chosen)
    check_backend(backend, chosen, torch.bfloat16 if trained.amp else torch.float32)
    if threads:
        torch.set_num_threads(threads)
    return trained


def load_pretrained(
    model: str,
    source: str,
    *,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    **settings: Any,
) -> Trained:
    r"""Load a pretrained Qwen2-VL, or pretrained encoders, as a model, without a training.

    The model is that of which ``mmfused train --init SOURCE`` with the same options starts a
    training with seed 0. Weights that the source lacks are random, always the same: none in UNITE
    and in UniCA's preset "code" from a Visualized BGE; in MOON2 the routers, whose mixtures
    ``options={"without": ["moe"]}`` leaves out; in the other models all but the encoders.

    Args:
        model: name of the model, a key of ``mmfused.models.MODELS``.
        source: a folder with the parts of the model (`mmfused.models.published.parts_of`), for
            MOON2 and UNITE also a hub name.
        preset: None is "code" if the model has it, else "paper".
        options: fields of the model's config.
        backend: backend with which the model will run; only checked, not set.
        device: name of a torch device; "auto" is "cuda" if it is available, else "cpu".
        threads: number of CPU threads; None takes torch's.
        settings: further settings of :class:`~mmfused.training.config.TrainConfig`, such as
            adapter, tokenizer, image_size and max_length (by default the recipe's, but no more than
            the model reads).

    Raises:
        ValueError: an option is invalid, or the source cannot be used.
        FileNotFoundError: a file of the source is missing.

    Examples:
        >>> import tempfile
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UNITE, UNITEConfig
        >>> from mmfused.models.qwen_export import save_host
        >>> from mmfused.training.load import load_pretrained
        >>> tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> model = UNITE(UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_host(model, tokenizer, folder)
        ...     loaded = load_pretrained("unite", folder, device="cpu", max_length=16)
        >>> loaded.name, loaded.model.picture_size
        ('unite', 256)
    """
    setting = "host" if model in HOSTED else "init"
    config = _config(model, {setting: source}, preset, options, settings)
    chosen = pick_device(device)
    amp = use_amp(config.amp, chosen)
    check_backend(backend, chosen, torch.bfloat16 if amp else torch.float32)
    if threads:
        torch.set_num_threads(threads)
    start, tokenizer = load_start(config), load_tokenizer(config)
    if tokenizer is None:
        raise ValueError(
            f"tokenizer: got None with {source}, which holds no text encoder, expected a tokenizer"
        )
    if "max_length" not in settings:
        longest = meta_model(MODELS[model], model_config(config, start, tokenizer)).longest_text
        config.max_length = min(config.max_length, longest or config.max_length)
    check_start(config, start, tokenizer)
    folder = find_folder(setting, source)
    files = sorted(folder.glob("*.safetensors"))
    if config.adapter is not None:
        files += [Path(config.adapter) / name for name in (CONFIG, WEIGHTS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        # What an untrained classifier predicts means nothing; its preset has the number of classes.
        built = build_model(config, start.values.get("num_classes", 1), tokenizer, start).eval()
    warn_of_random(built, start, source, [name for name, _ in built.named_children()])
    values = {"model": built.config.to_dict(), "training": config.to_dict()}
    return Trained(folder, built, tokenizer, values, chosen, files)


def _config(
    model: Any,
    source: Mapping[str, str],
    preset: str | None,
    options: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> TrainConfig:
    """Return the settings of a training that starts with ``source``; see `load_pretrained`."""
    if preset is None:
        has_code = model in MODELS and "code" in MODELS[model].config.PRESETS
        preset = "code" if has_code else "paper"
    defaults = recipe(model, preset)
    lengths = {name: defaults[name] for name in ("max_length",) if name in defaults}
    fields = {"model": model, "preset": preset, "model_options": dict(options or {})}
    # `out` is required, but nothing is written.
    return TrainConfig(out="unused", **{**fields, **lengths, **source, **settings})
