"""What a run leaves: a JSON with all raw samples and bars for each case, a CSV and a roofline of
all, a table.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

import mmfused

from .sources import source_facts

PASSES = ("forward", "backward", "both", "step")
PACKAGES = ("torch", "triton", "timm", "transformers", "liger-kernel", "numpy")


# ---- the machine and the source ------------------------------------------------------------------


def environment(device: torch.device) -> dict:
    """Versions, device and commit; None for what cannot be read here."""
    versions = {"mmfused": mmfused.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    machine = {
        "device": device_name(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions} | machine | cuda_facts(device) | source_facts()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux; platform.processor() is often empty there
        if found := re.search(
            r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
        ):
            return f"CPU {found[1].strip()}"
    return f"CPU {platform.processor() or platform.machine()}"


def cuda_facts(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    try:
        clock = torch.cuda.clock_rate(device)
    except (ImportError, RuntimeError):  # torch reads it through pynvml, which is optional
        clock = None
    capability = torch.cuda.get_device_capability(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    return {
        "cuda": torch.version.cuda,
        "cuda_driver": driver,
        "capability": capability,
        "sm_clock_mhz": clock,
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


# ---- files ---------------------------------------------------------------------------------------


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """``fill`` a temporary file beside ``path``, then put it in place: a reader never sees half a
    file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stem(record: dict) -> str:
    return f"{record['op']}-{record['case']['name']}-{record['dtype']}"


def write_record(record: dict, folder: Path) -> None:
    write_json(record, folder / f"{stem(record)}.json")


def write_json(record: dict, path: Path) -> None:
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    # A list of numbers on one line: raw samples are many.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    write(path, lambda path: path.write_text(text, encoding="utf-8"))


def read_records(op: str, folder: Path) -> list[dict]:
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{op}-*.json"))
    ]
    return [record for record in records if record["op"] == op]


def summary(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)

    def quantile(share):
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place % 1)

    return {"median": statistics.median(ordered), "p10": quantile(0.1), "p90": quantile(0.9)}


def rows(record: dict) -> list[dict]:
    """The flat form: one row for each provider, launch and pass that was timed."""
    facts, case = record["environment"], record["case"]
    common = {
        "op": record["op"],
        "case": case["name"],
        "dtype": record["dtype"],
        "device": facts["device"],
    }
    found = []
    for name, provider in record["providers"].items():
        for launch, passes in provider.get("seconds", {}).items():
            for which in (which for which in PASSES if which in passes):
                times = summary(passes[which])
                floor = record["floor_seconds"]["both" if which == "step" else which]
                measured = {f"{key}_seconds": value for key, value in times.items()} | {
                    "samples": len(passes[which])
                }
                measured |= {"floor_seconds": floor, "fraction_of_floor": floor / times["median"]}
                memory = {key: provider[key] for key in ("peak_bytes", "saved_bytes", "kernels")}
                labels = {
                    "provider": name,
                    "compiled": provider["compiled"],
                    "launch": launch,
                    "pass": which,
                }
                found.append(
                    common
                    | labels
                    | measured
                    | memory
                    | {"commit": facts["commit"], "dirty": facts["dirty"]}
                )
    return found


def write_csv(op: str, records: list[dict], folder: Path) -> None:
    table = [row for record in records for row in rows(record)]

    def fill(path):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)

    if table:
        write(folder / f"{op}.csv", fill)


# ---- pictures ------------------------------------------------------------------------------------


def draw(op: str, fresh: list[dict], records: list[dict], folder: Path) -> str | None:
    """Bars of the ``fresh`` cases and the roofline of all ``records``; a sentence where matplotlib
    is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed, so no picture was drawn."
    for record in fresh:
        figure = Figure(figsize=(9, 5), layout="constrained")
        bars(record, figure.add_subplot())
        write(
            folder / f"{stem(record)}.png",
            lambda path, figure=figure: figure.savefig(path, format="png", dpi=120),
        )
    figure = Figure(figsize=(8, 6), layout="constrained")
    roofline(op, records, figure.add_subplot())
    write(folder / f"{op}-roofline.png", lambda path: figure.savefig(path, format="png", dpi=120))
    return None


def bars(record: dict, axes) -> None:
    """Median of the longest pass timed, p10 to p90 as whiskers, the floor as a line."""
    timed = {
        name: provider["seconds"]
        for name, provider in record["providers"].items()
        if "seconds" in provider
    }
    which = longest_pass(record)
    for offset, launch in enumerate(
        sorted({launch for launches in timed.values() for launch in launches})
    ):
        places = [
            (place, launches[launch])
            for place, launches in enumerate(timed.values())
            if launch in launches
        ]
        times = [summary(passes[which]) for _, passes in places]
        whiskers = [
            [t["median"] - t["p10"] for t in times],
            [t["p90"] - t["median"] for t in times],
        ]
        heights = [1e3 * t["median"] for t in times]
        drawn = axes.barh(
            [place + 0.38 * offset for place, _ in places],
            heights,
            0.36,
            xerr=[[1e3 * w for w in side] for side in whiskers],
            label=f"{launch} launch",
            color=f"C{offset}",
        )
        axes.bar_label(drawn, fmt="%.3g", padding=3)
    floor = record["floor_seconds"][which]
    axes.axvline(
        1e3 * floor, color="black", linestyle="--", linewidth=1, label=f"floor {1e3 * floor:.3g} ms"
    )
    axes.set_yticks(range(len(timed)), list(timed))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    passes = "forward + backward" if which == "both" else which
    axes.set(xlabel=f"ms, {passes}", title=f"{headline(record)}\n{record['environment']['device']}")
    axes.legend()


def roofline(op: str, records: list[dict], axes) -> None:
    """Useful FLOP/s (those of the best algorithm) over its FLOPs per byte; one pair of ceilings for
    each run.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for index, record in enumerate(records):
        which = longest_pass(record)
        stages = [
            stage
            for name, some in record["work"].items()
            if which in (name, "both")
            for stage in some
        ]
        flops, moved = (sum(stage[key] for stage in stages) for key in ("flops", "bytes"))
        if not flops:  # all memory traffic: no place on logarithmic axes
            continue
        axes.axvline(flops / moved, color="0.9", zorder=0)
        name = record["case"]["name"]
        height = 0.01 + 0.15 * (index % 4)  # neighbours may be as dense
        axes.text(
            flops / moved,
            height,
            name,
            transform=axes.get_xaxis_transform(),
            rotation=90,
            fontsize=7,
            ha="right",
        )
        for label, provider in record["providers"].items():
            for passes in provider.get("seconds", {}).values():
                points.setdefault(label, []).append(
                    (flops / moved, flops / summary(passes[which])["median"])
                )
    colors = {
        name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(map(eager_name, points)))
    }
    for label, places in points.items():
        style = {
            "marker": "o" if label == eager_name(label) else "x",
            "color": colors[eager_name(label)],
        }
        axes.scatter(*zip(*places, strict=True), s=22, label=label, zorder=3, **style)
    intensities = [x for places in points.values() for x, _ in places] or [1.0]
    for peak, bandwidth in {tuple(record["ceilings"].values()) for record in records}:
        ends = (
            min(*intensities, peak / bandwidth) / 2,
            peak / bandwidth,
            max(*intensities, peak / bandwidth) * 2,
        )
        axes.plot(ends, [min(peak, bandwidth * x) for x in ends], color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", title=f"{op}: measured ceilings and times")
    axes.set(xlabel="FLOPs per byte of the best algorithm", ylabel="useful FLOP/s")
    if points:
        axes.legend(fontsize=7)


def eager_name(label: str) -> str:
    return label.removesuffix(", compiled")


def longest_pass(record: dict) -> str:
    return "both" if record["backward"] else "forward"


def headline(record: dict) -> str:
    return f"{record['op']} {record['case']['name']}: {sizes(record)} {record['dtype']}"


def sizes(record: dict) -> str:
    return " ".join(
        f"{key}={value}"
        for key, value in record["case"].items()
        if type(value) is int and len(key) == 1
    )


# ---- the table -----------------------------------------------------------------------------------


def table(record: dict, ours: tuple[str, ...]) -> str:
    """Times, memory, and how many times faster the library's best eager provider is, launch by
    launch.
    """
    timed = [
        provider["seconds"] for provider in record["providers"].values() if "seconds" in provider
    ]
    launches = sorted({launch for seconds in timed for launch in seconds})
    found = {
        (launch, which)
        for seconds in timed
        for launch, passes in seconds.items()
        for which in passes
    }
    columns = [
        (launch, which) for launch in launches for which in PASSES if (launch, which) in found
    ]
    best = {launch: found for launch in launches if (found := best_of_ours(record, ours, launch))}
    ratios = [f"{name} is faster, {launch}" for launch, (name, _) in best.items()]
    head = [
        "",
        *(f"{launch} {which}, ms" for launch, which in columns),
        "of floor",
        "peak",
        "saved",
        "kernels",
        *ratios,
    ]
    lines = [head]
    for name, provider in record["providers"].items():
        if "seconds" in provider:
            lines.append(
                [
                    name,
                    *cells(
                        provider,
                        record,
                        columns,
                        {launch: time for launch, (_, time) in best.items()},
                    ),
                ]
            )
            lines += [["", reason] for reason in provider["reasons"]]
        else:
            lines.append([name, f"{provider['gate']}: {'; '.join(provider['reasons'])}"])
    floor = record["floor_seconds"][longest_pass(record)]
    return "\n".join([f"{headline(record)}; floor {1e3 * floor:.3f} ms", *align(lines)])


def cells(
    provider: dict,
    record: dict,
    columns: list[tuple[str, str]],
    best: dict[str, float],
) -> list[str]:
    """One provider's line; ``best``: our median by launch."""
    which, none = longest_pass(record), "-"
    medians = {
        (launch, name): summary(samples)["median"]
        for launch, passes in provider["seconds"].items()
        for name, samples in passes.items()
    }
    times = [f"{1e3 * medians[column]:.3f}" if column in medians else none for column in columns]
    fastest = min(time for (_, name), time in medians.items() if name == which)
    fraction = f"{record['floor_seconds'][which] / fastest:.0%}"
    memory = [
        size(provider["peak_bytes"]),
        size(provider["saved_bytes"]),
        str(provider["kernels"] or none),
    ]
    ratios = [
        f"{medians[launch, which] / time:.2f}x" if (launch, which) in medians else none
        for launch, time in best.items()
    ]
    return [*times, fraction, *memory, *ratios]


def best_of_ours(record: dict, ours: tuple[str, ...], launch: str) -> tuple[str, float] | None:
    """The last of ``ours`` that was timed with this launch, and its median."""
    for name in reversed(ours):
        passes = record["providers"].get(name, {}).get("seconds", {}).get(launch)
        if passes:
            return name, summary(passes[longest_pass(record)])["median"]
    return None


def size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.4g} MiB"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*head], ["---"] * len(head), *lines))


def align(lines: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; a line of name and remark only keeps the first column."""
    width = len(lines[0])
    columns = [
        max(len(line[place]) for line in lines if place == 0 or len(line) == width)
        for place in range(width)
    ]
    shown = []
    for name, *rest in lines:
        padded = (
            [cell.rjust(wide) for cell, wide in zip(rest, columns[1:], strict=True)]
            if len(rest) == width - 1
            else rest
        )
        shown.append("  ".join([name.ljust(columns[0]), *padded]).rstrip())
    return shown
