"""The PTX machine finds the race of a real kernel, and each synchronisation that is removed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import triton
from compiling import run_python

from mmfused.tools.ptx.build import cache_folder, compiler
from mmfused.tools.ptx.machine import Fault, Memory, Program, Schedule

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler for the PTX machine")

K = 6 * 64
SCHEDULES = [
    Schedule(),
    Schedule(late_copies=True, late_wgmma=True),
    Schedule(1, late_wgmma=True),
    Schedule(2, late_copies=True),
]
# Triton 3.6 puts no proxy fence between cp.async and wgmma.
KNOWN = "missing proxy fence" if triton.__version__.startswith("3.6.") else ""
SYNCHRONISATION = re.compile(
    r"\s*(bar\.sync|fence\.proxy\.async|(cp\.async|wgmma)\.(wait|commit)_group)\S*\s*\w*;"
)
# By Triton 3.8, whose pipeliner has more synchronisation than these kernels need: the place among
# the instructions of this name.
EQUIVALENT = {
    ("sm_80", "cp.async.commit_group", 0): "the next commit makes one group of both copies",
    ("sm_80", "bar.sync", 0): "precedes copies to buffers that nothing has touched",
    ("sm_80", "cp.async.wait_group", 1): "each way to it has waited already, before the barrier",
    ("sm_80", "bar.sync", 2): "each way to it ends in a barrier",
    ("sm_80", "cp.async.wait_group", 2): "the next wait is the same",
    ("sm_80", "cp.async.wait_group", 3): "the wait before is the same",
    ("sm_90", "cp.async.commit_group", 0): "the next commit makes one group of both copies",
    ("sm_90", "bar.sync", 0): "precedes copies to buffers that nothing has touched",
    ("sm_90", "bar.sync", 2): "wgmma.wait_group has ended the reads of all four warps",
}


@pytest.fixture(scope="module")
def products() -> dict[str, tuple[str, int]]:
    """Return the PTX and the bytes of shared memory of each variant."""
    script = Path(__file__).with_name("ptx_products.py")
    cache, path = str(cache_folder() / "triton"), os.environ.get("PYTHONPATH", "")
    done = run_python(str(script), TRITON_CACHE_DIR=cache, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def run_all(text: str, shared: int) -> list[tuple[list[Fault], torch.Tensor]]:
    """Multiply under each schedule; return the faults, and the product and the sums."""
    program = Program(text)
    return [run(program, shared, schedule) for schedule in SCHEDULES]


def run(program: Program, shared: int, schedule: Schedule) -> tuple[list[Fault], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(64, K, generator=random).bfloat16()
    b = torch.randn(K, 64, generator=random).bfloat16()
    out, total = torch.zeros(64, 64), torch.zeros(64)
    arrays = {"a": a, "b": b, "out": out, "sum": total}
    parameters = [array.data_ptr().to_bytes(8, "little") for array in arrays.values()]
    parameters.append(K.to_bytes(4, "little"))
    parameters += [bytes(size) for size in program.parameters[len(parameters) :]]  # Triton's own
    memory = [
        Memory(array.data_ptr(), array.data_ptr() + array.nbytes, name)
        for name, array in arrays.items()
    ]
    faults = program.run((1, 1, 1), parameters, memory, shared=shared, schedule=schedule)
    assert torch.allclose(out, a.float() @ b.float(), atol=1e-3) or faults
    faults = [fault for fault in faults if fault.kind != KNOWN]
    return faults, torch.cat([out.ravel(), total])


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_a_compiled_pipeline_is_silent_and_gives_equal_bits(name, products):
    results = run_all(*products[name])
    for schedule, (faults, out) in zip(SCHEDULES, results, strict=True):
        assert list(map(str, faults)) == [], schedule
        assert torch.equal(out, results[0][1]), schedule


def test_the_race_of_a_compiled_pipeline_is_found(products):
    """Triton copies the next tile while the loop sums the tile before its wgmma has ended."""
    results = run_all(*products["sm_90, summed"])
    for schedule, (faults, out) in zip(SCHEDULES, results, strict=True):
        assert faults, schedule
        for fault in map(str, faults):
            assert "product_kernel: race: tests/racy_kernel.py:37 `cp.async.cg.shared" in fault
            assert "writes what an unfinished wgmma still reads (block 0, warp" in fault
            assert "the other access: tests/racy_kernel.py:43 `wgmma.mma_async" in fault
        assert torch.equal(out, results[0][1]) != schedule.late_wgmma, schedule


def mutants(text: str) -> dict[tuple[str, int], str]:
    """Return the text without one synchronisation, by name and place among those of the name."""
    lines, counts, found = text.splitlines(), {}, {}
    for number, line in enumerate(lines):
        if match := SYNCHRONISATION.match(line):
            place = counts[match[1]] = counts.get(match[1], -1) + 1
            found[match[1], place] = "\n".join(lines[:number] + lines[number + 1 :])
    return found


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_each_synchronisation_that_is_missing_is_reported(name, products):
    text, shared = products[name]
    _, expected = run_all(text, shared)[0]
    silent = set()
    for (opcode, place), mutant in mutants(text).items():
        results = run_all(mutant, shared)
        reported = {bool(faults) for faults, _ in results}
        assert len(reported) == 1, (opcode, place)
        if reported == {False}:
            silent.add((name, opcode, place))
            assert all(torch.equal(out, expected) for _, out in results), (opcode, place)
    if triton.__version__.startswith("3.8."):
        assert silent == {key for key in EQUIVALENT if key[0] == name}
