"""Small kernels in PTX with bulk copies, and their launches on numpy arrays."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable

import numpy as np
from ptx_kernels import aligned

from mmfused.tools.ptx.machine import Memory, Program, Schedule

SCHEDULES = [
    Schedule(seed, late_copies, late_wgmma)
    for seed, late_copies, late_wgmma in itertools.product(range(3), (False, True), (False, True))
]

_MODULE = string.Template("""\
.version 8.5
.target sm_90a
.address_size 64
.visible .entry bulk(.param .u64 p_in, .param .u64 p_out, .param .align 64 .b8 p_map[128])
.reqntid $threads
{
.shared .align 1024 .b8 buffer[32768];
.shared .align 8 .b8 bars[64];
.reg .pred leader, %p<9>;
.reg .b32 tid, warp, lane, base, full, %r<99>;
.reg .b64 in, out, map, %rd<9>;
mov.u32 tid, %tid.x;
shr.u32 warp, tid, 5;
and.b32 lane, tid, 31;
mov.u32 base, buffer;
mov.u32 full, bars;
ld.param.u64 in, [p_in];
ld.param.u64 out, [p_out];
mov.b64 map, p_map;
cvta.param.u64 map, map;
setp.eq.u32 leader, tid, 0;
$body
ret;
}
""")


def launch(
    body: str,
    source: np.ndarray,
    out: np.ndarray,
    make_map: Callable[[int, int], bytes],
    *,
    threads: int = 32,
    schedule: Schedule,
) -> list[str]:
    """Run statements and return the reports; ``make_map`` gets the addresses of both arrays."""
    program, parameters, memory = prepared(body, source, out, make_map, threads)
    return list(map(str, program.run((1, 1, 1), parameters, memory, schedule=schedule)))


def prepared(
    body: str,
    source: np.ndarray,
    out: np.ndarray,
    make_map: Callable[[int, int], bytes],
    threads: int = 32,
) -> tuple[Program, list[bytes], list[Memory]]:
    """Return a kernel, its parameters and its memory."""
    starts = [array.ctypes.data for array in (source, out)]
    memory = [
        Memory(start, start + array.nbytes, name)
        for start, array, name in zip(starts, (source, out), ("in", "out"), strict=True)
    ]
    program = Program(_MODULE.substitute(threads=threads, body=body))
    parameters = [*(start.to_bytes(8, "little") for start in starts), make_map(*starts)]
    return program, parameters, memory


def form(array: np.ndarray, box: tuple[int, ...]) -> dict:
    """Return the sizes of a tensor map; dimensions are counted from the last one."""
    return {
        "dims": array.shape[::-1],
        "strides": array.strides[-2::-1],
        "box": box[::-1],
    }


def random(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    lowest = 0 if np.dtype(dtype).kind == "u" else -60
    return aligned(np.random.default_rng(seed).integers(lowest, 60, shape).astype(dtype))
