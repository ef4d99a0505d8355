"""Compile every case of ``mmfused inspect`` for every supported architecture and Triton version.

    python tools/compile_matrix.py             all cases; writes the table
    python tools/compile_matrix.py --op OP     the cases of an op; writes its lines of the table
    python tools/compile_matrix.py --newest    a few cases on the newest Triton of the package index

The table is benchmarks/results/compile_matrix.md.

Each Triton version is downloaded into .venv/triton-<version> if it is not there, and runs in a
process of its own. `mmfused inspect` stores the compiled kernels, so a stopped run can be resumed.
The exit status is 1 if a kernel has a fault, or if an entry of mmfused/cli/known.py is not needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "compile_matrix.md"
# At least one case of each op, and every case that once had a spill or a race.
NEWEST_CASES = (
    "fluid",
    "fluid text",
    "nce all",
    "route fluid",
    "moe fluid",
    "moe fine 64",
    "cross 512",
    "uniecs",
)


def load(path: str):
    """Load a module of mmfused by path, because importing mmfused would import torch."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "mmfused" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def triton_folder(version: str) -> Path:
    """Return the folder of Triton ``version``; download it if it is missing."""
    home = ROOT / ".venv" / f"triton-{version}"
    if not (home / "triton").is_dir():
        home.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            target = Path(folder) / "triton"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:"]
            subprocess.run([*command, "--target", target, f"triton=={version}"], check=True)
            shutil.move(target, home)
    return home


def inspect(
    version: str,
    archs: tuple[str, ...],
    cases: tuple[str, ...],
    jobs: int,
    op: str | None = None,
) -> list[dict]:
    """Return the rows of ``mmfused inspect`` with Triton ``version``; ``cases``: () means all."""
    path = os.pathsep.join((str(triton_folder(version)), str(ROOT)))
    options = [word for arch in archs for word in ("--arch", arch)]
    options += [word for case in cases for word in ("--case", case)]
    options += ["--op", op] if op else []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "mmfused",
            "inspect",
            "--jobs",
            str(jobs),
            *options,
        ]
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run(
            [*command, "--json", table],
            env={**env, "PYTHONPATH": path},
            cwd=ROOT,
            stdout=sys.stderr,
        )
        if not table.is_file():
            sys.exit(f"Triton {version}: `mmfused inspect` did not finish.")
        return [{"triton": version, **row} for row in json.loads(table.read_text())]


def commit() -> str:
    """Return the commit of the compiled sources, with a + if there are uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def report(rows: list[dict], archs: tuple[str, ...], old: str = "") -> str:
    """Return the table as Markdown: a line per op and Triton version, a column per architecture.

    The table ``old`` keeps the lines of other ops.
    """
    new = defaultdict(list)
    for line in _lines(rows, archs):
        new[_op_of(line)].append(line)
    lines = [line for line in old.splitlines() if line.startswith("| ")][1:]
    ops = dict.fromkeys([*map(_op_of, lines), *new])
    lines = [line for op in ops for line in new.get(op) or [x for x in lines if _op_of(x) == op]]
    cells = [line.strip("| ").split(" | ") for line in lines]
    total = sum(int(cell.split(",")[0]) for _, _, *compiled, _, _ in cells for cell in compiled)
    faults = sum(int(cell[-2]) for cell in cells)
    text = [
        "# Kernels compiled without a GPU",
        "",
        "`make compile-matrix`: every case of `mmfused inspect` for every supported architecture "
        "and Triton version.",
        "A cell has the number of kernels, the maximum of registers per thread, and the maximum of "
        "shared memory per block.",
        "A fault is a spill, a race, more shared memory than the GPU has, a missing matrix "
        "instruction, or warps that compute the same product and are not listed in "
        "`mmfused/cli/known.py`.",
        "",
        f"| op | Triton | {' | '.join(archs)} | faults | at commit |",
        "|---|---|" + "---|" * len(archs) + "---|---|",
        *lines,
        "",
        f"{total} kernels, {faults} with faults.",
    ]
    text += [
        f"* {r['case']}: {r['kernel']}, {r['arch']}, Triton {r['triton']}: {r['fault']}"
        for r in rows
        if r["fault"]
    ]
    return "\n".join(text) + "\n"


def _lines(rows: list[dict], archs: tuple[str, ...]) -> Iterator[str]:
    cells = defaultdict(list)
    for row in rows:
        cells[row["op"], row["triton"], row["arch"]].append(row)
    for op, version in dict.fromkeys((row["op"], row["triton"]) for row in rows):
        parts, faults = [], 0
        for arch in archs:
            cell = cells[op, version, arch]
            faults += sum(bool(row["fault"]) for row in cell)
            registers, shared = (
                max((row[name] for row in cell), default=0) for name in ("registers", "shared")
            )
            parts.append(f"{len(cell)}, {registers}, {shared / 1024:.0f} KB")
        yield f"| {op} | {version} | {' | '.join(parts)} | {faults} | {commit()} |"


def _op_of(line: str) -> str:
    return line.strip("| ").split(" | ")[0]


def unneeded(rows: list[dict]) -> list[str]:
    """Return the entries of mmfused/cli/known.py, of the ops in ``rows``, that no row needs."""
    names = ("op", "kernel", "arch", "case")
    needed = {tuple(row[name] for name in names) for row in rows if row["known"]}
    ops = {row["op"] for row in rows}
    entries = {entry for entry in load("cli/known.py").entries() if entry[0] in ops}
    return [" ".join(entry) for entry in sorted(entries - needed)]


def newest_version() -> str:
    """Return the newest version of Triton in the package index that pip uses."""
    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.match(r"triton \((.+?)\)", listing)[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--newest",
        action="store_true",
        help="a few cases on the newest Triton of the package index",
    )
    parser.add_argument("--op", help="the cases of this op only")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="kernels compiled in parallel (default: number of cores)",
    )
    args = parser.parse_args()
    support = load("supported.py")
    spare: list[str] = []
    if args.newest:
        version = newest_version()
        status = (
            "is supported"
            if version in support.TRITONS
            else f"is newer than the newest supported version, {support.TRITONS[-1]}"
        )
        print(f"Triton {version} {status}; compiling {', '.join(NEWEST_CASES)}.", flush=True)
        rows = inspect(version, support.ARCHS, NEWEST_CASES, args.jobs)
    else:
        rows = [
            row
            for version in support.TRITONS
            for row in inspect(version, support.ARCHS, (), args.jobs, args.op)
        ]
        ops = list(dict.fromkeys(row["op"] for row in rows))
        rows.sort(key=lambda row: ops.index(row["op"]))
        old = TABLE.read_text() if args.op else ""
        TABLE.write_text(report(rows, support.ARCHS, old))
        print(f"Wrote {TABLE.relative_to(ROOT)}.")
        spare = unneeded(rows)
        for entry in spare:
            print(f"{entry}: not needed in mmfused/cli/known.py")
    faults = [row for row in rows if row["fault"]]
    for row in faults:
        print(
            f"{row['case']}: {row['kernel']}, {row['arch']}, Triton {row['triton']}: {row['fault']}"
        )
    print(f"{len(rows)} kernels, {len(faults)} with faults.")
    return 1 if faults or spare else 0


if __name__ == "__main__":
    sys.exit(main())
