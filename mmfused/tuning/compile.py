"""Compile the launches of candidates in worker processes, and say which need not run.

On a GPU the workers compile into Triton's own cache, so that a candidate that is timed afterwards
is not compiled again. Without one they use the cache of ``mmfused inspect``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING

from ..cli import compiling
from ..cli.compiling import Job, Measured
from ..cli.inspect import faults_of
from ..kernels.jobs import reason_of

if TYPE_CHECKING:
    from mmfused.kernels.recording import Launch

LIMIT_SECONDS = 240  # of one compilation; a worker that takes longer is ended
Outcome = Measured | str  # or why a launch cannot be compiled


class Compiler:
    """Compiles jobs in worker processes; a context manager that ends them.

    Args:
        workers: the number of processes.
        for_this_gpu: whether to compile into Triton's cache, and not to use that of ``inspect``.
        compile_one: compiles a job; a function of a module, because it is sent to the workers.
    """

    def __init__(
        self,
        workers: int,
        for_this_gpu: bool,
        compile_one: Callable[[Job], Measured] = compiling.compile_job,
    ) -> None:
        self.workers, self.for_this_gpu, self.compile_one = workers, for_this_gpu, compile_one
        self._found: dict[str, Outcome] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_pool()
        if self._folder is not None:
            self._folder.cleanup()

    def compiled(self, jobs: Mapping[str, Job]) -> dict[str, Outcome]:
        """Return the result of each job, by the key of ``compiling.source_key``."""
        missing = {key: job for key, job in jobs.items() if key not in self._found}
        if not self.for_this_gpu:
            missing = {key: job for key, job in missing.items() if not self._read(key)}
        for key, outcome in self._run(missing).items():
            self._found[key] = outcome
            if not (self.for_this_gpu or isinstance(outcome, str)):
                _write(key, outcome)
        return {key: self._found[key] for key in jobs}

    def _read(self, key: str) -> bool:
        found = compiling._read_cached(compiling._cache_folder() / key)
        if found is not None:
            self._found[key] = found
        return found is not None

    def _run(self, jobs: Mapping[str, Job]) -> dict[str, Outcome]:
        """Compile the jobs; those that were running when a worker died are tried again alone."""
        futures = {key: self._submit(job) for key, job in jobs.items()}
        found = {key: _outcome(future) for key, future in futures.items()}
        for key in [key for key, outcome in found.items() if outcome is None]:
            self._end_pool()
            found[key] = _outcome(self._submit(jobs[key])) or "ends the compiler"
        return {key: outcome for key, outcome in found.items() if outcome is not None}

    def _submit(self, job: Job) -> Future[Measured]:
        if self._pool is None:
            if self._folder is None and not self.for_this_gpu:
                self._folder = tempfile.TemporaryDirectory()
            context = multiprocessing.get_context("forkserver")  # a fork would share CUDA's state
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=context,
                initializer=_begin,
                initargs=(self._folder.name if self._folder else None,),
            )
        try:
            return self._pool.submit(_limited, self.compile_one, job)
        except BrokenProcessPool as error:
            future: Future[Measured] = Future()
            future.set_exception(error)
            return future

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _begin(triton_cache: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if triton_cache is not None:
        os.environ["TRITON_CACHE_DIR"] = triton_cache


def _end_with_parent() -> None:
    """End this worker when a signal has ended the main process, which then ends no workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _limited(compile_one: Callable[[Job], Measured], job: Job) -> Measured:
    """Compile a job; the alarm ends the process, because the compiler does not return to Python.

    Its output is dropped, because Triton prints all PTX that ptxas refuses: thousands of lines.
    """
    signal.alarm(LIMIT_SECONDS)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return compile_one(job)
    finally:
        signal.alarm(0)


def _outcome(future: Future[Measured]) -> Outcome | None:
    """Return the result of a compilation, or None if its process died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None
    except Exception as error:  # the compiler has many ways to refuse a tile
        return f"does not compile: {reason_of(error)[:200]}"


def _write(key: str, measured: Measured) -> None:
    folder = compiling._cache_folder()
    temporary = folder / f"{key}.{os.getpid()}"
    with suppress(OSError):  # the cache only saves time
        temporary.write_text(json.dumps(asdict(measured)))
        temporary.replace(folder / key)


# ---- which candidates need not run ---------------------------------------------------------------


def jobs_of(op: str, case: str, arch: int, launches: Iterable[Launch]) -> dict[str, Job]:
    """Return the distinct jobs of launches, by the key of ``compiling.source_key``."""
    jobs = (compiling.job_of(op, case, f"sm_{arch}", launch) for launch in launches)
    return {compiling.source_key(job): job for job in jobs}


def why_dropped(
    base: Mapping[str, Job],
    candidates: Mapping[str, Mapping[str, Job]],
    compiler: Compiler,
) -> dict[str, str]:
    """Return why candidates need not run, by their labels; the others compile without faults.

    Only launches that ``base`` does not have are compiled.

    Args:
        base: the jobs of the plans that the candidates differ from.
        candidates: the jobs of each candidate.
        compiler: compiles the jobs.
    """
    new = {
        label: {key: job for key, job in jobs.items() if key not in base}
        for label, jobs in candidates.items()
    }
    outcomes = compiler.compiled({key: job for jobs in new.values() for key, job in jobs.items()})
    dropped = {}
    for label, jobs in new.items():
        reasons = [_fault(job, outcomes[key]) for key, job in jobs.items()]
        if found := [reason for reason in reasons if reason]:
            dropped[label] = "; ".join(dict.fromkeys(found))
    return dropped


def _fault(job: Job, outcome: Outcome) -> str:
    if isinstance(outcome, str):
        return f"{job.kernel} {outcome}"
    faults = [*faults_of(job, outcome), *outcome.redundant]
    return f"{job.kernel} {'; '.join(faults)}" if faults else ""
