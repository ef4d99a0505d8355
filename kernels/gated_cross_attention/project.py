"""Projections of one side: LN(x) W^T + b.

These are queries of its own direction, and keys and values of the other direction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot
from .tokens import any_of, attends, pick, tile_at, valid_keys


@triton.jit
def _moments(x_ptr, at, ok, eps, D: tl.constexpr, BK: tl.constexpr):
    """Return mean and 1 / standard deviation of each row.

    In two passes over the row: the second one finds it in the cache.
    """
    total = tl.zeros([at.shape[0]], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(
            x_ptr + at[:, None] + k[None, :], mask=ok[:, None] & (k[None, :] < D), other=0.0
        )
        total += tl.sum(x.to(tl.float32), 1)
    mean = total / D
    total = tl.zeros([at.shape[0]], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        inside = ok[:, None] & (k[None, :] < D)
        x = tl.load(x_ptr + at[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        total += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt(total / D + eps)


@triton.jit
def _load_normed(
    x_ptr,
    at,
    ok,
    k,
    mean,
    rstd,
    gamma_ptr,
    beta_ptr,
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """The columns k of LN(x) in x's dtype; 0 where not ok."""
    inside = ok[:, None] & (k[None, :] < D)
    x = tl.load(x_ptr + at[:, None] + k[None, :], mask=inside, other=0.0)
    if NORM:
        gamma = tl.load(gamma_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        x = tl.where(ok[:, None], normed, 0.0).to(x.dtype)
    return x


@triton.jit
def _load_weight(w_ptr, cols, k, COLS: tl.constexpr, D: tl.constexpr):
    """(k, columns) of a weight (COLS, D)."""
    return tl.load(
        w_ptr + cols[None, :] * D + k[:, None],
        mask=(cols[None, :] < COLS) & (k[:, None] < D),
        other=0.0,
    )


@triton.jit
def _pack_row(w_ptr, packed_ptr, row, D: tl.constexpr, BN: tl.constexpr):
    """Copy a row of W_g without its last column.

    Rows of 2 D + 1 numbers are unaligned, and could only be loaded one number at a time.
    """
    for start in range(0, 2 * D, BN):
        cols = start + tl.arange(0, BN)
        values = tl.load(w_ptr + row * (2 * D + 1) + cols, mask=cols < 2 * D, other=0.0)
        tl.store(packed_ptr + row * (2 * D) + cols, values, mask=cols < 2 * D)


@triton.jit
def project_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    moments_ptr,
    gate_ptr,
    packed_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    R,
    N,
    blocks,
    stride_b,
    stride_n,
    eps,
    SIDE: tl.constexpr,
    PARTS: tl.constexpr,
    IS_QUERY_SIDE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project BM rows of x by one of PARTS weights (C, D); grid (R / BM * PARTS [+ rows of W_g],).

    The first weight is that of the queries if the side IS_QUERY_SIDE. Rows that this part does not
    need are neither read nor multiplied; they become 0 if their sample attends. The last programs
    pack W_g.
    """
    pid = tl.program_id(0)
    if pid >= blocks:
        _pack_row(gate_ptr, packed_ptr, pid - blocks, C, BN)
    else:
        masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
        part = pid % PARTS
        queries = (part == 0) & IS_QUERY_SIDE
        r = pid // PARTS * BM + tl.arange(0, BM)
        b = r // N
        stored = attends(pick(queries, 1 - SIDE, SIDE), b, r < R, masks, ABSENT, MISSING)
        ok = valid_keys(SIDE, r, stored, masks, IGNORE)
        if any_of(stored):
            at = b.to(tl.int64) * stride_b + (r % N).to(tl.int64) * stride_n
            limit = D
            if IGNORE != 0:
                limit = tl.where(any_of(ok), D, 0)
            mean = tl.zeros([BM], tl.float32)
            rstd = tl.zeros([BM], tl.float32)
            if NORM:
                mean, rstd = _moments(x_ptr, at, ok, eps, D, BK)
                tl.store(moments_ptr + r, mean, mask=ok)
                tl.store(moments_ptr + R + r, rstd, mask=ok)
            w_ptr = pick(part == 1, pick(part == 2, w0_ptr, w2_ptr), w1_ptr)
            b_ptr = pick(part == 1, pick(part == 2, b0_ptr, b2_ptr), b1_ptr)
            biased = ((BIAS >> part) & 1) * C
            if BK >= D:
                normed = _load_normed(
                    x_ptr, at, ok, tl.arange(0, BK), mean, rstd, gamma_ptr, beta_ptr, D, NORM
                )
            for first in range(0, C, BN):
                cols = first + tl.arange(0, BN)
                acc = tl.zeros([BM, BN], tl.float32)
                if BK >= D:
                    acc = dot(
                        normed, _load_weight(w_ptr, cols, tl.arange(0, BK), C, D), acc, UPCAST
                    )
                else:
                    for start in range(0, limit, BK):
                        k = start + tl.arange(0, BK)
                        a = _load_normed(x_ptr, at, ok, k, mean, rstd, gamma_ptr, beta_ptr, D, NORM)
                        acc = dot(a, _load_weight(w_ptr, cols, k, C, D), acc, UPCAST)
                bias = tl.load(b_ptr + cols, mask=cols < biased, other=0.0).to(tl.float32)
                acc = tl.where(ok[:, None], acc + bias[None, :], 0.0)
                tl.store(
                    out_ptr + tile_at(r, part * C + cols, PARTS * C),
                    acc,
                    mask=stored[:, None] & (cols[None, :] < C),
                )
