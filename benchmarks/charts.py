"""Draw results: the times of each case as bars, and all cases of an op on a roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report


def draw(
    op: str, fresh: list[dict[str, Any]], records: list[dict[str, Any]], folder: Path
) -> str | None:
    """Save the bars of each record in ``fresh``, and the roofline of all ``records``.

    Returns None, or a message if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed, so no picture was drawn."
    for record in fresh:
        figure = Figure(figsize=(9, 5), layout="constrained")
        bars(record, figure.add_subplot())
        _save(figure, folder / f"{report.stem(record)}.png")
    figure = Figure(figsize=(8, 6), layout="constrained")
    roofline(op, records, figure.add_subplot())
    _save(figure, folder / f"{op}-roofline.png")
    return None


def _save(figure: Any, path: Path) -> None:
    report.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def bars(record: dict[str, Any], axes: Any) -> None:
    """Draw the medians of the longest pass with whiskers from p10 to p90, and the floor."""
    timed = {
        name: provider["seconds"]
        for name, provider in record["providers"].items()
        if "seconds" in provider
    }
    which = report.longest_pass(record)
    launches = sorted({launch for found in timed.values() for launch in found})
    for offset, launch in enumerate(launches):
        times = {
            place + 0.38 * offset: report.summary(found[launch][which])
            for place, found in enumerate(timed.values())
            if launch in found
        }
        below = [1e3 * (t["median"] - t["p10"]) for t in times.values()]
        above = [1e3 * (t["p90"] - t["median"]) for t in times.values()]
        drawn = axes.barh(
            list(times),
            [1e3 * t["median"] for t in times.values()],
            0.36,
            xerr=[below, above],
            label=f"{launch} launch",
            color=f"C{offset}",
        )
        axes.bar_label(drawn, fmt="%.3g", padding=3)
    floor = 1e3 * record["floor_seconds"][which]
    line = {"color": "black", "linestyle": "--", "linewidth": 1}
    axes.axvline(floor, label=f"floor {floor:.3g} ms", **line)
    axes.set_yticks(range(len(timed)), list(timed))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    passes = "forward + backward" if which == "both" else which
    title = f"{report.headline(record)}\n{record['environment']['device']}"
    axes.set(xlabel=f"ms, {passes}", title=title)
    axes.legend()


def roofline(op: str, records: list[dict[str, Any]], axes: Any) -> None:
    """Draw the FLOP/s of all providers over FLOPs per byte.

    The FLOPs and bytes of every provider are those of ``work`` in the op's benchmark. Records with
    different measured ceilings have separate rooflines.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for index, record in enumerate(records):
        flops, moved = _work_of_longest_pass(record)
        if not flops:  # 0 cannot be shown on a logarithmic axis
            continue
        intensity = flops / moved
        axes.axvline(intensity, color="0.9", zorder=0)
        height = 0.01 + 0.15 * (index % 4)  # so that the names of neighbours do not overlap
        text = {"rotation": 90, "fontsize": 7, "ha": "right"}
        transform = axes.get_xaxis_transform()
        axes.text(intensity, height, record["case"]["name"], transform=transform, **text)
        which = report.longest_pass(record)
        for label, provider in record["providers"].items():
            for passes in provider.get("seconds", {}).values():
                median = report.summary(passes[which])["median"]
                points.setdefault(label, []).append((intensity, flops / median))
    names = dict.fromkeys(map(report.eager_name, points))
    colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for label, places in points.items():
        name = report.eager_name(label)
        style = {"marker": "o" if label == name else "x", "color": colors[name]}
        axes.scatter(*zip(*places, strict=True), s=22, label=label, zorder=3, **style)
    intensities = [x for places in points.values() for x, _ in places] or [1.0]
    for peak, bandwidth in {tuple(record["ceilings"].values()) for record in records}:
        ridge = peak / bandwidth
        ends = min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2
        heights = [min(peak, bandwidth * x) for x in ends]
        axes.plot(ends, heights, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", title=f"{op}: measured ceilings and times")
    axes.set(xlabel="FLOPs per byte of the best algorithm", ylabel="useful FLOP/s")
    if points:
        axes.legend(fontsize=7)


def _work_of_longest_pass(record: dict[str, Any]) -> tuple[float, float]:
    """Return the total FLOPs and the total bytes."""
    which = report.longest_pass(record)
    stages = [
        stage
        for name, found in record["work"].items()
        if which in (name, "both")
        for stage in found
    ]
    return sum(stage["flops"] for stage in stages), sum(stage["bytes"] for stage in stages)
