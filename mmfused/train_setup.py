"""What a training run is made of: where it computes, the data, the tokenizer, the batches and the model."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch

import mmfused
from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.models.encoders import pretrained_text, pretrained_vit
from mmfused.models.qwen import pretrained_qwen2_vl
from mmfused.run_folder import load_weights, read_settings

# The contrastive loss depends on it: evaluating with another size gives the same scores and another loss.
VAL_BATCH_SIZE = 256
logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, and torch sees no CUDA device here")
    return device


def use_amp(name: str, device: torch.device) -> bool:
    """Whether to compute under bf16 autocast; "auto": on CUDA cards that have bf16, and not on a CPU, where it is seldom faster."""
    if name != "auto":
        return name == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32):
    if name not in mmfused.library.BACKENDS:
        raise ValueError(f"backend: got {name!r}, takes one of {', '.join(mmfused.library.BACKENDS)}")
    reasons = mmfused.library.why_not_fused(device, dtype) if name == "fused" else []
    if reasons:
        raise ValueError(f"backend: 'fused' cannot run on {device}: {'; '.join(reasons)}")


def load_data(config):
    """The training and the validation set, each with its own draw of swapped texts."""
    if config.data == "generated" and config.text_column != "text":
        raise ValueError(f"text_column: got {config.text_column!r} with the generated set, takes 'text', the only one it has")
    if config.data == "generated":
        train_set, val_set = product_data.GeneratedProducts("train"), product_data.GeneratedProducts("val")
    elif config.val is None:
        raise ValueError("val: got nothing, takes a folder with images and metadata.csv to validate on")
    else:
        train_set, val_set = (
            product_data.ProductFolder(folder, text_column=config.text_column) for folder in (config.data, config.val)
        )
    for name, split in (("data", train_set), ("val", val_set)):
        if len(split) == 0:
            raise ValueError(f"{name}: {getattr(config, name)} holds no usable row, takes at least one")
        warn_of_skipped(name, split)
    if MODELS[config.model].task == "classification" and val_set.num_classes > train_set.num_classes:
        known = f"the labels 0 to {train_set.num_classes - 1} of the training data"
        raise ValueError(f"val: label {val_set.num_classes - 1} is out of range, takes {known}")
    if config.swap_text:
        train_set = product_data.swap_texts(train_set, config.swap_text, seed=2 * config.seed)
        val_set = product_data.swap_texts(val_set, config.swap_text, seed=2 * config.seed + 1)
    return train_set, val_set


def load_catalogue(config):
    """The products that candidates are taken from; None: from the data themselves."""
    if config.products is None:
        return None
    products = product_data.ProductFolder(config.products)
    warn_of_skipped("products", products)
    return products


def warn_of_skipped(name: str, split, most: int = 5):
    if split.skipped:
        more = [f"and {len(split.skipped) - most} more"] if len(split.skipped) > most else []
        logger.warning("%s: %d rows skipped\n  %s", name, len(split.skipped), "\n  ".join(split.skipped[:most] + more))


def load_or_train_tokenizer(config, train_set, products=None):
    """The one that is named, or else the pretrained one's own, or else a new one of the texts of training and products."""
    named = f"{config.init}/tokenizer" if config.init else config.tokenizer or config.text_encoder or config.host
    if named:
        tokenizer = product_data.load_tokenizer(named)
    else:
        texts = [*train_set.texts, *(products.texts if products is not None else [])]
        tokenizer = product_data.train_tokenizer([text for text in texts if text], vocab_size=config.vocab_size)
    return MODELS[config.model].config.prepare_tokenizer(tokenizer)


def image_sizes(config, train_set) -> tuple[int | None, int | None]:
    """Sides of pictures and patches, None: the model's own.

    Preset "tiny" has none, unless given: the stored size up to 96, and patches of 8 up to 32, of 16 above.
    """
    if config.preset != "tiny" or config.image_encoder or config.host:
        return config.image_size, config.patch_size
    pictures = (item["image"] for item in map(train_set.__getitem__, range(len(train_set))) if item["image_present"])
    side = config.image_size or min(96, *next(pictures, torch.empty(3, 32, 32)).shape[1:])
    patch = config.patch_size or (8 if side <= 32 else 16)
    if side < patch or (config.image_size and side % patch):
        raise ValueError(f"image_size: got {side}, takes a multiple of patch_size = {patch}")
    return side - side % patch, patch


def make_batches(config, train_set, val_set, tokenizer, size, model_config, rank: int = 0, world: int = 1):
    # The generated set's colours mean something, and its pictures are new enough; photos need every variation.
    augment = config.data != "generated" if config.augment is None else config.augment
    augment = augment and config.modalities != "text"
    collate = make_collate(tokenizer, size, config.max_length, model_config, augment=augment, seed=config.seed)
    options = {"shuffle": True, "seed": config.seed, "drop_last": True, "rank": rank, "world": world}
    batches = product_data.Batches(train_set, collate, min(config.batch_size, len(train_set) // world * world), **options)
    return batches, make_val_batches(val_set, make_collate(tokenizer, size, config.max_length, model_config))


def make_collate(tokenizer, size, max_length, model_config, **options):
    """Pixels are normalised as the model takes them."""
    return product_data.Collate(tokenizer, size, max_length, mean=model_config.pixel_mean, std=model_config.pixel_std, **options)


def make_val_batches(val_set, collate, batch_size: int = VAL_BATCH_SIZE):
    return product_data.Batches(val_set, collate, batch_size, shuffle=False, seed=0, drop_last=False)


def digest(dataset) -> str:
    """SHA-256 of the rows' texts and labels, in their order: whether they are the ones another run saw."""
    return hashlib.sha256(json.dumps([list(dataset.texts), list(map(int, dataset.labels))]).encode()).hexdigest()


def check_rows(config, expected: dict, train_set, val_set, products=None):
    """Raises ValueError where the rows are not those that ``expected``, the checkpoint's digests, were made from."""
    for name, split in (("data", train_set), ("val", val_set), ("products", products)):
        if split is not None and digest(split) != expected[name]:
            where = getattr(config, name) or config.data
            raise ValueError(f"resume: {name}: the rows of {where} are not those the run was trained with; put them back")


def build_model(config, num_classes, tokenizer, image_size, patch_size):
    """The model with its weights as they are before training: random but for what is pretrained."""
    kind = MODELS[config.model]
    options, loaded = dict(config.model_options), {}
    if kind.task == "classification":
        options = {"num_classes": num_classes, "modalities": config.modalities, **options}
    known = kind.config.of_tokenizer(tokenizer)
    for name, source, load in (
        ("image_encoder", config.image_encoder if config.modalities != "text" else None, pretrained_vit),
        ("text_encoder", config.text_encoder if config.modalities != "image" else None, pretrained_text),
        ("host", config.host, pretrained_qwen2_vl),
    ):
        if source:
            fields, loaded[name] = load(source, config.image_size) if name == "image_encoder" else load(source)
            options = {**fields, **options}
            check_vocabulary(fields, len(tokenizer), source)
    model = kind.model(kind.config.preset(config.preset, image_size=image_size, patch_size=patch_size, **known, **options))
    for name, module in loaded.items():
        getattr(model, name).load_state_dict(module.state_dict())
    if config.init:
        read_settings(Path(config.init))  # says what is wrong with it
        load_weights(model, Path(config.init) / "model.safetensors")
    return model


def check_vocabulary(fields: dict, tokens: int, source: str) -> None:
    """Raises ValueError where a pretrained encoder does not know all of the tokenizer's tokens."""
    inner = fields.get("text") or fields.get("host", {}).get("text_config") or {}
    if tokens > inner.get("vocab_size", tokens):
        raise ValueError(f"tokenizer: got {tokens} tokens, takes at most {inner['vocab_size']}, as {source} knows")
