"""Guards, branches, barriers and exchange between lanes in the PTX machine; what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_kernels import HAS_COMPILER, NO_COMPILER, execute, module, run, zeros
from ptx_numbers import signed

from mmfused.tools.ptx.machine import Memory, Program, Schedule, UnsupportedPtx, signatures

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

LANES = np.arange(32)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)


def test_every_other_opcode_of_the_machine_has_a_test():
    tested = r"""bra|ret|bar[.](sync|arrive|warp[.]sync)|fence[.]proxy[.]async|nothing
        |shfl[.](up|down|bfly|idx)[.]b32|redux[.]\w+[.]\w+|vote[.]ballot[.]b32|match[.]any[.]b32
        |activemask[.]b32|elect|setmaxnreg|brx[.]idx|barrier[.]cluster[.](arrive|wait)"""
    elsewhere = "(ld|st|atom|red|cp|mbarrier|tensormap)[.]|ldmatrix|stmatrix|mma|wgmma"
    known = [name for name, types in signatures().items() if not types]
    known = [name for name in known if not re.match(elsewhere, name)]
    assert [name for name in known if not re.fullmatch(tested, name, re.VERBOSE)] == []
    assert {f"redux.{name}" for name in REDUCTIONS} == {n for n in known if n.startswith("redux")}


# ---- guards and branches -------------------------------------------------------------------------


def test_lanes_without_the_guard_keep_registers_and_memory():
    body = """
        and.b32 %r1, tid, 3;
        setp.eq.u32 %p1, %r1, 0;
        setp.eq.u32 %p2, %r1, 1;
        mov.u32 %r2, 7;
        @%p1 mov.u32 %r2, 8;
        @!%p1 st.global.u32 [out_at], %r2;
        @%p2 setp.ne.u32 %p1, tid, tid;
        @%p2 st.global.v2.u32 [out_at], {9, 9};
        selp.u32 %r3, 1, 0, %p1;
        @%p1 st.global.u32 [out_at+4], %r2;"""
    found = run(body, out=zeros(32, 2) + 5)
    expected = {0: [5, 8], 1: [9, 9], 2: [7, 5], 3: [7, 5]}
    np.testing.assert_array_equal(found, [expected[lane % 4] for lane in LANES])


def test_no_lane_touches_memory_that_all_guards_exclude():
    body = """
        setp.ne.u32 %p1, tid, tid;
        mov.u64 %rd1, 64;
        @%p1 ld.global.u32 %r1, [%rd1];
        @%p1 st.global.u32 [%rd1], 1;
        @%p1 ld.shared.u32 %r1, [%r1];
        @%p1 bra NEVER;
        st.global.u32 [out_at], 3;
        NEVER:"""
    np.testing.assert_array_equal(run(body, out=zeros(32)), 3)


def test_lanes_that_a_branch_divides_meet_again():
    body = """
        and.b32 %r1, tid, 1;
        setp.eq.u32 %p1, %r1, 1;
        @%p1 bra ODD;
        activemask.b32 %r2;
        mul.lo.u32 %r3, tid, 10;
        bra.uni MEET;
        ODD:
        activemask.b32 %r2;
        mul.lo.u32 %r3, tid, 100;
        MEET:
        activemask.b32 %r4;
        st.global.v4.u32 [out_at], {%r2, %r3, %r4, 0};"""
    found = run(body, out=zeros(32, 4))
    odd = LANES % 2 == 1
    np.testing.assert_array_equal(found[:, 0], np.where(odd, 0xAAAAAAAA, 0x55555555))
    np.testing.assert_array_equal(found[:, 1], LANES * np.where(odd, 100, 10))
    np.testing.assert_array_equal(found[:, 2], 0xFFFFFFFF)


def test_divided_lanes_meet_again_at_the_end_of_a_loop_that_lies_before_its_start():
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r5, 0;
        bra.uni BODY;
        END:
        activemask.b32 %r4;
        add.u32 %r1, %r1, 1;
        setp.ge.u32 %p1, %r1, 3;
        @%p1 bra DONE;
        BODY:
        and.b32 %r2, tid, 1;
        setp.eq.u32 %p2, %r2, 1;
        @%p2 bra END;
        add.u32 %r5, %r5, 1;
        bra.uni END;
        DONE:
        activemask.b32 %r6;
        st.global.v4.u32 [out_at], {%r4, %r5, %r6, 0};"""
    found = run(body, out=zeros(32, 4))
    np.testing.assert_array_equal(found[:, 0], 0xFFFFFFFF)
    np.testing.assert_array_equal(found[:, 1], np.where(LANES % 2 == 1, 0, 3))
    np.testing.assert_array_equal(found[:, 2], 0xFFFFFFFF)


def test_each_lane_runs_a_loop_as_often_as_it_asks_for():
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r2, 0;
        OUTER:
        setp.ge.u32 %p1, %r1, tid;
        @%p1 bra DONE;
        mov.u32 %r3, 0;
        INNER:
        add.u32 %r3, %r3, 1;
        add.u32 %r2, %r2, %r3;
        setp.lt.u32 %p2, %r3, %r1;
        @%p2 bra INNER;
        add.u32 %r1, %r1, 1;
        bra OUTER;
        DONE:
        activemask.b32 %r4;
        st.global.v2.u32 [out_at], {%r2, %r4};"""
    sums = [sum(sum(range(1, max(n, 1) + 1)) for n in range(lane)) for lane in LANES]
    found = run(body, out=zeros(32, 2))
    np.testing.assert_array_equal(found[:, 0], sums)
    np.testing.assert_array_equal(found[:, 1], 0xFFFFFFFF)


@pytest.mark.parametrize("leave", ["ret", "exit"])
def test_lanes_that_return_write_nothing_more(leave: str):
    body = f"""
        st.global.u32 [out_at], 1;
        setp.lt.u32 %p1, tid, 20;
        @%p1 {leave};
        activemask.b32 %r1;
        st.global.u32 [out_at], %r1;"""
    np.testing.assert_array_equal(
        run(body, out=zeros(32)), np.where(LANES < 20, 1, 0xFFFFFFFF << 20 & 0xFFFFFFFF)
    )


def test_special_registers_tell_threads_and_blocks_apart():
    body = """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, %ctaid.x;
        mov.u32 %r3, %nctaid.x;
        mov.u32 %r4, %ntid.x;
        mov.u32 %r5, %laneid;
        mov.u32 %r6, %warpid;
        st.global.v4.u32 [out_at], {%r1, %r2, %r3, %r4};
        st.global.v2.u32 [out_at+16], {%r5, %r6};"""
    found = run(body, out=zeros(3 * 64, 8), threads=64, blocks=3)
    thread, block = np.arange(192) % 64, np.arange(192) // 64
    expected = [thread, block, thread * 0 + 3, thread * 0 + 64, thread % 32, thread // 32]
    np.testing.assert_array_equal(found[:, :6].T, expected)


def test_the_numbers_of_a_block_count_along_x_first():
    body = """
        mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %ctaid.y;
        mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.y;
        mov.u32 %r5, %nctaid.z;
        setp.eq.u32 %p1, %r1, 1;
        setp.eq.u32 %p2, %r2, 2;
        setp.eq.u32 %p3, %r3, 3;
        and.pred %p1, %p1, %p2;
        and.pred %p1, %p1, %p3;
        setp.eq.u32 %p2, tid, 0;
        and.pred %p1, %p1, %p2;
        @%p1 st.global.v2.u32 [out], {%r4, %r5};"""
    out = zeros(2)
    program = Program(module(body, {"out": 0}, 32))
    memory = [Memory(out.ctypes.data, out.ctypes.data + 8, "out")]
    assert program.run((2, 3, 4), [out.ctypes.data.to_bytes(8, "little")], memory) == []
    assert out.tolist() == [3, 4]


def test_setp_writes_a_second_predicate():
    body = """
        ld.global.v2.b32 {%r1, %r2}, [in0_at];
        setp.gt.bf16x2 %p1|%p2, %r1, %r2;
        setp.lt.u32 %p3|%p4, %r1, %r2;
        selp.u32 %r3, 1, 0, %p1;
        selp.u32 %r4, 1, 0, %p2;
        selp.u32 %r5, 1, 0, %p3;
        selp.u32 %r6, 1, 0, %p4;
        st.global.v4.u32 [out_at], {%r3, %r4, %r5, %r6};"""
    operands = random(32, 2) & 0xBFFFBFFF  # no NaN
    low, high = ((operands >> shift << 16).view(np.float32) for shift in (0, 16))
    less = operands[:, 0] < operands[:, 1]
    expected = [low[:, 0] > low[:, 1], high[:, 0] > high[:, 1], less, ~less]
    np.testing.assert_array_equal(run(body, operands, out=zeros(32, 4)).T, expected)


# ---- barriers and fences -------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", ["bar.sync 0", "barrier.sync.aligned 3", "bar.sync 0, 128"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_warps_exchange_values_through_a_barrier(barrier: str, seed: int):
    body = f"""
        mov.u32 %r10, buffer;
        mad.lo.u32 %r11, tid, 4, %r10;
        st.shared.u32 [%r11], tid;
        {barrier};
        xor.b32 %r1, tid, 96;
        mad.lo.u32 %r12, %r1, 4, %r10;
        ld.shared.u32 %r2, [%r12];
        st.global.u32 [out_at], %r2;"""
    found = run(body, out=zeros(128), threads=128, shared=512, schedule=Schedule(seed))
    np.testing.assert_array_equal(found, np.arange(128) ^ 96)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_producers_arrive_and_consumers_wait(seed: int):
    body = """
        mov.u32 %r10, buffer;
        and.b32 %r1, tid, 31;
        mad.lo.u32 %r11, %r1, 4, %r10;
        setp.lt.u32 %p1, tid, 32;
        @!%p1 bra PRODUCE;
        bar.sync 1, 64;
        ld.shared.u32 %r2, [%r11];
        st.global.u32 [out_at], %r2;
        ret;
        PRODUCE:
        st.shared.u32 [%r11], tid;
        bar.arrive 1, 64;"""
    found = run(body, out=zeros(64), threads=64, shared=128, schedule=Schedule(seed))
    np.testing.assert_array_equal(found[:32], LANES + 32)


FENCES = ["fence.proxy.async", "fence.proxy.async.shared::cta", "fence.proxy.async.global"]
FENCES += ["fence.acq_rel.gpu", "membar.gl"]


@pytest.mark.parametrize("fence", FENCES)
def test_fences_change_no_values(fence: str):
    body = f"mov.u32 %r1, tid;\n{fence};\nbar.warp.sync -1;\nst.global.u32 [out_at], %r1;"
    np.testing.assert_array_equal(run(body, out=zeros(32)), LANES)


# ---- exchange between lanes ----------------------------------------------------------------------


def shuffled(mode: str, lane: int, distance: int, limits: int) -> tuple[int, bool]:
    """Return the lane that is read, and whether it is in range: the ISA's pseudocode."""
    bval, cval, mask = distance & 31, limits & 31, limits >> 8 & 31
    max_lane, min_lane = (lane & mask) | (cval & ~mask & 31), lane & mask
    j = {
        "up": lane - bval,
        "down": lane + bval,
        "bfly": lane ^ bval,
        "idx": min_lane | (bval & ~mask & 31),
    }[mode]
    in_range = j >= max_lane if mode == "up" else j <= max_lane
    return (j if in_range else lane), in_range


LIMITS = {
    "up": [0, 0x1800, 0x1C00, 0x1E00, 5, 0x1803],
    "other": [0x1F, 0x181F, 0x1C1F, 0x1E1F, 0x0F, 0x1807],
}


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_a_shuffle_reads_another_lane_of_its_segment(mode: str):
    body = f"""
        ld.global.v2.u32 {{%r1, %r2}}, [in0_at];
        ld.global.u32 %r3, [in1_at];
        shfl.sync.{mode}.b32 %r4|%p1, %r1, %r2, %r3, -1;
        shfl.sync.{mode}.b32 %r5, %r1, %r2, %r3, 0xffffffff;
        selp.u32 %r6, 1, 0, %p1;
        st.global.v4.u32 [out_at], {{%r4, %r5, %r6, 0}};"""
    for limits in LIMITS.get(mode, LIMITS["other"]):
        for distance in (0, 1, 3, 8, 16, 31, 40):
            values = random(32, seed=distance)
            operands = np.stack([values, np.full(32, distance, np.uint32)], axis=1)
            found = run(body, operands, np.full(32, limits, np.uint32), out=zeros(32, 4))
            expected = [shuffled(mode, int(lane), distance, limits) for lane in LANES]
            read = [values[lane] for lane, _ in expected]
            np.testing.assert_array_equal(found[:, 0], read)
            np.testing.assert_array_equal(found[:, 1], read)
            np.testing.assert_array_equal(found[:, 2], [in_range for _, in_range in expected])


def test_a_shuffle_by_index_reads_a_lane_of_each_lanes_choice():
    body = """
        ld.global.v2.u32 {%r1, %r2}, [in0_at];
        shfl.sync.idx.b32 %r1, %r1, %r2, 31, -1;
        st.global.u32 [out_at], %r1;"""
    values, chosen = random(32), random(32, seed=1) % 32
    found = run(body, np.stack([values, chosen], axis=1), out=zeros(32))
    np.testing.assert_array_equal(found, values[chosen])


def test_halves_of_a_warp_shuffle_apart():
    body = """
        setp.lt.u32 %p1, tid, 16;
        mul.lo.u32 %r1, tid, 3;
        @%p1 bra LOW;
        shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xFFFF0000;
        bra MEET;
        LOW:
        shfl.sync.bfly.b32 %r2, %r1, 2, 31, 0x0000FFFF;
        MEET:
        st.global.u32 [out_at], %r2;"""
    found = run(body, out=zeros(32))
    np.testing.assert_array_equal(found, 3 * np.where(LANES < 16, LANES ^ 2, LANES ^ 1))


REDUCTIONS = {
    "add.s32": sum,
    "add.u32": sum,
    "max.s32": lambda values: max(signed(v, 32) for v in values),
    "min.s32": lambda values: min(signed(v, 32) for v in values),
    "max.u32": max,
    "min.u32": min,
    "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce,
    "xor.b32": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_redux_reduces_the_lanes_that_its_mask_names(reduction: str):
    body = f"""
        ld.global.u32 %r1, [in0_at];
        redux.sync.{reduction} %r2, %r1, 0xffffffff;
        and.b32 %r3, tid, 1;
        setp.eq.u32 %p1, %r3, 0;
        mov.u32 %r4, 0;
        @%p1 redux.sync.{reduction} %r4, %r1, 0x55555555;
        st.global.v2.u32 [out_at], {{%r2, %r4}};"""
    values = random(32)
    found = run(body, values, out=zeros(32, 2))
    every, even = (
        int(REDUCTIONS[reduction](part.tolist())) % 2**32 for part in (values, values[::2])
    )
    np.testing.assert_array_equal(found[:, 0], every)
    np.testing.assert_array_equal(found[:, 1], np.where(LANES % 2 == 0, even, 0))


def test_vote_and_match_see_the_lanes_that_their_mask_names():
    body = """
        ld.global.u32 %r1, [in0_at];
        setp.lt.u32 %p1, %r1, 2;
        setp.lt.u32 %p2, tid, 12;
        vote.sync.ballot.b32 %r2, %p1, -1;
        match.any.sync.b32 %r3, %r1, -1;
        mov.u32 %r4, 0;
        mov.u32 %r5, 0;
        @%p2 vote.sync.ballot.b32 %r4, %p1, 0xFFF;
        @%p2 match.any.sync.b32 %r5, %r1, 0xFFF;
        st.global.v4.u32 [out_at], {%r2, %r3, %r4, %r5};"""
    values = random(32) % 4

    def bits(chosen: np.ndarray) -> int:
        return sum(1 << int(lane) for lane in np.flatnonzero(chosen))

    low = LANES < 12
    expected = [
        [bits(values < 2), bits(values == v), bits(values < 2) & 0xFFF, bits(values == v) & 0xFFF]
        for v in values
    ]
    expected = np.where(low[:, None] | (np.arange(4) < 2), expected, 0)
    np.testing.assert_array_equal(run(body, values, out=zeros(32, 4)), expected)


def test_a_shuffle_without_all_lanes_of_its_mask_is_reported():
    body = """
        setp.lt.u32 %p1, tid, 16;
        @%p1 shfl.sync.bfly.b32 %r1, tid, 1, 31, -1;"""
    (fault,) = execute(body, out=zeros(32)).faults
    assert fault.startswith("small: divergence: kernels/small.py:7 `@%p1 shfl.sync.bfly.b32")


# ---- spellings -----------------------------------------------------------------------------------

# Opcodes as compilers write them, with operands.
SPELLINGS = """
    add.rn.f32 %f1, %f2, %f3;  mul.rn.f32 %f1, %f2, 0f3F800000;  fma.rn.ftz.f32 %f1, %f2, %f3, %f4;
    div.full.f32 %f1, %f2, %f3;  div.rn.f32 %f1, %f2, %f3;  div.approx.f32 %f1, %f2, %f3;
    ex2.approx.ftz.f32 %f1, %f2;  ex2.approx.f32 %f1, %f2;  lg2.approx.f32 %f1, %f2;
    sqrt.approx.ftz.f32 %f1, %f2;  sqrt.rn.f32 %f1, %f2;  rsqrt.approx.f32 %f1, %f2;
    rcp.rn.f32 %f1, %f2;  tanh.approx.f32 %f1, %f2;  rcp.approx.ftz.f64 %rd1, %rd2;
    fma.rn.f64 %rd1, %rd2, %rd3, %rd4;  div.rn.f64 %rd1, %rd2, %rd3;
    cvt.rn.bf16x2.f32 %r1, %f2, %f3;  cvt.rn.f16.f32 %rs1, %f2;  cvt.rn.f32.s32 %f1, %r2;
    cvt.rn.f32.f64 %f1, %rd2;  cvt.rzi.s32.f32 %rd1, %f2;  fma.rn.bf16 %rs1, %rs2, %rs3, %rs4;
    fma.rn.bf16x2 %r1, %r2, %r3, %r4;  lop3.b32 %r1, %r2, %r3, %r4, 0xE8;  mov.f32 %f1, 1.5;
    selp.f32 %f1, 0fFF800000, %f2, %p1;  setp.ne.b32 %p1, %r1, 0;  mov.pred %p1, -1;
    mov.u64 %rd1, buffer;  cvta.to.global.u64 %rd1, %rd2;  bfe.u32 %r1, %r2, 4, 8;
    prefetch.tensormap [%rd1];  nanosleep.u32 100;  griddepcontrol.wait;
    griddepcontrol.launch_dependents;  fence.mbarrier_init.release.cluster;
    cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd1, {%r1, %r2}];
    mad.wide.s32 %rd1, %r1, 4, %rd2;  setp.eq.s16 %p1, %rs1, 0;  mov.b16 %rs1, 0x3F80U;
"""


def test_opcodes_are_read_as_compilers_write_them():
    for statement in filter(None, (part.strip() for part in SPELLINGS.split(";"))):
        program = Program(module(f"{statement};", {"out": 0}, 32))
        assert any(str(s).split()[0] == statement.split()[0] for s in program.kernel.statements)


UNSUPPORTED = {
    "an unknown opcode": ("frob.u32 %r1, %r2;", "it knows no opcode 'frob.u32'"),
    "an unknown type": ("add.u128 %r1, %r2, %r3;", "it knows no opcode 'add.u128'"),
    "too few operands": ("add.u32 %r1, %r2;", "it has 2 operands, expected 3"),
    "an unknown operand": ("add.u32 %r1, %r2, nothing;", "it has an operand 'nothing'"),
    "an unknown space": ("ld.local.u32 %r1, [%rd1];", "it names no address space"),
    "a wide destination": ("add.u32 %rd1, %r1, %r2;", "it writes 32 bits to %rd1 of 64 bits"),
    "a narrow source": ("add.u64 %rd1, %r1, %rd2;", "it reads 64 bits of %r1"),
    "an unknown copy": ("cp.sync.u32 [%rd1], [%rd2];", "it is no cp.async of 4, 8 or 16 bytes"),
    "a cluster's copy": (
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%r1], [%rd1, {%r2}], [%r3], %rs1;",
        "it copies to several blocks of a cluster",
    ),
    "a copy of two blocks": (
        "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes"
        ".cta_group::2 [%r1], [%rd1, {%r2}], [%r3];",
        "it is of sm_100",
    ),
    "an image": (
        "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes"
        " [%r1], [%rd1, {%r2, %r3, %r4}], [%r5], {%rs1};",
        "it copies image columns",
    ),
    "an unknown reduction": (
        "cp.reduce.async.bulk.tensor.1d.global.shared::cta.inc.bulk_group [%rd1, {%r2}], [%r1];",
        "it is a reduction that the machine does not know",
    ),
    "an mbarrier at a generic address": (
        "mbarrier.init.b64 [%rd1], 1;",
        "it names no address space: shared",
    ),
    "an mbarrier that loses arrivals": (
        "mbarrier.arrive_drop.shared::cta.b64 %rd1, [%r1];",
        "it knows no mbarrier.arrive_drop",
    ),
    "a wrong number of registers": (
        "setmaxnreg.inc.sync.aligned.u32 100;",
        "it sets 100 registers, expected a multiple of 8 from 24 to 256",
    ),
    "a negated operand": (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, "
        "%rd1, %rd2, 1, -1, 1, 0, 0;",
        "it negates an operand",
    ),
}


@pytest.mark.parametrize(("statement", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_the_machine_cannot_run_is_one_sentence_with_the_source_line(statement, why):
    with pytest.raises(UnsupportedPtx) as error:
        Program(module(statement, {"out": 0}, 32))
    sentence = str(error.value)
    opcode = statement.split()[0].rstrip(";")
    start = f"small, kernels/small.py:7: the machine cannot run `{opcode}"
    assert sentence.startswith(start)
    assert f"`: {why}" in sentence
    assert "\n" not in sentence
