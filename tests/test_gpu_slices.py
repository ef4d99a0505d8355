"""Tests of ``make gpu``: which slices it runs, skips and stops."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmfused import cli as main
from mmfused.benchmarks import report, run
from mmfused.tools import gpu, gpu_tests, targets
from mmfused.tuning.options import options_of

ROOT = Path(__file__).resolve().parents[1]


def python_slice(name, text, source="one"):
    return gpu.Slice(name, ("-c", text), source)


@pytest.fixture
def run_slices(tmp_path, monkeypatch):
    """Return a function that runs ``make gpu`` on slices and returns exit code and journal."""

    def call(parts, *arguments):
        monkeypatch.setattr(gpu, "slices", lambda out, dry: parts)
        code = gpu.main(["--dry-run", "--out", str(tmp_path / "out"), *arguments])
        path = tmp_path / "out" / "make-gpu.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return call


def code_that_appends(path: Path, word: str, code: int = 0) -> str:
    return f"print({word!r}); open({str(path)!r}, 'a').write({word!r}); raise SystemExit({code})"


def test_green_slices_are_not_run_again(run_slices, tmp_path, capsys):
    ran = tmp_path / "ran"
    parts = [
        python_slice("build", code_that_appends(ran, "a")),
        python_slice("bench-x", code_that_appends(ran, "b", run.UNFINISHED)),
        python_slice("report", code_that_appends(ran, "r")),
    ]
    code, journal = run_slices(parts)
    assert code == run.UNFINISHED and ran.read_text() == "abr"
    assert [journal[p.name]["state"] for p in parts] == ["green", "unfinished", "green"]
    assert (
        tmp_path / "out/logs/build.log"
    ).read_text() == "a\n" and "==== build\na\n" in capsys.readouterr().out

    parts[1] = python_slice("bench-x", code_that_appends(ran, "c"))
    assert run_slices(parts)[0] == 0 and ran.read_text() == "abrcr"  # the report always runs again
    assert run_slices(parts)[0] == 0 and ran.read_text() == "abrcrr"
    assert (
        run_slices([replace(parts[0], source="another"), *parts[1:]])[0] == 0
        and ran.read_text() == "abrcrrar"
    )
    # A green slice runs again if it is named on the command line.
    assert run_slices(parts, "bench-*")[0] == 0 and ran.read_text() == "abrcrrarc"


def test_red_slice_is_reported_and_does_not_stop_other_slices(run_slices, tmp_path, capsys):
    ran = tmp_path / "ran"
    parts = [
        python_slice("test-x", code_that_appends(ran, "a", 1)),
        python_slice("bench-x", code_that_appends(ran, "b")),
    ]
    code, journal = run_slices(parts)
    assert code == 1 and ran.read_text() == "ab" and journal["test-x"]["state"] == "RED"
    assert "test-x" in capsys.readouterr().out.partition("RED")[0]
    assert run_slices(parts)[0] == 1 and ran.read_text() == "aba"


def test_green_slices_run_again_with_other_versions(run_slices, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    parts = [python_slice("build", code_that_appends(ran, "a"))]
    run_slices(parts)
    facts = report.environment(torch.device("cpu"))
    monkeypatch.setattr(
        report,
        "environment",
        lambda device: facts | {"versions": facts["versions"] | {"torch": "9.9"}},
    )
    run_slices(parts)
    assert ran.read_text() == "aa"


def test_no_slice_begins_if_the_budget_is_spent(run_slices, tmp_path, capsys):
    code, journal = run_slices(
        [python_slice("build", code_that_appends(tmp_path / "ran", "a"))], "--budget-seconds", "0"
    )
    assert code == run.UNFINISHED and journal == {} and "not started" in capsys.readouterr().out


def test_slice_over_its_limit_is_killed_with_its_children(run_slices, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 2.0)
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    text = f"import subprocess, sys, time; {start}; time.sleep(60)"
    begun = time.monotonic()
    code, journal = run_slices(
        [
            python_slice("bench-x", text),
            python_slice("report", code_that_appends(tmp_path / "ran", "r")),
        ]
    )
    assert (
        code == 1
        and journal["bench-x"]["state"] == "killed by its limit"
        and time.monotonic() - begun < 30
    )
    assert (tmp_path / "ran").exists()
    time.sleep(max(0.0, 4.5 - (time.monotonic() - begun)))
    assert not (tmp_path / "late").exists()


def test_remaining_budget_is_passed_to_the_command(run_slices, tmp_path):
    text = f"import sys; open({str(tmp_path / 'ran')!r}, 'w').write(sys.argv[1])"
    run_slices([gpu.Slice("bench-x", ("-c", text, "{budget}"), "one")], "--budget-seconds", "100")
    assert not (tmp_path / "ran").exists()  # less than RESERVE_SECONDS are left
    run_slices([gpu.Slice("bench-x", ("-c", text, "{budget}"), "one")], "--budget-seconds", "250")
    assert 125 <= int((tmp_path / "ran").read_text()) <= 130
    run_slices([gpu.Slice("bench-x", ("-c", text, "{budget}"), "one")])
    assert (tmp_path / "ran").read_text() != "300"  # not run again, because it was green
    run_slices([gpu.Slice("bench-x", ("-c", text, "{budget}"), "two")])
    assert (tmp_path / "ran").read_text() == "300"


def test_slices_run_without_tuned_plans(run_slices, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFUSED_TUNED", "my-plans.json")
    text = f"import os; open({str(tmp_path / 'ran')!r}, 'w').write(os.environ['MMFUSED_TUNED'])"
    assert run_slices([python_slice("bench-x", text)])[0] == 0
    assert (tmp_path / "ran").read_text() == "off"


def test_slice_stopped_by_the_budget_is_unfinished(run_slices, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE_SECONDS", 0.5)
    code, journal = run_slices(
        [python_slice("bench-x", "import time; time.sleep(60)")], "--budget-seconds", "2"
    )
    assert code == run.UNFINISHED and journal["bench-x"]["state"] == "unfinished"


def test_slices_contain_the_whole_suite_and_all_benchmarks():
    files = gpu.test_files()
    listed = sorted(name for part in files.values() for name in part)
    assert listed == sorted(
        f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
    ) and all(files.values())
    for dry in (False, True):
        parts = gpu.slices(Path("out"), dry)
        names = [part.name for part in parts]
        assert len(set(names)) == len(names)
        benches = {f"bench-{op}{more}" for op in run.OPS for more in ("", "-eager", "-more")}
        benches |= set() if dry else {"bench-masked_info_nce-long"}
        assert {name for name in names if name.startswith("bench-")} == benches
        for command in (part.command for part in parts):
            assert command[0].startswith("-") or (ROOT / command[0]).is_file(), command


def test_what_matters_most_runs_first():
    names = [part.name for part in gpu.slices(Path("out"), dry=False)]
    assert names[:3] == ["build", "test-card", "bench-query_pooling-eager"]
    assert names[names.index("sanitize") + 1] == "bench-query_pooling"
    assert names.index("bench-models-eager") < names.index("sanitize")
    assert names[-2:] == ["test-rest", "report"]
    assert names.index("bench-models") < names.index("test-query_pooling")
    assert names.index("test-models") < names.index("bench-query_pooling-more")


def test_the_first_benchmarks_measure_the_targets_and_later_ones_the_rest():
    parts = {part.name: part.command for part in gpu.slices(Path("out"), dry=False)}
    for op in run.OPS:
        command = parts[f"bench-{op}"] + parts.get(f"bench-{op}-long", ())
        cases = [command[i + 1] for i, word in enumerate(command) if word == "--case"]
        wanted = {row.case for row in targets.ROWS if (row.op, row.device) == (op, "cuda")}
        assert wanted and set(cases) == wanted and len(cases) == len(wanted)
        assert wanted <= {case.name for case in run.load_op(op).cases("cuda", False)}
        assert "--case" not in parts[f"bench-{op}-more"] and "--resume" in command
        eager = parts[f"bench-{op}-eager"]
        assert "--no-compile" in eager and "--no-compile" not in command


# ---- test files ----------------------------------------------------------------------------------


@pytest.fixture
def run_tests(tmp_path, monkeypatch):
    """Return a function that runs gpu_tests on made-up files, and returns exit code and states."""
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "source_hash", lambda: "one")
    monkeypatch.setattr(gpu_tests, "PARTS", {"parted.py": 3})
    bodies = {
        "bad.py": "def test(): assert False, 'the reason'",
        "parted.py": "import os, pytest\n@pytest.mark.parametrize('name', list('abcdef'))\n"
        "@pytest.mark.parametrize('way', [1, 2])\n"
        "def test(name, way): open(f'{name}{way}', 'a').write(f'{os.getpid()} ')",
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(body)

    def call(*arguments):
        code = gpu_tests.main(["--state", str(tmp_path / "state.json"), "--jobs", "2", *arguments])
        path = tmp_path / "state.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return call


def test_test_files_that_passed_are_not_run_again(run_tests, tmp_path, capsys, monkeypatch):
    code, states = run_tests("bad.py", "parted.py")
    assert code == 1 and "the reason" in capsys.readouterr().out
    assert {name: state["passed"] for name, state in states.items()} == {
        "bad.py": False,
        "parted.py 1/3": True,
        "parted.py 2/3": True,
        "parted.py 3/3": True,
    }
    # Every test ran once, and those of a case in one part.
    ran = {path.name: path.read_text().split() for path in sorted(tmp_path.glob("[a-f][12]"))}
    assert len(ran) == 12 and all(len(processes) == 1 for processes in ran.values())
    assert all(ran[f"{name}1"] == ran[f"{name}2"] for name in "abcdef")
    assert len({process for (process,) in ran.values()}) > 1
    assert run_tests("parted.py") == (0, states)
    assert (tmp_path / "a1").read_text().split() == ran["a1"]
    monkeypatch.setattr(gpu_tests, "source_hash", lambda: "two")
    now = gpu_tests.Run(tmp_path / "state.json", 0.0)
    assert not now.passed("parted.py 1/3") and not now.passed("bad.py")


def test_no_test_file_begins_after_the_budget(run_tests, tmp_path, capsys):
    assert run_tests("parted.py", "--budget-seconds", "-1") == (run.UNFINISHED, {})
    assert "3 left" in capsys.readouterr().out and not list(tmp_path.glob("[a-f][12]"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--dry-run", "bench-nothing"],
            "slice: got 'bench-nothing', expected one of build, test-card, bench-query_pooling",
        ),
        (
            [],
            "make gpu needs a CUDA GPU, but torch finds none; DRY=1 runs small slices on a CPU",
        ),
    ],
)
def test_invalid_arguments_end_with_an_error(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_slice_that_tunes_resumes_beside_the_results_and_is_dry_without_a_card():
    def command(dry):
        (found,) = [p for p in gpu.slices(Path("out"), dry) if p.name == "tune"]
        assert found.command[:3] == ("-m", "mmfused", "tune") and not found.environment
        return found.command[3:]

    assert command(False) == ("--out", "out/tuned.json", "--budget-seconds", "{budget}")
    args = main._make_parser(["tune"]).parse_args(["tune", *command(True)])
    assert args.dry_run and options_of(args).arch == 90


def test_no_shipped_file_imports_the_tools():
    """The wheel does not contain tools/."""
    shipped = [
        path
        for folder in ("mmfused", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    lines = [line for path in shipped for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(shipped) > 50
    assert not [line for line in lines if re.match(r"\s*(from|import) \S*\btools\b", line)]


def test_slice_that_was_green_on_another_card_is_run_again():
    part = gpu.Slice("bench-x", (), "sources")
    facts = {"versions": {"torch": "2.14"}, "device": "NVIDIA H200"}
    state = {"state": "green", "source": "sources", **facts}
    assert gpu.is_green(state, part, facts)
    assert not gpu.is_green(state, part, facts | {"device": "NVIDIA H100"})
