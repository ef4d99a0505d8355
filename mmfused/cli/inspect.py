"""``mmfused inspect``: compile the launches of every kernel without a GPU and check the result.

The launchers run on meta tensors, and :mod:`mmfused.kernels.recording` records their launches. The
compiled launches are therefore those that would run on a GPU of the requested architecture. The
command exits with 1 if a kernel spills registers, needs more shared memory than the GPU has, has a
race (:mod:`.races`), or lacks a matrix instruction that it should have.

Results are cached by :func:`source_key`, so only changed launches are compiled again.
``MMFUSED_INSPECT_CACHE`` sets the folder of this cache (default ``~/.cache/mmfused/inspect``).
Triton's own cache is not used.
"""

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
from typing import TYPE_CHECKING

from ..library import INTERPRETED
from ..ops import OPS
from ..supported import ARCHS
from . import races

if TYPE_CHECKING:
    from mmfused.kernels.recording import Launch

HELP = (
    "compile every kernel for GPU architectures, without a GPU, and show registers, spills, shared "
    "memory and instructions"
)
# Names in the table, and the instructions in PTX.
MATRIX_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "tcgen05": "tcgen05.mma",
}
# Names of dtypes in torch, and in the signatures of Triton kernels.
_DTYPES = {
    "float32": "fp32",
    "float64": "fp64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}
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

    def __str__(self) -> str:
        counts = [f"{name}:{count}" for name, count in self.instructions.items() if count]
        row = (
            f"{self.op:15} {self.case:15} {self.kernel:16} {self.arch:7} {self.tile:22} "
            f"{self.registers:4} {self.spilled:5} {self.shared:7}  {' '.join(counts) or 'none'}"
        )
        return f"{row}  <- {self.fault}" if self.fault else row


@dataclass(frozen=True)
class Measured:
    """The compiler's result for one launch."""

    registers: int
    stack: int  # bytes per thread; only spilled registers use the stack
    shared: int  # bytes per block
    instructions: dict[str, int]
    races: list[str]


@dataclass
class Job:
    """A recorded launch that can be pickled."""

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
    """Add the command's options to ``parser``."""
    parser.add_argument(
        "--arch",
        action="append",
        metavar="sm_90",
        help=f"architecture; may be repeated (default: {' '.join(ARCHS)})",
    )
    parser.add_argument("--op", choices=sorted(OPS), help="compile the kernels of this op only")
    parser.add_argument("--case", action="append", help="compile this case only; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a JSON file")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of parallel compilations (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    """Compile the launches, print the table, and return 1 if a launch has a fault, else 0."""
    archs: list[str] = args.arch or list(ARCHS)
    _check(args, archs)
    # Launches by hash. Equal launches of several cases are compiled once.
    jobs: dict[str, list[Job]] = {}
    for arch in archs:
        for job in recorded_launches(arch, args.op, args.case):
            jobs.setdefault(source_key(job), []).append(job)
    print(_HEADER, flush=True)
    reports = []
    for key, measured in _measure_all({key: equal[0] for key, equal in jobs.items()}, args.jobs):
        for job in jobs[key]:
            reports.append(report_of(job, measured))
            print(reports[-1], flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    faults = sum(bool(r.fault) for r in reports)
    print(f"{len(reports)} launches compiled, {faults} with a fault.")
    return 1 if faults else 0


def _check(args: argparse.Namespace, archs: list[str]) -> None:
    if INTERPRETED:
        raise ValueError(
            "inspect: TRITON_INTERPRET: got '1', expected it unset, because it disables compilation"
        )
    from mmfused.kernels.tiles import SHARED_MEMORY

    supported = [f"sm_{number}" for number in SHARED_MEMORY]
    for arch in archs:
        if arch not in supported:
            raise ValueError(f"--arch: got {arch!r}, expected one of {', '.join(supported)}")
    cases = [case for op in OPS if args.op in (None, op) for case in cases_of(op).CASES]
    for case in args.case or ():
        if case not in cases:
            raise ValueError(f"--case: got {case!r}, expected some of {', '.join(cases)}")


def _measure_all(jobs: dict[str, Job], workers: int) -> Iterator[tuple[str, Measured]]:
    """Yield the result of each job, from the cache if possible; cache the other results."""
    cache = _cache_folder()
    missing: dict[str, Job] = {}
    for key, job in jobs.items():
        measured = _read_cached(cache / key)
        if measured is None:
            missing[key] = job
        else:
            yield key, measured
    with tempfile.TemporaryDirectory() as triton_cache:
        os.environ["TRITON_CACHE_DIR"] = triton_cache  # the worker processes inherit it
        with ProcessPoolExecutor(workers) as pool:
            results = pool.map(compile_job, missing.values())
            for key, measured in zip(missing, results, strict=True):
                temporary = cache / f"{key}.{os.getpid()}"
                temporary.write_text(json.dumps(asdict(measured)))
                temporary.replace(cache / key)
                yield key, measured


def _cache_folder() -> Path:
    named = os.environ.get("MMFUSED_INSPECT_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfused" / "inspect"
    folder = Path(named) if named else root
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_cached(path: Path) -> Measured | None:
    """Return the cached result in ``path``, or None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return Measured(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        print(f"{path} is damaged, so its launch is compiled again.", flush=True)
        return None


@functools.cache
def _fingerprint(module: str, kernel: str) -> str:
    """Return a hash of the kernel's source, Triton's version and the source of the checks."""
    import triton

    checks = [inspect.getsource(part) for part in (compile_job, _resources, races)]
    source = getattr(importlib.import_module(module), kernel).cache_key
    parts = (triton.__version__, source, checks, MATRIX_INSTRUCTIONS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def source_key(job: Job) -> str:
    """Return a hash of everything that determines the compiler's result for a launch."""
    launch = (job.arch, job.signature, job.constexprs, job.divisible, job.options)
    return hashlib.sha256(repr((_fingerprint(job.module, job.kernel), launch)).encode()).hexdigest()


def cases_of(op: str) -> ModuleType:
    """Return the module that defines the ``CASES`` of an op and ``launch(case)``."""
    return importlib.import_module(f"mmfused.kernels.{op}.inspect_cases")


def recorded_launches(
    arch: str,
    only_op: str | None = None,
    only_cases: list[str] | None = None,
) -> Iterator[Job]:
    """Yield every distinct launch that the launchers would make on ``arch``.

    Args:
        arch: an architecture, such as "sm_90".
        only_op: yield launches of this op only.
        only_cases: yield launches of these cases only.
    """
    from mmfused.kernels.recording import launches_for

    for op in OPS:
        for name, case in cases_of(op).CASES.items():
            if only_op not in (None, op) or (only_cases and name not in only_cases):
                continue
            with launches_for(int(arch.removeprefix("sm_"))) as launches:
                cases_of(op).launch(case)
            # A dict, because a launcher may repeat a launch for several chunks.
            jobs = {}
            for launch in launches:
                job = _job(op, name, arch, launch)
                jobs[repr(job)] = job
            yield from jobs.values()


def _job(
    op: str,
    case: str,
    arch: str,
    launch: Launch,
) -> Job:
    """Return the job of a launch; arguments get the types that Triton's launcher gives them.

    Arguments that are 1 or None become constants. Pointers and multiples of 16 are marked as
    divisible by 16.
    """
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants = dict(launch.constexprs)
    divisible: list[str] = []
    for name, value in launch.args.items():
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            signature[name] = "constexpr"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "*" + _DTYPES[str(value.dtype).removeprefix("torch.")]
            divisible.append(name)
    signature |= {name: "constexpr" for name in launch.constexprs}
    return Job(
        op=op,
        case=case,
        arch=arch,
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=constants,
        divisible=divisible,
        options=launch.options,
    )


def compile_job(job: Job) -> Measured:
    """Compile one launch for its architecture and measure the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=job.signature,
        constexprs={index[name]: value for name, value in job.constexprs.items() if name in index},
        attrs={index[name]: [["tt.divisibility", 16]] for name in job.divisible},
    )
    target = GPUTarget("cuda", int(job.arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=job.options)
    registers, stack = _resources(Path(triton.__file__).parent, compiled.asm["cubin"], job)
    counts = {name: compiled.asm["ptx"].count(text) for name, text in MATRIX_INSTRUCTIONS.items()}
    found = races.find_races(compiled.asm["ttgir"])
    return Measured(registers, stack, compiled.metadata.shared, counts, found)


def report_of(job: Job, measured: Measured) -> Report:
    """Return the row of a launch in the table, with the faults of the launch."""
    from mmfused.kernels import tiles

    limit = tiles.SHARED_MEMORY[int(job.arch.removeprefix("sm_"))]
    faults = list(measured.races)
    if measured.stack:
        faults.append(f"spills {measured.stack} bytes per thread")
    if measured.shared > limit:
        faults.append(f"needs {measured.shared} bytes of shared memory, but the GPU has {limit}")
    constants = job.constexprs
    # Kernels with UPCAST multiply matrices with `tiles.dot`, which uses matrix instructions for
    # float16 and bfloat16.
    needs_matrix = "UPCAST" in constants and not {"*fp16", "*bf16"}.isdisjoint(
        job.signature.values()
    )
    if needs_matrix and not any(measured.instructions.values()):
        faults.append("has no matrix instruction")
    sizes = "x".join(str(constants[size]) for size in _TILE_SIZES if size in constants)
    return Report(
        op=job.op,
        case=job.case,
        kernel=job.kernel.removesuffix("_kernel"),
        arch=job.arch,
        tile=f"{sizes} w{job.options['num_warps']} s{job.options['num_stages']}",
        registers=measured.registers,
        spilled=measured.stack,
        shared=measured.shared,
        instructions=measured.instructions,
        fault="; ".join(faults),
    )


def _resources(triton_root: Path, cubin: bytes, job: Job) -> tuple[int, int]:
    """Return the registers and the bytes of stack that one thread uses."""
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
        message = done.stderr.strip() or "no message"
        cache = os.environ.get("TRITON_CACHE_DIR")
        raise RuntimeError(
            f"{job.kernel} for {job.arch}: cuobjdump cannot read the {len(cubin)} bytes of the "
            f"cubin ({message}); Triton's cache {cache} may be damaged or its disk full"
        )
    return int(found[1]), int(found[2])
