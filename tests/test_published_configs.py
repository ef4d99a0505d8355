"""Configs of open_clip's and transformers' folders: what is read, and what is refused."""

import pytest
from published_folders import (
    CLIP,
    OPEN_CLIP,
    PUBLISHED,
    change,
    refusal,
    write,
    write_config,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

from mmfused.models import image_layouts, layouts, pretrained  # noqa: E402
from mmfused.models.pretrained import pretrained_vit  # noqa: E402
from mmfused.models.published import check_pretrained  # noqa: E402

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


def test_further_fields_of_the_vision_config(tmp_path):
    key = "vision_model.embeddings.patch_embedding.weight"
    write(tmp_path, CLIP, {key: (768, 1, 16, 16)})
    config = change(PUBLISHED[CLIP]["config"], "vision_config.num_channels", 1)
    write_config(tmp_path, change(config, "vision_config.attention_dropout", 0.25))
    assert check_pretrained(tmp_path) == ("image_encoder",)
    layout = layouts.find_layout("image encoder", tmp_path)
    assert image_layouts.image_part(layout).options["attn_drop_rate"] == 0.25


def test_the_second_text_config_of_early_folders_counts(tmp_path):
    name = "transformers/OFA-Sys/chinese-clip-vit-base-patch16"
    write(tmp_path, name)
    config = {**PUBLISHED[name]["config"], "text_config_dict": {"vocab_size": 21129}}
    write_config(tmp_path, config)
    assert "word_embeddings.weight: got shape (21128, 768), expected (21129" in refusal(tmp_path)


def test_the_config_that_belongs_to_the_weights_counts(tmp_path):
    write(tmp_path, CLIP)
    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    write(tmp_path, OPEN_CLIP)
    layout = layouts.find_layout("image encoder", tmp_path)
    assert layout.kind == "open_clip" and check_pretrained(tmp_path) == ("image_encoder",)
    (tmp_path / "kept").rename(tmp_path / "model.safetensors")
    layout = layouts.find_layout("image encoder", tmp_path)
    assert layout.kind == "clip" and check_pretrained(tmp_path) == ("image_encoder",)


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


@pytest.mark.parametrize("width", [64, 192, 384, 448, 768, 1280])
def test_the_ratio_gives_back_the_inner_width(width):
    """timm takes the whole part of the product, which rounds below some inner widths."""
    ratio = image_layouts.ratio
    assert all(int(width * ratio(inner, width)) == inner for inner in range(1, 4 * width + 1))
