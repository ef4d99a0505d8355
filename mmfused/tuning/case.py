"""Tune the plans that one case reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import candidates
from .calls import Plans, Problem
from .search import KEEP, Measure, Search, Tried, is_faster, is_slower

CONFIRMED = 3  # times that the best plans must be faster, each with CUDA graphs of its own
SLOWS = 0.01  # a plan found with another case must not slow this case down by more than this share
Key = tuple[str, Any, str]  # op, arguments, the library's plan as text


def key_of(call: Any) -> Key:
    """Return what decides whether two calls of ``plan()`` share a tuned plan."""
    return call.op, call.arguments, repr(call.default)


def alternatives(
    problem: Problem,
    plans: Plans,
    free: list[int],
) -> dict[str, list[tuple[str, Plans]]]:
    """Return the plans that differ in one call of ``plan()``, by the call and what they change.

    ``free``: the calls whose plan may change, as indices into ``problem.reached``.
    """
    found = {}
    for i in free:
        call = problem.reached[i]
        prefix = call_name(problem, i)
        groups = candidates.moves(problem.op, dict(call.arguments), plans.plans[i])
        for group, moves in groups.items():
            labelled = [(f"{prefix}{label}", plans.with_plan(i, plan)) for label, plan in moves]
            found[f"{i} {group}"] = labelled
    return found


def call_name(problem: Problem, index: int) -> str:
    """Return what tells a call of ``plan()`` from the other calls of the case: "n=768 rows: "."""
    mine = dict(problem.reached[index].arguments)
    others = [dict(call.arguments) for call in problem.reached]
    differing = [
        f"{name}={value}"
        for name, value in mine.items()
        if any(other.get(name) != value for other in others)
    ]
    return f"{' '.join(differing)}: " if differing else ""


@dataclass
class Outcome:
    """What tuning a case has found.

    Attributes:
        plans: the plans to keep.
        vetoed: calls whose plan, found with another case, slows this case down.
        steps: labels of the changes that led to the best plans.
        kept: whether the best plans are kept.
        finished: whether the search came to its end.
        seconds: samples of "default" (the library's plans), "base" (with plans of earlier cases)
            and "best", measured in turn.
    """

    plans: Plans
    vetoed: list[int] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    kept: bool = False
    finished: bool = True
    seconds: dict[str, list[float]] = field(default_factory=dict)


class CaseTuner:
    """Tunes the plans of one case.

    Args:
        problem: the case's calls and the plans that they reach.
        decided: plans of calls that earlier cases have decided, which stay as they are.
        measure: times plans.
        why_refused: checks plans; returns why they must not be used, or None.
        why_dropped: returns why plans need not run: of (best plans, candidates).
        spent: whether the search must stop.
        report: called after each step with the search.
    """

    def __init__(
        self,
        problem: Problem,
        decided: Mapping[Key, Any],
        measure: Measure[Plans],
        why_refused: Callable[[Plans], str | None],
        why_dropped: Callable[[Plans, Mapping[str, Plans]], dict[str, str]],
        spent: Callable[[], bool] = lambda: False,
        report: Callable[[Search[Plans]], None] = lambda search: None,
    ) -> None:
        self.problem, self.measure, self.spent = problem, measure, spent
        self.why_refused, self.why_dropped, self.report = why_refused, why_dropped, report
        self.decided: Mapping[Key, Any] = decided
        self.free: list[int] = [
            i for i, call in enumerate(problem.reached) if key_of(call) not in decided
        ]

    def run(self, tried: list[Tried[Plans]], best: Plans | None, steps: list[str]) -> Outcome:
        """Tune; ``tried``, ``best`` and ``steps`` are those of an earlier search to continue."""
        base, vetoed = self._base()
        search = Search(
            groups=lambda plans: alternatives(self.problem, plans, self.free),
            measure=self.measure,
            why_refused=self.why_refused,
            why_dropped=lambda plans: self.why_dropped(search.best or base, plans),
            spent=self.spent,
            report=self.report,
            tried=tried,
            steps=steps,
            best=best,
        )
        finished = search.run(base)
        assert search.best is not None
        kept, seconds = self._confirmed(base, search.best)
        return Outcome(
            plans=search.best if kept else base,
            vetoed=vetoed,
            steps=search.steps,
            kept=kept,
            finished=finished,
            seconds=seconds,
        )

    def _base(self) -> tuple[Plans, list[int]]:
        """Return the plans to start from, and the decided calls that would slow this case down."""
        default = self.problem.default()
        base = Plans(self.decided.get(key_of(call), call.default) for call in self.problem.reached)
        if base == default:
            return default, []
        times = self.measure({"default": default, "base": base})
        timed = times.keys() == {"default", "base"}
        if timed and not is_slower(times["base"], times["default"], SLOWS):
            if self.why_refused(base) is None:
                return base, []
        changed = [
            i for i, (a, b) in enumerate(zip(base.plans, default.plans, strict=True)) if a != b
        ]
        return default, changed

    def _confirmed(self, base: Plans, best: Plans) -> tuple[bool, dict[str, list[float]]]:
        """Time the best plans again, so that they were not best by chance.

        Where the tensors of a CUDA graph lie in memory changes its time by a few percent, so graphs
        are captured several times, and the best plans must be faster each time.
        """
        named = {"default": self.problem.default(), "base": base, "best": best}
        distinct = {plans: name for name, plans in named.items()}
        times: dict[str, list[float]] = {}
        kept = best != base
        for i in range(CONFIRMED):
            order = list(distinct.items())[:: -1 if i % 2 else 1]
            of_plans = self.measure({name: plans for plans, name in order})
            found = {name: of_plans.get(distinct[plans], []) for name, plans in named.items()}
            kept = kept and all(found[name] for name in ("base", "best"))
            kept = kept and is_faster(found["best"], found["base"], KEEP)
            for name, samples in found.items():
                times.setdefault(name, []).extend(samples)
            if not kept:
                break
        return kept, {name: samples for name, samples in times.items() if samples}
