"""``mmfused inspect``: compile the launches of every kernel without a GPU and check the result.

The launchers run on meta tensors, and :mod:`mmfused.kernels.recording` records their launches. The
compiled launches are therefore those that would run on a GPU of the requested architecture. The
command exits with 1 if a kernel spills registers, needs more shared memory than the GPU has, has a
race (:mod:`.races`), lacks a matrix instruction that it should have, or has warps that compute the
same product (:mod:`.redundancy`) and is not listed in :mod:`.known`.

:mod:`.compiling` compiles and caches; with ``--sass``, :mod:`.sass` reads the machine code. With
``--bound`` the command counts what limits each kernel instead (:mod:`.bound`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..library import INTERPRETED
from ..ops import OPS
from ..supported import ARCHS
from . import bound, compiling, known
from .compiling import Job, Measured
from .sass import Sass

HELP = (
    "compile every kernel for GPU architectures, without a GPU, and show registers, spills, shared "
    "memory and instructions"
)
_TILE_SIZES = ("BM", "BX", "BN", "BY", "BR", "BK", "BD")
_HEADER = (
    f"{'op':15} {'case':15} {'kernel':16} {'arch':7} {'tile':22} {'regs':>4} {'spill':>5} "
    f"{'shared':>7}  instructions"
)


@dataclass
class Report:
    """A compiled launch; its string is a row of the printed table."""

    op: str
    case: str
    kernel: str
    arch: str
    tile: str
    registers: int
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per block
    instructions: dict[str, int]
    fault: str = ""
    known: str = ""  # what would be a fault, with the issue that removes it
    sass: Sass | None = None  # with --sass

    def __str__(self) -> str:
        counts = [f"{name}:{count}" for name, count in self.instructions.items() if count]
        row = (
            f"{self.op:15} {self.case:15} {self.kernel:16} {self.arch:7} {self.tile:22} "
            f"{self.registers:4} {self.spilled:5} {self.shared:7}  {' '.join(counts) or 'none'}"
        )
        row += f"  ({self.known})" if self.known else ""
        row += f"  <- {self.fault}" if self.fault else ""
        return "\n".join([row, *(self.sass.rows() if self.sass else ())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument(
        "--arch",
        action="append",
        metavar="sm_90",
        help=f"architecture; may be repeated (default: {' '.join(ARCHS)})",
    )
    parser.add_argument(
        "--op",
        choices=[*sorted(OPS), "models"],
        help="compile the kernels of this op only; models: only with --bound",
    )
    parser.add_argument("--case", action="append", help="compile this case only; may be repeated")
    parser.add_argument(
        "--bound",
        action="store_true",
        help="count instead what limits each kernel in the cases of the benchmarks that have a "
        "target, and predict its time",
    )
    parser.add_argument(
        "--card",
        action="append",
        metavar="H200",
        help="GPU for --bound: H100, H200 or A100; may be repeated (default: H200)",
    )
    parser.add_argument(
        "--sass",
        action="store_true",
        help="also read the machine code: instructions of each loop and of the rest",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table to a JSON file")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of parallel compilations (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    """Compile the launches, print the table, and return 1 if a launch has a fault, else 0."""
    _check_not_interpreted()
    if args.bound:
        return bound.run(args)
    _check(args)
    print(_HEADER, flush=True)
    reports = []
    for report in reports_of(args):
        reports.append(report)
        print(report, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    faults = sum(bool(r.fault) for r in reports)
    listed = sum(bool(r.known) for r in reports)
    print(
        f"{len(reports)} launches compiled, {faults} with a fault"
        + (f", {listed} with a known one." if listed else ".")
    )
    return 1 if faults else 0


def _check_not_interpreted() -> None:
    if INTERPRETED:
        raise ValueError(
            "inspect: TRITON_INTERPRET: got '1', expected it unset, because it disables compilation"
        )


def _check(args: argparse.Namespace) -> None:
    from mmfused.kernels.tiles import SHARED_MEMORY

    if args.card or args.op == "models":
        option, value = ("--card", args.card) if args.card else ("--op", args.op)
        raise ValueError(f"{option}: got {value!r}, expected --bound beside it")
    supported = [f"sm_{number}" for number in SHARED_MEMORY]
    for arch in args.arch or ():
        if arch not in supported:
            raise ValueError(f"--arch: got {arch!r}, expected one of {', '.join(supported)}")
    cases = [case for op in OPS if args.op in (None, op) for case in compiling.cases_of(op).CASES]
    for case in args.case or ():
        if case not in cases:
            raise ValueError(f"--case: got {case!r}, expected some of {', '.join(cases)}")


def reports_of(args: argparse.Namespace) -> Iterator[Report]:
    """Compile the launches that the options ask for, and yield their rows."""
    # Launches by hash. Equal launches of several cases are compiled once.
    jobs: dict[str, list[Job]] = {}
    for arch in args.arch or ARCHS:
        for job in compiling.recorded_launches(arch, args.op, args.case):
            jobs.setdefault(compiling.source_key(job, args.sass), []).append(job)
    distinct = {key: equal[0] for key, equal in jobs.items()}
    for key, measured in compiling.measure_all(distinct, args.jobs, args.sass):
        for job in jobs[key]:
            yield report_of(job, measured)


def report_of(job: Job, measured: Measured) -> Report:
    """Return the row of a launch in the table, with the faults of the launch."""
    constants = job.constants
    sizes = "x".join(str(constants[size]) for size in _TILE_SIZES if size in constants)
    # A Gluon kernel has no stages, but a ring of slots.
    stages = job.options.get("num_stages") or constants["SLOTS"]
    kernel = job.kernel.removesuffix("_kernel")
    issue = known.issue_of(job.op, kernel, job.arch, job.case)
    redundant = "; ".join(measured.redundant)
    faults = faults_of(job, measured)
    if redundant and not issue:
        faults.append(redundant)
    return Report(
        op=job.op,
        case=job.case,
        kernel=kernel,
        arch=job.arch,
        tile=f"{sizes} w{job.options['num_warps']} s{stages}",
        registers=measured.registers,
        spilled=measured.stack,
        shared=measured.shared,
        instructions=measured.instructions,
        fault="; ".join(faults),
        known=f"{redundant}: {issue}" if redundant and issue else "",
        sass=measured.sass,
    )


def faults_of(job: Job, measured: Measured) -> list[str]:
    """Return a sentence for each fault of a launch but redundant warps."""
    from mmfused.kernels import tiles

    limit = tiles.SHARED_MEMORY[int(job.arch.removeprefix("sm_"))]
    faults = list(measured.races)
    if measured.stack:
        faults.append(f"spills {measured.stack} bytes per thread")
    if measured.shared > limit:
        faults.append(f"needs {measured.shared} bytes of shared memory, but the GPU has {limit}")
    # Kernels with UPCAST multiply matrices with `tiles.dot`, which uses matrix instructions for
    # float16 and bfloat16.
    needs_matrix = "UPCAST" in job.constants and _has_half(tuple(job.signature.values()))
    if needs_matrix and not any(measured.instructions.values()):
        faults.append("has no matrix instruction")
    return faults


def _has_half(types: tuple) -> bool:
    """Return whether float16 or bfloat16 is among the types of arguments."""
    return any(
        _has_half(kind) if isinstance(kind, tuple) else "fp16" in kind or "bf16" in kind
        for kind in types
    )
