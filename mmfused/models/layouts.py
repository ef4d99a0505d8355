"""Layouts in which image and text encoders are published; their ViTs are in image_layouts.py.

A folder in timm's, open_clip's or transformers' format is known by its config. A state in its
authors' own names is known by its keys, and its sizes are those of its weights. Values are not
read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mmfused.json_files import read_object
from mmfused.models.encoders import TEXT_TYPES
from mmfused.models.fields import check_field
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
# Names of a text encoder's weights that are not read: the pooler's, and ids of earlier versions.
TEXT_IGNORED = r"pooler\.|embeddings\.(position_ids|token_type_ids)$"
# The names of a weight in a file, several if its first dimension is split.
Names = Callable[[str], tuple[str, ...]]


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


def text_part(layout: Layout) -> Part | None:
    """Return how a folder holds its BERT or XLM-R, or None for transformers' own text models."""
    return TEXTS[layout.kind](layout) if layout.kind in TEXTS else None


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


def prefixed(prefix: str) -> Names:
    """Return the names in a file that puts ``prefix`` before all names of a model."""
    return lambda key: (prefix + key,)


def text_of_chinese_clip(layout: Layout) -> Part:
    """Describe the BERT of transformers' Chinese-CLIP, whose text config has BERT's fields."""
    saved, at = layout.config, layout.where
    if layout.kind == "chinese_clip":
        field = "text_config_dict" if saved.get("text_config_dict") else "text_config"
        saved = object_of(at, saved, field)
    prefix = prefix_of(layout, "embeddings.word_embeddings.weight")
    return Part({**saved, "model_type": "bert"}, prefixed(prefix), prefix, TEXT_IGNORED, {})


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


TEXTS: dict[str, Callable[[Layout], Part]] = {
    "chinese_clip": text_of_chinese_clip,
    "chinese_clip_text": text_of_chinese_clip,
    "visualized_bge": text_of_state,
    "chinese_clip_state": text_of_state,
}
