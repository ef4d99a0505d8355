"""Forward of query pooling for short samples, all of whose tokens fit into one tile.

Each program pools several samples. For the equations see forward.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    OPTIONS,
    cdiv,
    dot,
    load_rows_t,
    multiprocessors,
    split_dot,
    store_rows_t,
    token_span,
    tokens_kept,
)
from .dropout import rows_keep
from .plans import Tile
from .softmax import softmax_step, store_sums
from .tokens import load_moments, load_normed, sample_start


def launch(
    tile: Tile,
    tokens: dict[str, Any],
    query: dict[str, Any],
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    """Launch the kernel with the arguments of ``onepass_forward_kernel``."""
    batch, rows = sums.shape[:2]
    short_forward_kernel[(_programs(sums, batch, triton.cdiv(rows, tile.BR)),)](
        **tokens,
        **query,
        **out,
        sums_ptr=sums,
        B=batch,
        SPLITS=tile.num_warps,
        **asdict(tile),
        **OPTIONS,
    )


def _programs(sums: Tensor, batch: int, blocks: int) -> int:
    """Return the number of programs that pool short samples: two for each multiprocessor.

    Fewer, if no program then gets more samples.
    """
    samples = cdiv(batch * blocks, 2 * multiprocessors(sums))
    return blocks * cdiv(batch, max(1, samples))


@triton.jit
def short_forward_kernel(
    x_ptr,  # (B, N, D)
    q_ptr,  # (R, D)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,) or spans (B, 2)
    z_ptr,  # (B, R, D)
    sums_ptr,  # (B, R, 2) float32
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
    N,
    W,
    R,
    B,
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
    """Pool samples of at most BN tokens, which share their queries. Grid (programs,).

    The number of programs is a multiple of the blocks of rows, R / BR. Each program loads its
    queries once, and then pools several samples. On sm_90 it loads the tokens of the next sample
    while it computes one. No value is carried from one sample to the next, so that a NaN stays in
    its sample.
    """
    blocks = tl.cdiv(R, BR)
    rows = tl.program_id(0) % blocks * BR + tl.arange(0, BR)
    NC: tl.constexpr = (D + BD - 1) // BD
    q = ()
    for c in tl.static_range(NC):
        q += (load_rows_t(q_ptr, rows, c * BD + tl.arange(0, BD), R, D),)
    for sample in range(tl.program_id(0) // blocks, B, tl.num_programs(0) // blocks):
        b = tl.cast(sample, tl.int64)
        _, hi = token_span(b, span_ptr, N, MASK)
        row, at, count = sample_start(b, span_ptr, N, stride_xb, stride_xn, hi, MASK)
        n, keep = tokens_kept(b, 0, BN, hi, words_ptr, W, MASK)
        mean, rstd = load_moments(mean_ptr, rstd_ptr, row, n, keep, NORM)
        parts = tl.zeros([SPLITS, BN, BR], tl.float32)
        x = ()
        for c in tl.static_range(NC):
            cols = c * BD + tl.arange(0, BD)
            x_c = load_normed(x_ptr + at, n, cols, keep, stride_xn, D, mean, rstd, NORM)
            x += (x_c,)
            parts = split_dot(x_c, q[c], parts, UPCAST)
        m = tl.full([BR], float("-inf"), tl.float32)
        total = tl.zeros([BR], tl.float32)
        p, m, total, _ = softmax_step(tl.sum(parts, 0), m, total, keep)
        inverse = tl.where(total > 0, 1.0 / total, 0.0)
        if DROPOUT:
            p = tl.where(rows_keep(keep_ptr, b, 0, BN, rows, N, R), p, 0.0)
            tl.store(ksum_ptr + b * R + rows, tl.sum(p, 0) * inverse, mask=rows < R)
        p = p.to(x_ptr.dtype.element_ty)
        for c in tl.static_range(NC):
            cols = c * BD + tl.arange(0, BD)
            z = dot(tl.trans(x[c]), p, tl.zeros([BD, BR], tl.float32), UPCAST)
            store_rows_t(z_ptr + b * R * D, z * inverse[None, :], rows, cols, R, D)
        store_sums(sums_ptr, b, rows, R, m, total)
