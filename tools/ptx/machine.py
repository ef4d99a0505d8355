"""Run kernels that were compiled to PTX on a CPU, and report their faults.

program = Program(ptx)
faults = program.run((blocks, 1, 1), parameters, memory, shared=4096, schedule=IN_ORDER)
"""

from __future__ import annotations

import array
import ctypes
import functools
import re
import weakref
from dataclasses import dataclass
from typing import NamedTuple

from .build import library
from .families import FAMILIES
from .order import order_of
from .parse import Kernel, UnsupportedPtx, read_kernel
from .registers import place_registers
from .trace import Trace
from .translate import SHARED_BASE, SPECIAL, Instruction, Operand, Translator

__all__ = ["IN_ORDER", "Fault", "Memory", "Program", "Schedule", "UnsupportedPtx"]

_MOST_FAULTS = 100  # of one launch that are described
_REGISTER_BYTES = 128
_WRITES = ("st.global", "red.global", "atom.global")
_WRITES += ("cp.async.bulk.store", "cp.async.bulk.tensor.store", "tensormap.copy")
_NO_LANE, _OTHER_BLOCK = 255, -2  # of memory.h

# In the order of memory.h's Kind: a short name, the space of the address, and what happened.
KINDS = (
    ("out of bounds", "global", "touches global memory outside of every tensor"),
    ("out of bounds", "shared", "touches shared memory outside of the block's"),
    ("out of bounds", "parameter", "reads outside of the parameters"),
    ("misaligned", "global", "has an address that is no multiple of the access's size"),
    ("misaligned", "shared", "has an address that is no multiple of the access's size"),
    ("uninitialised read", "shared", "reads what nothing has written in this block"),
    ("race", "shared", "reads what another warp wrote without a barrier in between"),
    ("race", "shared", "writes what another warp read without a barrier in between"),
    ("race", "shared", "writes what another warp wrote without a barrier in between"),
    ("race", "shared", "touches what another lane touched without bar.warp.sync in between"),
    ("copy in flight", "shared", "touches what an unfinished cp.async still writes"),
    ("race", "shared", "writes what an unfinished wgmma still reads"),
    ("missing proxy fence", "shared", "touches what was written without fence.proxy.async"),
    ("race", "global", "touches what another thread wrote or read meanwhile"),
    ("divergence", "", "needs lanes that are elsewhere"),
    ("descriptor", "", "has a descriptor that differs between lanes"),
    ("deadlock", "", "waits forever"),
    ("unfinished", "shared", "is not waited for before the warp ends"),
    ("unfinished", "shared", "is not waited for before its mbarrier ends"),
    ("race", "shared", "writes what an unfinished bulk copy still reads"),
    ("mbarrier", "shared", "uses an mbarrier that is not initialised"),
    ("mbarrier", "shared", "initialises an mbarrier that is in use"),
    ("mbarrier", "shared", "arrives more often than its mbarrier expects in a phase"),
    (
        "transaction",
        "shared",
        "brings bytes after its mbarrier has completed the phase without them",
    ),
    ("transaction", "shared", "leaves an mbarrier at which expected and copied bytes differ"),
    ("deadlock", "shared", "waits forever: its mbarrier expects more bytes than copies bring"),
    ("deadlock", "shared", "waits forever: copies bring more bytes than its mbarrier expects"),
    ("deadlock", "shared", "waits forever for arrivals at its mbarrier"),
    ("tensor map", "", "has a tensor map that is not valid for it"),
    ("registers", "", "sets another number of registers than the rest of its warpgroup"),
    ("out of bounds", "", "branches outside of its table"),
)


class Memory(NamedTuple):
    """A range of memory that a kernel may touch."""

    start: int
    end: int
    name: str


class Schedule(NamedTuple):
    """The order of a launch.

    Args:
        seed: warps take turns at random, and blocks run in random order; 0: in order.
        late_copies: cp.async, and bulk copies to shared memory, write at their wait instead of at
            once.
        late_wgmma: wgmma, and bulk copies from shared memory, read at their wait instead of at
            once.
        checks: look for races, uninitialised reads and missing fences; bounds are always checked.
    """

    seed: int = 0
    late_copies: bool = False
    late_wgmma: bool = False
    checks: bool = True


IN_ORDER = Schedule()


@dataclass
class Fault:
    """A fault; its string is a report."""

    kind: str  # the first words of KINDS
    text: str

    def __str__(self) -> str:
        return self.text


class _Launch(ctypes.Structure):
    """In the order of run.cpp's Launch."""

    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("threads", "shared_bytes")),
        *(("parameters", ctypes.c_char_p), ("parameter_bytes", ctypes.c_int64)),
        *(("constants", ctypes.c_char_p), ("constant_bytes", ctypes.c_int64)),
        *(("memory", ctypes.c_void_p), ("num_ranges", ctypes.c_int64)),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("late_copies", "late_wgmma", "checks")),
    ]


class _Fault(ctypes.Structure):
    """In the order of memory.h's Fault."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "pc", "block", "warp", "lane")),
        *((name, ctypes.c_int32) for name in ("other_pc", "other_warp", "size")),
        *((name, ctypes.c_uint64) for name in ("address", "times")),
    ]


@functools.cache
def signatures() -> dict[str, str]:
    """Return the types of the operands of every opcode that the machine knows."""
    lines = library().ptx_opcodes().decode().splitlines()
    return dict(line.rsplit(":", 1) for line in lines)


class Program:
    """A kernel of a PTX module, ready to run.

    Args:
        text: the module.
        entry: name of the kernel; None if the module has only one.

    Raises:
        UnsupportedPtx: the kernel has an instruction that the machine does not know.
    """

    def __init__(self, text: str, entry: str | None = None) -> None:
        self.text = text
        self.kernel: Kernel = read_kernel(text, entry)
        translator = Translator(self.kernel, signatures(), FAMILIES)
        self.code: list[Instruction] = translator.instructions
        self.parameter_offsets: list[int] = list(translator.parameter_offsets.values())
        granule_shift = translator.smallest_access.bit_length() - 1
        self._handle = self._load(granule_shift)
        weakref.finalize(self, library().ptx_free, self._handle)

    @property
    def name(self) -> str:
        """The kernel's name; of a C++ name, the last identifier."""
        name = self.kernel.name
        identifiers = []
        while nested := re.match(r"(?:_ZN)?(\d+)", name):  # lengths precede identifiers
            name = name[nested.end() :]
            identifiers.append(name[: int(nested[1])])
            name = name[int(nested[1]) :]
        return identifiers[-1] if identifiers else name

    @property
    def parameters(self) -> list[int]:
        """The bytes of each parameter."""
        return list(self.kernel.parameters.values())

    def _load(self, granule_shift: int) -> int:
        """Place operands in the register file and hand the code to the machine."""
        operands = [op for i in self.code for op in i.operands]
        constants = dict.fromkeys(op for op in operands if op.kind == "constant")
        places: dict[Operand | str, int] = {}
        at = len(SPECIAL) * _REGISTER_BYTES
        image = bytearray()
        for constant in constants:
            cell = int(constant.value).to_bytes(8 if constant.wide else 4, "little")
            places[constant] = at + len(image)
            image += cell * 32
        self._constants = bytes(image)
        at += len(image)
        wide = {
            op.value: self.kernel.width(op.value) == 64 for op in operands if op.kind == "register"
        }
        offsets, at = place_registers(self.code, wide, at)
        names = [op.value for op in operands if op.kind == "predicate"]
        for name in dict.fromkeys([*names, *(i.guard for i in self.code if i.guard)]):
            places[name] = at
            at += 4
        guards, starts, words = array.array("i"), array.array("i", [0]), array.array("i")
        for instruction in self.code:
            offset = places[instruction.guard] if instruction.guard else -1
            guards.append(-2 - offset if instruction.negated else offset)
            words.extend(_place(op, offsets, places) for op in instruction.operands)
            starts.append(len(words))
        order = array.array("i", order_of(self.code))
        return library().ptx_program(
            " ".join(i.opcode for i in self.code).encode(),
            len(self.code),
            order.buffer_info()[0],
            guards.buffer_info()[0],
            starts.buffer_info()[0],
            words.buffer_info()[0],
            at,
            granule_shift,
        )

    def run(
        self,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        memory: list[Memory],
        *,
        threads: int | None = None,
        shared: int = 0,
        schedule: Schedule = IN_ORDER,
    ) -> list[Fault]:
        """Run the kernel and return its faults.

        Args:
            grid: the number of blocks.
            parameters: the bytes of each parameter.
            memory: the memory that the kernel may touch.
            threads: threads of a block, if the kernel does not require a number.
            shared: bytes of dynamic shared memory.
            schedule: the order of execution.
        """
        launch = self._launch(grid, parameters, memory, threads, shared, schedule)
        found = (_Fault * _MOST_FAULTS)()
        count = library().ptx_run(self._handle, ctypes.byref(launch), found, _MOST_FAULTS)
        if count == -2:
            raise MemoryError(f"{self.name} needs too much memory for checks: run it without")
        if count == -1:
            raise OverflowError(f"{self.name} synchronises too often for checks: run it without")
        return [self._describe(fault, memory) for fault in found[: min(count, _MOST_FAULTS)]]

    def trace(
        self,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        memory: list[Memory],
        *,
        threads: int | None = None,
        shared: int = 0,
        steps: int,
    ) -> Trace:
        """Run a sample of the blocks, and return what their warps did.

        Blocks are drawn evenly from the grid. The other arguments are those of :meth:`run`.

        Args:
            steps: instructions of a warp after which no further block starts; at least 16 blocks
                run, or 8 million instructions.

        Raises:
            RuntimeError: a block had a fault.
        """
        schedule = Schedule(checks=False)
        launch = self._launch(grid, parameters, memory, threads, shared, schedule)
        fault, has_fault = _Fault(), ctypes.c_int()
        writes = bytes(i.opcode.startswith(_WRITES) for i in self.code)
        handle = library().ptx_trace(
            self._handle,
            ctypes.byref(launch),
            writes,
            steps,
            ctypes.byref(fault),
            ctypes.byref(has_fault),
        )
        if handle is None:
            raise MemoryError(f"{self.name} needs too much memory for a trace")
        if has_fault.value:
            library().ptx_free_trace(handle)
            raise RuntimeError(str(self._describe(fault, memory)))
        return Trace(handle, len(self.code), len(merged(memory)))

    def _launch(
        self,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        memory: list[Memory],
        threads: int | None,
        shared: int,
        schedule: Schedule,
    ) -> _Launch:
        packed = bytearray()
        for offset, value in zip(self.parameter_offsets, parameters, strict=True):
            packed += bytes(offset - len(packed)) + value
        ranges = array.array("Q")
        for start, end in merged(memory):
            ranges.extend((start, end))
        launch = _Launch(
            grid=grid,
            threads=self.kernel.threads or threads,
            shared_bytes=self.kernel.static_shared_bytes + shared,
            parameters=bytes(packed),
            parameter_bytes=len(packed),
            constants=self._constants,
            constant_bytes=len(self._constants),
            memory=ranges.buffer_info()[0],
            num_ranges=len(ranges) // 2,
            **schedule._asdict(),
        )
        launch.ranges = ranges  # which must live as long as their address
        return launch

    def _describe(self, fault: _Fault, memory: list[Memory]) -> Fault:
        """Return a report that names kernel, source line, instruction, thread and address."""
        kind, space, what = KINDS[fault.kind]
        lane = "all lanes" if fault.lane == _NO_LANE else f"lane {fault.lane}"
        thread = f"block {fault.block}, warp {fault.warp}, {lane}"
        where = ""
        if fault.size:
            where = f", {fault.size} bytes at {_name_address(fault.address, space, memory)}"
        text = f"{self.name}: {kind}: {self._place(fault.pc)} {what} ({thread}{where})"
        other = [self._place(fault.other_pc)] if fault.other_pc >= 0 else []
        if fault.other_warp != -1:
            is_here = fault.other_warp != _OTHER_BLOCK
            other.append(f"by warp {fault.other_warp}" if is_here else "by another block")
        text += f"; the other access: {' '.join(other)}" if other else ""
        return Fault(kind, text + (f"; {fault.times} times" if fault.times > 1 else ""))

    def _place(self, pc: int) -> str:
        statement = self.kernel.statements[self.code[pc].statement]
        return f"{statement.location} `{statement}`"


def _place(
    operand: Operand,
    offsets: dict[str, int],
    places: dict[Operand | str, int],
) -> int:
    """Return the number that stands for an operand in the machine."""
    kind, value, _ = operand
    if kind == "register":
        return offsets[value]
    if kind == "special":
        return int(value) * _REGISTER_BYTES
    if kind == "integer":
        return int(value)
    if kind == "none":
        return -1
    return places[operand if kind == "constant" else value]


def merged(memory: list[Memory]) -> list[tuple[int, int]]:
    """Return the ranges in order, with overlapping ranges merged."""
    spans: list[tuple[int, int]] = []
    for start, end, _ in sorted(memory):
        if end <= start:
            continue
        if spans and start < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    return spans


def _name_address(address: int, space: str, memory: list[Memory]) -> str:
    """Return an address by the space, or by the tensor that it is in or closest to."""
    if space == "shared":
        return f"shared{address - SHARED_BASE:+#x}"
    if space == "parameter":
        return f"parameters{ctypes.c_int64(address).value:+#x}"
    near = [m for m in memory if m.start - 4096 <= address < m.end + 4096 and m.end > m.start]
    if not near:
        return f"{address:#x}"
    closest = min(near, key=lambda m: max(m.start - address, address - m.end + 1, 0))
    return f"{closest.name}{address - closest.start:+#x} of {closest.end - closest.start:#x}"
