"""Small kernels in PTX for tests of the machine, and their launches on numpy arrays."""

from __future__ import annotations

import string
from typing import NamedTuple

import numpy as np

from mmfused.tools.ptx.build import compiler
from mmfused.tools.ptx.machine import IN_ORDER, Memory, Program, Schedule

NO_COMPILER = "the PTX machine needs a C++ compiler"
HAS_COMPILER = compiler() is not None

_MODULE = string.Template("""\
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 buffer[];
.visible .entry small($parameters)
.reqntid $threads
{
.reg .pred %p<99>;
.reg .b16 %rs<99>;
.reg .b32 %r<999>;
.reg .f32 %f<999>;
.reg .b64 %rd<99>;
.reg .b32 tid, gid;
.reg .b64 $pointers, each;
mov.u32 tid, %tid.x;
mov.u32 gid, %ctaid.x;
mad.lo.s32 gid, gid, $threads, tid;
$addresses
.loc 1 7 0
$body
ret;
}
.file 1 "kernels/small.py"
""")


class Outcome(NamedTuple):
    """What a kernel wrote, and the machine's reports."""

    out: np.ndarray
    faults: list[str]


def module(body: str, bytes_each: dict[str, int], threads: int) -> str:
    """Return a PTX module whose kernel gets pointers to arrays.

    Args:
        body: the statements. They may use the registers ``%p %rs %r %f %rd``, ``tid``, ``gid`` (the
            number of the thread in the grid), each array's address ``NAME``, the address
            ``NAME_at`` of the part of this thread, and the dynamic shared memory ``buffer``.
        bytes_each: the bytes of each array that belong to a thread.
        threads: the threads of a block.
    """
    addresses = "".join(
        f"ld.param.u64 {name}, [p_{name}];\n"
        f"mul.wide.u32 each, gid, {size};\nadd.s64 {name}_at, {name}, each;\n"
        for name, size in bytes_each.items()
    )
    return _MODULE.substitute(
        parameters=", ".join(f".param .u64 p_{name}" for name in bytes_each),
        pointers=", ".join(f"{name}, {name}_at" for name in bytes_each),
        threads=threads,
        addresses=addresses,
        body=body,
    )


def execute(
    body: str,
    *inputs: np.ndarray,
    out: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    schedule: Schedule = IN_ORDER,
) -> Outcome:
    """Run the statements ``body``; see :func:`module`.

    Args:
        body: the statements.
        inputs: arrays that the kernel knows as ``in0``, ``in1``, ...
        out: what the array ``out`` holds at first; it does not change.
        threads: the threads of a block.
        blocks: the blocks of the grid.
        shared: bytes of dynamic shared memory.
        schedule: the order of execution.
    """
    arrays = {f"in{k}": aligned(array) for k, array in enumerate(inputs)}
    arrays["out"] = out = aligned(out)
    bytes_each = {name: array.nbytes // (threads * blocks) for name, array in arrays.items()}
    program = Program(module(body, bytes_each, threads))
    starts = {name: array.ctypes.data for name, array in arrays.items()}
    memory = [Memory(starts[name], starts[name] + a.nbytes, name) for name, a in arrays.items()]
    parameters = [start.to_bytes(8, "little") for start in starts.values()]
    faults = program.run((blocks, 1, 1), parameters, memory, shared=shared, schedule=schedule)
    return Outcome(out, [str(fault) for fault in faults])


def run(body: str, *inputs: np.ndarray, out: np.ndarray, **options) -> np.ndarray:
    """Return what the statements ``body`` write to ``out``; see :func:`execute`."""
    outcome = execute(body, *inputs, out=out, **options)
    assert not outcome.faults, outcome.faults
    return outcome.out


def zeros(*shape: int, dtype: type = np.uint32) -> np.ndarray:
    """Return an array for ``out``."""
    return np.zeros(shape, dtype)


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy that starts at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
