"""The ViTs of published layouts: the options of timm's model, and the names of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mmfused.json_files import read_object
from mmfused.models.fields import check_field, shown
from mmfused.models.layouts import (
    Layout,
    Names,
    Part,
    check_heads,
    object_of,
    prefix_of,
    prefixed,
)
from mmfused.models.presets import CLIP_MEAN, CLIP_STD
from mmfused.models.weights import OPEN_CLIP_CONFIG, named

Pairs = Mapping[str, tuple[str, ...]]
# The timm models with CLIP's norms: epsilon 1e-5, and one before the blocks. All sizes are given.
CLIP_NAMES = {
    "gelu": "vit_base_patch16_clip_224",
    "quick_gelu": "vit_base_patch16_clip_quickgelu_224",
}
# All EVA02-CLIP models of this kind rotate by places on the same grid of 16 x 16.
EVA_NAME = "eva02_base_patch16_clip_224"
CLIP_PIXELS: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD}


def image_part(layout: Layout) -> Part:
    """Return how a folder in open_clip's, transformers' or the authors' layout holds its ViT."""
    return IMAGES[layout.kind](layout)


def blocks(table: Pairs, prefix: str) -> Names:
    """Return the names in a file of a ViT's weights; ``{}`` in ``table`` is the block's number."""

    def names(key: str) -> tuple[str, ...]:
        parts = key.split(".")
        number = parts[1] if parts[0] == "blocks" else ""
        parts = ["blocks", "{}", *parts[2:]] if number else parts
        last = parts[-1]
        stem = ".".join(parts[:-1])
        found = table.get(key) or table.get(".".join(parts))
        if found is None:
            found = tuple(f"{name}.{last}" for name in table.get(stem, (stem,)))
        return tuple(prefix + name.replace("{}", number) for name in found)

    return names


CLIP_TABLE: Pairs = {
    "cls_token": ("class_embedding",),
    "pos_embed": ("positional_embedding",),
    "patch_embed.proj": ("conv1",),
    "norm_pre": ("ln_pre",),
    "norm": ("ln_post",),
    "blocks.{}.norm1": ("transformer.resblocks.{}.ln_1",),
    "blocks.{}.norm2": ("transformer.resblocks.{}.ln_2",),
    "blocks.{}.attn.qkv.weight": ("transformer.resblocks.{}.attn.in_proj_weight",),
    "blocks.{}.attn.qkv.bias": ("transformer.resblocks.{}.attn.in_proj_bias",),
    "blocks.{}.attn.proj": ("transformer.resblocks.{}.attn.out_proj",),
    "blocks.{}.mlp.fc1": ("transformer.resblocks.{}.mlp.c_fc",),
    "blocks.{}.mlp.fc2": ("transformer.resblocks.{}.mlp.c_proj",),
}
IGNORED_IDS = r"embeddings\.position_ids$"  # which earlier versions saved
TRANSFORMERS_TABLE: Pairs = {
    "cls_token": ("embeddings.class_embedding",),
    "pos_embed": ("embeddings.position_embedding.weight",),
    "patch_embed.proj": ("embeddings.patch_embedding",),
    "norm_pre": ("pre_layrnorm",),
    "norm": ("post_layernorm",),
    "blocks.{}.norm1": ("encoder.layers.{}.layer_norm1",),
    "blocks.{}.norm2": ("encoder.layers.{}.layer_norm2",),
    "blocks.{}.attn.qkv": tuple(f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attn.proj": ("encoder.layers.{}.self_attn.out_proj",),
    "blocks.{}.mlp.fc1": ("encoder.layers.{}.mlp.fc1",),
    "blocks.{}.mlp.fc2": ("encoder.layers.{}.mlp.fc2",),
}
EVA_TABLE: Pairs = {
    "cls_token": ("cls_token",),
    "pos_embed": ("pos_embed",),
    "blocks.{}.attn.q_proj.bias": ("blocks.{}.attn.q_bias",),
    "blocks.{}.attn.v_proj.bias": ("blocks.{}.attn.v_bias",),
    "blocks.{}.attn.norm": ("blocks.{}.attn.inner_attn_ln",),
    "blocks.{}.mlp.fc1_g": ("blocks.{}.mlp.w1",),
    "blocks.{}.mlp.fc1_x": ("blocks.{}.mlp.w2",),
    "blocks.{}.mlp.fc2": ("blocks.{}.mlp.w3",),
    "blocks.{}.mlp.norm": ("blocks.{}.mlp.ffn_ln",),
}


def clip_options(
    act: str,
    width: int,
    depth: int,
    heads: int,
    inner: int,
    patch: object,
    size: object,
) -> dict[str, Any]:
    """Return the options of CLIP's ViT."""
    return {
        "name": CLIP_NAMES[act],
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio(inner, width),
        "patch_size": patch,
        "img_size": size,
    }


def ratio(inner: int, width: int) -> float:
    """Return the ratio of which timm takes the whole part of ``width * ratio`` as ``inner``."""
    exact = inner / width
    return exact if int(width * exact) == inner else math.nextafter(exact, math.inf)


def image_of_open_clip(layout: Layout) -> Part:
    """Describe the visual tower of open_clip's config."""
    where = layout.where
    model = object_of(where, layout.config, "model_cfg")
    vision = object_of(f"{where}: model_cfg", model, "vision_cfg")
    preprocess = object_of(where, {"preprocess_cfg": {}, **layout.config}, "preprocess_cfg")
    pixels = pixels_of(f"{where}: preprocess_cfg", preprocess, "mean", "std")
    at = f"{where}: model_cfg.vision_cfg"
    if vision.get("timm_model_name") is not None:
        return timm_of_open_clip(at, vision, pixels)
    for name, kind in OPEN_CLIP_FIELDS.items():
        if name in vision:
            check_field(f"{at}.{name}", vision[name], kind)
    for name, value in vision.items():
        if name not in OPEN_CLIP_FIELDS and value not in (None, False, DEFAULTS.get(name)):
            expected = f"{DEFAULTS.get(name, False)!r}, with which timm's ViT computes the same"
            raise ValueError(f"{at}.{name}: got {shown(value)}, expected {expected}")
    act = model.get("quick_gelu", False)
    check_field(f"{where}: model_cfg.quick_gelu", act, bool)
    width, head = vision.get("width", 768), vision.get("head_width", 64)
    options = clip_options(
        "quick_gelu" if act else "gelu",
        width,
        vision.get("layers", 12),
        check_heads(f"{at}.head_width", width, head),
        int(width * vision.get("mlp_ratio", 4.0)),
        vision.get("patch_size", 16),
        vision.get("image_size", 224),
    )
    return Part(options, blocks(CLIP_TABLE, "visual."), "visual.", r"proj$", pixels)


# The fields of open_clip's vision_cfg that set sizes or concern training or pooling alone, and the
# values of other fields with which the tokens are those of timm's ViT.
OPEN_CLIP_FIELDS: dict[str, object] = {
    "layers": int,
    "width": int,
    "head_width": int,
    "mlp_ratio": float,
    "patch_size": int | tuple[int, int],
    "image_size": int | tuple[int, int],
    "patch_dropout": float,
    "output_tokens": bool,
    "timm_model_pretrained": bool,
    "timm_pool": str,
    "timm_proj": str | None,
    "timm_proj_bias": bool,
    "timm_drop": float,
    "timm_drop_path": float | None,
    "attn_pooler_queries": int,
    "attn_pooler_heads": int,
}
DEFAULTS = {"pos_embed_type": "learnable", "pool_type": "tok", "block_type": "default"}


def timm_of_open_clip(at: str, vision: dict[str, Any], pixels: dict[str, Any]) -> Part:
    """Describe open_clip's visual tower of a timm model."""
    name = vision["timm_model_name"]
    options: dict[str, Any] = {"name": name}
    if "image_size" in vision:
        check_field(f"{at}.image_size", vision["image_size"], int | tuple[int, int])
        options["img_size"] = vision["image_size"]
    if vision.get("timm_proj", "linear") in (None, "", "none"):
        # Only without a projection, open_clip gives the pooling to the model, which may depend on
        # it: with "avg", the last norm follows the pooling.
        options["global_pool"] = vision.get("timm_pool", "avg")
    prefix = "visual.trunk."
    return Part(options, prefixed(prefix), prefix, r"(head|fc_norm|attn_pool)\.", pixels)


def pixels_of(where: str, saved: dict[str, Any], mean: str, std: str) -> dict[str, Any]:
    """Return the normalisation of pixels of a config; a missing field is CLIP's."""
    pixels = dict(CLIP_PIXELS)
    for name, field in (("mean", mean), ("std", std)):
        if saved.get(field) is not None:
            check_field(f"{where}.{field}", saved[field], tuple[float, float, float])
            pixels[name] = tuple(saved[field])
    return pixels


# The fields of transformers' vision config, and its defaults.
VISION: dict[str, tuple[object, Any]] = {
    "hidden_size": (int, 768),
    "intermediate_size": (int, 3072),
    "num_hidden_layers": (int, 12),
    "num_attention_heads": (int, 12),
    "num_channels": (int, 3),
    "image_size": (int | tuple[int, int], 224),
    "patch_size": (int | tuple[int, int], 32),
    "hidden_act": (str, "quick_gelu"),
    "layer_norm_eps": (float, 1e-5),
    "attention_dropout": (float, 0.0),
}


def image_of_transformers(layout: Layout) -> Part:
    """Describe the vision model of transformers' CLIP or Chinese-CLIP."""
    nested = not str(layout.config["model_type"]).endswith("_vision_model")
    at = layout.where
    saved = layout.config
    if nested:  # early configs have the fields twice, and vision_config_dict counts
        field = "vision_config_dict" if saved.get("vision_config_dict") else "vision_config"
        saved, at = object_of(at, saved, field), f"{at}: {field}"
    values: dict[str, Any] = {}
    for name, (kind, default) in VISION.items():
        values[name] = default if saved.get(name) is None else saved[name]
        check_field(f"{at}: {name}", values[name], kind)
    if values["hidden_act"] not in CLIP_NAMES:
        expected = "one of gelu, quick_gelu"
        raise ValueError(
            f"{at}: hidden_act: got {shown(values['hidden_act'])}, expected {expected}"
        )
    if values["layer_norm_eps"] != 1e-5:
        raise ValueError(f"{at}: layer_norm_eps: got {values['layer_norm_eps']}, expected 1e-05")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        expected = f"a divisor of hidden_size={width}"
        raise ValueError(f"{at}: num_attention_heads: got {heads}, expected {expected}")
    options = clip_options(
        values["hidden_act"],
        width,
        values["num_hidden_layers"],
        heads,
        values["intermediate_size"],
        values["patch_size"],
        values["image_size"],
    )
    if values["num_channels"] != 3:
        options["in_chans"] = values["num_channels"]
    if values["attention_dropout"]:
        options["attn_drop_rate"] = values["attention_dropout"]
    preprocess = layout.folder / "preprocessor_config.json"
    with named(layout.name):
        saved = read_object(preprocess) if preprocess.is_file() else {}
    pixels = pixels_of(f"{layout.name}: {preprocess}", saved, "image_mean", "image_std")
    prefix = prefix_of(layout, "embeddings.patch_embedding.weight")
    return Part(options, blocks(TRANSFORMERS_TABLE, prefix), prefix, IGNORED_IDS, pixels)


def image_of_clip_state(layout: Layout) -> Part:
    """Describe the ViT in a state of Chinese-CLIP, or in one of OpenAI's CLIP."""
    prefix = f"{layout.prefix}visual."
    if any(key.startswith(f"{prefix}layer1.") for key in layout.shapes):
        raise ValueError(f"{layout.where}: got a ResNet, expected a VisionTransformer")
    # OpenAI's states have their sizes as weights; a state of open_clip does not say its activation.
    openai = all(key in layout.shapes for key in ("input_resolution", "context_length"))
    if layout.kind == "clip_state" and not openai:
        raise ValueError(
            f"{layout.where}: got names of open_clip without its config, expected "
            f"{OPEN_CLIP_CONFIG}, which says whether quick_gelu is the activation"
        )
    width = layout.size("visual.conv1.weight", 0, 4)
    patch = layout.size("visual.conv1.weight", 2, 4)
    head = 80 if width == 1280 else 64
    options = clip_options(
        "quick_gelu",
        width,
        layout.layers("visual.transformer.resblocks."),
        check_heads(f"{layout.where}: head width", width, head),
        layout.size("visual.transformer.resblocks.0.mlp.c_fc.weight", 0, 2),
        patch,
        patch * grid(layout, "visual.positional_embedding", 0, 2),
    )
    return Part(options, blocks(CLIP_TABLE, prefix), prefix, r"proj$", CLIP_PIXELS)


def grid(layout: Layout, key: str, place: int, dims: int) -> int:
    """Return the number of patches in a row, of a position embedding with a class token."""
    count = layout.size(key, place, dims) - 1
    side = math.isqrt(count)
    if side * side != count or not side:
        raise ValueError(
            f"{layout.where}: {layout.prefix + key}: got {count + 1} positions, "
            "expected a square number of patches and a class token"
        )
    return side


def image_of_eva_state(layout: Layout) -> Part:
    """Describe the Eva in a state of EVA02-CLIP, or in one of Visualized-BGE."""
    visual = "model_visual.visual." if layout.kind == "visualized_bge" else "visual."
    width = layout.size(f"{visual}patch_embed.proj.weight", 0, 4)
    patch = layout.size(f"{visual}patch_embed.proj.weight", 2, 4)
    head = layout.size(f"{visual}rope.freqs_cos", 1, 2)
    inner = layout.size(f"{visual}blocks.0.mlp.w1.weight", 0, 2)
    options: dict[str, Any] = {
        "name": EVA_NAME,
        "embed_dim": width,
        "depth": layout.layers(f"{visual}blocks."),
        "num_heads": check_heads(f"{layout.where}: {visual}rope.freqs_cos", width, head),
        "mlp_ratio": ratio(inner, width),
        "patch_size": patch,
        "img_size": patch * grid(layout, f"{visual}pos_embed", 1, 3),
    }
    ignored = r"head\.|(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)$"
    if layout.kind == "visualized_bge":
        options["final_norm"] = False  # its tokens are taken before the norm
        ignored += r"|norm\."
    prefix = layout.prefix + visual
    return Part(options, blocks(EVA_TABLE, prefix), prefix, ignored, CLIP_PIXELS)


IMAGES: dict[str, Callable[[Layout], Part]] = {
    "open_clip": image_of_open_clip,
    "clip": image_of_transformers,
    "chinese_clip": image_of_transformers,
    "visualized_bge": image_of_eva_state,
    "eva_clip_state": image_of_eva_state,
    "chinese_clip_state": image_of_clip_state,
    "clip_state": image_of_clip_state,
}
