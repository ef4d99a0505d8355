"""From the trace of a launch to the time that a GPU needs for it.

The time that each unit needs is what the launch asks of it, divided by its rate: no launch is
faster than the slowest unit. The predicted time is that of the fullest multiprocessor, which
timeline.cpp simulates: there units wait for each other, at the start and end of a block, at
barriers, and where the warps are too few to hide latency. Neither is a measurement.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mmfused.tools.ptx.machine import Program
from mmfused.tools.ptx.trace import SECTOR, Cost, Played

from .cards import Card
from .costs import SCHEDULERS, costs, flops_of, rates, registers
from .tracing import Traced

# Limits of how many arithmetic instructions ptxas makes of one of PTX.
_ARITHMETIC = ("fma", "alu", "integer")
_LEAST_SCALE, _MOST_SCALE = 0.7, 1.6
_RESERVED_SHARED = 1024  # bytes of each block
_REGISTERS_GRANULE = 256  # of a warp
# What uses shared memory, by the first letters of the opcode; the first that fits.
SHARED_KINDS = {
    "load": ("ld.", "ldmatrix"),
    "store": ("st.", "stmatrix"),
    # By TMA: whole boxes, of which what is outside of the tensor is filled with zeros.
    "bulk load": ("cp.async.bulk.load", "cp.async.bulk.tensor.load"),
    "bulk store": ("cp.async.bulk",),
    "copy": ("cp.async",),
    "wgmma": ("wgmma",),  # its operands in shared memory
    "other": ("",),  # atomics and mbarriers
}
_PLAYED_ROUNDS = (2, 6)  # blocks in turn on a multiprocessor, from which the rest is extrapolated


@dataclass(frozen=True)
class Prediction:
    """What a launch needs on a card; times are in seconds.

    Attributes:
        name: of the kernel.
        blocks: of the grid.
        traced: how many of the blocks ran and were counted.
        resident: blocks on a multiprocessor at a time.
        waves: rounds of blocks on the GPU.
        units: time that each unit needs; "l2" is at its lower rate.
        low: predicted time with the higher rate of L2.
        high: predicted time with the lower rate of L2.
        prologue: share of a block's time before its first matrix product.
        epilogue: share after its last matrix product.
        barrier: share of a warp's time at barriers.
        slots: issue slots by the unit of the instruction, one of trace.py's UNITS.
        wavefronts: cycles of shared memory for loads and stores.
        shared: wavefronts by what makes them, one of SHARED_KINDS; wgmma's are not in
            ``wavefronts``.
        conflicts: those among them that bank conflicts cost.
        l2_bytes: through L2.
        bulk_bytes: those among them that TMA loads.
        dram_bytes: through DRAM.
        flops: of matrix instructions.
        lines: shares of source lines in the time of the warps, the largest first.
    """

    name: str
    blocks: int
    traced: int
    resident: int
    waves: float
    units: dict[str, float]
    low: float
    high: float
    prologue: float
    epilogue: float
    barrier: float
    slots: dict[str, float]
    wavefronts: float
    shared: dict[str, float]
    conflicts: float
    l2_bytes: float
    bulk_bytes: float
    dram_bytes: float
    flops: float
    lines: dict[str, float]

    @property
    def limiter(self) -> str:
        """The unit that needs most time, or "latency" if none is busy half of the time."""
        unit = max(self.units, key=self.units.__getitem__)
        return unit if self.units[unit] > 0.5 * self.high else "latency"

    @property
    def idle_tail(self) -> float:
        """The share of the last wave's places that have no block."""
        return math.ceil(self.waves) - self.waves


def resident_blocks(traced: Traced, card: Card) -> int:
    """Return how many blocks of a launch a multiprocessor holds."""
    per_warp = -(-traced.code.registers * 32 // _REGISTERS_GRANULE) * _REGISTERS_GRANULE
    # Warps take their registers from one of four parts of the register file.
    warps = card.registers // SCHEDULERS // per_warp * SCHEDULERS
    limits = (
        card.blocks,
        min(card.warps, warps) // traced.warps,
        card.shared_bytes // (traced.shared + _RESERVED_SHARED),
    )
    return max(1, min(limits))


def predict(traced: Traced, card: Card) -> Prediction:
    """Return what a launch needs on a card."""
    cycles = _scaled(costs(traced.program, card), traced)
    resident = resident_blocks(traced, card)
    units = _units(traced, cycles, card)
    low, _, _ = _played(traced, cycles, card, max(card.l2), resident)
    high, played, spent = _played(traced, cycles, card, min(card.l2), resident)
    blocks = min(_PLAYED_ROUNDS[-1] * resident, _most_blocks(traced, card))
    a_block = played.cycles * min(resident, blocks) / blocks
    trace, scale = traced.trace, traced.scale
    return Prediction(
        name=traced.name,
        blocks=traced.blocks,
        traced=trace.blocks,
        resident=resident,
        waves=traced.blocks / (card.multiprocessors * resident),
        units=units,
        # The order in which warps happen to meet makes the times of two plays differ a little.
        low=max(min(low, high), *(value for unit, value in units.items() if unit != "l2")),
        high=max(high, *units.values()),
        prologue=played.first_matrix / a_block,
        epilogue=played.after_matrix / a_block,
        barrier=played.barrier / a_block,
        slots=_slots(traced, cycles),
        wavefronts=scale * float(trace.wavefronts.sum()),
        shared=_shared(traced, cycles),
        conflicts=scale * float(trace.conflicts.sum()),
        l2_bytes=scale * float(trace.sectors.sum()) * SECTOR,
        bulk_bytes=_bulk_bytes(traced),
        dram_bytes=float(traced.dram_sectors().sum()) * SECTOR,
        flops=_flops(traced),
        lines=_lines(traced.program, spent),
    )


def _slots(traced: Traced, cycles: list[Cost]) -> dict[str, float]:
    slots: Counter[str] = Counter()
    for cost, times in zip(cycles, traced.trace.executed.tolist(), strict=True):
        slots[cost.unit] += cost.issue * times * traced.scale
    return {unit: number for unit, number in slots.most_common() if number}


def _shared(traced: Traced, cycles: list[Cost]) -> dict[str, float]:
    found: Counter[str] = Counter()
    trace, code = traced.trace, traced.program.code
    for step, cost, wavefronts, executed in zip(
        code, cycles, trace.wavefronts.tolist(), trace.executed.tolist(), strict=True
    ):
        kind = next(kind for kind, words in SHARED_KINDS.items() if step.opcode.startswith(words))
        found[kind] += traced.scale * (wavefronts + executed * cost.shared)
    return {kind: number for kind, number in found.items() if number}


def _bulk_bytes(traced: Traced) -> float:
    steps = zip(traced.program.code, traced.trace.sectors.tolist(), strict=True)
    loads = SHARED_KINDS["bulk load"]
    sectors = (number for step, number in steps if step.opcode.startswith(loads))
    return traced.scale * float(sum(sectors)) * SECTOR


def _flops(traced: Traced) -> float:
    each = [flops_of(instruction) for instruction in traced.program.code]
    return traced.scale * float(np.dot(traced.trace.executed, each))


def _lines(program: Program, spent: np.ndarray) -> dict[str, float]:
    shares: Counter[str] = Counter()
    for instruction, share in zip(program.code, spent.tolist(), strict=True):
        shares[str(program.kernel.statements[instruction.statement].location)] += share
    return dict(shares.most_common())


def _scaled(cycles: list[Cost], traced: Traced) -> list[Cost]:
    """Return costs in which arithmetic takes as many instructions as ptxas made of it."""
    products = sum(cost.unit in ("wgmma", "tensor") for cost in cycles)
    if products == 0 or traced.code.products != products:
        return cycles  # ptxas may have unrolled a loop, so that these are other instructions
    # ptxas's count has the products and comparisons around a MUFU, but not the MUFU itself.
    counted = sum(cost.issue for cost in cycles if cost.unit in (*_ARITHMETIC, "double"))
    counted += sum(cost.issue - 1 for cost in cycles if cost.unit == "mufu")
    scale = traced.code.arithmetic / max(1.0, counted)
    scale = min(_MOST_SCALE, max(_LEAST_SCALE, scale))
    return [
        cost._replace(issue=cost.issue * scale, busy=cost.busy * scale)
        if cost.unit in _ARITHMETIC
        else cost
        for cost in cycles
    ]


def _units(traced: Traced, cycles: list[Cost], card: Card) -> dict[str, float]:
    """Return the seconds that each unit of the GPU needs."""
    trace = traced.trace
    executed = trace.executed * traced.scale

    def total(field: str, *units: str) -> float:
        values = [getattr(c, field) if not units or c.unit in units else 0.0 for c in cycles]
        return float(np.dot(executed, values))

    each = card.multiprocessors * card.hertz
    shared = traced.scale * trace.wavefronts.sum() + total("shared") + total("busy", "shared")
    matrix = total("busy", "wgmma") + total("busy", "tensor")
    fma, alu, mufu, double = (total("busy", unit) for unit in ("fma", "alu", "mufu", "double"))
    both = (fma + alu + total("busy", "integer")) / 2
    units = {
        "issue": total("issue") / SCHEDULERS / each,
        "arithmetic": max(fma, alu, both, double) / SCHEDULERS / each,
        "mufu": mufu / SCHEDULERS / each,
        "matrix": matrix / SCHEDULERS / each,
        "shared": shared / each,
        "l2": trace.sectors.sum() * traced.scale * SECTOR / min(card.l2),
        "dram": traced.dram_sectors().sum() * SECTOR / card.dram,
    }
    return {unit: float(seconds) for unit, seconds in units.items()}


def _most_blocks(traced: Traced, card: Card) -> int:
    """Return the blocks of the multiprocessor that gets most."""
    return math.ceil(traced.blocks / card.multiprocessors)


def _played(
    traced: Traced,
    cycles: list[Cost],
    card: Card,
    l2: float,
    resident: int,
) -> tuple[float, Played, np.ndarray]:
    """Return seconds of the fullest multiprocessor, and the longer play."""
    fresh = traced.trace.distinct.sum() * traced.scale
    from_dram = float(traced.dram_sectors().sum() / max(1.0, fresh))
    most = _most_blocks(traced, card)
    # Where other multiprocessors have fewer blocks, this one gets more of the memories' rates.
    share = traced.blocks / (card.multiprocessors * most)
    play = functools.partial(
        traced.trace.play,
        cycles,
        _registers(traced.program),
        rates(card, l2 / share, from_dram * share),
        resident=resident,
    )
    first, second = (min(most, rounds * resident) for rounds in _PLAYED_ROUNDS)
    played, spent = play(blocks=second)
    total = played.cycles
    if second < most:
        total += (most - second) * (total - play(blocks=first)[0].cycles) / (second - first)
    return total / card.hertz, played, spent


@functools.lru_cache(maxsize=256)
def _registers(program: Program):
    return registers(program)
