"""The parts of a training: device, backend, tokenizer, batches and the model."""

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
from mmfused.training.datasets import NO_SIZE, stored_side
from mmfused.training.files import load_weights
from mmfused.training.run_folder import load_own_tokenizer, read_settings

# The contrastive loss depends on the batch size; the scores do not.
VAL_BATCH_SIZE = 256
logger: logging.Logger = logging.getLogger(__name__)


# ---- device and backend --------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" is CUDA if there is any, else the CPU.

    Raises:
        ValueError: there is no such device, or it cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, and torch sees no CUDA device here")
    try:
        torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: got {name!r}, expected auto, cpu, cuda or another that torch has here "
            f"({reason})"
        ) from error
    return torch.device(name)


def use_amp(name: str, device: torch.device) -> bool:
    """Return whether to compute under bfloat16 autocast.

    "auto" does so on CUDA devices with bfloat16, but not on a CPU, where it is seldom faster.
    """
    if name != "auto":
        return name == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ValueError unless there is such a backend and it runs on ``device``."""
    if name not in mmfused.library.BACKENDS:
        raise ValueError(
            f"backend: got {name!r}, expected one of {', '.join(mmfused.library.BACKENDS)}"
        )
    reasons = mmfused.library.why_not_fused(device, dtype) if name == "fused" else []
    if reasons:
        raise ValueError(f"backend: 'fused' cannot run on {device}: {'; '.join(reasons)}")


# ---- tokenizer and batches -----------------------------------------------------------------------


def load_or_train_tokenizer(config: TrainConfig, train_set: Any, products: Any = None) -> Any:
    """Return the tokenizer of ``init``, else the named one, else that of a pretrained part.

    Without any of these, a new one is trained on the texts of ``train_set`` and ``products``.
    """
    names = ("tokenizer", "text_encoder", "host")
    argument = next((name for name in names if getattr(config, name)), None)
    if config.init:
        tokenizer = load_own_tokenizer(Path(config.init))
    elif argument:
        tokenizer = product_data.load_tokenizer(getattr(config, argument), argument)
    else:
        texts = [*train_set.texts, *(products.texts if products is not None else [])]
        texts = [text for text in texts if text]
        tokenizer = product_data.train_tokenizer(texts, vocab_size=config.vocab_size)
    return MODELS[config.model].config.prepare_tokenizer(tokenizer)


def batch_size_of(config: TrainConfig, rows: int, world: int = 1) -> int:
    """Return the batch size: as set, or with fewer ``rows``, the largest that ranks can share."""
    size = min(config.batch_size, rows // world * world)
    if size < config.batch_size:
        logger.warning(
            "batch_size: %d is lowered to %d: there are %d rows", config.batch_size, size, rows
        )
    return size


def augments(config: TrainConfig) -> bool:
    """Return whether pictures are augmented; by default all but the generated ones.

    Colours of generated pictures carry meaning, and there are enough of them.
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
    """Return a classifier's batches to train and to validate on.

    Args:
        config: the settings.
        train_set: the items to train on.
        val_set: the items to validate on.
        tokenizer: of the model.
        size: side of the pictures that the model takes.
        model_config: tells how pixels are normalised.
        rank: of this process.
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
    """Return a Collate that normalises pixels as the model expects."""
    return product_data.Collate(
        tokenizer,
        size,
        max_length,
        augment=augment,
        seed=seed,
        mean=model_config.pixel_mean,
        std=model_config.pixel_std,
    )


def make_val_batches(
    val_set: Any,
    collate: product_data.Collate,
    batch_size: int = VAL_BATCH_SIZE,
) -> product_data.Batches:
    """Return batches of all items in order."""
    return product_data.Batches(
        val_set, collate, batch_size, shuffle=False, seed=0, drop_last=False
    )


# ---- model ---------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """Parts with their authors' weights, by name, and the config fields that rebuild them."""

    fields: dict[str, Any]
    modules: dict[str, torch.nn.Module]


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
    """Load the pretrained parts that ``config`` names and its modalities use."""
    fields: dict[str, Any] = {}
    modules: dict[str, torch.nn.Module] = {}
    if config.image_encoder and config.modalities != "text":
        found, modules["image_encoder"] = pretrained_vit(config.image_encoder, config.image_size)
        fields |= found
    if config.text_encoder and config.modalities != "image":
        found, modules["text_encoder"] = pretrained_text(config.text_encoder)
        fields = {**found, **fields}
    if config.host:
        found, modules["host"] = pretrained_qwen2_vl(config.host)
        fields = {**found, **fields}
    return Pretrained(fields, modules)


def image_sizes(config: TrainConfig) -> tuple[int | None, int | None]:
    """Return the sides of pictures and of patches; None leaves one to the model.

    For the preset "tiny" they follow from the data unless given: the stored size up to 96, and
    patches of 8 for pictures up to 32, of 16 above.
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
    """Return the side of the pictures that the model will take, before the data are read.

    A model without pictures gets ``NO_SIZE``.
    """
    options = {
        "image_size": image_size,
        "patch_size": patch_size,
        **_model_options(config, 1, pretrained),
    }
    return MODELS[config.model].config.picture_size_of(config.preset, **options) or NO_SIZE


def build_model(
    config: TrainConfig,
    num_classes: int,
    tokenizer: Any,
    image_size: int | None,
    patch_size: int | None,
    pretrained: Pretrained | None = None,
) -> Any:
    """Return the model before training: random weights, except those pretrained or of ``init``."""
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

    Those in ``config.model_options`` override those of pretrained parts, and these override what
    follows from the data.
    """
    from_data = {}
    if MODELS[config.model].task == "classification":
        from_data = {"num_classes": num_classes, "modalities": config.modalities}
    return {**from_data, **pretrained.fields, **config.model_options}


def _check_vocabulary(fields: dict[str, Any], tokens: int, source: str) -> None:
    """Raise ValueError if a pretrained part has fewer tokens than the tokenizer."""
    inner = fields.get("text") or fields.get("host", {}).get("text_config") or {}
    if tokens > inner.get("vocab_size", tokens):
        raise ValueError(
            f"tokenizer: got {tokens} tokens, "
            f"expected at most {inner['vocab_size']}, the vocabulary of {source}"
        )
