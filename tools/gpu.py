"""Validate the library on a GPU, in slices; resume where the last run stopped.

    make gpu        or        python tools/gpu.py [SLICE ...]

    build         compile the CUDA C++ kernels
    test-card     check every kernel on the card: accuracy, repeats, CUDA graphs, host syncs
    bench-*-eager measure accuracy, time and memory of the targets of an op, or of the models,
                  without torch.compile, which takes most of the time
    sanitize      run compute-sanitizer on small launches of every kernel
    bench-*       measure the same with torch.compile too
    bench-*-long  measure the targets that take minutes
    readings      read the counters of some kernels with ncu, beside what was counted
    tune          time the library's plans and their alternatives, and keep what is faster
    test-*        run the tests of one op or subject
    bench-*-more  measure the cases that have no target
    test-rest     run the remaining tests, which depend least on the GPU
    report        list which performance targets are met

A slice is green if it succeeds and red if it fails. A red slice does not stop the run. Later runs
with the same sources and versions skip green slices, except the report and slices named by SLICE.
A slice that takes too long is stopped, and goes on in a later run: after the last test file, or
after the last case, that was finished. benchmarks/NOTES.md estimates the time of each slice.
Results, logs and the state of the slices are written to a folder named after the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
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

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report
from mmfused.benchmarks.run import BUDGET_SECONDS, RESULTS, UNFINISHED, load_op
from mmfused.benchmarks.sources import ROOT, source_hash
from mmfused.ops import OPS
from mmfused.tools import targets

DRY_OUT = "runs/gpu-dry-run"
LIMIT_SECONDS = 540.0  # maximum duration of a slice
RESERVE_SECONDS = 120.0  # no slice or case starts in this last part of a budget
# Cases that fill a slice of their own.
LONG = {"masked_info_nce": ("clip-262144",)}
# In the order in which they run: what a card is asked about first.
BENCHES = (
    "query_pooling",
    "masked_info_nce",
    "gated_cross_attention",
    "grouped_mlp",
    "topk_routing",
    "models",
)
# Slice -> patterns of its test files. Files that match no pattern belong to the slice "rest".
TESTS = {op: (f"{op}*",) for op in OPS} | {
    "losses": ("contrastive_losses*", "dual_alignment*"),
    "csrc": ("csrc*",),
    "card": ("on_cuda*", "compile*", "library*"),
    "models": ("models*", "unica*", "uniecs*", "moon2*", "unite*", "qwen*", "fuse*"),
}


@dataclass(frozen=True)
class Slice:
    """One step of the validation.

    ``command``: arguments for the Python interpreter; "{budget}" is replaced by the budget in
    seconds.
    ``source``: hash of the sources that the slice depends on.
    """

    name: str
    command: tuple[str, ...]
    source: str
    environment: tuple[tuple[str, str], ...] = ()


def slices(out: Path, dry: bool) -> list[Slice]:
    """Return all slices in the order in which they run."""
    all_sources, files = source_hash(), test_files()
    to_out, interpreted = ("--out", str(out)), (("TRITON_INTERPRET", "1"),) if dry else ()
    size = ("--quick",) if dry else ("--budget-seconds", "{budget}")

    def tests(name):
        if dry:
            return Slice(
                f"test-{name}",
                ("-m", "pytest", "-q", "--collect-only", "-p", "no:xdist", *files[name]),
                all_sources,
            )
        state = ("--state", str(out / f"tests-{name}.json"))
        command = ("tools/gpu_tests.py", *state, "--budget-seconds", "{budget}", *files[name])
        return Slice(f"test-{name}", command, all_sources)

    def bench(op, part=""):
        cases = {"-long": LONG.get(op, ()), "-more": ()}.get(part, target_cases(op, dry))
        chosen = [word for name in cases for word in ("--case", name)]
        chosen += ["--no-compile"] if part == "-eager" else []
        command = ("benchmarks/run.py", op, "--resume", *to_out, *size, *chosen)
        return Slice(f"bench-{op}{part}", command, source_hash(op))

    if dry:  # launch the kernels without compute-sanitizer
        sanitize = [
            Slice(f"sanitize-{op}", ("tools/sanitize.py", "--launch", op), all_sources, interpreted)
            for op in OPS
        ]
    else:
        sanitize = [
            Slice("sanitize", ("tools/sanitize.py", *to_out, "--limit-seconds", "150"), all_sources)
        ]
    build = ("-c", "from mmfused import extension; print(extension.load())")
    return [
        Slice("build", build, all_sources),
        tests("card"),
        *(bench(op, "-eager") for op in BENCHES),
        *sanitize,
        *(bench(op) for op in BENCHES),
        *(bench(op, "-long") for op in (() if dry else LONG)),
        Slice(
            "readings",
            ("tools/readings.py", *to_out, *(("--dry-run",) if dry else size)),
            all_sources,
        ),
        Slice("tune", tune_command(out, dry), all_sources),
        *(tests(name) for name in TESTS if name != "card"),
        *(bench(op, "-more") for op in BENCHES),
        tests("rest"),
        Slice("report", ("tools/targets.py", "--results", str(out)), ""),
    ]


def tune_command(out: Path, dry: bool) -> tuple[str, ...]:
    """Return the command that tunes; in a dry run it compiles the candidates of one case."""
    command = ("-m", "mmfused", "tune")
    if dry:
        return *command, "topk_routing", "--case", "logits-16384", "--dry-run", "--arch", "sm_90"
    return *command, "--out", str(out / "tuned.json"), "--budget-seconds", "{budget}"


def test_files() -> dict[str, list[str]]:
    """Return slice -> test files; each test file belongs to exactly one slice."""
    found: dict[str, list[str]] = {name: [] for name in (*TESTS, "rest")}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        parts = (
            name
            for name, patterns in TESTS.items()
            if any(fnmatch.fnmatch(path.stem, f"test_{p}") for p in patterns)
        )
        found[next(parts, "rest")].append(f"tests/{path.name}")
    return found


def target_cases(op: str, dry: bool) -> tuple[str, ...]:
    """Return the cases of the targets, except long ones; in a dry run, those that a CPU runs."""
    names = dict.fromkeys(row.case for row in targets.ROWS if (row.op, row.device) == (op, "cuda"))
    if dry:
        known = {case.name for case in load_op(op).cases("cpu", True)}
        names = [name for name in names if name in known]
    return tuple(name for name in names if name not in LONG.get(op, ()))


# ---- running -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Run the slices that the arguments name or, without names, all slices that are not green.

    Returns 1 if a slice is red, UNFINISHED if a slice is unfinished or was not started, else 0.
    """
    check_machine(args.dry_run)
    device = torch.device("cpu" if args.dry_run else "cuda")
    facts = report.environment(device)
    usual = DRY_OUT if args.dry_run else RESULTS / report.slug(facts["device"])
    out = Path(args.out or usual).resolve()
    requested = matching(slices(out, args.dry_run), args.slices)
    journal, begun = out / "make-gpu.json", time.monotonic()
    states = json.loads(journal.read_text(encoding="utf-8")) if journal.exists() else {}
    shown = {}
    for part in requested:
        left = args.budget_seconds - (time.monotonic() - begun)
        if not args.slices and is_green(states.get(part.name), part, facts):
            shown[part.name] = "green before"
        elif left < RESERVE_SECONDS:
            shown[part.name] = "not started"
        else:
            print(f"==== {part.name}", flush=True)
            limit = min(left, LIMIT_SECONDS)
            code, seconds = run_slice(part, out / "logs" / f"{part.name}.log", limit)
            killed = "unfinished" if left < LIMIT_SECONDS else "killed by its limit"
            shown[part.name] = {0: "green", UNFINISHED: "unfinished", None: killed}.get(code, "RED")
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
        print(f"{name:36}{state:20}{states[name]['seconds'] if name in states else 0:8.1f} s")
    print(f"Results, logs and make-gpu.json, which has the states above, are in {out}.")
    red = {"RED", "killed by its limit"} & set(shown.values())
    return 1 if red else UNFINISHED if {"not started", "unfinished"} & set(shown.values()) else 0


def check_machine(dry: bool) -> None:
    if not (ROOT / "tests").is_dir():
        raise ValueError(f"make gpu needs a checkout with tests, not an installed package ({ROOT})")
    if not dry and not torch.cuda.is_available():
        raise ValueError(
            "make gpu needs a CUDA GPU, but torch finds none; DRY=1 runs small slices on a CPU"
        )


def matching(parts: list[Slice], patterns: list[str]) -> list[Slice]:
    """Return the slices that match a pattern, or all slices if there are no patterns."""
    for pattern in patterns:
        if not fnmatch.filter([part.name for part in parts], pattern):
            names = ", ".join(part.name for part in parts)
            raise ValueError(f"slice: got {pattern!r}, expected one of {names}, or a pattern")
    return [
        part
        for part in parts
        if not patterns or any(fnmatch.fnmatch(part.name, pattern) for pattern in patterns)
    ]


def is_green(state: dict | None, part: Slice, facts: dict) -> bool:
    """Return whether an earlier run of the slice was green and is still valid."""
    if state is None or state["state"] != "green" or part.name == "report":
        return False
    same = all(state.get(name) == facts[name] for name in ("versions", "device"))
    return same and state["source"] == part.source


def run_slice(part: Slice, log: Path, limit: float) -> tuple[int | None, float]:
    """Run a slice with its output in the terminal and in ``log``.

    Returns a pair: the exit code (None if the slice was killed after ``limit`` seconds), and the
    duration in seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    budget = min(max(1.0, limit - RESERVE_SECONDS), BUDGET_SECONDS)
    command = [
        sys.executable,
        *(word.replace("{budget}", str(int(budget))) for word in part.command),
    ]
    # Without the plans that `mmfused tune` has kept on this machine: results are the library's own.
    own = {"PYTHONUNBUFFERED": "1", "MMFUSED_TUNED": "off"}
    environment = {**os.environ, **own, **dict(part.environment)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    begun, timed_out = time.monotonic(), threading.Event()
    pipe = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipe)
        alarm = threading.Timer(limit, lambda: (timed_out.set(), end(child)))
        alarm.start()
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                file.write(line)
            child.wait()
        finally:
            alarm.cancel()
            if child.poll() is None:  # on Ctrl-C, do not leave the child running
                end(child)
    return None if timed_out.is_set() else child.returncode, time.monotonic() - begun


def end(child: subprocess.Popen) -> None:
    """End the process and its children.

    SIGTERM comes first, so that the process can end its children in other sessions.
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
        help="slices to run, even if green before; may be patterns such as 'bench-*'",
    )
    option(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="stop after these seconds (exit status 3 if not all slices finished)",
    )
    option(
        "--out",
        metavar="DIR",
        help=f"folder for results (default: benchmarks/results/<device>; {DRY_OUT} if --dry-run)",
    )
    option(
        "--dry-run",
        action="store_true",
        help="run every slice at a small size on a CPU, to check that the tool works",
    )
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"tools/gpu.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
