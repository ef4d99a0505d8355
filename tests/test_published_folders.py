"""Folders with the keys and shapes of published checkpoints, of their full sizes, are whole.

A damaged folder is refused in one sentence. The files' zeros take no room on the disk.
"""

import json
import os
import re

import pytest
import safetensors.torch
import torch
from published_folders import (
    BGE,
    CHINESE,
    CLIP,
    HUGE,
    M3,
    MBERT,
    OPEN_CLIP,
    PUBLISHED,
    expand,
    refusal,
    shapes_of,
    write,
    write_state,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

from mmfused.models import image_layouts, layouts  # noqa: E402
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


def test_two_models_in_one_folder_are_refused(tmp_path):
    write(tmp_path, CLIP, {"other.embeddings.patch_embedding.weight": (3,)})
    assert "got other.embeddings.patch_embedding.weight, vision_model.emb" in refusal(tmp_path)


@pytest.mark.parametrize(("name", "rows"), [(CHINESE, 1), (CHINESE, 3), (BGE, 3)])
def test_a_text_encoder_with_other_token_types_is_refused(tmp_path, name, rows):
    key = next(key for key in shapes_of(name) if key.endswith("token_type_embeddings.weight"))
    write(tmp_path, name, {key: (rows, 768)})
    assert f"{key}: got {rows} rows, expected 2 rows, as a BERT has" in refusal(tmp_path)


def test_a_bert_without_a_config_is_not_known(tmp_path):
    changes = {key: None for key in shapes_of(CHINESE) if "visual" in key}
    write(tmp_path, CHINESE, changes)
    assert "expected a folder with safetensors of a known layout" in refusal(tmp_path)


def test_a_missing_part_of_the_weights_is_refused(tmp_path):
    index = {"weight_map": {"bert.x.weight": "model-1-of-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for call in (parts_of, check_pretrained):
        with pytest.raises(ValueError, match="^folder: .*model-1-of-1.safetensors is missing"):
            call(tmp_path)


def test_a_resnet_is_refused(tmp_path):
    changes = {key: None for key in shapes_of(CHINESE) if "visual.transformer" in key}
    write(tmp_path, CHINESE, {**changes, "module.visual.layer1.0.conv1.weight": (64, 64, 1, 1)})
    assert "got a ResNet, expected a VisionTransformer" in refusal(tmp_path)
    assert layouts.text_part(layouts.find_layout("text encoder", tmp_path))


def test_folders_without_weights_of_a_known_layout_are_refused(tmp_path):
    torch.save({}, tmp_path / "clip_cn_vit-b-16.pt")
    for call in (parts_of, check_pretrained, pretrained_projection):
        with pytest.raises(ValueError, match="^folder: got '.*'.*, expected a folder with safete"):
            call(tmp_path)
    for name, load in (("image encoder", pretrained_vit), ("text encoder", pretrained_text)):
        with pytest.raises(
            FileNotFoundError, match=f"^{name}: .* lacks a file, .*b-16.pt is a pickl"
        ):
            load(str(tmp_path))
    write_state(tmp_path, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="^folder: got '.*'.*, expected a folder with safetensors"):
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
    with pytest.raises(ValueError, match="^folder: .*open_clip_config.json is truncated or corr"):
        parts_of(tmp_path)


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
