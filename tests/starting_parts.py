"""Small pretrained hosts and encoders, and the weights with which a training starts."""

from __future__ import annotations

import pytest
import torch

from mmfused.data import GeneratedProducts, train_tokenizer
from mmfused.models import qwen
from mmfused.training.run import TrainConfig, prepare

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from retrieval_models import LANGUAGE  # noqa: E402

TEXTS = [text for text in GeneratedProducts("train", size=60).texts if text]
SPARE = 37  # rows of a vocabulary that the tokenizer does not use
HOSTED = ("moon2", "unite")


def settings(model, out, **changes) -> TrainConfig:
    common = {"steps": 2, "batch_size": 4, "max_length": 24, "lr": 1e-2, "threads": 1}
    common |= {"device": "cpu", "backend": "composed", "progress": False, "save_every": 1}
    common |= {"val_every": 3}
    return TrainConfig(str(out), model=model, **{**common, **changes})


def save_host(folder, width=16, hidden=12):
    """Write a host with patches of 4 pixels, and more rows of words than the tokenizer has."""
    tokenizer = qwen.add_vision_tokens(qwen.enclose_texts(train_tokenizer(TEXTS, vocab_size=200)))
    language = {**LANGUAGE, "hidden_size": width, "intermediate_size": hidden}
    language["vocab_size"] = len(tokenizer) + SPARE
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 1, "mlp_ratio": 1, "patch_size": 4}
    for part in (
        qwen.build_qwen2_vl({"text_config": language, "vision_config": vision}),
        tokenizer,
    ):
        part.save_pretrained(folder)
    return {"host": str(folder)}


def save_encoders(folder, width=16, hidden=24):
    """Write a ViT and a BERT, which has more rows of words than the tokenizer has."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=200)
    arguments = {"img_size": 32, "depth": 1}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    timm.models.save_for_hf(vit, folder / "vit", model_args=arguments, safe_serialization=True)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": hidden}
    bert = transformers.BertConfig(
        **sizes,
        hidden_size=width,
        vocab_size=len(tokenizer) + SPARE,
        max_position_embeddings=64,
    )
    for part in (transformers.BertModel(bert), tokenizer):
        part.save_pretrained(folder / "bert")
    return {"image_encoder": str(folder / "vit"), "text_encoder": str(folder / "bert")}


def save_parts(model, folder, **sizes):
    return (save_host if model in HOSTED else save_encoders)(folder, **sizes)


def initial_weights(config):
    return prepare(config, None).model.state_dict()


def assert_equal(got, expected):
    assert got.keys() == expected.keys() and len(got) > 20
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
