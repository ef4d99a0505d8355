"""A program that stands for ncu where there is no GPU: it prints what ncu would print.

It takes the options that tools/ncu.py gives, runs the profiled command, and writes a table of the
counted launches in place of measured ones. So a dry run of tools/readings.py is complete, and its
numbers are those of benchmarks/counts.json: they are no measurements.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).resolve().parents[1] / "benchmarks" / "counts.json"
VERSION = "2025.1.0.0"
_LSU = "l1tex__data_pipe_lsu_wavefronts_mem_shared"
_LSU_KINDS = ("load", "store", "copy", "wgmma", "other")
HERTZ = 1.755e9


def _seconds(count: dict[str, Any]) -> float:
    return count["cards"]["H200"]["high"]


# Metric -> its unit and its value, from a count.
METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "gpu__time_duration": ("ns", lambda x: 1e9 * _seconds(x)),
    "smsp__cycles_elapsed": ("hz", lambda x: HERTZ),
    "smsp__inst_issued": ("inst", lambda x: sum(x["slots"].values())),
    _LSU: ("", lambda x: sum(x["shared"].get(kind, 0.0) for kind in _LSU_KINDS)),
    f"{_LSU}_op_ld": ("", lambda x: x["shared"].get("load", 0.0)),
    f"{_LSU}_op_st": ("", lambda x: x["shared"].get("store", 0.0)),
    f"{_LSU}_op_ldgsts": ("", lambda x: x["shared"].get("copy", 0.0)),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared": ("", lambda x: x["conflicts"]),
    "l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld": (
        "byte",
        lambda x: x["bulk_bytes"],
    ),
    "lts__t_sectors_srcunit_tex": ("sector", lambda x: x["l2_bytes"] / 32),
    "dram__bytes_read": ("byte", lambda x: 0.75 * x["dram_bytes"]),
    "dram__bytes_write": ("byte", lambda x: 0.25 * x["dram_bytes"]),
    "smsp__issue_active": (
        "%",
        lambda x: 100 * sum(x["slots"].values()) / 132 / 4 / HERTZ / _seconds(x),
    ),
    "sm__pipe_tensor_cycles_active": ("%", lambda x: 100 * x["flops"] / 790e12 / _seconds(x)),
    "lts__throughput": ("%", lambda x: 100 * x["l2_bytes"] / 5.5e12 / _seconds(x)),
    "dram__throughput": ("%", lambda x: 100 * x["dram_bytes"] / 4.3e12 / _seconds(x)),
    "launch__registers_per_thread": ("register/thread", lambda x: x["registers"]),
    "launch__occupancy_limit_shared_mem": ("block", lambda x: x["resident"]),
}
HEAD = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream")
HEAD += ("Block Size", "Grid Size", "Device", "CC")
MORE_WAVEFRONTS = 1.4  # of the first kernel, so that a dry run shows a difference


def main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print("NVIDIA (R) Nsight Compute Command Line Profiler")
        print(f"Version {VERSION} (build 35237751) (public-release)")
        return 0
    if "--query-metrics" in arguments:
        is_launch = arguments[-1] == "launch"
        names = [name for name in METRICS if name.startswith("launch__") == is_launch]
        print("Device NVIDIA GH100\n" + "-" * 80)
        print("\n".join(f"{name:60} Counter     inst" for name in names))
        return 0
    return _profile(arguments)


def _profile(arguments: list[str]) -> int:
    log, start = Path(_after(arguments, "--log-file")), arguments.index(sys.executable)
    print(f"==PROF== Connected to process 7 ({sys.executable})", flush=True)
    done = subprocess.run(arguments[start:])
    if done.returncode:
        print("==ERROR== The application returned an error code (1).")
        return done.returncode
    versions = json.loads(COUNTS.read_text(encoding="utf-8"))[_after(arguments, "--child")]
    metrics = _after(arguments, "--metrics").split(",")
    counted = versions.get(metadata.version("triton")) or list(versions.values())[-1]
    log.write_text(table(counted, metrics), encoding="utf-8")
    return 0


def _after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def table(launches: list[dict[str, Any]], metrics: list[str]) -> str:
    """Return what ncu writes with ``--csv --page raw --print-units base``."""
    text = io.StringIO()
    rows = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    units = [METRICS[name.partition(".")[0]][0] for name in metrics]
    text.write(f"==PROF== Connected to process 7 ({sys.executable})\n")
    rows.writerow([*HEAD, *metrics])
    rows.writerow([*([""] * len(HEAD)), *units])
    first = next(launch["name"] for launch in launches if not launch.get("torch"))
    for number, launch in enumerate(launches):
        rows.writerow(_row(number, launch, metrics, first))
    text.write("==PROF== Disconnected from process 7\n")
    return text.getvalue()


def _row(number: int, launch: dict[str, Any], metrics: list[str], first: str) -> list[str]:
    is_ours = not launch.get("torch")
    name = launch["name"] if is_ours else f"void at::native::{launch['name']}<4, float>(int, T2)"
    grid = f"({launch.get('blocks', 1)}, 1, 1)"
    row = [
        str(number),
        "7",
        "python3",
        "127.0.0.1",
        name,
        "1",
        "7",
        "(128, 1, 1)",
        grid,
        "0",
        "9.0",
    ]
    for metric in metrics:
        if is_ours or metric.startswith("gpu__time_duration"):
            row.append(f"{_value(metric, launch, name == first):,.2f}")
        else:
            row.append("n/a")
    return row


def _value(metric: str, count: dict[str, Any], is_first: bool) -> float:
    name, _, suffix = metric.partition(".")
    value = METRICS[name][1](count)
    if name != _LSU:
        return value
    if suffix != "sum":  # percent of the cycles of all multiprocessors
        return 100 * value / 132 / HERTZ / _seconds(count)
    return value * (MORE_WAVEFRONTS if is_first else 1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
