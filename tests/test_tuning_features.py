"""Tests of the uses of an op for which ``mmfused tune`` compiles a plan beside the tuned case."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_tuning_candidates import calls_of_plan, reached_by

from mmfused.benchmarks import run
from mmfused.cli import compiling
from mmfused.cli.compiling import Measured
from mmfused.kernels import tuned
from mmfused.kernels.masked_info_nce import plans as loss
from mmfused.tuning import features

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def keys_of_interpreted_kernels(monkeypatch):
    """The key of a job holds the hash of its source, which a kernel in the interpreter lacks."""
    monkeypatch.setattr(compiling, "source_key", lambda job: repr(vars(job)))


class Compiler:
    """Says that kernels with these names have faults with ids."""

    def __init__(self, *faulty):
        self.faulty, self.jobs = faulty, {}

    def compiled(self, jobs):
        self.jobs |= jobs
        return {key: self.measured(job) for key, job in jobs.items()}

    def measured(self, job):
        spills = job.kernel in self.faulty and job.constants["IDS"] != "none"
        return Measured(255, 16 if spills else 0, 1024, {"mma": 1}, [], [])


def loss_entry(**changes):
    (call,) = reached_by("masked_info_nce", lambda: loss.plan(768, BF16, 80, True, False, True))
    pairs = replace(call.default.pairs, num_stages=2)
    plan = replace(call.default, pairs=pairs, **changes)
    return tuned.Entry(call.op, call.arguments, call.default, plan)


def test_plan_is_compiled_with_keys_and_ids_too():
    compiler = Compiler()
    assert features.why_refused([loss_entry()], compiler) is None
    constants = [job.constants for job in compiler.jobs.values()]
    assert {job.kernel for job in compiler.jobs.values()} == {"pairs_kernel"}
    assert {(one["KEYS"], one["IDS"]) for one in constants} == {
        (keys, ids) for keys in (False, True) for ids in ("none", "drop")
    }


def test_plan_that_spills_with_ids_only_is_refused():
    reason = features.why_refused([loss_entry()], Compiler("pairs_kernel"))
    assert reason is None  # the library's plan spills there too
    entry = loss_entry(backward="owner")
    reason = features.why_refused([entry], Compiler("owner_kernel"))
    assert reason is not None and "ids='drop'" in reason
    assert reason.endswith("owner_kernel spills 16 bytes per thread")


def is_possible(op, **arguments):
    """Return whether the launches of ``inspect`` reach a call of ``plan()``."""
    if op == "query_pooling":  # their tokens have no odd strides
        return arguments["tma"]
    if op == "gated_cross_attention":
        dim, other = arguments["dim"], arguments["context_dim"]
        return dim % arguments["head_dim"] == 0 and (not arguments["two_way"] or dim == other)
    return True


@pytest.mark.parametrize("op", run.OPS[:-1])
def test_uses_reach_the_plans_and_are_launched(op):
    reached = reached_by(op, lambda: calls_of_plan(op, 90, BF16))
    wanted = [call for call in reached if is_possible(op, **dict(call.arguments))]
    for call in wanted[:: max(1, len(wanted) // 6)]:
        entry = tuned.Entry(*call)
        uses = features.uses(op, dict(call.arguments))
        launched = [features._launched(entry, use) for use in uses]
        assert len(uses) > 2 and sum(map(bool, launched)) >= 2, call.arguments
