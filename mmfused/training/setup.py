"""What a training run is made of: where it computes, the data, the tokenizer, the batches and the
model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

import mmfused
from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.models.qwen import pretrained_qwen2_vl
from mmfused.training.run_folder import load_own_tokenizer, load_weights, read_settings

# The contrastive loss depends on it: evaluating with another size gives the same scores and another
# loss.
VAL_BATCH_SIZE = 256
MOST_CLASSES = 10**6
NO_SIZE = 16  # of pictures that no model sees, as FLUID has it
SPLITS = ("data", "val", "products")  # arguments that name product folders
logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """Raises ValueError where that is no device that computes here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, and torch sees no CUDA device here")
    try:
        torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: got {name!r}, expected auto, cpu, cuda or another that torch has here ({reason})"
        ) from error
    return torch.device(name)


def use_amp(name: str, device: torch.device) -> bool:
    """Whether to compute under bf16 autocast; "auto": on CUDA cards that have bf16, and not on a
    CPU, where it is seldom faster.
    """
    if name != "auto":
        return name == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32):
    if name not in mmfused.library.BACKENDS:
        raise ValueError(
            f"backend: got {name!r}, expected one of {', '.join(mmfused.library.BACKENDS)}"
        )
    reasons = mmfused.library.why_not_fused(device, dtype) if name == "fused" else []
    if reasons:
        raise ValueError(f"backend: 'fused' cannot run on {device}: {'; '.join(reasons)}")


def load_data(config, image_size: int | None = None):
    """The training and the validation set, each with its own draw of swapped texts; pictures as by
    ProductFolder.
    """
    if config.data == "generated" and config.text_column != "text":
        raise ValueError(
            f"text_column: got {config.text_column!r} with the generated set, expected 'text', the only one it has"
        )
    if config.data == "generated" and config.val is not None:
        raise ValueError(
            f"val: got {config.val!r} with the generated set, expected none: it has its own"
        )
    if config.data == "generated":
        train_set, val_set = (
            product_data.GeneratedProducts("train"),
            product_data.GeneratedProducts("val"),
        )
    else:
        check_folder("data", config.data)
        if config.val is None:
            raise ValueError(
                "val: got nothing, expected a folder with images and metadata.csv to validate on"
            )
        options = {"image_size": image_size, "text_column": config.text_column}
        train_set = load_folder("data", config.data, **options)
        val_set = load_folder("val", config.val, **options)
    if MODELS[config.model].task == "classification":
        check_classes(train_set, val_set)
    if config.swap_text:
        train_set = product_data.swap_texts(train_set, config.swap_text, seed=2 * config.seed)
        val_set = product_data.swap_texts(val_set, config.swap_text, seed=2 * config.seed + 1)
    return train_set, val_set


def load_catalogue(config, image_size: int | None = None):
    """The products that candidates are taken from; None: from the data themselves."""
    return (
        None
        if config.products is None
        else load_folder("products", config.products, image_size=image_size)
    )


def check_folder(name: str, folder: str) -> None:
    if not (Path(folder) / "metadata.csv").is_file():
        raise FileNotFoundError(
            f"{name}: got {folder!r}, expected a folder with images and metadata.csv"
        )


def load_folder(name: str, folder: str, **options):
    """The ProductFolder of the argument ``name``, which its errors begin with; what it skips is
    logged.
    """
    check_folder(name, folder)
    try:
        products = product_data.ProductFolder(folder, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    warn_of_skipped(name, products)
    return products


def check_classes(train_set, val_set) -> None:
    """Raises ValueError where a classifier of these labels is not to be had, before it is
    allocated.
    """
    if train_set.num_classes > MOST_CLASSES:
        got = f"the label {train_set.num_classes - 1}"
        raise ValueError(
            f"data: got {got}, expected labels below {MOST_CLASSES}: a classifier has an output for each from 0 on"
        )
    if val_set.num_classes > train_set.num_classes:
        known = f"the labels 0 to {train_set.num_classes - 1} of the training data"
        raise ValueError(f"val: label {val_set.num_classes - 1} is out of range, expected {known}")


def warn_of_skipped(name: str, split, most: int = 5):
    if split.skipped:
        more = [f"and {len(split.skipped) - most} more"] if len(split.skipped) > most else []
        logger.warning(
            "%s: %d rows skipped\n  %s",
            name,
            len(split.skipped),
            "\n  ".join(split.skipped[:most] + more),
        )


def load_or_train_tokenizer(config, train_set, products=None):
    """The one that is named, or else the pretrained one's own, or else a new one of the texts of
    training and products.
    """
    named = config.tokenizer or config.text_encoder or config.host
    if config.init:
        tokenizer = load_own_tokenizer(Path(config.init))
    elif named:
        argument = next(
            name for name in ("tokenizer", "text_encoder", "host") if getattr(config, name)
        )
        tokenizer = product_data.load_tokenizer(named, argument)
    else:
        texts = [*train_set.texts, *(products.texts if products is not None else [])]
        tokenizer = product_data.train_tokenizer(
            [text for text in texts if text], vocab_size=config.vocab_size
        )
    return MODELS[config.model].config.prepare_tokenizer(tokenizer)


def image_sizes(config) -> tuple[int | None, int | None]:
    """Sides of pictures and patches, None: the model's own.

    Preset "tiny" has none, unless given: the stored size up to 96, and patches of 8 up to 32, of 16
    above."""
    if config.preset != "tiny" or config.image_encoder or config.host:
        return config.image_size, config.patch_size
    side = config.image_size or min(96, stored_side(config))
    patch = config.patch_size or (8 if side <= 32 else 16)
    if side < patch or (config.image_size and side % patch):
        raise ValueError(f"image_size: got {side}, expected a multiple of patch_size = {patch}")
    return side - side % patch, patch


def picture_size(config, pretrained: Pretrained, image_size, patch_size) -> int:
    """The side of the pictures that the model will take, known before the data are read; small
    where it sees none.
    """
    options = {
        "image_size": image_size,
        "patch_size": patch_size,
        **model_options(config, 1, pretrained),
    }
    return MODELS[config.model].config.picture_size_of(config.preset, **options) or NO_SIZE


def stored_side(config) -> int:
    """The short side of the first picture of the training data that can be read; 32 where there is
    none.
    """
    if config.data == "generated":
        return product_data.GeneratedProducts("train", size=1)[0]["image"].shape[-1]
    check_folder("data", config.data)
    return product_data.first_side(config.data, config.text_column) or 32


def batch_size_of(config, rows: int, world: int = 1) -> int:
    """Items in a batch: as asked, or where there are fewer ``rows``, all that ranks can share; that
    is logged.
    """
    size = min(config.batch_size, rows // world * world)
    if size < config.batch_size:
        logger.warning(
            "batch_size: %d is lowered to %d: there are %d rows", config.batch_size, size, rows
        )
    return size


def make_batches(
    config,
    train_set,
    val_set,
    tokenizer,
    size,
    model_config,
    rank: int = 0,
    world: int = 1,
):
    # The generated set's colours mean something, and its pictures are new enough; photos need every
    # variation.
    augment = config.data != "generated" if config.augment is None else config.augment
    augment = augment and config.modalities != "text"
    collate = make_collate(
        tokenizer, size, config.max_length, model_config, augment=augment, seed=config.seed
    )
    options = {
        "shuffle": True,
        "seed": config.seed,
        "drop_last": True,
        "rank": rank,
        "world": world,
    }
    batches = product_data.Batches(
        train_set, collate, batch_size_of(config, len(train_set), world), **options
    )
    return batches, make_val_batches(
        val_set, make_collate(tokenizer, size, config.max_length, model_config)
    )


def make_collate(tokenizer, size, max_length, model_config, **options):
    """Pixels are normalised as the model takes them."""
    return product_data.Collate(
        tokenizer,
        size,
        max_length,
        mean=model_config.pixel_mean,
        std=model_config.pixel_std,
        **options,
    )


def make_val_batches(val_set, collate, batch_size: int = VAL_BATCH_SIZE):
    return product_data.Batches(
        val_set, collate, batch_size, shuffle=False, seed=0, drop_last=False
    )


def check_rows(config, expected: dict, *splits):
    """Raises ValueError where rows, pictures included, are not those that ``expected`` has the
    digests of.
    """
    for name, split in zip(SPLITS, splits, strict=True):
        if (None if split is None else split.digest) != expected.get(name):
            where = getattr(config, name) or config.data
            raise ValueError(
                f"resume: {name}: the texts, labels or pictures of {where} are not those the run was trained with; put them back"
            )


class Pretrained(NamedTuple):
    """Encoders with their authors' weights, by the names of the model's parts, and the config
    fields that rebuild them.
    """

    fields: dict
    modules: dict


def check_init(config) -> None:
    """Raises ValueError where ``init`` is no folder of a run or checkpoint."""
    if config.init is not None:
        try:
            read_settings(Path(config.init))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"init: got {config.init!r}, expected the folder of a run or checkpoint: {error}"
            ) from error


def load_pretrained(config) -> Pretrained:
    fields, modules = {}, {}
    for name, source, load in (
        (
            "image_encoder",
            config.image_encoder if config.modalities != "text" else None,
            pretrained_vit,
        ),
        (
            "text_encoder",
            config.text_encoder if config.modalities != "image" else None,
            pretrained_text,
        ),
        ("host", config.host, pretrained_qwen2_vl),
    ):
        if source:
            found, modules[name] = (
                load(source, config.image_size) if name == "image_encoder" else load(source)
            )
            fields = {**found, **fields}
    return Pretrained(fields, modules)


def build_model(
    config,
    num_classes,
    tokenizer,
    image_size,
    patch_size,
    pretrained: Pretrained | None = None,
):
    """The model with its weights as they are before training: random but for what is pretrained."""
    kind, pretrained = MODELS[config.model], pretrained or load_pretrained(config)
    for name in pretrained.modules:
        check_vocabulary(pretrained.fields, len(tokenizer), getattr(config, name))
    options = model_options(config, num_classes, pretrained)
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        **kind.config.of_tokenizer(tokenizer),
    }
    model = kind.model(kind.config.preset(config.preset, **{**sizes, **options}))
    for name, module in pretrained.modules.items():
        getattr(model, name).load_state_dict(module.state_dict())
    if config.init:
        load_weights(model, Path(config.init) / "model.safetensors")
    return model


def model_options(config, num_classes: int, pretrained: Pretrained) -> dict:
    """Fields of the model's config: those given over those of what is pretrained, over those that
    follow from the data.
    """
    classes = {"num_classes": num_classes, "modalities": config.modalities}
    return {
        **(classes if MODELS[config.model].task == "classification" else {}),
        **pretrained.fields,
        **config.model_options,
    }


def check_vocabulary(fields: dict, tokens: int, source: str) -> None:
    """Raises ValueError where a pretrained encoder does not know all of the tokenizer's tokens."""
    inner = fields.get("text") or fields.get("host", {}).get("text_config") or {}
    if tokens > inner.get("vocab_size", tokens):
        raise ValueError(
            f"tokenizer: got {tokens} tokens, expected at most {inner['vocab_size']}, as {source} knows"
        )
