"""Tests of the command ``mmfused tune``: its options, its dry run and its compiler."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tuning_workers

from mmfused.benchmarks import masked_info_nce, run
from mmfused.cli import compiling, main
from mmfused.cli.compiling import Measured
from mmfused.tuning import command as commands
from mmfused.tuning import compile as compilers
from mmfused.tuning import dry, options
from mmfused.tuning.calls import problem_of

ROOT = Path(__file__).resolve().parents[1]
CPU, FLOAT = torch.device("cpu"), torch.float16
CASE = masked_info_nce.custom({"B": 6, "D": 16})


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


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_and_print_nothing(end, tmp_path):
    code = """if 1:
        import time, tuning_workers
        from mmfused.tuning.compile import Compiler
        with Compiler(1, True, tuning_workers.compile_by_name) as compiler:
            assert compiler.compiled({"prints": "prints"})["prints"].registers == 6
            print("compiled", flush=True)
            time.sleep(60)
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "MMFUSED_INSPECT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    given = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **given) as process:
        assert process.stdout.readline() == "compiled\n"  # and no line before it
        process.send_signal(end)
        try:
            assert process.communicate(timeout=60)[0] == ""  # once no process has the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


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


def test_variable_must_name_a_file_that_can_have_a_folder_beside_it(monkeypatch, tmp_path, capsys):
    """The samples are kept in a folder that is named as the file without its suffix."""
    monkeypatch.setenv("MMFUSED_TUNED", str(tmp_path / "tuned"))
    assert main(["tune", "topk_routing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmfused: error: MMFUSED_TUNED: got ") and "suffix .json" in error
    (tmp_path / "tuned").mkdir()
    assert options._out(None) == tmp_path / "tuned"


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
