"""Put what ncu measured beside what was counted, kernel by kernel, and say where they differ."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmfused.benchmarks import tables
from mmfused.tools.bounds.cards import CARDS
from mmfused.tools.bounds.work import microseconds, time_range

OTHERS = "without a count, of both passes"
PASSES = ("forward", "backward", OTHERS)
FIFTH = 0.2  # a measurement that differs from its count by more is listed
LEAST_SECONDS = 3e-6  # kernels that take less in all are not judged
SECTOR = 32  # bytes of L2 and DRAM
_PART = 0.05  # of all wavefronts, from which those of loads, stores, ... are judged on their own
_BUSY = 50.0  # percent: the limit below which no unit limits a kernel; see Prediction.limiter
# Units by the names that the count has for them, and how busy ncu says they are.
_UNITS = {
    "issue": ("issue_percent",),
    "arithmetic": ("alu_percent", "fma_percent"),
    "mufu": ("mufu_percent",),
    "matrix": ("matrix_percent",),
    "shared": ("shared_percent",),
    "l2": ("l2_percent",),
    "dram": ("dram_percent",),
}
_PERCENTS = sorted({key for keys in _UNITS.values() for key in keys} | {"warps_percent"})
_SUMS = ("seconds", "instructions", "wavefronts", "load", "store", "copy", "wgmma", "conflicts")
_SUMS += ("bulk_bytes", "l2_sectors", "dram_read", "dram_written")
_LIMITS = ("blocks_by_registers", "blocks_by_shared", "blocks_by_warps")


@dataclass
class Group:
    """The launches of one kernel in one pass.

    Attributes:
        name: of the kernel.
        which: "forward" or "backward", or OTHERS: ncu does not tell which pass launched it.
        measured: one dict for each launch, by keys of ``ncu.METRICS`` and "blocks".
        counted: what was counted of each launch; empty for kernels of other libraries.
    """

    name: str
    which: str
    measured: list[dict[str, float]] = field(default_factory=list)
    counted: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.sum("seconds") or 0.0

    @property
    def is_counted(self) -> bool:
        """Whether each launch has a count, and of the same grid."""
        pairs = zip(self.measured, self.counted, strict=False)
        same = all(launch["blocks"] == count["blocks"] for launch, count in pairs)
        return bool(self.counted) and len(self.measured) == len(self.counted) and same

    def sum(self, key: str) -> float | None:
        """Return the sum of a measurement over the launches; None if a launch lacks it."""
        values = [launch.get(key) for launch in self.measured]
        return None if None in values else float(sum(values))  # type: ignore[arg-type]

    def percent(self, key: str) -> float | None:
        """Return a mean over the time of the launches; None if a launch lacks it."""
        values = [launch.get(key) for launch in self.measured]
        if None in values or not self.seconds:
            return None
        parts = (x[key] * x["seconds"] for x in self.measured)
        return sum(parts) / self.seconds

    def count(self, key: str) -> float:
        return sum(count[key] for count in self.counted)

    def shared(self, *kinds: str) -> float:
        """Return the counted wavefronts of some kinds, see ``predict.SHARED_KINDS``."""
        return sum(count["shared"].get(kind, 0.0) for count in self.counted for kind in kinds)

    def predicted(self, card: str) -> tuple[float, float]:
        """Return the low and the high predicted seconds."""
        times = [count["cards"][card] for count in self.counted]
        return sum(x["low"] for x in times), sum(x["high"] for x in times)

    def limiter(self, card: str) -> str:
        """Return what limits the slowest launch by the count."""
        times = [count["cards"][card] for count in self.counted]
        return max(times, key=lambda time: time["high"])["limiter"]

    def busiest(self) -> tuple[str, float] | None:
        """Return the unit that ncu says is busiest, or "latency", and the percent it is busy."""
        percents = {
            unit: max(found)
            for unit, keys in _UNITS.items()
            if (found := [x for x in map(self.percent, keys) if x is not None])
        }
        if not percents:
            return None
        unit = max(percents, key=percents.__getitem__)
        return (unit if percents[unit] > _BUSY else "latency"), percents[unit]


class Quantity(NamedTuple):
    """Something that is measured and counted; smaller values than ``least`` are not judged."""

    name: str
    measured: Callable[[Group], float | None]
    counted: Callable[[Group], float]
    least: float


def _dram(group: Group) -> float | None:
    parts = [group.sum("dram_read"), group.sum("dram_written")]
    return None if None in parts else sum(parts)  # type: ignore[arg-type]


def _times(key: str, factor: float = 1.0) -> Callable[[Group], float | None]:
    return lambda group: None if (found := group.sum(key)) is None else factor * found


def _rest(group: Group) -> float | None:
    """Return wavefronts that are no load, store or copy: wgmma's operands, where not listed."""
    parts = [group.sum(key) for key in ("wavefronts", "load", "store", "copy")]
    if None in parts or group.sum("wgmma") is not None:
        return None
    return parts[0] - sum(parts[1:])  # type: ignore[operator,arg-type]


def _slots(group: Group) -> float:
    return sum(sum(count["slots"].values()) for count in group.counted)


INSTRUCTIONS = Quantity("instructions", _times("instructions"), _slots, 1e5)
# TMA does not pass the LSU, whose wavefronts ncu counts.
_LSU_KINDS = ("load", "store", "copy", "wgmma", "other")
WAVEFRONTS = Quantity("wavefronts", _times("wavefronts"), lambda g: g.shared(*_LSU_KINDS), 1e5)
PARTS = (
    Quantity("wavefronts of loads", _times("load"), lambda g: g.shared("load"), 1e5),
    Quantity("wavefronts of stores", _times("store"), lambda g: g.shared("store"), 1e5),
    Quantity("wavefronts of cp.async", _times("copy"), lambda g: g.shared("copy"), 1e5),
    Quantity("wavefronts of wgmma", _times("wgmma"), lambda g: g.shared("wgmma"), 1e5),
    Quantity("wavefronts of wgmma and the rest", _rest, lambda g: g.shared("wgmma", "other"), 1e5),
    Quantity("bank conflicts", _times("conflicts"), lambda g: g.count("conflicts"), 1e5),
)
L2 = Quantity("L2 bytes", _times("l2_sectors", SECTOR), lambda g: g.count("l2_bytes"), 1e6)
DRAM = Quantity("DRAM bytes", _dram, lambda g: g.count("dram_bytes"), 1e6)
TMA = Quantity("bytes loaded by TMA", _times("bulk_bytes"), lambda g: g.count("bulk_bytes"), 1e6)


# ---- pairing -------------------------------------------------------------------------------------


def groups(launches: list[dict[str, Any]], counted: list[dict[str, Any]]) -> list[Group]:
    """Pair launches with counts, the k-th launch of a kernel with its k-th count.

    Args:
        launches: measured, in order: ``name`` and a dict as in :class:`Group`.
        counted: an entry of ``bounds.kernel_counts``.

    Returns:
        The kernels of each pass by their first launch, then those without a count. A counted
        kernel that was not launched has no measurements.
    """
    waiting = defaultdict(list)
    for count in counted:
        if not count.get("torch"):
            waiting[count["name"]].append(count)
    found: dict[tuple[str, str], Group] = {}
    for launch in launches:
        count = waiting[launch["name"]].pop(0) if waiting.get(launch["name"]) else None
        which = count["pass"] if count else _last_pass(found, launch["name"])
        group = found.setdefault((which, launch["name"]), Group(launch["name"], which))
        group.measured.append(launch)
        group.counted += [count] if count else []
    for count in (count for left in waiting.values() for count in left):
        key = count["pass"], count["name"]
        found.setdefault(key, Group(count["name"], count["pass"])).counted.append(count)
    return sorted(found.values(), key=lambda group: PASSES.index(group.which))


def _last_pass(found: dict[tuple[str, str], Group], name: str) -> str:
    """Return where a launch without a count belongs: to earlier ones of its kernel, if any."""
    return next((which for which in PASSES[1::-1] if (which, name) in found), OTHERS)


# ---- differences ---------------------------------------------------------------------------------


def ratio(quantity: Quantity, group: Group) -> float | None:
    """Return how many times the count a measurement is, or None if they cannot be compared."""
    measured = quantity.measured(group)
    if measured is None or not group.is_counted:
        return None
    counted = quantity.counted(group)
    if max(measured, counted) < quantity.least:
        return None
    return measured / counted if counted else float("inf")


def time_ratio(group: Group, card: str | None) -> float | None:
    """Return how many times the predicted time the measured one is; 1 between low and high."""
    if card is None or not group.is_counted or group.sum("seconds") is None:
        return None
    low, high = group.predicted(card)
    return group.seconds / min(max(group.seconds, low), high)


def differs(ratio: float | None) -> bool:
    return ratio is not None and abs(ratio - 1) > FIFTH


def differences(group: Group, card: str | None) -> list[str]:
    """Return a sentence for each thing in which a kernel differs from its count."""
    name = group.name.removesuffix("_kernel")
    if not group.counted or (group.measured and group.seconds < LEAST_SECONDS):
        return []
    if not group.is_counted:
        return [f"{name}: not compared: {_other_launches(group)}"]
    found = []
    if differs(times := time_ratio(group, card)):
        found.append(f"{name}: time {times:.2f} times the prediction")
    whole = WAVEFRONTS.counted(group) + (WAVEFRONTS.measured(group) or 0.0)
    for quantity in (INSTRUCTIONS, WAVEFRONTS, *PARTS, TMA, L2, DRAM):
        times = ratio(quantity, group)
        measured, counted = quantity.measured(group) or 0.0, quantity.counted(group)
        is_small = quantity in PARTS and measured + counted < _PART * whole
        if differs(times) and not is_small:
            how = f"{times:.2f} times the count" if counted else "none counted"
            found.append(f"{name}: {quantity.name} {how} ({measured:.4g}, {counted:.4g} counted)")
    return found + _other_code(name, group, card)


def _other_launches(group: Group) -> str:
    sizes = [{x["blocks"] for x in each} for each in (group.measured, group.counted)]
    launches = f"{len(group.measured)} launches, {len(group.counted)} counted"
    if len(group.measured) != len(group.counted):
        return launches
    grids = " and ".join(" or ".join(f"{n:.0f}" for n in sorted(each)) for each in sizes)
    return f"{launches}; blocks, measured and counted: {grids}"


def _other_code(name: str, group: Group, card: str | None) -> list[str]:
    """Return in what the compiled code or what limits it differs."""
    found = []
    registers = {int(x["registers"]) for x in group.measured if x.get("registers")}
    counted = {count["registers"] for count in group.counted}
    if registers - counted:
        found.append(f"{name}: {_list(registers)} registers, {_list(counted)} counted: other code")
    held = [min(x[key] for key in _LIMITS if x.get(key)) for x in group.measured if _has_limits(x)]
    resident = {count["resident"] for count in group.counted}
    if set(map(int, held)) - resident:
        found.append(f"{name}: {_list(held)} blocks on a multiprocessor, {_list(resident)} counted")
    busiest = group.busiest()
    if card is not None and busiest and busiest[0] != group.limiter(card):
        how = f"{busiest[0]} (no unit is more than {busiest[1]:.0f} % busy)"
        how = how if busiest[0] == "latency" else f"{busiest[0]} ({busiest[1]:.0f} % busy)"
        found.append(f"{name}: limited by {how}, by {group.limiter(card)} in the count")
    return found


def _has_limits(launch: dict[str, float]) -> bool:
    return any(launch.get(key) for key in _LIMITS)


def _list(values: Any) -> str:
    return ", ".join(f"{value:.0f}" for value in sorted(set(values)))


# ---- the table -----------------------------------------------------------------------------------

HEADS = ["kernel", "launches", "us", "predicted", "ratio", "wavefronts, measured / counted"]
HEADS += ["instructions", "L2 MB", "DRAM MB", "issue", "matrix", "L2", "limited by", "in the count"]


def markdown(
    launches: list[dict[str, Any]],
    counted: list[dict[str, Any]],
    card: str | None,
) -> str:
    """Return the table: a kernel in a line, and below the sentences about differences."""
    found, lines = groups(launches, counted), []
    for which in PASSES:
        ones = [group for group in found if group.which == which]
        if ones:
            lines.append([f"**{which}**", *([""] * (len(HEADS) - 1))])
            lines += [_line(group, card) for group in _joined(ones)]
    whole = Group("all", OTHERS, launches, counted if card else [])
    lines.append(_whole(whole, card))
    sentences = [sentence for group in found for sentence in differences(group, card)]
    listed = "\n".join(f"* {sentence}" for sentence in sentences) or "None."
    return f"{tables.markdown(HEADS, lines)}\n\nDifferences of more than a fifth:\n\n{listed}"


def _joined(found: list[Group]) -> list[Group]:
    """Join the groups without a count that take less than a hundredth of all those."""
    least = sum(group.seconds for group in found) / 100
    small = [group for group in found if not group.counted and group.seconds < least]
    if len(small) < 2:
        return found
    launches = [launch for group in small for launch in group.measured]
    return [
        *(group for group in found if group not in small),
        Group(f"{len(small)} others", OTHERS, launches),
    ]


def _line(group: Group, card: str | None) -> list[str]:
    busiest = group.busiest() if group.counted and group.measured else None
    predicted, limiter = "", ""
    if card is not None and group.counted:
        predicted, limiter = time_range(*group.predicted(card)), group.limiter(card)
    is_judged = group.seconds >= LEAST_SECONDS
    return [
        group.name.removesuffix("_kernel"),
        str(len(group.measured)),
        microseconds(group.seconds) if group.measured else "not launched",
        predicted,
        _ratio(time_ratio(group, card), is_judged),
        *(_pair(quantity, group) for quantity in (WAVEFRONTS, INSTRUCTIONS)),
        *(_pair(quantity, group, 1e6) for quantity in (L2, DRAM)),
        *(
            _percent(group.percent(key)) if group.counted else ""
            for key in ("issue_percent", "matrix_percent", "l2_percent")
        ),
        f"{busiest[0]} ({busiest[1]:.0f} %)" if busiest else "",
        limiter,
    ]


def _whole(group: Group, card: str | None) -> list[str]:
    """Return the line of all launches; the count includes operators of torch."""
    predicted = group.predicted(card) if card else None
    times = [microseconds(group.seconds), time_range(*predicted) if predicted else ""]
    return ["**all**", str(len(group.measured)), *times, *([""] * (len(HEADS) - 4))]


def _ratio(value: float | None, is_judged: bool) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}**" if is_judged and differs(value) else f"{value:.2f}"


def _pair(quantity: Quantity, group: Group, unit: float = 1.0) -> str:
    """Return "measured / counted", in bold if they differ."""
    measured = quantity.measured(group) if group.measured else None
    if not group.counted or measured is None:
        return ""
    numbers = f"{measured / unit:.3g}"
    if not group.is_counted:
        return numbers
    numbers += f" / {quantity.counted(group) / unit:.3g}"
    is_judged = group.seconds >= LEAST_SECONDS
    return f"**{numbers}**" if is_judged and differs(ratio(quantity, group)) else numbers


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def heading(
    record: dict[str, Any],
    launches: list[dict[str, Any]],
    triton: str | None,
    card: str | None,
) -> str:
    """Return what was measured with what, and the clock that the count assumes."""
    facts = record["environment"]
    clocks = [x["hertz"] for x in launches if x.get("hertz")]
    clock = f", {statistics.median(clocks) / 1e9:.2f} GHz" if clocks else ""
    if clock and card:
        clock += f" (counted: {CARDS[card].hertz / 1e9:.2f})"
    commit = (facts["commit"] or "unknown")[:10] + ("+" if facts["dirty"] else "")
    name = f"{record['op']} {record['case']}"
    return (
        f"### {name}\n\n"
        f"{'Dry run, no measurement. ' if record['dry_run'] else ''}{facts['device']}, "
        f"Triton {facts['versions']['triton']}, ncu {facts['ncu']}, commit {commit}{clock}. "
        f"{f'Counted with Triton {triton}.' if triton else 'Not counted.'}"
    )
