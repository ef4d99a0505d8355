"""Compare the library with the best accurate baseline of each case and draw the pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarks import charts, report
from ..benchmarks.run import OPS
from .conditions import common_launch, device_type, fastest, ours_of, with_compiled

FASTER, SLOWER = "#3b6ea5", "#b5503c"  # bar colours where the library is faster, or slower
Fill = Callable[[Any], None]  # draws on a matplotlib Figure


@dataclass(frozen=True)
class Comparison:
    """Times of a case's longest pass, as (median seconds, provider label).

    ``launch``: the launch of all times, "eager" or "graph".
    ``ours``: the fastest kernel provider, or the composed path if no kernels were timed.
    ``best``: the fastest baseline, or None if no baseline was timed.
    ``faster``: the faster of ``best`` and the composed path, or None if neither beats ``ours``.
    """

    record: dict
    launch: str
    ours: tuple[float, str]
    best: tuple[float, str] | None
    faster: tuple[float, str] | None

    @property
    def speedup(self) -> float | None:
        return None if self.best is None else self.best[0] / self.ours[0]

    @property
    def key(self) -> str:
        return f"{device_type(self.record)}/{self.record['op']}/{self.record['case']['name']}"

    @property
    def memory(self) -> tuple[int | None, int | None]:
        """Return the memory of the best baseline and of ours, in bytes (see memory_key)."""
        providers, key = self.record["providers"], memory_key(self.record)
        best = None if self.best is None else providers[self.best[1]][key]
        return best, providers[self.ours[1]][key]


def memory_key(record: dict) -> str:
    """Return the key of the memory to show: the peak on a GPU, else the saved activations."""
    return "peak_bytes" if device_type(record) == "cuda" else "saved_bytes"


def compare(record: dict) -> Comparison | None:
    """Return the comparison of a record, or None if no provider of the library was timed."""
    which, names = report.longest_pass(record), ours_of(record["op"])
    kernels = with_compiled(name for name in names if name != "composed")
    composed = with_compiled(["composed"])
    ours = fastest(record, kernels, which) or fastest(record, composed, which)
    if not ours:
        return None
    baselines = fastest(
        record,
        [label for label in record["providers"] if label not in (*kernels, *composed)],
        which,
    )
    launch = common_launch(record, ours, baselines, strict=False)
    if launch is None:
        launch, baselines = common_launch(record, ours, strict=False), {}
    best, mine = baselines.get(launch), ours[launch]
    rivals = [
        rival for rival in (best, fastest(record, composed, which).get(launch)) if rival is not None
    ]
    faster = min((rival for rival in rivals if rival[0] < mine[0]), default=None)
    return Comparison(record, launch, mine, best, faster)


def comparisons(records: list[dict]) -> list[Comparison]:
    records = sorted(records, key=lambda record: OPS.index(record["op"]))
    return [found for record in records if (found := compare(record)) is not None]


# ---- pictures ------------------------------------------------------------------------------------


def pictures(records: list[dict], folder: Path) -> dict[Path, tuple[str, Fill]]:
    """Return for each picture the fingerprint of its numbers, and the function that draws it."""
    rows = [row for row in comparisons(records) if row.best is not None]
    shown = [
        [
            row.key,
            row.record["dtype"],
            row.launch,
            row.ours,
            row.best,
            row.memory,
            versions(row.record),
        ]
        for row in rows
    ]
    found = (
        {folder / "speedup.png": (fingerprint(shown), lambda figure: speedups(rows, figure))}
        if rows
        else {}
    )
    for op in dict.fromkeys(record["op"] for record in records):
        op_records = [record for record in records if record["op"] == op]
        if not any(
            stage["flops"]
            for record in op_records
            for stages in record["work"].values()
            for stage in stages
        ):
            continue  # an op without FLOPs has no place on a roofline

        def roofline(figure, op=op, op_records=op_records):
            figure.set_size_inches(8, 6)
            charts.roofline(op, op_records, figure.add_subplot())

        found[folder / f"{op}-roofline.png"] = fingerprint(op_records), roofline
    return found


def fingerprint(shown: object) -> str:
    text = json.dumps(shown, sort_keys=True)
    return f"mmfused results {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_current(path: Path, numbers: str) -> bool:
    """Return whether the picture's metadata contains the fingerprint ``numbers``."""
    return path.is_file() and numbers.encode() in path.read_bytes()


def draw(path: Path, numbers: str, fill: Fill) -> None:
    """Draw the picture, unless the file already shows the same numbers."""
    from matplotlib.figure import Figure

    if not is_current(path, numbers):
        figure = Figure(layout="constrained")
        fill(figure)
        options = {"format": "png", "dpi": 110, "metadata": {"Description": numbers}}
        report.write(path, lambda temporary: figure.savefig(temporary, **options))


def versions(record: dict) -> str:
    found = record["environment"]["versions"]
    shown = (
        ("mmfused", "torch", "triton") if device_type(record) == "cuda" else ("mmfused", "torch")
    )
    return ", ".join(f"{name} {found[name]}" for name in shown if found.get(name))


def distinct(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values))


def label(record: dict) -> str:
    """Return the name and sizes of a case, or only the sizes if its shape is custom."""
    name = record["case"]["name"]
    return report.sizes(record) if name.startswith("custom-") else f"{name}: {report.sizes(record)}"


def speedups(rows: list[Comparison], figure: Any) -> None:
    """Draw the speed-ups as bars that start at 1 and, to their right, the memory of both sides."""
    figure.set_size_inches(11, 1.6 + 0.32 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 2))
    records = [row.record for row in rows]
    for place, row in enumerate(rows):
        draw_speed(row, place, left)
        draw_memory(row, place, right)
    speeds = [row.speedup for row in rows if row.speedup is not None]
    low, high = min(0.5, 0.8 * min(speeds)), 5 * max(2.0, *speeds)
    xlabel = f"speed-up over the best baseline (named at the bar), {passes(records[0])}"
    left.set(xscale="log", xlim=(low, high), xlabel=xlabel)
    left.axvline(1, color="black", linewidth=1)
    left.set_yticks(range(len(rows)), row_names(records), fontsize=7.5)
    left.set_ylim(len(rows) - 0.4, -0.9)
    memory = "peak above the inputs" if device_type(records[0]) == "cuda" else "kept for backward"
    right.set(xscale="log", xlabel=f"MiB {memory}\n(hollow: baseline, filled: ours)")
    for axes in (left, right):
        plain_ticks(axes)
        axes.grid(axis="x", color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    device = distinct(record["environment"]["device"] for record in records)
    dtypes = distinct(record["dtype"] for record in records)
    made_with = distinct(map(versions, records))
    figure.suptitle(f"{device}, {dtypes}; {made_with}", fontsize=10)


def draw_speed(row: Comparison, place: int, axes: Any) -> None:
    assert row.best is not None and row.speedup is not None  # only rows with a baseline are drawn
    color = FASTER if row.speedup >= 1 else SLOWER
    axes.barh(place, row.speedup - 1, 0.6, left=1, color=color)
    text = f"{row.speedup:.2f} x, {row.best[1]}" + (" (graph)" if row.launch == "graph" else "")
    style = {"va": "center", "fontsize": 7.5, "color": color}
    end = max(row.speedup, 1), place
    axes.annotate(text, end, (4, 0), textcoords="offset points", **style)


def draw_memory(row: Comparison, place: int, axes: Any) -> None:
    sizes = [count and count / 2**20 for count in row.memory]
    if all(sizes):
        axes.plot(sizes, [place] * 2, color="0.8", linewidth=1.2, zorder=1)
    for size, face in zip(sizes, ("white", FASTER), strict=True):
        if size:  # a logarithmic axis has no 0
            axes.scatter(size, place, s=26, facecolor=face, edgecolor=FASTER, zorder=2)


def row_names(records: list[dict]) -> list[str]:
    """Return the label of each case; the first label of an op has the op's name above it."""
    names, before = [], None
    for record in records:
        first = record["op"] != before
        names.append(f"{record['op']}\n{label(record)}" if first else label(record))
        before = record["op"]
    return names


def plain_ticks(axes: Any) -> None:
    """Set the ticks of a logarithmic axis to 1, 2, 5, 10 ...; to powers of ten on a long axis."""
    low, high = axes.get_xlim()
    inside = [
        (step, 10.0**power)
        for power in range(-4, 9)
        for step in (1, 2, 5)
        if low <= step * 10.0**power <= high
    ]
    ticks = [step * power for step, power in inside if len(inside) <= 8 or step == 1]
    axes.set_xticks(ticks, [f"{tick:.15g}" for tick in ticks])
    axes.minorticks_off()


def passes(record: dict) -> str:
    return "forward + backward" if record["backward"] else "forward"
