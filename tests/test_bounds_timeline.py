"""Plays of traces on one multiprocessor, against times that arithmetic gives."""

from typing import Any

import numpy as np
import pytest
from bounds_kernels import EASY, trace
from ptx_kernels import HAS_COMPILER, NO_COMPILER

from mmfused.tools.bounds import costs
from mmfused.tools.bounds.cards import A100, H100, Card

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)


def cycles(body: str, *, played: dict[str, Any] | None = None, **options: Any) -> float:
    """Return the cycles of a kernel; ``options`` are those of ``trace``."""
    return trace(body, **options).play(**played or {}).cycles


def each(statement: str, *, before: str = "", after: str = "", **options: Any) -> float:
    """Return the cycles of one more statement, in which {k} is another number each time.

    The difference of 64 and 32 statements leaves out the start and end of a kernel.
    """

    def repeated(count: int) -> str:
        return before + "\n".join(statement.replace("{k}", str(k)) for k in range(count)) + after

    return (cycles(repeated(64), **options) - cycles(repeated(32), **options)) / 32


CHAIN = "fma.rn.f32 %f1, %f1, %f1, %f1;"
FMA = "fma.rn.f32 %f{k}, %f100, %f100, %f100;"
MUFU = "ex2.approx.ftz.f32 %f{k}, %f100;"


def test_a_chain_of_products_takes_its_latency():
    for threads in (32, 128, 512):  # four warps on each scheduler hide in the latency of four
        assert each(CHAIN, threads=threads) == costs.LATENCY_ALU


def test_independent_products_are_bound_by_issue():
    assert each(FMA) == 1
    assert each(FMA, threads=128) == 1  # four warps on four schedulers
    assert each(FMA, threads=256) == 2  # eight share them
    assert each(FMA, threads=1024) == 8


def test_pipes_are_as_wide_as_the_guide_says():
    """Results a cycle and multiprocessor: 16 of MUFU, 64 of logic, 128 of float32 products."""
    assert each(MUFU) == 8
    assert each(MUFU, threads=128) == 8
    assert each(MUFU, threads=256) == 16
    assert each("xor.b32 %r{k}, %r100, %r101;") == 2
    assert each("mul.lo.s32 %r{k}, %r100, %r101;") == 2
    assert each(f"{FMA} xor.b32 %r{{k}}, %r100, %r101;") == 2  # beside each other


def test_shuffles_of_all_warps_take_turns():
    shuffle = "shfl.sync.bfly.b32 %r{k}, %r100, 1, 31, -1;"
    assert each(shuffle, threads=128) == 4
    assert each(shuffle, threads=256) == 8


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32), (132, 1)])
def test_bank_conflicts_take_a_cycle_for_each_wavefront(stride: int, wavefronts: int):
    before = f"mov.u32 %r100, buffer; mad.lo.s32 %r100, tid, {stride}, %r100;"
    load = "ld.shared.u32 %r{k}, [%r100];"
    assert each(load, before=before, shared=8192) == wavefronts
    before = (
        f"and.b32 %r99, tid, 31; mov.u32 %r100, buffer; mad.lo.s32 %r100, %r99, {stride}, %r100;"
    )
    assert each(load, before=before, shared=8192, threads=128) == 4 * wavefronts


# ---- barriers ------------------------------------------------------------------------------------


def test_a_barrier_waits_for_the_slowest_warp():
    def played(count: int):
        slow = f"setp.ge.u32 %p1, tid, 32; @%p1 bra DONE; {CHAIN * count} DONE: bar.sync 0;"
        return trace(slow, threads=128).play()

    short, long = played(100), played(200)
    assert long.cycles - short.cycles == 100 * costs.LATENCY_ALU
    # Three of four warps wait for the fourth.
    assert long.barrier - short.barrier == pytest.approx(3 / 4 * 100 * costs.LATENCY_ALU)


def test_what_follows_a_barrier_begins_when_the_slowest_warp_has_come():
    body = f"""
        setp.ge.u32 %p1, tid, 32; @%p1 bra MEET; {CHAIN * 200}
        MEET: bar.sync 0; @!%p1 bra END; {CHAIN * 200} END:"""
    assert cycles(body, threads=128) >= 400 * costs.LATENCY_ALU


def test_a_named_barrier_holds_only_its_warps():
    def played(threads: int) -> float:
        slow = f"""
            setp.ge.u32 %p1, tid, 32; @%p1 bra NEXT; {CHAIN * 500} bra END;
            NEXT: bar.sync 1, {threads}; {CHAIN * 400} END:"""
        return cycles(slow, threads=128)

    assert played(96) < 500 * 4 + 300


# ---- copies --------------------------------------------------------------------------------------

COPY = """
    mov.u32 %r1, buffer; shl.b32 %r2, tid, 4; add.s32 %r1, %r1, %r2;
    mul.wide.u32 %rd1, tid, 16; add.s64 %rd1, in0, %rd1;"""
WAIT = "cp.async.commit_group; cp.async.wait_group 0;"


def copies(count: int, *, same: bool = False, **rates: float) -> float:
    """Return the cycles of copies of 512 bytes each, of different bytes unless ``same``."""
    ends = (f"[%r1], [%rd1 + {0 if same else 512 * k}], 16;" for k in range(count))
    body = COPY + "".join(f"cp.async.cg.shared.global {end}" for end in ends) + WAIT
    memory = np.zeros(512 * count, np.uint8)
    made = trace(body, memory, shared=512)
    return made.play(**rates).cycles


def test_a_wait_for_a_copy_takes_the_latency_of_dram_and_its_bytes():
    assert copies(128) - copies(64) == 64 * 16 * EASY.sector_dram
    for latency in (1500, 3000):
        later = copies(64, latency_dram=latency) - copies(64)
        assert later == latency - EASY.latency_dram
    # 64 * 16 sectors at 4 cycles, from the start of the block on, and the latency.
    assert copies(64) == pytest.approx(64 * 16 * 4 + 1000, abs=100)


def test_a_copy_that_is_in_l2_takes_the_rate_of_l2():
    assert copies(128, same=True) - copies(64, same=True) == 64 * 16 * EASY.sector_l2


def test_the_port_limits_a_multiprocessor_that_is_alone():
    fast = dict(sector_l2=0.0, sector_dram=0.0)
    assert copies(256, **fast) - copies(128, **fast) == 128 * 16 * EASY.sector_port


def test_copies_that_remain_are_not_waited_for():
    two = COPY + (
        "cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.commit_group;"
        f"{CHAIN * 500}"
        "cp.async.cg.shared.global [%r1 + 512], [%rd1 + 512], 16; cp.async.commit_group;"
        f"cp.async.wait_group {{}}; {CHAIN * 500}"
    )
    memory = np.zeros(1024, np.uint8)
    one, none = (trace(two.format(n), memory, shared=1024).play().cycles for n in (1, 0))
    assert none - one == pytest.approx(EASY.latency_dram, abs=20)


# ---- matrix products -----------------------------------------------------------------------------


def wgmma(columns: int) -> str:
    """Return a wgmma m64nNk16 of shared memory."""
    sums = ", ".join(f"%f{k}" for k in range(columns // 2))
    shape = f"m64n{columns}k16.f32.bf16.bf16"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{sums}}}, %rd9, %rd9, 1, 1, 1, 0, 0;"


DESCRIPTORS = """
    mov.u32 %r10, buffer; and.b32 %r10, %r10, 0x3FFFF; shr.u32 %r10, %r10, 4;
    cvt.u64.u32 %rd9, %r10; or.b64 %rd9, %rd9, 0x4000004000010000;"""
FINISH = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def products(columns: int, count: int) -> str:
    return wgmma(columns) * count + FINISH


def product_cycles(columns: int, card: Card = H100) -> float:
    """Return the cycles of one m64nNk16 at the card's rate."""
    return 2 * 64 * columns * 16 / card.matrix_per_cycle


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("groups", [1, 2])
def test_wgmmas_run_at_the_matrix_rate(columns: int, groups: int):
    options = dict(before=DESCRIPTORS, after=FINISH, threads=128 * groups, shared=32768)
    found = each(wgmma(columns), **options)
    assert found == pytest.approx(groups * product_cycles(columns), rel=1e-3)


def test_a_narrow_wgmma_is_bound_by_its_reads_of_shared_memory():
    """A is 2 KB, B 32 bytes a column; 128 bytes a cycle."""
    options = dict(before=DESCRIPTORS, after=FINISH, threads=128, shared=32768)
    assert each(wgmma(8), **options) == (2048 + 32 * 8) / 128 == 18
    assert product_cycles(8) < 18


@pytest.mark.parametrize("card", [H100, A100])
def test_mma_runs_at_its_share_of_the_matrix_rate(card: Card):
    mma = """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {%f{k}, %f1{k}, %f2{k}, %f3{k}}, {%r1, %r2, %r3, %r4}, {%r5, %r6},
        {%f{k}, %f1{k}, %f2{k}, %f3{k}};"""
    rate = card.matrix_per_cycle * card.mma_share
    options = dict(threads=128, played={"card": card})
    assert each(mma, **options) == pytest.approx(4 * 2 * 16 * 8 * 16 / rate, rel=1e-3)


def test_a_block_without_products_has_no_prologue():
    played = trace(CHAIN).play()
    assert (played.first_matrix, played.after_matrix) == (0, 0)


def test_prologue_and_epilogue_are_outside_of_the_products():
    def played(before: int, after: int):
        body = (
            DESCRIPTORS + CHAIN * before + products(128, 8) + CHAIN.replace("%f1", "%f200") * after
        )
        return trace(body, threads=128, shared=32768).play()

    short, long = played(100, 100), played(300, 400)
    assert long.first_matrix - short.first_matrix == 200 * 4
    assert long.after_matrix - short.after_matrix == 300 * 4
    assert long.cycles - short.cycles == 500 * 4


# ---- blocks --------------------------------------------------------------------------------------


def test_blocks_beyond_the_resident_ones_come_in_turn():
    chain = trace(CHAIN * 100, blocks=4)
    times = [chain.play(resident=1, blocks=n).cycles for n in (1, 2, 3, 4)]
    assert np.diff(times) == pytest.approx(times[0])
    assert times[0] == pytest.approx(EASY.block_start + 100 * 4, abs=80)
    # Blocks of one warp on schedulers of their own do not hold each other up.
    two = [chain.play(resident=2, blocks=n).cycles for n in (2, 3, 4, 8)]
    assert two == pytest.approx([times[0], 2 * times[0], 2 * times[0], 4 * times[0]], rel=0.05)


def test_a_resident_block_multiplies_while_another_ends():
    epilogue = CHAIN.replace("%f1", "%f200") * 600
    made = trace(DESCRIPTORS + products(256, 16) + epilogue, threads=128, shared=32768)
    alone, turns = (made.play(resident=1, blocks=n).cycles for n in (1, 8))
    together = made.play(resident=2, blocks=8).cycles
    assert turns == pytest.approx(8 * alone, rel=0.01)
    # At worst both multiply at the same time, and then both end at the same time.
    matrix = 16 * product_cycles(256)
    assert 8 * matrix < together <= 4 * (alone + matrix) < 0.75 * turns
