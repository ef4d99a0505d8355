"""Tests of encoders at their published sizes, and of pretrained encoders.

Loaded weights must equal the saved weights. A pickle must never be opened.
"""

import argparse
import json
import math

import pytest
import timm.models
import torch
import transformers

from mmfused import data as product_data
from mmfused.cli import main
from mmfused.cli.train import add_arguments
from mmfused.cli.train_options import config_options
from mmfused.data import GeneratedProducts, train_tokenizer
from mmfused.models import FLUID, FLUIDConfig
from mmfused.models.encoders import build_text, build_vit
from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.training.run import load_run

BERT = {
    "vocab_size": 90,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_full_size_presets_train(preset):
    config = FLUIDConfig.preset(preset)
    if preset == "code":
        assert config.text_length == 512
        config.text_length = 32  # to save time
    torch.manual_seed(0)
    model = FLUID(config)
    assert FLUIDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        len(model.image_transform.blocks)
        == len(model.bottleneck.blocks)
        == {"paper": 1, "code": 6}[preset]
    )
    assert model.moe.experts[-1].weight.shape == ({"paper": 16, "code": 8}[preset], 191, 768)
    assert (
        sum(isinstance(layer, torch.nn.Linear) for layer in model.gate.mlp)
        == {"paper": 2, "code": 3}[preset]
    )
    batch = {
        "pixel_values": torch.randn(2, 3, 224, 224),
        "input_ids": torch.randint(5, 119547, (2, 21)),
        "attention_mask": torch.ones(2, 21, dtype=torch.int64),
        "labels": torch.tensor([3, 190]),
    }
    output = model(**batch)
    assert output.logits.shape == (2, 191) and output.image_embedding.shape == (2, 768)
    assert output.losses["ce"] == torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    assert math.isclose(output.loss.item(), sum(output.losses.values()).item() / 3, rel_tol=1e-5)
    output.loss.backward()
    before = {
        name: parameter.detach().sum()
        for name, parameter in model.named_parameters()
        if parameter.ndim < 3
    }
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all(p.grad is not None and p.grad.sum().isfinite() for p in model.parameters())
    assert before["moe.router.4.weight"] != model.moe.router[4].weight.detach().sum()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_text_encoder_loads_from_a_folder(kind, tmp_path):
    distilbert = {
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 24,
        "vocab_size": 90,
        "max_position_embeddings": 16,
    }
    options = distilbert if kind == "distilbert" else {**BERT, "hidden_size": 16}
    saved = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(kind, **options)
    ).eval()
    saved.save_pretrained(tmp_path)
    fields, encoder = pretrained_text(str(tmp_path))
    ids = torch.randint(3, 90, (2, 7))
    expected = saved(input_ids=ids).last_hidden_state
    assert fields["text_dim"] == 16 and torch.equal(
        encoder.eval()(input_ids=ids).last_hidden_state, expected
    )
    # The fields, read back from JSON, rebuild the architecture without the folder.
    rebuilt = build_text(fields["text_dim"], json.loads(json.dumps(fields["text"])))
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt.eval()(input_ids=ids).last_hidden_state, expected)


def test_image_encoder_loads_from_a_folder(tmp_path):
    args = {"img_size": 32, "depth": 1}
    saved = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).eval()
    timm.models.save_for_hf(saved, tmp_path, model_args=args, safe_serialization=True)
    fields, encoder = pretrained_vit(str(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.eval().forward_features(pixels), saved.forward_features(pixels))
    assert fields["image_dim"] == 192 and fields["pixel_mean"] == (0.5, 0.5, 0.5)
    rebuilt = build_vit(192, fields["image_stem"], json.loads(json.dumps(fields["image"])))
    rebuilt.load_state_dict(encoder.state_dict())
    larger, resampled = pretrained_vit(str(tmp_path), image_size=64)
    assert larger["image"]["img_size"] == 64 and resampled.pos_embed.shape == (1, 1 + 16, 192)


def test_loaded_encoder_replaces_the_encoder_of_the_preset(tmp_path):
    config = transformers.DistilBertConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=90
    )
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    fields, encoder = pretrained_text(str(tmp_path))
    config = FLUIDConfig.preset("tiny", num_classes=3, modalities="text", vocab_size=70, **fields)
    assert config.text == fields["text"]
    model = FLUID(config)
    model.text_encoder.load_state_dict(encoder.state_dict())
    assert model(input_ids=torch.tensor([[1, 89, 4]])).logits.shape == (1, 3)


def test_folder_without_safetensors_raises(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"text encoder: .* lacks a file, expected config.json and \*\.safetensors",
    ):
        pretrained_text(str(tmp_path))
    timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", depth=1), tmp_path, safe_serialization=False
    )
    with pytest.raises(FileNotFoundError, match=r"image encoder: .* lacks a file"):
        pretrained_vit(str(tmp_path))  # pytorch_model.bin is a pickle
    (tmp_path / "another.safetensors").touch()  # timm alone would open the pickle
    with pytest.raises(
        FileNotFoundError,
        match=r"image encoder: .* lacks a file, expected config.json and model.safetensors",
    ):
        pretrained_vit(str(tmp_path))


def test_only_safetensors_are_loaded_from_the_hub(monkeypatch):
    requested, given = [], timm.create_model("vit_tiny_patch16_224", num_classes=1000).state_dict()
    monkeypatch.setattr(
        timm.models._builder,
        "load_state_dict_from_hf",
        lambda *a, **k: requested.append(a) or given,
    )
    fields, encoder = pretrained_vit("vit_tiny_patch16_224", image_size=32)
    assert (
        requested[0][0].startswith("timm/vit_tiny_patch16_224")
        and requested[0][1] == "model.safetensors"
    )
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, given["blocks.3.mlp.fc1.weight"])
    assert fields["image"] == {"name": "vit_tiny_patch16_224", "img_size": 32}


def test_unknown_image_encoders_raise():
    with pytest.raises(
        ValueError,
        match="image encoder: got 'vit_colossal', expected a folder, or the name of a timm model",
    ):
        pretrained_vit("vit_colossal")
    with pytest.raises(
        ValueError,
        match="image.name: got 'resnet18', a ResNet, expected timm's VisionTransformer, or an Eva",
    ):
        build_vit(64, "patch", {"name": "resnet18"})


@pytest.fixture
def encoders(tmp_path):
    """Save a small ViT with timm, and a small BERT and its tokenizer with transformers."""
    args = {"img_size": 32, "patch_size": 16, "depth": 1}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    timm.models.save_for_hf(vit, tmp_path / "vit", model_args=args, safe_serialization=True)
    tokenizer = train_tokenizer(
        [text for text in GeneratedProducts("train", size=200).texts if text], vocab_size=90
    )
    bert = transformers.BertModel(
        transformers.BertConfig(**{**BERT, "max_position_embeddings": 64}, hidden_size=16)
    )
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path, vit, bert


def test_train_from_pretrained_encoders(encoders, monkeypatch):
    folder, vit, bert = encoders
    monkeypatch.setattr(
        product_data,
        "GeneratedProducts",
        lambda split: GeneratedProducts(split, size={"train": 64, "val": 32}[split]),
    )
    sources = [
        "--image-encoder",
        str(folder / "vit"),
        "--text-encoder",
        str(folder / "bert"),
        "--without",
        "gate,moe",
    ]
    options = [
        "--data",
        "generated",
        "--batch-size",
        "16",
        "--threads",
        "1",
        "--out",
        str(folder / "run"),
        "--backend",
        "composed",
    ]
    # With so small a learning rate, the weights hardly change.
    assert (
        main(["train", *options, *sources, "--steps", "2", "--lr", "1e-12", "--weight-decay", "0"])
        == 0
    )
    model, tokenizer = load_run(folder / "run")
    assert (
        model.config.without == ("gate", "moe")
        and model.config.image_dim == 192
        and model.config.text["vocab_size"] == 90
    )
    assert model.config.pixel_mean == (0.5, 0.5, 0.5) and len(tokenizer) == 90
    for encoder, given in ((model.image_encoder, vit), (model.text_encoder, bert)):
        for name, tensor in encoder.state_dict().items():
            assert torch.allclose(tensor, given.state_dict()[name], atol=1e-9), name
    # Evaluation does not need the encoders' folders.
    for name in ("vit", "bert"):
        (folder / name / "config.json").rename(folder / name / "gone")
    assert main(["eval", "--checkpoint", str(folder / "run"), "--data", "generated"]) == 0


def test_tokenizer_with_more_tokens_than_the_encoder_is_rejected(encoders, capsys):
    folder, _, _ = encoders
    train_tokenizer(
        [text for text in GeneratedProducts("train", size=400).texts if text], vocab_size=150
    ).save_pretrained(folder)
    arguments = [
        "--text-encoder",
        str(folder / "bert"),
        "--tokenizer",
        str(folder),
        "--out",
        str(folder / "run"),
    ]
    assert main(["train", "--data", "generated", *arguments, "--steps", "1"]) == 2
    assert (
        "tokens, expected at most 90" in capsys.readouterr().err and not (folder / "run").exists()
    )


def test_preset_sets_the_training_options_of_its_paper():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = ["--data", "x", "--out", "y", "--preset", "paper"]
    options = config_options(parser.parse_args(base))
    assert (options["lr"], options["weight_decay"], options["epochs"], options["batch_size"]) == (
        2e-5,
        0.01,
        15,
        128,
    )
    assert config_options(parser.parse_args([*base, "--lr", "1e-4"]))["lr"] == 1e-4
