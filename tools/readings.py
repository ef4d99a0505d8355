"""Read chosen rows of the targets with ncu, and put each kernel beside its count.

    python tools/readings.py [OP/CASE ...]
    python tools/readings.py --again         the tables of earlier readings with the counts of today

A row is a process that makes the case's forward and backward once after a warm-up; ncu profiles
that one step. What it read is kept as readings-<op>-<case>.csv and .json, and the tables of all
rows in the folder as readings.md. The counts are those of benchmarks/counts.json, which
tools/bounds/kernel_counts.py writes. docs/counts.md says how to read the table. ncu empties the
caches before each kernel and leaves the clock alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report
from mmfused.benchmarks.run import RESULTS, UNFINISHED, load_op
from mmfused.benchmarks.sources import ROOT, source_hash
from mmfused.supported import TRITONS
from mmfused.tools import ncu, readings_table, targets
from mmfused.tools.bounds import kernel_counts
from mmfused.tools.bounds.cards import CARDS

LIMIT_SECONDS = 200.0  # of a row
DRY_OUT = "runs/readings-dry-run"
DRY_CARD = "H200"  # whose predictions a dry run shows
FAKE_NCU = [sys.executable, str(ROOT / "tools" / "fake_ncu.py")]
MARK = "launched "  # start of the line that a child prints when its step has run
# Sizes for Triton's interpreter.
TINY = {"B": 3, "N": 20, "M": 9, "T": 40, "D": 64, "I": 32, "L": 4, "H": 4, "E": 8, "k": 2}


# ---- the profiled process ------------------------------------------------------------------------


def child(row: str, tiny: bool) -> int:
    """Make one step to profile, after one that compiles the kernels; print what was launched."""
    from mmfused.kernels import recording

    op, name = row.split("/")
    bench = load_op(op)
    case = next(each for each in bench.cases("cuda", False) if each.name == name)
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:
        case = replace(case, **{k: min(v, TINY[k]) for k, v in asdict(case).items() if k in TINY})
    dtype = torch.float32 if tiny else torch.bfloat16
    accept = mock.patch.object(bench, "need_kernels", lambda *_: None)
    with accept if tiny else contextlib.nullcontext():
        problem = bench.make(case, device, dtype)
        provider = bench.PROVIDERS["fused"](case, device, dtype).load(problem.parameters)
        inputs = tuple(problem.inputs.values())
        if tiny:
            with recording.launches_made() as launches:
                provider.both(inputs, problem.upstream)
            print(MARK + json.dumps([launch.name for launch in launches]), flush=True)
            return 0
        provider.both(inputs, problem.upstream)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        provider.both(inputs, problem.upstream)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(MARK + json.dumps(None), flush=True)
    return 0


# ---- rows ----------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Read the rows; return 1 if one failed, UNFINISHED if the budget ran out, else 0."""
    rows = requested(args.row, args.dry_run)
    program = FAKE_NCU if args.dry_run else [ncu.find()]
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("readings need a CUDA GPU, but torch finds none; --dry-run needs none")
    facts = report.environment(torch.device("cpu" if args.dry_run else "cuda"))
    facts["ncu"] = ncu.version(program)
    names = ncu.chosen(ncu.known(program))
    folder = folder_of(args, facts)
    begun, states = time.monotonic(), []
    for row in rows:
        source = source_hash(row.partition("/")[0])
        if is_read(record_of(row, folder), facts, source, args.dry_run):
            print(f"{row}: read before", flush=True)
            continue
        left = args.budget_seconds - (time.monotonic() - begun)
        if states and left < args.limit_seconds or left <= 0:
            print(f"{row}: left for another run", flush=True)
            states.append(UNFINISHED)
            continue
        found = read(row, program, names, folder, facts | {"source": source}, args)
        names = found or names  # what ncu refused once is not asked for again
        states.append(1 if found is None else 0)
    show(folder)
    return 1 if 1 in states else max(states, default=0)


def requested(rows: list[str], dry: bool) -> list[str]:
    """Return the rows to read; a dry run needs their counts."""
    known = [f"{row.op}/{row.case}" for row in targets.ROWS if row.device == "cuda"]
    for row in rows:
        if row not in known:
            names = ", ".join(dict.fromkeys(known))
            raise ValueError(f"row: got {row!r}, expected some of {names}")
        if dry and row not in (counted := kernel_counts.read()):
            names = ", ".join(counted)
            raise ValueError(f"row: got {row!r} with --dry-run, expected one of {names}")
    return rows or list(kernel_counts.ROWS)


def folder_of(args: argparse.Namespace, facts: dict[str, Any]) -> Path:
    return Path(args.out or (DRY_OUT if args.dry_run else RESULTS / report.slug(facts["device"])))


def stem(row: str) -> str:
    return f"readings-{row.replace('/', '-')}"


def record_of(row: str, folder: Path) -> dict[str, Any] | None:
    """Return the record of an earlier reading, or None."""
    path = folder / f"{stem(row)}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_read(record: dict[str, Any] | None, facts: dict[str, Any], source: str, dry: bool) -> bool:
    """Return whether a record has the device, the versions and the sources of today."""
    if record is None or record["dry_run"] != dry:
        return False
    then = record["environment"]
    same = all(then[name] == facts[name] for name in ("device", "versions", "ncu"))
    return same and then["source"] == source


def read(
    row: str,
    program: list[str],
    names: dict[str, str],
    folder: Path,
    facts: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, str] | None:
    """Read a row and write its record; return the metrics that were read, or None if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command = [sys.executable, str(Path(__file__).resolve()), "--child", row]
    command += ["--tiny"] if args.dry_run else []
    hidden = ("MMFUSED_", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment["MMFUSED_TUNED"] = "off"  # the counts are of the plans that the library chooses
    environment |= {"TRITON_INTERPRET": "1"} if args.dry_run else {}
    begun, log = time.monotonic(), folder / f"{stem(row)}.log"  # stays if the run fails
    try:
        found = ncu.profile(program, names, command, log, args.limit_seconds, environment)
        if MARK not in found.output:
            raise ncu.Failed("the step did not finish")
    except ncu.Failed as why:
        print(f"{row}: FAILED: {why}", flush=True)
        return None
    op, case = row.split("/")
    record = {
        "op": op,
        "case": case,
        "dry_run": args.dry_run,
        "card": DRY_CARD if args.dry_run else card_of(facts),
        "environment": facts | {"started": started},
        "metrics": found.names,
        "missing": found.missing,
        "took_seconds": round(time.monotonic() - begun, 1),
        "launches": len(found.launches),
        "csv": f"{stem(row)}.csv",
    }
    csv = folder / record["csv"]
    report.write(csv, lambda path: path.write_text(found.table, encoding="utf-8"))
    report.write_json(record, folder / f"{stem(row)}.json")
    log.unlink(missing_ok=True)
    missing = f"; this ncu does not know {', '.join(found.missing)}" if found.missing else ""
    print(f"{row}: {len(found.launches)} launches{missing}", flush=True)
    return found.names


def launches_of(record: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the launches of a reading, by keys of ncu.METRICS."""
    text = (folder / record["csv"]).read_text(encoding="utf-8", errors="replace")
    return [values_of(launch, record["metrics"]) for launch in ncu.parse(text)]


def values_of(launch: ncu.Launch, names: dict[str, str]) -> dict[str, Any]:
    """Return a launch by keys of ncu.METRICS, without what was not read."""
    found = {key: launch.values.get(name) for key, name in names.items()}
    known = {key: value for key, value in found.items() if value is not None}
    return {"name": launch.name, "blocks": launch.blocks, "threads": launch.threads} | known


def card_of(facts: dict[str, Any]) -> str | None:
    """Return the card of tools/bounds whose predictions fit a device, or None."""
    words = re.findall(r"\w+", facts["device"])
    return next((name for name in CARDS if name in words), None)


# ---- tables --------------------------------------------------------------------------------------


def show(folder: Path) -> None:
    """Print the tables of all readings in a folder, and write them as readings.md."""
    paths = sorted(folder.glob("readings-*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    tables = [table(record, launches_of(record, folder)) for record in records]
    if tables:
        text = "\n\n".join(tables) + "\n"
        path = folder / "readings.md"
        report.write(path, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"\n{text}\nThese tables are in {path}.")


def table(record: dict[str, Any], launches: list[dict[str, Any]]) -> str:
    """Return the heading and the table of a reading, with the counts of today."""
    counts = kernel_counts.read().get(f"{record['op']}/{record['case']}", {})
    is_hopper = record["dry_run"] or list(record["environment"]["capability"]) == [9, 0]
    triton = counted_with(counts, record["environment"]["versions"]["triton"])
    triton = triton if is_hopper else None  # the counts are of sm_90
    counted = counts[triton] if triton else []
    # Cards whose predictions the counts have.
    card = record["card"] if counted and record["card"] in counted[0]["cards"] else None
    heading = readings_table.heading(record, launches, triton, card)
    return f"{heading}\n\n{readings_table.markdown(launches, counted, card)}"


def counted_with(counts: dict[str, Any], version: str) -> str | None:
    """Return the version of Triton whose counts to take: this one, or else the newest."""
    newest = [each for each in TRITONS if each in counts]
    return version if version in counts else newest[-1] if newest else None


# ---- the command ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/readings.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    rows = f"rows of the targets (default: {', '.join(kernel_counts.ROWS)})"
    option("row", nargs="*", metavar="OP/CASE", help=rows)
    budget = "seconds after which no row is started (exit status 3 if not all were read)"
    option("--budget-seconds", type=float, default=float("inf"), metavar="S", help=budget)
    limit = f"seconds after which a row is killed (default: {LIMIT_SECONDS:.0f})"
    option("--limit-seconds", type=float, default=LIMIT_SECONDS, metavar="S", help=limit)
    where = f"folder for the results (default: benchmarks/results/<device>; {DRY_OUT} if --dry-run)"
    option("--out", metavar="DIR", help=where)
    option("--again", action="store_true", help="only make the tables again, from --out")
    dry = "run tiny steps on a CPU with a program that stands for ncu, to check that the tool works"
    option("--dry-run", action="store_true", help=dry)
    option("--child", metavar="OP/CASE", help=argparse.SUPPRESS)
    option("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.child:
            return child(args.child, args.tiny)
        if args.again and args.out is None:
            raise ValueError("out: got None with --again, expected the folder of the readings")
        if args.again:
            show(Path(args.out))
            return 0
        return run(args)
    except ValueError as error:
        print(f"tools/readings.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # On SIGTERM, exit through the `finally` that kills the run in progress.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
