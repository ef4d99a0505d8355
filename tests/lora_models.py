"""Small versions of the five models with dropout, in float64, and batches for them."""

import torch
from retrieval_models import BERT, ENCODERS, HOST, LANGUAGE, VIT, batch, small_model

from mmfused.models import FLUID, FLUIDConfig

NAMES = ("fluid", "uniecs", "unica", "moon2", "unite")
HOSTED = ("moon2", "unite")
DROPPING_ENCODERS = {
    "image": {**VIT, "depth": 2, "proj_drop_rate": 0.2},
    "text": {**BERT, "num_hidden_layers": 2, "hidden_dropout_prob": 0.2},
}
DROPPING_HOST = {**HOST, "text_config": {**LANGUAGE, "attention_dropout": 0.2}}


def dropping_model(name, **changes):
    """Return a model in training mode; its transformers have dropout."""
    if name in HOSTED:
        return small_model(name, **{"host": DROPPING_HOST, **changes}).train()
    if name != "fluid":
        return small_model(name, **{**DROPPING_ENCODERS, **changes}).train()
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "dim": 8, "num_heads": 2, "image_dim": 12, "text_dim": 12}
    config = FLUIDConfig.preset("tiny", vocab_size=200, **sizes, **DROPPING_ENCODERS, **changes)
    return FLUID(config).double().train()


def batch_of(name):
    """Return the arguments of the model's forward pass."""
    if name != "fluid":
        return batch(name)
    query = batch("uniecs")["query"]
    query["labels"] = query["labels"] % 3
    return {key: value for key, value in query.items() if key != "image_present"}


def randomise(model, scale=0.3):
    """Give random values to B of all adapters, which starts at 0."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(scale * values)
    return model


__all__ = ["ENCODERS", "HOSTED", "NAMES", "batch_of", "dropping_model", "randomise"]
