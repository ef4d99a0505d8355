"""``make gpu``: what it runs, in which order, what it skips, and how it stops what hangs."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmfused.benchmarks import masked_info_nce, report, run
from mmfused.tools import choices, gpu, variants
from mmfused.tools.patching import replaced

ROOT = Path(__file__).resolve().parents[1]


def part(name, text, source="one"):
    return gpu.Slice(name, ("-c", text), source)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Return begin(slices, *arguments) -> exit code and journal; each slice appends to "ran"."""

    def call(parts, *arguments):
        monkeypatch.setattr(gpu, "slices", lambda out, dry: parts)
        code = gpu.main(["--dry-run", "--out", str(tmp_path / "out"), *arguments])
        path = tmp_path / "out" / "make-gpu.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return call


def leaves(path: Path, word: str, code: int = 0) -> str:
    return f"print({word!r}); open({str(path)!r}, 'a').write({word!r}); raise SystemExit({code})"


def test_what_is_green_is_not_run_again(begin, tmp_path, capsys):
    ran = tmp_path / "ran"
    parts = [
        part("build", leaves(ran, "a")),
        part("bench-x", leaves(ran, "b", run.UNFINISHED)),
        part("report", leaves(ran, "r")),
    ]
    code, journal = begin(parts)
    assert code == run.UNFINISHED and ran.read_text() == "abr"
    assert [journal[p.name]["state"] for p in parts] == ["green", "unfinished", "green"]
    assert (
        tmp_path / "out/logs/build.log"
    ).read_text() == "a\n" and "==== build\na\n" in capsys.readouterr().out

    parts[1] = part("bench-x", leaves(ran, "c"))
    assert (
        begin(parts)[0] == 0 and ran.read_text() == "abrcr"
    )  # the report always runs, as it describes the current results
    assert begin(parts)[0] == 0 and ran.read_text() == "abrcrr"
    assert (
        begin([replace(parts[0], source="another"), *parts[1:]])[0] == 0
        and ran.read_text() == "abrcrrar"
    )
    # A slice that is named runs again.
    assert begin(parts, "bench-*")[0] == 0 and ran.read_text() == "abrcrrarc"


def test_red_is_told_and_keeps_nothing_from_running(begin, tmp_path, capsys):
    ran = tmp_path / "ran"
    parts = [part("test-x", leaves(ran, "a", 1)), part("bench-x", leaves(ran, "b"))]
    code, journal = begin(parts)
    assert code == 1 and ran.read_text() == "ab" and journal["test-x"]["state"] == "RED"
    assert "test-x" in capsys.readouterr().out.partition("RED")[0]
    assert begin(parts)[0] == 1 and ran.read_text() == "aba"


def test_other_versions_count_as_nothing(begin, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    parts = [part("build", leaves(ran, "a"))]
    begin(parts)
    facts = report.environment(torch.device("cpu"))
    monkeypatch.setattr(
        report,
        "environment",
        lambda device: facts | {"versions": facts["versions"] | {"torch": "9.9"}},
    )
    begin(parts)
    assert ran.read_text() == "aa"


def test_a_spent_budget_begins_nothing(begin, tmp_path, capsys):
    code, journal = begin([part("build", leaves(tmp_path / "ran", "a"))], "--budget-seconds", "0")
    assert code == run.UNFINISHED and journal == {} and "left" in capsys.readouterr().out


def test_what_does_not_end_is_ended_with_all_it_started(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 2.0)
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    text = f"import subprocess, sys, time; {start}; time.sleep(60)"
    begun = time.monotonic()
    code, journal = begin([part("bench-x", text), part("report", leaves(tmp_path / "ran", "r"))])
    assert (
        code == 1
        and journal["bench-x"]["state"] == "ended by its limit"
        and time.monotonic() - begun < 30
    )
    assert (tmp_path / "ran").exists()
    time.sleep(max(0.0, 4.5 - (time.monotonic() - begun)))
    assert not (tmp_path / "late").exists()


def test_budgets_reach_the_commands(begin, tmp_path):
    text = f"import sys; open({str(tmp_path / 'ran')!r}, 'w').write(sys.argv[1])"
    begin([gpu.Slice("bench-x", ("-c", text, "{budget}"), "one")], "--budget-seconds", "100")
    assert not (tmp_path / "ran").exists()  # too little time is left to begin
    begin([gpu.Slice("bench-x", ("-c", text, "{budget}"), "one")], "--budget-seconds", "250")
    assert 125 <= int((tmp_path / "ran").read_text()) <= 130
    begin([gpu.Slice("bench-x", ("-c", text, "{budget}"), "one")])
    assert (tmp_path / "ran").read_text() != "300"  # it was already green
    begin([gpu.Slice("bench-x", ("-c", text, "{budget}"), "two")])
    assert (tmp_path / "ran").read_text() == "300"


def test_what_the_budget_ends_is_no_fault(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LAST", 0.5)
    code, journal = begin([part("bench-x", "import time; time.sleep(60)")], "--budget-seconds", "2")
    assert code == run.UNFINISHED and journal["bench-x"]["state"] == "unfinished"


def test_slices_hold_the_whole_suite_and_all_benchmarks():
    files = gpu.test_files()
    listed = sorted(name for part in files.values() for name in part)
    assert listed == sorted(
        f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
    ) and all(files.values())
    for dry in (False, True):
        parts = gpu.slices(Path("out"), dry)
        names = [part.name for part in parts]
        assert len(set(names)) == len(names) and {f"bench-{op}" for op in run.OPS} <= set(names)
        for command in (part.command for part in parts):
            assert command[0].startswith("-") or (ROOT / command[0]).is_file(), command


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["--dry-run", "bench-nothing"],
            "slice: got 'bench-nothing', expected one of build, test-query_pooling",
        ),
        (
            [],
            "make gpu needs a CUDA GPU, and torch finds none here; DRY=1 runs everything on a CPU",
        ),
    ],
)
def test_refusals_are_one_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(arguments) == 2
    assert sentence in capsys.readouterr().err


# ---- choices -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_loss(monkeypatch):
    """Act as on a CPU, with a single fast case."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = choices.Choice(
        "masked_info_nce",
        "backward",
        lambda: [masked_info_nce.custom({"B": 20, "D": 16})],
        choices.choices()[2].variants,
    )
    monkeypatch.setattr(choices, "choices", lambda: [choice])
    return choice


def found(folder: Path, name: str) -> dict:
    return json.loads((folder / f"choices-masked_info_nce-{name}.json").read_text())


def test_variants_are_what_runs(tiny_loss, request):
    from mmfused.kernels.masked_info_nce import gradients

    ran = []
    stack = contextlib.ExitStack()
    request.addfinalizer(stack.close)
    for way in ("owner", "chunked"):
        before = getattr(gradients, f"{way}_gradients")

        def noted(*args, way=way, before=before):
            ran.append(way)
            return before(*args)

        stack.enter_context(replaced("mmfused.kernels.masked_info_nce", before, noted))
    problem = masked_info_nce.make(tiny_loss.cases()[0], torch.device("cpu"), torch.float32)
    for way, (_, wrap) in tiny_loss.variants.items():
        ran.clear()
        provider = masked_info_nce.composed(
            tiny_loss.cases()[0], torch.device("cpu"), torch.float32
        ).load(problem.parameters)
        provider.backend, provider.within = "fused", wrap
        provider.both(tuple(problem.inputs.values()), problem.upstream)
        assert set(ran) == {way}


def test_choices_go_on_where_they_were_stopped(tiny_loss, tmp_path, capsys):
    command = ["--quick", "--out", str(tmp_path)]
    assert choices.main([*command, "--budget-seconds", "0"]) == run.UNFINISHED
    assert "Left for another run: masked_info_nce backward" in capsys.readouterr().out
    assert choices.main(command) == 0
    printed = capsys.readouterr().out
    assert "| case | owner | chunked |" in printed and printed.count("**") == 2
    (entries,) = found(tmp_path, "backward")["cases"].values()
    assert {name: v["gate"] for name, v in entries.items()} == {
        "owner": "passed",
        "chunked": "passed",
    }
    before = (tmp_path / "choices-masked_info_nce-backward.json").read_bytes()
    assert choices.main(command) == 0
    assert (tmp_path / "choices-masked_info_nce-backward.json").read_bytes() == before


def test_tiles_are_changed_one_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choices, "small", lambda case: masked_info_nce.custom({"B": 5, "D": 16}))
    assert (
        choices.main(
            ["--op", "masked_info_nce", "--tiles", "clip-65536", "--quick", "--out", str(tmp_path)]
        )
        == 0
    )
    (entries,) = found(tmp_path, "tiles-clip-65536")["cases"].values()
    assert entries[choices.LIBRARY]["gate"] == "passed" and len(entries) > 10
    assert any(name.startswith("sweep: num_warps ") for name in entries)
    assert f"| {choices.LIBRARY} |" in capsys.readouterr().out


def test_a_changed_tile_is_in_the_plan():
    from mmfused.kernels.gated_cross_attention import plans as gated
    from mmfused.kernels.grouped_mlp import plans as grouped
    from mmfused.kernels.query_pooling import plans as pooling

    plan = pooling.plan(32, 768, torch.bfloat16, 90, False)
    changed = variants.with_field(("forward", "onepass"), "num_stages", 2, plan)
    assert (
        changed.forward["onepass"] == replace(plan.forward["onepass"], num_stages=2)
        and changed.backward == plan.backward
    )
    plan = gated.plan(256, 256, 32, torch.bfloat16, 90)
    assert variants.with_field(("attend",), "BM", 128, plan) == replace(
        plan, attend=replace(plan.attend, BM=128)
    )
    asked = ("rows", 512, 16, 768, 3072, torch.bfloat16, 90)
    tile = grouped.plan(*asked)
    assert variants.with_field(("rows",), "num_warps", 8, tile, *asked) == replace(
        tile, num_warps=8
    )
    # The field of another launch changes nothing.
    assert variants.with_field(("gated",), "num_warps", 8, tile, *asked) == tile


def test_choices_refuse(capsys):
    assert choices.main(["--tiles", "fluid"]) == 2 and "op: got None" in capsys.readouterr().err
    assert choices.main(["--op", "query_pooling", "--tiles", "no"]) == 2
    assert "query_pooling: tiles: got 'no', expected one of fluid" in capsys.readouterr().err
    assert choices.main(["--op", "pool"]) == 2 and "op: got 'pool'" in capsys.readouterr().err


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
