"""Tests of ``mmfused tune``: its loop in Triton's interpreter, and its files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mmfused import tuned_file
from mmfused.benchmarks import masked_info_nce, run
from mmfused.cli import compiling
from mmfused.cli.compiling import Measured
from mmfused.kernels import tuned
from mmfused.kernels.topk_routing import plans as routing
from mmfused.tuning import command as commands
from mmfused.tuning import options, timing
from mmfused.tuning.calls import Plans, problem_of
from mmfused.tuning.command import Tuning, library_only
from mmfused.tuning.journal import ENDED, Journal, table
from mmfused.tuning.timing import Timer
from mmfused.tuning.verify import Verifier

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
    assert record["finished"] and record["kept"] and len(record["seconds"]["best"]) == 9
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


def test_plan_must_be_faster_with_each_of_three_captures(
    tmp_path, timer, few_moves, unchecked, monkeypatch, capsys
):
    """The place of tensors in memory changes the time of a whole capture, not of one sample."""

    class Placed(timer):
        confirmed = 0

        def __call__(self, plans):
            times = super().__call__(plans)
            if "best" not in plans:
                return times
            type(self).confirmed += 1
            return {label: [1.0] * 3 for label in times} if self.confirmed == 3 else times

    assert tuning(Placed, tmp_path / "card.json").run() == 0
    assert tuned_file.read(tmp_path / "card.json").entries == [] and Placed.confirmed == 3


def test_two_runs_at_a_time_keep_what_the_other_has_found(
    tmp_path, timer, few_moves, unchecked, capsys
):
    path = tmp_path / "card.json"
    late = tuning(timer, path)  # it has read the file, which does not exist yet
    other = tuned.Entry(
        "topk_routing", (("num_experts", 4),), *[routing.Plan(routing.Rows(8, 4))] * 2
    )
    sources = {"topk_routing": tuned_file.sources_of("topk_routing")}
    tuned_file.write(path, dataclasses.replace(late.file, entries=[other], sources=sources))
    assert late.run() == 0
    assert {entry.op for entry in tuned_file.read(path).entries} == {
        "topk_routing",
        "masked_info_nce",
    }


def test_plan_that_another_use_cannot_run_is_not_kept(
    tmp_path, timer, few_moves, unchecked, monkeypatch, capsys
):
    """Without ids every plan compiles, with ids a chunked backward needs too much shared memory."""

    class Compiler:
        def compiled(self, jobs):
            return {key: self.measured(job) for key, job in jobs.items()}

        def measured(self, job):
            large = job.kernel == "pairs_kernel" and job.constants["IDS"] == "drop"
            return Measured(32, 0, 2**20 if large else 2**10, {"mma": 1}, [], [])

    # The key of a job holds the hash of its source, which a kernel in the interpreter lacks.
    monkeypatch.setattr(compiling, "source_key", lambda job: repr(vars(job)))
    assert Tuning(settings(tmp_path / "card.json"), CPU, Compiler(), timer).run() == 0
    (forward,) = tuned_file.read(tmp_path / "card.json").entries
    assert forward.plan.backward == "owner" and forward.plan.sweep.num_warps == 4
    record = json.loads(next((tmp_path / "card").glob("*.json")).read_text())
    refused = [one["reason"] for one in record["candidates"] if one["state"] == "refused"]
    assert refused and all("ids='drop'" in reason for reason in refused)
    assert all("needs 1048576 bytes of shared memory" in reason for reason in refused)


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
    class Died(BaseException):
        """Stands for the end of the process."""

    class Ends(timer):
        def samples(self, plans):
            if any(plan.backward == "chunked" for plan in plans.plans):
                self.note_running(plans)
                raise Died
            return super().samples(plans)

    path = tmp_path / "card.json"
    with pytest.raises(Died):
        tuning(Ends, path).run()
    assert list(tmp_path.rglob("*.running"))
    for _ in range(9):  # each run meets such a plan once
        with contextlib.suppress(Died):
            assert tuning(Ends, path).run() == 0
            break
    record = json.loads(next(tmp_path.rglob("masked*.json")).read_text())
    ended = [one for one in record["candidates"] if one["reason"] == ENDED]
    assert len(ended) >= 2 and {e.plan.backward for e in tuned_file.read(path).entries} == {"owner"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_plan_that_runs_when_the_command_is_stopped_is_tried_again(
    stop, tmp_path, timer, few_moves, unchecked, monkeypatch
):
    def stopped(self, entries):
        assert list((tmp_path / "card").glob("*.running"))
        raise stop

    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(Verifier, "why_refused", stopped)
        tuning(timer, tmp_path / "card.json").run()
    assert not list((tmp_path / "card").glob("*.running"))
    assert tuning(timer, tmp_path / "card.json").run() == 0
    assert len(tuned_file.read(tmp_path / "card.json").entries) == 2


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


# ---- files ---------------------------------------------------------------------------------------


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


def test_plans_are_equal_if_their_texts_are():
    assert Plans([{"a": 1}]) == Plans([{"a": 1}]) and hash(Plans(["a"])) == hash(Plans(["a"]))
    assert Plans([{"a": 1}]) != Plans([{"a": 2}]) and Plans([1]) != 1
