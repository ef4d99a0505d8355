"""Run test files for ``make gpu``, several at a time; resume where the last run stopped.

    python tools/gpu_tests.py --state FILE [--budget-seconds S] [--jobs N] TEST_FILE ...

Each file runs in a process of its own, and a file with many kernels in several, each with a part of
its tests. A file that passed is not run again until sources or versions change, so that a run that
was stopped loses only the files that it was in. The largest files start first, and none starts
after ``--budget-seconds``. The exit status is 1 if a test failed, else 3 if files are left, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report
from mmfused.benchmarks.run import UNFINISHED
from mmfused.benchmarks.sources import ROOT, source_hash

# File -> number of parts. The cases of a GPU launch 257 different kernels, which take Triton about
# a second each: four minutes in one process.
PARTS = {"tests/test_on_cuda.py": 6}
NO_TESTS = 5  # pytest's exit status if no test was selected
PLUGIN = Path(__file__).with_name("pytest_part.py")


# ---- running -------------------------------------------------------------------------------------


def units(files: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and pytest's arguments of each process, those of large files first."""
    for file in sorted(
        files, key=lambda file: (-PARTS.get(file, 1), -(ROOT / file).stat().st_size)
    ):
        count = PARTS.get(file, 1)
        for part in range(1, count + 1):
            chosen = ("-p", PLUGIN.stem, "--part", f"{part}/{count}") if count > 1 else ()
            yield f"{file} {part}/{count}" if count > 1 else file, (*chosen, file)


class Run:
    """The state of each process, kept in a file.

    Args:
        state: the file, written after each process.
        budget: seconds after which no process starts.
    """

    def __init__(self, state: Path, budget: float) -> None:
        self.state: Path = state
        self.ends: float = time.monotonic() + budget
        self.lock: threading.Lock = threading.Lock()
        facts = report.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.same: dict[str, Any] = {
            "source": source_hash(),
            "versions": facts["versions"],
            "device": facts["device"],
        }
        self.found: dict[str, dict[str, Any]] = {}
        if state.exists():
            self.found = json.loads(state.read_text(encoding="utf-8"))

    def passed(self, name: str) -> bool:
        """Return whether a process passed with these sources, versions and device."""
        found = self.found.get(name, {})
        return found.get("passed") is True and all(
            found.get(key) == value for key, value in self.same.items()
        )

    def run(self, name: str, arguments: tuple[str, ...]) -> bool | None:
        """Run pytest; return whether it passed, or None if the budget was spent before."""
        begun = time.monotonic()
        if begun > self.ends:
            return None
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *arguments]
        path = os.pathsep.join(filter(None, (str(PLUGIN.parent), os.environ.get("PYTHONPATH"))))
        pipes = {"capture_output": True, "text": True, "errors": "replace"}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, **pipes)
        passed = done.returncode in (0, NO_TESTS)
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        with self.lock:
            print(f"{'passed' if passed else 'FAILED'} {name}: {last}", flush=True)
            if not passed:
                print(done.stdout, done.stderr, sep="\n", flush=True)
            seconds = round(time.monotonic() - begun, 1)
            self.found[name] = {"passed": passed, "last": last, "seconds": seconds, **self.same}
            report.write_json(self.found, self.state)
        return passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_tests.py", description="Run test files, several at a time; resumes."
    )
    option = parser.add_argument
    option("files", nargs="+", metavar="TEST_FILE", help="such as tests/test_on_cuda.py")
    option("--state", type=Path, required=True, metavar="FILE", help="file for the states")
    option(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help=f"start no file after these seconds (exit status {UNFINISHED} if files are left)",
    )
    jobs = min(8, os.cpu_count() or 1)
    option("--jobs", type=int, default=jobs, metavar="N", help=f"processes (default: {jobs})")
    args = parser.parse_args(argv)
    for file in args.files:
        if not (ROOT / file).is_file():
            parser.error(f"file: got {file!r}, expected a test file such as tests/test_on_cuda.py")
    run = Run(args.state, args.budget_seconds)
    todo = [(name, rest) for name, rest in units(args.files) if not run.passed(name)]
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        results = list(pool.map(lambda unit: run.run(*unit), todo))
    left = [name for (name, _), passed in zip(todo, results, strict=True) if passed is None]
    print(f"{results.count(True)} passed, {results.count(False)} failed, {len(left)} left.")
    return 1 if False in results else UNFINISHED if left else 0


if __name__ == "__main__":
    sys.exit(main())
