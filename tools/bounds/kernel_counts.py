"""Keep the count of each launch of some rows of the targets in benchmarks/counts.json.

    python tools/bounds/kernel_counts.py [--triton 3.8.0] [--row query_pooling/fluid]

tools/readings.py puts what a GPU measures beside these counts. A row takes from some seconds to
some minutes, so it is counted ahead; a row that is counted again replaces its old entry. Rows and
versions that are not named are counted only if they are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmfused.benchmarks import report
from mmfused.supported import TRITONS
from mmfused.tools.bounds import table

COUNTS = table.ROOT / "benchmarks" / "counts.json"
# The subjects of the first readings.
ROWS = (
    "query_pooling/fluid",
    "gated_cross_attention/uniecs",
    "masked_info_nce/clip-65536",
    "topk_routing/x-32768-e128",
)
COUNTED_WITH = ("3.6.0", "3.8.0")  # versions of Triton on machines with a GPU
_COUNT = """
import json, sys
from mmfused.tools.bounds.kernel_counts import count
print(json.dumps(count(*sys.argv[1:])))
"""
# Parts of a Prediction that are the same on all cards of an architecture.
_SAME = ("blocks", "resident", "slots", "wavefronts", "shared", "conflicts", "l2_bytes")
_SAME += ("bulk_bytes", "dram_bytes", "flops")

# counts[row][version of Triton] = launches in order
Counts = dict[str, dict[str, list[dict[str, Any]]]]


def count(op: str, case: str) -> list[dict[str, Any]]:
    """Count the launches of a row with the installed Triton, in order.

    Returns:
        For each launch its ``name``, ``pass`` and, for each card in ``cards``, the predicted
        seconds ``low`` and ``high`` and the ``limiter``. A kernel also has what it asks of the
        GPU (see :class:`predict.Prediction`), an operator of torch has ``torch`` = True.
    """
    from mmfused.tools.bounds.cards import CARDS
    from mmfused.tools.bounds.rows import Step, limiter, prediction, step, times
    from mmfused.tools.bounds.tracing import Traced

    cards = [CARDS[name] for name in table.CARD_NAMES]
    found = []
    for which, launches in zip(Step._fields, step(op, case, cards[0].arch), strict=True):
        for launch in launches:
            entry: dict[str, Any] = {"name": launch.name, "pass": which}
            if isinstance(launch, Traced):
                counted = asdict(prediction(launch, cards[0]))
                entry |= {name: _rounded(counted[name]) for name in _SAME}
                entry["registers"] = launch.code.registers
            else:
                entry["torch"] = True
            entry["cards"] = {
                card.name: {"low": low, "high": high, "limiter": limiter(launch, card)}
                for card in cards
                for low, high in [map(_rounded, times(launch, card))]
            }
            found.append(entry)
    return found


def _rounded(value: Any) -> Any:
    """Return numbers with five digits: more are no information, and make the file change."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path = COUNTS) -> Counts:
    """Return the counts in a file; none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def of_launches(counts: Counts, row: str, triton: str) -> list[dict[str, Any]] | None:
    """Return the counts of a row with a version of Triton, or None."""
    return counts.get(row, {}).get(triton)


def write(counts: Counts, path: Path = COUNTS) -> None:
    """Write the counts, a launch in a line."""
    rows = []
    for row, versions in counts.items():
        parts = [
            f'  "{version}": [\n   '
            + ",\n   ".join(json.dumps(launch) for launch in launches)
            + "\n  ]"
            for version, launches in versions.items()
        ]
        rows.append(f' "{row}": {{\n' + ",\n".join(parts) + "\n }")
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    report.write(path, lambda path: path.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", action="append", choices=TRITONS, help="may be repeated")
    parser.add_argument("--row", action="append", metavar="OP/CASE", help="may be repeated")
    args = parser.parse_args()
    from mmfused.tools.bounds.rows import ROWS as TARGETS
    from mmfused.tools.bounds.rows import SCALED

    known = [f"{op}/{case}" for op, case in TARGETS if (op, case) not in SCALED]
    for row in args.row or ():
        if row not in known:
            parser.error(f"--row: got {row!r}, expected some of {', '.join(known)}")
    for row in args.row or ROWS:
        for version in args.triton or COUNTED_WITH:
            named = args.row and args.triton
            if named or not of_launches(read(), row, version):
                found = table.count_with(version, row, _COUNT)
                write({**read(), row: {**read().get(row, {}), version: found}})
                print(version, row, flush=True)


if __name__ == "__main__":
    main()
