"""Query pooling with many rows of queries, without padding and LayerNorm.

Most of the time goes into the products, so torch computes them, and a kernel the softmax between
them. For the equations see forward.py and backward.py. Here delta is computed as the sum of P * dP
over the tokens, which does not need Z. If one token has all the weight, its P is exactly 1, so
delta equals its dP.

The samples are processed in chunks, which bounds the workspace.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS
from .plans import SoftmaxTile
from .softmax import load_sums, probabilities, softmax_step, store_sums

CHUNK_BYTES = 2**28  # size of one chunk of S; the workspace is up to three times this


def forward(
    tile: SoftmaxTile,
    x: Tensor,
    q: Tensor,
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    """Compute what ``onepass_forward_kernel`` computes, with its arguments ``out``."""
    for chunk, x_c, s in _logits(x, q):
        p = _empty(s, x.dtype)
        softmax_kernel[_grid(s, tile)](
            s_ptr=s,
            p_ptr=p,
            sums_ptr=sums,
            **{name: value for name, value in out.items() if name != "z_ptr"},
            **_sizes(s, p, chunk),
            WHOLE=s.shape[1] <= tile.BN,
            **asdict(tile),
            **OPTIONS,
        )
        torch.bmm(p.mT, x_c, out=out["z_ptr"][chunk])
        del s, p  # before the next chunk needs memory


def backward(
    tile: SoftmaxTile,
    x: Tensor,
    q: Tensor,
    dz: Tensor,
    saved: dict[str, Any],
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Return what backward.py's ``backward`` returns; ``saved`` as for ``dlogits_kernel``."""
    shared = q.dim() == 2
    dx = x.new_empty(x.shape if need_dx else (0,))
    dq = torch.empty_like(q)
    parts = []  # of the gradient of shared queries
    for chunk, x_c, s in _logits(x, q):
        dz_c = dz[chunk]
        p, ds = _empty(s, x.dtype), _empty(s, x.dtype)
        dsoftmax_kernel[_grid(s, tile)](
            s_ptr=s,
            dp_ptr=_product(x_c, dz_c.mT),
            p_ptr=p,
            ds_ptr=ds,
            **{name: value for name, value in saved.items() if name not in ("z_ptr", "ksum_ptr")},
            **_sizes(s, p, chunk),
            WHOLE=s.shape[1] <= tile.BN,
            **asdict(tile),
            **OPTIONS,
        )
        if need_dx:
            torch.bmm(p, dz_c, out=dx[chunk])
            if shared:
                dx[chunk].flatten(0, 1).addmm_(ds.flatten(0, 1), q)
            else:
                dx[chunk].baddbmm_(ds, q[chunk])
        if shared:
            parts.append(_product(ds.flatten(0, 1).mT, x_c.flatten(0, 1)))
        else:
            torch.bmm(ds.mT, x_c, out=dq[chunk])
        del s, p, ds
    if shared:
        dq = functools.reduce(torch.add, parts) if parts else torch.zeros_like(q).float()
    return dx, dq


def _logits(x: Tensor, q: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for each chunk of samples: which, their tokens, and S (chunk, N, R) in float32."""
    batch, length = x.shape[:2]
    rows = q.shape[-2]
    size = max(1, CHUNK_BYTES // max(1, 4 * length * rows))
    for first in range(0, batch, size):
        chunk = slice(first, min(first + size, batch))
        if q.dim() == 2:  # one product for all samples
            x_c = x[chunk].contiguous()
            s = _product(x_c.flatten(0, 1), q.mT).view(len(x_c), length, rows)
        else:
            x_c = x[chunk]
            s = _product(x_c, q[chunk].mT)
        yield chunk, x_c, s
        del s


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices of 16 bits, or of batches of them, in float32."""
    if a.is_cuda:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _empty(s: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the shape of S whose rows begin at 16 bytes, as fast products need it."""
    padded = triton.cdiv(s.shape[2], 8) * 8
    return s.new_empty(*s.shape[:2], padded, dtype=dtype)[..., : s.shape[2]]


def _grid(s: Tensor, tile: SoftmaxTile) -> tuple[int, int]:
    return s.shape[0], triton.cdiv(s.shape[2], tile.BR)


def _sizes(s: Tensor, p: Tensor, chunk: slice) -> dict[str, int]:
    return {"first": chunk.start, "N": s.shape[1], "R": s.shape[2], "stride": p.stride(1)}


@triton.jit
def _tile(
    start,
    rows,
    N,
    R,
    BN: tl.constexpr,
):
    """Return the tokens of a tile, and a mask of its elements."""
    n = start + tl.arange(0, BN)
    return n, (n[:, None] < N) & (rows[None, :] < R)


@triton.jit
def _offsets(
    n,
    rows,
    stride,
):
    """Return the offsets of a tile in one sample, whose tokens are ``stride`` elements apart."""
    return n[:, None].to(tl.int64) * stride + rows[None, :]


@triton.jit
def _kept(
    keep_ptr,
    b,
    n,
    rows,
    inside,
    N,
    R,
):
    """Return which probabilities dropout keeps; see dropout.py."""
    at = (b * tl.cdiv(N, 64) + n[:, None] // 64) * R + rows[None, :]
    word = tl.load(keep_ptr + at, mask=inside, other=0)
    return ((word >> (n[:, None] % 64).to(tl.int64)) & 1) != 0


@triton.jit(do_not_specialize=["first"])
def softmax_kernel(
    s_ptr,  # (chunk, N, R) float32
    p_ptr,  # (chunk, N, R), with ``stride`` elements from one token to the next
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
    first,
    N,
    R,
    stride,
    BN: tl.constexpr,
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute kept(P) and ``sums``, and with DROPOUT ksum. Grid (chunk, R / BR).

    The chunk begins with sample ``first``.
    """
    b = tl.program_id(0).to(tl.int64) + first
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    s_ptr += tl.program_id(0).to(tl.int64) * N * R
    p_ptr += tl.program_id(0).to(tl.int64) * N * stride
    m = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    ksum = tl.zeros([BR], tl.float32)
    if WHOLE:
        n, inside = _tile(0, rows, N, R, BN)
        s = tl.load(s_ptr + _offsets(n, rows, R), mask=inside, other=0.0)
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside = _tile(start, rows, N, R, BN)
            s = tl.load(s_ptr + _offsets(n, rows, R), mask=inside, other=0.0)
        _, m, total, _ = softmax_step(s, m, total, n < N)
    m, log_total = store_sums(sums_ptr, b, rows, R, m, total)
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside = _tile(start, rows, N, R, BN)
            s = tl.load(s_ptr + _offsets(n, rows, R), mask=inside, other=0.0)
        p = tl.where(inside, probabilities(s, m, log_total), 0.0)
        if DROPOUT:
            p = tl.where(_kept(keep_ptr, b, n, rows, inside, N, R), p, 0.0)
            ksum += tl.sum(p, 0)
        tl.store(p_ptr + _offsets(n, rows, stride), p, mask=inside)
    if DROPOUT:
        tl.store(ksum_ptr + b * R + rows, ksum, mask=rows < R)


@triton.jit
def _p_and_gradient(
    s_ptr,
    dp_ptr,
    keep_ptr,
    dksum,
    m,
    log_total,
    b,
    n,
    rows,
    inside,
    N,
    R,
    DROPOUT: tl.constexpr,
):
    """Return P, kept(P) and the gradient of P: dP + dksum, or 0 if dropped."""
    s = tl.load(s_ptr + _offsets(n, rows, R), mask=inside, other=0.0)
    p = tl.where(inside, probabilities(s, m, log_total), 0.0)
    g = tl.load(dp_ptr + _offsets(n, rows, R), mask=inside, other=0.0)
    pooled = p
    if DROPOUT:
        kept = _kept(keep_ptr, b, n, rows, inside, N, R)
        g = tl.where(kept, g + dksum[None, :], 0.0)
        pooled = tl.where(kept, p, 0.0)
    return p, pooled, g


@triton.jit(do_not_specialize=["first"])
def dsoftmax_kernel(
    s_ptr,  # (chunk, N, R) float32
    dp_ptr,  # (chunk, N, R) float32
    p_ptr,  # (chunk, N, R), with ``stride`` elements from one token to the next
    ds_ptr,  # as p
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, N / 64, R) int64
    dksum_ptr,  # (B, R) float32
    dlse_ptr,  # (B, R) float32
    first,
    N,
    R,
    stride,
    BN: tl.constexpr,
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute kept(P) and dS. Grid (chunk, R / BR).

    The chunk begins with sample ``first``. With g, the gradient of P:

        dS = P * (g - sum_n P * g + dlse)
    """
    b = tl.program_id(0).to(tl.int64) + first
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    s_ptr += tl.program_id(0).to(tl.int64) * N * R
    dp_ptr += tl.program_id(0).to(tl.int64) * N * R
    p_ptr += tl.program_id(0).to(tl.int64) * N * stride
    ds_ptr += tl.program_id(0).to(tl.int64) * N * stride
    m, log_total = load_sums(sums_ptr, b, rows, R)
    dksum = tl.zeros([BR], tl.float32)
    dlse = dksum
    if DROPOUT:
        dksum = tl.load(dksum_ptr + b * R + rows, mask=rows < R, other=0.0)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + b * R + rows, mask=rows < R, other=0.0)
    delta = tl.zeros([BR], tl.float32)
    if WHOLE:
        n, inside = _tile(0, rows, N, R, BN)
        p, pooled, g = _p_and_gradient(
            s_ptr, dp_ptr, keep_ptr, dksum, m, log_total, b, n, rows, inside, N, R, DROPOUT
        )
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside = _tile(start, rows, N, R, BN)
            p, pooled, g = _p_and_gradient(
                s_ptr, dp_ptr, keep_ptr, dksum, m, log_total, b, n, rows, inside, N, R, DROPOUT
            )
        delta += tl.sum(p * g, 0)
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside = _tile(start, rows, N, R, BN)
            p, pooled, g = _p_and_gradient(
                s_ptr, dp_ptr, keep_ptr, dksum, m, log_total, b, n, rows, inside, N, R, DROPOUT
            )
        # g - delta comes first, so that it is 0 if one token has all the weight.
        ds = p * ((g - delta[None, :]) + dlse[None, :])
        at = _offsets(n, rows, stride)
        tl.store(p_ptr + at, pooled, mask=inside)
        tl.store(ds_ptr + at, ds, mask=inside)
