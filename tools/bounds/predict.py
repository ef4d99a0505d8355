"""From the trace of a launch to the time that a GPU needs for it.

The time that each unit needs is what the launch asks of it, divided by its rate: no launch is
faster than the slowest unit. The predicted time is that of the fullest multiprocessor, which plays
its blocks (timeline.cpp): there units wait for each other, at the start and end of a block, at
barriers, and where the warps are too few to hide latency. Neither is a measurement.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from mmfused.tools.ptx.machine import Program
from mmfused.tools.ptx.trace import SECTOR, Cost, Played

from .cards import Card
from .costs import SCHEDULERS, costs, rates, registers
from .tracing import Traced

# Cycles that ptxas's arithmetic instructions take for one of PTX: it merges some, and adds others.
_ARITHMETIC = ("fma", "alu", "integer")
_LEAST_SCALE, _MOST_SCALE = 0.7, 1.6
_RESERVED_SHARED = 1024  # bytes of each block
_REGISTERS_GRANULE = 256  # of a warp
_PLAYED_ROUNDS = (2, 6)  # blocks in turn on a multiprocessor, from which the rest is extrapolated


@dataclass(frozen=True)
class Prediction:
    """What a launch needs on a card; times are in seconds.

    Attributes:
        name: of the kernel.
        blocks: of the grid, and how many of them were traced.
        traced: blocks whose instructions were counted.
        resident: blocks on a multiprocessor at a time.
        waves: rounds of blocks on the GPU.
        units: time that each unit needs; "l2" is at its lower rate.
        low: predicted time with the higher rate of L2.
        high: predicted time with the lower rate of L2.
        prologue: share of a block's time before its first matrix product.
        epilogue: share after its last matrix product.
        barrier: share of a warp's time at barriers.
        l2_bytes: through L2.
        dram_bytes: through DRAM.
        flops: of matrix instructions.
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
    l2_bytes: float
    dram_bytes: float
    flops: float

    @property
    def limiter(self) -> str:
        """The unit that needs most time, or "latency" if none is busy half of the time."""
        unit = max(self.units, key=self.units.__getitem__)
        return unit if self.units[unit] > 0.5 * self.high else "latency"


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
    units, flops = _units(traced, cycles, card)
    low, _ = _played(traced, cycles, card, max(card.l2), resident)
    high, played = _played(traced, cycles, card, min(card.l2), resident)
    blocks = min(_PLAYED_ROUNDS[-1] * resident, _most_blocks(traced, card))
    a_block = played.cycles * min(resident, blocks) / blocks
    least = max(units.values())
    return Prediction(
        traced.name,
        traced.blocks,
        traced.trace.blocks,
        resident,
        traced.blocks / (card.multiprocessors * resident),
        units,
        max(low, least if units["l2"] < least else 0.0),
        max(high, least),
        played.first_matrix / a_block,
        played.after_matrix / a_block,
        played.barrier / a_block,
        float(traced.trace.sectors.sum()) * SECTOR * traced.scale,
        float(traced.dram_sectors().sum()) * SECTOR,
        flops,
    )


def _scaled(cycles: list[Cost], traced: Traced) -> list[Cost]:
    """Return costs in which arithmetic takes as many instructions as ptxas made of it."""
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


def _units(traced: Traced, cycles: list[Cost], card: Card) -> tuple[dict[str, float], float]:
    """Return the seconds that each unit of the GPU needs, and the FLOPs of matrix products."""
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
    per_cycle = card.matrix_per_cycle / SCHEDULERS
    flops = total("busy", "wgmma") * per_cycle
    flops += total("busy", "tensor") * per_cycle * card.mma_share
    return {unit: float(seconds) for unit, seconds in units.items()}, flops


def _most_blocks(traced: Traced, card: Card) -> int:
    """Return the blocks of the multiprocessor that gets most."""
    return math.ceil(traced.blocks / card.multiprocessors)


def _played(
    traced: Traced,
    cycles: list[Cost],
    card: Card,
    l2: float,
    resident: int,
) -> tuple[float, Played]:
    """Return seconds of the fullest multiprocessor, and the last play."""
    fresh = traced.trace.distinct.sum() * traced.scale
    from_dram = float(traced.dram_sectors().sum() / max(1.0, fresh))
    play = functools.partial(
        traced.trace.play,
        cycles,
        _registers(traced.program),
        rates(card, l2, from_dram),
        resident=resident,
    )
    most = _most_blocks(traced, card)
    first, second = (min(most, rounds * resident) for rounds in _PLAYED_ROUNDS)
    played, _ = play(blocks=second)
    total = played.cycles
    if second < most:
        total += (most - second) * (total - play(blocks=first)[0].cycles) / (second - first)
    return total / card.hertz, played


@functools.lru_cache(maxsize=256)
def _registers(program: Program):
    return registers(program)
