"""The launches that ``mmfused inspect`` compiles. Together they reach every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import grouped_mlp as kernels


@dataclass(frozen=True)
class Case:
    """Sizes and options of one layer of experts."""

    tokens: int
    dim: int
    width: int
    experts: int
    k: int
    # None: grouped_linear in place of grouped_mlp
    activation: Literal["gelu", "relu", "swiglu"] | None = "gelu"
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
    """Call the launchers on meta tensors with the shapes of this case."""
    compute = getattr(torch, case.dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    def bias(n):
        return empty(case.experts, n) if case.biases else None

    rows = case.tokens * case.k
    order = {
        "order": empty(rows, dtype=torch.int32),
        "position": empty(rows, dtype=torch.int32),
        "offsets": empty(case.experts + 1, dtype=torch.int32),
        "tiles": empty(rows // 16 + case.experts, 2, dtype=torch.int32),
    }
    x = empty(case.tokens, case.dim)
    weights = empty(case.tokens, case.k, dtype=torch.float32)
    if case.activation is None:
        w_up = empty(case.experts, case.width, case.dim)
        for combine, gather in ((None, True), (weights, True), (None, False), (weights, False)):
            inputs = {
                "x": x if gather else empty(rows, case.dim),
                "weight": w_up,
                "bias": bias(case.width),
                "combine_weights": combine,
                **order,
                "k": case.k,
                "gather": gather,
            }
            kernels.linear_forward(**inputs)
            d_out = empty(rows if combine is None else case.tokens, case.width)
            needs = {"need_dx": True, "need_dw": True, "need_db": True}
            kernels.linear_backward(d_out=d_out, **inputs, **needs)
        return
    gated = case.activation == "swiglu"
    shape = (case.experts, case.width, case.dim)
    common = {
        "x": x,
        "w_up": empty(case.experts, 2 * case.width if case.packed else case.width, case.dim),
        "w_gate": empty(*shape) if gated and not case.packed else None,
        "w_down": empty(case.experts, case.dim, case.width),
        "b_down": bias(case.dim),
        "combine_weights": weights,
        **order,
        "activation": case.activation,
        "packed": case.packed,
    }
    kernels.mlp_forward(**common, b_up=bias(case.width))
    kernels.mlp_backward(
        **common,
        d_out=empty(case.tokens, case.dim),
        hidden=empty(2 if gated else 1, rows, case.width),
        need_dx=True,
        need_dw=True,
        need_db_up=case.biases,
    )
