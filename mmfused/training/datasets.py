"""Load and check the training, validation and product sets of a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfused import data as product_data
from mmfused.data import PairSet
from mmfused.data.pair_formats import PAIR_FORMATS
from mmfused.data.tables import splits_of
from mmfused.data.webqa import has_both_splits
from mmfused.models import MODELS
from mmfused.training.config import Labels, TrainConfig

MAX_CLASSES = 10**6
# Side to which pictures are resized if the model does not see them.
UNUSED_SIDE = 16
# Side of the pictures of pairs for models whose size follows from the data.
PAIRS_SIDE = 96
# The settings that are data sets.
SPLITS = ("data", "val", "products")
# Splits to validate with in training, and to measure or embed, in the order of preference.
FOR_VALIDATION = ("validation", "valid", "val", "dev", "test")
HELD_OUT = ("test", *FOR_VALIDATION[:-1])
# Settings that pairs do not have. The pictures of pairs are always streamed.
OF_PRODUCTS = ("columns", "text_column", "labels", "stream")

logger: logging.Logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A data set that a setting or an argument names."""

    name: str  # of the setting, for error messages
    path: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    labels: Labels = "auto"
    split: str | None = None  # None: the first of ``splits`` that the set has
    splits: tuple[str, ...] = ("train",)
    stream: bool | None = None
    needs_label: bool = True

    @property
    def format_name(self) -> str:
        """The format, detected if it is not given.

        Raises:
            FileNotFoundError: the path does not exist.
            ValueError: the path holds no data set in a known format.
        """
        if not Path(self.path).exists():
            raise FileNotFoundError(
                f"{self.name}: got {self.path!r}, expected a folder with images and metadata.csv, "
                "or another data set"
            )
        try:
            if self.format is not None:
                product_data.check_format(self.format)
            return self.format or product_data.find_format(self.path)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def holds_pairs(self) -> bool:
        """Whether the data set has explicit pairs of queries and candidates."""
        return self.format_name in PAIR_FORMATS

    @property
    def found_splits(self) -> list[str]:
        """The splits of the data set; [] if it has none."""
        if self.holds_pairs:
            return ["train", "test"]
        return splits_of(self.path, self.format)

    @property
    def chosen_split(self) -> str:
        """The split that is read.

        Raises:
            ValueError: the data set lacks the split that is named.
        """
        found = self.found_splits
        if self.split is not None and self.split not in found:
            expected = f"one of {', '.join(found)}" if found else "none: it has no splits"
            raise ValueError(
                f"{self.name}: split: got {self.split!r} for {self.path}, expected {expected}"
            )
        first = found[0] if found else "train"
        return self.split or next((name for name in self.splits if name in found), first)


def sources(config: TrainConfig) -> dict[str, Source]:
    """Return the data sets of a run by setting; a fraction as ``val`` is none."""
    reading = {"format": config.format, "columns": config.column_names, "labels": config.labels}
    reading["stream"] = config.stream
    found = {"data": Source("data", config.data, split=config.split, **reading)}
    if config.val is not None and config.val_fraction is None:
        found["val"] = Source("val", config.val, splits=FOR_VALIDATION, **reading)
    if config.products is not None:
        columns = config.products_columns
        found["products"] = Source(
            "products", config.products, columns=columns, stream=config.stream
        )
    return found


def load_data(
    config: TrainConfig,
    image_size: int | None = None,
    num_classes: int | None = None,
    model_config: Any = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Any, Any, Any]:
    """Return the training, the validation and the product set; None if there are no products.

    Args:
        config: the settings.
        image_size: passed to :class:`mmfused.data.ProductFolder`.
        num_classes: number of classes of a classifier; None takes those of the training data.
        model_config: the model's config, which says how pictures are resized; None crops them.
        class_names: names of a classifier's classes; None takes those of the training data.
    """
    if config.data == "generated":
        train_set, val_set = _generated(config)
    elif sources(config)["data"].holds_pairs:
        return *_load_pair_splits(config), None
    else:
        train_set, val_set = _load_splits(config, image_size, model_config, class_names)
    products = None
    if config.products is not None:
        source = as_named(sources(config)["products"], train_set)
        products = load_products(source, image_size, model_config=model_config)
    if MODELS[config.model].task == "classification":
        _check_classes(train_set, val_set, num_classes)
    else:
        share_labels({"data": train_set, "val": val_set, "products": products})
    if config.swap_text:
        train_set = product_data.swap_texts(train_set, config.swap_text, seed=2 * config.seed)
        val_set = product_data.swap_texts(val_set, config.swap_text, seed=2 * config.seed + 1)
    return train_set, val_set, products


def _generated(config: TrainConfig) -> tuple[Any, Any]:
    for name, default in (
        ("text_column", "text"),
        ("columns", None),
        ("format", None),
        ("labels", "auto"),
        ("stream", None),
        ("split", None),
    ):
        value = getattr(config, name)
        if value != default:
            raise ValueError(
                f"{name}: got {value!r} with the generated set, expected {default!r}: it has no "
                "files"
            )
    if config.val is not None:
        raise ValueError(
            f"val: got {config.val!r} with the generated set, "
            "expected no folder: a validation set is generated too"
        )
    train_set = product_data.GeneratedProducts("train")
    return train_set, product_data.GeneratedProducts("val")


def _load_splits(
    config: TrainConfig,
    image_size: int | None,
    model_config: Any,
    class_names: Sequence[str] | None,
) -> tuple[Any, Any]:
    found = sources(config)
    found["val"] = _val_source(config, found)
    is_classifier = MODELS[config.model].task == "classification"
    train_set = load_products(
        found["data"], image_size, model_config=model_config, class_names=class_names
    )
    if config.val_fraction is not None:
        by = "row" if is_classifier else "label"
        rest, part = _split(train_set, config.val_fraction, by=by)
        if not is_classifier and config.products is None and len({*part.labels}) < 2:
            raise ValueError(
                f"val: got {config.val}, which leaves items of one label for validation, expected "
                "a larger fraction: items of one label stay together, and are searched for"
            )
        return rest, part
    val_set = load_products(
        as_named(found["val"], train_set),
        image_size,
        model_config=model_config,
        class_names=train_set.class_names if is_classifier else None,
    )
    return train_set, val_set


def as_named(source: Source, other: Any) -> Source:
    """Return ``source``, whose labels are names if those of ``other`` are, even if they are ids."""
    if source.labels == "auto" and other.class_names is not None and hasattr(other, "relabel"):
        return source._replace(labels="name")
    return source


def _val_source(config: TrainConfig, found: Mapping[str, Source]) -> Source:
    """Return the validation set that the settings name, or the test set in ``data``.

    With a fraction, the result is unused.

    Raises:
        ValueError: the settings name none.
    """
    if "val" in found or config.val_fraction is not None:
        return found.get("val", found["data"])
    data = found["data"]
    if data.format_name == "webqa" and has_both_splits(Path(data.path)):
        return data._replace(name="val", split="test")
    if not data.holds_pairs and data.chosen_split not in FOR_VALIDATION:
        for split in FOR_VALIDATION:
            if split in data.found_splits:
                return data._replace(name="val", split=split)
    raise ValueError(
        "val is required: a validation set, or the fraction of data that becomes it, such as 0.1"
    )


def _split(whole: Any, fraction: float, **options: Any) -> tuple[Any, Any]:
    try:
        return whole.split(fraction, **options)
    except ValueError as error:
        raise ValueError(f"val: {error}") from error


def _load_pair_splits(config: TrainConfig) -> tuple[PairSet, PairSet]:
    """Return the training and the validation set of pairs."""
    if MODELS[config.model].task == "classification":
        raise ValueError(
            f"data: got {config.data!r}, which holds pairs, with model {config.model!r}, "
            "expected products with labels"
        )
    for name in ("products", *OF_PRODUCTS, "swap_text"):
        value, default = getattr(config, name), getattr(type(config), name)
        if value != default and not (name == "stream" and value):
            raise ValueError(
                f"{name}: got {value!r} with {config.data!r}, which holds pairs, "
                "expected products with labels"
            )
    found = sources(config)
    val = _val_source(config, found)
    train_set = load_pairs(found["data"])
    if config.val_fraction is not None:
        return _split(train_set, config.val_fraction)
    if not val.holds_pairs:
        raise ValueError(f"val: got {val.path!r}, which holds no pairs, expected pairs as in data")
    return train_set, load_pairs(val)


def load_products(
    source: Source,
    image_size: int | None = None,
    num_classes: int | None = None,
    model_config: Any = None,
    class_names: Sequence[str] | None = None,
) -> product_data.ProductFolder:
    """Return the products of ``source``, and log the rows that it skips.

    ``model_config`` is the model's config, which says how pictures are resized; None crops them.
    The other arguments are those of :class:`mmfused.data.ProductFolder`.
    """
    if source.holds_pairs:
        raise ValueError(
            f"{source.name}: got {source.path!r}, which holds pairs, expected products with labels"
        )
    resizing = {}
    if model_config is not None:
        resizing = {"resize": model_config.resize, "resample": model_config.resample}
    products = read_products(
        source,
        image_size=image_size,
        num_classes=num_classes,
        class_names=class_names,
        **resizing,
    )
    _warn_of_skipped(source.name, products.skipped)
    return products


def read_products(source: Source, **options: Any) -> product_data.ProductFolder:
    """Return the products of ``source``, which :class:`mmfused.data.ProductFolder` reads."""
    split = source.chosen_split
    try:
        return product_data.ProductFolder(
            source.path,
            format=source.format,
            columns=source.columns,
            labels=source.labels,
            split=split,
            stream=source.stream,
            needs_label=source.needs_label,
            **options,
        )
    except ValueError as error:
        raise _named(source, error) from error


def load_pairs(source: Source) -> PairSet:
    """Return the pairs of ``source``, and log the rows that it skips."""
    pairs = read_pairs(source)
    _warn_of_skipped(source.name, pairs.skipped)
    return pairs


def read_pairs(source: Source) -> PairSet:
    """Return the pairs of ``source``, which :func:`mmfused.data.open_pairs` reads."""
    split: Any = source.chosen_split
    try:
        return product_data.open_pairs(source.path, format=source.format, split=split)
    except ValueError as error:
        raise _named(source, error) from error


def _named(source: Source, error: ValueError) -> ValueError:
    """Return the error with the name of the setting before its message."""
    message = f"{source.name}: {error}"
    if "a header line without" in message and not source.columns:
        message += "; columns gives other names"
    return ValueError(message)


def _warn_of_skipped(name: str, skipped: Sequence[str], most: int = 5) -> None:
    if skipped:
        more = [f"and {len(skipped) - most} more"] if len(skipped) > most else []
        reasons = "\n  ".join([*skipped[:most], *more])
        logger.warning("%s: %d rows skipped\n  %s", name, len(skipped), reasons)


def share_labels(sets: Mapping[str, Any]) -> None:
    """Give equal names of classes equal labels in all sets, which may be None.

    Raises:
        ValueError: the labels of some sets are names, and those of others are numbers.
    """
    given = {name: one for name, one in sets.items() if one is not None}
    named = {name: one for name, one in given.items() if one.class_names is not None}
    # The generated sets have the same names already.
    if not named or not all(hasattr(one, "relabel") for one in named.values()):
        return
    for name in given:
        if name not in named:
            raise ValueError(
                f"{name}: got labels that are numbers, expected names as in {next(iter(named))}"
            )
    names = list(dict.fromkeys(name for one in named.values() for name in one.class_names))
    index = {name: label for label, name in enumerate(names)}
    for one in named.values():
        numbers = np.array([index[name] for name in one.class_names], dtype=np.int64)
        one.relabel(numbers, names)


def _check_classes(train_set: Any, val_set: Any, num_classes: int | None) -> None:
    """Raise ValueError if a label is too large.

    Labels must be below ``num_classes``. If it is None, training labels must be below
    ``MAX_CLASSES``, and validation labels must be at most the largest training label.
    """
    largest = train_set.num_classes - 1
    if num_classes is not None:
        for name, split in (("data", train_set), ("val", val_set)):
            if split.num_classes > num_classes:
                raise ValueError(
                    f"{name}: got the label {split.num_classes - 1}, "
                    f"expected labels from 0 to {num_classes - 1}, the classes of the model"
                )
    elif largest >= MAX_CLASSES:
        raise ValueError(
            f"data: got the label {largest}, expected labels below {MAX_CLASSES}: "
            "a classifier has an output for each label from 0 to the largest"
        )
    elif val_set.num_classes - 1 > largest:
        raise ValueError(
            f"val: got the label {val_set.num_classes - 1}, "
            f"expected labels from 0 to {largest}, the largest label of the training data"
        )


def stored_side(config: TrainConfig) -> int:
    """Return the short side of the first readable training picture, or 32 if there is none.

    The pictures of pairs have many sizes, for which the result is `PAIRS_SIDE`.
    """
    if config.data == "generated":
        return product_data.GeneratedProducts("train", size=1)[0]["image"].shape[-1]
    source = sources(config)["data"]
    if source.holds_pairs:
        return PAIRS_SIDE
    try:
        side = product_data.first_side(
            source.path,
            format=source.format,
            columns=source.columns,
            split=source.chosen_split,
        )
    except ValueError as error:
        raise _named(source, error) from error
    return side or 32


def rows_digest(split: Any) -> str:
    """Return the digest of a set that does not depend on how its pictures are read."""
    return getattr(split, "fingerprint", None) or split.digest


def resuming(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Return the settings with which the data of a run are read again.

    Earlier versions decoded all pictures at the start, and compared the digests of whole files.
    """
    if config.stream is None and "stream" not in settings["training"]:
        return dataclasses.replace(config, stream=False)
    return config


def check_rows(config: TrainConfig, settings: Mapping[str, Any], *splits: Any) -> None:
    """Raise ValueError if the digest of a split is not the one that a run was trained with.

    Args:
        config: the settings.
        settings: the saved settings of the run.
        splits: data sets in the order of ``SPLITS``; None for a split that the run does not have.
    """
    expected = settings["rows"]
    for name, split in zip(SPLITS, splits, strict=True):
        # Earlier versions read every picture in full, and saved the digest of that.
        digests = (None,) if split is None else (rows_digest(split), split.digest)
        if expected.get(name) not in digests:
            where = getattr(config, name) or config.data
            raise ValueError(
                f"resume: {name}: the texts, labels or pictures of {where} are not those that "
                "the run was trained with; restore them"
            )
