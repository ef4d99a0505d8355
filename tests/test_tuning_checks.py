"""Tests of what ``mmfused tune`` refuses to keep, and of how a file takes over new plans."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mmfused import tuned_file
from mmfused.benchmarks import masked_info_nce, run
from mmfused.kernels import tuned
from mmfused.tuning import verify
from mmfused.tuning.calls import problem_of
from mmfused.tuning.command import Decided, merge
from mmfused.tuning.verify import Verifier, odd_cases

CPU, FLOAT = torch.device("cpu"), torch.float16
CASE = masked_info_nce.custom({"B": 6, "D": 16})


def entries_of(problem):
    i = next(i for i, call in enumerate(problem.reached) if dict(call.arguments)["logits"])
    plan = problem.reached[i].default
    return problem.entries(
        problem.default().with_plan(i, dataclasses.replace(plan, backward="chunked"))
    )


@pytest.fixture
def entries():
    return entries_of(problem_of("masked_info_nce", masked_info_nce, CASE, CPU, FLOAT, 90))


def verifier_of(module=masked_info_nce, case=CASE):
    return Verifier("masked_info_nce", module, case, CPU, FLOAT)


def spoilt(spoil):
    """Return the benchmark with a provider that ``spoil``s its output if a tuned plan runs."""

    def fused(case, device, dtype):
        provider = masked_info_nce.composed(case, device, dtype)
        provider.backend, plain = "fused", provider.module
        provider.run = lambda *x: spoil(case, plain(*x)) if tuned._forced[-1] else plain(*x)
        return provider

    providers = masked_info_nce.PROVIDERS | {"fused": fused}
    return SimpleNamespace(**{**vars(masked_info_nce), "PROVIDERS": providers})


def test_correct_plan_is_accepted(entries):
    assert verifier_of().why_refused(entries) is None
    assert verifier_of().why_refused([]) is None


def test_plan_that_is_wrong_for_odd_shapes_only_is_refused(entries):
    module = spoilt(lambda case, out: out + (case.B == 5))
    reason = verifier_of(module).why_refused(entries)
    assert reason is not None and reason.startswith("at B=5 ") and "out" in reason


def test_plan_whose_bits_change_is_refused(entries):
    draws = iter(range(100))
    module = spoilt(lambda case, out: out * (1 + 2**-10 * next(draws)))
    reason = verifier_of(module).why_refused(entries)
    assert reason is not None and "two calls give different bits" in reason


def test_plan_whose_check_cannot_run_is_refused(entries):
    def fails(case, out):
        raise RuntimeError("out of resources\nmore")

    reason = verifier_of(spoilt(fails)).why_refused(entries)
    assert reason == "the accuracy check fails: RuntimeError: out of resources"


def test_plan_that_no_check_reaches_is_refused(entries, monkeypatch):
    (entry,) = entries
    other = dict(entry.arguments) | {"dim": 24}
    elsewhere = entry._replace(arguments=tuple(sorted(other.items())))
    reason = verifier_of().why_refused([entry, elsewhere])
    assert reason == "the accuracy check at this shape does not reach the plan"
    verifier = verifier_of()
    verifier.odd = []
    assert verifier.why_refused([entry]) == "no odd shape reaches the plan"


@pytest.mark.parametrize("op", run.OPS[:-1])
def test_odd_shapes_have_few_samples_and_no_multiples_of_tiles(op):
    for case in run.load_op(op).cases("cuda", False):
        odd = odd_cases(op, case)
        assert len(odd) >= 2 and case not in odd
        sizes = {
            getattr(one, name) for one in odd for name in ("N", "M", "T", "B") if hasattr(one, name)
        }
        assert any(size > 1 and size % 2 for size in sizes)
        if hasattr(case, "B"):
            assert all(one.B <= 333 for one in odd)
    assert verify._ODD.keys() == set(run.OPS[:-1])


@pytest.mark.parametrize(
    ("op", "field"),
    [
        ("gated_cross_attention", "missing"),
        ("grouped_mlp", "routed"),
        ("masked_info_nce", "K"),
        ("topk_routing", "S"),
    ],
)
def test_odd_shapes_have_masks_that_the_case_does_not_have(op, field):
    """``plan()`` is not told of them, so that the plan serves them too."""
    for case in run.load_op(op).cases("cuda", False):
        values = {getattr(odd, field) for odd in odd_cases(op, case)}
        assert len(values | {getattr(case, field)}) > 1 or values == {"half"}


def test_routing_plan_with_a_wrong_block_is_refused():
    """A tile of x that is not a multiple of the block of rows counts tokens wrongly."""
    module = run.load_op("topk_routing")
    case = module.custom({"T": 80, "E": 4, "D": 16})
    problem = problem_of("topk_routing", module, case, CPU, FLOAT, 90)
    i = next(i for i, call in enumerate(problem.reached) if dict(call.arguments)["from_input"])
    plan = problem.reached[i].default
    wrong = dataclasses.replace(plan, route=dataclasses.replace(plan.route, BN=32))
    assert plan.rows.BR == 64
    verifier = Verifier("topk_routing", module, case, CPU, FLOAT)
    reason = verifier.why_refused(problem.entries(problem.default().with_plan(i, wrong)))
    assert reason is not None and reason.startswith("at T=80 ")


def test_merging_keeps_entries_of_other_ops_and_of_calls_that_were_not_tuned(entries):
    (entry,) = entries
    other = entry._replace(op="topk_routing")
    untouched = entry._replace(arguments=(("dim", 99),))
    file = tuned_file.Tuned("card", "3.8", entries=[other, untouched, entry])
    file.sources = {"masked_info_nce": tuned_file.sources_of("masked_info_nce")}
    file.measured = [{"op": "topk_routing", "case": "a", "dtype": "b"}]
    key = (entry.op, entry.arguments, repr(entry.default))
    decided = Decided({key: entry.default}, {key: entry})
    merge(file, "masked_info_nce", decided)  # the library's plan is the best one now
    assert file.entries == [other, untouched] and len(file.measured) == 1
    file.sources |= {"masked_info_nce": "older kernels", "query_pooling": "older kernels"}
    file.absorbed_must_save, file.router = 4.0, "cuda"
    merge(file, "masked_info_nce", Decided({key: entry.plan}, {key: entry}))
    assert file.entries == [other, entry] and file.absorbed_must_save == 4.0
    merge(file, "query_pooling", Decided())
    assert file.absorbed_must_save is None and file.router == "cuda"
