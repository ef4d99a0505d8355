"""Encoders loaded from each published layout equal the public class in float64.

The small models' keys follow the pattern of the published lists. The renamings are the test's own.
"""

import json

import pytest
import torch
from published_folders import PUBLISHED, pattern_of, write_state

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from mmfused.models.encoders import build_text, build_vit  # noqa: E402
from mmfused.models.pretrained import pretrained_text, pretrained_vit  # noqa: E402
from mmfused.models.published import check_pretrained, parts_of, pretrained_projection  # noqa: E402

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
BERT = {"vocab_size": 90, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 200, "max_position_embeddings": 40}
EVA = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 24}
EVA_NAME = "eva02_base_patch16_clip_224"
VISION = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"intermediate_size": 200, "image_size": 24, "patch_size": 8}
WORDS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50}
PIXELS = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))


def shaken(model):
    """Return a model in float64 in evaluation mode, whose random weights are float32 numbers."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def matches(keys, name):
    """Require the keys of a published checkpoint, apart from the numbers of layers."""
    assert pattern_of(keys) == pattern_of(PUBLISHED[name]["keys"])


def same_image(folder, expected):
    """Require ``expected`` of a folder's ViT, and of the one that its config fields rebuild."""
    assert "image_encoder" in parts_of(folder) and "image_encoder" in check_pretrained(folder)
    fields, encoder = pretrained_vit(folder)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    rebuilt = build_vit(fields["image_dim"], "patch", json.loads(json.dumps(fields["image"])))
    rebuilt.load_state_dict(encoder.state_dict())
    for vit in (encoder, rebuilt):
        tokens = vit.double().eval().forward_features(PIXELS)
        assert tokens.shape == expected.shape
        assert (tokens - expected).abs().max() <= 1e-12 * expected.abs().max()
    return fields


def same_text(folder, model):
    assert "text_encoder" in parts_of(folder) and "text_encoder" in check_pretrained(folder)
    fields, encoder = pretrained_text(folder)
    rebuilt = build_text(fields["text_dim"], json.loads(json.dumps(fields["text"])))
    rebuilt.load_state_dict(encoder.state_dict())
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, 5:], mask[1, 5:] = model.config.pad_token_id, 0
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for text in (encoder, rebuilt):
        found = text.double().eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        assert (found - expected).abs().max() <= 1e-12
    return fields


def open_clip_model(quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 24,
            "layers": 2,
            "width": 128,
            "patch_size": 8,
            "mlp_ratio": 1.57,  # 200.96 of 128, of which the whole part is taken
        },
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 1, "layers": 1},
        "quick_gelu": quick_gelu,
    }
    model = shaken(open_clip.CLIP(**config))
    model.visual.output_tokens = True
    return model, {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}


def open_clip_tokens(model):
    """Return all tokens after the last norm, of which open_clip returns those of patches."""
    visual = model.visual
    tokens = visual.ln_post(visual.transformer(visual._embeds(PIXELS)))
    assert torch.equal(visual(PIXELS)[1], tokens[:, 1:])
    return tokens


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "model.safetensors"])
def test_clip_of_open_clip(tmp_path, quick_gelu, name):
    model, config = open_clip_model(quick_gelu)
    matches(model.state_dict(), "open_clip/ViT-B-16")
    folder = write_state(tmp_path, model.state_dict(), config, name)
    fields = same_image(folder, open_clip_tokens(model))
    assert (fields["pixel_mean"], fields["pixel_std"]) == (tuple(MEAN), tuple(STD))
    assert parts_of(folder) == ("image_encoder",)


def test_clip_of_openai_has_its_sizes_as_weights(tmp_path):
    model, _ = open_clip_model(True)
    sizes = {"input_resolution": 24, "context_length": 8, "vocab_size": 50}
    state = {**model.state_dict(), **{key: torch.tensor(size) for key, size in sizes.items()}}
    folder = write_state(tmp_path, state)
    same_image(folder, open_clip_tokens(model))
    with pytest.raises(
        ValueError, match="got names of open_clip without its config, expected open_"
    ):
        pretrained_vit(write_state(tmp_path, model.state_dict()))


def test_eva_of_open_clip(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **given: create(*args, **{**EVA, **given})
    )
    config = json.loads(json.dumps(PUBLISHED["open_clip/EVA02-B-16"]["config"]))
    config["model_cfg"]["vision_cfg"]["image_size"] = 24
    config["model_cfg"]["text_cfg"] |= {"vocab_size": 50, "width": 64, "heads": 1, "layers": 1}
    model = shaken(open_clip.CustomTextCLIP(**config["model_cfg"]))
    matches(model.state_dict(), "open_clip/EVA02-B-16")
    folder = write_state(tmp_path, model.state_dict(), config, "open_clip_model.safetensors")
    fields = same_image(folder, model.visual.trunk.forward_features(PIXELS))
    assert fields["image"]["name"] == EVA_NAME


@pytest.mark.parametrize(("pool", "proj"), [("avg", ""), ("avg", "linear"), ("token", "none")])
def test_a_vit_of_timm_in_open_clip_is_pooled_as_there(tmp_path, monkeypatch, pool, proj):
    """With "avg" and no projection, open_clip's model has no norm before the pooling."""
    tower = pytest.importorskip("open_clip.timm_model")
    sizes = {"embed_dim": 64, "depth": 1, "patch_size": 8, "num_heads": 2, "img_size": 24}
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **given: create(*args, **{**sizes, **given})
    )
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 24}
    vision |= {"timm_pool": pool, "timm_proj": proj}
    visual = tower.TimmModel(vision["timm_model_name"], 32, 24, pool, proj)
    state = {f"visual.{key}": value for key, value in shaken(visual).state_dict().items()}
    assert ("visual.trunk.fc_norm.weight" in state) == (pool == "avg" and not proj)
    config = {"model_cfg": {"vision_cfg": vision}}
    folder = write_state(tmp_path, state, config, "open_clip_model.safetensors")
    same_image(folder, visual.trunk.forward_features(PIXELS))


def test_clip_of_timm(tmp_path):
    name = "vit_base_patch16_clip_quickgelu_224"
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 24}
    model = shaken(timm.create_model(name, num_classes=512, **arguments))
    matches(model.state_dict(), "timm/vit_base_patch16_clip_quickgelu_224.openai")
    config = {"architecture": name, "model_args": arguments, "mean": MEAN, "std": STD}
    folder = write_state(tmp_path, model.state_dict(), config)
    assert same_image(folder, model.forward_features(PIXELS))["pixel_mean"] == tuple(MEAN)


def transformers_tokens(vision):
    vision = getattr(vision, "vision_model", vision)  # the class nests it before transformers 5.24
    return vision.post_layernorm(vision(pixel_values=PIXELS).last_hidden_state)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["clip", "vision", "projection"])
def test_clip_of_transformers(tmp_path, kind, act):
    vision = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
    if kind == "clip":
        words = {**WORDS, "intermediate_size": 40, "max_position_embeddings": 8}
        config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=words)
        model = transformers.CLIPModel(config)
    elif kind == "vision":
        model = transformers.CLIPVisionModel(vision)
    else:
        model = transformers.CLIPVisionModelWithProjection(vision)
    expected = transformers_tokens(getattr(shaken(model), "vision_model", model))
    model.float().save_pretrained(tmp_path)
    fields = same_image(str(tmp_path), expected)
    assert fields["pixel_mean"] == (0.48145466, 0.4578275, 0.40821073)
    values = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    state, config = model.state_dict(), json.loads((tmp_path / "config.json").read_text())
    if kind == "clip":
        ids = {
            f"{part}_model.embeddings.position_ids": torch.zeros(1, 9)
            for part in ("text", "vision")
        }
        matches({**state, **ids}, "transformers/openai/clip-vit-base-patch16")
        write_state(tmp_path, {**state, **ids}, config)
    else:  # as transformers 5 and earlier versions write it
        bare = {key.removeprefix("vision_model."): value for key, value in state.items()}
        bare = {key: value for key, value in bare.items() if not key.startswith("visual_proj")}
        write_state(tmp_path, {f"vision_model.{key}": value for key, value in bare.items()}, config)
        same_image(str(tmp_path), expected)
        write_state(tmp_path, bare, config)
    assert same_image(str(tmp_path), expected)["pixel_std"] == tuple(STD)


def chinese_clip():
    text = {**BERT, "hidden_act": "gelu"}
    config = transformers.ChineseCLIPConfig(vision_config=VISION, text_config=text)
    return shaken(transformers.ChineseCLIPModel(config))


def test_chinese_clip_of_transformers(tmp_path):
    model = chinese_clip()
    expected = transformers_tokens(model.vision_model)
    model.float().save_pretrained(tmp_path)
    state, config = model.state_dict(), json.loads((tmp_path / "config.json").read_text())
    model.double()
    same_image(str(tmp_path), expected)
    same_text(str(tmp_path), model.text_model)
    ids = {
        f"{part}_model.embeddings.position_ids": torch.zeros(1, 9) for part in ("text", "vision")
    }
    matches({**state, **ids}, "transformers/OFA-Sys/chinese-clip-vit-base-patch16")
    folder = write_state(tmp_path, {**state, **ids}, config)
    same_image(folder, expected)
    same_text(folder, model.text_model)
    # The text model alone, and the vision model alone.
    text = {key: value for key, value in state.items() if key.startswith("text_model.")}
    bare = {key.removeprefix("text_model."): value for key, value in text.items()}
    for number, weights in enumerate((text, bare)):
        folder = write_state(tmp_path / str(number), weights, config["text_config"])
        assert parts_of(folder) == ("text_encoder",)
        same_text(folder, model.text_model)
    vision = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    folder = write_state(tmp_path / "vision", vision, config["vision_config"])
    assert parts_of(folder) == ("image_encoder",)
    same_image(folder, expected)


def original_chinese_clip(model):
    """Return a state of transformers' Chinese-CLIP with the names of cn_clip."""
    state, renamed = model.state_dict(), {}
    for key, value in state.items():
        if key.startswith("text_model."):
            renamed[key.replace("text_model.", "bert.")] = value
    vision = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
    }
    pairs = (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"))
    vision |= {f"{a}.{end}": f"{b}.{end}" for a, b in pairs for end in ("weight", "bias")}
    for layer in range(2):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for end in ("weight", "bias"):
            joined = [state[f"vision_model.{old}self_attn.{part}_proj.{end}"] for part in "qkv"]
            renamed[f"visual.{new}attn.in_proj_{end}"] = torch.cat(joined)
            for a, b in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("self_attn.out_proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                vision[f"{old}{a}.{end}"] = f"{new}{b}.{end}"
    renamed |= {f"visual.{new}": state[f"vision_model.{old}"] for old, new in vision.items()}
    renamed["visual.proj"] = state["visual_projection.weight"].T
    renamed["text_projection"] = state["text_projection.weight"].T
    return {**renamed, "logit_scale": state["logit_scale"]}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_chinese_clip_in_its_authors_names(tmp_path, prefix):
    model = chinese_clip()
    state = {prefix + key: value for key, value in original_chinese_clip(model).items()}
    if prefix:
        matches(state, "chinese-clip/clip_cn_vit-b-16.pt")
    folder = write_state(tmp_path, {key: value.half() for key, value in state.items()})
    model.half().double()  # the published weights are 16 bits wide
    same_image(folder, transformers_tokens(model.vision_model))
    fields = same_text(folder, model.text_model)
    assert fields["text"]["model_type"] == "bert" and fields["text_dim"] == 128
    with pytest.raises(ValueError, match="^folder: .* holds image_encoder, text_encoder, expec"):
        pretrained_projection(folder)


def original_eva(vit):
    """Return a state of timm's Eva with the names of EVA02-CLIP, with the rotation's tables."""
    state = {}
    for key, value in vit.state_dict().items():
        for old, new in (
            ("q_proj.bias", "q_bias"),
            ("v_proj.bias", "v_bias"),
            ("attn.norm", "attn.inner_attn_ln"),
            ("mlp.norm", "mlp.ffn_ln"),
            ("mlp.fc1_g", "mlp.w1"),
            ("mlp.fc1_x", "mlp.w2"),
            ("mlp.fc2", "mlp.w3"),
        ):
            key = key.replace(old, new)
        state[key] = value
    sine, cosine = vit.rope.pos_embed.chunk(2, -1)
    for where in ("", *(f"blocks.{layer}.attn." for layer in range(2))):
        state |= {f"{where}rope.freqs_cos": cosine, f"{where}rope.freqs_sin": sine}
    return state


def small_eva():
    vit = timm.create_model(EVA_NAME, num_classes=16, **EVA, mlp_ratio=2.6667)
    return shaken(vit)


def test_eva_clip_in_its_authors_names(tmp_path):
    vit = small_eva()
    state = {f"visual.{key}": value for key, value in original_eva(vit).items()}
    others = [
        key for key in PUBLISHED["eva-clip/EVA02_CLIP_B_psz16_s8B.pt"]["keys"] if "text." in key
    ]
    state |= {key: torch.zeros(2) for key in [*others, "logit_scale"]}
    matches(state, "eva-clip/EVA02_CLIP_B_psz16_s8B.pt")
    same_image(write_state(tmp_path, state), vit.forward_features(PIXELS))


def visualized_bge(kind):
    """Return a state with the names of Visualized-BGE, and its ViT, text encoder and projection."""
    vit, linear = small_eva(), shaken(torch.nn.Linear(128, 128))
    other = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, **BERT, **(other if kind != "bert" else {}))
    text = shaken(transformers.AutoModel.from_config(config))
    state = {f"model_visual.visual.{key}": value for key, value in original_eva(vit).items()}
    state |= {f"bge_{key}": value for key, value in text.state_dict().items()}
    state |= {f"visual_proj.{key}": value for key, value in linear.state_dict().items()}
    state["model_visual.logit_scale"] = torch.tensor(1.0)
    return state, vit, text, linear


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_visualized_bge_in_its_authors_names(tmp_path, kind):
    state, vit, text, linear = visualized_bge(kind)
    name = "Visualized_base_en_v1.5.pth" if kind == "bert" else "Visualized_m3.pth"
    matches(state, f"visualized-bge/{name}")
    folder = write_state(tmp_path, state)
    assert check_pretrained(folder) == ("image_encoder", "text_encoder", "visual_proj")
    vit.norm = torch.nn.Identity()  # VISTA takes the tokens before the norm
    fields = same_image(folder, vit.forward_features(PIXELS))
    assert fields["image"]["final_norm"] is False
    fields = same_text(folder, text)
    assert fields["text"]["model_type"] == kind
    loaded = pretrained_projection(folder)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.double().weight, linear.weight)
    assert torch.equal(loaded.bias, linear.bias)


def test_multilingual_bert_with_tensorflows_names(tmp_path):
    model = shaken(transformers.BertForPreTraining(transformers.BertConfig(**BERT)))
    names = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    state = {}
    for key, value in model.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        if "decoder" not in key:
            state[key] = value
    matches(state, "transformers/bert-base-multilingual-cased")
    folder = write_state(tmp_path, state, model.config.to_dict())
    same_text(folder, model.bert)


def test_bge_m3(tmp_path):
    config = transformers.XLMRobertaConfig(**BERT, type_vocab_size=1, layer_norm_eps=1e-5)
    model = shaken(transformers.XLMRobertaModel(config))
    matches(model.state_dict(), "transformers/BAAI/bge-m3")
    folder = write_state(tmp_path, model.state_dict(), config.to_dict())
    assert same_text(folder, model)["text"]["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize("layout", ["clip", "eva"])
def test_positions_are_resampled_to_the_size_of_the_pictures(tmp_path, layout):
    if layout == "eva":
        vit = small_eva()
        state = {f"visual.{key}": value for key, value in original_eva(vit).items()}
        folder = write_state(tmp_path, state)
    else:
        model = chinese_clip()
        folder = write_state(tmp_path, original_chinese_clip(model))
        vit = pretrained_vit(folder)[1].double().eval()
    fields, larger = pretrained_vit(folder, image_size=40)
    assert fields["image"]["img_size"] == 40
    vit.set_input_size(40)
    pixels = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    found = larger.double().eval().forward_features(pixels)
    torch.testing.assert_close(found, vit.forward_features(pixels), rtol=1e-5, atol=1e-5)
