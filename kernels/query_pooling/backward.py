"""Backward of query pooling. For the symbols see forward.py.

With P = softmax(S), dP = dZ X^T, delta = rowsum(dZ * Z) and dS = P * (dP - delta), where * is
elementwise:

    dX = P^T dZ + dS^T Q'
    dQ' = dS X, summed over the samples if the queries are shared

With NORM, x^ = (x - mean) rstd replaces x and, with G = P^T dZ + dS^T Q',

    dX = rstd * (G - x^ * g_x)        g_x = mean_D(G * x^) = sum_r (P * dP + dS * S) / D

LayerNorm's other term, mean_D(G), is 0 because the rows of dZ and Q' sum to 0 over D.

With DROPOUT, kept(P) is P with zeros for the dropped probabilities. It replaces P in the equations
above, except that

    dS = P * (dP - delta + dksum * (1 - ksum))     for a kept probability
    dS = P * (-delta - dksum * ksum)               for a dropped one

The log-sum-exp of the logits has the gradient P, so its upstream gradient dlse adds P * dlse to dS.

There are no atomics: each element of dX is written by one program, and dQ' is computed as partial
sums, which are added up in a fixed order.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    OPTIONS,
    arch_of,
    dot,
    load_rows_t,
    load_tokens,
    token_span,
    tokens_kept,
    upcasts,
)
from . import gradients, hopper_backward, hopper_pairs, products
from .dropout import keep_words, rows_keep
from .hopper_tokens import can_describe
from .plans import Plan, plan
from .softmax import load_sums, probabilities
from .tokens import load_moments, load_normed, sample_start, sizes, token_arguments


def backward(
    dz: Tensor,
    dksum: Tensor | None,
    dlse: Tensor | None,
    x: Tensor,
    q: Tensor,
    z: Tensor,
    sums: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ksum: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    need_dx: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tiles: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dx of x's shape, or (0,) if not needed, and dq of q's shape (float32 if q is (R, D)).

    dz (B, R, D) may have any strides. dksum (B, R), the gradient of ksum with dropout, and dlse
    (B, R), the float32 gradient of the log-sum-exp, if there is one, are contiguous. The other
    tensors are inputs and outputs of the forward.
    """
    batch, length = sizes(x, cu_seqlens, max_seqlen)
    rows, dim = q.shape[-2:]
    shared = q.dim() == 2
    norm = mean.numel() > 0
    if dz.stride(-1) != 1 or not can_describe(dz):
        dz = dz.contiguous()
    if tiles is None:
        options = dict(
            dropout=bool(dropout_p),
            per_sample=not shared,
            tma=cu_seqlens is None and can_describe(x, q, z, dz),
            dlse=dlse is not None,
            length=length,
            padded=any(given is not None for given in (mask, lengths, cu_seqlens)),
        )
        tiles = plan(rows, dim, x.dtype, arch_of(x), norm, **options)
    dropout_words = keep_words(x, dropout_seed, dropout_p, batch, rows, length)
    saved = dict(
        z_ptr=z,
        sums_ptr=sums,
        keep_ptr=dropout_words,
        ksum_ptr=ksum,
        dksum_ptr=dksum,
        dlse_ptr=dlse,
        DROPOUT=dropout_words is not None,
    )
    if "softmax" in tiles.backward:
        return products.backward(tiles.backward["softmax"], x, q, dz, saved, need_dx)
    # The kernels do not write the rows of packed tokens that belong to no sample.
    new = x.new_empty if cu_seqlens is None else x.new_zeros
    dx = new(x.shape if need_dx else (0,))
    most = triton.cdiv(batch, 2) if "pairs" in tiles.backward else batch
    partials = min(most, tiles.partials) if shared else batch
    dq = q.new_empty(partials, rows, dim, dtype=torch.float32 if shared else q.dtype)
    tokens = token_arguments(x, mask, lengths, cu_seqlens, max_seqlen)
    tokens |= dict(mean_ptr=mean, rstd_ptr=rstd, NORM=norm, UPCAST=upcasts(x.dtype), R=rows)
    query = dict(q_ptr=q, dz_ptr=dz, stride_qb=0 if shared else q.stride(0))
    if "pairs" in tiles.backward:
        hopper_pairs.launch(tiles.backward["pairs"], tokens, query, saved, dx, dq)
    elif "hopper" in tiles.backward:
        hopper_backward.launch(tiles.backward["hopper"], tokens, query, saved, dx, dq)
    else:
        query["dz_ptr"] = dz.contiguous()
        _launch_steps(tiles, tokens, batch, query, saved, dx if need_dx else None, dq)
    return dx, dq.sum(0) if shared else dq


def _launch_steps(
    tiles: Plan,
    tokens: dict[str, Any],
    batch: int,
    query: dict[str, Any],
    saved: dict[str, Any],
    dx: Tensor | None,
    dq: Tensor,
) -> None:
    """Compute P and dS, then dx if it is needed, then dq."""
    x = tokens["x_ptr"]
    partials, rows, dim = dq.shape
    length = tokens["N"]
    p = x.new_empty(*x.shape[:-1], rows)
    ds = x.new_empty(*x.shape[:-1], rows)
    tile = tiles.backward["dlogits"]
    blocks = triton.cdiv(rows, tile.BR)
    g_x = x.new_empty((batch, blocks, length) if tokens["NORM"] else (0,), dtype=torch.float32)
    dlogits_kernel[(batch, blocks, triton.cdiv(length, tile.BN))](
        **tokens,
        **query,
        **saved,
        p_ptr=p,
        ds_ptr=ds,
        g_x_ptr=g_x,
        **asdict(tile),
        **OPTIONS,
    )
    if dx is not None:
        tile = tiles.backward["dx"]
        gradients.dx_kernel[(batch, triton.cdiv(length, tile.BN), triton.cdiv(dim, tile.BD))](
            **tokens,
            **query,
            p_ptr=p,
            ds_ptr=ds,
            g_x_ptr=g_x,
            dx_ptr=dx,
            blocks=blocks,
            **asdict(tile),
            **OPTIONS,
        )
    tile = tiles.backward["dq"]
    gradients.dq_kernel[(partials, triton.cdiv(rows, tile.BR), triton.cdiv(dim, tile.BD))](
        **tokens,
        ds_ptr=ds,
        dq_ptr=dq,
        B=batch,
        **asdict(tile),
        **OPTIONS,
    )


@triton.jit
def _load_z(
    z_ptr,
    b,
    rows,
    cols,
    R,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """Load the given rows of Z, at most BN, into the first rows of a tile (BN, columns)."""
    tl.static_assert(rows.shape[0] <= BN)
    n = tl.arange(0, BN)
    first = tl.min(rows, 0)
    valid = (n < rows.shape[0]) & (first + n < R)
    return load_tokens(z_ptr + b * R * D, first + n, cols, valid, D, D)


@triton.jit
def _delta(
    zdz,
    ksum_ptr,
    dksum_ptr,
    dlse_ptr,
    b,
    rows,
    R,
    DROPOUT: tl.constexpr,
):
    """Return rowsum(dZ * Z), the diagonal of zdz = Z dZ^T, and the other terms of dS / P.

    These are dlse + dksum * (1 - ksum) for kept tokens and dlse - dksum * ksum for others. If one
    token has all the weight of a row, delta must equal dP, so that they cancel. A matrix product
    rounds delta like dP. On sm_90 a direct sum over a tile of dZ would also be a race with the
    product that reads the tile (see mmfused/cli/races.py).
    """
    diagonal = tl.arange(0, zdz.shape[0])[:, None] == tl.arange(0, zdz.shape[1])[None, :]
    delta = tl.sum(tl.where(diagonal, zdz, 0.0), 0)
    kept = tl.zeros(rows.shape, tl.float32)
    dropped = kept
    if DROPOUT:
        dksum = tl.load(dksum_ptr + b * R + rows, mask=rows < R, other=0.0)
        ksum = tl.load(ksum_ptr + b * R + rows, mask=rows < R, other=0.0)
        kept = dksum * (1.0 - ksum)
        dropped = -dksum * ksum
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + b * R + rows, mask=rows < R, other=0.0)
        kept += dlse
        dropped += dlse
    return delta, kept, dropped


@triton.jit
def _dlogits(
    p,
    dp,
    delta,
    kept,
    dropped,
    keep_ptr,  # (B, N / 64, R) int64
    b,
    start,
    BN: tl.constexpr,
    rows,
    N,
    R,
    dlse_ptr,
    DROPOUT: tl.constexpr,
):
    """Return kept(P) and dS.

    dP - delta comes before the other terms. The compiler would start the sum of dP with an added
    term, which would then be rounded otherwise than delta.
    """
    pooled = p
    if DROPOUT:
        keep = rows_keep(keep_ptr, b, start, BN, rows, N, R)
        pooled = tl.where(keep, p, 0.0)
        here = (dp - delta[None, :]) + kept[None, :]
        ds = p * tl.where(keep, here, dropped[None, :] - delta[None, :])
    elif dlse_ptr is not None:
        ds = p * ((dp - delta[None, :]) + kept[None, :])
    else:
        ds = p * (dp - delta[None, :])
    return pooled, ds


@triton.jit
def dlogits_kernel(
    x_ptr,  # (B, N, D)
    q_ptr,  # (R, D) or (B, R, D)
    z_ptr,  # (B, R, D)
    dz_ptr,  # (B, R, D)
    sums_ptr,  # (B, R, 2) float32
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
    dksum_ptr,  # (B, R) float32
    dlse_ptr,  # (B, R) float32
    p_ptr,  # (B, N, R)
    ds_ptr,  # (B, N, R)
    g_x_ptr,  # (B, blocks, N) float32
    N,
    W,
    R,
    stride_xb,
    stride_xn,
    stride_qb,
    D: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write kept(P), dS and, with NORM, the part of g_x from each block of rows.

    Grid (B, R / BR, N / BN).
    """
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    start = tl.program_id(2) * BN
    n = start + tl.arange(0, BN)
    lo, hi = token_span(b, span_ptr, N, MASK)
    row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
    if (start < hi) & (start + BN > lo):
        _, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        s = tl.zeros([BN, BR], tl.float32)
        dp = tl.zeros([BN, BR], tl.float32)
        zdz = tl.zeros([BN, BR], tl.float32)
        mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
        for c in range((D + BD - 1) // BD):
            cols = c * BD + tl.arange(0, BD)
            x = load_normed(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
            s = dot(x, load_rows_t(q_ptr + b * stride_qb, rows, cols, R, D), s, UPCAST)
            dz = load_rows_t(dz_ptr + b * R * D, rows, cols, R, D)
            dp = dot(x, dz, dp, UPCAST)
            zdz = dot(_load_z(z_ptr, b, rows, cols, R, D, BN), dz, zdz, UPCAST)
        delta, kept, dropped = _delta(zdz, ksum_ptr, dksum_ptr, dlse_ptr, b, rows, R, DROPOUT)
        m, log_total = load_sums(sums_ptr, b, rows, R)
        p = tl.where(keep[:, None], probabilities(s, m, log_total), 0.0)
        p, ds = _dlogits(
            p, dp, delta, kept, dropped, keep_ptr, b, start, BN, rows, N, R, dlse_ptr, DROPOUT
        )
        p = p.to(x_ptr.dtype.element_ty)
        ds = ds.to(x_ptr.dtype.element_ty)
        if NORM:
            share = (b * tl.num_programs(1) + tl.program_id(1)) * N + n
            tl.store(g_x_ptr + share, tl.sum(p * dp + ds * s, 1) / D, mask=n < N)
        p_at = (row + n[:, None]) * R + rows[None, :]
        inside = (n[:, None] < count) & (rows[None, :] < R)
        tl.store(p_ptr + p_at, p, mask=inside)
        tl.store(ds_ptr + p_at, ds, mask=inside)
