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
    masks: Literal["mask", "lengths", "present"] | None = "mask"
    pre_norm: bool = True
    dropout: float = 0.0
    sizes: tuple[int, int] = (197, 64)  # tokens of a sample of each side


CASES = {
    "uniecs": Case(dim=256, heads=8, dropout=0.1),
    "uniecs eval": Case(dim=256, heads=8, masks=None),
    "uniecs missing": Case(dim=256, heads=8, masks="present"),
    "uniecs lengths": Case(dim=256, heads=8, masks="lengths", dropout=0.1),
    "uniecs zeroed": Case(dim=256, heads=4, missing="constant"),
    "cross 64": Case(
        dim=64, heads=4, dtype="float16", indicator=False, missing="zero", dropout=0.1
    ),
    "cross 512": Case(dim=512, heads=4, dropout=0.1),
    "cross 768": Case(dim=768, heads=12, dropout=0.1),
    "cross 768 token": Case(dim=768, heads=8, gate="token", missing="zero", dropout=0.1),
    "cross 768 long": Case(dim=768, heads=12, sizes=(197, 128)),
    "cross 768 dense": Case(dim=768, heads=12, masks=None, sizes=(128, 100)),
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
}


def launch(case: Case) -> None:
    """Call the launchers on meta tensors with the shapes of this case."""
    compute = getattr(torch, case.dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, sizes, directions = 64, case.sizes, 2 if case.context_dim is None else 1
    widths = (case.dim, case.context_dim or case.dim)
    tokens = [empty(batch, length, width) for length, width in zip(sizes, widths, strict=True)]
    norms = [empty(width) for width in widths for _ in range(2)]
    norms[2:] = norms[2:] if case.pre_norm or directions == 2 else [empty(0)] * 2
    nothing = empty(0, dtype=torch.bool)
    ignores = [
        empty(batch, length, dtype=torch.bool) if case.masks == "mask" else nothing
        for length in sizes
    ]
    lengths = [empty(batch, dtype=torch.int64) if case.masks == "lengths" else nothing] * 2
    presents = [empty(batch, dtype=torch.bool) if case.masks else nothing] * 2
    if directions == 1:
        ignores[0], lengths[0], presents[0] = nothing, nothing, nothing
    gates = dict(channel=case.dim, token=1, none=0)[case.gate]
    gate_width = 2 * case.dim + (1 if case.indicator else 0)
    weight = [
        empty(case.dim, case.dim),
        *[empty(case.dim, widths[1])] * 2,
        empty(case.dim, case.dim),
        empty(gates, gate_width) if gates else empty(0),
    ]
    weights = (weight + [empty(case.dim)] * 4 + [empty(gates)]) * directions
    seed = empty(dtype=torch.int64) if case.dropout else None
    lists = (tokens, norms, ignores, lengths, presents, weights)
    indicator = "sample" if case.indicator else "none"
    options = (
        case.heads,
        case.gate,
        indicator,
        case.missing,
        case.pre_norm,
        1e-5,
        case.dropout,
        seed,
    )
    results = kernels.forward(*lists, *options)
    d_outs = [empty(*x.shape) for x in tokens[:directions]]
    kernels.backward(d_outs, *lists, results[directions:], *options)
