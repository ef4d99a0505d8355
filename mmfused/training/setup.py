"""Make the device and the batches that the settings of a run describe."""

from __future__ import annotations

import logging
from typing import Any

import torch

import mmfused
from mmfused import data as product_data
from mmfused.data._common import Resample
from mmfused.models import UNITEProcessor
from mmfused.training.config import Augment, TrainConfig

# Items per batch in validation.
VAL_BATCH_SIZE = 256
logger: logging.Logger = logging.getLogger(__name__)


# ---- device and backend --------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" is CUDA if it is available, otherwise the CPU.

    Raises:
        ValueError: the device does not exist or cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch finds no CUDA device")
    try:
        torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: got {name!r}, expected auto, cpu, cuda or another available device: {reason}"
        ) from error
    return torch.device(name)


def use_amp(name: str, device: torch.device) -> bool:
    """Return whether to compute under bfloat16 autocast.

    "auto" uses autocast only on CUDA devices that support bfloat16.
    """
    if name != "auto":
        return name == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ValueError unless ``name`` is a backend that runs on ``device`` with ``dtype``."""
    if name not in mmfused.library.BACKENDS:
        raise ValueError(
            f"backend: got {name!r}, expected one of {', '.join(mmfused.library.BACKENDS)}"
        )
    reasons = mmfused.library.why_not_fused(device, dtype) if name == "fused" else []
    if reasons:
        raise ValueError(f"backend: 'fused' cannot run on {device}: {'; '.join(reasons)}")


# ---- batches -------------------------------------------------------------------------------------


def batch_size_of(config: TrainConfig, rows: int, world: int = 1) -> int:
    """Return the batch size of training.

    It is ``config.batch_size``, but at most the largest multiple of ``world`` up to ``rows``.
    """
    size = min(config.batch_size, rows // world * world)
    if size < config.batch_size:
        logger.warning(
            "batch_size: %d is lowered to %d, because there are only %d rows",
            config.batch_size,
            size,
            rows,
        )
    return size


def make_batches(
    config: TrainConfig,
    train_set: Any,
    val_set: Any,
    tokenizer: Any,
    size: int,
    model_config: Any,
    rank: int = 0,
    world: int = 1,
) -> tuple[product_data.Batches, product_data.Batches]:
    """Return the training and the validation batches of a classifier.

    Args:
        config: the settings.
        train_set: the training set.
        val_set: the validation set.
        tokenizer: the model's tokenizer.
        size: side of the model's input pictures, in pixels.
        model_config: the model's config, which has the mean and standard deviation of pixels.
        rank: rank of this process.
        world: number of ranks.
    """
    collate = make_collate(
        tokenizer,
        size,
        config.max_length,
        model_config,
        augment="none" if config.modalities == "text" else config.strength,
        seed=config.seed,
    )
    batches = product_data.Batches(
        train_set,
        collate,
        batch_size_of(config, len(train_set), world),
        shuffle=True,
        seed=config.seed,
        drop_last=False,
        spread=True,
        rank=rank,
        world=world,
        workers=config.workers,
    )
    plain = make_collate(tokenizer, size, config.max_length, model_config)
    return batches, make_val_batches(val_set, plain, workers=config.workers)


def make_collate(
    tokenizer: Any,
    size: int,
    max_length: int,
    model_config: Any,
    *,
    augment: Augment = "none",
    seed: int = 0,
    resample: Resample = "bilinear",
) -> product_data.Collate:
    """Return a `Collate` that resizes and normalises pixels as ``model_config`` describes.

    Products are read at the model's size with ``model_config.resample``. With the ``resample`` of
    the arguments, generated pictures are resized, and those of pairs are read.
    """
    return product_data.Collate(
        tokenizer,
        size,
        max_length,
        augment=augment,
        seed=seed,
        mean=model_config.pixel_mean,
        std=model_config.pixel_std,
        format_text=model_config.format_text,
        truncation_side=model_config.truncation_side,
        resize=model_config.resize,
        resample=resample,
    )


def make_reader(
    model: str,
    tokenizer: Any,
    size: int,
    max_length: int,
    model_config: Any,
    **options: Any,
) -> product_data.Collate | UNITEProcessor:
    """Return what turns the items of a `PairSet` into the inputs of a model.

    UNITE gets complete sequences, whose pictures keep their aspect ratio. Their numbers of tokens
    are from that of a square of ``size`` to five times as many, which are the limits of the public
    code at its size. Of the ``options`` of `make_collate`, these sequences use none.
    """
    if model != "unite":
        resample = model_config.resample
        return make_collate(tokenizer, size, max_length, model_config, resample=resample, **options)
    vision = model_config.host["vision_config"]
    side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    tokens = max(1, (size // side) ** 2)
    return UNITEProcessor(
        tokenizer,
        model_config,
        max_length=max_length,
        count_pictures=False,
        picture_tokens=(tokens, 5 * tokens),
    )


def make_val_batches(
    val_set: Any,
    reader: product_data.Collate | UNITEProcessor,
    batch_size: int = VAL_BATCH_SIZE,
    workers: int | None = None,
) -> product_data.Batches:
    """Return batches of all items of ``val_set``, in order."""
    return product_data.Batches(
        val_set,
        reader,
        batch_size,
        shuffle=False,
        seed=0,
        drop_last=False,
        workers=workers,
    )
