"""State dicts of version 0.1 load, and the modules compute the same as in version 0.1."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mmfused

# Written by version 0.1.0: the shapes of each state dict and, for modules, sums of the outputs.
RECORDED = json.loads(Path(__file__).with_name("states_of_0_1.json").read_text(encoding="utf-8"))
D = 16


def filled(shape: tuple[int, ...] | list[int], start: int) -> Tensor:
    """Return values that need no random generator and so are equal in all versions."""
    count = math.prod(shape)
    return (0.3 * torch.sin(torch.arange(start, start + count, dtype=torch.float64))).reshape(shape)


def pooling(pool: nn.Module) -> Tensor:
    return pool(filled((2, 5, D), 3))


def two_inputs(module: nn.Module) -> Tensor:
    return module(filled((2, 5, D), 3), filled((2, 5, D), 5))


def both_directions(module: nn.Module) -> Tensor:
    return torch.stack(module(filled((2, 5, D), 3), filled((2, 5, D), 5)))


def experts(module: nn.Module) -> Tensor:
    return module(filled((7, D), 3))[0]


def contrastive(module: nn.Module) -> Tensor:
    return module(filled((6, D), 3), filled((6, D), 11))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "QueryPooling": (lambda: mmfused.QueryPooling(D, 3), pooling),
    "QueryPooling, all projections": (
        lambda: mmfused.QueryPooling(
            D, 3, 2, q_proj=True, out_proj=True, bias=True, norm_kv=True, dropout=0.1
        ),
        pooling,
    ),
    "QTransform": (lambda: mmfused.QTransform(D, 3, depth=2, num_heads=2), pooling),
    "GatedCrossAttention": (lambda: mmfused.GatedCrossAttention(D, 2), two_inputs),
    "GatedCrossAttention, token": (
        lambda: mmfused.GatedCrossAttention(D, 2, gate="token", indicator=False, missing="zero"),
        two_inputs,
    ),
    "GatedCrossAttention, no gate": (
        lambda: mmfused.GatedCrossAttention(D, 2, gate="none", pre_norm=False, bias=False),
        two_inputs,
    ),
    "BidirectionalGatedCrossAttention": (
        lambda: mmfused.BidirectionalGatedCrossAttention(D, 2),
        both_directions,
    ),
    "BidirectionalGatedCrossAttention, shared": (
        lambda: mmfused.BidirectionalGatedCrossAttention(D, 2, share_weights=True),
        both_directions,
    ),
    "TokenGate": (lambda: mmfused.TokenGate(D, (D, 8)), two_inputs),
    "TopKMoE": (lambda: mmfused.TopKMoE(D, 24, 4), experts),
    "TopKMoE, swiglu": (
        lambda: mmfused.TopKMoE(
            D, 24, 4, activation="swiglu", bias=False, score="sigmoid", selection_bias=True
        ),
        experts,
    ),
    "MaskedInfoNCE": (lambda: mmfused.MaskedInfoNCE(0.2), contrastive),
    "MaskedInfoNCE, learned": (
        lambda: mmfused.MaskedInfoNCE(0.2, learnable_temperature=True, symmetric=True),
        contrastive,
    ),
}
MODELS = ("fluid", "uniecs", "unica", "moon2", "unite")


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def state_of(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: filled(shape, 7 * i) for i, (name, shape) in enumerate(shapes.items())}


def computed(name: str) -> list[float]:
    """Return the sums of the outputs and of their squares, with a state dict of version 0.1."""
    make, call = CASES[name]
    module = make().double().eval()
    module.load_state_dict(state_of(RECORDED[name]["shapes"]))
    out = call(module)
    return [out.sum().item(), out.square().sum().item()]


def tiny(name: str) -> nn.Module:
    """Return a model of preset "tiny" on the meta device."""
    models = pytest.importorskip("mmfused.models")
    pytest.importorskip("timm")
    retrieval_models = pytest.importorskip("retrieval_models")
    kind = models.MODELS[name]
    if name == "fluid":
        sizes = {"vocab_size": 100, "num_classes": 3}
    else:
        sizes = kind.config.of_tokenizer(retrieval_models.tokenizer_of(name))
    with torch.device("meta"):
        return kind.model(kind.config.preset("tiny", **sizes))


@pytest.mark.parametrize("name", CASES)
def test_a_module_loads_a_state_of_0_1_and_computes_the_same(name):
    assert computed(name) == pytest.approx(RECORDED[name]["sums"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_state_names_and_shapes(name):
    assert shapes_of(tiny(name)) == RECORDED[name]["shapes"]
