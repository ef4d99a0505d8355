"""Find Nsight Compute's ``ncu``, run it on a command, and read what it writes.

Sources of the names of metrics: Nsight Compute's Kernel Profiling Guide, and profiles of GPUs of
compute capability 9.0. Another version may not know a name: :func:`known` asks it, and
:func:`profile` leaves out what it then still refuses.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

USUAL_CUDA = "/usr/local/cuda"
USUAL_NSIGHT = "/opt/nvidia/nsight-compute/*"
QUERY_SECONDS = 60.0

_LSU = "l1tex__data_pipe_lsu_wavefronts_mem_shared"
_ELAPSED = "avg.pct_of_peak_sustained_elapsed"
# What is read, and the names that it may have; the first one that ncu knows is used.
METRICS: dict[str, tuple[str, ...]] = {
    # Without the launch itself: from the first block's start to the last one's end.
    "seconds": ("gpu__time_duration.sum",),
    # The clock is not set (--clock-control none), so it has to be read with each kernel.
    "hertz": ("smsp__cycles_elapsed.avg.per_second",),
    # Issued includes replays, as an issue slot of the count is lost to them too.
    "instructions": ("smsp__inst_issued.sum",),
    # All of shared memory that passes the LSU: LDS, LDSM, STS, STSM, ATOMS, LDGSTS (cp.async), and
    # what wgmma reads, which later versions list as "op_gmma". TMA does not pass it.
    "wavefronts": (f"{_LSU}.sum",),
    "load": (f"{_LSU}_op_ld.sum",),
    "store": (f"{_LSU}_op_st.sum",),
    "copy": (
        f"{_LSU}_op_ldgsts.sum",
        "smsp__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts.sum",
        "sm__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts_cache_bypass.sum",
    ),
    "wgmma": (f"{_LSU}_op_gmma.sum",),
    "conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
    # TMA has no wavefronts; its loads are the bytes that come from L2 for it.
    "bulk_bytes": ("l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld.sum",),
    # Sectors of 32 bytes that multiprocessors ask L2 for. Without "srcunit_tex" there would also
    # be those between the two halves of L2, and those that DRAM fills.
    "l2_sectors": ("lts__t_sectors_srcunit_tex.sum",),
    "dram_read": ("dram__bytes_read.sum", "dram__bytes_op_read.sum"),
    "dram_written": ("dram__bytes_write.sum", "dram__bytes_op_write.sum"),
    # How busy each unit is, in percent, for what limits the kernel.
    "issue_percent": (f"smsp__issue_active.{_ELAPSED}",),
    "alu_percent": (f"sm__inst_executed_pipe_alu.{_ELAPSED}",),
    "fma_percent": (f"sm__pipe_fma_cycles_active.{_ELAPSED}",),
    "mufu_percent": (f"sm__inst_executed_pipe_xu.{_ELAPSED}",),
    "matrix_percent": (f"sm__pipe_tensor_cycles_active.{_ELAPSED}",),
    "shared_percent": (f"{_LSU}.{_ELAPSED}",),
    "l2_percent": (f"lts__throughput.{_ELAPSED}",),
    "dram_percent": (f"dram__throughput.{_ELAPSED}",),
    # Whether the compiled code is the counted one, and how many blocks a multiprocessor holds.
    "registers": ("launch__registers_per_thread",),
    "waves": ("launch__waves_per_multiprocessor",),
    "blocks_by_registers": ("launch__occupancy_limit_registers",),
    "blocks_by_shared": ("launch__occupancy_limit_shared_mem",),
    "blocks_by_warps": ("launch__occupancy_limit_warps",),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
}
# ncu lists metrics by where they come from; older versions know the first list only.
_LISTS = ((), *(("--query-metrics-collection", kind) for kind in ("launch", "occupancy", "source")))
_PERMISSION = "ERR_NVGPUCTRPERM"


class Launch(NamedTuple):
    """A profiled launch; ``values`` by name of the metric, in seconds, bytes, hertz and percent."""

    name: str
    blocks: int
    threads: int
    values: dict[str, float | None]


class Profile(NamedTuple):
    """What a run of ncu gave.

    Attributes:
        table: the CSV, without the other lines that ncu writes.
        launches: in order.
        names: the metric that each key of METRICS was read from.
        missing: keys of METRICS that this ncu cannot read.
        output: of the command.
    """

    table: str
    launches: list[Launch]
    names: dict[str, str]
    missing: list[str]
    output: str


class Failed(RuntimeError):
    """A run of ncu gave no launches; the message says why in one sentence."""


# ---- the program ---------------------------------------------------------------------------------


def find() -> str:
    """Return the path of ncu; raise ValueError if there is none."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), USUAL_CUDA) if home]
    folders += map(Path, sorted(glob.glob(USUAL_NSIGHT), key=_version_in, reverse=True))
    found = [shutil.which("ncu"), *(shutil.which("ncu", path=str(each)) for each in folders)]
    program = next(filter(None, found), None)
    if program is None:
        raise ValueError(
            f"ncu is neither on PATH nor in CUDA_HOME/bin, {USUAL_CUDA}/bin or {USUAL_NSIGHT}; "
            "it comes with Nsight Compute, which is part of the CUDA toolkit"
        )
    return program


def _version_in(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def version(program: list[str]) -> str:
    """Return the version of ncu, such as "2025.1.0.0"."""
    found = re.search(r"Version (\S+)", _asked(program, "--version"))
    return found[1] if found else "unknown"


def known(program: list[str]) -> set[str]:
    """Return the names, without suffixes such as ".sum", of all metrics that ncu lists."""
    names: set[str] = set()
    for which in _LISTS:
        text = _asked(program, "--query-metrics", *which)
        names |= set(re.findall(r"^\s*([a-z]\w*__\w+)", text, re.MULTILINE))
    return names


def _asked(program: list[str], *options: str) -> str:
    """Return what ncu prints; "" if it fails, as an older version does for a newer option."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [*program, *options], capture_output=True, text=True, timeout=QUERY_SECONDS
        )
        if done.returncode == 0:
            return done.stdout
    return ""


def chosen(names: set[str]) -> dict[str, str]:
    """Return the metric to read for each key of METRICS.

    ``names``: those that ncu knows. Where it lists none of a collection, the first name is used.
    """
    listed = {name.startswith("launch__") for name in names}
    found = {}
    for key, candidates in METRICS.items():
        is_launch = candidates[0].startswith("launch__")
        fitting = [each for each in candidates if each.partition(".")[0] in names]
        if fitting or is_launch not in listed:
            found[key] = (fitting or candidates)[0]
    return found


# ---- a run ---------------------------------------------------------------------------------------


def profile(
    program: list[str],
    names: dict[str, str],
    command: list[str],
    log: Path,
    limit: float,
    environment: dict[str, str] | None = None,
) -> Profile:
    """Profile what a command launches between cudaProfilerStart and cudaProfilerStop.

    Args:
        program: ncu.
        names: the metric to read for each key of METRICS, of :func:`chosen`.
        command: the profiled program.
        log: file for what ncu writes.
        limit: seconds after which the run is killed, of all runs if ncu refuses metrics.
        environment: of both.

    Raises:
        Failed: there is no launch to read.
    """
    until = time.monotonic() + limit
    while True:
        log.unlink(missing_ok=True)
        whole = [*program, *options(names.values(), log), *command]
        code, output = _run(whole, max(0.1, until - time.monotonic()), environment)
        written = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        refused = refused_metrics(output + written, names)
        if not refused:
            break
        names = without(names, refused)
    text = table(written)
    launches = parse(text)
    if code != 0 or not launches:
        raise Failed(_why(code, output + written, limit))
    return Profile(text, launches, names, sorted(METRICS.keys() - names.keys()), output)


def options(names: Any, log: Path) -> list[str]:
    """Return the options of ncu for a run that reads the metrics ``names`` into ``log``."""
    return [
        *("--csv", "--page", "raw", "--print-units", "base"),
        *("--metrics", ",".join(names)),
        *("--profile-from-start", "off"),
        # The clock is that of a training run, and is left alone.
        *("--clock-control", "none"),
        # Each kernel finds the caches empty, as the count assumes.
        *("--cache-control", "all", "--replay-mode", "kernel"),
        *("--target-processes", "application-only"),
        *("--log-file", str(log)),
    ]


def _run(
    command: list[str], limit: float, environment: dict[str, str] | None
) -> tuple[int | None, str]:
    """Run the command; return its exit code, or None if it was killed, and its output."""
    # Numbers are written in the C locale, so that a comma is never a decimal point.
    env = {**(environment or os.environ), "LC_ALL": "C", "PYTHONUTF8": "1"}
    pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=env, start_new_session=True, errors="replace", **pipe)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _end(process)
        return None, process.communicate()[0]
    finally:
        if process.poll() is None:  # on Ctrl-C or SIGTERM, leave nothing running
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Kill ncu and the program that it profiles."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def refused_metrics(text: str, names: dict[str, str]) -> list[str]:
    """Return the keys of the metrics that a message of ncu says it does not find."""
    lines = [line.replace("\\", "") for line in text.splitlines() if line.startswith("==ERROR==")]
    bad = " ".join(line for line in lines if "metric" in line.lower())
    words = set(re.findall(r"\w+", bad))
    return [key for key, name in names.items() if name.partition(".")[0] in words]


def without(names: dict[str, str], refused: list[str]) -> dict[str, str]:
    """Return the metrics to read where ncu refuses some: the next names of these, if any."""
    found = {}
    for key, name in names.items():
        left = METRICS[key][METRICS[key].index(name) + 1 :] if key in refused else (name,)
        if left:
            found[key] = left[0]
    return found


def _why(code: int | None, text: str, limit: float) -> str:
    if code is None:
        return f"killed after {limit:g} s"
    if _PERMISSION in text:
        return (
            f"ncu may not read the GPU's counters ({_PERMISSION}): run as root, or load the driver "
            "with NVreg_RestrictProfilingToAdminUsers=0"
        )
    marks = ("==ERROR==", "==WARNING==")
    errors = [line for mark in marks for line in text.splitlines() if line.startswith(mark)]
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing printed")
    message = re.sub(r"^==\w+== ", "", (errors or [last])[0])
    return f"ncu read no launches, exit code {code}: {message}"


# ---- what it writes ------------------------------------------------------------------------------


def table(text: str) -> str:
    """Return the lines of the CSV in what ncu wrote; "" if there is none."""
    lines = text.splitlines(keepends=True)
    starts = (k for k, x in enumerate(lines) if x.startswith('"ID",') and '"Kernel Name"' in x)
    start = next(starts, len(lines))
    return "".join(line for line in lines[start:] if line.startswith('"'))


def parse(text: str) -> list[Launch]:
    """Return the launches in a CSV of ncu's raw page, which may stand between other lines.

    Below its names is a line of units, with an empty ID.
    """
    found = table(text)
    if not found:
        return []
    names, *rows = csv.reader(io.StringIO(found))
    units = dict.fromkeys(names, "")
    launches = []
    for row in rows:
        cells = dict(zip(names, row, strict=False))
        if not cells["ID"]:
            units = cells
        elif cells["ID"] != "ID" and len(row) == len(names):
            launches.append(_launch(cells, units))
    return launches


def _launch(cells: dict[str, str], units: dict[str, str]) -> Launch:
    values = {
        name: None if (value := number(cell)) is None else value * scale(units.get(name, ""))
        for name, cell in cells.items()
        if "__" in name
    }
    blocks, threads = (_product(cells.get(name, "")) for name in ("Grid Size", "Block Size"))
    return Launch(short_name(cells["Kernel Name"]), blocks, threads, values)


def _product(size: str) -> int:
    """Return the product of a size such as "(264, 1, 1)"."""
    product = 1
    for part in re.findall(r"\d+", size):
        product *= int(part)
    return product


def number(text: str) -> float | None:
    """Return a number of ncu, or None for "n/a" and the like.

    Commas separate thousands, or, in some locales, points do, and the comma is the decimal point.
    After a number there may be the values of its instances in parentheses.
    """
    text = text.partition("(")[0].strip()
    if re.fullmatch(r"-?\d+,\d+", text) and not re.fullmatch(r"-?\d{1,3},\d{3}", text):
        text = text.replace(",", ".")
    elif re.fullmatch(r"-?\d{1,3}(\.\d{3}){2,}(,\d+)?|-?\d{1,3}\.\d{3},\d+", text):
        text = text.replace(".", "").replace(",", ".")
    try:
        found = float(text.replace(",", ""))
    except ValueError:
        return None
    return found if abs(found) < float("inf") else None


def scale(unit: str) -> float:
    """Return how many seconds, bytes or hertz one of a unit is, such as "us" or "Mbyte/block"."""
    over, _, under = unit.partition("/")
    return _scale(over) / (_scale(under) if under else 1.0)


def _scale(unit: str) -> float:
    if found := re.fullmatch(r"([numµ]?)(s|sec|second)", unit):
        return {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}[found[1]]
    found = re.fullmatch(r"([KMGT])[a-z].*", unit)
    return {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[1]] if found else 1.0


def short_name(kernel: str) -> str:
    """Return the name of a kernel without its return type, namespaces and arguments."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0].rpartition("::")[2].strip() or kernel
