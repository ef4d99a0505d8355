"""Run every kernel under compute-sanitizer on a CUDA GPU, at small sizes.

    python tools/sanitize.py [OP ...]

Each tool of compute-sanitizer runs each op in a separate process. torch's caching allocator is
disabled, because it hides accesses beyond the end of a tensor. Reports on kernels of other
libraries are counted but are not errors: torch's kernels, for example, read uninitialised padding.
memcheck also runs a kernel with a deliberate fault ("control"), to show that memcheck reports
faults of Triton kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report
from mmfused.benchmarks.sources import ROOT, source_hash
from mmfused.ops import OPS

CONTROL = "control"
# memcheck reports out-of-bounds and misaligned accesses; racecheck, hazards in shared memory;
# synccheck, invalid barriers; initcheck, reads of uninitialised memory.
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Kernels of torch and of NVIDIA's libraries, by a part of their names.
OTHERS = ",".join(f"kns={part}" for part in ("at6native", "cublas", "cutlass", "gemm", "nvjet"))
OPTIONS = {
    "memcheck": ["--report-api-errors", "no"],  # torch handles errors that the driver returns
    "racecheck": ["--kernel-name-exclude", OTHERS],
    "synccheck": ["--kernel-name-exclude", OTHERS],
    "initcheck": [],  # the kernels of other libraries may initialise memory
}
PLACES = ("bin", "compute-sanitizer")  # folders of a CUDA toolkit to search for the program
USUAL_CUDA = "/usr/local/cuda"
ERRORS_FOUND = 86  # exit code of compute-sanitizer if its tool reported something
LIMIT_SECONDS = 240.0
OUT = "runs/sanitize"
JOBS = 4  # parallel runs: a run is mostly Python, compilation and instrumentation, not GPU work
MARK = "launched "  # start of the line that --launch prints when all kernels have run
running: set[subprocess.Popen] = set()  # compute-sanitizer processes in progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    parser.add_argument(
        "op", nargs="*", metavar="OP", help=f"ops to run, of {', '.join(OPS)} (default: all)"
    )
    option(
        "--tool",
        action="append",
        metavar="TOOL",
        help=f"tool to run, one of {', '.join(TOOLS)}; may be repeated (default: all)",
    )
    option(
        "--out",
        default=OUT,
        metavar="DIR",
        help=f"folder for sanitize.json and the logs of runs with faults (default: {OUT})",
    )
    limit = "seconds after which a run is killed"
    option(
        "--limit-seconds",
        type=float,
        default=LIMIT_SECONDS,
        metavar="S",
        help=f"{limit} (default: {LIMIT_SECONDS:.0f})",
    )
    option("--jobs", type=int, default=JOBS, metavar="N", help=f"parallel runs (default: {JOBS})")
    option(
        "--launch",
        metavar="OP",
        help="launch the kernels of one op without compute-sanitizer, and exit",
    )


def run(args: argparse.Namespace) -> int:
    """Return 0 if all runs are green, else 1; raise ValueError if an argument is invalid."""
    check_request(args)
    sanitizer, folder = find_sanitizer(), Path(args.out)
    tools, ops = args.tool or TOOLS, args.op or OPS
    pairs = [(CONTROL, "memcheck")] if "memcheck" in tools else []
    pairs += [(op, tool) for tool in tools for op in ops]
    sources = {op: source_of(op) for op, _ in pairs}
    found, verdicts = read(folder), []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        waiting = []
        for op, tool in pairs:
            previous = found.get(f"{op} {tool}", {})
            if previous.get("source") == sources[op] and previous["verdict"] == "green":
                print(f"{op:22} {tool:10} green already", flush=True)
                verdicts.append("green")
                continue
            limit = args.limit_seconds
            waiting.append(pool.submit(sanitize, sanitizer, op, tool, folder, limit))
        for done in as_completed(waiting):
            result = done.result()
            result["source"] = sources[result["op"]]
            found[f"{result['op']} {result['tool']}"] = result
            verdicts.append(result["verdict"])
            write(found, folder)
            print(line(result), flush=True)
    finally:  # kill the runs in progress if this process is stopped
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            end(process)
    bad = len(verdicts) - verdicts.count("green")
    note = f" Their logs are in {folder}." if bad else ""
    print(f"{len(verdicts)} runs, {bad} not green.{note}")
    return 1 if bad else 0


def check_request(args: argparse.Namespace) -> None:
    for name, values, allowed in (("op", args.op, OPS), ("tool", args.tool or [], TOOLS)):
        for value in values:
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}, expected some of {', '.join(allowed)}")
    if args.jobs < 1:
        raise ValueError(f"jobs: got {args.jobs}, expected at least 1")


def source_of(op: str) -> str:
    """Return a hash of the op's sources and of the files that launch its kernels."""
    from mmfused.tools import sanitize_launches

    files = {Path(sanitize_launches.__file__), sanitize_launches.file_of(op)}
    launches = hashlib.sha256()
    for path in sorted(files):
        launches.update(path.read_bytes())
    launches = launches.hexdigest()[:16]
    return launches if op == CONTROL else f"{source_hash(op)} {launches}"


def line(result: dict) -> str:
    count = "?" if result["launches"] is None else sum(result["launches"].values())
    numbers = (
        f"{count:>4} launches {result['errors']:>4} errors {result['warnings']:>4} warnings "
        f"{result['seconds']:6.1f} s"
    )
    note = f"  {result['note']}" if result["note"] else ""
    return f"{result['op']:22} {result['tool']:10} {result['verdict']:8} {numbers}{note}"


def find_sanitizer() -> str:
    found = [shutil.which("compute-sanitizer")]
    for home in filter(None, (os.environ.get("CUDA_HOME"), USUAL_CUDA)):
        for place in PLACES:
            found.append(shutil.which("compute-sanitizer", path=str(Path(home) / place)))
    program = next(filter(None, found), None)
    if program is None:
        raise ValueError(
            f"compute-sanitizer is neither on PATH nor in CUDA_HOME or {USUAL_CUDA}; "
            "it comes with the CUDA toolkit"
        )
    return program


# ---- one run -------------------------------------------------------------------------------------


def sanitize(sanitizer: str, op: str, tool: str, folder: Path, limit: float) -> dict:
    """Run the launches of ``op`` under ``tool`` and judge the log; delete the log if green."""
    folder.mkdir(parents=True, exist_ok=True)
    log, start = folder / f"sanitize-{op}-{tool}.log", time.monotonic()
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND)]
    command += ["--target-processes", "application-only"]
    command += ["--show-backtrace", "no", "--print-limit", "10000", *OPTIONS[tool]]
    command += [sys.executable, str(Path(__file__).resolve()), "--launch", op]
    code = run_limited(command, log, limit)
    text = log.read_text(encoding="utf-8", errors="replace")
    result = {"op": op, "tool": tool} | judge(op, text, code, limit)
    result["seconds"] = round(time.monotonic() - start, 1)
    if result["verdict"] == "green":
        log.unlink()
    return result


def run_limited(command: list[str], log: Path, limit: float) -> int | None:
    """Run the command; return its exit code, or None if it was killed after ``limit`` seconds."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MMFUSED_")
    }
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        running.add(process)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            process.wait()
            return None
        finally:
            running.discard(process)


def end(process: subprocess.Popen) -> None:
    """Kill compute-sanitizer and its children: the checked program, and compilers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def judge(op: str, text: str, code: int | None, limit: float) -> dict:
    """Return the verdict on the output of one run, and the counts that led to it."""
    rows = [row.removeprefix(MARK) for row in text.splitlines() if row.startswith(MARK)]
    launched = json.loads(rows[0]) if rows else None
    records, kernels = reports(text), own_kernels()
    ours = [record for record in records if kernels & set(re.findall(r"\w+", record))]
    warnings = [record for record in ours if re.match(r"(warning|info)\b", record, re.IGNORECASE)]
    errors = [record for record in ours if record not in warnings]
    facts = {
        "launches": launched and launched["launches"],
        "device": launched and launched["device"],
        "errors": len(errors),
        "warnings": len(warnings),
        "elsewhere": len(records) - len(ours),  # reports on kernels of other libraries
        "reports": list(dict.fromkeys([*errors, *warnings]))[:8],
    }
    verdict, note = "green", ""
    if op == CONTROL:
        if not errors:
            verdict = "failed"
            note = "the fault of the control kernel was not reported, so other faults may be missed"
    elif errors:
        verdict, note = "errors", errors[0].partition("\n")[0]
    elif code is None:
        verdict, note = "hung", f"killed after {limit:g} s"
    elif "SUMMARY:" not in text:
        verdict, note = "failed", f"compute-sanitizer printed no summary: {last_line(text)}"
    elif launched is None or code not in (0, ERRORS_FOUND):
        verdict = "failed"
        note = f"the launches did not finish, exit code {code}: {last_line(text)}"
    return {"verdict": verdict, "note": note} | facts


def reports(text: str) -> list[str]:
    """Return the reports in the tool's output, each with its details, without the summary."""
    found: list[str] = []
    for row in text.splitlines():
        matched = re.match(r"={9}( *)(.*)", row)
        if matched is None or not matched[2]:
            continue
        if len(matched[1]) > 1 and found:
            found[-1] += f"\n{matched[2]}"
        elif len(matched[1]) <= 1:
            found.append(matched[2])
    banner = re.compile(
        r"COMPUTE-SANITIZER|(\w+ )?SUMMARY|Target application|No error|Internal Sanitizer Info",
        re.IGNORECASE,
    )
    return [record for record in found if not banner.search(record.partition("\n")[0])]


def own_kernels() -> set[str]:
    """Return the names of the kernels in the Triton and CUDA sources of this library."""
    folders = {"kernels": "*.py", "csrc": "*.cu", "tools": "sanitize_launches.py"}
    files = [path for folder, pattern in folders.items() for path in (ROOT / folder).rglob(pattern)]
    return {
        name
        for path in files
        for name in re.findall(r"\b(\w+_kernel)\(", path.read_text(encoding="utf-8"))
    }


def last_line(text: str) -> str:
    rows = [row for row in text.splitlines() if row.strip(" =") and not row.startswith(MARK)]
    return rows[-1].strip(" =") if rows else "nothing was printed"


# ---- files and commands --------------------------------------------------------------------------


def read(folder: Path) -> dict[str, dict]:
    try:
        return json.loads((folder / "sanitize.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write(found: dict[str, dict], folder: Path) -> None:
    text = json.dumps(found, indent=1) + "\n"
    report.write(folder / "sanitize.json", lambda path: path.write_text(text, encoding="utf-8"))


def launch(op: str) -> int:
    """Launch the kernels of ``op``, then print how often each was launched."""
    import torch

    from mmfused.tools import sanitize_launches

    launches = sanitize_launches.launch(op)
    device = report.device_name(torch.device(sanitize_launches.DEVICE))
    print(MARK + json.dumps({"device": device, "launches": launches}), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/sanitize.py", description="Run every kernel under compute-sanitizer."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return launch(args.launch) if args.launch else run(args)
    except ValueError as error:
        print(f"tools/sanitize.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # On SIGTERM, exit through the `finally` in run(), which kills the runs in progress.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
