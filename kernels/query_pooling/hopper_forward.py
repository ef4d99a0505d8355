"""Forward of query pooling on sm_90, in one pass over X. For the equations see forward.py.

For the division of work see hopper_tokens.py. Of each tile of tokens

    S^T = X Q'^T     each consumer computes the part of its columns; both add the other's part
    Z^T += X^T P^T   each consumer computes its columns

so that the softmax is computed twice, and nothing else. Z^T stays in registers. A block walks over
the items b, a sample and BR of its rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon import barriers
from ..tiles import OPTIONS, cdiv, multiprocessors
from .hopper_tokens import (
    BD,
    BN,
    LOG2E,
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
REGISTERS = gl.constexpr([232, 40])


def launch(
    tile: HopperTile,
    tokens: dict[str, Any],
    query: dict[str, Any],
    out: dict[str, Any],
    sums: Tensor,
) -> None:
    """Launch the kernel with the arguments of ``onepass_forward_kernel``."""
    x, q = tokens["x_ptr"], query["q_ptr"]
    blocks = cdiv(tokens["R"], tile.BR)
    items = x.shape[0] * blocks
    named = {name: tokens[name] for name in ("words_ptr", "span_ptr", "mean_ptr", "rstd_ptr")}
    hopper_forward_kernel[(min(items, multiprocessors(x)),)](
        x_desc=descriptor(x, BN.value),
        q_desc=descriptor(q, tile.BR),
        **named,
        **out,
        sums_ptr=sums,
        items=items,
        blocks=blocks,
        **{name: tokens[name] for name in ("N", "W", "R", "D", "MASK", "NORM")},
        SLOTS=tile.SLOTS,
        CHUNKS=tile.CHUNKS,
        PER_SAMPLE=q.dim() == 3,
        num_warps=4,
        **OPTIONS,
    )


@gluon.jit
def _producer(
    filled,
    span_ptr,
    items,
    N,
    blocks,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    PER_SAMPLE: gl.constexpr,
):
    """Load the queries and tokens of each item."""
    x_desc, q_desc, ring, q, full, empty, q_full, q_empty = filled
    BR: gl.constexpr = q_desc.block_type.shape[1]
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b = item // blocks
        # If all items have the same queries, they are loaded once.
        if PER_SAMPLE or blocks > 1 or turn == 0:
            mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
            load_rows(
                q_desc, b if PER_SAMPLE else 0, item % blocks * BR, q_full.index(0), q, CHUNKS
            )
        turn += 1
        lo, hi = span_of(b, span_ptr, N, MASK)
        for start in range(lo, hi, BN):
            step = load_tile(x_desc, b, start, ring, full, empty, step, SLOTS, CHUNKS)


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
):
    """Pool the tokens of each item, for one half of the columns."""
    shared, tokens, out, items, R, blocks = call
    ring, q, p_tiles, parts, full, empty, ready, q_full, q_empty = shared
    words_ptr, span_ptr, mean_ptr, rstd_ptr, N, W = tokens
    z_ptr, sums_ptr, keep_ptr, ksum_ptr = out
    BR: gl.constexpr = p_tiles.shape[2]
    HALF: gl.constexpr = CHUNKS // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BR, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [BR // 16, 64 // BR], [1, 0])
    token = gl.arange(0, BN, layout=gl.SliceLayout(1, S))
    row = gl.arange(0, BR, layout=gl.SliceLayout(0, S))
    step = 0
    turn = 0
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b = item // blocks
        first = item % blocks * BR
        acc = ()
        for _ in gl.static_range(HALF):
            acc += (gl.zeros([BD, BR], gl.float32, layout=S),)
        m = gl.full([BR], float("-inf"), gl.float32, layout=gl.SliceLayout(0, S))
        total = gl.zeros([BR], gl.float32, layout=gl.SliceLayout(0, S))
        ksum = gl.zeros([BR], gl.float32, layout=gl.SliceLayout(0, S))
        if PER_SAMPLE or blocks > 1 or turn == 0:
            mbarrier.wait(q_full.index(0), turn & 1)
        turn += 1
        lo, hi = span_of(b, span_ptr, N, MASK)
        for start in range(lo, hi, BN):
            word = word_of(b, start, words_ptr, W, MASK)
            if MASK != "none" or NORM:
                rewrite_half(
                    half, ring, full, step, word, b, start, hi, tokens, D, SLOTS, CHUNKS, MASK, NORM
                )
            s = warpgroup_mma_init(gl.zeros([BN, BR], gl.float32, layout=S))
            for i in range(HALF):
                at = step + 2 * i + half
                mbarrier.wait(full.index(at % SLOTS), (at // SLOTS) & 1)
                x = ring.index(at % SLOTS).reshape([BN, BD])
                q_t = q.index(half * HALF + i).reshape([BR, BD]).permute([1, 0])
                s = warpgroup_mma(x, q_t, s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            # In turn two buffers: the other consumer may still read the part of the last tile.
            parity = tile & 1
            parts.index(2 * parity + half).store(s)
            mbarrier.arrive(ready.index(half), count=1)
            mbarrier.wait(ready.index(1 - half), parity)
            other = parts.index(2 * parity + 1 - half).load(S)
            s += other
            keep = kept(word, start, hi, token, MASK)
            s = gl.where(keep[:, None], s, float("-inf"))
            m_new = gl.maximum(m, gl.max(s, 0))
            shift = gl.where(m_new == float("-inf"), 0.0, m_new)
            # Subtract before scaling, because the difference of two close logits is exact.
            p = gl.exp2((s - shift[None, :]) * LOG2E)
            alpha = gl.exp2((m - shift) * LOG2E)
            total = total * alpha + gl.sum(p, 0)
            m = m_new
            if DROPOUT:
                p = gl.where(rows_kept(keep_ptr, b, start, token, first + row, N, R), p, 0.0)
                ksum = ksum * alpha + gl.sum(p, 0)
            p_tiles.index(half).store(p.to(ring.dtype))
            fence_async_shared()
            pooled = ()
            for i in gl.static_range(HALF):
                slot = (step + 2 * i + half) % SLOTS
                x_t = ring.index(slot).reshape([BN, BD]).permute([1, 0])
                scaled = acc[i] * alpha[None, :]
                pooled += (warpgroup_mma(x_t, p_tiles.index(half), scaled, is_async=True),)
            acc = ()
            for i in gl.static_range(HALF):
                acc += (warpgroup_mma_wait(HALF - 1 - i, deps=[pooled[i]]),)
                mbarrier.arrive(empty.index((step + 2 * i + half) % SLOTS), count=1)
            step += CHUNKS
            tile += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        inverse = gl.where(total > 0, 1.0 / total, 0.0)
        # The buffer of the next tile, which the other consumer does not read yet.
        free = parts.index(2 * (tile & 1) + half)
        out_row = first + gl.arange(0, BR, layout=gl.SliceLayout(1, OUT))
        out_col = half * HALF * BD + gl.arange(0, BD, layout=gl.SliceLayout(0, OUT))
        base = z_ptr + b.to(gl.int64) * R * D
        for i in gl.static_range(HALF):
            free.store(acc[i] * inverse[None, :])
            z = free.permute([1, 0]).load(OUT).to(ring.dtype)
            col = i * BD + out_col
            inside = (out_row[:, None] < R) & (col[None, :] < D)
            gl.store(base + out_row[:, None] * D + col[None, :], z, mask=inside)
        if half == 0:
            at = b.to(gl.int64) * R + first + row
            inside = first + row < R
            no_token = total == 0
            gl.store(sums_ptr + 2 * at, gl.where(no_token, float("inf"), m), mask=inside)
            log_total = gl.log(gl.where(no_token, 1.0, total))
            gl.store(sums_ptr + 2 * at + 1, log_total, mask=inside)
            if DROPOUT:
                gl.store(ksum_ptr + at, ksum * inverse, mask=inside)


@gluon.jit
def hopper_forward_kernel(
    x_desc,  # (B, N, D), boxes of (1, BN, BD)
    q_desc,  # (1, R, D) or (B, R, D), boxes of (1, BR, BD)
    words_ptr,  # (B, W) int64
    span_ptr,  # lengths (B,) or spans (B, 2)
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    z_ptr,  # (B, R, D)
    sums_ptr,  # (B, R, 2) float32
    keep_ptr,  # (B, N / 64, R) int64
    ksum_ptr,  # (B, R) float32
    items,
    N,
    W,
    R,
    blocks,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    NORM: gl.constexpr,
    DROPOUT: gl.constexpr,
    PER_SAMPLE: gl.constexpr,
):
    """Pool in one pass over X. ``items`` = B ``blocks``, where ``blocks`` = R / BR.

    Program i processes the items i, i + programs, ...
    """
    BR: gl.constexpr = q_desc.block_type.shape[1]
    P: gl.constexpr = gl.NVMMASharedLayout(2 * BR, 16, rank=2)
    PARTS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, BR // 8, [1, 0])
    ring = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, 1, BN, BD], x_desc.layout)
    q = gl.allocate_shared_memory(q_desc.dtype, [CHUNKS, 1, BR, BD], q_desc.layout)
    p_tiles = gl.allocate_shared_memory(x_desc.dtype, [2, BN, BR], P)
    parts = gl.allocate_shared_memory(gl.float32, [4, BN, BR], PARTS)
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 1)
    ready = barriers(2, 1)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    shared = (ring, q, p_tiles, parts, full, empty, ready, q_full, q_empty)
    tokens = (words_ptr, span_ptr, mean_ptr, rstd_ptr, N, W)
    out = (z_ptr, sums_ptr, keep_ptr, ksum_ptr)
    call = (shared, tokens, out, items, R, blocks)
    filled = (x_desc, q_desc, ring, q, full, empty, q_full, q_empty)
    gl.warp_specialize(
        [
            (_consumer, (0, call, D, SLOTS, CHUNKS, MASK, NORM, DROPOUT, PER_SAMPLE)),
            (_consumer, (1, call, D, SLOTS, CHUNKS, MASK, NORM, DROPOUT, PER_SAMPLE)),
            (_producer, (filled, span_ptr, items, N, blocks, SLOTS, CHUNKS, MASK, PER_SAMPLE)),
        ],
        [4, 1],
        REGISTERS,
    )
