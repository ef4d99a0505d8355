"""The launches that ``mmfused inspect`` compiles: together they reach every kernel and variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import topk_routing as kernels


@dataclass(frozen=True)
class Case:
    """The sizes and options of one case."""

    experts: int
    k: int
    dim: int | None  # None: from logits
    dtype: str = "bfloat16"
    router_dtype: str | None = "float32"  # of the router's weight; None: from logits
    sigmoid: bool = False
    renormalize: bool = True
    balance: Literal["switch", "gshard", "mse"] = "switch"
    everything: bool = False  # padding, segments with their own experts, a selection bias, jitter; replayed indices


CASES = {
    "route fluid": Case(experts=16, k=2, dim=768, router_dtype="bfloat16", balance="mse"),
    "route exact": Case(experts=16, k=2, dim=768),
    "route half": Case(
        experts=5,
        k=1,
        dim=300,
        dtype="float16",
        renormalize=False,
        balance="gshard",
        everything=True,
    ),
    "route 64": Case(experts=64, k=8, dim=2048),
    "route 32 all": Case(experts=32, k=4, dim=1024, sigmoid=True, balance="mse", everything=True),
    "route 64 all": Case(
        experts=64,
        k=8,
        dim=2048,
        dtype="float16",
        router_dtype="float16",
        sigmoid=True,
        balance="gshard",
        everything=True,
    ),
    "route 128": Case(experts=128, k=8, dim=2048, router_dtype="bfloat16"),
    "route 128 exact": Case(
        experts=128, k=8, dim=2048, sigmoid=True, balance="mse", everything=True
    ),
    "route 128 half": Case(
        experts=128, k=8, dim=2048, dtype="float16", sigmoid=True, balance="mse", everything=True
    ),
    "route 256": Case(experts=256, k=8, dim=7168, sigmoid=True, everything=True),
    "route 512": Case(experts=512, k=8, dim=4096, sigmoid=True, everything=True),
    "route float32": Case(experts=16, k=2, dim=768, dtype="float32"),
    "route 128 f32": Case(
        experts=128, k=8, dim=2048, dtype="float32", sigmoid=True, balance="mse", everything=True
    ),
    "logits 5": Case(experts=5, k=2, dim=None, dtype="float32", router_dtype=None),
    "logits 64": Case(
        experts=64,
        k=2,
        dim=None,
        dtype="float16",
        router_dtype=None,
        renormalize=False,
        balance="gshard",
        everything=True,
    ),
    "logits 128": Case(experts=128, k=8, dim=None, dtype="float32", router_dtype=None),
    "logits 128 all": Case(
        experts=128, k=8, dim=None, router_dtype=None, sigmoid=True, balance="mse", everything=True
    ),
    "logits 512": Case(
        experts=512, k=8, dim=None, dtype="float32", router_dtype=None, everything=True
    ),
    "logits 256": Case(
        experts=256,
        k=8,
        dim=None,
        dtype="float32",
        router_dtype=None,
        sigmoid=True,
        renormalize=False,
        balance="mse",
        everything=True,
    ),
}


def launch(case: Case) -> None:
    """Call the launchers on meta tensors of the shapes of this case."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, segments = 8192, 3 if case.everything else 1
    source = empty(
        tokens, case.experts if case.dim is None else case.dim, dtype=getattr(torch, case.dtype)
    )
    router = (None, None)
    if case.dim is not None:
        router = (
            empty(case.experts, case.dim, dtype=getattr(torch, case.router_dtype)),
            empty(case.experts, dtype=getattr(torch, case.router_dtype)),
        )
    bias = mask = segment = available = seed = None
    if case.everything:
        bias, mask, available = (
            empty(case.experts),
            empty(tokens, dtype=torch.bool),
            empty(segments, case.experts, dtype=torch.bool),
        )
        segment, seed = empty(tokens, dtype=torch.int64), empty(dtype=torch.int64)
    masked, noise = (
        (mask, segment, segments, available, case.balance),
        (0.1 if case.everything else 0.0, seed),
    )

    def forward(given):
        return kernels.forward(
            source, *router, case.k, case.sigmoid, case.renormalize, bias, *masked, given, *noise
        )

    logits, indices, weights, *_, coefficients = forward(None)
    logits = source if case.dim is None else logits
    upstream = (empty(tokens, case.k), empty(), empty(), empty())
    d_logits = kernels.backward(
        *upstream,
        logits,
        indices,
        weights,
        coefficients,
        case.sigmoid,
        case.renormalize,
        *masked,
        *noise,
    )
    if case.dim is not None:
        kernels.input_backward(d_logits, source, router[0], mask, True, True)
    if case.everything:
        forward(indices)
        kernels.order(indices, mask, case.experts)
