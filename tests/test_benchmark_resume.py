"""With ``--resume``, a benchmark measures only cases without a complete and current result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmfused.benchmarks import measure, query_pooling, run, sources

SHARED = {
    "benchmarks/footprint.py",
    "benchmarks/measure.py",
    "benchmarks/run.py",
    "kernels/tiles.py",
    "mmfused/library.py",
    "mmfused/ops/_common.py",
}
UNUSED = {
    "benchmarks/charts.py",
    "benchmarks/report.py",
    "benchmarks/tables.py",
    "kernels/query_pooling/inspect_cases.py",
    "mmfused/cli/demo.py",
    "mmfused/data/generated.py",
    "mmfused/fuse/pooling.py",
    "mmfused/training/loop.py",
    "tests/query_pooling_launches.py",
    "tests/test_query_pooling.py",
    "tools/gpu.py",
}
OF_MODELS = {
    "benchmarks/hosted_model_steps.py",
    "benchmarks/model_step.py",
    "benchmarks/model_steps.py",
    "benchmarks/torch_modules.py",
    "mmfused/models/fluid.py",
}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        measure, "ceilings", lambda *_: {"flops_per_second": 1e11, "bytes_per_second": 1e10}
    )


def test_resume_measures_cases_without_a_complete_and_current_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        query_pooling,
        "CASES",
        tuple(replace(case, N=5, D=24, cpu_B=1) for case in query_pooling.CASES[:3]),
    )
    command = ["query_pooling", "--forward", "--repeats", "1", "--resume", "--out", str(tmp_path)]
    first, second, third = (
        tmp_path / f"query_pooling-{case.name}-float32.json" for case in query_pooling.CASES
    )
    assert run.main([*command, "--budget-seconds", "0"]) == run.UNFINISHED
    assert (
        first.exists()
        and not second.exists()
        and "Not measured: fluid-n512, fluid-block" in capsys.readouterr().out
    )
    assert run.main(command) == 0
    assert third.exists() and "fluid: composed" not in capsys.readouterr().out
    before = first.read_bytes()
    assert run.main(command) == 0
    assert "all cases have results in" in capsys.readouterr().out and first.read_bytes() == before
    assert run.main([*command, "--repeats", "2"]) == 0  # with other settings, all cases run again
    assert json.loads(third.read_text())["settings"]["repeats"] == 2

    found = json.loads(second.read_text())
    for change in ({"gate": "failed"}, {"gate": "skipped"}):  # the result of the accuracy check
        incomplete = found | {
            "providers": found["providers"] | {"composed": found["providers"]["composed"] | change}
        }
        second.write_text(json.dumps(incomplete))
        assert run.main([*command, "--repeats", "2"]) == 0
        assert "fluid-n512: composed: passed" in capsys.readouterr().out
    found = json.loads(first.read_text())  # measured with tuned plans
    found["environment"]["tuned"] = "nvidia-h200-triton-3.6.0.json, 0123456789abcdef"
    first.write_text(json.dumps(found))
    assert run.main([*command, "--repeats", "2"]) == 0
    assert "fluid: composed" in capsys.readouterr().out
    assert "tuned" not in json.loads(first.read_text())["environment"]
    monkeypatch.setattr(run, "source_hash", lambda op: "another")
    assert run.main([*command, "--repeats", "2"]) == 0
    assert (
        "fluid: composed" in capsys.readouterr().out
        and json.loads(first.read_text())["environment"]["source"] == "another"
    )


def sources_of(op: str) -> set[str]:
    """Return the sources of an op: functions, kernels, C++ and benchmark."""
    patterns = (
        f"mmfused/ops/{op}/*.py",
        f"kernels/{op}/*.py",
        f"benchmarks/{op}*.py",
        f"csrc/{op}*",
    )
    found = {path for pattern in patterns for path in sources.ROOT.glob(pattern)}
    return {path.relative_to(sources.ROOT).as_posix() for path in found} - {
        f"kernels/{op}/inspect_cases.py"
    }


def hashed(op: str, names: set[str]) -> set[str]:
    """Return the subset of ``names`` that the source hash of ``op`` covers."""
    return {name for name in names if sources.affects(Path(name), op)}


@pytest.mark.parametrize("op", [*sources.OPS, "models"])
def test_source_hash_covers_the_sources_that_an_op_uses(op):
    own = {each: sources_of(each) for each in sources.OPS}
    assert all(own.values()) and all((sources.ROOT / name).is_file() for name in SHARED | UNUSED)
    assert hashed(op, SHARED) == SHARED and hashed(op, UNUSED) == set()
    used = sources.OPS if op == "models" else (op, *sources.OPS[op])
    for each, names in own.items():
        assert hashed(op, names) == (names if each in used else set())
    assert hashed(op, OF_MODELS) == (OF_MODELS if op == "models" else set())


def test_source_hash_changes_with_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setenv("MMFUSED_COMMIT", "abc")
    for name in (
        "kernels/query_pooling/plans.py",
        "kernels/masked_info_nce/plans.py",
        ".venv/lib.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("tile = 64")
    before = {op: sources.source_hash(op) for op in ("query_pooling", "masked_info_nce", None)}
    (tmp_path / ".venv/lib.py").write_text("tile = 32")
    assert before == {op: sources.source_hash(op) for op in before}
    (tmp_path / "kernels/query_pooling/plans.py").write_text("tile = 32")
    after = {op: sources.source_hash(op) for op in before}
    assert [after[op] == before[op] for op in before] == [False, True, False]
    assert sources.source_facts() == {"commit": "abc", "dirty": None}  # ROOT has no .git


@pytest.mark.parametrize("skipped", [False, True])
def test_results_with_torch_compile_are_not_replaced_by_some_without(skipped, tmp_path, capsys):
    command = ["query_pooling", "--shape", "B=1,N=5,D=24,L=2", "--forward", "--repeats", "1"]
    command += ["--resume", "--out", str(tmp_path)]
    assert run.main(command) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    record["settings"]["compiled"] = True
    entry = {"gate": "skipped", "reasons": ["the budget"]} if skipped else {"gate": "passed"}
    record["providers"] |= {f"{name}, compiled": entry for name in query_pooling.PROVIDERS}
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert run.main([*command, "--no-compile"]) == 0
    assert "have results" in capsys.readouterr().out and json.loads(path.read_text()) == record
