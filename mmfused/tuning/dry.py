"""``mmfused tune --dry-run``: compile the candidates, without a card, and time nothing."""

from __future__ import annotations

import time
from collections import Counter

import torch

from .calls import Plans, Problem, problem_of
from .case import alternatives, key_of
from .compile import Compiler, jobs_of, why_dropped
from .options import Options


def dry_run(options: Options) -> bool:
    """Print the plans that each case reaches, and which of their alternatives would be timed.

    Returns whether the budget sufficed.
    """
    begun, counts = time.monotonic(), Counter()
    seen: dict[object, str] = {}
    with Compiler(options.jobs, for_this_gpu=False) as compiler:
        for op, module, case in (
            (chosen.op, chosen.module, case) for chosen in options.chosen for case in chosen.cases
        ):
            if _spent(options, begun):
                counts["left"] += 1
                continue
            device = torch.device("cpu")
            problem = problem_of(op, module, case, device, options.dtype, options.arch)
            _print_case(problem, case.name, seen, compiler, counts)
    total = counts["timed"] + counts["dropped"]
    print(
        f"\nsm_{options.arch}: cases: {counts['cases']}, plans: {len(seen)}, candidates: {total}, "
        f"of which {counts['timed']} would be timed and {counts['dropped']} are dropped. "
        "Nothing was timed or written."
    )
    if counts["left"]:
        print(f"The budget is spent; {counts['left']} cases were not looked at.")
    return not counts["left"]


def _spent(options: Options, begun: float) -> bool:
    limit = options.budget_seconds
    return limit is not None and time.monotonic() - begun >= limit


def _print_case(
    problem: Problem,
    name: str,
    seen: dict[object, str],
    compiler: Compiler,
    counts: Counter[str],
) -> None:
    """Print the plans and candidates of a case; those of earlier cases are not repeated."""
    print(f"\n{problem.op}: {name}", flush=True)
    counts["cases"] += 1
    free = []
    for i, call in enumerate(problem.reached):
        arguments = " ".join(f"{key}={value}" for key, value in call.arguments)
        if earlier := seen.get(key_of(call)):
            print(f"  plan for {arguments}: see {earlier}")
            continue
        seen[key_of(call)] = name
        free.append(i)
        print(f"  plan for {arguments}: {call.default}")
    groups = alternatives(problem, problem.default(), free)
    plans = {label: plan for group in groups.values() for label, plan in group}
    dropped = dropped_of(problem, name, problem.default(), plans, compiler)
    for label in plans:
        verdict = f"dropped: {dropped[label]}" if label in dropped else "would be timed"
        counts["dropped" if label in dropped else "timed"] += 1
        print(f"    {label}: {verdict}", flush=True)


def dropped_of(
    problem: Problem,
    name: str,
    best: Plans,
    plans: dict[str, Plans],
    compiler: Compiler,
) -> dict[str, str]:
    """Return why plans need not run beside the best ones, by label; compile what is needed."""

    base, refused, candidates = problem.launches(best), {}, {}
    for label, plan in plans.items():
        try:
            launches = problem.launches(plan)
        except Exception as error:  # such as an assertion of a launcher
            refused[label] = f"cannot be launched: {type(error).__name__}: {error}"
            continue
        if launches.text == base.text:
            refused[label] = "changes no launch"
        else:
            candidates[label] = jobs_of(problem.op, name, problem.arch, launches.made)
    base_jobs = jobs_of(problem.op, name, problem.arch, base.made)
    return refused | why_dropped(base_jobs, candidates, compiler)
