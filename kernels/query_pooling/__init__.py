"""Query pooling: launchers around the kernels. Shapes and maths:
mmfused/ops/query_pooling/functional.py.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, launch, pack_padding, upcasts
from . import backward as bwd
from . import forward as fwd
from .dropout import keep_words
from .plans import Plan, Tile, plan

__all__ = ["backward", "forward", "plan"]


def _run(kernel, tile: Tile, grid: tuple[int, ...], *args, **constexprs) -> None:
    launch(kernel, grid, *args, **asdict(tile), **constexprs)


def forward(
    x: Tensor,
    q: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    eps: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tiles: Plan | None = None,
):
    """x (B, N, D), last stride 1; q (R, D) or (B, R, D) contiguous -> z (B, R, D), sums (B, R, 2),
    mean and rstd (B, N) or (0,), ksum (B, R) or (0,)."""
    batch, length, dim = x.shape
    rows = q.shape[-2]
    norm = eps is not None
    tiles = tiles or plan(rows, dim, x.dtype, arch_of(x), norm, bool(dropout_p))
    z = x.new_empty(batch, rows, dim)
    sums = x.new_empty(batch, rows, 2, dtype=torch.float32)
    mean, rstd = (
        x.new_empty((batch, length) if norm else (0,), dtype=torch.float32) for _ in range(2)
    )
    ksum = x.new_empty((batch, rows) if dropout_p else (0,), dtype=torch.float32)
    keep = keep_words(x, dropout_seed, dropout_p, batch, rows, length) if dropout_p else None
    words, span, width, kind = pack_padding(mask, lengths)
    strides = (x.stride(0), x.stride(1))
    stride_qb = q.stride(0) if q.dim() == 3 else 0
    flags = dict(D=dim, MASK=kind, NORM=norm, UPCAST=upcasts(x.dtype))
    drops = dict(DROPOUT=keep is not None)
    if norm:
        tile = tiles.forward["moments"]
        launch(
            fwd.moments_kernel,
            (batch, triton.cdiv(length, tile.BN)),
            x,
            words,
            span,
            mean,
            rstd,
            length,
            width,
            *strides,
            eps,
            D=dim,
            BN=tile.BN,
            BD=tile.BD,
            MASK=kind,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if "onepass" in tiles.forward:
        tile = tiles.forward["onepass"]
        _run(
            fwd.onepass_kernel,
            tile,
            (batch, triton.cdiv(rows, tile.BR)),
            x,
            q,
            words,
            span,
            z,
            sums,
            mean,
            rstd,
            keep,
            ksum,
            length,
            width,
            rows,
            *strides,
            stride_qb,
            **flags,
            **drops,
        )
        return z, sums, mean, rstd, ksum
    logits = x.new_empty(batch, length, rows, dtype=torch.float32)
    tile = tiles.forward["logits"]
    _run(
        fwd.logits_kernel,
        tile,
        (batch, triton.cdiv(rows, tile.BR)),
        x,
        q,
        words,
        span,
        logits,
        sums,
        mean,
        rstd,
        length,
        width,
        rows,
        *strides,
        stride_qb,
        **flags,
    )
    tile = tiles.forward["pool"]
    _run(
        fwd.pool_kernel,
        tile,
        (batch, triton.cdiv(rows, tile.BR), triton.cdiv(dim, tile.BD)),
        x,
        logits,
        sums,
        words,
        span,
        mean,
        rstd,
        z,
        keep,
        ksum,
        length,
        width,
        rows,
        *strides,
        **flags,
        **drops,
    )
    return z, sums, mean, rstd, ksum


def backward(
    dz: Tensor,
    dksum: Tensor | None,
    x: Tensor,
    q: Tensor,
    z: Tensor,
    sums: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ksum: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    need_dx: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tiles: Plan | None = None,
):
    """dz (B, R, D) and with dropout dksum (B, R) contiguous, what forward took and gave -> dx (B,
    N, D) or (0,), dq as q (float32 where the samples share q)."""
    batch, length, dim = x.shape
    rows, shared = q.shape[-2], q.dim() == 2
    norm = mean.numel() > 0
    tiles = tiles or plan(rows, dim, x.dtype, arch_of(x), norm, bool(dropout_p))
    dx = x.new_empty(x.shape if need_dx else (0,))
    partials = min(batch, tiles.partials) if shared else batch
    dq = q.new_empty(partials, rows, dim, dtype=torch.float32 if shared else q.dtype)
    words, span, width, kind = pack_padding(mask, lengths)
    keep = keep_words(x, dropout_seed, dropout_p, batch, rows, length) if dropout_p else None
    drops = dict(DROPOUT=keep is not None)
    strides = (x.stride(0), x.stride(1))
    stride_qb = 0 if shared else q.stride(0)
    flags = dict(D=dim, MASK=kind, NORM=norm, UPCAST=upcasts(x.dtype))
    if "onepass" in tiles.backward:
        _run(
            bwd.onepass_kernel,
            tiles.backward["onepass"],
            (partials,),
            x,
            q,
            z,
            dz,
            sums,
            mean,
            rstd,
            words,
            span,
            keep,
            ksum,
            dksum,
            dx,
            dq,
            batch,
            length,
            width,
            rows,
            *strides,
            stride_qb,
            **flags,
            **drops,
            NEED_DX=need_dx,
        )
        return dx, dq.sum(0) if shared else dq
    p, ds = (x.new_empty(batch, length, rows) for _ in range(2))
    tile = tiles.backward["dlogits"]
    blocks = triton.cdiv(rows, tile.BR)
    g_x = x.new_empty((batch, blocks, length) if norm else (0,), dtype=torch.float32)
    _run(
        bwd.dlogits_kernel,
        tile,
        (batch, blocks, triton.cdiv(length, tile.BN)),
        x,
        q,
        z,
        dz,
        sums,
        mean,
        rstd,
        words,
        span,
        keep,
        ksum,
        dksum,
        p,
        ds,
        g_x,
        length,
        width,
        rows,
        *strides,
        stride_qb,
        **flags,
        **drops,
    )
    if need_dx:
        tile = tiles.backward["dx"]
        _run(
            bwd.dx_kernel,
            tile,
            (batch, triton.cdiv(length, tile.BN), triton.cdiv(dim, tile.BD)),
            x,
            q,
            dz,
            p,
            ds,
            mean,
            rstd,
            g_x,
            words,
            span,
            dx,
            length,
            width,
            rows,
            blocks,
            *strides,
            stride_qb,
            **flags,
        )
    tile = tiles.backward["dq"]
    _run(
        bwd.dq_kernel,
        tile,
        (partials, triton.cdiv(rows, tile.BR), triton.cdiv(dim, tile.BD)),
        x,
        ds,
        mean,
        rstd,
        words,
        span,
        dq,
        batch,
        length,
        width,
        rows,
        *strides,
        **flags,
    )
    return dx, dq.sum(0) if shared else dq
