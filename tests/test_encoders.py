"""Encoders at their authors' sizes and from local checkpoints: what is loaded is what was saved, and no pickle is opened."""

import json
import math

import pytest
import timm.models
import torch
import transformers

from mmfused.models import FLUID, FLUIDConfig
from mmfused.models.encoders import build_text, build_vit, pretrained_text, pretrained_vit

BERT = {"vocab_size": 90, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
VIT = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_full_size_presets_train(preset):
    config = FLUIDConfig.preset(preset)
    torch.manual_seed(0)
    model = FLUID(config)
    assert FLUIDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len(model.image_transform.blocks) == len(model.bottleneck.blocks) == {"paper": 1, "code": 6}[preset]
    assert model.moe.experts[-1].weight.shape == ({"paper": 16, "code": 8}[preset], 191, 768)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model.gate.mlp) == {"paper": 2, "code": 3}[preset]
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
    before = {name: parameter.detach().sum() for name, parameter in model.named_parameters() if parameter.ndim < 3}
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert before["moe.router.4.weight"] != model.moe.router[4].weight.detach().sum()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_text_encoder_from_a_folder(kind, tmp_path):
    names = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 90, "max_position_embeddings": 16}
    options = names if kind == "distilbert" else {**BERT, "hidden_size": 16}
    saved = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **options)).eval()
    saved.save_pretrained(tmp_path)
    fields, encoder = pretrained_text(str(tmp_path))
    ids = torch.randint(3, 90, (2, 7))
    expected = saved(input_ids=ids).last_hidden_state
    assert fields["text_dim"] == 16 and torch.equal(encoder.eval()(input_ids=ids).last_hidden_state, expected)
    # The fields alone rebuild the architecture, through JSON and without the folder.
    rebuilt = build_text(fields["text_dim"], json.loads(json.dumps(fields["text"])))
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt.eval()(input_ids=ids).last_hidden_state, expected)


def test_an_image_encoder_from_a_folder(tmp_path):
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


def test_a_loaded_encoder_takes_the_place_of_the_presets(tmp_path):
    config = transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=90)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    fields, encoder = pretrained_text(str(tmp_path))
    config = FLUIDConfig.preset("tiny", num_classes=3, modalities="text", vocab_size=70, **fields)
    assert config.text == fields["text"]
    model = FLUID(config)
    model.text_encoder.load_state_dict(encoder.state_dict())
    assert model(input_ids=torch.tensor([[1, 89, 4]])).logits.shape == (1, 3)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text encoder: .* takes config.json and weights as .safetensors"):
        pretrained_text(str(tmp_path))
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", depth=1), tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"image encoder: .* lacks one of them"):
        pretrained_vit(str(tmp_path))  # pytorch_model.bin is a pickle


def test_bad_image_encoders():
    with pytest.raises(ValueError, match="image encoder: got 'vit_colossal', takes a folder or a name timm knows"):
        pretrained_vit("vit_colossal")
    with pytest.raises(ValueError, match="VisionTransformer of width 64 in timm, got 'resnet18', a ResNet"):
        build_vit(64, "patch", {"name": "resnet18"})
