"""Tests of the search of ``mmfused tune``, without a GPU, and of its two settings."""

from __future__ import annotations

import itertools
import math

import pytest

from mmfused.tuning.search import BATCH, Search, is_faster, is_slower
from mmfused.tuning.settings import Pair, best_factor, faster_router


class Landscape:
    """Plans are (kind, a, b); the time is least for ("two", 3, 5)."""

    def __init__(self, noise=0.0):
        self.noise, self.timed, self.calls = noise, [], 0
        self.draws = itertools.cycle((0.9, 1.1, 0.95, 1.05, 1.0, 1.08, 0.92))

    def groups(self, plan):
        kind, a, b = plan
        return {
            "kernels": [(f"kind {k}", (k, a, b)) for k in ("one", "two") if k != kind],
            "a": [(f"a {n}", (kind, n, b)) for n in (a - 1, a + 1)],
            "b": [(f"b {n}", (kind, a, n)) for n in (b - 1, b + 1)],
        }

    def seconds(self, plan):
        kind, a, b = plan
        return 1.0 + (kind == "one") * 0.5 + abs(a - 3) * 0.1 + abs(b - 5) * 0.1

    def measure(self, plans):
        self.calls += 1
        self.timed += [plan for label, plan in plans.items() if label]
        return {label: self.samples(plan) for label, plan in plans.items()}

    def samples(self, plan):
        exact = self.seconds(plan)
        return [exact * (1 + self.noise * (next(self.draws) - 1)) for _ in range(7)]

    def search(self, **options):
        options = dict(why_refused=lambda plan: None) | options
        return Search(self.groups, self.measure, **options)


START = ("one", 0, 0)


def test_search_finds_the_fastest_plan_and_says_how():
    land = Landscape(noise=0.01)
    search = land.search()
    assert search.run(START)
    assert search.best == ("two", 3, 5)
    assert search.steps[0] == "kind two" and search.steps[-1] == "b 5"
    assert len(set(land.timed)) == len(land.timed)  # no plan is timed twice
    assert all(one.state == "timed" and len(one.seconds) == 7 for one in search.tried)


def test_search_keeps_the_default_if_differences_are_noise():
    land = Landscape(noise=10.0)
    land.seconds = lambda plan: 1.0 if plan == START else 0.98
    search = land.search()
    assert search.run(START) and search.best == START and not search.steps
    assert len(land.timed) == 5  # one pass over the neighbours


def test_search_stops_at_the_budget_and_goes_on_from_there():
    land = Landscape()
    search = land.search(spent=lambda: land.calls >= 3)
    assert not search.run(START)
    assert land.calls == 3 and search.best not in (START, ("two", 3, 5))
    again = land.search(tried=search.tried, steps=search.steps, best=search.best)
    assert again.run(START) and again.best == ("two", 3, 5)
    assert len(set(land.timed)) == len(land.timed)
    assert land.search(spent=lambda: True).run(START) is False


def test_refused_plan_is_not_the_best_and_the_next_one_is_taken():
    land = Landscape()
    search = land.search(why_refused=lambda plan: "wrong" if plan[0] == "two" else None)
    assert search.run(START) and search.best == ("one", 3, 5)
    refused = [one for one in search.tried if one.state == "refused"]
    assert refused and {(one.plan[0], one.reason) for one in refused} == {("two", "wrong")}


def test_dropped_plan_is_neither_timed_nor_checked():
    land = Landscape()
    checked = []
    search = land.search(
        why_dropped=lambda plans: {label: "spills" for label in plans if label == "kind two"},
        why_refused=checked.append,
    )
    assert search.run(START) and search.best == ("one", 3, 5)
    assert all(plan[0] == "one" for plan in (*land.timed, *checked))
    assert [one.reason for one in search.tried if one.state == "dropped"][0] == "spills"


def test_plan_that_cannot_be_timed_is_dropped():
    land = Landscape()

    def measure(plans):
        left = {label: plan for label, plan in plans.items() if plan[0] == "one"}
        return Landscape.measure(land, left)

    search = Search(land.groups, measure, lambda plan: None)
    assert search.run(START) and search.best == ("one", 3, 5)
    assert search.tried[0].reason == "it could not be timed" and search.tried[0].ratio == math.inf


def test_large_group_is_timed_in_batches():
    sizes = []
    search = Search(
        groups=lambda plan: {"all": [(str(n), n) for n in range(1, 31)]},
        measure=lambda plans: sizes.append(len(plans)) or {k: [1.0] * 3 for k in plans},
        why_refused=lambda plan: None,
    )
    assert search.run(0) and sizes == [BATCH + 1, BATCH + 1, 31 - 2 * BATCH]


def test_faster_needs_a_gain_outside_the_noise():
    assert is_faster([0.9, 0.91, 0.92], [1.0, 1.01, 1.02], 0.03)
    assert not is_faster([0.98, 0.981, 0.982], [1.0, 1.0, 1.0], 0.03)  # 2 %
    assert not is_faster([0.8, 0.9, 1.05], [1.0, 1.0, 1.0], 0.03)  # noise
    assert is_slower([1.05, 1.06, 1.07], [1.0, 1.0, 1.01], 0.01)
    assert not is_slower([0.99, 1.06, 1.07], [1.0, 1.0, 1.01], 0.01)


# ---- settings ------------------------------------------------------------------------------------


def test_factor_is_the_one_that_loses_least():
    # Below a saving of 3 the projected form is faster.
    pairs = [Pair(s, 1.0, 0.8 if s < 3 else 1.3) for s in (1.5, 2.5, 3.5, 8.0)]
    assert best_factor(pairs, usual=2.0) == pytest.approx(math.sqrt(2.5 * 3.5))
    assert best_factor(pairs, usual=3.0) is None  # the library's factor loses nothing
    assert best_factor([], usual=2.0) is None


def test_factor_may_always_pick_one_form():
    always = [Pair(s, 1.0, 2.0) for s in (0.5, 1.5)]
    assert best_factor(always, usual=2.0) == 0.25
    never = [Pair(s, 2.0, 1.0) for s in (3.0, 9.0)]
    assert best_factor(never, usual=2.0) == 18.0


def test_factor_stays_if_the_gain_is_small():
    pairs = [Pair(3.0, 1.02, 1.0), Pair(5.0, 1.0, 2.0)]
    assert best_factor(pairs, usual=2.0) is None
    # A saving that equals the factor picks the absorbed form.
    assert best_factor([Pair(2.0, 1.0, 2.0)], usual=2.0) is None


def test_router_changes_only_if_it_is_slower_nowhere():
    fast, slow = [0.9, 0.91, 0.92], [1.0, 1.01, 1.02]
    assert faster_router([(slow, fast), (slow, fast)]) == "cuda"
    assert faster_router([(slow, fast), (fast, slow)]) is None
    assert faster_router([(slow, slow)]) is None
    assert faster_router([(slow, fast), ([1.0] * 3, [1.01] * 3)]) is None  # slower in one by 1 %
    assert faster_router([([1.0, 1.0, 1.0], [0.8, 0.9, 1.1])]) is None  # noise
    assert faster_router([]) is None
