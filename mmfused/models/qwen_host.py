"""transformers' Qwen2-VL and Qwen2.5-VL, from a config's `host` or from a pretrained folder."""

from __future__ import annotations

from torch import nn

from mmfused.models.encoders import (
    declared,
    fill,
    freeze,
    import_transformers,
    keep_fields,
    read_encoder_folder,
    without,
)
from mmfused.models.fields import check_field, check_fields, refusing, shown
from mmfused.models.weights import check_size, find_folder, on_meta, read_weights

PIXEL_MEAN, PIXEL_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # Qwen2-VL's, CLIP's
PARTS = {
    "vision": "visual",
    "language": "language_model",
}  # what a config's `freeze` names, and the host's names for it
TYPES = ("qwen2_vl", "qwen2_5_vl")
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def token_side(vision: dict) -> int:
    """Pixels on the side of what becomes one token; the defaults are those of transformers' config."""
    sides = {"patch_size": 14, "spatial_merge_size": 2}
    for name, usual in sides.items():
        check_field(f"host.vision_config.{name}", vision.get(name, usual), int)
    return vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)


def host_fields(model_type: object) -> tuple[type, dict[str, object]]:
    """The config of a host and its fields: its parts', of one kind each, and its own ids."""
    if model_type not in TYPES:
        raise ValueError(
            f"host.model_type: got {shown(model_type)}, expected one of {', '.join(TYPES)}"
        )
    config = import_transformers().CONFIG_MAPPING[model_type]
    parts = {part: declared(config.sub_configs[part]) for part in ("text_config", "vision_config")}
    parts["vision_config"].update(patch_size=int, temporal_patch_size=int)
    return config, {
        "model_type": str,
        **parts,
        **dict.fromkeys(IDS, int),
        "tie_word_embeddings": bool,
    }


def check_host(options: dict) -> None:
    """ValueError unless these are options of :func:`build_qwen2_vl`."""
    check_field("host", options, dict)
    check_fields("host", options, host_fields(options.get("model_type", "qwen2_vl"))[1])
    for part in ("text_config", "vision_config"):
        check_field(f"host.{part}", options.get(part), dict)
    check_field("host.text_config.hidden_size", options["text_config"].get("hidden_size"), int)


def build_qwen2_vl(options: dict, frozen: tuple[str, ...] = ()) -> nn.Module:
    """transformers' Qwen2VLModel, vision tower and language model without a head, with random
    weights.

    ``options``: arguments of its config, text_config and vision_config among them; ``model_type``
    "qwen2_5_vl" takes the sibling. The vision tower's output width follows the text's hidden_size.
    ``frozen``: some of "vision", "language"."""
    transformers = import_transformers()
    check_host(options)
    kind, width = options.get("model_type", "qwen2_vl"), options["text_config"]["hidden_size"]
    output = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
    options = {
        **without(options, "model_type"),
        "vision_config": {**options["vision_config"], output: width},
    }
    with refusing(f"host: takes options of a {kind!r}"):
        config = transformers.AutoConfig.for_model(kind, **options)
        return freeze_parts(transformers.MODEL_MAPPING[type(config)](config), frozen)


def pretrained_qwen2_vl(source: str) -> tuple[dict, nn.Module]:
    """A pretrained host: a folder in transformers' format (config.json, *.safetensors), or a hub
    name; float32.

    Returns the config fields that rebuild it without ``source`` (host, pixel_mean, pixel_std), and
    the module."""
    transformers, folder = import_transformers(), find_folder("host", source)
    described = read_encoder_folder("host", folder, "*.safetensors")
    if described.get("model_type") not in TYPES:
        found = shown(described.get("model_type"))
        raise ValueError(
            f"host: {source!r} has model_type {found}, expected one of {', '.join(TYPES)}"
        )
    config_class, kinds = host_fields(described["model_type"])
    parts = {}
    for part in ("text_config", "vision_config"):
        # The first releases have the text's fields beside the vision tower's.
        values = described.get(part, described if part == "text_config" else {})
        check_field(f"host: {folder / 'config.json'}: {part}", values, dict)
        parts[part] = keep_fields(values, kinds[part])
    ids = keep_fields(described, dict.fromkeys(IDS, int))
    with refusing(f"host: {folder / 'config.json'} makes no {described['model_type']!r}"):
        config = config_class(**parts, **ids)
        kind = transformers.MODEL_MAPPING[config_class]
        with on_meta():
            expected = kind(config)
    options = {
        "model_type": described["model_type"],
        **{name: getattr(config, name) for name in IDS},
    }
    for part in parts:  # what differs from its defaults
        changed = getattr(config, part).to_diff_dict()
        options[part] = {name: value for name, value in changed.items() if name in kinds[part]}
    for name in ("hidden_size", "num_hidden_layers"):  # which the models read
        options["text_config"][name] = getattr(config.text_config, name)
    check_host(options)
    weights = read_weights("host", folder)
    check_size(f"host: {folder}", weights, expected)
    # A checkpoint with a head is read as such: transformers 5.10 finds no language model in it for
    # the model without.
    headed = any(name.startswith(("model.", "lm_head.")) for name in weights)
    if headed:
        kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    host = fill("host", source, kind, config, weights)
    return {
        "host": options,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
    }, host.model if headed else host


def freeze_parts(host: nn.Module, frozen: tuple[str, ...]) -> nn.Module:
    for name in frozen:
        freeze(getattr(host, PARTS[name]))
    return host
