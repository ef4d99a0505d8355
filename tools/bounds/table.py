"""Count what limits each row of the targets, and write the table of benchmarks/NOTES.md.

    python tools/bounds/table.py [--triton 3.8.0] [--row query_pooling/fluid] [--jobs 2]

Each supported version of Triton counts in processes of its own, one for each row. Counts are kept
in benchmarks/bounds.json, and a row that is counted again replaces its old line. Without options
all rows are counted with all versions, which takes about an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmfused.benchmarks import tables
from mmfused.supported import TRITONS
from mmfused.tools.bounds.cards import CARDS
from mmfused.tools.bounds.rows import SCALED
from mmfused.tools.bounds.work import microseconds, time_range
from mmfused.tools.compile_matrix import triton_folder

ROOT = Path(__file__).resolve().parents[2]
COUNTS, NOTES = ROOT / "benchmarks" / "bounds.json", ROOT / "benchmarks" / "NOTES.md"
BEGIN, END = "<!-- made by tools/bounds/table.py -->", "<!-- end of what table.py made -->"
CARD_NAMES = ("H200", "H100")
_COUNT = """
import json, sys
from mmfused.tools.bounds.table import count
print(json.dumps(count(*sys.argv[1:])))
"""

# counts[row][version of Triton][card][pass] = Bound, as a dict
Counts = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]


def count(op: str, case: str) -> dict[str, Any]:
    """Count a row with the installed Triton."""
    from mmfused.tools.bounds.rows import Step, bounds

    return {
        name: {
            which: bound._asdict()
            for which, bound in zip(Step._fields, bounds(op, case, CARDS[name]), strict=True)
        }
        for name in CARD_NAMES
    }


def count_with(version: str, row: str, code: str = _COUNT) -> Any:
    """Count a row with another version of Triton, in another process.

    ``code`` prints the count of the row in its arguments as JSON.
    """
    path = os.pathsep.join((str(triton_folder(version)), str(ROOT)))
    hidden = ("TRITON_INTERPRET", "MMFUSED_PTX_ARCH")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *row.split("/")],
        env={**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{row} with Triton {version}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the table -----------------------------------------------------------------------------------


def markdown(counts: Counts) -> str:
    """Return a table for each card: a line for each row, a column for each version of Triton."""
    return "\n\n".join(f"**{card}**\n\n{_table(counts, card)}" for card in CARD_NAMES)


def _table(counts: Counts, card: str) -> str:
    versions = [version for version in TRITONS if any(version in row for row in counts.values())]
    newest = f"of the floor, {versions[-1]}"
    heads = ["row", "floor", *(f"Triton {v}" for v in versions), newest, "slowest launch: limiter"]
    lines = [_line(row, found, card, versions) for row, found in counts.items()]
    return tables.markdown([*heads, "baseline, counted"], lines)


def _line(row: str, found: dict[str, Any], card: str, versions: list[str]) -> list[str]:
    newest = found[versions[-1]][card]
    return [
        _name(row),
        _pair(microseconds(bound["floor"]) for bound in newest.values()),
        *(times(found[version][card]) for version in versions),
        _pair(f"{100 * bound['floor'] / bound['high']:.0f} %" for bound in newest.values()),
        _pair(f"{bound['slowest']}: {bound['limiter']}" for bound in newest.values()),
        _baselines(row, newest, CARDS[card]),
    ]


def _name(row: str) -> str:
    op, case = row.split("/")
    if (op, case) not in SCALED:
        return f"{op} {case}"
    smaller, factor = SCALED[op, case]
    return f"{op} {case}, as {factor} x {smaller}"


def times(passes: dict[str, Any]) -> str:
    """Return the predicted times of the passes of a row."""
    return _pair(time_range(bound["low"], bound["high"]) for bound in passes.values())


def _baselines(row: str, newest: dict[str, Any], card: Any) -> str:
    """Return the baselines' times of both passes, and how many times ours they are."""
    from mmfused.tools.bounds.baselines import ROWS, row_seconds

    op, case = row.split("/")
    ours = sum(bound["high"] for bound in newest.values())
    found = []
    for baseline in ROWS:
        if (baseline.op, baseline.case) == (op, case):
            both = row_seconds(baseline, card)
            how = "" if baseline.compiled else ", eager"
            us, ratio = _pair(map(microseconds, both)), sum(both) / ours
            found.append(f"{baseline.provider}{how}: {us} ({ratio:.2f} x)")
    return "; ".join(found) or "-"


def _pair(parts: Iterator[str]) -> str:
    return " / ".join(parts)


def write(counts: Counts) -> None:
    """Write the counts, and the table in the notes."""
    COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    before, _, rest = NOTES.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    NOTES.write_text(f"{before}{BEGIN}\n\n{markdown(counts)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", action="append", choices=TRITONS, help="may be repeated")
    parser.add_argument("--row", action="append", metavar="OP/CASE", help="may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="rows counted in parallel")
    args = parser.parse_args()
    from mmfused.tools.bounds.rows import ROWS

    rows = [f"{op}/{case}" for op, case in ROWS]
    for row in args.row or ():
        if row not in rows:
            parser.error(f"--row: got {row!r}, expected some of {', '.join(rows)}")
    counts = json.loads(COUNTS.read_text()) if COUNTS.is_file() else {}
    jobs = [(v, row) for v in args.triton or TRITONS for row in args.row or rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (version, row), found in zip(
            jobs, pool.map(lambda job: count_with(*job), jobs), strict=True
        ):
            counts.setdefault(row, {})[version] = found
            print(version, row, flush=True)
            COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    write({row: counts[row] for row in rows if row in counts})


if __name__ == "__main__":
    main()
