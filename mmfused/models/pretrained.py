"""Loading of pretrained encoders, and of the config fields that rebuild the encoders.

Only JSON and safetensors files are read. Paths, addresses, pickles and code that a config.json
names are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfused.json_files import read_object
from mmfused.models.encoders import (
    ROPE,
    check_architecture,
    check_image,
    check_text,
    create_vit,
    declared,
    import_timm,
    text_class,
    text_fields,
    without,
)
from mmfused.models.fields import Kinds, check_field, check_fields, refusing
from mmfused.models.weights import check_size, find_folder, on_meta, read_weights

# The fields that earlier versions of transformers wrote in place of rope_parameters.
LEGACY_ROPE: dict[str, object] = {
    "rope_theta": float,
    "global_rope_theta": float,
    "local_rope_theta": float,
    "rope_scaling": ROPE,
}
# timm's default normalisation of pixels.
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pretrained_vit(
    source: str,
    image_size: int | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained VisionTransformer.

    Args:
        source: a folder in timm's format (config.json, model.safetensors), or the name of a timm
            model with weights on the hub. Only model.safetensors is downloaded.
        image_size: side of the pictures, to which the position embedding is resampled. None: the
            pretrained size.

    Returns:
        The config fields that rebuild the encoder without ``source`` (image, image_dim, image_stem,
        pixel_mean, pixel_std), and the encoder.
    """
    timm, folder = import_timm(), Path(source)
    size = {} if image_size is None else {"img_size": image_size}
    if folder.is_dir():
        return vit_of_folder(folder, size)
    pretrained_cfg = timm.is_model(source) and timm.models.get_pretrained_cfg(source)
    if not pretrained_cfg or not getattr(pretrained_cfg, "hf_hub_id", None):
        expected = "a folder, or the name of a timm model with weights on the hub"
        raise ValueError(f"image encoder: got {source!r}, expected {expected}")
    with on_meta():  # checked before the download
        check_vit(source, create_vit(name=source, num_classes=0))
    overlay = {"hf_hub_filename": "model.safetensors"}
    vit = timm.create_model(
        model_name=source,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=0,
        **size,
    )
    pixels = {name: tuple(vit.pretrained_cfg[name]) for name in PIXELS}
    return vit_fields({"name": source.split(".")[0], **size}, vit, pixels), vit


def vit_fields(image: dict[str, Any], vit: Any, pixels: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields that rebuild ``vit``."""
    return {
        "image": image,
        "image_dim": vit.embed_dim,
        "image_stem": "patch",
        "pixel_mean": pixels["mean"],
        "pixel_std": pixels["std"],
    }


def vit_of_folder(folder: Path, size: dict[str, int]) -> tuple[dict[str, Any], nn.Module]:
    """Load a folder in timm's format.

    timm's own loader would also load from the paths, addresses and pickles that config.json names.
    """
    timm = import_timm()
    saved_config = read_encoder_folder("image encoder", folder, "model.safetensors")
    where = f"image encoder: {folder / 'config.json'}"
    check_architecture(f"{where}: architecture", saved_config.get("architecture"))
    arguments = saved_config.get("model_args", {})
    pretrained = saved_config.get("pretrained_cfg", saved_config)
    check_field(f"{where}: model_args", arguments, dict)
    check_field(f"{where}: pretrained_cfg", pretrained, dict)
    saved = {"name": saved_config["architecture"], **without(arguments, "num_classes")}
    image = {**saved, **size}
    check_image(saved)
    check_image(image)
    pixels = {}
    for name, default in PIXELS.items():
        value = pretrained.get(name, default)
        check_field(f"{where}: {name}", value, tuple[float, float, float])
        pixels[name] = tuple(value)
    with on_meta():
        meta_vit = create_vit(**saved, num_classes=0)
    check_vit(folder, meta_vit)
    weights = read_weights("image encoder", folder)
    check_size(f"image encoder: {folder}", weights, meta_vit)
    vit = create_vit(num_classes=0, **image)
    with refusing(f"image encoder: {folder} holds the weights of another model"):
        weights = timm.models.vision_transformer.checkpoint_filter_fn(weights, vit)
        missing = vit.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"image encoder: {folder} lacks {len(missing)} weights, {missing[0]} among them"
        )
    return vit_fields(image, vit, pixels), vit


def check_vit(source: object, encoder: nn.Module) -> None:
    """Require a VisionTransformer."""
    if not isinstance(encoder, import_timm().models.VisionTransformer):
        found = f"{str(source)!r}, a {type(encoder).__name__}"
        raise ValueError(f"image encoder: got {found}, expected a VisionTransformer")


def pretrained_text(source: str) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained text encoder.

    Args:
        source: a folder in transformers' format (config.json, model.safetensors), or a hub name.

    Returns:
        The config fields that rebuild the encoder without ``source`` (text, text_dim), and the
        encoder.
    """
    folder = find_folder("text encoder", source)
    saved_config = read_encoder_folder("text encoder", folder, "*.safetensors")
    config_class, kinds = text_fields(saved_config.get("model_type"))
    kept = keep_fields(saved_config, {**declared(config_class), **kinds})
    model_type = saved_config["model_type"]
    with refusing(f"text encoder: {folder / 'config.json'} cannot build a {model_type!r}"):
        config = config_class(**without(kept, "model_type"))
        model_class, no_pooler = text_class(config)
        with on_meta():
            meta_model = model_class(config, **no_pooler)
    options = {name: value for name, value in config.to_diff_dict().items() if name in kinds}
    options["model_type"] = model_type
    check_text(options)
    weights = read_weights("text encoder", folder)
    check_size(f"text encoder: {folder}", weights, meta_model)
    encoder = build_with_weights("text encoder", source, model_class, config, weights, **no_pooler)
    return {"text": options, "text_dim": config.hidden_size}, encoder


def keep_fields(saved_config: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """Return the fields of a config.json that are in ``kinds``, after a check of their values."""
    kinds = {**kinds, **LEGACY_ROPE} if "rope_parameters" in kinds else kinds
    kept = {
        name: value
        for name, value in saved_config.items()
        if name in kinds and (value is not None or name not in LEGACY_ROPE)
    }
    check_fields("config.json", kept, kinds)
    return kept


def build_with_weights(
    name: str,
    source: str,
    model_class: Any,
    config: Any,
    weights: dict[str, Tensor],
    **options: Any,
) -> Any:
    """Build a model of transformers with ``weights`` in float32.

    The names of the weights may have a prefix. Given a folder instead of weights, transformers
    would also load the adapters and quantisers that the folder names.
    """
    with refusing(f"{name}: {source!r} holds the weights of another model"):
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("lm_head"))
    if missing:
        lacking = f"{len(missing)} weights of {config.model_type}, {missing[0]} among them"
        raise ValueError(f"{name}: {source!r} lacks {lacking}")
    return model


def read_encoder_folder(name: str, folder: Path, weights: str) -> dict[str, Any]:
    """Return the contents of a folder's config.json.

    Raises:
        FileNotFoundError: there is no config.json, or no file that matches the pattern ``weights``.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob(weights)):
        raise FileNotFoundError(
            f"{name}: {folder} lacks a file, expected config.json and {weights}"
        )
    return read_object(folder / "config.json")
