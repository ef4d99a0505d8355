"""``mmfused inspect``: compile every plan of every kernel without a GPU and look at what came out.

The launchers run on meta tensors while :mod:`mmfused.kernels.tiles` pretends to be on the asked
architecture and hands each launch over instead of starting it, so what is compiled here is what
would run there. A spill, more shared memory than the card has, a race (:mod:`.races`), or a matrix
instruction missing where the plan means to use one is a fault and makes the command exit 1.

What was measured is stored by kernel source, arguments, options and Triton version, so that a
second run compiles only what has changed, and a run that was stopped goes on.
``MMFUSED_INSPECT_CACHE`` names the folder (default ``~/.cache/mmfused/inspect``). Triton's own
cache is a temporary folder: the user's is neither read nor filled."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from ..library import INTERPRETED
from ..ops import OPS
from ..supported import ARCHS
from . import races

HELP = "compile every kernel for a GPU architecture, without a GPU: registers, spills, shared memory, instructions"
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}


@dataclass
class Report:
    """What one kernel became: the row that is printed."""

    op: str
    case: str
    kernel: str
    arch: str
    tile: str
    registers: int
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a block
    instructions: dict[str, int]
    fault: str = ""


@dataclass(frozen=True)
class Measured:
    """What the compiler made of one launch."""

    registers: int
    stack: int  # bytes a thread: without local arrays, spills
    shared: int  # bytes a block
    instructions: dict[str, int]
    races: list[str]


@dataclass
class Job:
    """One launch as heard from a launcher, in picklable form."""

    op: str
    case: str
    arch: str
    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible: list[str]
    options: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        action="append",
        metavar="sm_90",
        help=f"architecture, may be repeated (default {' '.join(ARCHS)})",
    )
    parser.add_argument("--op", choices=sorted(OPS), help="one op only")
    parser.add_argument("--case", action="append", help="one case only, may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default 2)")


def run(args: argparse.Namespace) -> int:
    archs = args.arch or list(ARCHS)
    _check(args, archs)
    jobs: dict[str, list[Job]] = {}  # the same launch, of several cases, is compiled once
    for arch in archs:
        for job in recorded_launches(arch, args.op, args.case):
            jobs.setdefault(source_key(job), []).append(job)
    reports = []
    print(
        f"{'op':15} {'case':15} {'kernel':8} {'arch':7} {'tile':22} {'regs':>4} {'spill':>5} {'shared':>7}  instructions",
        flush=True,
    )
    for key, measured in _measure_all({key: same[0] for key, same in jobs.items()}, args.jobs):
        for report in (report_of(job, measured) for job in jobs[key]):
            reports.append(report)
            used = (
                " ".join(f"{name}:{count}" for name, count in report.instructions.items() if count)
                or "none"
            )
            print(
                f"{report.op:15} {report.case:15} {report.kernel:8} {report.arch:7} {report.tile:22} {report.registers:4} "
                f"{report.spilled:5} {report.shared:7}  {used}{'  <- ' + report.fault if report.fault else ''}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    faults = sum(bool(r.fault) for r in reports)
    print(f"{len(reports)} kernels compiled, {faults} with a fault.")
    return 1 if faults else 0


def _check(args: argparse.Namespace, archs: list[str]) -> None:
    if INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET is 1, so nothing is compiled; inspect takes an environment without it."
        )
    from mmfused.kernels.tiles import SHARED_MEMORY

    takes = [f"sm_{number}" for number in SHARED_MEMORY]
    for arch in archs:
        if arch not in takes:
            raise ValueError(f"--arch: got {arch!r}, expected one of {', '.join(takes)}")
    known = [case for op in OPS if args.op in (None, op) for case in cases_of(op).CASES]
    for case in args.case or ():
        if case not in known:
            raise ValueError(f"--case: got {case!r}, expected some of {', '.join(known)}")


def _measure_all(jobs: dict[str, Job], workers: int) -> Iterator[tuple[str, Measured]]:
    """What each job became: from the store, or compiled now, which the store then keeps."""
    store = _store()
    missing = []
    for key, job in jobs.items():
        measured = _stored(store / key)
        if measured is None:
            missing.append((key, job))
        else:
            yield key, measured
    with tempfile.TemporaryDirectory() as triton_cache:
        os.environ["TRITON_CACHE_DIR"] = triton_cache  # the worker processes inherit it
        with ProcessPoolExecutor(workers) as pool:
            for (key, _), measured in zip(
                missing, pool.map(compile_job, [job for _, job in missing]), strict=True
            ):
                partial = store / f"{key}.{os.getpid()}"
                partial.write_text(json.dumps(asdict(measured)))
                partial.replace(store / key)
                yield key, measured


def _store() -> Path:
    named = os.environ.get("MMFUSED_INSPECT_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfused" / "inspect"
    folder = Path(named) if named else root
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stored(path: Path) -> Measured | None:
    """A file that is damaged is named, and its launch compiled again."""
    if not path.is_file():
        return None
    try:
        return Measured(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        print(f"{path} is damaged: its launch is compiled again.", flush=True)
        return None


@functools.cache
def _fingerprint(module: str, kernel: str) -> str:
    """The source of a kernel and of all it calls, and this Triton; and how a kernel is judged here."""
    import triton

    from mmfused.kernels import tiles

    judge = [inspect.getsource(part) for part in (compile_job, _resources, races)]
    source = getattr(importlib.import_module(module), kernel).cache_key
    return hashlib.sha256(
        repr((triton.__version__, source, judge, tiles.OPTIONS, MATRIX_INSTRUCTIONS)).encode()
    ).hexdigest()


def source_key(job: Job) -> str:
    """A name for all that decides what the compiler makes of a launch."""
    launch = (job.arch, job.signature, job.constexprs, job.divisible, job.options)
    return hashlib.sha256(repr((_fingerprint(job.module, job.kernel), launch)).encode()).hexdigest()


def cases_of(op: str) -> ModuleType:
    """The module with the cases of an op, and what launches them."""
    return importlib.import_module(f"mmfused.kernels.{op}.inspect_cases")


def recorded_launches(
    arch: str,
    only_op: str | None = None,
    only_cases: list[str] | None = None,
) -> Iterator[Job]:
    """Every launch the launchers would make on this architecture, each distinct one once."""
    from mmfused.kernels import tiles

    recorded = []
    tiles.listener = lambda *launch: recorded.append(launch)
    tiles.pretended_arch = int(arch.removeprefix("sm_"))
    try:
        for op in OPS:
            for name, case in cases_of(op).CASES.items():
                if only_op not in (None, op) or (only_cases and name not in only_cases):
                    continue
                recorded.clear()
                cases_of(op).launch(case)
                jobs = {}  # a launcher may repeat a kernel over chunks: once is enough
                for launch in recorded:
                    job = _job(op, name, arch, *launch)
                    jobs[repr(job)] = job
                yield from jobs.values()
    finally:
        tiles.listener = tiles.pretended_arch = None


def _job(op, case, arch, kernel, args, constexprs, options) -> Job:
    """Type each argument as Triton's launcher does: 1 and None are constants, multiples of 16 are
    known as such.
    """
    names = {
        "float32": "fp32",
        "float64": "fp64",
        "float16": "fp16",
        "bfloat16": "bf16",
        "uint8": "u8",
        "int32": "i32",
        "int64": "i64",
        "bool": "i1",
    }
    signature, constants, divisible = {}, dict(constexprs), []
    for name, value in zip(kernel.arg_names, args, strict=False):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            signature[name] = "constexpr"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "*" + names[str(value.dtype).removeprefix("torch.")]
            divisible.append(name)
    signature |= {name: "constexpr" for name in constexprs}
    signature = {name: signature[name] for name in kernel.arg_names}
    return Job(
        op,
        case,
        arch,
        kernel.fn.__module__,
        kernel.fn.__name__,
        signature,
        constants,
        divisible,
        options,
    )


def compile_job(job: Job) -> Measured:
    """Compile one launch for its architecture and read registers, stack, shared memory and matrix
    instructions.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmfused.kernels import tiles

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=job.signature,
        constexprs={place[name]: value for name, value in job.constexprs.items() if name in place},
        attrs={place[name]: [["tt.divisibility", 16]] for name in job.divisible},
    )
    target = GPUTarget("cuda", int(job.arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=job.options | tiles.OPTIONS)
    registers, stack = _resources(Path(triton.__file__).parent, compiled.asm["cubin"], job)
    counts = {name: compiled.asm["ptx"].count(text) for name, text in MATRIX_INSTRUCTIONS.items()}
    found = races.pipelined_register_reads(compiled.asm["ttgir"])
    return Measured(registers, stack, compiled.metadata.shared, counts, found)


def report_of(job: Job, measured: Measured) -> Report:
    """The row of a launch, and what is wrong with it."""
    from mmfused.kernels import tiles

    limit = tiles.SHARED_MEMORY[int(job.arch.removeprefix("sm_"))]
    faults = list(measured.races)
    if measured.stack:
        faults.append(f"spills {measured.stack} bytes a thread")
    if measured.shared > limit:
        faults.append(f"needs {measured.shared} bytes of shared memory, the card has {limit}")
    c = job.constexprs
    # UPCAST is what tiles.dot takes; float32 is multiplied exactly, without matrix instructions.
    multiplies = "UPCAST" in c and not {"*fp16", "*bf16"}.isdisjoint(job.signature.values())
    if multiplies and not any(measured.instructions.values()):
        faults.append("no matrix instruction")
    sizes = "x".join(str(c[k]) for k in ("BM", "BX", "BN", "BY", "BR", "BK", "BD") if k in c)
    return Report(
        op=job.op,
        case=job.case,
        kernel=_short_name(job),
        arch=job.arch,
        tile=f"{sizes} w{job.options['num_warps']} s{job.options['num_stages']}",
        registers=measured.registers,
        spilled=measured.stack,
        shared=measured.shared,
        instructions=measured.instructions,
        fault="; ".join(faults),
    )


def _short_name(job: Job) -> str:
    name = job.kernel.removesuffix("_kernel")
    return (
        f"{name} {'bwd' if job.module.endswith('backward') else 'fwd'}"
        if name == "onepass"
        else name
    )


def _resources(triton_root: Path, cubin: bytes, job: Job) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [
            triton_root / "backends/nvidia/bin/cuobjdump",
            "--dump-resource-usage",
            file.name,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(
            f"{job.kernel} for {job.arch} became {len(cubin)} bytes that cuobjdump cannot read "
            f"({done.stderr.strip() or 'no message'}): Triton's cache {os.environ.get('TRITON_CACHE_DIR')} is "
            "damaged, or its disk is full."
        )
    return int(found[1]), int(found[2])
