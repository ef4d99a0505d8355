"""Launchers of query pooling.

For the equations see mmfused/ops/query_pooling/reference.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, launch, pack_padding, upcasts
from . import backward as bwd
from . import forward as fwd
from .dropout import keep_words
from .plans import Plan, plan

__all__ = ["backward", "forward", "plan"]


def forward(
    x: Tensor,
    q: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    eps: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tiles: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool x (B, N, D), whose last stride is 1, with contiguous queries q (R, D) or (B, R, D).

    Return z (B, R, D), sums (B, R, 2), mean and rstd (B, N), and ksum (B, R). Mean and rstd are
    (0,) without a norm, ksum is (0,) without dropout.
    """
    batch, length, dim = x.shape
    rows = q.shape[-2]
    norm = eps is not None
    tiles = tiles or plan(rows, dim, x.dtype, arch_of(x), norm, bool(dropout_p))
    z = x.new_empty(batch, rows, dim)
    sums = x.new_empty(batch, rows, 2, dtype=torch.float32)
    per_token = (batch, length) if norm else (0,)
    mean = x.new_empty(per_token, dtype=torch.float32)
    rstd = x.new_empty(per_token, dtype=torch.float32)
    ksum = x.new_empty((batch, rows) if dropout_p else (0,), dtype=torch.float32)
    keep = keep_words(x, dropout_seed, dropout_p, batch, rows, length)
    tokens = _token_arguments(x, mask, lengths)
    if eps is not None:
        _launch_moments(tiles, tokens, mean, rstd, eps)
    tokens |= dict(mean_ptr=mean, rstd_ptr=rstd, NORM=norm, UPCAST=upcasts(x.dtype), R=rows)
    query = dict(q_ptr=q, stride_qb=q.stride(0) if q.dim() == 3 else 0)
    out = dict(z_ptr=z, keep_ptr=keep, ksum_ptr=ksum, DROPOUT=keep is not None)
    if "onepass" in tiles.forward:
        tile = tiles.forward["onepass"]
        launch(
            fwd.onepass_forward_kernel,
            (batch, triton.cdiv(rows, tile.BR)),
            **tokens,
            **query,
            **out,
            sums_ptr=sums,
            **asdict(tile),
        )
    else:
        _launch_two_reads(tiles, tokens, query, out, sums)
    return z, sums, mean, rstd, ksum


def _token_arguments(
    x: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> dict[str, Any]:
    """Return the kernel arguments that describe the tokens."""
    words, span, width, kind = pack_padding(mask, lengths)
    return dict(
        x_ptr=x,
        words_ptr=words,
        span_ptr=span,
        N=x.shape[1],
        W=width,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        D=x.shape[2],
        MASK=kind,
    )


def _launch_moments(
    tiles: Plan,
    tokens: dict[str, Any],
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> None:
    batch, length = mean.shape
    tile = tiles.forward["moments"]
    launch(
        fwd.moments_kernel,
        (batch, triton.cdiv(length, tile.BN)),
        **tokens,
        mean_ptr=mean,
        rstd_ptr=rstd,
        eps=eps,
        BN=tile.BN,
        BD=tile.BD,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _launch_two_reads(
    tiles: Plan,
    tokens: dict[str, Any],
    query: dict[str, Any],
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    """Compute the logits, then z."""
    x = tokens["x_ptr"]
    batch, rows = sums.shape[:2]
    logits = x.new_empty(batch, x.shape[1], rows, dtype=torch.float32)
    tile = tiles.forward["logits"]
    launch(
        fwd.logits_kernel,
        (batch, triton.cdiv(rows, tile.BR)),
        **tokens,
        **query,
        s_ptr=logits,
        sums_ptr=sums,
        **asdict(tile),
    )
    tile = tiles.forward["pool"]
    launch(
        fwd.pool_kernel,
        (batch, triton.cdiv(rows, tile.BR), triton.cdiv(x.shape[2], tile.BD)),
        **tokens,
        **out,
        s_ptr=logits,
        sums_ptr=sums,
        **asdict(tile),
    )


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
) -> tuple[Tensor, Tensor]:
    """Return dx (B, N, D), (0,) if not needed, and dq of q's shape (float32 if q is shared).

    dz (B, R, D) and, with dropout, dksum (B, R) are contiguous. The other tensors are inputs and
    outputs of the forward.
    """
    batch, length, dim = x.shape
    rows = q.shape[-2]
    shared = q.dim() == 2
    norm = mean.numel() > 0
    tiles = tiles or plan(rows, dim, x.dtype, arch_of(x), norm, bool(dropout_p))
    dx = x.new_empty(x.shape if need_dx else (0,))
    partials = min(batch, tiles.partials) if shared else batch
    dq = q.new_empty(partials, rows, dim, dtype=torch.float32 if shared else q.dtype)
    tokens = _token_arguments(x, mask, lengths)
    tokens |= dict(mean_ptr=mean, rstd_ptr=rstd, NORM=norm, UPCAST=upcasts(x.dtype), R=rows)
    keep = keep_words(x, dropout_seed, dropout_p, batch, rows, length)
    query = dict(q_ptr=q, dz_ptr=dz, stride_qb=0 if shared else q.stride(0))
    saved = dict(
        z_ptr=z,
        sums_ptr=sums,
        keep_ptr=keep,
        ksum_ptr=ksum,
        dksum_ptr=dksum,
        DROPOUT=keep is not None,
    )
    if "onepass" in tiles.backward:
        launch(
            bwd.onepass_backward_kernel,
            (partials,),
            **tokens,
            **query,
            **saved,
            dx_ptr=dx,
            dq_ptr=dq,
            B=batch,
            NEED_DX=need_dx,
            **asdict(tiles.backward["onepass"]),
        )
    else:
        _launch_three_steps(tiles, tokens, query, saved, dx if need_dx else None, dq)
    return dx, dq.sum(0) if shared else dq


def _launch_three_steps(
    tiles: Plan,
    tokens: dict[str, Any],
    query: dict[str, Any],
    saved: dict[str, Any],
    dx: Tensor | None,
    dq: Tensor,
) -> None:
    """Compute P and dS, then dx if it is needed, then dq."""
    x = tokens["x_ptr"]
    batch, length, dim = x.shape
    partials, rows = dq.shape[:2]
    p = x.new_empty(batch, length, rows)
    ds = x.new_empty(batch, length, rows)
    tile = tiles.backward["dlogits"]
    blocks = triton.cdiv(rows, tile.BR)
    g_x = x.new_empty((batch, blocks, length) if tokens["NORM"] else (0,), dtype=torch.float32)
    launch(
        bwd.dlogits_kernel,
        (batch, blocks, triton.cdiv(length, tile.BN)),
        **tokens,
        **query,
        **saved,
        p_ptr=p,
        ds_ptr=ds,
        g_x_ptr=g_x,
        **asdict(tile),
    )
    if dx is not None:
        tile = tiles.backward["dx"]
        launch(
            bwd.dx_kernel,
            (batch, triton.cdiv(length, tile.BN), triton.cdiv(dim, tile.BD)),
            **tokens,
            **query,
            p_ptr=p,
            ds_ptr=ds,
            g_x_ptr=g_x,
            dx_ptr=dx,
            blocks=blocks,
            **asdict(tile),
        )
    tile = tiles.backward["dq"]
    launch(
        bwd.dq_kernel,
        (partials, triton.cdiv(rows, tile.BR), triton.cdiv(dim, tile.BD)),
        **tokens,
        ds_ptr=ds,
        dq_ptr=dq,
        B=batch,
        **asdict(tile),
    )
