"""Tests of ``mmfused tune``: its loop in Triton's interpreter, checks, files and options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tuning_workers

from mmfused import tuned_file
from mmfused.benchmarks import masked_info_nce, run
from mmfused.cli import compiling, main
from mmfused.cli.compiling import Measured
from mmfused.kernels import tuned
from mmfused.tuning import command as commands
from mmfused.tuning import compile as compilers
from mmfused.tuning import dry, options, timing, verify
from mmfused.tuning.calls import Plans, problem_of
from mmfused.tuning.command import Decided, Tuning, library_only, merge
from mmfused.tuning.journal import ENDED, Journal, table
from mmfused.tuning.timing import Timer
from mmfused.tuning.verify import Verifier, odd_cases

ROOT = Path(__file__).resolve().parents[1]
CPU, FLOAT = torch.device("cpu"), torch.float16
CASE = masked_info_nce.custom({"B": 6, "D": 16})


def settings(path, cases=(CASE,), **changed):
    chosen = [options.Chosen("masked_info_nce", masked_info_nce, list(cases))]
    usual = options.Options(chosen, False, FLOAT, 3, None, Path(path), 1, False, 90)
    return dataclasses.replace(usual, **changed)


class FakeTimer:
    """Times plans by a formula: fewer warps in the sweep, and chunked backwards, are faster."""

    timed = 0
    noise = 0.0

    def __init__(self, module, case, device, dtype, problem, repeats, note_running):
        self.problem, self.repeats, self.note_running = problem, repeats, note_running

    def __call__(self, plans):
        type(self).timed += len(plans)
        return {label: self.samples(plan) for label, plan in plans.items()}

    def samples(self, plans):
        self.note_running(plans)
        self.note_running(None)
        exact = sum(map(self.seconds, plans.plans))
        return [exact * (1 + self.noise * i) for i in range(self.repeats)]

    def seconds(self, plan):
        return 1.0 + 0.1 * plan.sweep.num_warps + 0.5 * (plan.backward == "owner")


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(FakeTimer, "timed", 0)
    return FakeTimer


@pytest.fixture
def few_moves(monkeypatch):
    """Let plans of the loss differ in their kernels and in the warps of the sweep only."""
    from mmfused.tuning import candidates

    every = candidates.moves

    def moves(op, arguments, plan):
        found = {group: every(op, arguments, plan).get(group, []) for group in ("kernels", "sweep")}
        return {
            group: [m for m in of_group if "owner" in m.label or "warps 8 -> 4" in m.label]
            for group, of_group in found.items()
        }

    monkeypatch.setattr(candidates, "moves", moves)


@pytest.fixture
def unchecked(monkeypatch):
    """Accept the results of all plans, to save the time of the check."""
    monkeypatch.setattr(Verifier, "why_refused", lambda self, entries: None)


def tuning(timer, *args, **changed):
    return Tuning(settings(*args, **changed), CPU, None, timer)


# ---- the loop ------------------------------------------------------------------------------------


def test_loop_keeps_the_fastest_correct_plans_in_the_file(tmp_path, timer, few_moves, capsys):
    path = tmp_path / "card.json"
    assert tuning(timer, path).run() == 0
    file = tuned_file.read(path)
    assert file.sources == {"masked_info_nce": tuned_file.sources_of("masked_info_nce")}
    found = {
        (dict(e.arguments)["logits"], e.plan.backward, e.plan.sweep.num_warps) for e in file.entries
    }
    assert found == {(False, "chunked", 4), (True, "chunked", 4)}
    (one,) = file.measured
    assert one["case"] == CASE.name and one["tuned_seconds"] < one["default_seconds"]
    out = capsys.readouterr().out
    assert f"| masked_info_nce {CASE.name} float16 |" in out and "owner -> chunked" in out
    record = json.loads(
        (tmp_path / "card" / f"masked_info_nce-{CASE.name}-float16.json").read_text()
    )
    assert record["facts"]["case"] == CASE.name and record["environment"]["versions"]["torch"]
    assert record["finished"] and record["kept"] and len(record["seconds"]["best"]) == 3
    assert all(len(c["seconds"]) == 3 for c in record["candidates"] if c["state"] == "timed")
    assert {"device", "versions", "commit"} <= record["environment"].keys()
    # A second run finds everything measured.
    timed = timer.timed
    assert tuning(timer, path).run() == 0 and timer.timed == timed
    assert tuned_file.read(path).entries == file.entries


def test_loop_keeps_the_default_if_nothing_is_faster(
    tmp_path, timer, few_moves, unchecked, monkeypatch, capsys
):
    monkeypatch.setattr(timer, "seconds", lambda self, plan: 1.0)
    assert tuning(timer, tmp_path / "card.json").run() == 0
    assert tuned_file.read(tmp_path / "card.json").entries == []
    assert "| nothing |" in capsys.readouterr().out


def test_plan_that_was_fast_by_chance_is_not_kept(tmp_path, timer, few_moves, unchecked, capsys):
    class Chance(timer):
        def __call__(self, plans):
            times = super().__call__(plans)
            return {label: [1.0] * 3 for label in times} if "best" in times else times

    assert tuning(Chance, tmp_path / "card.json").run() == 0
    assert tuned_file.read(tmp_path / "card.json").entries == []
    assert "(not kept) |" in capsys.readouterr().out


def test_loop_stops_at_the_budget_and_goes_on(tmp_path, timer, few_moves, unchecked, capsys):
    path = tmp_path / "card.json"
    cases = (CASE, masked_info_nce.custom({"B": 5, "D": 32}))
    stopped = tuning(timer, path, cases)
    before = stopped.spent
    stopped.spent = lambda: before() or timer.timed > 4
    assert stopped.run() == run.UNFINISHED
    assert f"masked_info_nce {cases[1].name}" in capsys.readouterr().out.splitlines()[-1]
    assert tuned_file.read(path).entries  # what was found so far
    timed = timer.timed
    assert tuning(timer, path, cases).run() == 0
    assert timer.timed > timed
    assert {dict(e.arguments)["dim"] for e in tuned_file.read(path).entries} == {16, 32}
    assert not list(tmp_path.rglob("*.running"))


def test_nothing_begins_if_the_budget_is_spent(tmp_path, timer):
    assert tuning(timer, tmp_path / "card.json", budget_seconds=0.0).run() == run.UNFINISHED
    assert timer.timed == 0 and not (tmp_path / "card.json").exists()


def test_plan_that_slows_another_case_down_is_dropped(
    tmp_path, timer, few_moves, unchecked, monkeypatch
):
    """Cases of one width share their plans; the second one is slower with those of the first."""
    cases = (CASE, masked_info_nce.custom({"B": 5, "D": 16}))

    class Slower(timer):
        def __init__(self, module, case, *args):
            super().__init__(module, case, *args)
            self.case = case

        def seconds(self, plan):
            usual = super().seconds(plan)
            return usual if self.case == CASE else 5.0 - usual

    assert tuning(Slower, tmp_path / "card.json", cases).run() == 0
    assert tuned_file.read(tmp_path / "card.json").entries == []
    agreeing = (CASE, dataclasses.replace(CASE, name="again"))
    assert tuning(timer, tmp_path / "other.json", agreeing).run() == 0
    assert len(tuned_file.read(tmp_path / "other.json").entries) == 2


def test_plan_that_ended_the_process_is_left_out(tmp_path, timer, few_moves, unchecked):
    class Ends(timer):
        def samples(self, plans):
            if any(plan.backward == "chunked" for plan in plans.plans):
                self.note_running(plans)
                raise KeyboardInterrupt
            return super().samples(plans)

    path = tmp_path / "card.json"
    with pytest.raises(KeyboardInterrupt):
        tuning(Ends, path).run()
    assert list(tmp_path.rglob("*.running"))
    for _ in range(9):  # each run meets such a plan once
        with contextlib.suppress(KeyboardInterrupt):
            assert tuning(Ends, path).run() == 0
            break
    record = json.loads(next(tmp_path.rglob("masked*.json")).read_text())
    ended = [one for one in record["candidates"] if one["reason"] == ENDED]
    assert len(ended) >= 2 and {e.plan.backward for e in tuned_file.read(path).entries} == {"owner"}


def test_case_with_dropout_is_not_tuned(tmp_path, timer, monkeypatch, capsys):
    monkeypatch.setattr(Verifier, "drops", lambda self: True)
    assert tuning(timer, tmp_path / "card.json").run() == 0
    assert timer.timed == 0 and "not tuned: it drops values" in capsys.readouterr().out


def test_case_that_does_not_fit_into_memory_is_skipped(tmp_path, timer, few_moves, capsys):
    def seconds(self, plan):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    full = type("Full", (timer,), {"seconds": seconds})
    assert tuning(full, tmp_path / "card.json").run() == 0
    assert "not tuned: CUDA out of memory." in capsys.readouterr().out


def test_timer_times_plans_in_turn_and_leaves_out_those_that_fail():
    problem = problem_of("masked_info_nce", masked_info_nce, CASE, CPU, FLOAT, 90)
    noted, ran = [], []
    timer = Timer(masked_info_nce, CASE, CPU, FLOAT, problem, 3, noted.append)
    usual = problem.default()
    (i,) = (i for i, call in enumerate(problem.reached) if dict(call.arguments)["logits"])
    changed = usual.with_plan(i, dataclasses.replace(usual.plans[i], backward="chunked"))
    broken = usual.with_plan(i, dataclasses.replace(usual.plans[i], owner=None))

    with tuned.observed() as reached:
        times = timer({"": usual, "chunked": changed, "broken": broken})
    ran = {call.plan.backward for call in reached if dict(call.arguments)["logits"]}
    assert times.keys() == {"", "chunked"} and ran == {"owner", "chunked"}
    assert all(len(samples) == 3 and min(samples) > 0 for samples in times.values())
    assert noted == [usual, None, changed, None, broken, None]


def test_long_cases_have_fewer_samples(monkeypatch):
    problem = problem_of("masked_info_nce", masked_info_nce, CASE, CPU, FLOAT, 90)
    timer = Timer(masked_info_nce, CASE, CPU, FLOAT, problem, 9)
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    assert len(timer({"": problem.default()})[""]) == timing.LEAST < 9


def tune_settings(monkeypatch, path, op, seconds, cases=()):
    module = run.load_op(op)
    chosen = [options.Chosen(op, module, list(cases))]
    asked = []

    def timed(module, case, device, dtype, repeats):
        asked.append(case.name)
        return seconds(case)

    monkeypatch.setattr(commands.settings, "form_seconds", timed)
    monkeypatch.setattr(commands.settings, "router_seconds", timed)
    monkeypatch.setattr(Tuning, "_tune_case", lambda *_: None)
    made = Tuning(settings(path, chosen=chosen, whole=True), CPU, None)
    assert made.run() == 0
    return tuned_file.read(path), asked


def test_form_and_router_are_tuned_and_not_timed_twice(tmp_path, monkeypatch, capsys):
    def forms(case):  # the projected form is faster, unless it needs nine times the FLOPs
        faster = commands.settings.saving(case) < 9
        return {"absorbed": [2.0 if faster else 0.5] * 3, "projected": [1.0] * 3}

    path = tmp_path / "card.json"
    file, asked = tune_settings(monkeypatch, path, "query_pooling", forms)
    assert file.absorbed_must_save is not None and 2.0 < file.absorbed_must_save < 30
    assert len(asked) == len(commands.settings.POOLED)
    again, asked = tune_settings(monkeypatch, path, "query_pooling", forms)
    assert not asked and again.absorbed_must_save == file.absorbed_must_save
    assert file.sources.keys() == {"query_pooling"}
    routing = run.load_op("topk_routing").CASES
    faster = lambda case: {"triton": [1.0] * 3, "cuda": [0.9] * 3}  # noqa: E731
    file, asked = tune_settings(monkeypatch, path, "topk_routing", faster, routing)
    assert file.router == "cuda" and file.absorbed_must_save == again.absorbed_must_save
    assert asked == [case.name for case in routing if not case.D]
    assert "topk_routing: router: cuda" in capsys.readouterr().out


def test_forms_are_timed_after_the_accuracy_check():
    module = run.load_op("query_pooling")
    case = module.custom({"B": 2, "N": 5, "D": 16, "L": 2, "H": 2})
    times = commands.settings.form_seconds(module, case, CPU, torch.float32, 3)
    assert times.keys() == {"absorbed", "projected"} and len(times["projected"]) == 3
    assert commands.settings.saving(case) > 0
    module = run.load_op("topk_routing")
    times = commands.settings.router_seconds(module, module.CASES[0], CPU, torch.float32, 3)
    assert times == {}  # no kernels to time on a CPU


# ---- checks --------------------------------------------------------------------------------------


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


# ---- files ---------------------------------------------------------------------------------------


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


def test_file_of_another_card_is_not_overwritten(tmp_path, timer):
    path = tmp_path / "card.json"
    tuned_file.write(path, tuned_file.Tuned("NVIDIA H100", "3.8"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="which is for NVIDIA H100 and Triton 3.8, expected"):
        tuning(timer, path)
    assert path.read_bytes() == before


def test_file_of_something_else_is_overwritten_only_where_the_library_reads(
    tmp_path, timer, few_moves, unchecked, monkeypatch, capsys
):
    path = tmp_path / "config.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="^--out: .*config.json: format: got None, expected"):
        tuning(timer, path)
    assert path.read_text() == '{"mine": 1}'
    monkeypatch.setattr(tuned_file, "default_folder", lambda: tmp_path)
    made = tuning(timer, "x", out=None)
    made.path.write_text("{")
    assert tuning(timer, "x", out=None).run() == 0
    assert "it is written again." in capsys.readouterr().out
    assert len(tuned_file.read(made.path).entries) == 2


def test_journal_of_other_sources_is_begun_again(tmp_path):
    path = tmp_path / "one.json"
    Journal(path, {"source": "a"}, {}).write(finished=True)
    assert Journal(path, {"source": "a"}, {}).finished
    assert not Journal(path, {"source": "b"}, {}).finished
    path.write_text('{"finished": tr')
    assert not Journal(path, {"source": "a"}, {}).finished


def test_table_says_what_changed_and_what_was_not_kept():
    facts = {"op": "op", "case": "case", "dtype": "bfloat16"}
    record = {
        "facts": facts,
        "seconds": {"default": [2e-3, 2e-3], "best": [1e-3, 1e-3]},
        "steps": ["BM 64 -> 128"],
        "kept": False,
        "finished": True,
    }
    text = table([record, {"facts": facts, "skipped": "too large"}])
    assert "| op case bfloat16 | 2.000 ms | 1.000 ms | 50.0 % | BM 64 -> 128 (not kept) |" in text
    assert "| not tuned: too large |" in text


def test_library_runs_with_its_own_plans_while_it_is_tuned(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    tuned_file.write(path, tuned_file.Tuned("card", tuned_file.triton_version() or ""))
    monkeypatch.setenv("MMFUSED_TUNED", str(path))
    tuned_file.of_device.cache_clear()
    tuned_file._read_once.cache_clear()
    assert tuned_file.of_device(None) is not None
    with library_only():
        assert tuned_file.of_device(None) is None
    assert tuned_file.of_device(None) is not None
    monkeypatch.undo()
    tuned_file.of_device.cache_clear()
    tuned_file._read_once.cache_clear()


# ---- compiling -----------------------------------------------------------------------------------


def test_compiler_outlives_jobs_that_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("MMFUSED_INSPECT_CACHE", str(tmp_path))
    monkeypatch.setattr(compilers, "LIMIT_SECONDS", 1)
    jobs = {name: name for name in ("works", "refuses", "dies", "too")}
    with compilers.Compiler(1, False, tuning_workers.compile_by_name) as compiler:
        found = compiler.compiled(jobs)
        assert found["works"].registers == 5 and found["too"].registers == 3
        assert found["works"].instructions == {"in a folder": 1}  # not the user's cache of Triton
        assert found["refuses"] == "does not compile: RuntimeError: no such tile"
        assert found["dies"] == "ends the compiler"
    assert {path.name for path in tmp_path.iterdir()} == {"works", "too"}
    with compilers.Compiler(1, False, None) as compiler:  # all from the cache
        assert compiler.compiled({"works": "works"})["works"].registers == 5


def test_only_launches_that_differ_are_compiled_and_judged(monkeypatch):
    clean = Measured(32, 0, 0, {}, [], [])
    outcomes = {
        "clean": clean,
        "spills": dataclasses.replace(clean, stack=8),
        "big": dataclasses.replace(clean, shared=300_000),
        "racy": dataclasses.replace(clean, races=["has a race"]),
        "twice": dataclasses.replace(clean, redundant=["computes twice"]),
        "refused": "does not compile",
    }
    compiled = []

    class Fake:
        def compiled(self, jobs):
            compiled.extend(jobs)
            return {key: outcomes[key] for key in jobs}

    job = compiling.Job("op", "case", "sm_90", "m", "kernel", {}, {}, {}, {})
    base = {"base": job}
    candidates = {name: {**base, name: job} for name in outcomes}
    dropped = compilers.why_dropped(base, candidates, Fake())
    assert "base" not in compiled and "clean" not in dropped
    assert dropped["spills"] == "kernel spills 8 bytes per thread"
    assert "300000 bytes of shared memory" in dropped["big"]
    assert dropped["racy"] == "kernel has a race" and dropped["twice"] == "kernel computes twice"
    assert dropped["refused"] == "kernel does not compile"


def test_plans_that_launch_the_same_are_not_compiled(monkeypatch):
    problem = problem_of("masked_info_nce", masked_info_nce, CASE, CPU, FLOAT, 90)
    usual = problem.default()
    unused = dataclasses.replace(usual.plans[0], chunk_bytes=2**26)  # the backward is "owner"
    wider = dataclasses.replace(unused, sweep=dataclasses.replace(unused.sweep, num_warps=4))
    plans = {"unused": usual.with_plan(0, unused), "broken": usual.with_plan(0, None)}
    plans["wider"] = usual.with_plan(0, wider)
    judged = []
    monkeypatch.setattr(dry, "jobs_of", lambda *_: {})
    monkeypatch.setattr(dry, "why_dropped", lambda base, found, _: judged.extend(found) or {})
    dropped = dry.dropped_of(problem, CASE.name, usual, plans, None)
    assert judged == ["wider"] and dropped.keys() == {"unused", "broken"}
    assert dropped["unused"] == "changes no launch"
    assert dropped["broken"].startswith("cannot be launched: AttributeError: ")


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pool"], "op: got 'pool', expected one of query_pooling"),
        (["--case", "no"], "--case: got 'no', expected one of fluid"),
        (["--shape", "B=8"], "--shape: got 'B=8', expected one OP and no --case"),
        (["query_pooling", "--shape", "Z=8"], "query_pooling: shape: got Z"),
        (["--dtype", "int8"], "--dtype: got 'int8', expected one of bf16, fp16, fp32"),
        (["--repeats", "1"], "--repeats: got 1, expected at least 3"),
        (["--jobs", "0"], "--jobs: got 0, expected at least 1"),
        (["--budget-seconds", "-1"], "--budget-seconds: got -1.0, expected 0 or more"),
        (["--budget-seconds", "nan"], "--budget-seconds: got nan, expected 0 or more"),
        (["--arch", "sm_90"], "--arch: got 'sm_90', expected --dry-run beside it"),
        (["--dry-run", "--arch", "sm_70"], "--arch: got 'sm_70', expected one of sm_80"),
        (["--dry-run", "--out", "x.json"], "--out: got 'x.json', expected none with --dry-run"),
        (["--out", "x.txt"], "--out: got 'x.txt', expected a file with the suffix .json"),
    ],
)
def test_invalid_options_end_with_one_sentence(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_file_to_write_is_the_one_that_is_read(tmp_path, timer, few_moves, unchecked, monkeypatch):
    monkeypatch.setenv("MMFUSED_TUNED", str(tmp_path))
    assert options._out(None) == tmp_path and options._out("a.json") == Path("a.json")
    name = tuned_file.file_name("GPU", tuned_file.triton_version() or "")
    with library_only():
        made = tuning(timer, tmp_path)
        assert made.path.parent == tmp_path and made.path.suffix == ".json"
        assert name.removeprefix("gpu") in made.path.name
    monkeypatch.setenv("MMFUSED_TUNED", "off")
    assert options._out(None) is None
    monkeypatch.delenv("MMFUSED_TUNED")
    assert options._out(None) is None


def test_case_whose_own_plans_fail_is_skipped(tmp_path, timer, monkeypatch, capsys):
    monkeypatch.setattr(timer, "__call__", lambda self, plans: {})
    assert tuning(timer, tmp_path / "card.json").run() == 0
    assert "not tuned: the library's own plans cannot be timed" in capsys.readouterr().out


def test_case_is_tuned_again_beside_other_plans_of_earlier_cases(
    tmp_path, timer, few_moves, unchecked
):
    second = dataclasses.replace(CASE, name="second")
    assert tuning(timer, tmp_path / "card.json", [second]).run() == 0
    timed = timer.timed
    assert tuning(timer, tmp_path / "card.json", [CASE, second]).run() == 0
    record = json.loads((tmp_path / "card/masked_info_nce-second-float16.json").read_text())
    assert timer.timed > timed and len(record["facts"]["base"]) == 2


def test_headline_cases_are_tuned_first():
    args = SimpleNamespace(ops=["masked_info_nce"], shape=None, case=None)
    (chosen,) = options._chosen(args)
    assert [case.headline for case in chosen.cases] == sorted(
        (case.headline for case in chosen.cases), reverse=True
    )
    both = SimpleNamespace(ops=[], shape=None, case=["fluid", "uniecs"])
    assert {one.op: [c.name for c in one.cases] for one in options._chosen(both)} == {
        "query_pooling": ["fluid"],
        "gated_cross_attention": ["uniecs"],
    }


@pytest.fixture
def compiles(monkeypatch):
    """Let the command run in this process, without a GPU and without compiling."""
    monkeypatch.setattr(commands, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dry, "dropped_of", lambda *_: {"rows: maxnreg 168 -> 128": "spills"})


def test_without_a_gpu_one_sentence_says_so(compiles, capsys):
    assert main(["tune", "masked_info_nce"]) == 2
    assert capsys.readouterr().err == (
        "mmfused: error: tune: got no CUDA GPU, expected one to time plans on; --dry-run works "
        "without\n"
    )


def test_interpreter_is_refused(capsys):
    assert main(["tune", "--dry-run"]) == 2
    assert "TRITON_INTERPRET: got '1', expected it unset" in capsys.readouterr().err


def test_dry_run_lists_plans_and_candidates_once(compiles, capsys):
    names = ("--case", "logits-16384", "--case", "fluid-256")
    assert main(["tune", "topk_routing", "--dry-run", "--arch", "sm_80", *names]) == 0
    out = capsys.readouterr().out
    assert "    rows: num_warps 4 -> 8: would be timed\n" in out
    assert "    rows: maxnreg 168 -> 128: dropped: spills\n" in out
    assert "num_experts=16: see logits-16384\n" in out  # the plan of both cases
    assert "dtype=bfloat16 from_input=True: route: BN 64 -> 128: would be timed" in out
    assert out.count("rows: num_warps 4 -> 8:") == 2
    last = out.splitlines()[-1]
    assert last.startswith("sm_80: cases: 2, plans: 2, candidates: ") and "1 are dropped" in last


def test_budget_ends_a_dry_run(compiles, capsys):
    assert main(["tune", "topk_routing", "--dry-run", "--budget-seconds", "0"]) == run.UNFINISHED
    assert "The budget is spent; 8 cases were not looked at." in capsys.readouterr().out


def test_dry_run_compiles_candidates_and_writes_nothing(tmp_path):
    code = (
        "from mmfused.tuning import candidates, dry\n"
        "from mmfused.cli import main\n"
        "usual = candidates._neighbours\n"
        "candidates._neighbours = lambda *a: [c for c in usual(*a) if c[0] == 'num_warps'][1:]\n"
        "main('tune topk_routing --shape T=64,E=4 --dry-run --arch sm_80 --jobs 1'.split())\n"
    )
    usual = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = usual | {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "rows: num_warps 4 -> 8: would be timed" in done.stdout, done.stderr
    assert "candidates: 1, of which 1 would be timed" in done.stdout
    assert len(list((tmp_path / "mmfused" / "inspect").iterdir())) > 1
    assert not (tmp_path / "mmfused" / "tuned").exists()


def test_plans_are_equal_if_their_texts_are():
    assert Plans([{"a": 1}]) == Plans([{"a": 1}]) and hash(Plans(["a"])) == hash(Plans(["a"]))
    assert Plans([{"a": 1}]) != Plans([{"a": 2}]) and Plans([1]) != 1
