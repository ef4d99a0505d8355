"""Run the full GPU validation in slices, resuming where it stopped.

    make gpu        or        python tools/gpu.py

    build      the CUDA C++ kernels
    test-*     the suite on the card, one op at a time
    sanitize   compute-sanitizer on small launches of every kernel
    bench-*    accuracy, time and memory of each op, and of the models
    choices    each choice of the library beside its alternatives
    test-rest  the rest of the suite, which depends least on the card
    report     which targets are met

A slice that was green with the same sources and versions is not run again, unless it is named. A
red slice does not stop the others. Output and state are written beside the results, in the folder
named after the card.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

if not __package__:  # run as a file: import this checkout, whatever is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report
from mmfused.benchmarks.run import BUDGET_SECONDS, RESULTS, UNFINISHED
from mmfused.benchmarks.run import OPS as BENCHES
from mmfused.benchmarks.sources import ROOT, source_hash
from mmfused.ops import OPS

DRY_OUT = "runs/gpu-dry-run"
LIMIT = 540.0  # seconds that a slice may take
LAST = 120.0  # the last seconds, in which nothing new begins; no slice begins with less left
# The suite's files by slice; those that match no pattern are "rest".
TESTS = {op: (f"{op}*",) for op in OPS} | {
    "losses": ("contrastive_losses*", "dual_alignment*"),
    "csrc": ("csrc*",),
    "card": ("on_cuda*", "compile*", "library*"),
    "models": ("models*", "unica*", "uniecs*", "moon2*", "unite*", "qwen*", "fuse*"),
}


@dataclass(frozen=True)
class Slice:
    """One step of the validation.

    ``command``: arguments of this interpreter; "{budget}" stands for the seconds left. ``source``:
    a hash of the sources for which a green run is valid.
    """

    name: str
    command: tuple[str, ...]
    source: str
    environment: tuple[tuple[str, str], ...] = ()


def slices(out: Path, dry: bool) -> list[Slice]:
    """Return all slices: correctness first, then speed."""
    everything, files = source_hash(), test_files()
    where, interpreted = ("--out", str(out)), (("TRITON_INTERPRET", "1"),) if dry else ()

    def tests(name):
        how = ("--collect-only", "-p", "no:xdist") if dry else workers()
        return Slice(f"test-{name}", ("-m", "pytest", "-q", *how, *files[name]), everything)

    def bench(op):
        how = ("--quick",) if dry else ("--budget-seconds", "{budget}")
        return Slice(
            f"bench-{op}", ("benchmarks/run.py", op, "--resume", *where, *how), source_hash(op)
        )

    if dry:  # the launches, without compute-sanitizer
        sanitize = [
            Slice(f"sanitize-{op}", ("tools/sanitize.py", "--launch", op), everything, interpreted)
            for op in OPS
        ]
    else:
        sanitize = [
            Slice("sanitize", ("tools/sanitize.py", *where, "--limit-seconds", "150"), everything)
        ]
    choices = (
        "tools/choices.py",
        *where,
        *(("--quick",) if dry else ("--budget-seconds", "{budget}")),
    )
    return [
        Slice(
            "build", ("-c", "from mmfused import extension; print(extension.load())"), everything
        ),
        *(tests(name) for name in TESTS),
        *sanitize,
        *(bench(op) for op in BENCHES),
        Slice("choices", choices, everything, interpreted),
        tests("rest"),
        Slice("report", ("tools/targets.py", "--results", str(out)), ""),
    ]


def test_files() -> dict[str, list[str]]:
    """Return the suite's files by slice, each in exactly one."""
    found: dict[str, list[str]] = {name: [] for name in (*TESTS, "rest")}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        parts = (
            name
            for name, patterns in TESTS.items()
            if any(fnmatch.fnmatch(path.stem, f"test_{p}") for p in patterns)
        )
        found[next(parts, "rest")].append(f"tests/{path.name}")
    return found


def workers() -> tuple[str, ...]:
    """Return pytest's options for parallel workers, if pytest-xdist is installed.

    Each test file runs in one worker. Compiling kernels takes longer than running them, so several
    workers can share one GPU.
    """
    count = min(8, os.cpu_count() or 1)
    return (
        ("-n", str(count), "--dist", "loadfile")
        if importlib.util.find_spec("xdist") and count > 1
        else ()
    )


# ---- running -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Return 0 if all are green, 1 if one is red, 3 if none is red and some are left."""
    check_machine(args.dry_run)
    device = torch.device("cpu" if args.dry_run else "cuda")
    facts = report.environment(device)
    usual = DRY_OUT if args.dry_run else RESULTS / report.slug(facts["device"])
    out = Path(args.out or usual).resolve()
    chosen = named(slices(out, args.dry_run), args.slices)
    journal, begun = out / "make-gpu.json", time.monotonic()
    states = json.loads(journal.read_text(encoding="utf-8")) if journal.exists() else {}
    shown = {}
    for part in chosen:
        left = args.budget_seconds - (time.monotonic() - begun)
        if not args.slices and green(states.get(part.name), part, facts):
            shown[part.name] = "green before"
        elif left < LAST:
            shown[part.name] = "left"
        else:
            print(f"==== {part.name}", flush=True)
            code, seconds = start(part, out / "logs" / f"{part.name}.log", min(left, LIMIT))
            cut = "unfinished" if left < LIMIT else "ended by its limit"
            shown[part.name] = {0: "green", UNFINISHED: "unfinished", None: cut}.get(code, "RED")
            states[part.name] = {
                "state": shown[part.name],
                "exit_code": code,
                "seconds": round(seconds, 1),
                "source": part.source,
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **{key: facts[key] for key in ("versions", "device", "commit", "dirty")},
            }
            text = json.dumps(states, indent=1) + "\n"
            report.write(journal, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    for name, state in shown.items():
        print(f"{name:32}{state:20}{states[name]['seconds'] if name in states else 0:8.1f} s")
    print(f"Results, logs and this table's make-gpu.json are in {out}.")
    wrong = {"RED", "ended by its limit"} & set(shown.values())
    return 1 if wrong else UNFINISHED if {"left", "unfinished"} & set(shown.values()) else 0


def check_machine(dry: bool) -> None:
    if not (ROOT / "tests").is_dir():
        raise ValueError(f"make gpu needs a checkout with tests, not an installed package ({ROOT})")
    if not dry and not torch.cuda.is_available():
        raise ValueError(
            "make gpu needs a CUDA GPU, and torch finds none here; DRY=1 runs everything on a CPU"
        )


def named(every: list[Slice], patterns: list[str]) -> list[Slice]:
    for pattern in patterns:
        if not fnmatch.filter([part.name for part in every], pattern):
            known = ", ".join(part.name for part in every)
            raise ValueError(f"slice: got {pattern!r}, expected one of {known}, or a pattern")
    return [
        part
        for part in every
        if not patterns or any(fnmatch.fnmatch(part.name, pattern) for pattern in patterns)
    ]


def green(state: dict | None, part: Slice, facts: dict) -> bool:
    if state is None or state["state"] != "green" or part.name == "report":
        return False
    return (state["source"], state["versions"]) == (part.source, facts["versions"])


def start(part: Slice, log: Path, limit: float) -> tuple[int | None, float]:
    """Run a slice; return the exit code (None where the limit ended it) and the seconds.

    Its output goes to the terminal and to ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    budget = min(max(1.0, limit - LAST), BUDGET_SECONDS)
    command = [
        sys.executable,
        *(word.replace("{budget}", str(int(budget))) for word in part.command),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    begun, over = time.monotonic(), threading.Event()
    pipe = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipe)
        alarm = threading.Timer(limit, lambda: (over.set(), end(child)))
        alarm.start()
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                file.write(line)
            child.wait()
        finally:
            alarm.cancel()
            if child.poll() is None:  # Ctrl-C: do not leave the child running
                end(child)
    return None if over.is_set() else child.returncode, time.monotonic() - begun


def end(child: subprocess.Popen) -> None:
    """End the process and its children.

    SIGTERM comes first, so that the process can end those children that have their own session.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    option = parser.add_argument
    option(
        "slices",
        nargs="*",
        metavar="SLICE",
        help="only these, even if green before; patterns such as 'bench-*' work",
    )
    option(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin nothing after these seconds (exit code 3)",
    )
    option(
        "--out",
        metavar="DIR",
        help=f"folder for results (default: benchmarks/results/<device>; {DRY_OUT} if --dry-run)",
    )
    option(
        "--dry-run",
        action="store_true",
        help="on a CPU: every slice at a small size; shows that everything works",
    )
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"tools/gpu.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
