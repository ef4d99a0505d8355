"""Gluon kernels with TMA and mbarriers, and broken variants of them, for tests of the PTX machine.

``BROKEN`` is "" for the correct kernel, or says what is wrong. A missing fence is not among the
variants: since 3.8, Triton adds the fences that a kernel lacks.
"""

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

# Triton 3.6 has longer names.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def barriers(number: gl.constexpr, count: gl.constexpr):
    """Return mbarriers that ``count`` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars


# ---- matrix product ------------------------------------------------------------------------------


@gluon.jit
def fill(a_desc, b_desc, a_ring, b_ring, full, step, SLOTS: gl.constexpr, BROKEN: gl.constexpr):
    """Load the tiles of a step into its slot."""
    slot = step % SLOTS
    K: gl.constexpr = a_desc.block_type.shape[1]
    size: gl.constexpr = 2 * K * (a_desc.block_type.shape[0] + b_desc.block_type.shape[0])
    part: gl.constexpr = 2 * K * a_desc.block_type.shape[0]
    if BROKEN == "expects too little":
        mbarrier.expect(full.index(slot), part)
    elif BROKEN == "expects too much":
        mbarrier.expect(full.index(slot), size + part)
    else:
        mbarrier.expect(full.index(slot), size)
    load(a_desc, [0, step * K], full.index(slot), a_ring.index(slot))
    load(b_desc, [0, step * K], full.index(slot), b_ring.index(slot))


@gluon.jit
def ring_matmul_kernel(a_desc, b_desc, out_desc, steps, SLOTS: gl.constexpr, BROKEN: gl.constexpr):
    """out = a @ b.T for one tile of out: a ring of tiles by TMA, wgmma, and a store by TMA."""
    M: gl.constexpr = a_desc.block_type.shape[0]
    N: gl.constexpr = b_desc.block_type.shape[0]
    K: gl.constexpr = a_desc.block_type.shape[1]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [SLOTS, M, K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [SLOTS, N, K], b_desc.layout)
    full = barriers(SLOTS, 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    for step in gl.static_range(SLOTS - 1):
        if step < steps:
            fill(a_desc, b_desc, a_ring, b_ring, full, step, SLOTS, BROKEN)
    acc = warpgroup_mma_init(gl.zeros([M, N], gl.float32, layout=layout))
    for step in range(steps):
        slot = step % SLOTS
        if BROKEN != "no wait":
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
        b = b_ring.index(slot).permute([1, 0])
        acc = warpgroup_mma(a_ring.index(slot), b, acc, is_async=True)
        # The product before this one has ended, so that its slot is free.
        if BROKEN != "refills too soon":
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        if step + SLOTS - 1 < steps:
            fill(a_desc, b_desc, a_ring, b_ring, full, step + SLOTS - 1, SLOTS, BROKEN)
    acc = warpgroup_mma_wait(0, deps=[acc])
    out = gl.allocate_shared_memory(out_desc.dtype, [M, N], out_desc.layout)
    out.store(acc.to(out_desc.dtype))
    fence_async_shared()
    store(out_desc, [0, 0], out)
    if BROKEN != "no wait for the store":
        tma.store_wait(0)


# ---- attention pooling ---------------------------------------------------------------------------


@gluon.jit
def pool_producer(x_desc, ring, full, empty, batch, tokens, SLOTS: gl.constexpr, BROKEN):
    """Load the tiles of all samples, a half of the columns for each consumer."""
    T: gl.constexpr = x_desc.block_type.shape[0]
    HALF: gl.constexpr = x_desc.block_type.shape[1]
    step = 0
    for sample in range(gl.program_id(0), batch, gl.num_programs(0)):
        for start in range(0, tokens, T):
            slot = step % SLOTS
            if BROKEN != "no empty barrier":
                mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * T * HALF * 2)
            for half in gl.static_range(2):
                at = [sample * tokens + start, half * HALF]
                load(x_desc, at, full.index(slot), ring.index(2 * slot + half))
            step += 1


@gluon.jit
def pool_consumer(
    half: gl.constexpr,
    shared,
    z_ptr,
    batch,
    tokens,
    T: gl.constexpr,
    R: gl.constexpr,
    HALF: gl.constexpr,
    SLOTS: gl.constexpr,
    BROKEN: gl.constexpr,
):
    """Attend, and write a half of z's columns. Both consumers need the scores of all columns."""
    ring, q, p_tiles, score_tiles, full, empty, ready = shared
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    token = gl.arange(0, T, layout=gl.SliceLayout(1, S))
    row = gl.arange(0, R, layout=gl.SliceLayout(0, S))
    step = 0
    for sample in range(gl.program_id(0), batch, gl.num_programs(0)):
        z = gl.zeros([HALF, R], gl.float32, layout=S)
        top = gl.full([R], float("-inf"), gl.float32, layout=gl.SliceLayout(0, S))
        total = gl.zeros([R], gl.float32, layout=gl.SliceLayout(0, S))
        for start in range(0, tokens, T):
            slot = step % SLOTS
            x = ring.index(2 * slot + half)
            if BROKEN != "no full barrier":
                mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            s = warpgroup_mma(
                x, q.index(half).permute([1, 0]), gl.zeros([T, R], gl.float32, layout=S)
            )
            score_tiles.index(2 * (step & 1) + half).store(s)
            mbarrier.arrive(ready.index(half), count=1)
            mbarrier.wait(ready.index(1 - half), step & 1)
            s += score_tiles.index(2 * (step & 1) + 1 - half).load(S)
            s = gl.where((start + token < tokens)[:, None], s * LOG2E, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 0))
            p = gl.exp2(s - new_top[None, :])
            shrink = gl.exp2(top - new_top)
            total = total * shrink + gl.sum(p, 0)
            top = new_top
            p_tiles.index(half).store(p.to(gl.bfloat16))
            fence_async_shared()
            z = warpgroup_mma(x.permute([1, 0]), p_tiles.index(half), z * shrink[None, :])
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        col = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
        at = (sample * R + row[None, :]) * (2 * HALF) + col[:, None]
        gl.store(z_ptr + at, z / total[None, :])


@gluon.jit
def pool_kernel(
    x_desc,
    q_desc,
    z_ptr,
    batch,
    tokens,
    SLOTS: gl.constexpr,
    BROKEN: gl.constexpr,
):
    """z = softmax(q @ x.T) @ x of each sample, for all queries.

    x (batch * tokens, D), q (R, D), z (batch, R, D) in float32; two consumers of four warps, each
    with half of D, and a producer.
    """
    T: gl.constexpr = x_desc.block_type.shape[0]
    R: gl.constexpr = q_desc.block_type.shape[0]
    HALF: gl.constexpr = x_desc.block_type.shape[1]
    ring = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, T, HALF], x_desc.layout)
    q = gl.allocate_shared_memory(gl.bfloat16, [2, R, HALF], q_desc.layout)
    p_tiles = gl.allocate_shared_memory(
        gl.bfloat16, [2, T, R], gl.NVMMASharedLayout(64, 16, rank=2)
    )
    scores = gl.allocate_shared_memory(
        gl.float32, [4, T, R], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    )
    full, empty = barriers(SLOTS, 1), barriers(SLOTS, 2)
    ready, q_bar = barriers(2, 1), barriers(1, 1)
    mbarrier.expect(q_bar.index(0), 2 * R * HALF * 2)
    for half in gl.static_range(2):
        load(q_desc, [0, half * HALF], q_bar.index(0), q.index(half))
    mbarrier.wait(q_bar.index(0), 0)
    shared = (ring, q, p_tiles, scores, full, empty, ready)
    gl.warp_specialize(
        [
            (pool_consumer, (0, shared, z_ptr, batch, tokens, T, R, HALF, SLOTS, BROKEN)),
            (pool_consumer, (1, shared, z_ptr, batch, tokens, T, R, HALF, SLOTS, BROKEN)),
            (pool_producer, (x_desc, ring, full, empty, batch, tokens, SLOTS, BROKEN)),
        ],
        [4, 1],
        [208, 24],
    )
