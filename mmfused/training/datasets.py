"""The training, validation and product sets of a run, and checks that they fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.training.config import TrainConfig

MAX_CLASSES = 10**6
# Side of pictures that no model sees. FLUID uses the same size.
NO_SIZE = 16
# The settings that name product folders.
SPLITS = ("data", "val", "products")

logger: logging.Logger = logging.getLogger(__name__)


def load_data(config: TrainConfig, image_size: int | None = None) -> tuple[Any, Any]:
    """Return the training and the validation set, each with its own draw of swapped texts.

    ``image_size`` is ProductFolder's.
    """
    train_set, val_set = _load_splits(config, image_size)
    if MODELS[config.model].task == "classification":
        _check_classes(train_set, val_set)
    if config.swap_text:
        train_set = product_data.swap_texts(train_set, config.swap_text, seed=2 * config.seed)
        val_set = product_data.swap_texts(val_set, config.swap_text, seed=2 * config.seed + 1)
    return train_set, val_set


def _load_splits(config: TrainConfig, image_size: int | None) -> tuple[Any, Any]:
    if config.data == "generated":
        if config.text_column != "text":
            raise ValueError(
                f"text_column: got {config.text_column!r} with the generated set, "
                "expected 'text', the only one it has"
            )
        if config.val is not None:
            raise ValueError(
                f"val: got {config.val!r} with the generated set, expected none: it has its own"
            )
        train_set = product_data.GeneratedProducts("train")
        return train_set, product_data.GeneratedProducts("val")
    check_folder("data", config.data)
    if config.val is None:
        raise ValueError(
            "val: got nothing, expected a folder with images and metadata.csv to validate on"
        )
    train_set = load_folder("data", config.data, image_size, config.text_column)
    return train_set, load_folder("val", config.val, image_size, config.text_column)


def load_catalogue(
    config: TrainConfig,
    image_size: int | None = None,
) -> product_data.ProductFolder | None:
    """Return the products that candidates are taken from, or None to take them from the data."""
    if config.products is None:
        return None
    return load_folder("products", config.products, image_size)


def check_folder(name: str, folder: str) -> None:
    """Raise FileNotFoundError unless ``folder`` has a metadata.csv; ``name`` is the argument's."""
    if not (Path(folder) / "metadata.csv").is_file():
        raise FileNotFoundError(
            f"{name}: got {folder!r}, expected a folder with images and metadata.csv"
        )


def load_folder(
    name: str,
    folder: str,
    image_size: int | None = None,
    text_column: str = "text",
    num_classes: int | None = None,
) -> product_data.ProductFolder:
    """Return the ProductFolder at ``folder``; skipped rows are logged.

    ``name`` is the argument's, which errors begin with.
    """
    check_folder(name, folder)
    try:
        products = product_data.ProductFolder(
            folder,
            image_size=image_size,
            text_column=text_column,
            num_classes=num_classes,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    _warn_of_skipped(name, products.skipped)
    return products


def _warn_of_skipped(name: str, skipped: list[str], most: int = 5) -> None:
    if skipped:
        more = [f"and {len(skipped) - most} more"] if len(skipped) > most else []
        sentences = "\n  ".join(skipped[:most] + more)
        logger.warning("%s: %d rows skipped\n  %s", name, len(skipped), sentences)


def _check_classes(train_set: Any, val_set: Any) -> None:
    """Raise ValueError if a classifier of these labels would be too large, or not know them all."""
    last = train_set.num_classes - 1
    if last >= MAX_CLASSES:
        raise ValueError(
            f"data: got the label {last}, expected labels below {MAX_CLASSES}: "
            "a classifier has an output for each from 0 on"
        )
    if val_set.num_classes - 1 > last:
        raise ValueError(
            f"val: label {val_set.num_classes - 1} is out of range, "
            f"expected the labels 0 to {last} of the training data"
        )


def stored_side(config: TrainConfig) -> int:
    """Return the short side of the first readable picture of the training data; 32 without any."""
    if config.data == "generated":
        return product_data.GeneratedProducts("train", size=1)[0]["image"].shape[-1]
    check_folder("data", config.data)
    return product_data.first_side(config.data, config.text_column) or 32


def check_rows(config: TrainConfig, expected: Mapping[str, str], *splits: Any) -> None:
    """Raise ValueError unless rows and pictures have the ``expected`` digests, by split."""
    for name, split in zip(SPLITS, splits, strict=True):
        if (None if split is None else split.digest) != expected.get(name):
            where = getattr(config, name) or config.data
            raise ValueError(
                f"resume: {name}: the texts, labels or pictures of {where} are not those "
                "the run was trained with; restore them"
            )
