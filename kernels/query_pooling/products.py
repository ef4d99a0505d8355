"""Query pooling with many rows of queries: torch's matrix products, and a kernel between them.

With many rows most of the time goes into the products, and S and P are small beside X. The kernels
compute P from S, and dS from S and dP. For the equations see forward.py and backward.py. Here delta
is the sum over the tokens of P * dP, so Z is not needed: it equals dP if one token has all the
weight, because P is then exactly 1.

The samples are processed in chunks, which bounds the memory of S and dP. All tokens count: padding
would not be skipped.
"""

from __future__ import annotations

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

CHUNK_BYTES = 2**28  # of S in float32


def forward(
    tile: SoftmaxTile,
    x: Tensor,
    q: Tensor,
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    """Compute what ``onepass_forward_kernel`` computes, with its arguments ``out``."""
    for chunk, x_c, s in _logits(x, q):
        p = torch.empty_like(s, dtype=x.dtype)
        softmax_kernel[_grid(s, tile)](
            s_ptr=s,
            p_ptr=p,
            sums_ptr=sums,
            **{name: value for name, value in out.items() if name != "z_ptr"},
            **_sizes(s, chunk),
            **asdict(tile),
            **OPTIONS,
        )
        torch.bmm(p.mT, x_c, out=out["z_ptr"][chunk])


def backward(
    tile: SoftmaxTile,
    x: Tensor,
    query: dict[str, Any],
    saved: dict[str, Any],
    dx: Tensor | None,
    dq: Tensor,
) -> None:
    """Compute dx (B, N, D), if it is needed, and dq, with the arguments of ``dlogits_kernel``.

    dq is (B, R, D), or for shared queries (1, R, D) in float32.
    """
    q, dz = query["q_ptr"], query["dz_ptr"]
    shared = q.dim() == 2
    if shared:
        dq.zero_()
    for chunk, x_c, s in _logits(x, q):
        dz_c = dz[chunk]
        p, ds = (torch.empty_like(s, dtype=x.dtype) for _ in range(2))
        dsoftmax_kernel[_grid(s, tile)](
            s_ptr=s,
            dp_ptr=_product(x_c, dz_c.mT),
            p_ptr=p,
            ds_ptr=ds,
            **{name: value for name, value in saved.items() if name not in ("z_ptr", "ksum_ptr")},
            **_sizes(s, chunk),
            **asdict(tile),
            **OPTIONS,
        )
        if dx is not None:
            torch.bmm(p, dz_c, out=dx[chunk])
            if shared:
                dx[chunk].flatten(0, 1).addmm_(ds.flatten(0, 1), q)
            else:
                dx[chunk].baddbmm_(ds, q[chunk])
        if shared:
            dq += _product(ds.flatten(0, 1).mT, x_c.reshape(-1, x.shape[-1]))
        else:
            torch.bmm(ds.mT, x_c, out=dq[chunk])


def _logits(x: Tensor, q: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for each chunk of samples: which, their tokens, and S (chunk, N, R) in float32."""
    batch, length, dim = x.shape
    rows = q.shape[-2]
    size = max(1, CHUNK_BYTES // max(1, 4 * length * rows))
    for first in range(0, batch, size):
        chunk = slice(first, min(first + size, batch))
        x_c = x[chunk]
        if q.dim() == 2:
            yield chunk, x_c, _product(x_c.reshape(-1, dim), q.mT).view(-1, length, rows)
        else:
            yield chunk, x_c, _product(x_c, q[chunk].mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices of 16 bits, or of batches of them, in float32."""
    if a.is_cuda:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _grid(s: Tensor, tile: SoftmaxTile) -> tuple[int, int]:
    return s.shape[0], triton.cdiv(s.shape[2], tile.BR)


def _sizes(s: Tensor, chunk: slice) -> dict[str, int]:
    return {"first": chunk.start, "N": s.shape[1], "R": s.shape[2]}


@triton.jit
def _tile(
    start,
    rows,
    N,
    R,
    BN: tl.constexpr,
):
    """Return the tokens of a tile, which of its elements are there, and where they are."""
    n = start + tl.arange(0, BN)
    return n, (n[:, None] < N) & (rows[None, :] < R), n[:, None] * R + rows[None, :]


@triton.jit
def _drawn(
    keep_ptr,
    b,
    n,
    rows,
    inside,
    N,
    R,
):
    """Return which probabilities are kept by dropout; see dropout.py."""
    at = (b * tl.cdiv(N, 64) + n[:, None] // 64) * R + rows[None, :]
    word = tl.load(keep_ptr + at, mask=inside, other=0)
    return ((word >> (n[:, None] % 64).to(tl.int64)) & 1) != 0


@triton.jit
def softmax_kernel(
    s_ptr,  # (chunk, N, R) float32
    p_ptr,  # (chunk, N, R)
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
    first,
    N,
    R,
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
    base = tl.program_id(0).to(tl.int64) * N * R
    m = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    ksum = tl.zeros([BR], tl.float32)
    if WHOLE:
        n, inside, at = _tile(0, rows, N, R, BN)
        s = tl.load(s_ptr + base + at, mask=inside, other=0.0)
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside, at = _tile(start, rows, N, R, BN)
            s = tl.load(s_ptr + base + at, mask=inside, other=0.0)
        _, m, total, _ = softmax_step(s, m, total, n < N)
    m, log_total = store_sums(sums_ptr, b, rows, R, m, total)
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside, at = _tile(start, rows, N, R, BN)
            s = tl.load(s_ptr + base + at, mask=inside, other=0.0)
        p = tl.where(inside, probabilities(s, m, log_total), 0.0)
        if DROPOUT:
            p = tl.where(_drawn(keep_ptr, b, n, rows, inside, N, R), p, 0.0)
            ksum += tl.sum(p, 0)
        tl.store(p_ptr + base + at, p, mask=inside)
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
    at,
    inside,
    N,
    R,
    DROPOUT: tl.constexpr,
):
    """Return P, kept(P) and the gradient of P: dP + dksum, or 0 if dropped."""
    s = tl.load(s_ptr + at, mask=inside, other=0.0)
    p = tl.where(inside, probabilities(s, m, log_total), 0.0)
    g = tl.load(dp_ptr + at, mask=inside, other=0.0)
    kept = p
    if DROPOUT:
        drawn = _drawn(keep_ptr, b, n, rows, inside, N, R)
        g = tl.where(drawn, g + dksum[None, :], 0.0)
        kept = tl.where(drawn, p, 0.0)
    return p, kept, g


@triton.jit
def dsoftmax_kernel(
    s_ptr,  # (chunk, N, R) float32
    dp_ptr,  # (chunk, N, R) float32
    p_ptr,  # (chunk, N, R)
    ds_ptr,  # (chunk, N, R)
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, N / 64, R) int64
    dksum_ptr,  # (B, R) float32
    dlse_ptr,  # (B, R) float32
    first,
    N,
    R,
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
    base = tl.program_id(0).to(tl.int64) * N * R
    m, log_total = load_sums(sums_ptr, b, rows, R)
    dksum = tl.zeros([BR], tl.float32)
    dlse = dksum
    if DROPOUT:
        dksum = tl.load(dksum_ptr + b * R + rows, mask=rows < R, other=0.0)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + b * R + rows, mask=rows < R, other=0.0)
    delta = tl.zeros([BR], tl.float32)
    s_ptr += base
    dp_ptr += base
    if WHOLE:
        n, inside, at = _tile(0, rows, N, R, BN)
        p, kept, g = _p_and_gradient(
            s_ptr, dp_ptr, keep_ptr, dksum, m, log_total, b, n, rows, at, inside, N, R, DROPOUT
        )
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside, at = _tile(start, rows, N, R, BN)
            p, kept, g = _p_and_gradient(
                s_ptr, dp_ptr, keep_ptr, dksum, m, log_total, b, n, rows, at, inside, N, R, DROPOUT
            )
        delta += tl.sum(p * g, 0)
    for start in range(0, N, BN):
        if not WHOLE:
            n, inside, at = _tile(start, rows, N, R, BN)
            p, kept, g = _p_and_gradient(
                s_ptr, dp_ptr, keep_ptr, dksum, m, log_total, b, n, rows, at, inside, N, R, DROPOUT
            )
        # g - delta comes first, so that it is 0 if one token has all the weight.
        ds = p * ((g - delta[None, :]) + dlse[None, :])
        tl.store(p_ptr + base + at, kept, mask=inside)
        tl.store(ds_ptr + base + at, ds, mask=inside)
