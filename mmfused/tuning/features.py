"""Compile a plan for uses of its op that the tuned case does not have.

The arguments of ``plan()`` do not tell whether there are masks, ids or biases, for example, so a
tuned plan serves calls with and without. There it must fit into shared memory too, or a launch in
a user's training would fail. Launches are those of the op's ``inspect_cases``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ..cli.inspect import faults_of
from .compile import Compiler, jobs_of

if TYPE_CHECKING:
    from mmfused.kernels.jobs import Job
    from mmfused.kernels.tuned import Entry

_LONG = 4096  # tokens of a sample that stand for any larger number


def why_refused(entries: Iterable[Entry], compiler: Compiler) -> str | None:
    """Return why another use of the op must not run with these plans, or None.

    A fault that the library's own plan has in the same kernel and use is no reason.
    """
    found = [
        (case, _launched(entry, case, tuned=False), _launched(entry, case))
        for entry in entries
        for case in uses(entry.op, dict(entry.arguments))
    ]
    changed = [
        (case, base, {key: job for key, job in jobs.items() if key not in base})
        for case, base, jobs in found
    ]
    # All at a time, so that the workers share them; below, the results are there.
    compiler.compiled({key: job for *_, new in changed for key, job in new.items()})
    for case, base, new in changed:
        faults = _faults(new, compiler)
        if faults and faults.keys() - _faults(base, compiler).keys():
            return f"with {case}: {'; '.join(faults.values())}"
    return None


def _launched(entry: Entry, case: Any, tuned: bool = True) -> dict[str, Job]:
    """Return the launches of one use; none if it does not reach the plan."""
    from mmfused.kernels import tuned as plans
    from mmfused.kernels.recording import launches_for

    arch = dict(entry.arguments)["arch"]
    assert isinstance(arch, int)
    with (
        plans.forced([entry] if tuned else []),
        plans.observed() as reached,
        launches_for(arch) as launches,
    ):
        _module(entry.op).launch(case)
    calls = {(call.op, call.arguments, repr(call.default)) for call in reached}
    if (entry.op, entry.arguments, repr(entry.default)) not in calls:
        return {}
    return jobs_of(entry.op, "another use", arch, launches)


def _faults(jobs: Mapping[str, Job], compiler: Compiler) -> dict[str, str]:
    """Return the faults of kernels, by name."""
    found = {}
    for key, outcome in compiler.compiled(jobs).items():
        job = jobs[key]
        faults = [outcome] if isinstance(outcome, str) else faults_of(job, outcome)
        if faults:
            found[job.kernel] = f"{job.kernel} {'; '.join(faults)}"
    return found


def _module(op: str) -> Any:
    return importlib.import_module(f"mmfused.kernels.{op}.inspect_cases")


def uses(op: str, arguments: Mapping[str, Any]) -> list[Any]:
    """Return cases of ``inspect_cases`` that may reach a plan with these arguments."""
    found = {
        "gated_cross_attention": _gated,
        "grouped_mlp": _grouped,
        "masked_info_nce": _losses,
        "query_pooling": _poolings,
        "topk_routing": _routings,
    }[op](_module(op).Case, arguments)
    return list(dict.fromkeys(found))


def _one_at_a_time(usual: Any, **others: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the usual case, and cases in which one field has another value."""
    yield usual
    for name, values in others.items():
        yield from (replace(usual, **{name: value}) for value in values)


def _gated(case: Any, a: Mapping[str, Any]) -> Iterator[Any]:
    usual = case(
        dim=a["dim"],
        heads=a["dim"] // a["head_dim"],
        context_dim=None if a["two_way"] else a["context_dim"],
        dtype=a["dtype"],
        dropout=0.1 if a["dropout"] else 0.0,
    )
    yield from _one_at_a_time(
        usual,
        masks=("lengths", "present", None),
        gate=("token", "none"),
        missing=("zero", "attend", "constant"),
        indicator=(False,),
        pre_norm=(False,),
    )
    for sizes, masks in product(((30, 20), (128, 100), (577, 300)), ("mask", None)):
        yield replace(usual, sizes=sizes, masks=masks)


def _grouped(case: Any, a: Mapping[str, Any]) -> Iterator[Any]:
    # The terms of a sum may be those of two products, of half the width each.
    widths = dict.fromkeys(
        size
        for n, terms in product((a["n"], 2 * a["n"]), (a["terms"], a["terms"] // 2))
        for size in ((n, terms), (terms, n))
    )
    rows = (a["rows"], a["rows"] * 3 // 4, a["rows"] // 2 + 1)
    for (dim, width), tokens, biases in product(widths, rows, (True, False)):
        usual = case(tokens, dim, width, a["experts"], 1, biases=biases, dtype=a["dtype"])
        yield from _one_at_a_time(usual, activation=("relu", "swiglu", None))
        yield replace(usual, activation="swiglu", packed=True)


def _losses(case: Any, a: Mapping[str, Any]) -> Iterator[Any]:
    ids = ("none", "drop", "same") if a["everything"] else ("none", "drop")
    fixed = dict(dim=a["dim"], dtype=a["dtype"], symmetric=a["columns"], everything=a["everything"])
    for (batch, candidates), keys, of_id in product(
        ((4096, 4096), (1003, 3331)), (False, True), ids
    ):
        yield case(batch, candidates, keys=keys, ids=of_id, **fixed)


def _poolings(case: Any, a: Mapping[str, Any]) -> Iterator[Any]:
    paddings = ("padding", "lengths", "packed") if a["padded"] else ("none",)
    longest = min(a["length"], _LONG)
    fixed = dict(
        rows=a["rows"],
        dim=a["dim"],
        dtype=a["dtype"],
        norm=a["norm"],
        per_sample=a["per_sample"],
        dropout=0.1 if a["dropout"] else 0.0,
        lse=a["dlse"],
    )
    for padding, length, need_dx in product(paddings, (longest, longest // 2 + 1), (True, False)):
        yield case(**fixed, padding=padding, length=length, need_dx=need_dx)


def _routings(case: Any, a: Mapping[str, Any]) -> Iterator[Any]:
    experts, dtype = a["num_experts"], a["dtype"]
    router = None if not a["from_input"] else "float32" if a["exact"] else dtype
    for dim, everything in product((768, 300) if router else (None,), (False, True)):
        usual = case(experts, min(2, experts), dim, dtype, router, everything=everything)
        yield from _one_at_a_time(
            usual,
            k=(1, min(8, experts)),
            sigmoid=(True,),
            renormalize=(False,),
            balance=("gshard", "mse"),
        )
