"""Compile recorded launches without a GPU, also in parallel worker processes.

A worker is a Python process of its own, not a fork or a spawned copy of the caller: a fork would
copy CUDA's state, and a spawned process would run the caller's script again if that has no
``if __name__ == "__main__"``.

This module imports Triton in its functions only.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recording import Launch

# For tests: kernels run on a CPU. A worker compiles.
_NOT_INHERITED = ("TRITON_INTERPRET", "MMFUSED_PTX_ARCH")
# What imports and the compiler print goes to standard error. Only Python's own start comes before
# that, when a file such as sitecustomize.py may print: an answer is what follows the mark.
_SERVE = "import os; out = os.dup(1); os.dup2(2, 1); import mmfused.kernels.jobs as j; j.serve(out)"
_MARK = b"mmfused: an answer follows\n"


@dataclass
class Job:
    """A recorded launch that can be pickled; signature to options as Triton's compiler takes them.

    The keys of ``constexprs`` and ``attributes`` are paths: see ``recording.Specialization``.
    """

    op: str
    case: str
    arch: str
    module: str
    kernel: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    source: str | None = None  # hash of the kernel's source in the process that launches it

    @property
    def constants(self) -> dict[str, Any]:
        """The constant parameters by name."""
        names = list(self.signature)
        return {names[path[0]]: c for path, c in self.constexprs.items() if len(path) == 1}


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    registers: int | None = None  # of a thread; None if cuobjdump is missing, or after an error
    spilled: int | None = None  # bytes of stack of a thread
    shared: int | None = None  # bytes of a block
    cached: bool = False  # whether the kernel was in Triton's cache
    seconds: float = 0.0
    error: str | None = None  # of the compiler, in one line


# ---- one job -------------------------------------------------------------------------------------


def job_of(
    op: str,
    case: str,
    arch: str,
    launch: Launch,
) -> Job:
    """Return the job that compiles a recorded launch."""
    from .recording import specialize

    special = specialize(launch, int(arch.removeprefix("sm_")))
    return Job(
        op=op,
        case=case,
        arch=arch,
        module=launch.kernel.fn.__module__,
        kernel=launch.name,
        signature=special.signature,
        constexprs=special.constexprs,
        attributes=special.attributes,
        options=launch.options,
    )


def as_launched(job: Job) -> Job:
    """Return the job with what else is in the key under which Triton caches a launch.

    These are options from Triton's environment variables, and the hash of the source. In Triton 3.6
    that hash depends on which kernels were hashed before, so call this in the order of launches.
    """
    from triton import knobs

    added = {
        "debug": job.options.get("debug") or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = getattr(kernel, "cache_key", None)  # the interpreter's function has none
    return replace(job, options=job.options | added, source=source)


def compiled(job: Job) -> Any:
    """Return Triton's compiled kernel for a job; its ``asm`` has "ttgir", "ptx" and "cubin"."""
    import triton

    source, target = _source(job)
    return triton.compile(source, target=target, options=job.options)


def _source(job: Job) -> tuple[Any, Any]:
    """Return Triton's source and target of a job."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    if job.source is not None and kernel.cache_key != job.source:
        kernel.hash = job.source
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, job.signature, job.constexprs, job.attributes)
    return source, GPUTarget("cuda", int(job.arch.removeprefix("sm_")), 32)


def is_cached(job: Job) -> bool:
    """Return whether Triton's cache holds the compiled kernel of a job."""
    from triton.runtime.cache import get_cache_manager

    entry = get_cache_manager(hashlib.sha256(cache_key(job).encode()).hexdigest())
    name = f"{job.kernel[:150]}.json"
    return name in (entry.get_group(name) or {})


def cache_key(job: Job) -> str:
    """Return the text whose hash is the name of the compiled kernel in Triton's cache."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    source, target = _source(job)
    backend = make_backend(target)
    options = backend.parse_options(dict(job.options, **source.parse_options()))
    return get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())


def resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Return the registers and the bytes of stack that one thread uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", done.stdout)
    if found is None:
        message = done.stderr.strip() or "no message"
        cache = os.environ.get("TRITON_CACHE_DIR")
        raise RuntimeError(
            f"{name}: cuobjdump cannot read the {len(cubin)} bytes of the "
            f"cubin ({message}); Triton's cache {cache} may be damaged or its disk full"
        )
    return int(found[1]), int(found[2])


def tool(name: str) -> Path:
    """Return the path of a program that comes with Triton, such as "nvdisasm"."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def outcome_of(job: Job) -> Outcome:
    """Compile a job into Triton's cache, unless it is there, and return what became of it."""
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    start = time.perf_counter()
    try:
        kernel = compiled(job)
    except Exception as error:  # Triton's compiler raises errors of many kinds
        return Outcome(error=reason_of(error)[:300])
    finally:
        knobs.compilation.listener = None
    seconds = time.perf_counter() - start
    registers = spilled = None
    with suppress(OSError, RuntimeError):  # not part of every build of Triton
        registers, spilled = resources(kernel.asm["cubin"], job.kernel)
    return Outcome(registers, spilled, kernel.metadata.shared, hits == [True], seconds)


def reason_of(error: Exception) -> str:
    """Return in one line why Triton cannot compile a kernel."""
    text = str(error)
    fatal = re.search(r"ptxas fatal\s*: (.*)", text)  # below lines that do not say why
    text = f"ptxas: {fatal[1]}" if fatal else text
    return f"{type(error).__name__}: {' '.join(text.split())}"


# ---- many jobs -----------------------------------------------------------------------------------


def outcomes_of(jobs: dict[str, Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcome of each job, as they finish.

    Args:
        jobs: distinct jobs by a key of the caller's.
        workers: the most processes that compile.

    Raises:
        RuntimeError: a worker died, such as for lack of memory.
    """
    if not jobs:
        return
    processes = [_start() for _ in range(min(workers, len(jobs)))]
    free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for process in processes:
        free.put(process)

    def run(job: Job) -> Outcome:
        process = free.get()
        try:
            return _ask(process, job)
        finally:
            free.put(process)

    pool = ThreadPoolExecutor(len(processes))
    try:
        keys = {pool.submit(run, job): key for key, job in jobs.items()}
        for future in as_completed(keys):
            yield keys[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    """Start a worker that finds the modules that this process finds, and its cache."""
    from triton import knobs

    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    env["PYTHONSAFEPATH"] = "1"  # the current folder is not searched, unless it is in the path
    env["TRITON_CACHE_DIR"] = str(knobs.cache.dir)
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which then ends the worker
    )


def _ask(process: subprocess.Popen[bytes], job: Job) -> Outcome:
    assert process.stdin is not None and process.stdout is not None
    try:
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        while (line := process.stdout.readline()) != _MARK:
            if not line:
                raise EOFError
        return pickle.load(process.stdout)
    except (OSError, EOFError) as error:
        raise RuntimeError(
            f"{job.kernel}: the process that compiled it for {job.arch} ended with exit status "
            f"{process.wait()}; fewer workers need less memory"
        ) from error


def serve(out: int) -> None:
    """Compile the jobs that come from standard input, until it ends; answer to the file ``out``."""
    answers: IO[bytes] = os.fdopen(out, "wb")
    sys.stdout = open(os.devnull, "w")  # Triton prints all PTX that ptxas refuses
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answers.write(b"\n" + _MARK + pickle.dumps(outcome_of(job)))
        answers.flush()
