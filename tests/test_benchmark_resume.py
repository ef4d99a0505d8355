"""A benchmark goes on where it was stopped, and measures again what other sources, versions or
settings were measured with.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmfused.benchmarks import measure, query_pooling, run, sources

SOURCE_FILES = """
mmfused/library.py mmfused/ops/grouped_mlp/functional.py mmfused/models/fluid.py mmfused/cli/demo.py tests/test_query_pooling.py
kernels/tiles.py kernels/query_pooling/plans.py kernels/topk_routing/plans.py csrc/topk_routing.cu
benchmarks/measure.py benchmarks/gated_cross_attention_gate.py benchmarks/report.py
""".split()


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        measure, "ceilings", lambda *_: {"flops_per_second": 1e11, "bytes_per_second": 1e10}
    )


def test_resume_measures_what_is_missing(tmp_path, capsys, monkeypatch):
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
    assert (
        "all cases are measured already" in capsys.readouterr().out and first.read_bytes() == before
    )
    assert run.main([*command, "--repeats", "2"]) == 0  # others settings: all of them again
    assert json.loads(third.read_text())["settings"]["repeats"] == 2

    found = json.loads(second.read_text())
    for change in ({"gate": "failed"}, {"gate": "skipped"}):
        stale = found | {
            "providers": found["providers"] | {"composed": found["providers"]["composed"] | change}
        }
        second.write_text(json.dumps(stale))
        assert run.main([*command, "--repeats", "2"]) == 0
        assert "fluid-n512: composed: passed" in capsys.readouterr().out
    monkeypatch.setattr(run, "source_hash", lambda op: "another")
    assert run.main([*command, "--repeats", "2"]) == 0
    assert (
        "fluid: composed" in capsys.readouterr().out
        and json.loads(first.read_text())["environment"]["source"] == "another"
    )


def test_source_hash_is_of_what_an_op_uses():
    serves = {
        op: {name for name in SOURCE_FILES if sources.serves(Path(name), op)}
        for op in (*sources.OPS, "models")
    }
    everywhere = {"mmfused/library.py", "kernels/tiles.py", "benchmarks/measure.py"}
    assert all(everywhere <= found for found in serves.values())
    own = {op: found - everywhere for op, found in serves.items()}
    assert own["query_pooling"] == {"kernels/query_pooling/plans.py"}
    assert own["topk_routing"] == {"kernels/topk_routing/plans.py", "csrc/topk_routing.cu"}
    assert own["grouped_mlp"] == {"mmfused/ops/grouped_mlp/functional.py", *own["topk_routing"]}
    assert own["gated_cross_attention"] == {"benchmarks/gated_cross_attention_gate.py"}
    assert own["models"] >= {"mmfused/models/fluid.py", *own["query_pooling"], *own["grouped_mlp"]}


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
    assert sources.source_facts() == {"commit": "abc", "dirty": None}  # no .git there
