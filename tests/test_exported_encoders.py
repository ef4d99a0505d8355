"""An exported encoder gives transformers, timm and sentence-transformers the same features."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from retrieval_models import BERT, TEXTS, VIT

from mmfused.cli import main
from mmfused.data import load_tokenizer, train_tokenizer
from mmfused.models import MODELS, encoder_export
from mmfused.models.encoder_export import save_image, save_text, timm_settings
from mmfused.models.encoders import build_vit
from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.training.config import TrainConfig
from mmfused.training.files import model_tensors, save_tensors, write_json

SIZES = {
    "image": VIT,
    "text": {**BERT, "max_position_embeddings": 40, "initializer_range": 0.5},
    "image_dim": 12,
    "text_dim": 12,
    "image_stem": "patch",
    "num_heads": 2,
}
OWN = {
    "fluid": {"num_classes": 3, "dim": 12},
    "uniecs": {"dim": 12, "cross_layers": 1},
    "unica": {"ffn": 16},
}
LENGTH = 12
HARD_TEXTS = [*TEXTS, "", " ", "RED  Café, [SEP] tea-pot 7\u200b", "mug " * 40]


def build(name="unica", tokenizer=None, **options):
    kind, tokenizer = MODELS[name], tokenizer or train_tokenizer(TEXTS, 100)
    tokenizer(TEXTS, truncation=True, max_length=5, padding=True)  # as in training, which is saved
    torch.manual_seed(0)
    fields = {**SIZES, **OWN[name], **kind.config.of_tokenizer(tokenizer), **options}
    return kind.model(kind.config.preset("tiny", **fields)).eval(), tokenizer


def write_run(folder, name="unica", **options):
    """Write the files of a finished run that an export needs."""
    model, tokenizer = build(name, **options)
    training = TrainConfig(str(folder), model=name, amp="off", max_length=LENGTH)
    folder.mkdir()
    save_tensors(folder / "model.safetensors", model_tensors(model))
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = {"mmfused": "0.2.0", "model": model.config.to_dict(), "image_size": 32}
    write_json(folder / "config.json", {**settings, "training": training.to_dict()})
    return model, tokenizer


def exported(source, out, *options):
    return main(["export", str(source), "--out", str(out), *options])


def in_a_fresh_process(code, folder, given):
    """Run code that reads ``given`` and the folder, without this library."""
    path = folder.with_suffix(".safetensors")
    safetensors.torch.save_file({name: x.contiguous() for name, x in given.items()}, path)
    start = "import sys, json, safetensors.torch, torch\nfolder = sys.argv[1]\n"
    start += "given = safetensors.torch.load_file(sys.argv[2])\ntorch.set_grad_enabled(False)\n"
    end = "\nassert 'mmfused' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", start + code + end, str(folder), str(path), json.dumps(HARD_TEXTS)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "REPORT" not in done.stderr and "truncat" not in done.stderr


# ---- text ----------------------------------------------------------------------------------------

READ_TEXT = """
from transformers import AutoModel, AutoTokenizer
text = folder + "/text"
model = AutoModel.from_pretrained(text, add_pooling_layer=False).eval()
batch = AutoTokenizer.from_pretrained(text)(
    json.loads(sys.argv[3]), padding=True, truncation=True, return_tensors="pt"
)
assert torch.equal(batch["input_ids"], given["input_ids"])
states = model(**batch).last_hidden_state
assert torch.equal(states, given["states"]), (states - given["states"]).abs().max()
"""


READ_SENTENCES = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder, device="cpu")
texts = json.loads(sys.argv[3])
found = model.encode(texts, convert_to_tensor=True, batch_size=64)
torch.testing.assert_close(found, given["float32"], atol=1e-6, rtol=0)
found = model.double().encode(texts, convert_to_tensor=True, batch_size=3)
assert found.dtype == torch.float64
torch.testing.assert_close(found, given["float64"], atol=1e-13, rtol=0)
assert model.similarity_fn_name == "cosine"
"""


@torch.no_grad()
def test_sentence_transformers_computes_the_embeddings_of_unica(tmp_path):
    pytest.importorskip("sentence_transformers")
    model, tokenizer = write_run(tmp_path / "run", freeze=("text",))
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    batch = tokenizer(
        HARD_TEXTS, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
    )
    given = {}
    for dtype in (torch.float32, torch.float64):
        tokens = torch.zeros(len(HARD_TEXTS), 4, 12, dtype=dtype)
        items = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = model.to(dtype).embed(["text"], image_tokens=tokens, **items)["text"]
        given[str(dtype).removeprefix("torch.")] = found
    in_a_fresh_process(READ_SENTENCES, tmp_path / "out", given)


def test_the_positions_of_roberta_limit_the_length_of_sentences(tmp_path):
    config = transformers.XLMRobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=30,
        pad_token_id=1,
    )
    encoder = transformers.XLMRobertaModel(config, add_pooling_layer=False)
    encoder_export._save_sentence_modules(tmp_path, encoder, 1e30)
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 28
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    encoder_export._save_sentence_modules(tmp_path, bert, 1e30)
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 512


def test_the_tokenizer_is_that_of_training_and_does_not_truncate_by_itself(tmp_path):
    model, tokenizer = build("uniecs")
    save_text(model, tokenizer, tmp_path, max_length=LENGTH)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = train_tokenizer(TEXTS, 100)
    for text in HARD_TEXTS:
        assert loaded(text)["input_ids"] == plain(text)["input_ids"]
    cut = loaded(HARD_TEXTS, truncation=True, padding=True)["input_ids"]
    assert {len(ids) for ids in cut} == {LENGTH}
    assert loaded.padding_side == "right"
    truncated = tokenizer(TEXTS[2], truncation=True, max_length=5)
    assert len(truncated["input_ids"]) == 5  # the run's tokenizer is unchanged
    save_text(model, tokenizer, tmp_path / "own")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.model_max_length > 1e9


@torch.no_grad()
def test_the_tokenizer_gives_what_the_encoder_takes(tmp_path):
    """DistilBERT takes no token types."""
    text = {"model_type": "distilbert", "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    tokenizer = train_tokenizer(TEXTS, 100)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_max_length = 30
    tokenizer.save_pretrained(tmp_path / "own")
    tokenizer = load_tokenizer(tmp_path / "own")
    model, tokenizer = build("fluid", tokenizer=tokenizer, text=text)
    save_text(model, tokenizer, tmp_path, max_length=LENGTH)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == LENGTH
    batch = loaded(TEXTS[:2])
    assert sorted(batch) == ["attention_mask", "input_ids"]


def equal_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)


@pytest.mark.parametrize("name", OWN)
def test_both_encoders_are_taken_back_with_equal_weights(tmp_path, name):
    model, tokenizer = build(name)
    save_text(model, tokenizer, tmp_path / "text")
    save_image(model, tmp_path / "image")
    fields, encoder = pretrained_text(str(tmp_path / "text"))
    assert equal_weights(encoder, model.text_encoder) and fields["text_dim"] == 12
    fields, vit = pretrained_vit(str(tmp_path / "image"))
    assert equal_weights(vit, model.image_encoder)
    assert fields["pixel_mean"] == model.config.pixel_mean
    again = build_vit(fields["image_dim"], fields["image_stem"], fields["image"])
    again.load_state_dict(vit.state_dict())


# ---- image ---------------------------------------------------------------------------------------

READ_IMAGE = """
import timm
image, expected = folder + "/image", given["tokens"]
model = timm.create_model("local-dir:" + image, pretrained=True).eval()
assert torch.equal(model.forward_features(given["pixels"]), expected)
settings = timm.data.resolve_model_data_config(model)
names = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")
found = json.dumps([settings[name] for name in names])
assert found == '[[0.5, 0.4, 0.3], [0.1, 0.2, 0.3], [3, 32, 32], "bicubic", 1.0, "center"]', found
model = AutoModel.from_pretrained(image).eval()
assert type(model).__name__ == "TimmWrapperModel"
assert torch.equal(model(pixel_values=given["pixels"]).last_hidden_state, expected)
"""


@torch.no_grad()
def test_transformers_and_timm_alone_compute_the_features_of_fluid(tmp_path):
    options = {"model_type": "xlm-roberta", "type_vocab_size": 1, "pad_token_id": 0}
    pixels = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.1, 0.2, 0.3)}
    tokenizer = train_tokenizer(TEXTS, 300, "bpe")
    text = {**SIZES["text"], **options}
    model, _ = write_run(tmp_path / "run", "fluid", tokenizer=tokenizer, text=text, **pixels)
    for part in ("image", "text"):
        assert exported(tmp_path / "run", tmp_path / part, "--part", part) == 0
    batch = tokenizer(
        HARD_TEXTS, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = {
        "input_ids": ids,
        "states": model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state,
        "pixels": pixels,
        "tokens": model.image_encoder.forward_features(pixels),
    }
    in_a_fresh_process(READ_TEXT + READ_IMAGE, tmp_path, given)
    names = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == names
    names += ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == names


CHANGES = {
    "img_size": (48, 32),
    "in_chans": 1,
    "depth": 2,
    "num_heads": 3,
    "reg_tokens": 2,
    "mlp_ratio": 1.5,
    "init_values": 0.1,
    "fc_norm": True,
    "qkv_bias": False,
    "proj_bias": False,
    "qk_norm": True,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "class_token": False,
    "no_embed_class": True,
    "pre_norm": True,
    "final_norm": False,
    "dynamic_img_size": True,
    "global_pool": "avg",
    "pos_embed": "none",
    "embed_norm_layer": "layernorm",
    "norm_layer": "rmsnorm",
    "act_layer": "relu",
    "name": "vit_tiny_patch16_224.augreg_in21k",
    "num_classes": 0,
}


@torch.no_grad()
@pytest.mark.parametrize("field", CHANGES)
def test_each_option_of_the_image_encoder_is_kept(tmp_path, field):
    value = CHANGES[field]
    options = {**VIT, field: value} if field != "class_token" else {**VIT, "class_token": False}
    if field == "class_token":
        options["global_pool"] = "avg"
    if field == "name":
        options["embed_dim"] = 12
    model, _ = build("uniecs", image=options)
    for weight in model.image_encoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    save_image(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert equal_weights(loaded, model.image_encoder)
    embed = model.image_encoder.patch_embed
    pixels = torch.randn(2, embed.proj.in_channels, *embed.img_size)
    expected = model.image_encoder.forward_features(pixels)
    assert torch.equal(loaded.forward_features(pixels), expected)
    fields, vit = pretrained_vit(str(tmp_path))
    assert equal_weights(vit, model.image_encoder)
    assert torch.equal(vit.eval().forward_features(pixels), expected)
    if field != "num_classes":
        value = value.split(".")[0] if field == "name" else value  # without the weights' tag
        assert fields["image"][field] == (list(value) if isinstance(value, tuple) else value)
    assert tuple(loaded.pretrained_cfg["input_size"]) == tuple(pixels.shape[1:])
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["num_features"], settings["num_classes"]) == (12, 0)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_timm_gives_an_exported_encoder_a_head_and_other_channels(tmp_path):
    model, _ = build("uniecs")
    save_image(model, tmp_path)
    folder = f"local-dir:{tmp_path}"
    loaded = timm.create_model(folder, pretrained=True, num_classes=7, in_chans=1)
    kernel = model.image_encoder.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(loaded.patch_embed.proj.weight, kernel)
    assert torch.equal(loaded.cls_token, model.image_encoder.cls_token)
    assert loaded.head.out_features == 7


def test_a_stretched_picture_is_squashed_by_timm():
    """timm's transform with these settings is the whole picture, resized."""
    config, _ = build("uniecs")
    config = config.config
    settings = encoder_export.picture_settings(config)
    assert (settings["crop_mode"], settings["interpolation"]) == ("center", "bicubic")
    config.resize, config.resample = "stretch", "bilinear"
    settings = encoder_export.picture_settings(config)
    transform = timm.data.create_transform((3, 8, 8), **settings)
    values = np.arange(24 * 16 * 3).reshape(16, 24, 3) % 251
    picture = Image.fromarray(values.astype(np.uint8))
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    whole = np.array(picture.resize((8, 8), Image.Resampling.BILINEAR))
    expected = (torch.from_numpy(whole).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(transform(picture), expected)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_an_eva_is_exported_with_or_without_its_last_norm(tmp_path, norm):
    """VISTA takes the tokens before the last norm."""
    sizes = {"img_size": 32, "depth": 1, "num_heads": 2, "embed_dim": 16}
    options = {"name": "eva02_base_patch16_clip_224", "final_norm": norm, **sizes}
    model, _ = build("unica", image=options, image_dim=16)
    save_image(model, tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    expected = model.image_encoder.forward_features(pixels)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded.forward_features(pixels), expected)
    fields, vit = pretrained_vit(str(tmp_path))
    assert equal_weights(vit, model.image_encoder)
    assert fields["image"].get("final_norm", True) is norm
    assert torch.equal(vit.eval().forward_features(pixels), expected)


def test_a_norm_that_the_options_lack_is_named():
    sizes = {"img_size": 32, "depth": 1, "num_heads": 2, "embed_dim": 16}
    name = "eva02_base_patch16_clip_224"
    eva = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    eva.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"with norm.weight of shape None, expected \(16,\)"):
        timm_settings(eva, {"name": name, **sizes})
