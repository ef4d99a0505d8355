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
from mmfused.models.image_layouts import image_part
from mmfused.models.layouts import Layout, Part, find_layout, text_part
from mmfused.models.weights import (
    check_size,
    compress,
    find_folder,
    named,
    natural,
    on_meta,
    pickle_hint,
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
# timm's default normalisation of pixels.
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pretrained_vit(
    source: str,
    image_size: int | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained VisionTransformer or Eva.

    Args:
        source: a folder, or a hub name: of a timm model with weights on the hub, or of a repository
            with a config and safetensors. A folder is in timm's format, CLIP in open_clip's or
            transformers', or a state in its authors' names: CLIP, Chinese-CLIP, EVA02-CLIP and
            Visualized-BGE (see mmfused/models/layouts.py). Only JSON and safetensors are read.
        image_size: side of the pictures, to which the position embedding is resampled. None: the
            pretrained size.

    Returns:
        The config fields that rebuild the encoder without ``source`` (image, image_dim, image_stem,
        pixel_mean, pixel_std), and the encoder.

    Raises:
        FileNotFoundError: the folder lacks a config or weights.
        ValueError: there is no such model, it is no ViT or Eva of timm, or its weights are not
            those of its config.

    Examples:
        >>> import tempfile
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> from mmfused.models.pretrained import pretrained_vit
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=16)
        >>> clip = CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=2, patch_size=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     clip.save_pretrained(folder)
        ...     fields, vit = pretrained_vit(folder, image_size=32)
        >>> type(vit).__name__, fields["image_dim"], fields["image"]["name"]
        ('VisionTransformer', 32, 'vit_base_patch16_clip_quickgelu_224')
    """
    timm = import_timm()
    size = {} if image_size is None else {"img_size": image_size}
    if Path(source).is_dir() or "/" in source:
        folder = find_folder("image encoder", source, "preprocessor_config.json")
        return vit_of_folder(folder, size)
    pretrained_cfg = timm.is_model(source) and timm.models.get_pretrained_cfg(source)
    if not pretrained_cfg or not getattr(pretrained_cfg, "hf_hub_id", None):
        expected = "a folder, or the name of a timm model with weights on the hub"
        raise ValueError(f"image encoder: got {source!r}, expected {expected}")
    with on_meta():  # checked before the download
        meta_vit = create_vit(name=source, num_classes=0)
    check_vit(f"image encoder: got {source!r}, ", meta_vit)
    check_multiple(size, meta_vit)
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


def vit_of_folder(
    folder: Path,
    size: dict[str, int],
    values: bool = True,
) -> tuple[dict[str, Any], nn.Module]:
    """Load the ViT of a folder; without ``values``, check its names and shapes on meta instead.

    timm's own loader would also load from the paths, addresses and pickles that config.json names.
    """
    layout = layout_with("image_encoder", "image encoder", folder)
    if layout is None or layout.kind == "timm":
        saved, pixels, part = *timm_options(folder), None
        where = f"image encoder: {folder / 'config.json'}"
    else:
        part, where = image_part(layout), layout.where
        saved, pixels = part.options, part.pixels
    image = {**saved, **size}
    with named(where):
        check_image(saved)
        check_image(image)
        with on_meta():
            meta_vit = create_vit(**saved, num_classes=0)
    check_vit(f"image encoder: got {str(folder)!r}, ", meta_vit)
    check_multiple(size, meta_vit)
    weights = read_weights("image encoder", folder, values)
    where = f"image encoder: {weights_path(folder)}"
    if part is not None:
        weights = take(where, part, meta_vit, weights)
    else:
        check_size(where, weights, meta_vit)
    vit = create_vit(num_classes=0, **image) if values else meta_vit
    models = import_timm().models
    family = models.eva if is_eva(saved["name"]) else models.vision_transformer
    with refusing(f"{where} holds the weights of another model"):
        weights = family.checkpoint_filter_fn(weights, vit)  # resamples, and knows timm's old names
        missing, unexpected = vit.load_state_dict(weights, strict=False)
    check_keys(where, saved["name"], weights, missing, unexpected)
    return vit_fields(image, vit, pixels), vit


def check_multiple(size: dict[str, int], vit: Any) -> None:
    """Require a size of pictures that the patches fill."""
    patch = vit.patch_embed.patch_size[0]
    if size and size["img_size"] % patch:
        raise ValueError(
            f"image_size: got {size['img_size']}, expected a multiple of patch_size = {patch}"
        )


def timm_options(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the model in a folder in timm's format, and its pixels."""
    saved_config = read_encoder_folder("image encoder", folder, "model.safetensors")
    where = f"image encoder: {folder / 'config.json'}"
    check_architecture(f"{where}: architecture", saved_config.get("architecture"))
    arguments = saved_config.get("model_args", {})
    pretrained = saved_config.get("pretrained_cfg", saved_config)
    check_field(f"{where}: model_args", arguments, dict)
    check_field(f"{where}: pretrained_cfg", pretrained, dict)
    pixels = {}
    for name, default in PIXELS.items():
        value = pretrained.get(name, default)
        check_field(f"{where}: {name}", value, tuple[float, float, float])
        pixels[name] = tuple(value)
    options = {"name": saved_config["architecture"], **without(arguments, "num_classes")}
    norm = options.get("use_post_transformer_norm")  # an Eva's name for it, and None is the default
    if is_eva(options["name"]) and norm is not None:
        options["final_norm"] = options.pop("use_post_transformer_norm")
    return options, pixels


def layout_with(part: str, name: str, folder: Path) -> Layout | None:
    """Return the layout of a folder if it holds ``part``, or None if it is not known."""
    if not weights_path(folder).is_file():
        return None
    layout = find_layout(name, folder)
    if layout is not None and part not in layout.parts:
        expected = f"a folder with {part}"
        raise ValueError(f"{name}: {folder} holds {', '.join(layout.parts)}, expected {expected}")
    return layout


def pretrained_text(source: str) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained text encoder.

    Args:
        source: a folder, or a hub name. A folder is in transformers' format, of a text model or
            Chinese-CLIP, or a state of Chinese-CLIP or Visualized-BGE in its authors' names.

    Returns:
        The config fields that rebuild the encoder without ``source`` (text, text_dim), and the
        encoder.

    Raises:
        FileNotFoundError: the folder lacks a config or weights.
        ValueError: it holds no text encoder, or its weights are not those of its config.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from mmfused.models.pretrained import pretrained_text
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=90)
        >>> bert = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bert.save_pretrained(folder)
        ...     fields, encoder = pretrained_text(folder)
        >>> type(encoder).__name__, fields["text_dim"], fields["text"]["vocab_size"]
        ('BertModel', 32, 90)
    """
    return text_of_folder(find_folder("text encoder", source))


def text_of_folder(folder: Path, values: bool = True) -> tuple[dict[str, Any], nn.Module]:
    """Load the text encoder of a folder; without ``values``, check its names and shapes instead."""
    layout = layout_with("text_encoder", "text encoder", folder)
    part = None if layout is None else text_part(layout)
    if layout is None or part is None:
        saved_config = read_encoder_folder("text encoder", folder, "*.safetensors")
        where = f"text encoder: {folder / 'config.json'}"
    else:
        saved_config, where = part.options, layout.where
    model_type = saved_config.get("model_type")
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
    weights = read_weights("text encoder", folder, values)
    where = f"text encoder: {weights_path(folder)}"
    if part is not None:
        weights = take(where, part, meta_model, weights)
    else:
        check_size(where, weights, meta_model)
    encoder = build_with_weights(where, model_class, config, weights, **no_pooler)
    return {"text": options, "text_dim": config.hidden_size}, encoder


def take(
    where: str,
    part: Part,
    model: nn.Module,
    weights: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the weights of a model with the model's names.

    Args:
        where: the argument and the file, for error messages.
        part: how the file holds the model.
        model: the model on meta.
        weights: all weights in the file.

    Raises:
        ValueError: weights are missing, have another shape, or are not the model's.
    """
    state, taken = model.state_dict(), {}
    names = {key: part.names(key) for key in state}
    used = dict.fromkeys(name for held in names.values() for name in held)
    check_names(where, (name for name in used if name not in weights))
    further = [
        key
        for key in weights
        if key.startswith(part.prefix)
        and key not in used
        and not re.match(part.ignored, key.removeprefix(part.prefix))
    ]
    if further:
        got = ", ".join(compress(sorted(further, key=natural)))
        raise ValueError(
            f"{where} holds weights of another model: got {got}, expected none of them"
        )
    for key, held in names.items():
        shape = tuple(state[key].shape)
        shape = (shape[0] // len(held), *shape[1:])
        for name in held:
            got, expected = tuple(weights[name].shape), shape
            while len(expected) > len(got) and expected[0] == 1:
                expected = expected[1:]  # CLIP's class token and positions have no batch dimension
            if got != expected:
                found = f"{name}: got shape {got}, expected {expected}"
                raise ValueError(f"{where} holds weights of another model: {found}")
        tensor = weights[held[0]] if len(held) == 1 else torch.cat([weights[name] for name in held])
        taken[key] = tensor.reshape(state[key].shape)
    return taken


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
    the file, for error messages. Weights on meta are checked: the model then takes no memory.
    """
    weights = {  # transformers does not load from meta; one expanded number takes no memory either
        key: tensor.new_zeros(1, device="cpu").expand(tensor.shape) if tensor.is_meta else tensor
        for key, tensor in weights.items()
    }
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
    check_names(where, (key for key in missing if not key.startswith("lm_head")), model)
    further = [same_end(weights, key) or key for key in unexpected if IN_LAYER.search(key)]
    if further:
        names = ", ".join(compress(sorted(further, key=natural)))
        raise ValueError(
            f"{where} holds {len(further)} weights that a {model} with its config.json does not "
            f"have: {names}, expected as many layers as in config.json"
        )


def check_names(where: str, missing: Iterable[str], model: str = "the encoder") -> None:
    """Require that no weights are missing; the message lists them all."""
    absent = sorted(missing, key=natural)
    if absent:
        names = ", ".join(compress(absent))
        lacking = f"{len(absent)} weights of {model}: {names}"
        raise ValueError(f"{where} lacks {lacking}, expected all that its config describes")


def read_encoder_folder(name: str, folder: Path, weights: str) -> dict[str, Any]:
    """Return the contents of a folder's config.json.

    Raises:
        FileNotFoundError: there is no config.json, or no file of weights. The message calls these
            files ``weights``.
        ValueError: config.json is damaged.
    """
    if not (folder / "config.json").is_file() or not weights_path(folder).is_file():
        expected = f"config.json and {weights}"
        if (folder / "adapter_model.safetensors").exists():
            expected += "; adapter_model.safetensors is an adapter"
        expected += pickle_hint(folder)
        raise FileNotFoundError(f"{name}: {folder} lacks a file, expected {expected}")
    with named(name):
        return read_object(folder / "config.json")
