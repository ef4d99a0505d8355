"""``mmfused inspect``: compile every plan of every kernel without a GPU and look at what came out.

The launchers run on meta tensors while :mod:`mmfused.kernels.tiles` pretends to be on the asked architecture and hands each launch
over instead of starting it, so what is compiled here is what would run there. A spill, or more shared memory than the card has, is
a fault and makes the command exit 1; so is a matrix instruction missing where the plan means to use one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ..library import INTERPRETED
from .specimens import ON_META, SPECIMENS

HELP = "compile every kernel for a GPU architecture, without a GPU: registers, spills, shared memory, instructions"
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100")
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
    num_warps: int
    num_stages: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", action="append", metavar="sm_90", help=f"architecture, may be repeated (default {' '.join(ARCHS)})"
    )
    parser.add_argument("--op", choices=sorted(SPECIMENS), help="one op only")
    parser.add_argument("--case", action="append", help="one case only, may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default 2)")


def run(args: argparse.Namespace) -> int:
    archs = args.arch or list(ARCHS)
    for arch in archs:
        if not re.fullmatch(r"sm_\d{2,3}", arch):
            raise ValueError(f"--arch is {arch!r}; it takes names like sm_90.")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is 1, so nothing is compiled; inspect takes an environment without it.")
    known = [case for op, cases in SPECIMENS.items() if args.op in (None, op) for case in cases]
    for case in args.case or ():
        if case not in known:
            raise ValueError(f"--case is {case!r}; it takes some of {', '.join(known)}.")
    jobs = [job for arch in archs for job in heard_launches(arch, args.op, args.case)]
    reports = []
    print(
        f"{'op':15} {'case':15} {'kernel':8} {'arch':7} {'tile':22} {'regs':>4} {'spill':>5} {'shared':>7}  instructions",
        flush=True,
    )
    with ProcessPoolExecutor(args.jobs) as pool:
        for report in pool.map(compile_job, jobs):
            reports.append(report)
            used = " ".join(f"{name}:{count}" for name, count in report.instructions.items() if count) or "none"
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


def heard_launches(arch: str, only_op: str | None = None, only_cases: list[str] | None = None) -> Iterator[Job]:
    """Every launch the launchers would make on this architecture, each distinct one once."""
    from mmfused.kernels import tiles

    heard = []
    tiles.listener = lambda *launch: heard.append(launch)
    tiles.pretended_arch = int(arch.removeprefix("sm_"))
    try:
        for op, cases in SPECIMENS.items():
            for case, shape in cases.items():
                if only_op not in (None, op) or (only_cases and case not in only_cases):
                    continue
                heard.clear()
                ON_META[op](*shape)
                jobs = {}  # a launcher may repeat a kernel over chunks: once is enough
                for launch in heard:
                    job = _job(op, case, arch, *launch)
                    jobs[repr(job)] = job
                yield from jobs.values()
    finally:
        tiles.listener = tiles.pretended_arch = None


def _job(op, case, arch, kernel, args, constexprs, num_warps, num_stages) -> Job:
    """Type each argument as Triton's launcher does: 1 and None are constants, multiples of 16 are known as such."""
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
    return Job(op, case, arch, kernel.fn.__module__, kernel.fn.__name__, signature, constants, divisible, num_warps, num_stages)


def compile_job(job: Job) -> Report:
    """Compile one launch for its architecture and read registers, stack, shared memory and matrix instructions."""
    import importlib

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
    arch = int(job.arch.removeprefix("sm_"))
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "maxnreg": job.constexprs.get("maxnreg")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(Path(triton.__file__).parent, compiled.asm["cubin"])
    counts = {name: compiled.asm["ptx"].count(text) for name, text in MATRIX_INSTRUCTIONS.items()}
    shared, limit = compiled.metadata.shared, tiles.SHARED_MEMORY.get(arch, tiles.SMALLEST_SHARED_MEMORY)
    faults = []
    if stack:
        faults.append(f"spills {stack} bytes a thread")
    if shared > limit:
        faults.append(f"needs {shared} bytes of shared memory, the card has {limit}")
    c = job.constexprs
    # UPCAST is what tiles.dot takes; float32 is multiplied exactly, without matrix instructions.
    multiplies = "UPCAST" in c and not {"*fp16", "*bf16"}.isdisjoint(job.signature.values())
    if multiplies and not any(counts.values()):
        faults.append("no matrix instruction")
    sizes = "x".join(str(c[k]) for k in ("BM", "BX", "BN", "BY", "BR", "BK", "BD") if k in c)
    tile = f"{sizes} w{job.num_warps} s{job.num_stages}"
    name = job.kernel.removesuffix("_kernel")
    name = f"{name} {'bwd' if job.module.endswith('backward') else 'fwd'}" if name == "onepass" else name
    return Report(job.op, job.case, name, job.arch, tile, registers, stack, shared, counts, "; ".join(faults))


def _resources(triton_root: Path, cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton_root / "backends/nvidia/bin/cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])
