"""The launches that ``mmfused inspect`` compiles. Together they reach every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import gated_cross_attention as kernels


@dataclass(frozen=True)
class Case:
    """Sizes and options of one forward and backward."""

    dim: int
    heads: int
    context_dim: int | None = None  # None: both directions
    dtype: str = "bfloat16"
    gate: Literal["channel", "token", "none"] = "channel"
    indicator: bool = True
    missing: Literal["skip", "zero", "attend", "constant"] = "skip"
    masks: bool = True
    pre_norm: bool = True
    dropout: float = 0.0
    form: str | None = None  # None: the default form, and the backward


CASES = {
    "uniecs": Case(dim=256, heads=8, dropout=0.1),
    "uniecs eval": Case(dim=256, heads=8, masks=False),
    "uniecs zeroed": Case(dim=256, heads=4, missing="constant"),
    "cross 64": Case(
        dim=64, heads=4, dtype="float16", indicator=False, missing="zero", dropout=0.1
    ),
    "cross 512": Case(dim=512, heads=4, dropout=0.1),
    "cross 768": Case(dim=768, heads=12, dropout=0.1),
    "cross 768 token": Case(dim=768, heads=8, gate="token", missing="zero", dropout=0.1),
    "cross 1024": Case(dim=1024, heads=16, dtype="float16", missing="attend"),
    "unica": Case(dim=256, heads=8, context_dim=768, gate="none", pre_norm=False, dropout=0.1),
    "one way": Case(dim=192, heads=2, context_dim=1024, gate="token", missing="constant"),
    "one way odd": Case(dim=70, heads=2, context_dim=300, dtype="float16", dropout=0.1),
    "cross float32": Case(dim=256, heads=8, dtype="float32", dropout=0.1),
    "cross 768 f32": Case(dim=768, heads=6, dtype="float32", dropout=0.1),
    "unica float32": Case(
        dim=1024,
        heads=8,
        context_dim=768,
        dtype="float32",
        gate="none",
        missing="zero",
        pre_norm=False,
        dropout=0.1,
    ),
    "block": Case(dim=256, heads=8, dropout=0.1, form="block"),
    "block eval": Case(
        dim=256, heads=8, dtype="float16", missing="zero", masks=False, form="block"
    ),
    "block zeroed": Case(dim=256, heads=4, missing="constant", form="block"),
    "block 64": Case(
        dim=64, heads=4, dtype="float16", indicator=False, missing="zero", dropout=0.1, form="block"
    ),
    "block token": Case(
        dim=192,
        heads=4,
        context_dim=1024,
        dtype="float16",
        gate="token",
        missing="attend",
        dropout=0.1,
        form="block",
    ),
    "block unica": Case(
        dim=256, heads=8, context_dim=768, gate="none", pre_norm=False, dropout=0.1, form="block"
    ),
    "block even": Case(dim=250, heads=5, dropout=0.1, form="block"),
    "block odd": Case(dim=255, heads=5, gate="token", dropout=0.1, form="block"),
    "block float32": Case(dim=256, heads=8, dtype="float32", dropout=0.1, form="block"),
}


def launch(case: Case) -> None:
    """Call the launchers on meta tensors with the shapes of this case."""
    compute = getattr(torch, case.dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, lengths, directions = 64, (197, 64), 2 if case.context_dim is None else 1
    widths = (case.dim, case.context_dim or case.dim)
    tokens = [empty(batch, length, width) for length, width in zip(lengths, widths, strict=True)]
    norms = [empty(width) for width in widths for _ in range(2)]
    norms[2:] = norms[2:] if case.pre_norm or directions == 2 else [empty(0)] * 2
    ignores = [
        empty(batch, length, dtype=torch.bool) if case.masks else empty(0, dtype=torch.bool)
        for length in lengths
    ]
    absents = [empty(batch if case.masks else 0, dtype=torch.bool) for _ in range(2)]
    if directions == 1:
        ignores[0], absents[0] = empty(0, dtype=torch.bool), empty(0, dtype=torch.bool)
    gates = dict(channel=case.dim, token=1, none=0)[case.gate]
    gate_width = 2 * case.dim + (1 if case.indicator else 0)
    weight = [
        empty(case.dim, case.dim),
        *[empty(case.dim, widths[1])] * 2,
        empty(case.dim, case.dim),
        empty(gates, gate_width) if gates else empty(0),
    ]
    weights = (weight + [empty(case.dim)] * 4 + [empty(gates)]) * directions
    flags = [empty(batch if case.indicator else 0, dtype=torch.float32)] * directions
    seed = empty(dtype=torch.int64) if case.dropout else None
    lists = (tokens, norms, ignores, absents, weights, flags)
    options = (case.heads, case.gate, case.missing, case.pre_norm, 1e-5, case.dropout, seed)
    if case.form is not None:
        with kernels.plans.form(case.form):
            kernels.forward(*lists, *options)
        return
    results = kernels.forward(*lists, *options)
    d_outs = [empty(*x.shape) for x in tokens[:directions]]
    kernels.backward(d_outs, *lists, results[directions:], *options)
