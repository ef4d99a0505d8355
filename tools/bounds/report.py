"""``mmfused inspect --bound``: what limits each launch of a row of the targets, as text or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import triton

from .cards import Card
from .predict import Prediction
from .rows import SCALED, Bound, Step, bounds, limiter, prediction, step, times
from .tracing import Traced
from .work import Work, microseconds, time_range

_MOST_LINES = 3  # of the source, for each launch
_LEAST_SECONDS = 1e-6  # of an operator of torch that has a line of its own


def text(op: str, case: str, card: Card) -> str:
    """Return what limits each launch of a row: some lines for each."""
    if (op, case) in SCALED:
        smaller, factor = SCALED[op, case]
        return f"{op} {case}: {factor} times\n{text(op, smaller, card)}"
    lines = []
    passes = zip(Step._fields, step(op, case, card.arch), bounds(op, case, card), strict=True)
    for which, launches, bound in passes:
        lines.append(
            f"{op} {case}, {which}, {card.name}, Triton {triton.__version__}: {_sum(bound)}"
        )
        small = 0
        for launch in launches:
            if isinstance(launch, Traced):
                lines += _kernel(launch, card)
            elif times(launch, card)[1] >= _LEAST_SECONDS:
                lines.append(f"  {_heading(launch, card)}; {_work(launch)}")
            else:
                small += 1
        if small:
            lines.append(f"  {small} operators of torch under {microseconds(_LEAST_SECONDS)} us")
    return "\n".join(lines)


def records(op: str, case: str, card: Card) -> list[dict[str, Any]]:
    """Return the same as a list of launches, for JSON; ``factor``: see :data:`rows.SCALED`."""
    found = []
    case, factor = SCALED.get((op, case), (case, 1))
    for which, launches in zip(Step._fields, step(op, case, card.arch), strict=True):
        for launch in launches:
            low, high = times(launch, card)
            limit = limiter(launch, card)
            entry = {"low": low, "high": high, "limiter": limit, "factor": factor}
            more = (
                asdict(prediction(launch, card)) if isinstance(launch, Traced) else launch._asdict()
            )
            found.append({"op": op, "case": case, "pass": which, "card": card.name} | more | entry)
    return found


def _sum(bound: Bound) -> str:
    return (
        f"{time_range(bound.low, bound.high)} us predicted, floor {microseconds(bound.floor)} us "
        f"({100 * bound.share:.0f} %), {bound.launches} launches"
    )


def _heading(launch: Traced | Work, card: Card) -> str:
    name = launch.name.removesuffix("_kernel")
    return f"{name}: {time_range(*times(launch, card))} us, limited by {limiter(launch, card)}"


def _work(work: Work) -> str:
    return f"{work.flops / 1e9:.1f} GFLOP, {work.bytes / 1e6:.1f} MB"


def _kernel(launch: Traced, card: Card) -> list[str]:
    found = prediction(launch, card)
    sampled = f"{found.traced} of {found.blocks} blocks counted"
    if found.traced == found.blocks:
        sampled = f"all {found.blocks} blocks counted"
    units = ", ".join(f"{unit} {microseconds(seconds)}" for unit, seconds in found.units.items())
    spilled = f", {launch.code.stack} bytes spilled by a thread" if launch.code.stack else ""
    outside = ""
    if found.flops:
        outside = (
            f"{100 * found.prologue:.0f} % of a block before its first product, "
            f"{100 * found.epilogue:.0f} % after its last one; "
        )
    return [
        f"  {_heading(launch, card)}; {sampled}",
        f"    us of each unit: {units}",
        f"    issue slots: {_slots(found)}",
        f"    {found.flops / 1e9:.1f} GFLOP of matrix products; {_memory(found)}",
        f"    {launch.code.registers} registers{spilled}, {launch.shared} bytes of shared memory; "
        f"blocks on a multiprocessor: {found.resident}, {found.waves:.1f} waves, "
        f"{100 * found.idle_tail:.0f} % of the last one idle",
        f"    not overlapped: {outside}{100 * found.barrier:.0f} % at barriers",
        f"    most time at {_lines(found)}",
    ]


def _slots(found: Prediction) -> str:
    total = sum(found.slots.values())
    shares = {unit: number / total for unit, number in found.slots.items()}
    return f"{total:.3g}: " + ", ".join(
        f"{unit} {100 * share:.0f} %" for unit, share in shares.items() if share >= 0.01
    )


def _memory(found: Prediction) -> str:
    conflicts = 100 * found.conflicts / max(1.0, found.wavefronts)
    return (
        f"{found.wavefronts:.3g} wavefronts of shared memory, {conflicts:.0f} % by bank conflicts; "
        f"{found.l2_bytes / 1e6:.1f} MB through L2, {found.dram_bytes / 1e6:.1f} MB through DRAM"
    )


def _lines(found: Prediction) -> str:
    largest = list(found.lines.items())[:_MOST_LINES]
    return ", ".join(f"{line} ({100 * share:.0f} %)" for line, share in largest)
