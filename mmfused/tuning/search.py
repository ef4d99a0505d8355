"""Find the fastest plans: whole-plan alternatives first, then one field of one tile at a time.

Nothing here knows what a plan is or how it is timed, so that the search is tested without a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mmfused.benchmarks.report import summary  # pyright: ignore[reportMissingImports]

KEEP = 0.03  # a plan is kept if it saves more than this share of the default's time
STEP = 0.005  # a step of the search must save this share of the time of the step before
BATCH = 12  # plans that are timed in turn
P = TypeVar("P", bound=Hashable)
Q = TypeVar("Q", bound=Hashable, contravariant=True)


class Measure(Protocol[Q]):
    """Return the seconds of each sample of each plan; a plan that cannot be timed is left out."""

    def __call__(self, plans: Mapping[str, Q]) -> dict[str, list[float]]:
        """Time the plans in turn, by their labels."""
        ...


def is_faster(new: list[float], old: list[float], share: float) -> bool:
    """Return whether ``new`` saves more than ``share`` of the time of ``old``, outside the noise.

    Args:
        new, old: seconds of samples that were measured in turn.
        share: such as 0.03.

    Returns:
        True if the median of ``new`` is below (1 - share) times the median of ``old``, and the 90th
        percentile of ``new`` is below the 10th percentile of ``old``.
    """
    a, b = summary(new), summary(old)
    return a["median"] < (1 - share) * b["median"] and a["p90"] < b["p10"]


def is_slower(new: list[float], old: list[float], share: float) -> bool:
    """Return whether ``new`` takes more than ``share`` longer than ``old``, outside the noise."""
    a, b = summary(new), summary(old)
    return a["median"] > (1 + share) * b["median"] and a["p10"] > b["p90"]


@dataclass
class Tried(Generic[P]):
    """What became of a plan: "timed", "refused" by the check, or "dropped" before it ran."""

    label: str
    plan: P
    state: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)  # the best plan's, measured in turn

    @property
    def ratio(self) -> float:
        """The plan's median time over that of the best plan beside it; infinite if not timed."""
        if not self.seconds:
            return math.inf
        return statistics.median(self.seconds) / statistics.median(self.beside)


@dataclass
class Search(Generic[P]):
    """A search for the fastest plan.

    Args:
        groups: returns the alternatives of a plan: group -> (label, plan) pairs.
        measure: times plans in turn.
        why_refused: checks a plan that is faster than the best, and returns why it must not be
            used, or None.
        why_dropped: returns why plans need not run, by label, for some of the plans.
        spent: whether the search must stop.
        report: called after each step.
    """

    groups: Callable[[P], Mapping[str, Iterable[tuple[str, P]]]]
    measure: Measure[P]
    why_refused: Callable[[P], str | None]
    why_dropped: Callable[[Mapping[str, P]], dict[str, str]] = lambda plans: {}
    spent: Callable[[], bool] = lambda: False
    report: Callable[[Search[P]], None] = lambda search: None
    tried: list[Tried[P]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)  # labels of the changes that led to ``best``
    best: P | None = None

    def run(self, start: P) -> bool:
        """Search from ``start``, or from ``best`` if it is set; return whether it has finished.

        The search ends after a pass over all groups without a gain.
        """
        if self.best is None:
            self.best = start
        seen = {start, self.best, *(one.plan for one in self.tried)}
        gained = True
        while gained:
            gained = False
            for group in list(self.groups(self.best)):
                while step := self._step(group, seen):
                    if self.spent():
                        return False
                    gained |= step == "gained"
        return True

    def _step(self, group: str, seen: set[P]) -> str | None:
        """Time the next alternatives of a group; None if there are none left."""
        assert self.best is not None
        moves = {
            label: plan for label, plan in self.groups(self.best).get(group, ()) if plan not in seen
        }
        if not moves:
            return None
        if self.spent():
            return "spent"
        batch = dict(list(moves.items())[:BATCH])
        seen.update(batch.values())
        gained = self._take_fastest(self._timed(batch))
        self.report(self)
        return "gained" if gained else "tried"

    def _timed(self, batch: dict[str, P]) -> list[Tried[P]]:
        """Time the plans of a batch that can run, beside the best plan; fastest first."""
        assert self.best is not None
        dropped = self.why_dropped(batch)
        left = {label: plan for label, plan in batch.items() if label not in dropped}
        for label, reason in dropped.items():
            self.tried.append(Tried(label, batch[label], "dropped", reason))
        times = self.measure({"": self.best} | left) if left else {}
        found = []
        for label, plan in left.items():
            if label in times and "" in times:
                one = Tried(label, plan, "timed", "", times[label], times[""])
                found.append(one)
            else:
                one = Tried(label, plan, "dropped", "it could not be timed")
            self.tried.append(one)
        return sorted(found, key=lambda one: one.ratio)

    def _take_fastest(self, timed: list[Tried[P]]) -> bool:
        """Make the fastest correct plan the best one, if it is faster."""
        for one in timed:
            if not is_faster(one.seconds, one.beside, STEP):
                continue
            reason = self.why_refused(one.plan)
            if reason is None:
                self.best = one.plan
                self.steps.append(one.label)
                return True
            one.state, one.reason = "refused", reason
        return False
