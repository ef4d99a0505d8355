"""Small calls that launch every kernel of grouped_mlp, for ``tools/sanitize.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mmfused
from mmfused.tools.sanitize_launches import DEVICE, FLOAT, HALF, backward, choose, randn


def launches() -> Iterator[Callable[[], None]]:
    yield lambda: mlp(37, 5, 2, 70, 50, 36, "gelu")
    yield lambda: mlp(37, 5, 2, 70, 50, 36, "swiglu", sort="composed")
    yield lambda: mlp(160, 3, 2, 64, 80, 48, "swiglu", packed=True)
    yield lambda: mlp(160, 3, 2, 64, 80, 48, "relu")
    yield lambda: mlp(37, 5, 2, 36, 20, 24, "swiglu", dtype=FLOAT)
    for gather in (True, False):
        for combine in (True, False):
            yield lambda gather=gather, combine=combine: linear(37, 5, 2, 70, 50, gather, combine)


def sorted_rows(tokens, experts, k, sort="fused") -> tuple[mmfused.Routing, Tensor]:
    """Return a routing and its weights. Some tokens are masked, and expert 1 gets no tokens.

    ``sort``: the backend that sorts the rows. "composed" makes no tile map, so the launcher of the
    grouped MLP makes the map.
    """
    indices = (
        torch.rand(tokens, experts, device=DEVICE)
        .index_fill_(1, torch.tensor([1], device=DEVICE), -1.0)
        .argsort(1)
    )
    weights = torch.rand(tokens, k, device=DEVICE, requires_grad=True)
    with mmfused.backend(sort):
        indices = indices.flip(1)[:, :k].contiguous()
        return mmfused.routing_from_indices(
            indices, weights, experts, token_padding_mask=choose(0.2, tokens)
        ), weights


def mlp(
    tokens,
    experts,
    k,
    dim,
    width,
    out,
    activation,
    *,
    packed=False,
    sort="fused",
    dtype=HALF,
) -> None:
    routing, weights = sorted_rows(tokens, experts, k, sort)
    x = randn(tokens, dim, dtype=dtype)
    w_up = randn(experts, 2 * width if packed else width, dim, dtype=dtype, std=0.1)
    w_gate = (
        randn(experts, width, dim, dtype=dtype, std=0.1)
        if activation == "swiglu" and not packed
        else None
    )
    w_down, b_up, b_down = (
        randn(experts, *shape, dtype=dtype, std=0.1) for shape in ((out, width), (width,), (out,))
    )
    result = mmfused.grouped_mlp(
        x, routing, w_up, w_down, b_up=b_up, b_down=b_down, w_gate=w_gate, activation=activation
    )
    backward(result, x, weights, w_up, w_gate, w_down, b_up, b_down)


def linear(tokens, experts, k, inputs, outputs, gather, combine) -> None:
    routing, weights = sorted_rows(tokens, experts, k)
    x = randn(tokens if gather else tokens * k, inputs)
    weight, bias = randn(experts, outputs, inputs, std=0.1), randn(experts, outputs)
    out = mmfused.grouped_linear(x, routing, weight, bias, gather=gather, combine=combine)
    backward(out, x, weight, bias, weights if combine else None)
