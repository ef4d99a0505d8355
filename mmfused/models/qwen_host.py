"""Qwen2-VL and Qwen2.5-VL of transformers, from a config's `host` or from a pretrained folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mmfused.models.encoders import (
    check_activation,
    declared,
    freeze,
    import_transformers,
    quiet_transformers,
    without,
)
from mmfused.models.fields import Options, check_field, check_fields, refusing, shown
from mmfused.models.presets import CLIP_MEAN, CLIP_STD
from mmfused.models.pretrained import build_with_weights, keep_fields, read_encoder_folder
from mmfused.models.weights import (
    check_size,
    find_folder,
    on_meta,
    read_weights,
    weights_path,
)

PIXEL_MEAN = CLIP_MEAN  # Qwen2-VL normalises pixels as CLIP does
PIXEL_STD = CLIP_STD
Part = Literal["vision", "language"]
# The parts that a config's `freeze` may list, and their attributes of the host.
PARTS: dict[Part, str] = {"vision": "visual", "language": "language_model"}
TYPES = ("qwen2_vl", "qwen2_5_vl")
ALIASES = {"unite_qwen2_vl": "qwen2_vl"}  # the model_type of UNITE's own class
MROPE_SECTION = (16, 24, 24)  # transformers' default
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def token_side(vision: dict[str, Any]) -> int:
    """Return the side in pixels of a picture token; missing sizes are transformers' defaults."""
    sides = {"patch_size": 14, "spatial_merge_size": 2}
    for name, default in sides.items():
        check_field(f"host.vision_config.{name}", vision.get(name, default), int)
    return vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)


def host_fields(model_type: object) -> tuple[Any, dict[str, Any]]:
    """Return the config class of a host and the kinds of its fields, for `check_fields`."""
    if model_type not in TYPES:
        expected = ", ".join(TYPES)
        raise ValueError(f"host.model_type: got {shown(model_type)}, expected one of {expected}")
    config = import_transformers().CONFIG_MAPPING[model_type]
    parts = {part: declared(config.sub_configs[part]) for part in ("text_config", "vision_config")}
    parts["vision_config"].update(patch_size=int, temporal_patch_size=int)
    return config, {
        "model_type": str,
        **parts,
        **dict.fromkeys(IDS, int),
        "tie_word_embeddings": bool,
    }


def check_host(options: Options) -> None:
    """Check options of :func:`build_qwen2_vl`."""
    check_field("host", options, dict)
    check_fields("host", options, host_fields(options.get("model_type", "qwen2_vl"))[1])
    for part in ("text_config", "vision_config"):
        check_field(f"host.{part}", options.get(part), dict)
        check_activation(f"host.{part}.hidden_act", options[part].get("hidden_act", "silu"))
    check_field("host.text_config.hidden_size", options["text_config"].get("hidden_size"), int)


def build_qwen2_vl(options: Options, frozen: Sequence[Part] = ()) -> Any:
    """Build a Qwen2-VL or Qwen2.5-VL of transformers, without a head, with random weights.

    Args:
        options: arguments of the config in transformers, including text_config and vision_config.
            ``model_type`` is "qwen2_vl" (default) or "qwen2_5_vl". The hidden_size of text_config
            is also the output width of the vision tower.
        frozen: parts to freeze.
    """
    transformers = import_transformers()
    check_host(options)
    model_type, width = options.get("model_type", "qwen2_vl"), options["text_config"]["hidden_size"]
    output = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
    options = {
        **without(options, "model_type"),
        "vision_config": {**options["vision_config"], output: width},
    }
    refused = f"host: got options that cannot build a {model_type!r}"
    with refusing(refused), quiet_transformers():
        config = transformers.AutoConfig.for_model(model_type, **options)
    check_heads("host", config)
    with refusing(refused), quiet_transformers():
        return freeze_parts(transformers.MODEL_MAPPING[type(config)](config), frozen)


def pretrained_qwen2_vl(source: str) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained host in float32.

    Args:
        source: a folder in transformers' format (config.json, *.safetensors), or a hub name.

    Returns:
        The config fields that rebuild the host without ``source`` (host, pixel_mean, pixel_std),
        and the host.
    """
    return host_of_folder(find_folder("host", source))


def host_of_folder(folder: Path, values: bool = True) -> tuple[dict[str, Any], nn.Module]:
    """Load the host of a folder; without ``values``, check its names and shapes instead."""
    config = read_host_config(folder, read_encoder_folder("host", folder, "*.safetensors"))
    options = host_options(config)
    check_host(options)
    transformers = import_transformers()
    model_class = transformers.MODEL_MAPPING[type(config)]
    with refusing(f"host: {folder / 'config.json'} cannot build a {config.model_type!r}"):
        with on_meta(), quiet_transformers():
            meta_model = model_class(config)
    weights, where = read_weights("host", folder, values), f"host: {weights_path(folder)}"
    check_size(where, weights, meta_model)
    # A checkpoint with a head is loaded into the class with a head, because transformers 5.10 does
    # not find the checkpoint's language model when it loads the class without a head.
    has_head = any(name.startswith(("model.", "lm_head.")) for name in weights)
    if has_head:
        model_class = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        # The head is not used: it is not read, and tied so that it is not drawn either.
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
        config.tie_word_embeddings = True
    host = build_with_weights(where, model_class, config, weights)
    fields = {"host": options, "pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
    return fields, host.model if has_head else host


def read_host_config(folder: Path, saved: dict[str, Any]) -> Any:
    """Return the config of transformers that a folder's config.json describes."""
    where, model_type = f"host: {folder / 'config.json'}", saved.get("model_type")
    model_type = ALIASES.get(str(model_type), model_type)
    if model_type not in TYPES:
        expected = ", ".join(TYPES)
        raise ValueError(
            f"{where}: model_type: got {shown(model_type)}, expected one of {expected}"
        )
    config_class, kinds = host_fields(model_type)
    parts = {}
    for part in ("text_config", "vision_config"):
        # Early config files of Qwen2-VL have the fields of text_config at the top level.
        values = saved.get(part, saved if part == "text_config" else None)
        check_field(f"{where}: {part}", values, dict)
        parts[part] = keep_fields(where, values, kinds[part], f"{part}.")
    ids = keep_fields(where, saved, dict.fromkeys(IDS, int))
    with refusing(f"{where} cannot build a {model_type!r}"), quiet_transformers():
        config = config_class(**parts, **ids)
    keep_known_ids(config.text_config)
    check_heads(where, config)
    return config


def host_options(config: Any) -> dict[str, Any]:
    """Return the options with which `build_qwen2_vl` builds the host of a config again."""
    kinds = host_fields(config.model_type)[1]
    options: dict[str, Any] = {"model_type": config.model_type}
    options |= {name: getattr(config, name) for name in IDS}
    for part in ("text_config", "vision_config"):  # fields that differ from their defaults
        changed = getattr(config, part).to_diff_dict()
        options[part] = {name: value for name, value in changed.items() if name in kinds[part]}
    for name in ("hidden_size", "num_hidden_layers"):  # required even if they are the defaults
        options["text_config"][name] = getattr(config.text_config, name)
    return options


def check_heads(where: str, config: Any) -> None:
    """Require widths that divide into heads, and M-RoPE sections that fill half of a head.

    transformers would notice it only when the model runs.
    """
    text = config.text_config
    width = "embed_dim" if config.model_type == "qwen2_vl" else "hidden_size"
    for part, name, of in (
        ("text_config", "num_attention_heads", "hidden_size"),
        ("vision_config", "num_heads", width),
    ):
        heads, total = (getattr(getattr(config, part), field) for field in (name, of))
        if total % heads:
            got, expected = f"{part}.{name}: got {heads}", f"a divisor of {of}={total}"
            raise ValueError(f"{where}: {got}, expected {expected}")
    half = text.hidden_size // text.num_attention_heads // 2
    sections = text.rope_parameters.get("mrope_section", MROPE_SECTION)
    if sum(sections) != half:
        got = f"text_config.rope_parameters.mrope_section: got {shown(sections)}"
        raise ValueError(f"{where}: {got}, expected numbers with the sum {half}")


def keep_known_ids(text_config: Any) -> None:
    """Set ids of special tokens that are not in the vocabulary to None, in place.

    Such ids are transformers' defaults. transformers warns of them.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(text_config, name)
        ids = ids if isinstance(ids, list) else [ids or 0]
        if not all(0 <= i < text_config.vocab_size for i in ids):
            setattr(text_config, name, None)


def freeze_parts(host: Any, frozen: Sequence[Part]) -> Any:
    """Freeze parts of a host in place, and return the host."""
    for name in frozen:
        freeze(getattr(host, PARTS[name]))
    return host
