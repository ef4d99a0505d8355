"""Backward of query pooling on sm_90, in one pass over X. For the equations see backward.py.

For the division of work see hopper_tokens.py. Of each tile of tokens

    S^T = X Q'^T           the first consumer
    dP^T = X dZ^T          the second; both then compute P and dS from both
    dX = P^T dZ + dS^T Q'  each consumer computes its columns
    dQ'^T += X^T dS^T      each consumer computes its columns

A chunk of dX takes the place of the chunk of X in shared memory, and TMA stores it from there.
dQ'^T stays in registers, for all samples of a block if they share the queries.

The first tile of a sample is Z: the second consumer multiplies it by dZ^T like tokens, and the
diagonal of the result is delta, rounded like dP.
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
from .hopper_parts import other_terms, probabilities, product, store_dq, store_zeros
from .hopper_tokens import (
    BD,
    BN,
    descriptor,
    kept,
    load_rows,
    load_tile,
    rewrite_half,
    rows_kept,
    span_of,
    word_of,
)
from .plans import HopperTile

# Registers of the threads of a consumer and of the producer: together all of a multiprocessor.
REGISTERS = gl.constexpr([240, 24])


def launch(
    tile: HopperTile,
    tokens: dict[str, Any],
    query: dict[str, Any],
    saved: dict[str, Any],
    dx: Tensor,
    dq: Tensor,
) -> None:
    """Launch the kernel with the arguments of ``onepass_backward_kernel``."""
    x = tokens["x_ptr"]
    need_dx = dx.numel() > 0
    named = {name: tokens[name] for name in ("words_ptr", "span_ptr", "mean_ptr", "rstd_ptr")}
    named |= {name: value for name, value in saved.items() if name != "z_ptr"}
    hopper_backward_kernel[(dq.shape[0],)](
        x_desc=descriptor(x, BN.value),
        q_desc=descriptor(query["q_ptr"], tile.BR),
        z_desc=descriptor(saved["z_ptr"], BN.value),
        dz_desc=descriptor(query["dz_ptr"], tile.BR),
        dx_desc=descriptor(dx, BN.value) if need_dx else None,
        **named,
        dq_ptr=dq,
        B=x.shape[0],
        **{name: tokens[name] for name in ("N", "W", "R", "D", "MASK", "NORM")},
        SLOTS=tile.SLOTS,
        CHUNKS=tile.CHUNKS,
        PER_SAMPLE=query["q_ptr"].dim() == 3,
        NEED_DX=need_dx,
        num_warps=4,
        **OPTIONS,
    )


@gluon.jit
def _producer(
    descs,
    filled,
    span_ptr,
    B,
    N,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    PER_SAMPLE: gl.constexpr,
    NEED_DX: gl.constexpr,
):
    """Load z, dz and the tokens of each sample, and the queries."""
    x_desc, q_desc, z_desc, dz_desc = descs
    ring, q, dz, full, empty, q_full, dz_full, dz_empty = filled
    step = 0
    turn = 0
    if not PER_SAMPLE:
        load_rows(q_desc, 0, 0, q_full.index(0), q, CHUNKS)
    for b in range(gl.program_id(0), B, gl.num_programs(0)):
        step = load_tile(z_desc, b, 0, ring, full, empty, step, SLOTS, CHUNKS)
        mbarrier.wait(dz_empty.index(0), (turn & 1) ^ 1)
        load_rows(dz_desc, b, 0, dz_full.index(0), dz, CHUNKS)
        if PER_SAMPLE:
            load_rows(q_desc, b, 0, q_full.index(0), q, CHUNKS)
        turn += 1
        lo, hi = span_of(b, span_ptr, N, MASK)
        first = lo
        last = hi
        if NEED_DX and MASK != "none":  # beside [lo, hi), zeros from beyond the last token
            first = 0
            last = N
        for start in range(first, last, BN):
            row = gl.where((start >= lo) & (start < hi), start, N)
            step = load_tile(x_desc, b, row, ring, full, empty, step, SLOTS, CHUNKS)


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
    PER_SAMPLE: gl.constexpr,
    NEED_DX: gl.constexpr,
):
    """Compute dX and dQ' for one half of the columns."""
    dx_desc, shared, tokens, saved, dq_ptr, B, R = call
    ring, q, dz, parts, ds_tiles, stats, full, empty, ready, taken, fixed = shared[:11]
    q_full, dz_full, dz_empty = shared[11:]
    words_ptr, span_ptr, mean_ptr, rstd_ptr, N, W = tokens
    sums_ptr, keep_ptr, _, _, dlse_ptr = saved
    BR: gl.constexpr = ds_tiles.shape[2]
    HALF: gl.constexpr = CHUNKS // 2
    dtype: gl.constexpr = ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BR, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, X, 2)
    token = gl.arange(0, BN, layout=gl.SliceLayout(1, S))
    row = gl.arange(0, BR, layout=ROW)
    ds_tile = ds_tiles.index(half)
    step = 0
    turn = 0
    tile = 0
    dq = ()
    for _ in gl.static_range(HALF):
        dq += (gl.zeros([BD, BR], gl.float32, layout=S),)
    if not PER_SAMPLE:
        mbarrier.wait(q_full.index(0), 0)
    for b in range(gl.program_id(0), B, gl.num_programs(0)):
        mbarrier.wait(dz_full.index(0), turn & 1)
        if PER_SAMPLE:
            mbarrier.wait(q_full.index(0), turn & 1)
        turn += 1
        # delta
        mbarrier.wait(taken.index(half), (tile & 1) ^ 1)
        if half == 1:
            parts.index(half).store(product(dz, ring, full, step, BR, SLOTS, CHUNKS, S))
            for i in gl.static_range(CHUNKS):
                mbarrier.arrive(empty.index((step + i) % SLOTS), count=1)
        mbarrier.arrive(ready.index(half), count=1)
        mbarrier.wait(ready.index(1 - half), tile & 1)
        zdz = parts.index(1).load(S)
        mbarrier.arrive(taken.index(1 - half), count=1)
        step += CHUNKS
        tile += 1
        delta = gl.sum(gl.where(token[:, None] == row[None, :], zdz, 0.0), 0)
        # What is known of each row goes to shared memory, because registers are scarce.
        at = b.to(gl.int64) * R + row
        stats.index(5 * half).store(gl.load(sums_ptr + 2 * at, mask=row < R, other=float("inf")))
        stats.index(5 * half + 1).store(gl.load(sums_ptr + 2 * at + 1, mask=row < R, other=0.0))
        stats.index(5 * half + 2).store(delta)
        if DROPOUT or dlse_ptr is not None:
            kept_term, dropped_term = other_terms(saved, at, row < R, ROW, DROPOUT)
            stats.index(5 * half + 3).store(kept_term)
            stats.index(5 * half + 4).store(dropped_term - delta)
        lo, hi = span_of(b, span_ptr, N, MASK)
        if NEED_DX and MASK != "none":
            step = store_zeros(half, dx_desc, b, 0, lo, ring, full, empty, step, SLOTS, CHUNKS)
        for start in range(lo, hi, BN):
            word = word_of(b, start, words_ptr, W, MASK)
            if MASK != "none" or NORM:
                rewrite_half(
                    half, ring, full, step, word, b, start, hi, tokens, D, SLOTS, CHUNKS, MASK, NORM
                )
                # The products need both halves. ``tile - turn`` tiles of tokens came before.
                mbarrier.arrive(fixed.index(half), count=1)
                mbarrier.wait(fixed.index(1 - half), (tile - turn) & 1)
            own = product(q if half == 0 else dz, ring, full, step, BR, SLOTS, CHUNKS, S)
            mbarrier.wait(taken.index(half), (tile & 1) ^ 1)
            parts.index(half).store(own)
            mbarrier.arrive(ready.index(half), count=1)
            keep = kept(word, start, hi, token, MASK)
            # What needs one product only comes before the wait, so that fewer values are live.
            if half == 0:
                s = own
                p = probabilities(s, keep, stats.index(5 * half), stats.index(5 * half + 1), ROW)
                mbarrier.wait(ready.index(1), tile & 1)
                dp = parts.index(1).load(S)
                mbarrier.arrive(taken.index(1), count=1)
                centred = dp - stats.index(5 * half + 2).load(ROW)[None, :]
            else:
                dp = own
                centred = dp - stats.index(5 * half + 2).load(ROW)[None, :]
                mbarrier.wait(ready.index(0), tile & 1)
                s = parts.index(0).load(S)
                mbarrier.arrive(taken.index(0), count=1)
                p = probabilities(s, keep, stats.index(5 * half), stats.index(5 * half + 1), ROW)
            # dP - delta comes first, so that it is 0 if one token has all the weight.
            if DROPOUT or dlse_ptr is not None:
                centred += stats.index(5 * half + 3).load(ROW)[None, :]
            if DROPOUT:
                keep = rows_kept(keep_ptr, b, start, token, row, N, R)
                dropped = stats.index(5 * half + 4).load(ROW)[None, :]
                ds = p * gl.where(keep, centred, dropped)
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
                g_x = gl.sum(p * dp + ds * s, 1) / D
                g_x = gl.convert_layout(g_x, gl.SliceLayout(1, X))
                n = gl.arange(0, BN, layout=gl.SliceLayout(1, X))
                valid = kept(word, start, hi, n, MASK)  # rstd of an ignored token may be inf
                at_token = rstd_ptr + b.to(gl.int64) * N + start + n
                rstd = gl.load(at_token, mask=valid, other=0.0)
            fence_async_shared()
            new_dq = ()
            for i in gl.static_range(HALF):
                slot = (step + 2 * i + half) % SLOTS
                x = ring.index(slot).reshape([BN, BD])
                dq_i = warpgroup_mma(x.permute([1, 0]), ds_tile, dq[i], is_async=True)
                if NEED_DX:
                    rows = half * HALF + i
                    dx = warpgroup_mma_init(gl.zeros([BN, BD], gl.float32, layout=X))
                    dx = warpgroup_mma(p_a, dz.index(rows).reshape([BR, BD]), dx, is_async=True)
                    dx = warpgroup_mma(ds_a, q.index(rows).reshape([BR, BD]), dx, is_async=True)
                    dq_i, dx = warpgroup_mma_wait(0, deps=[dq_i, dx])
                    if NORM:
                        x_hat = x.load(X).to(gl.float32)
                        dx = (dx - x_hat * g_x[:, None]) * rstd[:, None]
                    x.store(dx.to(dtype))
                    fence_async_shared()
                    store(dx_desc, [b, start, rows * BD], ring.index(slot))
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
            tile += 1
        mbarrier.arrive(dz_empty.index(0), count=1)
        if NEED_DX and MASK != "none":
            end = gl.maximum(lo, (hi + BN - 1) // BN * BN)
            step = store_zeros(half, dx_desc, b, end, N, ring, full, empty, step, SLOTS, CHUNKS)
        if PER_SAMPLE:
            mbarrier.wait(taken.index(half), (tile & 1) ^ 1)
            store_dq(half, dq_ptr, b.to(gl.int64), dq, parts.index(half), R, D, CHUNKS)
            new_dq = ()
            for _ in gl.static_range(HALF):
                new_dq += (gl.zeros([BD, BR], gl.float32, layout=S),)
            dq = new_dq
    if not PER_SAMPLE:
        mbarrier.wait(taken.index(half), (tile & 1) ^ 1)
        store_dq(half, dq_ptr, gl.program_id(0), dq, parts.index(half), R, D, CHUNKS)


@gluon.jit
def hopper_backward_kernel(
    x_desc,  # (B, N, D), boxes of (1, BN, BD)
    q_desc,  # (1, R, D) or (B, R, D), boxes of (1, BR, BD)
    z_desc,  # (B, R, D), boxes of (1, BN, BD)
    dz_desc,  # (B, R, D), boxes of (1, BR, BD)
    dx_desc,  # (B, N, D), boxes of (1, BN, BD)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,) or spans (B, 2)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, N / 64, R) int64
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
    PER_SAMPLE: gl.constexpr,
    NEED_DX: gl.constexpr,
):
    """Compute dX and partial sums of dQ' in one pass over X, for R <= BR. Grid (partials,).

    Program i processes the samples i, i + partials, ...
    """
    BR: gl.constexpr = q_desc.block_type.shape[1]
    DS: gl.constexpr = gl.NVMMASharedLayout(2 * BR, 16, rank=2)
    PARTS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, BR // 8, [1, 0])
    STATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 1, BN, BD], x_desc.layout)
    q = gl.allocate_shared_memory(x_desc.dtype, [CHUNKS, 1, BR, BD], q_desc.layout)
    dz = gl.allocate_shared_memory(x_desc.dtype, [CHUNKS, 1, BR, BD], dz_desc.layout)
    ds_tiles = gl.allocate_shared_memory(x_desc.dtype, [2, BN, BR], DS)
    parts = gl.allocate_shared_memory(gl.float32, [2, BN, BR], PARTS)
    stats = gl.allocate_shared_memory(gl.float32, [10, BR], STATS)
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 1)
    ready = barriers(2, 1)
    taken = barriers(2, 1)
    fixed = barriers(2, 1)
    q_full = barriers(1, 1)
    dz_full = barriers(1, 1)
    dz_empty = barriers(1, 2)
    shared = (ring, q, dz, parts, ds_tiles, stats, full, empty, ready, taken, fixed)
    shared += (q_full, dz_full, dz_empty)
    tokens = (words_ptr, span_ptr, mean_ptr, rstd_ptr, N, W)
    saved = (sums_ptr, keep_ptr, ksum_ptr, dksum_ptr, dlse_ptr)
    call = (dx_desc, shared, tokens, saved, dq_ptr, B, R)
    descs = (x_desc, q_desc, z_desc, dz_desc)
    filled = (ring, q, dz, full, empty, q_full, dz_full, dz_empty)
    gl.warp_specialize(
        [
            (_consumer, (0, call, D, SLOTS, CHUNKS, MASK, NORM, DROPOUT, PER_SAMPLE, NEED_DX)),
            (_consumer, (1, call, D, SLOTS, CHUNKS, MASK, NORM, DROPOUT, PER_SAMPLE, NEED_DX)),
            (
                _producer,
                (descs, filled, span_ptr, B, N, SLOTS, CHUNKS, MASK, PER_SAMPLE, NEED_DX),
            ),
        ],
        [4, 1],
        REGISTERS,
    )
