"""Loading of pretrained encoders, and of the config fields that rebuild the encoders.

Only JSON and safetensors files are read. Paths, addresses, pickles and code that a config.json
names are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfused.json_files import read_object
from mmfused.models.encoders import (
    ROPE,
    check_activation,
    check_architecture,
    check_image,
    check_text,
    check_vit,
    create_vit,
    declared,
    import_timm,
    is_eva,
    quiet_transformers,
    text_class,
    text_fields,
    without,
)
from mmfused.models.fields import Kinds, check_field, check_fields, refusing
from mmfused.models.weights import (
    check_size,
    find_folder,
    named,
    on_meta,
    read_weights,
    same_end,
    weights_path,
)

# The fields that earlier versions of transformers wrote in place of rope_parameters.
LEGACY_ROPE: dict[str, object] = {
    "rope_theta": float,
    "global_rope_theta": float,
    "local_rope_theta": float,
    "rope_scaling": ROPE,
}
# The fields with the name of an activation.
ACTIVATIONS = ("hidden_act", "activation", "hidden_activation", "conv_act")
# The name of a weight in a numbered layer.
IN_LAYER = re.compile(r"(?:layers?|blocks|layer_groups|albert_layers)\.\d+\.")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# timm's default normalisation of pixels.
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pretrained_vit(
    source: str,
    image_size: int | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained VisionTransformer or Eva.

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
        check_vit(f"image encoder: got {source!r}, ", create_vit(name=source, num_classes=0))
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
    check_vit(f"image encoder: got {str(folder)!r}, ", meta_vit)
    weights = read_weights("image encoder", folder)
    check_size(f"image encoder: {weights_path(folder)}", weights, meta_vit)
    vit = create_vit(num_classes=0, **image)
    path = weights_path(folder)
    with refusing(f"image encoder: {path} holds the weights of another model"):
        family = timm.models.eva if is_eva(saved["name"]) else timm.models.vision_transformer
        weights = family.checkpoint_filter_fn(weights, vit)
        missing, unexpected = vit.load_state_dict(weights, strict=False)
    check_keys(f"image encoder: {path}", saved["name"], weights, missing, unexpected)
    return vit_fields(image, vit, pixels), vit


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
    where, model_type = f"text encoder: {folder / 'config.json'}", saved_config.get("model_type")
    with named(where):
        config_class, kinds = text_fields(model_type)
    kept = keep_fields(where, saved_config, {**declared(config_class), **kinds})
    with refusing(f"{where} cannot build a {model_type!r}"), quiet_transformers():
        config = config_class(**without(kept, "model_type"))
        model_class, no_pooler = text_class(config)
        with on_meta():
            meta_model = model_class(config, **no_pooler)
    options = {name: value for name, value in config.to_diff_dict().items() if name in kinds}
    options["model_type"] = model_type
    check_text(options)
    weights = read_weights("text encoder", folder)
    where = f"text encoder: {weights_path(folder)}"
    check_size(where, weights, meta_model)
    encoder = build_with_weights(where, model_class, config, weights, **no_pooler)
    return {"text": options, "text_dim": config.hidden_size}, encoder


def keep_fields(
    where: str,
    saved_config: dict[str, Any],
    kinds: Kinds,
    part: str = "",
) -> dict[str, Any]:
    """Return the fields of a config.json that are in ``kinds``, after a check of their values.

    Error messages name ``where``, the argument and the file, and ``part``, the field that holds
    these fields, with a dot.
    """
    kinds = {**kinds, **LEGACY_ROPE} if "rope_parameters" in kinds else kinds
    kept = {
        name: value
        for name, value in saved_config.items()
        if name in kinds and (value is not None or name not in LEGACY_ROPE)
    }
    with named(where):
        for name, value in kept.items():
            kind = kinds[name]
            if not isinstance(kind, dict):
                check_field(part + name, value, kind)
            elif value is not None:
                check_fields(part + name, value, kind)
            if name in ACTIVATIONS:
                check_activation(part + name, value)
    return kept


def build_with_weights(
    where: str,
    model_class: Any,
    config: Any,
    weights: dict[str, Tensor],
    **options: Any,
) -> Any:
    """Build a model of transformers with ``weights`` in float32.

    The names of the weights may have a prefix. Given a folder instead of weights, transformers
    would also load the adapters and quantisers that the folder names. ``where`` is the argument and
    the file, for error messages.
    """
    with refusing(f"{where} holds the weights of another model"), quiet_transformers():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            **options,
        )
    for key, got, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{where} holds the weights of another model: {same_end(weights, key) or key}: "
            f"got shape {tuple(got)}, expected {tuple(expected)}, as in its config.json"
        )
    check_keys(where, config.model_type, weights, info["missing_keys"], info["unexpected_keys"])
    return model


def check_keys(
    where: str,
    model: str,
    weights: Iterable[str],
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Require all weights of a model, and no weights of further layers.

    Other weights that the model does not have, as those of a head, are ignored.

    Args:
        where: the argument and the file, for error messages.
        model: name of the model.
        weights: names of the weights in the file.
        missing: names of the model's weights that are not in the file.
        unexpected: names of weights in the file that the model does not have.
    """
    absent = sorted(key for key in missing if not key.startswith("lm_head"))
    if absent:
        lacking = f"{len(absent)} weights of {model}, {absent[0]} among them"
        raise ValueError(f"{where} lacks {lacking}, expected all that its config.json describes")
    further = sorted(key for key in unexpected if IN_LAYER.search(key))
    if further:
        raise ValueError(
            f"{where} holds {len(further)} weights that a {model} with its config.json does not "
            f"have, {same_end(weights, further[0]) or further[0]} among them, "
            "expected as many layers as in config.json"
        )


def read_encoder_folder(name: str, folder: Path, weights: str) -> dict[str, Any]:
    """Return the contents of a folder's config.json.

    Raises:
        FileNotFoundError: there is no config.json, or no file of weights. The message calls these
            files ``weights``.
        ValueError: config.json is damaged.
    """
    if not (folder / "config.json").is_file() or not weights_path(folder).is_file():
        expected = f"config.json and {weights}"
        for path in sorted(folder.glob("*")):
            if path.name == "adapter_model.safetensors":
                expected += f"; {path.name} is an adapter"
            elif path.suffix in PICKLES:
                expected += f"; {path.name} is a pickle, which can run any code when it is loaded"
        raise FileNotFoundError(f"{name}: {folder} lacks a file, expected {expected}")
    with named(name):
        return read_object(folder / "config.json")
