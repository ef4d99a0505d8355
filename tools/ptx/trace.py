"""What the blocks of a launch did, and how long a multiprocessor would take for it."""

from __future__ import annotations

import array
import ctypes
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .build import library

SECTOR = 32  # bytes
# In the order of timeline.cpp's Unit.
UNITS = (
    "free",
    "fma",
    "alu",
    "mufu",
    "double",
    "tensor",
    "integer",
    "shared",
    "load",
    "store",
    "copy",
)
UNITS += ("commit copies", "wait copies", "wgmma", "commit wgmma", "wait wgmma", "barrier")
UNITS += ("mbarrier", "wait mbarrier", "bulk load", "bulk store", "commit bulk", "wait bulk")


class Cost(NamedTuple):
    """What an instruction of a warp costs, in cycles; see timeline.cpp.

    Args:
        unit: one of UNITS.
        issue: of its scheduler.
        busy: of its pipe.
        latency: until its result is ready, from when its pipe takes it or, of shared memory and
            wgmma, from when they are done.
        shared: of shared memory, beside what the trace counts.
        remaining: groups that may remain unfinished after a wait; 1 for a barrier that does not
            wait.
    """

    unit: str = "free"
    issue: float = 0.0
    busy: float = 0.0
    latency: float = 0.0
    shared: float = 0.0
    remaining: int = 0


class Registers(NamedTuple):
    """The numbers of the registers that an instruction reads and writes."""

    reads: list[int]
    writes: list[int]


class Order(NamedTuple):
    """For each instruction, the number of its basic block and its place in the block."""

    blocks: list[int]
    ranks: list[int]


@dataclass(frozen=True)
class Rates:
    """Cycles of one multiprocessor.

    Args:
        sector_shared: for a sector in the first level cache.
        sector_port: in the multiprocessor's port to L2.
        sector_l2: at its share of L2's rate.
        sector_dram: at its share of DRAM's rate.
        latency_l2: of an access to L2.
        latency_dram: of an access to DRAM.
        block_start: from the end of a block to the first instruction of the next one.
    """

    sector_shared: float
    sector_port: float
    sector_l2: float
    sector_dram: float
    latency_l2: float
    latency_dram: float
    block_start: float


class _Cost(ctypes.Structure):
    _fields_ = [
        ("unit", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("issue", "busy", "latency", "shared")),
        *((name, ctypes.c_int32) for name in ("remaining", "reads", "writes", "end")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("costs", "registers")),
        ("num_registers", ctypes.c_int32),
        *((name, ctypes.c_float) for name in Rates.__annotations__),
        ("spent", ctypes.c_void_p),
    ]


class Played(ctypes.Structure):
    """The result of :meth:`Trace.play`, in cycles.

    ``cycles``: all blocks. ``first_matrix`` and ``after_matrix``: mean time of a block before its
    first matrix product and after its last one; 0 if it has none. ``barrier``: mean time that a
    warp waits at barriers.
    """

    _fields_ = [
        (name, ctypes.c_double) for name in ("cycles", "first_matrix", "after_matrix", "barrier")
    ]


class Trace:
    """The instructions of some blocks of a launch; made by ``Program.trace``.

    Sums over these blocks for each instruction: ``executed`` by a warp; ``wavefronts``, cycles of
    shared memory; ``conflicts``, those that bank conflicts cost; ``sectors`` of global memory.
    ``distinct`` and ``by_blocks`` (ranges, 2) are the sectors of each range that were read and
    written: counted once, and counted once in each block.
    """

    def __init__(self, handle: int, num_instructions: int, num_ranges: int) -> None:
        self._handle = handle
        weakref.finalize(self, library().ptx_free_trace, handle)
        self.blocks: int = library().ptx_traced_blocks(handle)
        counts = np.zeros((num_instructions, 4), np.uint64)
        library().ptx_trace_counts(handle, counts.ctypes.data)
        counts = counts.T.astype(np.int64)
        self.executed, self.wavefronts, self.conflicts, self.sectors = counts
        sectors = np.zeros((num_ranges, 4), np.uint64)
        library().ptx_trace_sectors(handle, sectors.ctypes.data)
        self.distinct, self.by_blocks = sectors[:, :2].astype(int), sectors[:, 2:].astype(int)

    def reorder(self, order: Order) -> None:
        """Put the instructions that a warp ran in another order within each basic block."""
        blocks, ranks = (np.array(each, np.int32) for each in order)
        library().ptx_reorder(self._handle, blocks.ctypes.data, ranks.ctypes.data)

    def play(
        self,
        costs: list[Cost],
        registers: list[Registers],
        rates: Rates,
        *,
        resident: int,
        blocks: int,
    ) -> tuple[Played, np.ndarray]:
        """Return how long a multiprocessor takes for blocks, and each instruction's share of it.

        The share of an instruction in the time of the warps begins where the previous instruction
        of its warp was issued.

        Args:
            costs: of each instruction.
            registers: of each instruction.
            rates: of the memories.
            resident: how many blocks run at a time.
            blocks: how many run in all; the traced blocks are repeated.
        """
        numbers = array.array("i")
        table = (_Cost * len(costs))()
        for row, cost, (reads, writes) in zip(table, costs, registers, strict=True):
            row.unit = UNITS.index(cost.unit)
            row.issue, row.busy, row.latency, row.shared, row.remaining = cost[1:]
            row.reads = len(numbers)
            row.writes = row.reads + len(reads)
            numbers.extend(reads + writes)
            row.end = len(numbers)
        spent = np.zeros(len(costs))
        model = _Model(
            costs=ctypes.addressof(table),
            registers=numbers.buffer_info()[0],
            num_registers=max(numbers, default=0) + 1,
            **vars(rates),
            spent=spent.ctypes.data,
        )
        play = library().ptx_play
        play.restype = Played
        played = play(self._handle, ctypes.byref(model), resident, blocks)
        return played, spent / max(1.0, spent.sum())
