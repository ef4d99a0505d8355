"""Warps that wait for each other through mbarriers, and what else specialised warps use."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_bulk_kernels import SCHEDULES, form, launch, random
from ptx_kernels import HAS_COMPILER, NO_COMPILER, aligned, execute, module, run, zeros

from mmfused.tools.ptx.machine import Program, Schedule, UnsupportedPtx
from mmfused.tools.ptx.tensor_map import encode

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

LANES = np.arange(32)


@pytest.mark.parametrize("opcode", ["try_wait", "test_wait"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warp_that_polls_lets_others_run(opcode, schedule):
    body = f"""
        mov.u32 %r8, buffer;
        setp.eq.u32 %p1, tid, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r8], 32;
        bar.sync 0;
        setp.lt.u32 %p2, tid, 32;
        @!%p2 bra PRODUCE;
        POLL:
        mbarrier.{opcode}.parity.shared::cta.b64 %p3, [%r8], 0;
        @!%p3 bra POLL;
        shl.b32 %r1, tid, 2;
        add.u32 %r1, %r1, %r8;
        ld.shared.u32 %r2, [%r1+128];
        st.global.u32 [out_at], %r2;
        ret;
        PRODUCE:
        shl.b32 %r1, tid, 2;
        add.u32 %r1, %r1, %r8;
        st.shared.u32 [%r1], tid;
        mbarrier.arrive.shared::cta.b64 _, [%r8];"""
    found = run(body, out=zeros(64), threads=64, shared=512, schedule=schedule)
    np.testing.assert_array_equal(found[:32], LANES + 32)


# ---- specialised warps ---------------------------------------------------------------------------


def ring(tiles: int, buffers: int, waits: bool = True) -> str:
    """Return a kernel whose warp 0 loads tiles of 1 KiB into a ring, and whose warp 1 adds them.

    Args:
        tiles: the tiles, along the first dimension.
        buffers: places of the ring.
        waits: whether warp 0 waits until a place is free.
    """
    body = "".join(
        f"@leader mbarrier.init.shared::cta.b64 [full+{8 * k}], 1;\n"
        f"@leader mbarrier.init.shared::cta.b64 [full+{8 * (k + buffers)}], 1;\n"
        for k in range(buffers)
    )
    body += "fence.mbarrier_init.release.cluster;\nbar.sync 0;\nsetp.eq.u32 %p1, warp, 1;\n"
    body += "@%p1 bra CONSUME;\nsetmaxnreg.dec.sync.aligned.u32 24;\n"
    wait = (
        "{{\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [full+{}], {};\n"
        "@!%p2 bra again;\n}}\n"
    )
    for tile in range(tiles):
        at, turn = tile % buffers, tile // buffers
        body += wait.format(8 * (at + buffers), 1 - turn % 2) if waits else ""
        body += "elect.sync %r1|%p3, -1;\n"
        body += f"@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full+{8 * at}], 1024;\n"
        body += "@%p3 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
        body += f"[base+{1024 * at}], [map, {{0, {8 * tile}}}], [full+{8 * at}];\n"
    body += "ret;\nCONSUME:\nmov.u32 %r4, 0;\nshl.b32 %r2, lane, 2;\nadd.u32 %r2, %r2, base;\n"
    for tile in range(tiles):
        at, turn = tile % buffers, tile // buffers
        body += wait.format(8 * at, turn % 2)
        for row in range(8):
            body += f"ld.shared.u32 %r3, [%r2+{1024 * at + 128 * row}];\nadd.u32 %r4, %r4, %r3;\n"
        body += "bar.warp.sync -1;\nelect.sync _|%p3, -1;\n"
        body += f"@%p3 mbarrier.arrive.shared::cta.b64 _, [full+{8 * (at + buffers)}];\n"
    body += "mul.wide.u32 %rd1, lane, 4;\nadd.s64 %rd1, %rd1, out;\n"
    return body + "st.global.u32 [%rd1], %r4;\n"


def sums(body: str, schedule: Schedule) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return reports, the sums of the columns and what they should be."""
    source, out = random(64, 32, dtype=np.int32), aligned(zeros(32, dtype=np.int32))
    shape = form(source, (8, 32))
    reports = launch(
        body, source, out, lambda at, _: encode("s32", at, **shape), threads=64, schedule=schedule
    )
    return reports, out, source[:48].sum(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ring_of_tiles_between_two_warps_is_silent_and_right(schedule):
    for buffers in (1, 2, 3):
        reports, found, expected = sums(ring(6, buffers), schedule)
        assert reports == []
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ring_whose_producer_does_not_wait_is_reported(schedule):
    reports, _, _ = sums(ring(6, 2, waits=False), schedule)
    assert reports


def test_the_lowest_lane_of_a_mask_is_elected():
    body = """
        mov.u32 %r5, 0;
        mov.u32 %r6, 0;
        elect.sync %r1|%p1, -1;
        setp.ge.u32 %p2, tid, 5;
        @%p2 elect.sync %r5|%p3, 0xFFFFFFE0;
        selp.u32 %r2, 1, 0, %p1;
        @%p2 selp.u32 %r6, 1, 0, %p3;
        st.global.v4.u32 [out_at], {%r1, %r2, %r5, %r6};"""
    found = run(body, out=zeros(32, 4))
    expected = [0 * LANES, LANES == 0, np.where(LANES >= 5, 5, 0), LANES == 5]
    np.testing.assert_array_equal(found.T, expected)


def test_each_lane_branches_to_the_label_that_it_chooses():
    body = """
        and.b32 %r1, tid, 3;
        setp.lt.u32 %p1, tid, 28;
        mov.u32 %r2, 9;
        TABLE: .branchtargets A, B, A, C;
        @%p1 brx.idx %r1, TABLE;
        bra MEET;
        A:
        mov.u32 %r2, 100;
        bra MEET;
        B:
        mov.u32 %r2, 200;
        C:
        add.u32 %r2, %r2, 1;
        MEET:
        activemask.b32 %r3;
        st.global.v2.u32 [out_at], {%r2, %r3};"""
    found = run(body, out=zeros(32, 2))
    expected = np.array([100, 201, 100, 10])[LANES % 4]
    np.testing.assert_array_equal(found[:, 0], np.where(LANES < 28, expected, 9))
    np.testing.assert_array_equal(found[:, 1], 0xFFFFFFFF)


@pytest.mark.parametrize("schedule", SCHEDULES[::4])
def test_warps_of_a_cluster_of_one_block_meet(schedule):
    body = """
        mov.u32 %r8, buffer;
        shl.b32 %r1, tid, 2;
        add.u32 %r1, %r1, %r8;
        mapa.shared::cluster.u32 %r1, %r1, 0;
        st.shared.u32 [%r1], tid;
        barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        xor.b32 %r1, %r1, 128;
        ld.shared.u32 %r2, [%r1];
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        st.shared.u32 [%r1], 0;
        mov.u32 %r3, %cluster_ctarank;
        add.u32 %r2, %r2, %r3;
        st.global.u32 [out_at], %r2;"""
    outcome = execute(body, out=zeros(64), threads=64, shared=1024, schedule=schedule)
    assert outcome.faults == []
    np.testing.assert_array_equal(outcome.out, np.arange(64) ^ 32)


@pytest.mark.parametrize("cluster", ["2", "1, 2, 1", "16"])
def test_a_cluster_of_several_blocks_is_refused(cluster: str):
    text = module("", {"out": 0}, 32)
    Program(text.replace(".reqntid", ".reqnctapercluster 1, 1, 1\n.reqntid"))
    with pytest.raises(UnsupportedPtx, match="small: the machine runs clusters of one block"):
        Program(text.replace(".reqntid", f".reqnctapercluster {cluster}\n.reqntid"))
