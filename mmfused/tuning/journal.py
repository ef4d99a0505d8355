"""Files with what was measured of each case, so that a later run goes on where one stopped.

A file holds the samples of every plan, beside the card, the versions and the commit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from mmfused.benchmarks import report  # pyright: ignore[reportMissingImports]

from .. import tuned_file
from .calls import Plans, Problem
from .case import Outcome
from .search import Search, Tried

ENDED = "ended the process"


class Journal:
    """The file of one case.

    Args:
        path: the file.
        facts: what an earlier record must have in common with this run to be continued.
        environment: the card, versions and commit.
    """

    def __init__(
        self,
        path: Path,
        facts: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        self.path = path
        fresh = {"facts": facts, "environment": environment, "finished": False}
        found = _read(path)
        same = found is not None and found.get("facts") == json.loads(json.dumps(facts))
        self.record: dict[str, Any] = found if same and found is not None else fresh
        if not same:
            self._running.unlink(missing_ok=True)

    @property
    def _running(self) -> Path:
        return self.path.with_suffix(".running")

    @property
    def finished(self) -> bool:
        """Whether nothing of this case is left to measure."""
        return bool(self.record["finished"])

    def write(self, **values: Any) -> None:
        """Add values to the record, and write the file; an older one stays until it is complete."""
        self.record |= values
        report.write_json(self.record, self.path)

    def write_search(self, problem: Problem, search: Search[Plans]) -> None:
        """Write what a search has tried so far."""
        assert search.best is not None
        self.write(
            reached=[
                {"arguments": dict(call.arguments), "default": tuned_file.encode(call.default)}
                for call in problem.reached
            ],
            candidates=_candidates(problem, search.tried),
            best=_encoded(problem, search.best),
            steps=search.steps,
        )

    def write_outcome(self, problem: Problem, outcome: Outcome) -> None:
        """Write how tuning a case ended."""
        self.write(
            finished=outcome.finished,
            kept=outcome.kept,
            steps=outcome.steps,
            plans=_encoded(problem, outcome.plans),
            vetoed=outcome.vetoed,
            seconds=outcome.seconds,
        )

    def note_running(self, problem: Problem, plans: Plans | None) -> None:
        """Note the plans that run for the first time; None: they have come to an end.

        If they end the process, the next run leaves them out.
        """
        if plans is None:
            self._running.unlink(missing_ok=True)
            return
        text = json.dumps(_encoded(problem, plans))
        report.write(self._running, lambda path: path.write_text(text, encoding="utf-8"))

    def tried(self, problem: Problem) -> list[Tried[Plans]]:
        """Return what earlier runs have tried, with the plan that ended one of them."""
        found = [
            Tried(
                one["label"],
                _decoded(problem, one["plans"]),
                one["state"],
                one["reason"],
                one["seconds"],
                one["beside"],
            )
            for one in self.record.get("candidates", ())
        ]
        if self._running.exists():
            with suppress(ValueError, KeyError, TypeError, IndexError):
                plans = _decoded(problem, json.loads(self._running.read_text(encoding="utf-8")))
                if plans != problem.default():
                    found.append(Tried("a plan of an earlier run", plans, "dropped", ENDED))
        # Written first, so that the plan is not forgotten if this run ends in the same way.
        self.write(candidates=_candidates(problem, found))
        self._running.unlink(missing_ok=True)
        return found

    def plans(self, problem: Problem, name: str) -> Plans | None:
        """Return "best" or "plans" of the record, or None if there are none yet."""
        return _decoded(problem, self.record[name]) if name in self.record else None


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "finished" in found:
            return found
    return None


def _candidates(problem: Problem, tried: Iterable[Tried[Plans]]) -> list[dict[str, Any]]:
    return [
        {
            "label": one.label,
            "plans": _encoded(problem, one.plan),
            "state": one.state,
            "reason": one.reason,
            "seconds": one.seconds,
            "beside": one.beside,
        }
        for one in tried
    ]


def _encoded(problem: Problem, plans: Plans) -> list[dict[str, Any]]:
    """Return the plans that are not the library's, with the index of their call."""
    return [
        {"call": i, "plan": tuned_file.encode(plan)}
        for i, plan in enumerate(plans.plans)
        if plan != problem.reached[i].default
    ]


def _decoded(problem: Problem, data: Iterable[dict[str, Any]]) -> Plans:
    plans = problem.default()
    for one in data:
        plans = plans.with_plan(one["call"], tuned_file.decode(problem.op, one["plan"]))
    return plans


# ---- tables --------------------------------------------------------------------------------------


def table(records: Iterable[dict[str, Any]]) -> str:
    """Return a table of cases: the library's time, the best plans' time, and what they change."""
    lines = ["| case | default | best | saved | what changed |", "|---|---|---|---|---|"]
    for record in records:
        name = "{op} {case} {dtype}".format(**record["facts"])
        if reason := record.get("skipped"):
            lines.append(f"| {name} | | | | not tuned: {reason} |")
            continue
        times = {which: median(samples) for which, samples in record["seconds"].items()}
        if not {"default", "best"} <= times.keys():
            lines.append(f"| {name} | | | | not timed |")
            continue
        saved = 1 - times["best"] / times["default"]
        changes = "; ".join(record["steps"]) or "nothing"
        changes += "" if record["kept"] or not record["steps"] else " (not kept)"
        changes += "" if record["finished"] else " (unfinished)"
        both = f"{1e3 * times['default']:.3f} ms | {1e3 * times['best']:.3f} ms"
        lines.append(f"| {name} | {both} | {100 * saved:.1f} % | {changes} |")
    return "\n".join(lines)
