"""Layouts in which image and text encoders are published: their options and the names of weights.

A folder in timm's, open_clip's or transformers' format is known by its config. A state in its
authors' own names is known by its keys, and its sizes are those of its weights. Values are not
read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmfused.json_files import read_object
from mmfused.models.encoders import TEXT_TYPES
from mmfused.models.fields import check_field, shown
from mmfused.models.presets import CLIP_MEAN, CLIP_STD
from mmfused.models.weights import (
    OPEN_CLIP_CONFIG,
    compress,
    config_path,
    named,
    read_weights,
    weights_path,
)

HOSTS = ("qwen2_vl", "qwen2_5_vl", "unite_qwen2_vl")
CLIP_TYPES = ("clip", "clip_vision_model", "chinese_clip", "chinese_clip_vision_model")
# The timm models with CLIP's norms: epsilon 1e-5, and one before the blocks. All sizes are given.
CLIP_NAMES = {
    "gelu": "vit_base_patch16_clip_224",
    "quick_gelu": "vit_base_patch16_clip_quickgelu_224",
}
# All EVA02-CLIP models of this kind rotate by places on the same grid of 16 x 16.
EVA_NAME = "eva02_base_patch16_clip_224"
CLIP_PIXELS: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD}
# The names of a weight in a file, several if its first dimension is split.
Names = Callable[[str], tuple[str, ...]]
Pairs = Mapping[str, tuple[str, ...]]


class Part(NamedTuple):
    """How a folder holds one encoder."""

    options: dict[str, Any]  # arguments of the timm model, or of the text encoder's config
    names: Names  # the names in the file of a weight of the model
    prefix: str  # all weights with this prefix belong to the encoder,
    ignored: str  # except those whose further name matches this pattern
    pixels: dict[str, Any]


class Layout(NamedTuple):
    """A folder whose layout is known."""

    name: str  # of the argument, for messages
    kind: str
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of all weights; empty if the config gives the sizes
    prefix: str = ""  # before all names

    @property
    def where(self) -> str:
        """The argument, and the path of the file that describes the encoders."""
        path = weights_path(self.folder) if self.shapes else config_path(self.folder)
        return f"{self.name}: {path}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The encoders that the folder holds."""
        return HELD[self.kind]

    def size(self, key: str, place: int, dims: int) -> int:
        """Return one dimension of a weight with ``dims`` dimensions."""
        found = self.shapes.get(self.prefix + key)
        if found is None or len(found) != dims or not all(found):
            got = "no such weight" if found is None else f"shape {found}"
            raise ValueError(
                f"{self.where}: {self.prefix + key}: got {got}, expected {dims} dimensions"
            )
        return found[place]

    def layers(self, key: str) -> int:
        """Return the number of layers with a name that begins with ``key``, a number and a dot."""
        pattern = re.compile(re.escape(self.prefix + key) + r"(\d{1,4})\.")
        found = [int(match[1]) for match in map(pattern.match, self.shapes) if match]
        return 1 + max(found, default=0)


# A weight by which the layout of a state in its authors' names is known, and how all names begin.
KEYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "visualized_bge": (
        "bge_embeddings.word_embeddings.weight",
        ("bge_encoder.", "bge_embeddings.", "bge_pooler.", "model_visual.", "visual_proj."),
    ),
    "chinese_clip_state": (
        "bert.embeddings.word_embeddings.weight",
        ("visual.", "bert.", "text_projection", "logit_scale"),
    ),
    "eva_clip_state": ("visual.rope.freqs_cos", ("",)),
    "clip_state": ("visual.class_embedding", ("",)),
}
# The encoders of each layout.
HELD: dict[str, tuple[str, ...]] = {
    "timm": ("image_encoder",),
    "open_clip": ("image_encoder",),
    "clip": ("image_encoder",),
    "chinese_clip": ("image_encoder", "text_encoder"),
    "chinese_clip_text": ("text_encoder",),
    "text": ("text_encoder",),
    "host": ("host",),
    "visualized_bge": ("image_encoder", "text_encoder", "visual_proj"),
    "chinese_clip_state": ("image_encoder", "text_encoder"),
    "eva_clip_state": ("image_encoder",),
    "clip_state": ("image_encoder",),
}


def find_layout(name: str, folder: Path) -> Layout | None:
    """Return the layout of a folder with weights, or None if its config and keys are not known."""
    path = config_path(folder)
    with named(name):
        config = read_object(path) if path.is_file() else {}
    if path.name == OPEN_CLIP_CONFIG:
        return Layout(name, "open_clip", folder, config, {})
    if "architecture" in config:
        return Layout(name, "timm", folder, config, {})
    if "model_type" in config:
        kind = kind_of_type(config["model_type"])
        return None if kind is None else Layout(name, kind, folder, config, {})
    weights = read_weights(name, folder, values=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    for kind, (key, begins) in KEYS.items():
        for prefix in ("", "module."):
            if prefix + key not in shapes:
                continue
            if kind == "chinese_clip_state" and not any("visual." in held for held in shapes):
                continue  # a BERT
            known = tuple(prefix + begin for begin in begins)
            other = [held for held in shapes if not held.startswith(known)]
            if other:
                got, expected = ", ".join(compress(sorted(other))), ", ".join(known)
                where = f"{name}: {weights_path(folder)}"
                raise ValueError(f"{where}: got {got}, expected only names with {expected}")
            return Layout(name, kind, folder, config, shapes, prefix)
    return None


def kind_of_type(model_type: object) -> str | None:
    """Return the layout of a folder of transformers with this model_type."""
    if model_type in TEXT_TYPES:
        return "text"
    if model_type in HOSTS:
        return "host"
    if model_type == "chinese_clip_text_model":
        return "chinese_clip_text"
    if model_type not in CLIP_TYPES:
        return None
    return "chinese_clip" if model_type == "chinese_clip" else "clip"


def image_part(layout: Layout) -> Part:
    """Return how a folder in open_clip's, transformers' or the authors' layout holds its ViT."""
    return IMAGES[layout.kind](layout)


def text_part(layout: Layout) -> Part | None:
    """Return how a folder holds its BERT or XLM-R, or None for transformers' own text models."""
    return TEXTS[layout.kind](layout) if layout.kind in TEXTS else None


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


def object_of(where: str, saved: dict[str, Any], field: str) -> dict[str, Any]:
    """Return the object in a field of a config."""
    value: Any = saved.get(field)
    check_field(f"{where}: {field}", value, dict)
    return value


def check_heads(where: str, width: int, head: int) -> int:
    """Return the number of heads of width ``head``."""
    if width % head:
        raise ValueError(f"{where}: got {head}, expected a divisor of the width {width}")
    return width // head


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


def prefix_of(layout: Layout, end: str) -> str:
    """Return what stands before ``end`` in the only name with this end, "" if there is none."""
    weights = read_weights(layout.name, layout.folder, values=False)
    found = [key.removesuffix(end) for key in weights if key.endswith(end)]
    found = [prefix for prefix in found if prefix == "" or prefix.endswith(".")]
    if len(found) > 1:
        names = ", ".join(f"{prefix}{end}" for prefix in sorted(found))
        where = f"{layout.name}: {weights_path(layout.folder)}"
        raise ValueError(f"{where}: got {names}, expected one of them")
    return found[0] if found else ""


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


def text_of_chinese_clip(layout: Layout) -> Part:
    """Describe the BERT of transformers' Chinese-CLIP, whose text config has BERT's fields."""
    saved, at = layout.config, layout.where
    if layout.kind == "chinese_clip":
        field = "text_config_dict" if saved.get("text_config_dict") else "text_config"
        saved = object_of(at, saved, field)
    prefix = prefix_of(layout, "embeddings.word_embeddings.weight")
    return Part({**saved, "model_type": "bert"}, prefixed(prefix), prefix, TEXT_IGNORED, {})


TEXT_IGNORED = r"pooler\.|embeddings\.(position_ids|token_type_ids)$"


def prefixed(prefix: str) -> Names:
    """Return the names in a file that puts ``prefix`` before all names of a model."""
    return lambda key: (prefix + key,)


def text_of_state(layout: Layout) -> Part:
    """Describe the BERT in a state of Chinese-CLIP or Visualized-BGE, or the XLM-R of the latter.

    The heads are 64 wide in all published checkpoints.
    """
    bge = layout.kind == "visualized_bge"
    embeddings, layers = (
        ("bge_embeddings.", "bge_encoder.layer.")
        if bge
        else ("bert.embeddings.", "bert.encoder.layer.")
    )
    width = layout.size(f"{embeddings}word_embeddings.weight", 1, 2)
    types = layout.size(f"{embeddings}token_type_embeddings.weight", 0, 2)
    if types > 2 or (types == 1 and not bge):
        expected = "2 rows, as a BERT has" + (", or 1, as XLM-R has" if bge else "")
        key = f"{layout.prefix}{embeddings}token_type_embeddings.weight"
        raise ValueError(f"{layout.where}: {key}: got {types} rows, expected {expected}")
    options = {
        "model_type": "bert" if types == 2 else "xlm-roberta",
        "vocab_size": layout.size(f"{embeddings}word_embeddings.weight", 0, 2),
        "hidden_size": width,
        "num_hidden_layers": layout.layers(layers),
        "num_attention_heads": check_heads(f"{layout.where}: head width", width, 64),
        "intermediate_size": layout.size(f"{layers}0.intermediate.dense.weight", 0, 2),
        "max_position_embeddings": layout.size(f"{embeddings}position_embeddings.weight", 0, 2),
        "type_vocab_size": types,
        "layer_norm_eps": 1e-12 if types == 2 else 1e-5,
        "pad_token_id": 0 if types == 2 else 1,
    }
    prefix = layout.prefix + ("bge_" if bge else "bert.")
    return Part(options, prefixed(prefix), prefix, TEXT_IGNORED, {})


IMAGES: dict[str, Callable[[Layout], Part]] = {
    "open_clip": image_of_open_clip,
    "clip": image_of_transformers,
    "chinese_clip": image_of_transformers,
    "visualized_bge": image_of_eva_state,
    "eva_clip_state": image_of_eva_state,
    "chinese_clip_state": image_of_clip_state,
    "clip_state": image_of_clip_state,
}
TEXTS: dict[str, Callable[[Layout], Part]] = {
    "chinese_clip": text_of_chinese_clip,
    "chinese_clip_text": text_of_chinese_clip,
    "visualized_bge": text_of_state,
    "chinese_clip_state": text_of_state,
}
