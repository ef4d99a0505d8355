"""Folders with the keys and shapes of published checkpoints, of their full sizes, are whole.

A damaged folder is refused in one sentence. The files' zeros take no room on the disk.
"""

import json
import os
import re

import pytest
import safetensors.torch
import torch
from published_folders import PUBLISHED, expand, shapes_of, write_config, write_shapes, write_state

pytest.importorskip("timm")
pytest.importorskip("transformers")

from mmfused.models import image_layouts, layouts, pretrained  # noqa: E402
from mmfused.models.pretrained import pretrained_text, pretrained_vit  # noqa: E402
from mmfused.models.published import (  # noqa: E402
    check_pretrained,
    parts_of,
    pretrained_projection,
)
from mmfused.models.weights import compress  # noqa: E402

HELD = {
    "timm/": ("image_encoder",),
    "open_clip/": ("image_encoder",),
    "eva-clip/": ("image_encoder",),
    "transformers/openai/": ("image_encoder",),
    "transformers/OFA-Sys/": ("image_encoder", "text_encoder"),
    "transformers/bert": ("text_encoder",),
    "transformers/BAAI/": ("text_encoder",),
    "chinese-clip/": ("image_encoder", "text_encoder"),
    "visualized-bge/": ("image_encoder", "text_encoder", "visual_proj"),
}
TIMM = {"architecture": "vit_base_patch16_clip_quickgelu_224", "num_features": 768}
BGE = "visualized-bge/Visualized_base_en_v1.5.pth"
CHINESE = "chinese-clip/clip_cn_vit-b-16.pt"
HUGE = "chinese-clip/clip_cn_vit-h-14.pt"
M3 = "visualized-bge/Visualized_m3.pth"
CLIP = "transformers/openai/clip-vit-base-patch16"
OPEN_CLIP = "open_clip/ViT-B-16"
MBERT = "transformers/bert-base-multilingual-cased"


def write(folder, name, changes=None):
    """Write a published checkpoint with changed shapes; a weight of shape None is left out."""
    config = TIMM if name.startswith("timm/") else PUBLISHED[name].get("config")
    if config is not None:
        write_config(folder, config)
    held = {**shapes_of(name), **(changes or {})}
    file = "open_clip_model" if name.startswith("open_clip/") else "model"
    path = folder / f"{file}.safetensors"
    write_shapes(path, {key: shape for key, shape in held.items() if shape is not None})
    return path


def refusal(folder):
    """Return the one sentence that refuses a folder."""
    with pytest.raises(ValueError) as caught:
        check_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and "expected" in message
    return message


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_whole(tmp_path, name):
    write(tmp_path, name)
    expected = next(parts for begin, parts in HELD.items() if name.startswith(begin))
    assert parts_of(tmp_path) == expected
    before = torch.get_rng_state()
    assert check_pretrained(tmp_path) == expected
    assert torch.equal(torch.get_rng_state(), before)
    for part, load in (("image_encoder", pretrained_vit), ("text_encoder", pretrained_text)):
        if part not in expected:
            argument = part.replace("_", " ")
            with pytest.raises(
                ValueError, match=f"^{argument}: .* holds .*, expected a folder wit"
            ):
                load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "width", "heads", "inner", "depth", "size"),
    [
        (CHINESE, 768, 12, 3072, 12, 224),
        (HUGE, 1280, 16, 5120, 32, 224),
        (BGE, 768, 12, 2048, 12, 224),
        (M3, 1024, 16, 2730, 24, 224),
        (CLIP, 768, 12, 3072, 12, 224),
        (OPEN_CLIP, 768, 12, 3072, 12, 224),
    ],
)
def test_published_sizes(tmp_path, name, width, heads, inner, depth, size):
    write(tmp_path, name)
    layout = layouts.find_layout("image encoder", tmp_path)
    options = image_layouts.image_part(layout).options
    assert (options["embed_dim"], options["num_heads"], options["depth"]) == (width, heads, depth)
    assert int(width * options["mlp_ratio"]) == inner and options["img_size"] == size
    assert ("quickgelu" in options["name"]) == (name in (CHINESE, HUGE, CLIP))


@pytest.mark.parametrize(
    ("name", "heads", "kind", "positions", "epsilon"),
    [
        (CHINESE, 12, "bert", 512, 1e-12),
        (HUGE, 16, "bert", 512, 1e-12),
        (BGE, 12, "bert", 512, 1e-12),
        (M3, 16, "xlm-roberta", 8194, 1e-5),
    ],
)
def test_published_sizes_of_texts(tmp_path, name, heads, kind, positions, epsilon):
    write(tmp_path, name)
    options = layouts.text_part(layouts.find_layout("text encoder", tmp_path)).options
    assert (options["num_attention_heads"], options["model_type"]) == (heads, kind)
    assert (options["max_position_embeddings"], options["layer_norm_eps"]) == (positions, epsilon)
    assert options["pad_token_id"] == (1 if kind == "xlm-roberta" else 0)


MISSING = [
    (CHINESE, "module.visual.transformer.resblocks.0-11.mlp.c_fc.bias"),
    (CHINESE, "module.bert.encoder.layer.0-11.attention.self.query.bias"),
    (CHINESE, "module.visual.ln_post.weight"),
    (BGE, "model_visual.visual.blocks.0-11.mlp.w2.bias"),
    (BGE, "bge_encoder.layer.0-11.output.dense.weight"),
    (BGE, "visual_proj.bias"),
    (CLIP, "vision_model.encoder.layers.0-11.self_attn.k_proj.bias"),
    (OPEN_CLIP, "visual.transformer.resblocks.0-11.attn.in_proj_bias"),
    ("open_clip/EVA02-B-16", "visual.trunk.blocks.0-11.attn.q_proj.bias"),
    ("timm/vit_base_patch16_clip_quickgelu_224.openai", "blocks.0-11.attn.qkv.weight"),
    ("transformers/BAAI/bge-m3", "encoder.layer.0-23.attention.self.query.bias"),
]


@pytest.mark.parametrize(("name", "pattern"), MISSING, ids=[pattern for _, pattern in MISSING])
def test_all_missing_weights_are_named(tmp_path, name, pattern):
    path = write(tmp_path, name, dict.fromkeys(expand(pattern)))
    count = len(expand(pattern))
    message = refusal(tmp_path)
    assert re.fullmatch(
        f".*{re.escape(str(path))} lacks {count} weights of .*, expected .*", message
    )
    assert f": {pattern}, expected all that its config" in message


def test_a_long_list_of_missing_weights_is_not_cut(tmp_path):
    patterns = [key for key in PUBLISHED[CHINESE]["keys"] if "bert.encoder" in key]
    write(tmp_path, CHINESE, dict.fromkeys(key for part in patterns for key in expand(part)[1:-1]))
    expected = [pattern.replace("0-11", "1-10") for pattern in patterns]
    message = refusal(tmp_path)
    assert len(message) > 1000 and all(pattern in message for pattern in expected)


WRONG = [
    (CHINESE, "module.visual.transformer.resblocks.3.mlp.c_fc.weight", (3072, 767)),
    (CHINESE, "module.bert.embeddings.LayerNorm.weight", (3,)),
    (BGE, "model_visual.visual.cls_token", (1, 768, 1)),
    (BGE, "visual_proj.weight", (768, 7)),
    (BGE, "bge_encoder.layer.7.output.dense.bias", (0,)),
    (CLIP, "vision_model.encoder.layers.2.self_attn.k_proj.weight", (3, 768)),
    (OPEN_CLIP, "visual.positional_embedding", (50, 768)),
    (MBERT, "bert.encoder.layer.5.output.dense.weight", (7, 7)),
]


@pytest.mark.parametrize(("name", "key", "shape"), WRONG, ids=[key for _, key, _ in WRONG])
def test_a_weight_of_another_shape_is_named(tmp_path, name, key, shape):
    right = tuple(shapes_of(name)[key])
    write(tmp_path, name, {key: shape})
    assert f"{key}: got shape {shape}, expected {right}" in refusal(tmp_path).replace(
        "(1, 197", "(197"
    )


FURTHER = [
    (CHINESE, "module.visual.transformer.resblocks.12.ln_1.weight", "lacks 11 weights"),
    (CHINESE, "module.visual.transformer.resblocks.3.ln_3.weight", "got {key}, expected none"),
    (CHINESE, "module.bert.encoder.layer.3.extra.weight", "got {key}, expected none"),
    (CHINESE, "module.other.weight", "got {key}, expected only names with module.visual., "),
    (BGE, "model_visual.visual.mask_token", "got {key}, expected none of them"),
    (BGE, "visual_proj.2.bias", "got {key}, expected none of them"),
    (BGE, "other.bias", "got {key}, expected only names with bge_encoder., bge_embeddings., "),
    (CLIP, "vision_model.encoder.layers.12.mlp.fc1.bias", "got {key}, expected none of them"),
    (OPEN_CLIP, "visual.attn_pool.query", "got {key}, expected none of them"),
    (MBERT, "bert.encoder.layer.12.output.dense.bias", "does not have: {key}, expected as many"),
]


@pytest.mark.parametrize(("name", "key", "message"), FURTHER, ids=[key for _, key, _ in FURTHER])
def test_a_weight_of_another_model_is_named(tmp_path, name, key, message):
    write(tmp_path, name, {key: (768,)})
    assert message.format(key=key) in refusal(tmp_path)


def change(config, path, value):
    """Return a copy of a config with another value at a dotted path."""
    copy = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    inner = copy
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return copy


CONFIGS = [
    (
        CLIP,
        "vision_config.layer_norm_eps",
        1e-6,
        "vision_config: layer_norm_eps: got 1e-06, expecte",
    ),
    (
        CLIP,
        "vision_config.hidden_act",
        "relu",
        "vision_config: hidden_act: got 'relu', expected one",
    ),
    (
        CLIP,
        "vision_config.num_attention_heads",
        7,
        "num_attention_heads: got 7, expected a divisor ",
    ),
    (CLIP, "vision_config.num_hidden_layers", "x", "num_hidden_layers: got 'x', expected an integ"),
    (CLIP, "vision_config.num_hidden_layers", 13, "lacks 16 weights of the encoder: vision_model."),
    (CLIP, "vision_config", 3, "vision_config: got 3, expected an object"),
    (CLIP, "model_type", "siglip", "expected a folder with safetensors of a known layout"),
    (OPEN_CLIP, "model_cfg", None, "model_cfg: got None, expected an object"),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.no_ln_pre",
        True,
        "vision_cfg.no_ln_pre: got True, expected Fa",
    ),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.ls_init_value",
        0.1,
        "ls_init_value: got 0.1, expected False",
    ),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.pos_embed_type",
        "sin_cos_2d",
        "got 'sin_cos_2d', expected 'l",
    ),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.layers",
        [3, 4, 6, 3],
        "layers: got [3, 4, 6, 3], expected an",
    ),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.head_width",
        100,
        "head_width: got 100, expected a divisor of",
    ),
    (OPEN_CLIP, "model_cfg.quick_gelu", "yes", "quick_gelu: got 'yes', expected True or False"),
    (
        OPEN_CLIP,
        "preprocess_cfg.mean",
        [1],
        "preprocess_cfg.mean: got [1], expected 3 finite numbers",
    ),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.timm_model_name",
        "hf-hub:a/b",
        "image.name: got 'hf-hub:a/b', ",
    ),
    (
        OPEN_CLIP,
        "model_cfg.vision_cfg.timm_model_name",
        "resnet18",
        "cannot build timm's resnet18",
    ),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "message"), CONFIGS, ids=[f"{row[1]}={row[2]}" for row in CONFIGS]
)
def test_other_configs_are_refused(tmp_path, name, path, value, message):
    write(tmp_path, name)
    write_config(tmp_path, change(PUBLISHED[name]["config"], path, value))
    assert message in refusal(tmp_path)


def test_the_second_vision_config_of_early_folders_counts(tmp_path):
    write(tmp_path, CLIP)
    config = {**PUBLISHED[CLIP]["config"], "vision_config_dict": {"patch_size": 16}}
    write_config(tmp_path, change(config, "vision_config.patch_size", 32))
    assert check_pretrained(tmp_path) == ("image_encoder",)
    write_config(tmp_path, change(config, "vision_config_dict.patch_size", 32))
    assert "position_embedding.weight: got shape (197, 768), expected (50, 768)" in refusal(
        tmp_path
    )


def test_a_resnet_is_refused(tmp_path):
    changes = {key: None for key in shapes_of(CHINESE) if "visual.transformer" in key}
    write(tmp_path, CHINESE, {**changes, "module.visual.layer1.0.conv1.weight": (64, 64, 1, 1)})
    assert "got a ResNet, expected a VisionTransformer" in refusal(tmp_path)
    assert layouts.text_part(layouts.find_layout("text encoder", tmp_path))


def test_folders_without_weights_of_a_known_layout_are_refused(tmp_path):
    torch.save({}, tmp_path / "clip_cn_vit-b-16.pt")
    for call in (parts_of, check_pretrained, pretrained_projection):
        with pytest.raises(
            ValueError, match="^pretrained: got '.*', expected a folder with safete"
        ):
            call(tmp_path)
    for name, load in (("image encoder", pretrained_vit), ("text encoder", pretrained_text)):
        with pytest.raises(
            FileNotFoundError, match=f"^{name}: .* lacks a file, .*b-16.pt is a pickl"
        ):
            load(str(tmp_path))
    write_state(tmp_path, {"weight": torch.zeros(3)})
    with pytest.raises(
        ValueError, match="^pretrained: got '.*', expected a folder with safetensors"
    ):
        parts_of(tmp_path)
    for name, load in (("image encoder", pretrained_vit), ("text encoder", pretrained_text)):
        with pytest.raises(
            FileNotFoundError, match=f"^{name}: .* lacks a file, expected config.json"
        ):
            load(str(tmp_path))


@pytest.mark.parametrize("name", [BGE, OPEN_CLIP])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = write(tmp_path, name)
    os.truncate(path, os.path.getsize(path) - 4)
    expected = f"{path} is truncated, corrupt or not a safetensors file"
    for call in (check_pretrained, lambda folder: pretrained_vit(str(folder))):
        with pytest.raises(ValueError) as caught:
            call(tmp_path)
        assert expected in str(caught.value)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(
        ValueError, match="^pretrained: .*open_clip_config.json is truncated or corr"
    ):
        parts_of(tmp_path)


@pytest.mark.parametrize("name", ["open_clip", "clip"])
def test_only_config_and_safetensors_are_downloaded_from_the_hub(tmp_path, monkeypatch, name):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    requested = []

    def download(source, file):
        assert source == "some/model"
        requested.append(file)
        if not (tmp_path / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if name == "open_clip":
        write(tmp_path, OPEN_CLIP)
        expected = ["config.json", "open_clip_config.json", "open_clip_model.safetensors"]
    else:
        write(tmp_path, CLIP)
        (tmp_path / "preprocessor_config.json").write_text('{"image_std": [1, 2, 3]}')
        expected = ["config.json", "preprocessor_config.json", "model.safetensors"]
    monkeypatch.setattr(pretrained, "read_weights", refuse)
    with pytest.raises(KeyError):  # before the weights are read
        pretrained_vit("some/model")
    assert requested == expected


def refuse(*arguments):
    raise KeyError(arguments)


def test_a_host_is_checked_without_its_values(tmp_path):
    from test_exported_folders import build

    from mmfused.models.qwen_export import save_host

    save_host(*build(), tmp_path)
    assert parts_of(tmp_path) == check_pretrained(tmp_path) == ("host",)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    key = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    safetensors.torch.save_file({**weights, key: weights[key][:1].clone()}, path, {"format": "pt"})
    assert f"{key}: got shape (1, 16), expected" in refusal(tmp_path)


def test_names_are_compressed_by_number():
    keys = [f"blocks.{i}.experts.{j}.weight" for i in (0, 1, 2, 5, 10) for j in range(2)]
    assert compress(keys) == ["blocks.0-2,5,10.experts.0-1.weight"]
    assert compress([*keys, "blocks.1.bias", "norm", "head.0"]) == [
        "blocks.0-2,5,10.experts.0-1.weight",
        "blocks.1.bias",
        "norm",
        "head.0",
    ]
    assert compress(["a.00.b", "a.01.b", "a.#.b"]) == ["a.00.b", "a.01.b", "a.#.b"]
    assert compress([]) == []
    for name in PUBLISHED:
        shapes = shapes_of(name)
        assert sorted(key for part in compress(shapes) for key in expand(part)) == sorted(shapes)
