"""The launches that ``mmfused inspect`` compiles. Together they reach every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import topk_routing as kernels


@dataclass(frozen=True)
class Case:
    """Sizes and options of one forward and backward."""

    experts: int
    k: int
    dim: int | None  # None: the logits are given
    dtype: str = "bfloat16"
    router_dtype: str | None = "float32"  # of the router's weight; None: the logits are given
    sigmoid: bool = False
    renormalize: bool = True
    balance: Literal["switch", "gshard", "mse"] = "switch"
    # Use padding, segments with their own experts, a selection bias and jitter; also launch
    # ``order``, and a second forward with given indices.
    everything: bool = False


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
    """Call the launchers on meta tensors with the shapes of this case."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, segments = 8192, 3 if case.everything else 1
    columns = case.experts if case.dim is None else case.dim
    source = empty(tokens, columns, dtype=getattr(torch, case.dtype))
    weight = bias = None
    if case.router_dtype is not None:
        router_dtype = getattr(torch, case.router_dtype)
        weight = empty(case.experts, columns, dtype=router_dtype)
        bias = empty(case.experts, dtype=router_dtype)
    common = {
        "sigmoid": case.sigmoid,
        "renormalize": case.renormalize,
        "mask": empty(tokens, dtype=torch.bool) if case.everything else None,
        "segments": empty(tokens, dtype=torch.int64) if case.everything else None,
        "num_segments": segments,
        "available": None,
        "balance": case.balance,
        "jitter": 0.1 if case.everything else 0.0,
        "jitter_seed": empty(dtype=torch.int64) if case.everything else None,
    }
    if case.everything:
        common["available"] = empty(segments, case.experts, dtype=torch.bool)

    def forward(given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return kernels.forward(
            source=source,
            router_weight=weight,
            router_bias=bias,
            k=case.k,
            selection_bias=empty(case.experts) if case.everything else None,
            indices=given,
            **common,
        )

    logits, indices, weights, *_, coefficients = forward(None)
    d_logits = kernels.backward(
        d_weights=empty(tokens, case.k),
        d_balance=empty(),
        d_z=empty(),
        d_entropy=empty(),
        logits=source if weight is None else logits,
        indices=indices,
        weights=weights,
        coefficients=coefficients,
        **common,
    )
    if weight is not None:
        kernels.input_backward(d_logits, source, weight, common["mask"], True, True)
    if case.everything:
        forward(indices)
        kernels.order(indices, common["mask"], case.experts)
