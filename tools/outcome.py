"""The table in benchmarks/NOTES.md of what was counted and what was then measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmfused.benchmarks import report, tables
from mmfused.tools import targets
from mmfused.tools.bounds.table import CARD_NAMES, COUNTS
from mmfused.tools.bounds.work import microseconds, time_range
from mmfused.tools.comparison import Comparison, compare, versions
from mmfused.tools.conditions import device_type, folders, read

NOTHING = "No target has been measured on a GPU."
HEAD = [
    "row",
    "counted, \u00b5s",
    "measured",
    "measured / counted",
    "of the floor",
    "speed-up",
    "targets met",
    "file, commit",
]


def block(results: Path) -> str:
    """Return a table for each GPU: forward / backward of each target's case, beside its count."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    found = []
    for folder in folders(results):
        records = [record for record in read(folder) if device_type(record) == "cuda"]
        lines = [line for record in records if (line := line_of(record, records, counts))]
        if lines:
            device = records[0]["environment"]["device"]
            made_with = " / ".join(dict.fromkeys(map(versions, records)))
            found.append(f"**{device}**; {made_with}\n\n{tables.markdown(HEAD, lines)}")
    return "\n\n".join(found) or NOTHING


def line_of(record: dict, records: list[dict], counts: dict[str, Any]) -> list[str] | None:
    """Return the line of a record; None if it has no target, or if the library was not timed."""
    verdicts = [
        verdict
        for verdict in targets.judge(records)
        if verdict.row.device == "cuda" and verdict.file == record["file"]
    ]
    row = compare(record)
    if not verdicts or row is None or not record["backward"]:
        return None
    measured = measured_passes(row)
    counted = counted_passes(record, counts)
    floors = [record["floor_seconds"][which] for which in ("forward", "backward")]
    met = [verdict.met for verdict in verdicts]
    return [
        f"{record['op']} {record['case']['name']}",
        " / ".join(time_range(*span) for span in counted) or "not counted",
        f"{' / '.join(map(microseconds, measured))} ({row.ours[1]}, {row.launch})",
        ratios(measured, counted),
        " / ".join(f"{floor / s:.0%}" for floor, s in zip(floors, measured, strict=True)),
        "" if row.speedup is None or row.best is None else f"{row.speedup:.2f} x {row.best[1]}",
        f"{met.count(True)} of {len(met)}",
        f"`{record['file']}`, {str(record['environment']['commit'])[:7]}",
    ]


def measured_passes(row: Comparison) -> list[float]:
    """Return the medians of forward and backward of the library's fastest way, in seconds."""
    passes = row.record["providers"][row.ours[1]]["seconds"][row.launch]
    return [report.summary(passes[which])["median"] for which in ("forward", "backward")]


def counted_passes(record: dict, counts: dict[str, Any]) -> list[tuple[float, float]]:
    """Return the lower and the higher count of forward and backward, in seconds.

    The count is that of the record's card and Triton; empty if there is none.
    """
    facts = record["environment"]
    card = next((name for name in CARD_NAMES if name in facts["device"]), "")
    row = counts.get(f"{record['op']}/{record['case']['name']}", {})
    passes = row.get(facts["versions"].get("triton"), {}).get(card, {})
    return [(bound["low"], bound["high"]) for bound in passes.values()]


def ratios(measured: list[float], counted: list[tuple[float, float]]) -> str:
    """Return measured / counted of both passes; 1 within the range of a count, bold if far off."""
    found = [
        seconds / min(max(seconds, low), high)
        for seconds, (low, high) in zip(measured, counted, strict=False)
    ]
    return " / ".join(f"**{x:.2f}**" if not 1 / 1.2 <= x <= 1.2 else f"{x:.2f}" for x in found)
