"""Small kernels in PTX whose counts and times arithmetic gives, traced in the PTX machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from ptx_kernels import aligned, module

from mmfused.tools.bounds import costs
from mmfused.tools.bounds.cards import H100, Card
from mmfused.tools.ptx.machine import Memory, Program
from mmfused.tools.ptx.trace import Played, Rates, Trace

NOWHERE = -1  # in place of an address: the lane is off


@dataclass
class Traced:
    """A traced kernel; ``out`` is what it wrote."""

    program: Program
    trace: Trace
    out: np.ndarray

    def total(self, counts: np.ndarray, opcode: str) -> int:
        """Return the sum of counts over the instructions whose opcode starts with ``opcode``."""
        code = self.program.code
        return sum(int(n) for n, i in zip(counts, code, strict=True) if i.opcode.startswith(opcode))

    def play(self, *, resident: int = 1, blocks: int = 1, card: Card = H100, **rates) -> Played:
        """Return how long a multiprocessor takes; ``rates`` replace those of the card."""
        cycles = costs.costs(self.program, card)
        numbers = costs.registers(self.program)
        played, _ = self.trace.play(
            cycles, numbers, replace(EASY, **rates), resident=resident, blocks=blocks
        )
        return played


# Rates of memories that take whole cycles.
EASY = Rates(
    sector_shared=0.25,
    sector_port=0.5,
    sector_l2=2.0,
    sector_dram=4.0,
    latency_l2=300.0,
    latency_dram=1000.0,
    block_start=200.0,
)


def trace(
    body: str,
    *inputs: np.ndarray,
    out: np.ndarray | None = None,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    steps: int = 1 << 30,
) -> Traced:
    """Trace the statements ``body``; they and the arguments are those of ``ptx_kernels``."""
    arrays = {f"in{k}": aligned(array) for k, array in enumerate(inputs)}
    arrays["out"] = aligned(np.zeros(threads * blocks, np.uint32) if out is None else out)
    bytes_each = {name: array.nbytes // (threads * blocks) for name, array in arrays.items()}
    program = Program(module(body, bytes_each, threads))
    starts = {name: array.ctypes.data for name, array in arrays.items()}
    memory = [Memory(starts[name], starts[name] + a.nbytes, name) for name, a in arrays.items()]
    parameters = [start.to_bytes(8, "little") for start in starts.values()]
    made = program.trace((blocks, 1, 1), parameters, memory, shared=shared, steps=steps)
    return Traced(program, made, arrays["out"])


_OFFSET = "ld.global.s32 %r1, [in0_at]; setp.ge.s32 %p1, %r1, 0;\n"


def shared_access(statement: str, offsets: np.ndarray) -> int:
    """Return the wavefronts of a statement that accesses [%r2] at the lanes' offsets."""
    guard = "" if "matrix" in statement else "@%p1 "
    body = f"{_OFFSET} mov.u32 %r2, buffer; add.s32 %r2, %r2, %r1; {guard}{statement}"
    made = trace(body, offsets.astype(np.int32), shared=32 * 1024).trace
    return int(made.wavefronts.sum())


def global_access(statements: str, offsets: np.ndarray) -> Traced:
    """Trace statements of which the last one accesses [%rd2] of in1 at the lanes' offsets."""
    *before, last = statements.strip().rstrip(";").split(";")
    body = f"{_OFFSET} cvt.s64.s32 %rd1, %r1; add.s64 %rd2, in1, %rd1; {'; '.join([*before, ''])}"
    return trace(
        f"{body} @%p1 {last};",
        offsets.astype(np.int32),
        np.zeros(32 * 1024, np.uint8),
        shared=1024,
    )
