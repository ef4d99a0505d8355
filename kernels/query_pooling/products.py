"""Query pooling with many rows of queries: torch's matrix products, and a kernel between them.

With many rows most of the time goes into the products, and S and P are small beside X. The kernels
compute P from S, and dS from S and dP. For the equations see forward.py and backward.py. Here delta
is the sum over the tokens of P * dP, so Z is not needed: it equals dP if one token has all the
weight, because P is then exactly 1.

The samples are processed in chunks, which bounds the memory of S and dP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, token_span, tokens_kept
from .dropout import rows_keep
from .plans import SoftmaxTile
from .softmax import load_sums, probabilities, softmax_step, store_sums

CHUNK_BYTES = 2**28  # of S in float32
_SAVED = ("sums_ptr", "keep_ptr", "dksum_ptr", "dlse_ptr", "DROPOUT")


def forward(
    tile: SoftmaxTile,
    tokens: dict[str, Any],
    q: Tensor,
    ignored: Tensor | None,
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    """Compute what ``onepass_forward_kernel`` computes; ``ignored`` (B, N): tokens to ignore."""
    x = tokens["x_ptr"]
    for chunk, x_c, s in _logits(x, q, ignored):
        p = torch.empty_like(s, dtype=x.dtype)
        softmax_kernel[_grid(s, tile)](
            s_ptr=s,
            p_ptr=p,
            sums_ptr=sums,
            ksum_ptr=out["ksum_ptr"],
            keep_ptr=out["keep_ptr"],
            DROPOUT=out["DROPOUT"],
            **_named(tokens, chunk),
            **asdict(tile),
            **OPTIONS,
        )
        torch.bmm(p.mT, x_c, out=out["z_ptr"][chunk])


def backward(
    tile: SoftmaxTile,
    tokens: dict[str, Any],
    query: dict[str, Any],
    saved: dict[str, Any],
    ignored: Tensor | None,
    dx: Tensor | None,
    dq: Tensor,
) -> None:
    """Compute dx (B, N, D), if it is needed, and dq; dq (1, R, D) of shared queries is float32."""
    x, dz, q = tokens["x_ptr"], query["dz_ptr"], query["q_ptr"]
    shared = q.dim() == 2
    if shared:
        dq.zero_()
    for chunk, x_c, s in _logits(x, q, ignored):
        dp = _product(x_c, dz[chunk].mT)
        p, ds = (torch.empty_like(s, dtype=x.dtype) for _ in range(2))
        dsoftmax_kernel[_grid(s, tile)](
            s_ptr=s,
            dp_ptr=dp,
            p_ptr=p,
            ds_ptr=ds,
            **{name: saved[name] for name in _SAVED},
            **_named(tokens, chunk),
            **asdict(tile),
            **OPTIONS,
        )
        if dx is not None:
            torch.bmm(p, dz[chunk], out=dx[chunk])
            if shared:
                dx[chunk].flatten(0, 1).addmm_(ds.flatten(0, 1), q)
            else:
                dx[chunk].baddbmm_(ds, q[chunk])
        if shared:
            dq += _product(ds.flatten(0, 1).mT, x_c.reshape(-1, x.shape[-1]))
        else:
            torch.bmm(ds.mT, x_c, out=dq[chunk])


def _logits(
    x: Tensor,
    q: Tensor,
    ignored: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for each chunk of samples: which, their tokens, and S (chunk, N, R) in float32.

    Ignored tokens, which may be NaN, are 0.
    """
    batch, length, dim = x.shape
    rows = q.shape[-2]
    size = max(1, CHUNK_BYTES // (4 * length * rows))
    for first in range(0, batch, size):
        chunk = slice(first, min(first + size, batch))
        x_c = x[chunk]
        if ignored is not None:
            x_c = x_c.masked_fill(ignored[chunk, :, None], 0)
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


def _named(tokens: dict[str, Any], chunk: slice) -> dict[str, Any]:
    named = {name: tokens[name] for name in ("words_ptr", "span_ptr", "N", "W", "R", "MASK")}
    return named | {"first": chunk.start}


@triton.jit
def softmax_kernel(
    s_ptr,  # (chunk, N, R) float32
    p_ptr,  # (chunk, N, R)
    sums_ptr,  # (B, R, 2) float32
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,) or spans (B, 2)
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
    first,
    N,
    W,
    R,
    BN: tl.constexpr,
    BR: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute kept(P), which is 0 for ignored tokens, and ``sums``. Grid (chunk, R / BR).

    The chunk begins with sample ``first``.
    """
    b = tl.program_id(0).to(tl.int64) + first
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    base = tl.program_id(0).to(tl.int64) * N * R + rows[None, :]
    m = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    ksum = tl.zeros([BR], tl.float32)
    lo, hi = token_span(b, span_ptr, N, MASK)
    for start in range(lo // BN * BN, hi, BN):
        n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        inside = keep[:, None] & (rows[None, :] < R)
        s = tl.load(s_ptr + base + n[:, None] * R, mask=inside, other=float("-inf"))
        _, m, total, _ = softmax_step(s, m, total, keep)
    m, log_total = store_sums(sums_ptr, b, rows, R, m, total)
    for start in range(0, N, BN):
        n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        inside = keep[:, None] & (rows[None, :] < R)
        s = tl.load(s_ptr + base + n[:, None] * R, mask=inside, other=0.0)
        p = tl.where(inside, probabilities(s, m, log_total), 0.0)
        if DROPOUT:
            p = tl.where(rows_keep(keep_ptr, b, start, BN, rows, N, R), p, 0.0)
            ksum += tl.sum(p, 0)
        tl.store(p_ptr + base + n[:, None] * R, p, mask=(n[:, None] < N) & (rows[None, :] < R))
    if DROPOUT:
        tl.store(ksum_ptr + b * R + rows, ksum, mask=rows < R)


@triton.jit
def dsoftmax_kernel(
    s_ptr,  # (chunk, N, R) float32
    dp_ptr,  # (chunk, N, R) float32
    p_ptr,  # (chunk, N, R)
    ds_ptr,  # (chunk, N, R)
    sums_ptr,  # (B, R, 2) float32
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,) or spans (B, 2)
    keep_ptr,  # (B, N / 64, R) int64
    dksum_ptr,  # (B, R) float32
    dlse_ptr,  # (B, R) float32
    first,
    N,
    W,
    R,
    BN: tl.constexpr,
    BR: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute kept(P) and dS, which are 0 for ignored tokens. Grid (chunk, R / BR).

    The chunk begins with sample ``first``. With g, the gradient of P, which is dP + dksum or, for a
    dropped probability, 0:

        dS = P * (g - sum_n P * g + dlse)
    """
    b = tl.program_id(0).to(tl.int64) + first
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    valid = rows < R
    base = tl.program_id(0).to(tl.int64) * N * R + rows[None, :]
    m, log_total = load_sums(sums_ptr, b, rows, R)
    dksum = tl.zeros([BR], tl.float32)
    dlse = dksum
    if DROPOUT:
        dksum = tl.load(dksum_ptr + b * R + rows, mask=valid, other=0.0)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + b * R + rows, mask=valid, other=0.0)
    delta = tl.zeros([BR], tl.float32)
    lo, hi = token_span(b, span_ptr, N, MASK)
    for turn in tl.static_range(2):  # first delta, then dS
        begin = lo // BN * BN if turn == 0 else 0
        end = hi if turn == 0 else N
        for start in range(begin, end, BN):
            n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
            at = base + n[:, None] * R
            inside = keep[:, None] & valid[None, :]
            s = tl.load(s_ptr + at, mask=inside, other=0.0)
            p = tl.where(inside, probabilities(s, m, log_total), 0.0)
            g = tl.load(dp_ptr + at, mask=inside, other=0.0)
            kept = p
            if DROPOUT:
                drawn = rows_keep(keep_ptr, b, start, BN, rows, N, R)
                g = tl.where(drawn, g + dksum[None, :], 0.0)
                kept = tl.where(drawn, p, 0.0)
            if turn == 0:
                delta += tl.sum(p * g, 0)
            else:
                # g - delta comes first, so that it is 0 if one token has all the weight.
                ds = p * ((g - delta[None, :]) + dlse[None, :])
                there = (n[:, None] < N) & valid[None, :]
                tl.store(p_ptr + at, kept, mask=there)
                tl.store(ds_ptr + at, ds, mask=there)
