"""Compile recorded launches of kernels without a GPU, and cache what is found out about them.

Results are cached by :func:`source_key`, so only changed launches are compiled again.
``MMFUSED_INSPECT_CACHE`` sets the folder of this cache (default ``~/.cache/mmfused/inspect``).
Triton's own cache is not used.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from ..kernels.jobs import Job, compiled, job_of, resources
from ..ops import OPS
from . import races, redundancy, sass

# Names in the table, and the instructions in PTX.
MATRIX_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "tcgen05": "tcgen05.mma",
}


@dataclass(frozen=True)
class Measured:
    """The compiler's result for one launch."""

    registers: int
    stack: int  # bytes per thread; only spilled registers use the stack
    shared: int  # bytes per block
    instructions: dict[str, int]
    races: list[str]
    redundant: list[str]
    sass: sass.Sass | None = None  # None if it was not asked for


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
                job = job_of(op, name, arch, launch)
                jobs[repr(job)] = job
            yield from jobs.values()


def compile_job(job: Job, with_sass: bool = False) -> Measured:
    """Compile one launch for its architecture and measure the result."""
    result = compiled(job)
    cubin = result.asm["cubin"]
    registers, stack = resources(cubin, f"{job.kernel} for {job.arch}")
    return Measured(
        registers=registers,
        stack=stack,
        shared=result.metadata.shared,
        instructions={
            name: result.asm["ptx"].count(text) for name, text in MATRIX_INSTRUCTIONS.items()
        },
        races=races.find_races(result.asm["ttgir"]),
        redundant=redundancy.find_redundant(result.asm["ttgir"]),
        sass=sass.read(cubin) if with_sass else None,
    )


@functools.cache
def _fingerprint(module: str, kernel: str, with_sass: bool) -> str:
    """Return a hash of the kernel's source, Triton's version and the source of the checks."""
    import triton

    checks = [compiled, compile_job, resources, races, redundancy]
    if with_sass:
        checks.append(sass)
    source = getattr(importlib.import_module(module), kernel).cache_key
    texts = [inspect.getsource(check) for check in checks]
    parts = (triton.__version__, source, texts, MATRIX_INSTRUCTIONS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def source_key(job: Job, with_sass: bool = False) -> str:
    """Return a hash of everything that determines the compiler's result for a launch."""
    launch = (job.arch, job.signature, job.constexprs, job.attributes, job.options)
    fingerprint = _fingerprint(job.module, job.kernel, with_sass)
    return hashlib.sha256(repr((fingerprint, launch)).encode()).hexdigest()


def measure_all(
    jobs: dict[str, Job], workers: int, with_sass: bool
) -> Iterator[tuple[str, Measured]]:
    """Yield the result of each job, from the cache if possible; cache the other results.

    Args:
        jobs: distinct jobs by :func:`source_key`.
        workers: the number of processes that compile.
        with_sass: whether to read the machine code as well.
    """
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
            compile_one = functools.partial(compile_job, with_sass=with_sass)
            results = pool.map(compile_one, missing.values())
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
        entry = json.loads(path.read_text())
        code = entry.pop("sass")
        return Measured(**entry, sass=None if code is None else sass.Sass.of(code))
    except (ValueError, TypeError, KeyError):
        print(f"{path} is damaged, so its launch is compiled again.", flush=True)
        return None
