"""Make the device, tokenizer, batches and model that the settings of a run describe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mmfused
from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.models.qwen import pretrained_qwen2_vl
from mmfused.training.config import TrainConfig
from mmfused.training.datasets import UNUSED_SIDE, stored_side
from mmfused.training.files import load_weights
from mmfused.training.run_folder import load_own_tokenizer, read_settings

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


# ---- tokenizer and batches -----------------------------------------------------------------------


def load_or_train_tokenizer(config: TrainConfig, train_set: Any, products: Any = None) -> Any:
    """Return the tokenizer that the settings name, or a new tokenizer.

    The first of the settings ``init``, ``tokenizer``, ``text_encoder`` and ``host`` that is given
    determines the tokenizer. Without these settings, a new tokenizer is trained on the texts of
    ``train_set`` and ``products``.
    """
    names = ("tokenizer", "text_encoder", "host")
    setting = next((name for name in names if getattr(config, name)), None)
    if config.init:
        tokenizer = load_own_tokenizer(Path(config.init))
    elif setting:
        tokenizer = product_data.load_tokenizer(getattr(config, setting), setting)
    else:
        texts = [*train_set.texts, *(products.texts if products is not None else [])]
        texts = [text for text in texts if text]
        tokenizer = product_data.train_tokenizer(texts, vocab_size=config.vocab_size)
    return MODELS[config.model].config.prepare_tokenizer(tokenizer)


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


def augments(config: TrainConfig) -> bool:
    """Return whether to augment training pictures.

    Generated pictures are not augmented by default, because augmentation changes their colours,
    which the texts describe.
    """
    return config.data != "generated" if config.augment is None else config.augment


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
        augment=augments(config) and config.modalities != "text",
        seed=config.seed,
    )
    batches = product_data.Batches(
        train_set,
        collate,
        batch_size_of(config, len(train_set), world),
        shuffle=True,
        seed=config.seed,
        drop_last=True,
        rank=rank,
        world=world,
    )
    plain = make_collate(tokenizer, size, config.max_length, model_config)
    return batches, make_val_batches(val_set, plain)


def make_collate(
    tokenizer: Any,
    size: int,
    max_length: int,
    model_config: Any,
    *,
    augment: bool = False,
    seed: int = 0,
) -> product_data.Collate:
    """Return a `Collate` that normalises pixels as ``model_config`` describes."""
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
    )


def make_val_batches(
    val_set: Any,
    collate: product_data.Collate,
    batch_size: int = VAL_BATCH_SIZE,
) -> product_data.Batches:
    """Return batches of all items of ``val_set``, in order."""
    return product_data.Batches(
        val_set, collate, batch_size, shuffle=False, seed=0, drop_last=False
    )


# ---- model ---------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """Pretrained parts of a model."""

    fields: dict[str, Any]  # fields of the model's config that describe the parts
    modules: dict[str, torch.nn.Module]  # the parts, by the name of the setting


def check_init(config: TrainConfig) -> None:
    """Raise ValueError unless ``init`` is None or the folder of a run or checkpoint."""
    if config.init is not None:
        try:
            read_settings(Path(config.init))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"init: got {config.init!r}, expected the folder of a run or checkpoint: {error}"
            ) from error


def load_pretrained(config: TrainConfig) -> Pretrained:
    """Load the pretrained parts that ``config`` names."""
    fields: dict[str, Any] = {}
    modules: dict[str, torch.nn.Module] = {}
    if config.image_encoder and config.modalities != "text":
        part_fields, modules["image_encoder"] = pretrained_vit(
            config.image_encoder, config.image_size
        )
        fields |= part_fields
    if config.text_encoder and config.modalities != "image":
        part_fields, modules["text_encoder"] = pretrained_text(config.text_encoder)
        fields = {**part_fields, **fields}
    if config.host:
        part_fields, modules["host"] = pretrained_qwen2_vl(config.host)
        fields = {**part_fields, **fields}
    return Pretrained(fields, modules)


def image_sizes(config: TrainConfig) -> tuple[int | None, int | None]:
    """Return the sides of pictures and of patches; None leaves a side to the model's config.

    With the preset "tiny" and no pretrained image encoder or host, sides that are not in the
    settings follow from the data. The side of pictures is `stored_side`, but at most 96, rounded
    down to a multiple of the side of patches. The side of patches is 8 for pictures with a side of
    up to 32 pixels, otherwise 16.
    """
    if config.preset != "tiny" or config.image_encoder or config.host:
        return config.image_size, config.patch_size
    side = config.image_size or min(96, stored_side(config))
    patch = config.patch_size or (8 if side <= 32 else 16)
    if side < patch or (config.image_size and side % patch):
        raise ValueError(f"image_size: got {side}, expected a multiple of patch_size = {patch}")
    return side - side % patch, patch


def picture_size(
    config: TrainConfig,
    pretrained: Pretrained,
    image_size: int | None,
    patch_size: int | None,
) -> int:
    """Return the side of the model's input pictures, without building the model.

    Return ``UNUSED_SIDE`` if the model does not take pictures.
    """
    options = {
        "image_size": image_size,
        "patch_size": patch_size,
        **_model_options(config, 1, pretrained),
    }
    return MODELS[config.model].config.picture_size_of(config.preset, **options) or UNUSED_SIDE


def build_model(
    config: TrainConfig,
    num_classes: int,
    tokenizer: Any,
    image_size: int | None,
    patch_size: int | None,
    pretrained: Pretrained | None = None,
) -> Any:
    """Return the model with the weights that training starts from.

    Args:
        config: the settings.
        num_classes: number of classes of a classifier.
        tokenizer: the model's tokenizer.
        image_size: side of the pictures, from :func:`image_sizes`.
        patch_size: side of the patches, from :func:`image_sizes`.
        pretrained: the pretrained parts; if None, they are loaded.
    """
    kind = MODELS[config.model]
    pretrained = pretrained or load_pretrained(config)
    for name in pretrained.modules:
        _check_vocabulary(pretrained.fields, len(tokenizer), getattr(config, name))
    options = {
        "image_size": image_size,
        "patch_size": patch_size,
        **kind.config.of_tokenizer(tokenizer),
        **_model_options(config, num_classes, pretrained),
    }
    model = kind.model(kind.config.preset(config.preset, **options))
    for name, module in pretrained.modules.items():
        getattr(model, name).load_state_dict(module.state_dict())
    if config.init:
        load_weights(model, Path(config.init) / "model.safetensors")
    return model


def _model_options(
    config: TrainConfig,
    num_classes: int,
    pretrained: Pretrained,
) -> dict[str, Any]:
    """Return fields of the model's config.

    Fields of the pretrained parts override fields of the task, and ``config.model_options``
    overrides both.
    """
    from_task = {}
    if MODELS[config.model].task == "classification":
        from_task = {"num_classes": num_classes, "modalities": config.modalities}
    return {**from_task, **pretrained.fields, **config.model_options}


def _check_vocabulary(fields: dict[str, Any], tokens: int, source: str) -> None:
    """Raise ValueError if the tokenizer has more tokens than a pretrained part's vocabulary.

    Args:
        fields: fields of the model's config.
        tokens: number of tokens of the tokenizer.
        source: folder or name of the pretrained part, for the error message.
    """
    text_fields = fields.get("text") or fields.get("host", {}).get("text_config") or {}
    if tokens > text_fields.get("vocab_size", tokens):
        raise ValueError(
            f"tokenizer: got {tokens} tokens, "
            f"expected at most {text_fields['vocab_size']}, the vocabulary of {source}"
        )
