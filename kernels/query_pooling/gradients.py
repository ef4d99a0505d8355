"""Kernels for dX and dQ' of query pooling, from P and dS. For the equations see backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, load_tokens, store_rows_t, token_span, tokens_kept
from .tokens import load_moments, load_normed, load_normed_t, sample_start


@triton.jit
def dx_kernel(
    x_ptr,  # (B, N, D)
    q_ptr,  # (R, D) or (B, R, D)
    dz_ptr,  # (B, R, D)
    p_ptr,  # (B, N, R)
    ds_ptr,  # (B, N, R)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    g_x_ptr,  # (B, blocks, N) float32
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    dx_ptr,  # (B, N, D)
    N,
    W,
    R,
    blocks,
    stride_xb,
    stride_xn,
    stride_qb,
    D: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dX, which is 0 for ignored tokens. Grid (B, N / BN, D / BD)."""
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BN
    n = start + tl.arange(0, BN)
    cols = tl.program_id(2) * BD + tl.arange(0, BD)
    dx = tl.zeros([BN, BD], tl.float32)
    lo, hi = token_span(b, span_ptr, N, MASK)
    row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
    if (start < hi) & (start + BN > lo):
        _, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        for first_row in range(0, R, BR):
            rows = first_row + tl.arange(0, BR)
            p = load_tokens(p_ptr + row * R, n, rows, keep, R, R)
            ds = load_tokens(ds_ptr + row * R, n, rows, keep, R, R)
            dx = dot(p, load_tokens(dz_ptr + b * R * D, rows, cols, rows < R, D, D), dx, UPCAST)
            dx = dot(ds, load_tokens(q_ptr + b * stride_qb, rows, cols, rows < R, D, D), dx, UPCAST)
        if NORM:
            g_x = tl.zeros([BN], tl.float32)
            for block in range(blocks):
                g_x += tl.load(g_x_ptr + (b * blocks + block) * N + n, mask=keep, other=0.0)
            mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
            x = load_normed(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
            dx = (dx - x.to(tl.float32) * g_x[:, None]) * rstd[:, None]
    inside = (n[:, None] < count) & (cols[None, :] < D)
    tl.store(dx_ptr + (row + n[:, None]) * D + cols[None, :], dx, mask=inside)


@triton.jit
def dq_kernel(
    x_ptr,  # (B, N, D)
    ds_ptr,  # (B, N, R)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    dq_ptr,  # (partials, R, D)
    B,
    N,
    W,
    R,
    stride_xb,
    stride_xn,
    D: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute partial sums of dQ'^T = X^T dS over the samples. Grid (partials, R / BR, D / BD).

    Partial sum i covers the samples i, i + partials, ...
    """
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    cols = tl.program_id(2) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD, BR], tl.float32)
    for turn in range(0, tl.cdiv(B - tl.program_id(0), tl.num_programs(0))):
        b = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        lo, hi = token_span(b, span_ptr, N, MASK)
        row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
        for start in range(lo // BN * BN, hi, BN):
            n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
            ds = load_tokens(ds_ptr + row * R, n, rows, keep, R, R)
            mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
            x = load_normed_t(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
            acc = dot(x, ds, acc, UPCAST)
    store_rows_t(dq_ptr + tl.program_id(0).to(tl.int64) * R * D, acc, rows, cols, R, D)
