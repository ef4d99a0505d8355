"""Training of the presets "code" of FLUID, UniECS and UniCA, at small sizes.

Their padded text tokens take part, or their candidates ignore ids, so a run must not depend on how
its batches are cut.
"""

import json

import pytest
import torch
import training_runs
from transformers import XLMRobertaConfig, XLMRobertaModel

from mmfused.data import train_tokenizer
from mmfused.models import FLUID, MODELS, FLUIDConfig
from mmfused.training.load import load_trained
from mmfused.training.run import TrainConfig, train

few_products = training_runs.few_products
VIT = {"depth": 1, "num_heads": 2}
BERT = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 24,
}
WIDTHS = {"image_dim": 16, "text_dim": 16}
SIZES = {
    "fluid": {
        "dim": 16,
        "num_queries": 2,
        "depth": 1,
        "num_heads": 2,
        "gate_hidden": (8,),
        "expert_hidden": (8,),
        "text_length": 20,
        "image": {**VIT, "patch_size": 16},
        "text": BERT,
    },
    "uniecs": {
        "dim": 16,
        "num_heads": 2,
        "cross_layers": 1,
        "self_blocks": 1,
        "fusion_blocks": 1,
        "dropout": 0.0,
        "text_length": 20,
        "image": {**VIT, "patch_size": 16},
        "text": BERT,
    },
    # A small ViT of timm by name, because the preset's options belong to EVA02-CLIP.
    "unica": {
        "num_heads": 2,
        "empty_text": (2, 3),
        "freeze": (),
        "image": {
            "name": "vit_tiny_patch16_224",
            "img_size": 32,
            "embed_dim": 16,
            "final_norm": False,
            **VIT,
        },
        "text": BERT,
    },
}


def settings(name: str, out, **changes) -> TrainConfig:
    fixed = {"model": name, "preset": "code", "model_options": {**WIDTHS, **SIZES[name]}}
    small = {"steps": 2, "batch_size": 6, "image_size": 32, "max_length": 12, "val_every": 2}
    fast = {"backend": "composed", "threads": 1, "progress": False, "lr": 1e-2}
    return TrainConfig(out=str(out), **{**fixed, **small, **fast, **changes})


def losses(out) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("name", SIZES)
def test_a_code_preset_trains_and_its_run_is_loaded(name, tmp_path):
    train(settings(name, tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 2
    trained = load_trained(tmp_path / "run", device="cpu")
    preset = MODELS[name].config.values_of("code")
    for field in ("text_mask", "text_padding", "image_token_type", "same_id", "without"):
        if field in preset:
            assert getattr(trained.model.config, field) == preset[field], field
    text = trained.model.config.text
    assert (text["pad_token_id"], text["vocab_size"]) == (
        trained.tokenizer.pad_token_id,
        len(trained.tokenizer),
    )


def test_unica_trains_on_a_pretrained_xlm_roberta(tmp_path):
    """Its width is no multiple of the preset's 12 heads of Bi-CA, which VISTA lacks."""
    folder, tokenizer = tmp_path / "host", train_tokenizer(["red mug", "blue plate"])
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    config = XLMRobertaConfig(
        **BERT,
        hidden_size=16,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        type_vocab_size=1,
    )
    host = XLMRobertaModel(config, add_pooling_layer=False)
    host.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {"image_dim": 16, "image": SIZES["unica"]["image"], "freeze": ("text",)}
    run = settings("unica", tmp_path / "run", text_encoder=str(folder), model_options=options)
    train(run)
    model = load_trained(tmp_path / "run", device="cpu").model
    assert model.config.text["model_type"] == "xlm-roberta"
    assert model.config.empty_text == (first, last) and model.config.bica_heads == 2
    for name, weight in model.text_encoder.state_dict().items():
        assert torch.equal(weight, host.state_dict()[name]), name


@pytest.mark.parametrize("name", ["uniecs", "unica"])
def test_chunks_of_a_batch_give_the_same_training(name, tmp_path):
    """GradCache encodes two items at a time, whose texts are padded together."""
    train(settings(name, tmp_path / "whole"))
    train(settings(name, tmp_path / "chunks", grad_cache=2))
    whole, chunks = losses(tmp_path / "whole"), losses(tmp_path / "chunks")
    torch.testing.assert_close(torch.tensor(chunks), torch.tensor(whole), rtol=1e-4, atol=1e-5)


def test_texts_longer_than_fluids_text_length_are_refused(tmp_path):
    changed = {**WIDTHS, **SIZES["fluid"], "text_length": 8}
    with pytest.raises(ValueError, match=r"^max_length: got 12, expected at most 8, the number of"):
        train(settings("fluid", tmp_path / "run", model_options=changed))
    config = FLUIDConfig.preset("code", num_classes=3, **changed)
    ids = torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input_ids: got shape .*, at most text_length=8 tokens"):
        FLUID(config)(torch.ones(1, 3, config.picture_size, config.picture_size), ids)
    with pytest.raises(ValueError, match="text_length: got 512, expected at most 24, the number"):
        train(settings("fluid", tmp_path / "other", model_options={**WIDTHS, "text": BERT}))
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()
