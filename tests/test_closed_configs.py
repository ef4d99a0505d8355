"""Tests that loading an untrusted config is safe.

Loading must not run code from the config, open other files or allocate unbounded memory.
"""

import json
import math

import pytest
import torch

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from watching import Outside  # noqa: E402

from mmfused.models import MODELS  # noqa: E402
from mmfused.models.config import shapes_of  # noqa: E402
from mmfused.models.encoders import TEXT_TYPES, build_text  # noqa: E402

PRESETS = [(name, preset) for name, kind in MODELS.items() for preset in kind.config.PRESETS]
BERT = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 90}
AUTO_MAP = {"auto_map": {"AutoModel": "module.Model"}}


def config_of(name, **changes):
    kind = MODELS[name].config
    return kind.preset("tiny", **{**kind.UNKNOWN, **changes})


@pytest.fixture
def outside(tmp_path):
    return Outside(tmp_path / "outside")


# --- fields, with their types and bounds ---

IMAGE = [
    (
        {"checkpoint_path": "{pickle}"},
        "image: got a field 'checkpoint_path', expected img_size, patch_size",
    ),
    (
        {"name": "vit_tiny_patch16_224", "checkpoint_path": "{pickle}"},
        "image: got a field 'checkpoint_path', expected name",
    ),
    ({"pretrained": True}, "image: got a field 'pretrained'"),
    ({"pretrained_cfg": {"file": "{pickle}"}}, "image: got a field 'pretrained_cfg'"),
    (
        {"name": "vit_tiny_patch16_224", "pretrained_cfg_overlay": {"file": "{pickle}"}},
        "image: got a field 'pretrained_cfg_ov",
    ),
    ({"cache_dir": "{folder}"}, "image: got a field 'cache_dir'"),
    ({"features_only": True}, "image: got a field 'features_only'"),
    ({"scriptable": True}, "image: got a field 'scriptable'"),
    ({"block_fn": "os.system"}, "image: got a field 'block_fn'"),
    (
        {"name": "hf-hub:some/model"},
        "image.name: got 'hf-hub:some/model', expected the name of a timm model",
    ),
    ({"name": "local-dir:{folder}"}, "image.name: got 'local-dir:"),
    ({"name": "../outside"}, "image.name: got '../outside'"),
    ({"name": ["vit_tiny_patch16_224"]}, "image.name: got"),
    (
        {"name": "resnet18"},
        "image.name: got 'resnet18', a ResNet|image: got options that cannot build timm's resnet18",
    ),
    ({"norm_layer": "os.system"}, "image: got options that cannot build a VisionTransformer: "),
    ({"norm_layer": {"x": 1}}, "image.norm_layer: got {'x': 1}, expected a string or None"),
    ({"depth": "12"}, "image.depth: got '12', expected an integer from 1 to 1000"),
    ({"depth": True}, "image.depth: got True"),
    ({"depth": 10**9}, "image.depth: got 1000000000"),
    ({"num_heads": None}, "image.num_heads: got None"),
    ({"num_heads": 7}, "image: got options that cannot build a VisionTransformer"),
    (
        {"img_size": 10**6},
        "image.img_size: got 1000000, expected an integer from 1 to 4096 or 2 integers",
    ),
    ({"mlp_ratio": math.nan}, "image.mlp_ratio: got nan, expected a finite number"),
]
TEXT = [
    (AUTO_MAP, "text: got a field 'auto_map', expected model_type"),
    (
        {"attn_implementation": "kernels-community/flash-attn"},
        "text: got a field 'attn_implementation'",
    ),
    (
        {"_attn_implementation": "kernels-community/flash-attn"},
        "text: got a field '_attn_implementation'",
    ),
    ({"experts_implementation": "x"}, "text: got a field 'experts_implementation'"),
    ({"quantization_config": {"quant_method": "x"}}, "text: got a field 'quantization_config'"),
    ({"torch_dtype": "load"}, "text: got a field 'torch_dtype'"),
    ({"dtype": "load"}, "text: got a field 'dtype'"),
    ({"_name_or_path": "{folder}"}, "text: got a field '_name_or_path'"),
    ({"per_layer_config": {"0": {}}}, "text: got a field 'per_layer_config'"),
    ({"id2label": {"0": "x"}}, "text: got a field 'id2label'"),
    ({"fusion_config": {}}, "text: got a field 'fusion_config'"),
    ({"hidden_size": 3}, "text: got a field 'hidden_size'"),
    ({"line\nbreak": 3}, "text: got a field 'line"),
    ({"model_type": "mine"}, "text.model_type: got 'mine', expected one of albert, bert"),
    ({"model_type": ["bert"]}, r"text.model_type: got \['bert'\]"),
    (
        {"vocab_size": 10**12},
        "text.vocab_size: got 1000000000000, expected an integer from 1 to 100000000",
    ),
    ({"num_attention_heads": 0}, "text.num_attention_heads: got 0"),
    ({"type_vocab_size": 0}, "text.type_vocab_size: got 0, expected at least 1"),
    ({"num_hidden_layers": None}, "text.num_hidden_layers: got None"),
    ({"hidden_act": "nothing"}, "text: got options that cannot build a 'bert' of width 128"),
    ({"num_attention_heads": 3}, "text: got options that cannot build a 'bert' of width 128"),
    (
        {
            "model_type": "distilbert",
            "sinusoidal_pos_embds": True,
            "max_position_embeddings": 2**20,
        },
        "sinusoidal",
    ),
]
HOSTED = [
    ({"host": AUTO_MAP}, "host: got a field 'auto_map'"),
    (
        {"host": {"text_config": {"attn_implementation": "x/y"}}},
        "host.text_config: got a field 'attn_implementation'",
    ),
    (
        {"host": {"vision_config": {"_name_or_path": "{folder}"}}},
        "host.vision_config: got a field '_name_or_path'",
    ),
    (
        {"host": {"text_config": {"rope_parameters": {"path": "x"}}}},
        "host.text_config.rope_parameters: got a field 'path'",
    ),
    ({"host": {"text_config": {"rope_parameters": [1]}}}, "host.text_config.rope_parameters: got"),
    ({"host": {"vision_config": {"patch_size": [8, 8]}}}, "host.vision_config.patch_size: got"),
    ({"host": {"text_config": None}}, "host.text_config: got None, expected an object"),
    ({"host": []}, r"host: got \[\], expected an object"),
    ({"host": {"model_type": "llava"}}, "host.model_type: got 'llava'"),
    ({"host": {"model_type": "qwen2_vl"}}, "host.text_config: got None"),
    (
        {"host": {"text_config": {"num_hidden_layers": 10**6}}},
        "host.text_config.num_hidden_layers: got 1000000",
    ),
    ({"tokens": {"more": 1}}, "tokens: got a field 'more'"),
    ({"tokens": {"pad": 1}}, "tokens: got a dict without vision_start, vision_end, image, end"),
    ({"tokens": 3}, "tokens: got 3"),
    ({"image_size": 4096, "patch_size": 2}, "image_size: got 4096, expected at most 65536 tokens"),
    ({"image_size": "64"}, "image_size: got '64'"),
]
FLUID = [
    ({"num_classes": 2.0}, "num_classes: got 2.0, expected an integer"),
    (
        {"num_classes": 2_000_000_000},
        "num_classes: got 2000000000, expected an integer from 1 to 1000000",
    ),
    ({"dim": "128"}, "dim: got '128'"),
    ({"num_experts": 10**9}, "num_experts: got 1000000000"),
    ({"gate_hidden": [8] * 5000}, "gate_hidden: got"),
    ({"temperature": math.inf}, "temperature: got inf"),
    ({"dropout": 10**400}, "dropout: got"),
    ({"pixel_std": [0.2, 0.0, 0.2]}, "pixel_std: got"),
    ({"pixel_mean": "abc"}, "pixel_mean: got 'abc', expected 3 finite numbers"),
    ({"text_mask": 1}, "text_mask: got 1, expected True or False"),
    ({"image": "vit"}, "image: got 'vit'"),
    ({"image": {"img_size": 60}}, "image.img_size: got 60, expected a multiple of patch_size=8"),
    ({"image_dim": 4}, "image_dim: got 4, expected at least 8 for the convolutional stem"),
    ({"query_std": -1}, "query_std: got -1, expected a number of at least 0"),
    ({"text": [1]}, r"text: got \[1\]"),
    ({"image_stem": ["conv"]}, "image_stem: got"),
    ({"image_size": "56"}, "image_size: got '56', expected an integer from 1 to 4096 or None"),
    ({"dpeth": 1}, "FLUIDConfig: got a field 'dpeth', expected num_classes"),
]
HOSTILE = [
    *(("fluid", {"image": options, "image_stem": "patch"}, match) for options, match in IMAGE),
    *(("fluid", {"text": options}, match) for options, match in TEXT),
    *(("unite", options, match) for options, match in HOSTED),
    *(("fluid", options, match) for options, match in FLUID),
]


@pytest.mark.parametrize(
    ("name", "changes", "match"), HOSTILE, ids=[match for _, _, match in HOSTILE]
)
def test_a_config_with_unknown_fields_or_invalid_values_is_rejected(name, changes, match, outside):
    text = (
        json.dumps(changes)
        .replace("{pickle}", str(outside.pickle))
        .replace("{folder}", str(outside.folder))
    )
    outside.refuses(lambda: shapes_of(MODELS[name], config_of(name, **json.loads(text))), match)


@pytest.mark.parametrize("name", MODELS)
def test_every_field_rejects_a_list_of_objects_in_one_line(name):
    config = config_of(name)
    for field in config.to_dict():
        with pytest.raises(ValueError, match=f"^{field}: got ") as caught:
            type(config).from_dict({**config.to_dict(), field: [{}]})
        assert "\n" not in str(caught.value)
    for values in ([], None, "x"):
        with pytest.raises(ValueError, match="^model: got "):
            type(config).from_dict(values)


def test_a_missing_required_field_is_an_error():
    with pytest.raises(ValueError, match="^num_classes: got nothing"):
        MODELS["fluid"].config.from_dict({})


def test_image_size_overrides_the_size_of_the_preset():
    assert config_of("fluid", image_size=56).image["img_size"] == 56
    assert config_of("unite", image_size=96).image_size == 96


# --- shapes and picture sizes from a config, without a model ---


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_shapes_of_a_config_match_the_model_and_use_no_random_numbers(name, preset):
    kind = MODELS[name]
    config = kind.config.preset(preset, **kind.config.UNKNOWN)
    before = torch.random.get_rng_state()
    shapes = shapes_of(kind, config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert kind.config.picture_size_of(preset) == config.picture_size
    if preset == "tiny":
        model = kind.model(config)
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
        assert model.picture_size == config.picture_size


def test_picture_size_of_a_config_matches_the_model():
    for image in (
        {"name": "vit_tiny_patch16_384", "depth": 1},
        {"name": "vit_tiny_patch16_224", "img_size": 64, "depth": 1},
    ):
        config = config_of(
            "fluid", image=image, image_dim=192, image_stem="patch", text=None, modalities="image"
        )
        before = torch.random.get_rng_state()
        size = config.picture_size
        assert torch.equal(torch.random.get_rng_state(), before)
        assert size == MODELS["fluid"].model(config).picture_size
    config = MODELS["fluid"].config(
        2, image={"depth": 1, "num_heads": 2, "patch_size": 32}, image_stem="patch"
    )
    assert config.picture_size == MODELS["fluid"].model(config).picture_size == 224
    assert config_of("fluid", image=None).picture_size is None
    assert config_of("fluid", modalities="text").picture_size is None
    assert MODELS["uniecs"].config.picture_size_of("tiny", image_size=32, patch_size=8) == 32
    assert MODELS["moon2"].config.picture_size_of("paper", image_size=448) == 448


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_text_encoders_of_every_type_read_ids_and_mask(kind):
    options = {**BERT, "max_position_embeddings": 40, "model_type": kind, "pad_token_id": 0}
    if kind == "distilbert":
        options = {
            "model_type": kind,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 24,
            "vocab_size": 90,
        }
    if kind == "modernbert":
        options |= dict.fromkeys(
            ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1
        )
    encoder = build_text(16, json.loads(json.dumps(options))).eval()
    ids, mask = torch.randint(3, 90, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    ids[1, 5:] = 4
    assert states.shape == (2, 8, 16)
    assert torch.allclose(
        encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :5],
        states[:, :5],
        atol=1e-5,
    )
