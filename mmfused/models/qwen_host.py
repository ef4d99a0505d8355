"""transformers' Qwen2-VL and Qwen2.5-VL, from a config's `host` or from a pretrained folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from mmfused.models.encoders import declared, freeze, import_transformers, without
from mmfused.models.fields import Options, check_field, check_fields, refusing, shown
from mmfused.models.presets import CLIP_MEAN, CLIP_STD
from mmfused.models.pretrained import fill, keep_fields, read_encoder_folder
from mmfused.models.weights import check_size, find_folder, on_meta, read_weights

PIXEL_MEAN = CLIP_MEAN  # Qwen2-VL's are CLIP's
PIXEL_STD = CLIP_STD
Part = Literal["vision", "language"]
# The host's names for its parts, which a config's `freeze` names.
PARTS: dict[Part, str] = {"vision": "visual", "language": "language_model"}
TYPES = ("qwen2_vl", "qwen2_5_vl")
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def token_side(vision: dict[str, Any]) -> int:
    """Return the pixels on the side of what becomes one token; defaults are transformers'."""
    sides = {"patch_size": 14, "spatial_merge_size": 2}
    for name, usual in sides.items():
        check_field(f"host.vision_config.{name}", vision.get(name, usual), int)
    return vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)


def host_fields(model_type: object) -> tuple[Any, dict[str, Any]]:
    """Return the config class of a host, and its fields: those of its parts, and its own ids."""
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
    """Require options of :func:`build_qwen2_vl`."""
    check_field("host", options, dict)
    check_fields("host", options, host_fields(options.get("model_type", "qwen2_vl"))[1])
    for part in ("text_config", "vision_config"):
        check_field(f"host.{part}", options.get(part), dict)
    check_field("host.text_config.hidden_size", options["text_config"].get("hidden_size"), int)


def build_qwen2_vl(options: Options, frozen: Sequence[Part] = ()) -> Any:
    """Build transformers' Qwen2VLModel: vision tower and language model, no head, random weights.

    Args:
        options: arguments of its config, text_config and vision_config among them; ``model_type``
            "qwen2_5_vl" chooses Qwen2.5-VL. The vision tower's output width follows the text's
            hidden_size.
        frozen: parts without gradients.
    """
    transformers = import_transformers()
    check_host(options)
    kind, width = options.get("model_type", "qwen2_vl"), options["text_config"]["hidden_size"]
    output = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
    options = {
        **without(options, "model_type"),
        "vision_config": {**options["vision_config"], output: width},
    }
    with refusing(f"host: got options that cannot build a {kind!r}"):
        config = transformers.AutoConfig.for_model(kind, **options)
        return freeze_parts(transformers.MODEL_MAPPING[type(config)](config), frozen)


def pretrained_qwen2_vl(source: str) -> tuple[dict[str, Any], nn.Module]:
    """Load a pretrained host in float32.

    Args:
        source: a folder in transformers' format (config.json, *.safetensors), or a hub name.

    Returns:
        The config fields that rebuild it without ``source`` (host, pixel_mean, pixel_std), and the
        module.
    """
    transformers, folder = import_transformers(), find_folder("host", source)
    described = read_encoder_folder("host", folder, "*.safetensors")
    if described.get("model_type") not in TYPES:
        found, expected = shown(described.get("model_type")), ", ".join(TYPES)
        raise ValueError(f"host: {source!r}: model_type: got {found}, expected one of {expected}")
    config_class, kinds = host_fields(described["model_type"])
    parts = {}
    for part in ("text_config", "vision_config"):
        # The first releases have the text's fields beside the vision tower's.
        values = described.get(part, described if part == "text_config" else {})
        check_field(f"host: {folder / 'config.json'}: {part}", values, dict)
        parts[part] = keep_fields(values, kinds[part])
    ids = keep_fields(described, dict.fromkeys(IDS, int))
    with refusing(f"host: {folder / 'config.json'} cannot build a {described['model_type']!r}"):
        config = config_class(**parts, **ids)
        kind = transformers.MODEL_MAPPING[config_class]
        with on_meta():
            expected = kind(config)
    options: dict[str, Any] = {"model_type": described["model_type"]}
    options |= {name: getattr(config, name) for name in IDS}
    for part in parts:  # what differs from its defaults
        changed = getattr(config, part).to_diff_dict()
        options[part] = {name: value for name, value in changed.items() if name in kinds[part]}
    for name in ("hidden_size", "num_hidden_layers"):  # the models read these
        options["text_config"][name] = getattr(config.text_config, name)
    check_host(options)
    weights = read_weights("host", folder)
    check_size(f"host: {folder}", weights, expected)
    # A checkpoint with a head is loaded with its head: transformers 5.10 finds no language model in
    # it for the class without one.
    headed = any(name.startswith(("model.", "lm_head.")) for name in weights)
    if headed:
        kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    host = fill("host", source, kind, config, weights)
    fields = {"host": options, "pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
    return fields, host.model if headed else host


def freeze_parts(host: Any, frozen: Sequence[Part]) -> Any:
    """Freeze some parts of a host, in place."""
    for name in frozen:
        freeze(getattr(host, PARTS[name]))
    return host
