"""Load and check the training, validation and product sets of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.training.config import TrainConfig

MAX_CLASSES = 10**6
# Side to which pictures are resized if the model does not see them.
UNUSED_SIDE = 16
# The settings that are product folders.
SPLITS = ("data", "val", "products")

logger: logging.Logger = logging.getLogger(__name__)


def load_data(
    config: TrainConfig,
    image_size: int | None = None,
    num_classes: int | None = None,
    model_config: Any = None,
) -> tuple[Any, Any]:
    """Return the training and the validation set.

    Args:
        config: the settings.
        image_size: passed to :class:`mmfused.data.ProductFolder`.
        num_classes: number of classes of a classifier; None takes those of the training data.
        model_config: the model's config, which says how pictures are resized; None crops them.
    """
    train_set, val_set = _load_splits(config, image_size, model_config)
    if MODELS[config.model].task == "classification":
        _check_classes(train_set, val_set, num_classes)
    if config.swap_text:
        train_set = product_data.swap_texts(train_set, config.swap_text, seed=2 * config.seed)
        val_set = product_data.swap_texts(val_set, config.swap_text, seed=2 * config.seed + 1)
    return train_set, val_set


def _load_splits(
    config: TrainConfig,
    image_size: int | None,
    model_config: Any,
) -> tuple[Any, Any]:
    if config.data == "generated":
        if config.text_column != "text":
            raise ValueError(
                f"text_column: got {config.text_column!r} with the generated set, "
                "expected 'text', its only text column"
            )
        if config.val is not None:
            raise ValueError(
                f"val: got {config.val!r} with the generated set, "
                "expected no folder: a validation set is generated too"
            )
        train_set = product_data.GeneratedProducts("train")
        return train_set, product_data.GeneratedProducts("val")
    check_folder("data", config.data)
    if config.val is None:
        raise ValueError(
            "val: got None, expected the folder of a validation set, with images and metadata.csv"
        )
    column = config.text_column
    train_set = load_folder("data", config.data, image_size, column, model_config=model_config)
    val_set = load_folder("val", config.val, image_size, column, model_config=model_config)
    return train_set, val_set


def load_catalogue(
    config: TrainConfig,
    image_size: int | None = None,
    model_config: Any = None,
) -> product_data.ProductFolder | None:
    """Return the products in ``config.products``, or None if the config has no such folder."""
    if config.products is None:
        return None
    return load_folder("products", config.products, image_size, model_config=model_config)


def check_folder(name: str, folder: str) -> None:
    """Raise FileNotFoundError unless ``folder`` has a metadata.csv.

    Args:
        name: name of the argument, for the error message.
        folder: value of the argument.
    """
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
    model_config: Any = None,
) -> product_data.ProductFolder:
    """Return the ProductFolder at ``folder``, and log the rows that it skips.

    Error messages begin with ``name``, the name of the argument ``folder``. ``model_config`` is the
    model's config, which says how pictures are resized; None crops them. The other arguments are
    those of :class:`mmfused.data.ProductFolder`.
    """
    check_folder(name, folder)
    resizing = {}
    if model_config is not None:
        resizing = {"resize": model_config.resize, "resample": model_config.resample}
    try:
        products = product_data.ProductFolder(
            folder,
            image_size=image_size,
            text_column=text_column,
            num_classes=num_classes,
            **resizing,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    _warn_of_skipped(name, products.skipped)
    return products


def _warn_of_skipped(name: str, skipped: list[str], most: int = 5) -> None:
    if skipped:
        more = [f"and {len(skipped) - most} more"] if len(skipped) > most else []
        reasons = "\n  ".join(skipped[:most] + more)
        logger.warning("%s: %d rows skipped\n  %s", name, len(skipped), reasons)


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
    """Return the short side of the first readable training picture, or 32 if there is none."""
    if config.data == "generated":
        return product_data.GeneratedProducts("train", size=1)[0]["image"].shape[-1]
    check_folder("data", config.data)
    return product_data.first_side(config.data, config.text_column) or 32


def check_rows(config: TrainConfig, expected: Mapping[str, str], *splits: Any) -> None:
    """Raise ValueError if the digest of a split is not the ``expected`` one.

    Args:
        config: the settings.
        expected: digests by the name of the split.
        splits: data sets in the order of ``SPLITS``; None for a split that the run does not have.
    """
    for name, split in zip(SPLITS, splits, strict=True):
        if (None if split is None else split.digest) != expected.get(name):
            where = getattr(config, name) or config.data
            raise ValueError(
                f"resume: {name}: the texts, labels or pictures of {where} are not those that "
                "the run was trained with; restore them"
            )
