"""The launches that ``mmfused inspect`` compiles. Together they reach every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .. import query_pooling as kernels


@dataclass(frozen=True)
class Case:
    """Sizes and options of one forward and backward."""

    rows: int  # R = heads * queries
    dim: int
    dtype: str = "bfloat16"
    norm: bool = False
    padding: Literal["none", "padding", "lengths", "packed"] = "none"
    per_sample: bool = False  # queries (B, L, D) instead of (L, D)
    need_dx: bool = True  # whether the gradient of x is needed
    dropout: float = 0.0
    lse: bool = False  # whether the log-sum-exp has a gradient
    length: int = 197


CASES: dict[str, Case] = {
    "fluid": Case(rows=32, dim=768),
    "fluid frozen": Case(rows=32, dim=768, need_dx=False),
    "fluid text": Case(rows=32, dim=768, dtype="float16", norm=True, padding="padding"),
    "fluid code": Case(rows=256, dim=768, padding="padding", per_sample=True),
    "siglip": Case(rows=12, dim=768, norm=True, padding="lengths"),
    "bottleneck": Case(rows=2, dim=768, length=32),
    "bottleneck frozen": Case(rows=2, dim=768, need_dx=False, length=32),
    "short": Case(rows=32, dim=768, norm=True, padding="padding", length=16),
    "short text": Case(
        rows=12, dim=768, dtype="float16", norm=True, padding="padding", lse=True, length=30
    ),
    "tiny": Case(rows=16, dim=192, norm=True, padding="lengths"),
    "odd": Case(rows=21, dim=100, norm=True, padding="padding"),
    "wide": Case(rows=32, dim=1024, norm=True, padding="padding"),
    "widest": Case(rows=64, dim=4096, norm=True, padding="lengths"),
    "float32": Case(rows=32, dim=768, dtype="float32", norm=True, padding="padding"),
    "fluid drop": Case(rows=32, dim=768, dropout=0.1),
    "code drop": Case(rows=256, dim=768, padding="padding", per_sample=True, dropout=0.1),
    "siglip drop": Case(
        rows=12, dim=768, dtype="float16", norm=True, padding="lengths", dropout=0.1
    ),
    "bottleneck drop": Case(rows=2, dim=768, norm=True, dropout=0.1, length=32),
    "wide drop": Case(rows=32, dim=1024, norm=True, padding="padding", dropout=0.1),
    "widest drop": Case(rows=64, dim=4096, norm=True, padding="lengths", dropout=0.1),
    "odd drop": Case(rows=21, dim=100, dtype="float16", norm=True, padding="padding", dropout=0.1),
    "float32 drop": Case(
        rows=32, dim=768, dtype="float32", norm=True, padding="padding", dropout=0.1
    ),
    "many rows": Case(rows=256, dim=768),
    "many rows drop": Case(rows=256, dim=768, per_sample=True, dropout=0.1, lse=True),
    "many rows long": Case(rows=64, dim=768, dtype="float16", dropout=0.1, length=577),
    "packed": Case(rows=32, dim=768, padding="packed"),
    "siglip packed": Case(rows=12, dim=768, norm=True, padding="packed"),
    "bottleneck packed drop": Case(rows=2, dim=768, padding="packed", dropout=0.1),
    "widest packed": Case(rows=64, dim=4096, norm=True, padding="packed"),
    "fluid lse": Case(rows=32, dim=768, lse=True),
    "siglip lse": Case(rows=12, dim=768, norm=True, padding="lengths", lse=True),
    "siglip lse drop": Case(rows=12, dim=768, norm=True, padding="lengths", dropout=0.1, lse=True),
}


def launch(case: Case) -> None:
    """Call the launchers on meta tensors with the shapes of this case."""
    compute = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = compute) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, length = 64, case.length
    packed = case.padding == "packed"
    x = empty(*((batch * length,) if packed else (batch, length)), case.dim)
    leading = () if not case.per_sample else (batch,)
    q = empty(*leading, case.rows, case.dim)
    mask = empty(batch, length, dtype=torch.bool) if case.padding == "padding" else None
    lengths = empty(batch, dtype=torch.int64) if case.padding == "lengths" else None
    shared: dict[str, Any] = dict(
        mask=mask,
        lengths=lengths,
        cu_seqlens=empty(batch + 1, dtype=torch.int32) if packed else None,
        max_seqlen=length if packed else None,
        dropout_p=case.dropout,
        dropout_seed=empty(dtype=torch.int64) if case.dropout else None,
    )
    eps = 1e-5 if case.norm else None
    z, sums, mean, rstd, ksum = kernels.forward(x, q, eps=eps, **shared)
    kernels.backward(
        dz=empty(*z.shape),
        dksum=empty(*z.shape[:2], dtype=torch.float32) if case.dropout else None,
        dlse=empty(*z.shape[:2], dtype=torch.float32) if case.lse else None,
        x=x,
        q=q,
        z=z,
        sums=sums,
        mean=mean,
        rstd=rstd,
        ksum=ksum,
        need_dx=case.need_dx,
        **shared,
    )
