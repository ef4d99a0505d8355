"""README and docs show the numbers of the results files; targets are judged by their rules.

The GPU records are synthetic.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from mmfused.benchmarks import report, run
from mmfused.tools import comparison, conditions, grocery, outcome, results_pages, targets
from mmfused.tools.bounds.work import microseconds

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "benchmarks/NOTES.md",
    "README.md",
    "docs/benchmarks.md",
    "docs/end-to-end.md",
    "docs/index.md",
    "docs/models.md",
    "docs/platforms.md",
    "docs/reliability.md",
    "docs/trained-models.md",
)
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
HAS_MODELS = importlib.util.find_spec("mmfused.benchmarks.models") is not None


def pass_times(both: float, forward: float | None = None) -> dict[str, list[float]]:
    forward = both / 4 if forward is None else forward
    return {"forward": [forward] * 3, "both": [both] * 3, "backward": [both - forward] * 3}


def timed(accuracy: str = "passed", **launches) -> dict:
    """Return a provider's record.

    Each value of ``launches`` is the time of forward and backward together, in seconds, or a pair:
    this time, and the time of the forward.
    """
    seconds = {
        name: pass_times(*time) if isinstance(time, tuple) else pass_times(time)
        for name, time in launches.items()
    }
    counted = {"peak_bytes": 2**28, "saved_bytes": 2**20, "kernels": 5, "forward_kernels": 4}
    return {"compiled": None, "gate": accuracy, "reasons": []} | counted | {"seconds": seconds}


def gpu_record(
    op: str,
    case: str,
    providers: dict[str, dict],
    floor: tuple[float, float] = (0.25, 0.75),
    **more,
) -> dict:
    found = next(
        c
        for c in importlib.import_module(f"mmfused.benchmarks.{op}").cases("cuda", False)
        if c.name == case
    )
    versions = {"mmfused": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"}
    machine = {
        "device": "Made-up GPU",
        "cuda": "13.0",
        "versions": versions,
        "commit": "0123456789",
        "dirty": False,
        "threads": 1,
    }
    stages = [{"stage": "all", "flops": 1e12, "bytes": 1e9}]
    return {
        "op": op,
        "case": asdict(found),
        "dtype": "bfloat16",
        "backward": True,
        "environment": machine,
        "ceilings": {"flops_per_second": 1e15, "bytes_per_second": 4e12},
        "work": {"forward": stages, "backward": stages},
        "floor_seconds": {"forward": floor[0], "backward": floor[1], "both": sum(floor)},
        "quick": False,
        "providers": providers,
        "file": f"made-up/{op}-{case}-bfloat16.json",
    } | more


def verdicts(*records: dict, case: str | None = None) -> list[targets.Verdict]:
    case = case or records[0]["case"]["name"]
    return [
        v
        for v in targets.judge(list(records))
        if v.row.op == records[0]["op"] and v.row.case == case
    ]


def targets_met(*records: dict, case: str | None = None) -> list[bool | None]:
    return [verdict.met for verdict in verdicts(*records, case=case)]


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", targets.ROWS, ids=lambda row: f"{row.op}-{row.case}")
def test_every_target_can_be_judged(row):
    if row.op == "models" and not HAS_MODELS:
        pytest.skip("the benchmark of whole models is missing")
    op = importlib.import_module(f"mmfused.benchmarks.{row.op}")
    if row.device == "cpu":
        sizes = row.case.removeprefix("custom-").split("-")
        assert op.custom({size[0]: int(size[1:]) for size in sizes}).name == row.case
        return
    providers = {
        label: timed(eager=2.0, graph=1.0) for label in conditions.with_compiled(op.PROVIDERS)
    }
    others = {
        condition.what.rpartition(" on ")[2]
        for condition in row.conditions
        if "ours on" in condition.what
    }
    records = [gpu_record(row.op, case, providers) for case in (row.case, *others)]
    assert None not in targets_met(*records, case=row.case)


def test_times_at_and_above_the_floor_bound():
    def judged(forward, backward):
        record = gpu_record(
            "query_pooling",
            "fluid-n512",
            {"fused": timed(graph=(forward + backward, forward))},
            floor=(1.0, 2.0),
        )
        return targets_met(record)[:2]

    assert judged(1.6, 3.1) == [True, True]
    assert judged(1.7, 3.1) == [False, True]  # forward and backward are judged separately
    assert judged(1.6, 3.3) == [True, False]


def test_memory_at_and_above_the_bound():
    def judged(case, peak):
        record = gpu_record(
            "masked_info_nce", case, {"fused": timed(eager=1.0) | {"peak_bytes": peak}}
        )
        return targets_met(record)[-1]

    assert judged("clip-65536", 10**9) is True and judged("clip-65536", 10**9 + 1) is False
    assert (
        judged("clip-262144", 4 * 10**9) is False and judged("clip-262144", 4 * 10**9 - 1) is True
    )
    assert judged("clip-262144", None) is None


def test_cases_with_a_small_floor_are_judged_by_cuda_graphs():
    def judged(ours, projected, floor):
        (verdict,) = verdicts(
            gpu_record(
                "query_pooling",
                "bottleneck",
                {"fused": ours, "projected KV + SDPA": projected},
                floor,
            )
        )
        return verdict.met, verdict.measured

    small, large = (99e-6, 200e-6), (101e-6, 200e-6)
    # Ours is 5 times as fast with eager launches, and 3 times with graphs.
    slow_graph = timed(eager=1.0, graph=0.5), timed(eager=5.0, graph=1.5)
    verdict, measured = judged(*slow_graph, small)
    assert verdict is False and "graph, eager 5 x" in measured
    assert judged(*slow_graph, large)[0] is False
    # Ours is 4 times as fast with eager launches.
    assert judged(timed(eager=1.0, graph=1.0), timed(eager=4.0, graph=9.0), large)[0] is True
    assert judged(timed(eager=1.0, graph=1.0), timed(eager=4.0, graph=3.0), small)[0] is False
    verdict, measured = judged(timed(eager=1.0, graph=0.1), timed(eager=9.0), small)
    assert verdict is None and "do not both have a CUDA graph" in measured
    # Without a graph of the baseline, eager launches are compared.
    assert judged(timed(eager=2.0, graph=0.1), timed(eager=9.0), large)[0] is True


def test_a_baseline_counts_in_its_faster_form_and_must_be_compiled_too():
    def judged(**forms):
        names = {"plain": "nn.MultiheadAttention", "compiled": "nn.MultiheadAttention, compiled"}
        providers = {names[form]: provider for form, provider in forms.items()} | {
            "fused": timed(eager=1.0)
        }
        (verdict,) = verdicts(gpu_record("query_pooling", "fluid-h8-b128", providers))
        return verdict

    assert judged(plain=timed(eager=9.0), compiled=timed(eager=1.8)).met is True
    assert judged(plain=timed(eager=1.7), compiled=timed(eager=9.0)).met is False
    skipped = {"compiled": "default", "gate": "skipped", "reasons": ["the budget was spent"]}
    verdict = judged(plain=timed(eager=9.0), compiled=skipped)
    assert (
        verdict.met is None
        and "the budget was spent" in verdict.measured
        and verdict.file.endswith("b128-bfloat16.json")
    )
    assert judged(plain=timed(eager=9.0)).met is None


def test_routing_is_judged_by_launches_and_a_cuda_graph():
    def judged(**more):
        providers = {
            "fused": timed(eager=1.0, graph=1.0) | more,
            "eager": timed(eager=9.0, graph=5.0),
        }
        return targets_met(
            gpu_record(
                "topk_routing",
                "logits-16384",
                providers | {"eager, compiled": timed(eager=9.0, graph=1.9)},
            )
        )

    # Forward has 4 launches, including the benchmark's cat, and backward has 1.
    assert judged() == [True, True, True, True, False]
    assert judged(kernels=7, forward_kernels=5)[:2] == [False, False]
    assert judged(kernels=None, forward_kernels=None)[:2] == [None, None]
    without = judged(seconds={"eager": pass_times(1.0)}, reasons=["no CUDA graph: it waits"])
    assert without[2] is False


def test_a_masked_case_is_compared_with_the_unmasked_case():
    unmasked, masked = (
        gpu_record("masked_info_nce", case, {"fused": timed(eager=3.0)})
        for case in ("clip-65536", "clip-65536-k4")
    )
    masked["providers"] = {"fused": timed(eager=1.0)}
    assert targets_met(masked, unmasked) == [True]
    unmasked["providers"] = {"fused": timed(eager=2.9)}
    assert targets_met(masked, unmasked) == [False] and targets_met(masked) == [None]


def test_failed_accuracy_checks_and_records_in_another_dtype():
    baselines = {
        "nn.MultiheadAttention": timed(eager=9.0),
        "nn.MultiheadAttention, compiled": timed(eager=9.0),
    }
    failed_check = {"compiled": None, "gate": "failed", "reasons": ["out: relative error 1"]}
    # If ours fails its check, nothing is timed.
    untimed = {name: {"compiled": None, "gate": "passed", "reasons": []} for name in baselines}
    failed = verdicts(
        gpu_record("query_pooling", "fluid-h8-b128", untimed | {"fused": failed_check})
    )
    assert [verdict.met for verdict in failed] == [False] and "relative error" in failed[0].measured
    fused = baselines | {"fused": timed(eager=1.0)}
    assert targets_met(gpu_record("query_pooling", "fluid-h8-b128", fused)) == [True]
    assert targets_met(gpu_record("query_pooling", "fluid-h8-b128", fused, dtype="float16")) == [
        None
    ]
    wrong = {
        "nn.MultiheadAttention": timed(eager=1.1, accuracy="failed"),
        "nn.MultiheadAttention, compiled": timed(eager=9.0),
    }
    assert targets_met(
        gpu_record("query_pooling", "fluid-h8-b128", wrong | {"fused": timed(eager=1.0)})
    ) == [True]
    assert {verdict.met for verdict in targets.judge([])} == {None}


def test_targets_of_the_committed_results(checkout, capsys):
    results = checkout / "benchmarks" / "results"
    assert targets.main(["--results", str(results)]) == 0
    (line,) = (
        line
        for line in capsys.readouterr().out.splitlines()
        if "custom-B32-N197-D768-L32-H1" in line
    )
    providers = json.loads((results / line.split(" | ")[-1].removesuffix(" |")).read_text())[
        "providers"
    ]
    medians = [
        sorted(providers[name]["seconds"]["eager"]["both"])[10]
        for name in ("nn.MultiheadAttention", "composed")
    ]
    assert f"{medians[0] / medians[1]:.3g} x" in line and "| yes |" in line
    assert targets.main(["--results", "no/such"]) == 2
    assert "results: got 'no/such', expected a folder that exists" in capsys.readouterr().err


def test_models_are_judged_by_the_training_step_if_it_was_timed():
    """Losses without parameters have no optimizer step, so both passes are judged."""
    row = next(row for row in targets.ROWS if row.op == "models")

    def judged(ours, theirs):
        providers = {"fused": ours, "torch modules": theirs, "torch modules, compiled": theirs}
        record = gpu_record("query_pooling", "fluid", providers)
        return row.conditions[0].measure(conditions.Bench(record, "fused", []))[0]

    def stepped(both, step):
        provider = timed(eager=both)
        provider["seconds"]["eager"]["step"] = [step]
        return provider

    assert judged(timed(eager=1.0), timed(eager=3.0)) == 3.0
    assert judged(stepped(1.0, 2.0), stepped(3.0, 4.0)) == 2.0


# ---- pages ---------------------------------------------------------------------------------------


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Return a folder with copies of the pages and of the committed results."""
    listed = subprocess.run(
        ["git", "ls-files", "benchmarks/results"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    files = [ROOT / name for name in listed] or [
        path for path in (ROOT / "benchmarks/results").rglob("*") if path.is_file()
    ]
    for path in [*(ROOT / page for page in PAGES), *files]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(results_pages, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def checkout(committed, capsys):
    """Return the folder ``committed`` without GPU results."""
    for folder in conditions.folders(committed / "benchmarks" / "results"):
        if any(conditions.device_type(record) == "cuda" for record in conditions.read(folder)):
            shutil.rmtree(folder)
    assert results_pages.main([]) == 0
    capsys.readouterr()
    return committed


def test_pages_are_up_to_date_with_the_results(committed, capsys):
    assert results_pages.main(["--check"]) == 0, capsys.readouterr().out


def write_record(checkout: Path, record: dict) -> Path:
    folder = checkout / "benchmarks" / "results" / "made-up"
    folder.mkdir(exist_ok=True)
    path = folder / Path(record["file"]).name
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "file"}))
    return path


def block(checkout: Path, name: str, page: str = "docs/benchmarks.md") -> str:
    text = (checkout / page).read_text()
    return text.partition(f"<!-- results: begin {name} -->")[2].partition(
        f"<!-- results: end {name} -->"
    )[0]


def test_results_of_a_gpu_add_a_table_a_picture_and_rooflines(checkout, capsys):
    assert results_pages.NOTHING_ON_A_GPU in block(checkout, "gpu")
    fast = {
        "eager": timed(eager=9.0),
        "Inf-CL, compiled": timed(eager=3.0),
        "fused": timed(eager=1.0) | {"peak_bytes": 2**27},
    }
    path = write_record(checkout, gpu_record("masked_info_nce", "clip-65536", fast))
    write_record(
        checkout,
        gpu_record(
            "query_pooling", "fluid", {"nn.MultiheadAttention": timed(eager=1.0)}, quick=True
        ),
    )
    assert results_pages.main(["--check"]) == 1
    assert "docs/benchmarks.md: block gpu differs from the files" in capsys.readouterr().out
    assert results_pages.main([]) == 0
    made = block(checkout, "gpu")
    row = (
        "| clip-65536: B=65536 D=768 K=1 | Inf-CL, compiled | 3000 ms | fused | 1000 ms | 3.00 "
        "| 100% | eager | 256 and 128 |"
    )
    assert (
        row in made
        and "Made-up GPU; bfloat16, forward + backward, medians of 3" in made
        and "torch 2.11.0, triton 3.6.0" in made
    )
    assert (
        "query_pooling" not in made
        and "targets met" in made
        and "](../benchmarks/results/made-up/speedup.png)" in made
        and "](../benchmarks/results/made-up/masked_info_nce-roofline.png)" in made
    )
    shown = block(checkout, "picture", "README.md")  # a GPU's picture instead of the CPU's
    assert "main/benchmarks/results/made-up/speedup.png)" in shown and "Made-up GPU, bf" in shown
    if MATPLOTLIB:
        for name in ("speedup.png", "masked_info_nce-roofline.png"):
            assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
        assert results_pages.main(["--check"]) == 0
    capsys.readouterr()
    write_record(
        checkout, gpu_record("masked_info_nce", "clip-65536", fast | {"fused": timed(eager=1.5)})
    )
    assert results_pages.main(["--check"]) == 1
    output = capsys.readouterr().out
    assert (
        "block gpu" in output
        and "block cpu" not in output
        and "made-up/speedup.png differs from the files" in output
    )


def write_two_cards(checkout: Path, **more) -> None:
    """Write made-up results of an H200 and an H100: of a target and of a case without one."""
    for device, speed in (("NVIDIA H200", 1.0), ("NVIDIA H100 80GB HBM3", 2.0)):
        folder = checkout / "benchmarks" / "results" / report.slug(device)
        folder.mkdir()
        for op, case in (("query_pooling", "fluid"), ("masked_info_nce", "clip-16384-d256")):
            ours = timed(eager=(speed * 8e-4, speed * 3e-4), graph=(speed * 4e-4, speed * 1.6e-4))
            others = {"projected KV + SDPA": timed(eager=speed * 2.4e-3, graph=speed * 2e-3)}
            record = gpu_record(op, case, others | {"fused": ours} | more, (2e-4, 2e-4))
            record["environment"] |= {"device": device}
            record["file"] = f"{folder.name}/{op}-{case}-bfloat16.json"
            (folder / Path(record["file"]).name).write_text(json.dumps(record))


def test_readme_shows_every_card_with_its_picture_table_and_rooflines(checkout):
    write_two_cards(checkout)
    assert results_pages.main([]) == 0
    readme = (checkout / "README.md").read_text()
    status = "Timed on NVIDIA H100 80GB HBM3, NVIDIA H200."
    assert status in readme and "Nothing has been timed" not in readme
    assert all(status in block(checkout, "status", page) for page in PAGES if "index" in page)
    shown = block(checkout, "picture", "README.md")
    for folder in ("nvidia-h100-80gb-hbm3", "nvidia-h200"):
        assert f"main/benchmarks/results/{folder}/speedup.png)" in shown
        for op in ("query_pooling", "masked_info_nce"):
            assert f"[{op}]({results_pages.RAW}/benchmarks/results/{folder}/{op}-roof" in shown
    for times in ("2 ms | fused | 0.4 ms | 5.00 | 100% | graph", "4 ms | fused | 0.8 ms | 5.00"):
        assert f"fluid: B=1024 N=197 D=768 L=32 H=1 | projected KV + SDPA | {times}" in shown
    # The table is of the targets; docs/benchmarks.md has every case, of both cards.
    assert "clip-16384-d256" not in shown and "cpu-2-cores" not in shown
    assert block(checkout, "gpu").count("| clip-16384-d256: B=16384") == 2


def test_notes_compare_what_was_counted_with_what_was_measured(checkout):
    write_two_cards(checkout)
    assert results_pages.main([]) == 0
    made = block(checkout, "outcome", "benchmarks/NOTES.md")
    bounds = json.loads((ROOT / "benchmarks/bounds.json").read_text())["query_pooling/fluid"]
    h200, h100 = (bounds["3.6.0"][card] for card in ("H200", "H100"))
    counted = " / ".join(microseconds(h200[which]["high"]) for which in ("forward", "backward"))
    (line,) = [line for line in made.splitlines() if "`nvidia-h200/query_pooling-fluid" in line]
    assert line.startswith(f"| query_pooling fluid | {counted} | 160 / 240 (fused, graph) |")
    near = [160e-6 / h200["forward"]["high"], 240e-6 / h200["backward"]["high"]]
    far = 480e-6 / h100["backward"]["high"]
    assert all(1 / 1.2 < ratio < 1.2 for ratio in near) and far > 1.2  # bold if off by a fifth
    assert f"| {near[0]:.2f} / {near[1]:.2f} | 125% / 83% | 5.00 x projected KV + SDPA |" in line
    assert f"/ **{far:.2f}** | 62% / 42% |" in made
    assert "clip-16384" not in made and "0123456 |" in line


def test_a_measurement_within_the_range_of_a_count_agrees_with_it():
    assert outcome.ratios([1e-4, 3e-4], [(5e-5, 1.2e-4), (1e-4, 2e-4)]) == "1.00 / **1.50**"
    assert outcome.ratios([1e-4], [(1.1e-4, 1.2e-4)]) == "0.91" and outcome.ratios([1e-4], []) == ""


def test_a_slower_row_of_any_card_is_explained_in_readme_too(checkout, monkeypatch):
    write_two_cards(checkout, composed=timed(eager=1e-5, graph=1e-5))
    assert results_pages.main([]) == 2
    for key in ("query_pooling/fluid", "masked_info_nce/clip-16384-d256"):
        monkeypatch.setitem(results_pages.SLOWER, f"cuda/{key}", f"the reason for {key}.")
    assert results_pages.main([]) == 0
    assert block(checkout, "picture", "README.md").count("the reason for query_pooling/fluid.") == 2


def test_readme_has_no_measured_number_outside_of_its_blocks():
    """Numbers in the blocks come from files of results: the pages are compared with these."""
    text = results_pages.MARKED.sub("", (ROOT / "README.md").read_text())
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    units = r"x|×|times|ms|s|µs|us|seconds?|%|GB|GiB|MB|MiB|GB/s|TB/s|TFLOP/s|FLOPs"
    found = re.findall(rf"\d[\d.,]* ?(?:{units})(?![\w/])", text)
    assert found == ["6 GB"]  # the size of .venv, which is no result


def test_results_of_older_sources_are_shown_with_their_commit(checkout):
    """A record stays valid when sources change."""
    providers = {"eager": timed(eager=9.0), "fused": timed(eager=1.0)}
    for case, commit, dirty in (
        ("clip-65536", "0123456789", False),
        ("clip-65536-k4", "abcdef0123", True),
    ):
        record = gpu_record("masked_info_nce", case, providers)
        record["environment"] |= {"commit": commit, "dirty": dirty, "source": "of another hash"}
        write_record(checkout, record)
    assert results_pages.main([]) == 0
    assert "commit 0123456 / abcdef0 with changes" in block(checkout, "gpu")


def compared(**more) -> comparison.Comparison:
    record = gpu_record(
        "masked_info_nce",
        "clip-65536",
        {"eager": timed(eager=4.0), "fused": timed(eager=1.0)} | more,
    )
    return comparison.compare(record)


def test_the_best_baseline_is_the_fastest_accurate_one():
    assert compared().best == (4.0, "eager") and compared().speedup == 4.0
    assert compared(**{"Inf-CL": timed(eager=0.5, accuracy="failed")}).best == (4.0, "eager")
    for unchecked in ("not checked", "no gate"):  # older records say "no gate"
        ceiling = {"bare GEMMs": timed(eager=0.5, accuracy=unchecked)}
        assert compared(**ceiling).best == (4.0, "eager")
    assert compared(**{"eager, compiled": timed(eager=2.0)}).best == (2.0, "eager, compiled")
    assert compared(composed=timed(eager=2.0)).best == (
        4.0,
        "eager",
    )
    assert compared(composed=timed(eager=0.5)).faster == (0.5, "composed")
    assert compared(fused=timed(accuracy="failed", eager=1.0)) is None
    both_launches = compared(eager=timed(eager=4.0, graph=3.0), fused=timed(eager=1.0, graph=2.0))
    assert (both_launches.launch, both_launches.speedup) == ("graph", 1.5)


def test_a_row_that_is_slower_needs_an_explanation(checkout, capsys, monkeypatch):
    write_record(
        checkout,
        gpu_record(
            "masked_info_nce", "clip-65536", {"eager": timed(eager=1.0), "fused": timed(eager=2.0)}
        ),
    )
    for arguments in ([], ["--check"]):
        assert results_pages.main(arguments) == 2
        output = capsys.readouterr().err
        assert (
            "SLOWER in tools/results_pages.py: got no explanation of "
            "cuda/masked_info_nce/clip-65536" in output
        )
        assert output.count("\n") == 1
    assert results_pages.NOTHING_ON_A_GPU in block(checkout, "gpu")
    monkeypatch.setitem(
        results_pages.SLOWER, "cuda/masked_info_nce/clip-65536", "the reason; do not use it then."
    )
    assert results_pages.main([]) == 0
    assert "`clip-65536` (eager is 2.00 times as fast): the reason; do not use it then." in block(
        checkout, "gpu"
    )


def test_every_explanation_belongs_to_a_slower_row(committed):
    folders = conditions.folders(committed / "benchmarks" / "results")
    rows = [row for folder in folders for row in comparison.comparisons(conditions.read(folder))]
    assert set(results_pages.SLOWER) == {row.key for row in rows if row.faster is not None}


def test_fill_requires_each_marked_block_once():
    marked = "a <!-- results: begin x -->old<!-- results: end x --> b"
    assert results_pages.fill("page", marked, {"x": "new"}) == marked.replace("old", "new")
    assert results_pages.fill("page", marked, {"x": "two\nlines"}) == marked.replace(
        "old", "\ntwo\nlines\n"
    )
    for text, made in ((marked, {}), (marked, {"x": "", "y": ""}), (marked * 2, {"x": ""})):
        with pytest.raises(ValueError, match="expected each block once"):
            results_pages.fill("page", text, made)


def test_tables_of_fluid_require_the_same_seeds_in_all_runs():
    def runs(names, seeds=(0, 1)):
        views = {"image": "image", "text": "text"}
        return {
            f"{name}_{seed}": {
                "modalities": views.get(name, "both"),
                "accuracy": 0.5 + seed / 10,
                "macro_f1": 0.25,
            }
            for name in names
            for seed in seeds
        }

    names = ["full", "image", "text", *(f"no_{part}" for part in grocery.PARTS)]
    assert "| photo + text | 50.0 % | 60.0 % | 55.0 % |" in grocery.classification(runs(names))
    assert "| without moe | 50.0 % | 60.0 % | 55.0 % | 25.0 % |" in grocery.ablation(runs(names))
    with pytest.raises(ValueError, match="got runs without no_gate_1, expected"):
        grocery.ablation({key: found for key, found in runs(names).items() if key != "no_gate_1"})


def test_every_benchmarked_op_has_a_place_in_the_comparison():
    assert set(run.OPS) <= set(comparison.OPS)
