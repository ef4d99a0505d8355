"""Fuzz in several processes for a given time.

Print one line per minute, and every fault with the command that reproduces the fault.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

TOO_LONG = 600.0  # seconds per case


class Worker:
    """A process that runs one case after another."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, case: tuple[str, int]) -> None:
        self.case, self.since = case, time.monotonic()
        self.pipe.send(case)

    def result(self) -> str | None:
        """Return the fault of the current case, "" if the case passed, None while the case runs.

        If the process has ended or the case takes too long, start a new process.
        """
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except EOFError:
                self.process.join()
                fault = f"the process exited with code {self.process.exitcode}."
        elif time.monotonic() - self.since > TOO_LONG:
            self.process.kill()
            fault = f"timed out after {TOO_LONG:g} s."
        else:
            return None
        self.start()
        return fault


def _serve(pipe: Connection) -> None:
    import torch
    from fuzzing import attempt  # imported here, so that the parent need not import torch

    torch.set_num_threads(1)
    while (case := pipe.recv()) is not None:
        pipe.send(attempt(*case)[0])


def fuzz(functions: list[str], minutes: float, workers: int, first: int | None) -> int:
    """Run all ``functions`` with seeds from ``first`` on.

    If ``first`` is None, the first seed is random.
    Return the exit status: 1 if a case failed, otherwise 0.
    """
    first = int.from_bytes(os.urandom(5), "big") if first is None else first
    print(f"seeds from {first}, {workers} processes, {minutes:g} minutes", flush=True)
    cases: Iterator = (
        (function, seed) for seed in itertools.count(first) for function in functions
    )
    start, minute = time.monotonic(), 1
    done, failed, team = Counter(), 0, [Worker() for _ in range(workers)]
    for worker in team:
        worker.give(next(cases))
    while team:
        wait([worker.pipe for worker in team], timeout=1)
        for worker in list(team):
            fault = worker.result()
            if fault is None:
                continue
            function, seed = worker.case
            done[function] += 1
            if fault:
                failed += 1
                command = f"python tests/fuzzing.py --function {function} --seed {seed}"
                print(f"FAULT: {command}\n    {fault}", flush=True)
            if time.monotonic() - start < 60 * minutes:
                worker.give(next(cases))
            else:
                worker.pipe.send(None)
                team.remove(worker)
        if time.monotonic() - start >= 60 * minute:
            print(f"{minute} min: {sum(done.values())} cases, {failed} failed", flush=True)
            minute += 1
    print("\n".join(f"{function:40}{done[function]:7}" for function in functions))
    print(f"{sum(done.values())} cases from seed {first}, {failed} failed", flush=True)
    return int(failed > 0)
