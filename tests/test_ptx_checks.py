"""The PTX machine reports kernels that are broken on purpose, and is silent on their repairs."""

from __future__ import annotations

import itertools
import resource

import numpy as np
import pytest
import torch
from ptx_broken import BARRIERS, WGMMA_READS, WORDS, Case
from ptx_broken_async import ASYNCHRONOUS, pipelined
from ptx_broken_bulk import BULK
from ptx_broken_mbarrier import MBARRIERS, UNEVEN, WARPS
from ptx_broken_memory import GLOBAL_RACES, HARMLESS, LANES, MEMORY

from mmfused.tools.ptx.build import compiler
from mmfused.tools.ptx.machine import KINDS, Fault, Memory, Program, Schedule
from mmfused.tools.ptx.tensor_map import encode

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler for the PTX machine")

CASES = {
    **BARRIERS,
    **ASYNCHRONOUS,
    **MEMORY,
    **GLOBAL_RACES,
    **LANES,
    **BULK,
    **MBARRIERS,
    **WARPS,
}
SCHEDULES = [
    Schedule(seed, late_copies, late_wgmma)
    for seed, late_copies, late_wgmma in itertools.product(range(4), (False, True), (False, True))
]


def run(text: str, schedule: Schedule, blocks: int = 1) -> tuple[list[Fault], torch.Tensor]:
    """Run a kernel of ptx_broken.py; return its faults and its output."""
    memory = torch.arange(4 * WORDS + 16, dtype=torch.int32)
    memory = memory[-memory.data_ptr() % 64 // 4 :]
    source, out = memory[WORDS : 2 * WORDS], memory[2 * WORDS + 256 : 3 * WORDS + 256]
    source.copy_(torch.linspace(-1, 1, 2 * WORDS).bfloat16().view(torch.int32))
    ranges = [
        Memory(array.data_ptr(), array.data_ptr() + 4 * WORDS, name)
        for name, array in (("in", source), ("out", out))
    ]
    starts = [array.data_ptr() for array in (source, out)]
    parameters = [start.to_bytes(8, "little") for start in starts]
    parameters += [encode("s32", start, [32, 32], [128], [32, 8], swizzle=3) for start in starts]
    program = Program(text)
    parameters = parameters[: len(program.parameters)]
    faults = program.run((blocks, 1, 1), parameters, ranges, schedule=schedule)
    return faults, out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_broken_kernel_is_reported_in_every_order(case: Case):
    kernel = case.kernel(broken=True)
    for schedule in SCHEDULES:
        faults, _ = run(kernel.text, schedule, case.blocks)
        assert faults, schedule
        lines = {int(str(fault).split("broken.py:")[1].split()[0]) for fault in faults}
        assert lines <= kernel.lines, (schedule, list(map(str, faults)))
        assert {fault.kind for fault in faults} <= {case.kind, *case.also.split(", ")}, schedule
        if schedule.seed == 0:
            assert f"kernels/broken.py:{kernel.line} `" in str(faults[0]), schedule
            assert f" {case.what} (block " in str(faults[0]), schedule


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_repaired_kernel_is_silent_in_every_order(case: Case):
    kernel = case.kernel(broken=False)
    for schedule in SCHEDULES:
        assert list(map(str, run(kernel.text, schedule, case.blocks)[0])) == [], schedule


@pytest.mark.parametrize("case", UNEVEN.values(), ids=UNEVEN)
def test_bytes_that_an_mbarrier_does_not_expect_are_reported_in_every_order(case: Case):
    for schedule in SCHEDULES:
        assert list(map(str, run(case.kernel(False).text, schedule)[0])) == [], schedule
        assert "transaction" in {fault.kind for fault in run(case.kernel(True).text, schedule)[0]}


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_kernel_is_silent_in_every_order(body: str):
    case = Case("", "", body)
    for schedule in SCHEDULES:
        assert list(map(str, run(case.kernel(True).text, schedule, blocks=2)[0])) == [], schedule


def test_threads_that_fill_no_warp_are_silent():
    case = Case("", "", "st.shared.u32 [own], tid;\nbar.sync 0;\n@low ld.shared.u32 %r1, [other];")
    assert run(case._replace(threads=48).kernel(True).text, SCHEDULES[0])[0] == []


REPORTS = {
    "read after write": (
        "broken: race: kernels/broken.py:3 `@second ld.shared.u32 %r1, [other]` reads what another "
        "warp wrote without a barrier in between (block 0, warp 1, lane 0, 4 bytes at shared+0x0); "
        "the other access: kernels/broken.py:1 `@first st.shared.u32 [own], 7` by warp 0; 32 times"
    ),
    "read before the wait": (
        "broken: copy in flight: kernels/broken.py:4 `ld.shared.u32 %r1, [own]` touches what an "
        "unfinished cp.async still writes (block 0, warp 0, lane 0, 4 bytes at shared+0x0); the "
        "other access: kernels/broken.py:1 `cp.async.ca.shared.global [own], [source], 4` by warp "
        "0; 64 times"
    ),
    "no fence before wgmma": (
        "broken: missing proxy fence: kernels/broken.py:6 "
        "`wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, a_desc, "
        "b_desc, fresh, 1, 1, 0, 0` touches what was written without fence.proxy.async (block 0, "
        "warp 3, all lanes, 16 bytes at shared+0x600); the other access: kernels/broken.py:1 "
        "`st.shared.v4.u32 [at16], {0, 0, 0, 0}` by warp 3; 192 times"
    ),
    "written by another block only": (
        "broken: uninitialised read: kernels/broken.py:4 `ld.shared.u32 %r1, [own]` reads what "
        "nothing has written in this block (block 1, warp 0, lane 0, 4 bytes at shared+0x0); 64 "
        "times"
    ),
    "after an array": (
        "broken: out of bounds: kernels/broken.py:1 `st.global.u32 [out+4096], 1` touches global "
        "memory outside of every tensor (block 0, warp 0, lane 0, 4 bytes at out+0x1000 of "
        "0x1000); 64 times"
    ),
    "before the parameters": (
        "broken: out of bounds: kernels/broken.py:2 `ld.param.u32 %r1, [%rd1+-4]` reads outside of "
        "the parameters (block 0, warp 0, lane 0, 4 bytes at parameters-0x4); 64 times"
    ),
    "misaligned in shared memory": (
        "broken: misaligned: kernels/broken.py:3 `@low ld.shared.v2.u32 {%r1, %r2}, [own]` has an "
        "address that is no multiple of the access's size (block 0, warp 1, lane 1, 8 bytes at "
        "shared+0x84); 16 times"
    ),
    "a block writes what others read": (
        "broken: race: kernels/broken.py:3 `@%p1 st.global.u32 [mine], 7` touches what another "
        "thread wrote or read meanwhile (block 2, warp 0, lane 0, 4 bytes at out+0x0 of 0x1000); "
        "the other access: by another block; 64 times"
    ),
    "ldmatrix in a part of a warp": (
        "broken: divergence: kernels/broken.py:3 `ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
        "{%r1, %r2, %r3, %r4}, [at16]` needs lanes that are elsewhere (block 0, warp 0, lane 16); "
        "2 times"
    ),
    "a descriptor that differs between lanes": (
        "broken: descriptor: kernels/broken.py:8 "
        "`wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, a_desc, "
        "b_desc, fresh, 1, 1, 0, 0` has a descriptor that differs between lanes (block 0, warp 3, "
        "lane 1); 124 times"
    ),
    "deadlock: a wrong count": (
        "broken: deadlock: kernels/broken.py:1 `bar.sync 1, 96` waits forever (block 0, warp 0, "
        "lane 0); 2 times"
    ),
    "the warp ends before its copies": (
        "broken: unfinished: kernels/broken.py:1 `cp.async.ca.shared.global [own], [source], 4` is "
        "not waited for before the warp ends (block 0, warp 0, lane 0, 4 bytes at shared+0x0); 2 "
        "times"
    ),
    "not initialised": (
        "broken: mbarrier: kernels/broken.py:2 `@leader mbarrier.arrive.expect_tx.shared::cta.b64 "
        "_, [full], 1024` uses an mbarrier that is not initialised (block 0, warp 0, lane 0, 8 "
        "bytes at shared+0x4000)"
    ),
    "expects nothing": (
        "broken: transaction: kernels/broken.py:2 `@leader mbarrier.arrive.shared::cta.b64 _, "
        "[full]` leaves an mbarrier at which expected and copied bytes differ (block 0, warp 0, "
        "lane 0, 1024 bytes at shared+0x4000)"
    ),
    "bulk load: no tensor map": (
        "broken: tensor map: kernels/broken.py:4 `@leader cp.async.bulk.tensor.2d.shared::cta."
        "global.mbarrier::complete_tx::bytes [base], [tile, {0, 0}], [full]` has a tensor map that "
        "is not valid for it (block 0, warp 0, lane 0)"
    ),
    "registers that differ": (
        "broken: registers: kernels/broken.py:2 `@second setmaxnreg.inc.sync.aligned.u32 232` sets "
        "another number of registers than the rest of its warpgroup (block 0, warp 1, all lanes); "
        "the other access: by warp 0"
    ),
    "expects too many bytes": (
        "broken: deadlock: kernels/broken.py:5 `mbarrier.try_wait.parity.shared::cta.b64 complete, "
        "[full], 0` waits forever: its mbarrier expects more bytes than copies bring (block 0, "
        "warp 0, lane 0, 1024 bytes at shared+0x4000); 2 times"
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_names_kernel_line_instruction_thread_and_address(name: str):
    case = {**CASES, **UNEVEN}[name]
    assert str(run(case.kernel(True).text, SCHEDULES[0], case.blocks)[0][0]) == REPORTS[name]


def test_every_kind_of_fault_has_its_report_tested():
    assert {report.split(": ")[1] for report in REPORTS.values()} == {kind for kind, *_ in KINDS}


def test_records_of_a_large_array_take_memory_only_where_it_is_touched():
    large, before = np.empty(2**31, np.uint8), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = large.ctypes.data
    text = Case("", "", "st.global.u32 [out], block;", threads=32).kernel(False).text
    parameters = [bytes(8), (start + 2**31 - 8).to_bytes(8, "little")]
    memory = [Memory(start, start + 2**31, "large")]
    faults = Program(text).run((2, 1, 1), parameters, memory)
    assert [fault.kind for fault in faults] == ["race"]
    assert "4 bytes at large+0x7ffffff8 of 0x80000000" in str(faults[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


# ---- a pipeline ----------------------------------------------------------------------------------


def test_a_pipeline_gives_equal_bits_in_every_order():
    text = pipelined(buffers=3).kernel(False).text
    _, expected = run(text, SCHEDULES[0])
    assert expected.view(torch.float32)[:512].abs().min() > 0
    random = [Schedule(seed, seed % 2 == 0, seed % 3 == 0) for seed in range(1, 31)]
    for schedule in [*SCHEDULES, *random, Schedule(checks=False)]:
        faults, out = run(text, schedule)
        assert list(map(str, faults)) == [], schedule
        assert torch.equal(out, expected), schedule


def test_one_buffer_too_few_is_reported_in_every_order_and_changes_late_results():
    text = pipelined(buffers=2).kernel(False).text
    _, expected = run(pipelined(buffers=3).kernel(False).text, SCHEDULES[0])
    for schedule in SCHEDULES:
        faults, out = run(text, schedule)
        assert faults, schedule
        assert all(WGMMA_READS[1] in str(fault) for fault in faults), list(map(str, faults))
        assert torch.equal(out, expected) != schedule.late_wgmma, schedule


def test_more_synchronisations_than_clocks_count_are_refused():
    fences = "fence.proxy.async;\n" * 64  # 2^20 times
    loop = "add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 1048576;\n@%p1 bra again;"
    body = f"mov.u32 %r1, 0;\nagain:\n{fences}{loop}"
    text = Case("", "", body, threads=32).kernel(False).text
    with pytest.raises(OverflowError, match="broken synchronises too often for checks"):
        run(text, Schedule())
