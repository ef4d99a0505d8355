"""Forward of query pooling: Z = softmax(Q' X^T) X, with an online softmax over the tokens.

Q' has R rows of absorbed queries (see mmfused/ops/query_pooling/reference.py). With S = Q' X^T and
P = softmax(S), tiles are computed transposed, S^T = X Q'^T and Z^T = X^T P^T, because the first
operand of matrix instructions needs many rows (64 on sm_90), and there are usually few queries. D
is split into NC chunks of BD columns: 768 is 3 x 256.

With NORM the kernels use (x - mean) rstd in place of x, computed in float32 when x is loaded and
rounded like LayerNorm's output. Subtracting the mean after the products would keep the rounding
errors of the products, which are large if the mean is large.

``sums`` (B, R, 2) holds the softmax statistics of each row: its largest logit m, and the logarithm
of the sum of exp(logit - m). The log-sum-exp, m plus this logarithm, would have too few digits if m
is large. In a row without valid tokens m is stored as +inf, which makes the row's probabilities 0,
and the logarithm as 0. In a row with a NaN the logarithm is NaN.

With DROPOUT only the kept probabilities are pooled, and ksum is the sum of the kept probabilities
of each row. ``sums`` covers all probabilities, dropped or kept. The output, not Z, is divided by
1 - dropout_p. So if one token has all the weight and is kept, Z equals this token exactly, which
backward relies on (see _delta in backward.py).

With MASK "packed" the tokens of all samples lie one after another, without padding: x is (total, D)
with offsets (B + 1,), and so are all tensors with a row for each token. N is then the largest
length that the caller allows.
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
    rounded_product,
    split_dot,
    store_rows_t,
    token_span,
    tokens_kept,
    upcasts,
)
from . import hopper_forward, products, short_forward
from .dropout import keep_words, rows_keep
from .hopper_tokens import can_describe
from .plans import LONG, Plan, plan
from .softmax import load_sums, probabilities, softmax_step, store_sums
from .tokens import (
    load_moments,
    load_normed,
    load_normed_t,
    sample_start,
    sizes,
    token_arguments,
)


def forward(
    x: Tensor,
    q: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    eps: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tiles: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool x (B, N, D), whose last stride is 1, with contiguous queries q (R, D) or (B, R, D).

    Packed tokens are (total, D), with offsets cu_seqlens (B + 1,) in [0, total].

    Return z (B, R, D), sums (B, R, 2), mean and rstd (B, N) or (total,), and ksum (B, R). Mean and
    rstd are (0,) without a norm, ksum is (0,) without dropout.
    """
    batch, length = sizes(x, cu_seqlens, max_seqlen)
    rows, dim = q.shape[-2:]
    norm = eps is not None
    per_sample = q.dim() == 3
    if tiles is None:
        options = dict(
            dropout=bool(dropout_p),
            per_sample=per_sample,
            tma=cu_seqlens is None and can_describe(x, q),
            # Packed samples of any length have one plan: their bits do not depend on the bound.
            length=length if cu_seqlens is None else LONG,
            padded=any(given is not None for given in (mask, lengths, cu_seqlens)),
        )
        tiles = plan(rows, dim, x.dtype, arch_of(x), norm, **options)
    z = x.new_empty(batch, rows, dim)
    sums = x.new_empty(batch, rows, 2, dtype=torch.float32)
    # The kernels do not write the rows of packed tokens that belong to no sample.
    new = x.new_empty if cu_seqlens is None else x.new_zeros
    mean, rstd = (new(x.shape[:-1] if norm else (0,), dtype=torch.float32) for _ in range(2))
    ksum = x.new_empty((batch, rows) if dropout_p else (0,), dtype=torch.float32)
    dropout_words = keep_words(x, dropout_seed, dropout_p, batch, rows, length)
    tokens = token_arguments(x, mask, lengths, cu_seqlens, max_seqlen)
    if eps is not None:
        _launch_moments(tiles, tokens, batch, mean, rstd, eps)
    tokens |= dict(mean_ptr=mean, rstd_ptr=rstd, NORM=norm, UPCAST=upcasts(x.dtype), R=rows)
    query = dict(q_ptr=q, stride_qb=q.stride(0) if per_sample else 0)
    out = dict(
        z_ptr=z,
        keep_ptr=dropout_words,
        ksum_ptr=ksum,
        DROPOUT=dropout_words is not None,
    )
    if "softmax" in tiles.forward:
        products.forward(tiles.forward["softmax"], x, q, out, sums)
    elif "short" in tiles.forward:
        short_forward.launch(tiles.forward["short"], tokens, query, out, sums)
    elif "hopper" in tiles.forward:
        hopper_forward.launch(tiles.forward["hopper"], tokens, query, out, sums)
    elif "onepass" in tiles.forward:
        tile = tiles.forward["onepass"]
        onepass_forward_kernel[(batch * triton.cdiv(rows, tile.BR),)](
            **tokens,
            **query,
            **out,
            sums_ptr=sums,
            SPLITS=tile.num_warps,
            **asdict(tile),
            **OPTIONS,
        )
    else:
        _launch_logits_and_pool(tiles, tokens, query, out, sums)
    return z, sums, mean, rstd, ksum


def _launch_moments(
    tiles: Plan,
    tokens: dict[str, Any],
    batch: int,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> None:
    tile = tiles.forward["moments"]
    moments_kernel[(batch, triton.cdiv(tokens["N"], tile.BN))](
        **tokens,
        mean_ptr=mean,
        rstd_ptr=rstd,
        eps=eps,
        BN=tile.BN,
        BD=tile.BD,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )


def _launch_logits_and_pool(
    tiles: Plan,
    tokens: dict[str, Any],
    query: dict[str, Any],
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    x = tokens["x_ptr"]
    batch, rows = sums.shape[:2]
    logits = x.new_empty(*x.shape[:-1], rows, dtype=torch.float32)
    tile = tiles.forward["logits"]
    logits_kernel[(batch, triton.cdiv(rows, tile.BR))](
        **tokens,
        **query,
        s_ptr=logits,
        sums_ptr=sums,
        **asdict(tile),
        **OPTIONS,
    )
    tile = tiles.forward["pool"]
    pool_kernel[(batch, triton.cdiv(rows, tile.BR), triton.cdiv(x.shape[-1], tile.BD))](
        **tokens,
        **out,
        s_ptr=logits,
        sums_ptr=sums,
        **asdict(tile),
        **OPTIONS,
    )


@triton.jit
def moments_kernel(
    x_ptr,  # (B, N, D)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    N,
    W,
    stride_xb,
    stride_xn,
    eps,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    MASK: tl.constexpr,
):
    """Compute mean and rstd of each token. Grid (B, N / BN).

    The moments of the column chunks are merged with Chan's update, which avoids cancellation.
    """
    b = tl.program_id(0).to(tl.int64)
    _, hi = token_span(b, span_ptr, N, MASK)
    row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
    n, keep = tokens_kept(b, tl.program_id(1) * BN, BN, hi, words_ptr, W, MASK)
    mean = tl.zeros([BN], tl.float32)
    m2 = tl.zeros([BN], tl.float32)
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        width = tl.minimum(BD, D - start).to(tl.float32)
        x = load_tokens(x_ptr + at, n, cols, keep, stride_xn, D).to(tl.float32)
        chunk_mean = tl.sum(x, 1) / width
        centred = tl.where(cols[None, :] < D, x - chunk_mean[:, None], 0.0)
        delta = chunk_mean - mean
        m2 += tl.sum(rounded_product(centred, centred), 1) + delta * delta * (
            start * width / (start + width)
        )
        mean += delta * (width / (start + width))
    # Stored for ignored tokens too, because an operator writes all of its outputs.
    tl.store(mean_ptr + row + n, mean, mask=n < count)
    tl.store(rstd_ptr + row + n, 1.0 / tl.sqrt(m2 / D + eps), mask=n < count)


@triton.jit
def onepass_forward_kernel(
    x_ptr,  # (B, N, D)
    q_ptr,  # (R, D) or (B, R, D)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    z_ptr,  # (B, R, D)
    sums_ptr,  # (B, R, 2) float32
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
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
    SPLITS: tl.constexpr,
):
    """Pool in one pass over X. Grid (B R / BR,).

    All columns of Z^T, for BR rows, stay in registers. The blocks of rows of one sample follow each
    other, so that the later ones find X in L2.
    """
    blocks = tl.cdiv(R, BR)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BR + tl.arange(0, BR)
    NC: tl.constexpr = (D + BD - 1) // BD
    q = ()
    acc = ()
    for c in tl.static_range(NC):
        cols = c * BD + tl.arange(0, BD)
        q += (load_rows_t(q_ptr + b * stride_qb, rows, cols, R, D),)
        acc += (tl.zeros([BD, BR], tl.float32),)
    m = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    ksum = tl.zeros([BR], tl.float32)
    lo, hi = token_span(b, span_ptr, N, MASK)
    row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
    for start in range(lo // BN * BN, hi, BN):
        n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
        parts = tl.zeros([SPLITS, BN, BR], tl.float32)
        x = ()
        for c in tl.static_range(NC):
            cols = c * BD + tl.arange(0, BD)
            x_c = load_normed(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
            x += (x_c,)
            parts = split_dot(x_c, q[c], parts, UPCAST)
        p, m, total, alpha = softmax_step(tl.sum(parts, 0), m, total, keep)
        if DROPOUT:
            p = tl.where(rows_keep(keep_ptr, b, start, BN, rows, N, R), p, 0.0)
            ksum = ksum * alpha + tl.sum(p, 0)
        p = p.to(x_ptr.dtype.element_ty)
        rescaled = ()
        for c in tl.static_range(NC):
            rescaled += (dot(tl.trans(x[c]), p, acc[c] * alpha[None, :], UPCAST),)
        acc = rescaled
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    if DROPOUT:
        tl.store(ksum_ptr + b * R + rows, ksum * inverse, mask=rows < R)
    for c in tl.static_range(NC):
        cols = c * BD + tl.arange(0, BD)
        store_rows_t(z_ptr + b * R * D, acc[c] * inverse[None, :], rows, cols, R, D)
    store_sums(sums_ptr, b, rows, R, m, total)


@triton.jit
def logits_kernel(
    x_ptr,  # (B, N, D)
    q_ptr,  # (R, D) or (B, R, D)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    s_ptr,  # (B, N, R) float32
    sums_ptr,  # (B, R, 2) float32
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
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
    UPCAST: tl.constexpr,
):
    """Compute the logits and ``sums``. Grid (B, R / BR)."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    m = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    lo, hi = token_span(b, span_ptr, N, MASK)
    row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
    for start in range(lo // BN * BN, hi, BN):
        n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
        s = tl.zeros([BN, BR], tl.float32)
        for c in range((D + BD - 1) // BD):
            cols = c * BD + tl.arange(0, BD)
            x = load_normed(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
            s = dot(x, load_rows_t(q_ptr + b * stride_qb, rows, cols, R, D), s, UPCAST)
        _, m, total, _ = softmax_step(s, m, total, keep)
        inside = keep[:, None] & (rows[None, :] < R)
        tl.store(s_ptr + (row + n[:, None]) * R + rows[None, :], s, mask=inside)
    store_sums(sums_ptr, b, rows, R, m, total)


@triton.jit
def pool_kernel(
    x_ptr,  # (B, N, D)
    s_ptr,  # (B, N, R) float32
    sums_ptr,  # (B, R, 2) float32
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,), spans (B, 2) or offsets (B + 1,)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    z_ptr,  # (B, R, D)
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
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
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute Z^T, and with DROPOUT ksum, from the logits. Grid (B, R / BR, D / BD)."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    cols = tl.program_id(2) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD, BR], tl.float32)
    ksum = tl.zeros([BR], tl.float32)
    m, log_total = load_sums(sums_ptr, b, rows, R)
    lo, hi = token_span(b, span_ptr, N, MASK)
    row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
    for start in range(lo // BN * BN, hi, BN):
        n, keep = tokens_kept(b, start, BN, hi, words_ptr, W, MASK)
        inside = keep[:, None] & (rows[None, :] < R)
        s_at = (row + n[:, None]) * R + rows[None, :]
        s = tl.load(s_ptr + s_at, mask=inside, other=float("-inf"))
        p = probabilities(s, m, log_total)
        if DROPOUT:
            p = tl.where(rows_keep(keep_ptr, b, start, BN, rows, N, R), p, 0.0)
            ksum += tl.sum(p, 0)
        mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
        x = load_normed_t(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
        acc = dot(x, p.to(x_ptr.dtype.element_ty), acc, UPCAST)
    store_rows_t(z_ptr + b * R * D, acc, rows, cols, R, D)
    if DROPOUT and tl.program_id(2) == 0:
        tl.store(ksum_ptr + b * R + rows, ksum, mask=rows < R)
