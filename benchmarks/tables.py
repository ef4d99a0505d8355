"""Format results as tables of times, memory and speed-ups."""

from __future__ import annotations

from typing import Any

from . import report


def table(record: dict[str, Any], ours: tuple[str, ...]) -> str:
    """Return the table of a case: times, memory, and speed-ups of the fastest provider of ``ours``.

    ``ours``: names of the library's providers. Their compiled variants are not considered.
    """
    columns = _columns(record)
    best = {
        launch: found
        for launch in dict.fromkeys(launch for launch, _ in columns)
        if (found := fastest_of_ours(record, ours, launch))
    }
    times = [f"{launch} {which}, ms" for launch, which in columns]
    ratios = [f"{name} is faster, {launch}" for launch, (name, _) in best.items()]
    lines = [["", *times, "of floor", "peak", "saved", "kernels", *ratios]]
    medians = {launch: time for launch, (_, time) in best.items()}
    for name, provider in record["providers"].items():
        if "seconds" in provider:
            lines.append([name, *cells(provider, record, columns, medians)])
            lines += [["", reason] for reason in provider["reasons"]]
        else:
            lines.append([name, f"{provider['gate']}: {'; '.join(provider['reasons'])}"])
    floor = record["floor_seconds"][report.longest_pass(record)]
    title = f"{report.headline(record)}; floor {1e3 * floor:.3f} ms"
    return "\n".join([title, *align(lines)])


def _columns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of launch and pass that were timed."""
    found = {
        (launch, which)
        for provider in record["providers"].values()
        for launch, passes in provider.get("seconds", {}).items()
        for which in passes
    }
    launches = sorted({launch for launch, _ in found})
    pairs = [(launch, which) for launch in launches for which in report.PASSES]
    return [pair for pair in pairs if pair in found]


def cells(
    provider: dict[str, Any],
    record: dict[str, Any],
    columns: list[tuple[str, str]],
    best: dict[str, float],
) -> list[str]:
    """Return the cells of a provider; ``best``: launch -> median of our fastest provider."""
    which, none = report.longest_pass(record), "-"
    medians = {
        (launch, name): report.summary(samples)["median"]
        for launch, passes in provider["seconds"].items()
        for name, samples in passes.items()
    }
    times = [f"{1e3 * medians[column]:.3f}" if column in medians else none for column in columns]
    fastest = min(time for (_, name), time in medians.items() if name == which)
    fraction = f"{record['floor_seconds'][which] / fastest:.0%}"
    memory = [size(provider["peak_bytes"]), size(provider["saved_bytes"])]
    kernels = str(provider["kernels"] or none)
    ratios = [
        f"{medians[launch, which] / time:.2f}x" if (launch, which) in medians else none
        for launch, time in best.items()
    ]
    return [*times, fraction, *memory, kernels, *ratios]


def fastest_of_ours(
    record: dict[str, Any], ours: tuple[str, ...], launch: str
) -> tuple[str, float] | None:
    """Return (name, median) of the fastest provider of ``ours``, or None if none was timed."""
    medians = {}
    for name in ours:
        passes = record["providers"].get(name, {}).get("seconds", {}).get(launch)
        if passes:
            medians[name] = report.summary(passes[report.longest_pass(record)])["median"]
    return min(medians.items(), key=lambda item: item[1], default=None)


def size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.4g} MiB"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*head], ["---"] * len(head), *lines))


def align(lines: list[list[str]]) -> list[str]:
    """Pad cells to the width of their column.

    In a line with only a name and a remark, the remark is not padded.
    """
    width = len(lines[0])
    columns = [
        max(len(line[place]) for line in lines if place == 0 or len(line) == width)
        for place in range(width)
    ]
    shown = []
    for name, *rest in lines:
        if len(rest) == width - 1:
            rest = [cell.rjust(wide) for cell, wide in zip(rest, columns[1:], strict=True)]
        shown.append("  ".join([name.ljust(columns[0]), *rest]).rstrip())
    return shown
