"""Backward of query pooling on sm_90 for short samples, of up to 32 tokens and 16 rows.

Like hopper_backward.py, except that a tile holds all tokens of two samples, which have the same
queries. The tokens of a sample are never multiplied with values of the other, so that a NaN stays
in its sample:

    S^T = X Q'^T             one product, because the queries are shared
    dP^T = X dZ^T            a product for each sample's dZ; each token takes its own sample's
    dX = P^T dZ + dS^T Q'    the same
    dQ'^T += X^T dS^T        one product, because dQ' is a sum over samples
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon import barriers, store
from ..tiles import OPTIONS
from .hopper_backward import REGISTERS
from .hopper_parts import other_terms, product, store_dq
from .hopper_tokens import BD, BN, LOG2E, ROWS, descriptor, load_rows, load_tile, rewrite
from .plans import PAIR_TOKENS, HopperTile

TOKENS = gl.constexpr(PAIR_TOKENS)


def launch(
    tile: HopperTile,
    tokens: dict[str, Any],
    query: dict[str, Any],
    saved: dict[str, Any],
    dx: Tensor,
    dq: Tensor,
) -> None:
    """Launch the kernel with the arguments of ``hopper_backward.launch``."""
    x = tokens["x_ptr"]
    need_dx = dx.numel() > 0
    named = {name: tokens[name] for name in ("words_ptr", "span_ptr", "mean_ptr", "rstd_ptr")}
    named |= {name: value for name, value in saved.items() if name != "z_ptr"}
    pairs_backward_kernel[(dq.shape[0],)](
        x_desc=descriptor(x, TOKENS.value, samples=2),
        q_desc=descriptor(query["q_ptr"], tile.BR),
        z_desc=descriptor(saved["z_ptr"], TOKENS.value, samples=2),
        dz_desc=descriptor(query["dz_ptr"], tile.BR),
        dx_desc=descriptor(dx, TOKENS.value, samples=2) if need_dx else None,
        **named,
        dq_ptr=dq,
        B=x.shape[0],
        **{name: tokens[name] for name in ("N", "W", "R", "D", "MASK", "NORM")},
        SLOTS=tile.SLOTS,
        CHUNKS=tile.CHUNKS,
        NEED_DX=need_dx,
        num_warps=4,
        **OPTIONS,
    )


@gluon.jit
def _kept(
    b,
    token,
    tokens,
    B,
    MASK: gl.constexpr,
):
    """Return which tokens are valid in the tile of the samples b and b + 1."""
    words_ptr, span_ptr, _, _, N, W = tokens
    sample = b + token // TOKENS
    n = token % TOKENS
    keep = (sample < B) & (n < N)
    if MASK == "lengths":
        keep = keep & (n < gl.load(span_ptr + sample, mask=sample < B, other=0))
    if MASK == "padding":
        word = gl.load(words_ptr + sample * W, mask=sample < B, other=0)
        keep = keep & (((word >> n.to(gl.int64)) & 1) != 0)
    return keep


@gluon.jit
def _rewrite_pair(
    half: gl.constexpr,
    ring,
    full,
    step,
    b,
    tokens,
    B,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    NORM: gl.constexpr,
):
    """Set ignored tokens to 0 and normalise the others, in one half of the columns."""
    _, _, _, _, N, _ = tokens
    token = gl.arange(0, BN, layout=gl.SliceLayout(1, ROWS))
    n = (b.to(gl.int64) + token // TOKENS) * N + token % TOKENS
    keep = _kept(b, token, tokens, B, MASK)
    rewrite(half, ring, full, step, keep, n, tokens, D, SLOTS, CHUNKS, NORM)


@gluon.jit
def _of_token(
    second,
    one,
    other,
):
    """Select for each token the value of its sample: ``one``, or ``other`` in the second sample."""
    return gl.where(second, other[None, :], one[None, :])


@gluon.jit
def _rows_kept(
    keep_ptr,
    b,
    token,
    row,
    B,
    R,
):
    """Return which probabilities of a tile are kept by dropout, (tokens, rows)."""
    at = keep_ptr + b.to(gl.int64) * R + row
    one = gl.load(at, mask=row < R, other=0)
    other = gl.load(at + R, mask=(row < R) & (b + 1 < B), other=0)
    word = _of_token((token >= TOKENS)[:, None], one, other)
    return ((word >> (token % TOKENS).to(gl.int64)[:, None]) & 1) != 0


@gluon.jit
def _producer(
    descs,
    filled,
    B,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """Load the queries, and z, dz and the tokens of each pair."""
    x_desc, q_desc, z_desc, dz_desc = descs
    ring, q, dz, full, empty, q_full, dz_full, dz_empty = filled
    load_rows(q_desc, 0, 0, q_full.index(0), q, CHUNKS)
    step = 0
    turn = 0
    for pair in range(gl.program_id(0), (B + 1) // 2, gl.num_programs(0)):
        step = load_tile(z_desc, 2 * pair, 0, ring, full, empty, step, SLOTS, CHUNKS)
        mbarrier.wait(dz_empty.index(0), (turn & 1) ^ 1)
        for sample in gl.static_range(2):
            load_rows(dz_desc, 2 * pair + sample, 0, dz_full.index(0), dz[sample], CHUNKS)
        turn += 1
        step = load_tile(x_desc, 2 * pair, 0, ring, full, empty, step, SLOTS, CHUNKS)


@gluon.jit
def _sums_of(
    saved,
    sample,
    row,
    B,
    R,
    ROW: gl.constexpr,
    DROPOUT: gl.constexpr,
):
    """Return the statistics of each row of a sample, and the other terms of dS / P."""
    sums_ptr, _, _, _, dlse_ptr = saved
    at = sample.to(gl.int64) * R + row
    inside = (row < R) & (sample < B)
    m = gl.load(sums_ptr + 2 * at, mask=inside, other=float("inf"))
    log_total = gl.load(sums_ptr + 2 * at + 1, mask=inside, other=0.0)
    kept_term = 0.0
    dropped_term = 0.0
    if DROPOUT or dlse_ptr is not None:
        kept_term, dropped_term = other_terms(saved, at, inside, ROW, DROPOUT)
    return m, log_total, kept_term, dropped_term


@gluon.jit
def _consumer(
    half: gl.constexpr,
    call,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    NORM: gl.constexpr,
    DROPOUT: gl.constexpr,
    NEED_DX: gl.constexpr,
):
    """Compute dX and dQ' for one half of the columns."""
    dx_desc, shared, tokens, saved, dq_ptr, B, R = call
    ring, q, dz, parts, ds_tiles, full, empty, ready, taken, fixed = shared[:10]
    q_full, dz_full, dz_empty = shared[10:]
    _, _, _, rstd_ptr, N, _ = tokens
    _, keep_ptr, _, _, dlse_ptr = saved
    BR: gl.constexpr = ds_tiles.shape[2]
    HALF: gl.constexpr = CHUNKS // 2
    dtype: gl.constexpr = ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BR, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, X, 2)
    token = gl.arange(0, BN, layout=gl.SliceLayout(1, S))
    row = gl.arange(0, BR, layout=ROW)
    second = (token >= TOKENS)[:, None]
    second_x = (gl.arange(0, BN, layout=gl.SliceLayout(1, X)) >= TOKENS)[:, None]
    ds_tile = ds_tiles.index(half)
    step = 0
    turn = 0
    dq = ()
    for _ in gl.static_range(HALF):
        dq += (gl.zeros([BD, BR], gl.float32, layout=S),)
    mbarrier.wait(q_full.index(0), 0)
    for pair in range(gl.program_id(0), (B + 1) // 2, gl.num_programs(0)):
        b = 2 * pair
        mbarrier.wait(dz_full.index(0), turn & 1)
        # delta: each consumer computes the product of one sample. There are two exchanges a turn.
        mbarrier.wait(taken.index(half), 1)
        parts.index(half).store(product(dz[half], ring, full, step, BR, SLOTS, CHUNKS, S))
        mbarrier.arrive(ready.index(half), count=1)
        mbarrier.wait(ready.index(1 - half), 0)
        for i in gl.static_range(HALF):  # the other consumer has finished its product, too
            mbarrier.arrive(empty.index((step + 2 * i + half) % SLOTS), count=1)
        diagonal = token[:, None] == row[None, :]
        delta_0 = gl.sum(gl.where(diagonal, parts.index(0).load(S), 0.0), 0)
        diagonal = token[:, None] == TOKENS + row[None, :]
        delta_1 = gl.sum(gl.where(diagonal, parts.index(1).load(S), 0.0), 0)
        delta = _of_token(second, delta_0, delta_1)
        mbarrier.arrive(taken.index(1 - half), count=1)
        step += CHUNKS
        m_0, log_total_0, kept_0, dropped_0 = _sums_of(saved, b, row, B, R, ROW, DROPOUT)
        m_1, log_total_1, kept_1, dropped_1 = _sums_of(saved, b + 1, row, B, R, ROW, DROPOUT)
        if MASK != "none" or NORM:
            _rewrite_pair(half, ring, full, step, b, tokens, B, D, SLOTS, CHUNKS, MASK, NORM)
            mbarrier.arrive(fixed.index(half), count=1)  # the products need both halves
            mbarrier.wait(fixed.index(1 - half), turn & 1)
        if half == 0:
            own = product(q, ring, full, step, BR, SLOTS, CHUNKS, S)
        else:
            own = product(dz[0], ring, full, step, BR, SLOTS, CHUNKS, S)
            dp_1 = product(dz[1], ring, full, step, BR, SLOTS, CHUNKS, S)
            own = gl.where(second, dp_1, own)
        mbarrier.wait(taken.index(half), 0)
        parts.index(half).store(own)
        mbarrier.arrive(ready.index(half), count=1)
        mbarrier.wait(ready.index(1 - half), 1)
        other = parts.index(1 - half).load(S)
        mbarrier.arrive(taken.index(1 - half), count=1)
        s = own if half == 0 else other
        dp = other if half == 0 else own
        p = s - _of_token(second, m_0, m_1)
        p = gl.exp2((p - _of_token(second, log_total_0, log_total_1)) * LOG2E)
        p = gl.where(_kept(b, token, tokens, B, MASK)[:, None], p, 0.0)
        # dP - delta comes first, so that it is 0 if one token has all the weight.
        centred = dp - delta
        if DROPOUT or dlse_ptr is not None:
            centred += _of_token(second, kept_0, kept_1)
        if DROPOUT:
            keep = _rows_kept(keep_ptr, b, token, row, B, R)
            ds = p * gl.where(keep, centred, _of_token(second, dropped_0, dropped_1) - delta)
            p = gl.where(keep, p, 0.0)
        else:
            ds = p * centred
        p = p.to(dtype)
        ds = ds.to(dtype)
        ds_tile.store(ds)
        if NEED_DX:
            p_a = gl.convert_layout(p, A)
            ds_a = gl.convert_layout(ds, A)
        if NEED_DX and NORM:
            g_x = gl.convert_layout(gl.sum(p * dp + ds * s, 1) / D, gl.SliceLayout(1, X))
            n = gl.arange(0, BN, layout=gl.SliceLayout(1, X))
            at_token = rstd_ptr + (b.to(gl.int64) + n // TOKENS) * N + n % TOKENS
            # rstd of an ignored token may be inf
            rstd = gl.load(at_token, mask=_kept(b, n, tokens, B, MASK), other=0.0)
        fence_async_shared()
        new_dq = ()
        for i in gl.static_range(HALF):
            slot = (step + 2 * i + half) % SLOTS
            x = ring.index(slot).reshape([BN, BD])
            dq_i = warpgroup_mma(x.permute([1, 0]), ds_tile, dq[i], is_async=True)
            if NEED_DX:
                rows = half * HALF + i
                dxs = ()
                for sample in gl.static_range(2):
                    dx = warpgroup_mma_init(gl.zeros([BN, BD], gl.float32, layout=X))
                    dz_rows = dz[sample].index(rows).reshape([BR, BD])
                    dx = warpgroup_mma(p_a, dz_rows, dx, is_async=True)
                    q_rows = q.index(rows).reshape([BR, BD])
                    dxs += (warpgroup_mma(ds_a, q_rows, dx, is_async=True),)
                dq_i, dx_0, dx_1 = warpgroup_mma_wait(0, deps=[dq_i, dxs[0], dxs[1]])
                dx = gl.where(second_x, dx_1, dx_0)
                if NORM:
                    x_hat = x.load(X).to(gl.float32)
                    dx = (dx - x_hat * g_x[:, None]) * rstd[:, None]
                x.store(dx.to(dtype))
                fence_async_shared()
                store(dx_desc, [b, 0, rows * BD], ring.index(slot))
                if i > 0:  # the store before has read its slot
                    tma.store_wait(1)
                    mbarrier.arrive(empty.index((slot + SLOTS - 2) % SLOTS), count=1)
                if i == HALF - 1:
                    tma.store_wait(0)
                    mbarrier.arrive(empty.index(slot), count=1)
            else:
                dq_i = warpgroup_mma_wait(0, deps=[dq_i])
                mbarrier.arrive(empty.index(slot), count=1)
            new_dq += (dq_i,)
        dq = new_dq
        step += CHUNKS
        turn += 1
        mbarrier.arrive(dz_empty.index(0), count=1)
    mbarrier.wait(taken.index(half), 1)
    store_dq(half, dq_ptr, gl.program_id(0), dq, parts.index(half), R, D, CHUNKS)


@gluon.jit
def pairs_backward_kernel(
    x_desc,  # (B, N, D), boxes of (2, TOKENS, BD)
    q_desc,  # (1, R, D), boxes of (1, BR, BD)
    z_desc,  # (B, R, D), boxes of (2, TOKENS, BD)
    dz_desc,  # (B, R, D), boxes of (1, BR, BD)
    dx_desc,  # (B, N, D), boxes of (2, TOKENS, BD)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, 1, R) int64
    ksum_ptr,  # (B, R) float32
    dksum_ptr,  # (B, R) float32
    dlse_ptr,  # (B, R) float32
    dq_ptr,  # (partials, R, D)
    B,
    N,
    W,
    R,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    NORM: gl.constexpr,
    DROPOUT: gl.constexpr,
    NEED_DX: gl.constexpr,
):
    """Compute dX and partial sums of dQ' in one pass over X. Grid (partials,).

    Program i processes the pairs i, i + partials, ...
    """
    BR: gl.constexpr = q_desc.block_type.shape[1]
    DS: gl.constexpr = gl.NVMMASharedLayout(2 * BR, 16, rank=2)
    PARTS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, BR // 8, [1, 0])
    ring = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 2, TOKENS, BD], x_desc.layout)
    q = gl.allocate_shared_memory(x_desc.dtype, [CHUNKS, 1, BR, BD], q_desc.layout)
    dz_0 = gl.allocate_shared_memory(x_desc.dtype, [CHUNKS, 1, BR, BD], dz_desc.layout)
    dz_1 = gl.allocate_shared_memory(x_desc.dtype, [CHUNKS, 1, BR, BD], dz_desc.layout)
    dz = (dz_0, dz_1)
    ds_tiles = gl.allocate_shared_memory(x_desc.dtype, [2, BN, BR], DS)
    parts = gl.allocate_shared_memory(gl.float32, [2, BN, BR], PARTS)
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 1)
    ready = barriers(2, 1)
    taken = barriers(2, 1)
    fixed = barriers(2, 1)
    q_full = barriers(1, 1)
    dz_full = barriers(1, 2)
    dz_empty = barriers(1, 2)
    shared = (ring, q, dz, parts, ds_tiles, full, empty, ready, taken, fixed)
    shared += (q_full, dz_full, dz_empty)
    tokens = (words_ptr, span_ptr, mean_ptr, rstd_ptr, N, W)
    saved = (sums_ptr, keep_ptr, ksum_ptr, dksum_ptr, dlse_ptr)
    call = (dx_desc, shared, tokens, saved, dq_ptr, B, R)
    descs = (x_desc, q_desc, z_desc, dz_desc)
    filled = (ring, q, dz, full, empty, q_full, dz_full, dz_empty)
    gl.warp_specialize(
        [
            (_consumer, (0, call, D, SLOTS, CHUNKS, MASK, NORM, DROPOUT, NEED_DX)),
            (_consumer, (1, call, D, SLOTS, CHUNKS, MASK, NORM, DROPOUT, NEED_DX)),
            (_producer, (descs, filled, B, SLOTS, CHUNKS)),
        ],
        [4, 1],
        REGISTERS,
    )
