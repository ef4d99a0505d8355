"""The launches that ``mmfused inspect`` compiles: together they reach every kernel and variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import grouped_mlp as kernels


@dataclass(frozen=True)
class Case:
    """The sizes and options of one case."""

    tokens: int
    dim: int
    width: int
    experts: int
    k: int
    activation: Literal["gelu", "relu", "swiglu"] | None = "gelu"  # None: the linear layer alone
    biases: bool = True
    packed: bool = False  # w_up holds the gate's rows too
    dtype: str = "bfloat16"


CASES = {
    "moe fluid": Case(tokens=16384, dim=768, width=3072, experts=16, k=2),
    "moe fluid 2k": Case(tokens=2048, dim=768, width=3072, experts=16, k=2),
    "moe fluid 512": Case(tokens=512, dim=768, width=3072, experts=16, k=2),
    "moe fluid 256": Case(tokens=256, dim=768, width=3072, experts=16, k=2),
    "moe fluid 64": Case(tokens=64, dim=768, width=3072, experts=16, k=2),
    "moe mllm": Case(
        tokens=8192,
        dim=2048,
        width=5504,
        experts=4,
        k=1,
        activation="swiglu",
        biases=False,
        packed=True,
    ),
    "moe fine": Case(tokens=32768, dim=2048, width=768, experts=128, k=8, activation="swiglu"),
    "moe fine 1k": Case(
        tokens=1024,
        dim=2048,
        width=768,
        experts=128,
        k=8,
        activation="swiglu",
        biases=False,
        packed=True,
        dtype="float16",
    ),
    "moe fine 512": Case(
        tokens=512,
        dim=2048,
        width=768,
        experts=128,
        k=8,
        activation="swiglu",
        biases=False,
        packed=True,
    ),
    "moe fine 64": Case(
        tokens=64, dim=2048, width=768, experts=128, k=8, activation="swiglu", packed=True
    ),
    "moe linear": Case(tokens=8192, dim=1024, width=1024, experts=8, k=2, activation=None),
    "moe odd": Case(
        tokens=1003,
        dim=300,
        width=70,
        experts=5,
        k=3,
        activation="swiglu",
        packed=True,
        dtype="float16",
    ),
    "moe odd 20": Case(tokens=20, dim=300, width=70, experts=5, k=3, activation="relu"),
    "moe float32": Case(
        tokens=16384, dim=768, width=3072, experts=16, k=2, activation="swiglu", dtype="float32"
    ),
    "moe float32 512": Case(tokens=512, dim=768, width=3072, experts=16, k=2, dtype="float32"),
}


def launch(case: Case) -> None:
    """Call the launchers on meta tensors of the shapes of this case."""
    compute = getattr(torch, case.dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    def bias(n):
        return empty(case.experts, n) if case.biases else None

    rows, integer = case.tokens * case.k, torch.int32
    order = (
        empty(rows, dtype=integer),
        empty(rows, dtype=integer),
        empty(case.experts + 1, dtype=integer),
    )
    order += (empty(rows // 16 + case.experts, 2, dtype=integer),)
    x, weights, w_down = (
        empty(case.tokens, case.dim),
        empty(case.tokens, case.k, dtype=torch.float32),
        empty(case.experts, case.dim, case.width),
    )
    if case.activation is None:
        w_up, wants = empty(case.experts, case.width, case.dim), (True, True, True)
        for combine, gather in ((None, True), (weights, True), (None, False), (weights, False)):
            source, d_out = (
                (x if gather else empty(rows, case.dim)),
                empty(rows if combine is None else case.tokens, case.width),
            )
            args = (source, w_up, bias(case.width), combine, *order, case.k, gather)
            kernels.linear_forward(*args)
            kernels.linear_backward(d_out, *args, *wants)
        return
    w_up = empty(case.experts, 2 * case.width if case.packed else case.width, case.dim)
    w_gate = (
        empty(case.experts, case.width, case.dim)
        if case.activation == "swiglu" and not case.packed
        else None
    )
    up = (w_up, w_gate, w_down)
    kernels.mlp_forward(
        x, *up, bias(case.width), bias(case.dim), weights, *order, case.activation, case.packed
    )
    hidden = empty(2 if case.activation == "swiglu" else 1, rows, case.width)
    kernels.mlp_backward(
        empty(case.tokens, case.dim),
        x,
        hidden,
        *up,
        bias(case.dim),
        weights,
        *order,
        case.activation,
        case.packed,
        True,
        True,
        case.biases,
    )
