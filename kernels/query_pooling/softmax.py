"""Device functions for the softmax over the tokens of a sample, the first axis of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E


@triton.jit
def softmax_step(
    s,
    m,
    total,
    keep,
):
    """Process one tile of the online softmax over the first axis.

    Return unnormalised p, the new maximum and sum, and alpha, the factor that rescales old sums.
    """
    s = tl.where(keep[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 0))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    # Subtract before scaling, because the difference of two close logits is exact.
    p = tl.exp2((s - shift[None, :]) * LOG2E)
    alpha = tl.exp2((m - shift) * LOG2E)
    return p, m_new, total * alpha + tl.sum(p, 0), alpha


@triton.jit
def store_sums(
    sums_ptr,
    b,
    rows,
    R,
    m,
    total,
):
    """Store the statistics of each row, and return them; see forward.py for ``sums``."""
    empty = total == 0
    m = tl.where(empty, float("inf"), m)
    log_total = tl.log(tl.where(empty, 1.0, total))
    at = sums_ptr + 2 * (b * R + rows)
    tl.store(at, m, mask=rows < R)
    tl.store(at + 1, log_total, mask=rows < R)
    return m, log_total


@triton.jit
def load_sums(
    sums_ptr,
    b,
    rows,
    R,
):
    """Load what :func:`store_sums` stored."""
    at = sums_ptr + 2 * (b * R + rows)
    m = tl.load(at, mask=rows < R, other=float("inf"))
    return m, tl.load(at + 1, mask=rows < R, other=0.0)


@triton.jit
def probabilities(
    s,
    m,
    log_total,
):
    """Return the probabilities (tokens, rows) of the logits s."""
    return tl.exp2((s - m[None, :] - log_total[None, :]) * LOG2E)
