"""Parts of the Gluon kernel of the backward; see hopper_backward.py."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon import store
from .hopper_tokens import BD, BN, LOG2E


@gluon.jit
def product(
    rows,
    ring,
    full,
    step,
    BR: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    S: gl.constexpr,
):
    """Return the product of a tile of tokens and of rows, over all columns."""
    acc = warpgroup_mma_init(gl.zeros([BN, BR], gl.float32, layout=S))
    for i in range(CHUNKS):  # unrolled, it would keep too many addresses in registers
        at = step + i
        mbarrier.wait(full.index(at % SLOTS), (at // SLOTS) & 1)
        x = ring.index(at % SLOTS).reshape([BN, BD])
        rows_t = rows.index(i % 2 * (CHUNKS // 2) + i // 2).reshape([BR, BD]).permute([1, 0])
        acc = warpgroup_mma(x, rows_t, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def store_zeros(
    half: gl.constexpr,
    dx_desc,
    b,
    first,
    last,
    ring,
    full,
    empty,
    step,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """Store dX = 0 for the tiles from ``first`` to ``last``, to which no query attends.

    The producer has loaded them from beyond the end of the sample, so that they are 0.
    """
    for start in range(first, last, BN):
        for i in range(CHUNKS // 2):
            at = step + 2 * i + half
            mbarrier.wait(full.index(at % SLOTS), (at // SLOTS) & 1)
            col = (half * (CHUNKS // 2) + i) * BD
            store(dx_desc, [b, start, col], ring.index(at % SLOTS))
            tma.store_wait(0)
            mbarrier.arrive(empty.index(at % SLOTS), count=1)
        step += CHUNKS
    return step


@gluon.jit
def store_dq(
    half: gl.constexpr,
    dq_ptr,
    index,
    dq,
    free,
    R,
    D: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """Store one half of dQ'^T as dQ' number ``index``. ``free`` is shared memory."""
    BR: gl.constexpr = free.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [BR // 16, 64 // BR], [1, 0])
    row = gl.arange(0, BR, layout=gl.SliceLayout(1, OUT))[:, None]
    col = half * (CHUNKS // 2) * BD + gl.arange(0, BD, layout=gl.SliceLayout(0, OUT))[None, :]
    base = dq_ptr + index * R * D
    for i in gl.static_range(CHUNKS // 2):
        free.store(dq[i])
        out = free.permute([1, 0]).load(OUT).to(dq_ptr.dtype.element_ty)
        inside = (row < R) & (i * BD + col < D)
        gl.store(base + row * D + i * BD + col, out, mask=inside)


@gluon.jit
def other_terms(
    saved,
    at,
    inside,
    ROW: gl.constexpr,
    DROPOUT: gl.constexpr,
):
    """Return the terms of dS / P beside dP - delta, for kept and for dropped probabilities."""
    _, _, ksum_ptr, dksum_ptr, dlse_ptr = saved
    kept_term = gl.zeros(at.shape, gl.float32, layout=ROW)
    dropped_term = kept_term
    if DROPOUT:
        dksum = gl.load(dksum_ptr + at, mask=inside, other=0.0)
        ksum = gl.load(ksum_ptr + at, mask=inside, other=0.0)
        kept_term = dksum * (1.0 - ksum)
        dropped_term = -dksum * ksum
    if dlse_ptr is not None:
        dlse = gl.load(dlse_ptr + at, mask=inside, other=0.0)
        kept_term += dlse
        dropped_term += dlse
    return kept_term, dropped_term


@gluon.jit
def probabilities(
    s,
    keep,
    m_tile,
    log_total_tile,
    ROW: gl.constexpr,
):
    """Return the probabilities of the logits s (tokens, rows)."""
    s = s - m_tile.load(ROW)[None, :]
    p = gl.exp2((s - log_total_tile.load(ROW)[None, :]) * LOG2E)
    return gl.where(keep[:, None], p, 0.0)
