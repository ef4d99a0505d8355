"""Tests of the benchmarks: written files, the accuracy check before timing, rejected arguments."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmfused import cli
from mmfused.benchmarks import (
    gated_cross_attention,
    grouped_mlp,
    masked_info_nce,
    measure,
    query_pooling,
    run,
    tables,
    topk_routing,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = ("query_pooling", "--shape", "B=2,N=16,D=32,L=4,H=2", "--repeats", "2", "--no-compile")
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
STEM = "query_pooling-custom-B2-N16-D32-L4-H2"


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Hide the GPU, and replace the slow measurement of the ceilings by fixed numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        measure, "ceilings", lambda *_: {"flops_per_second": 1e11, "bytes_per_second": 1e10}
    )


def broken(error):
    """Return a builder of the composed provider with a relative ``error`` in ``w_v``."""

    def build(case, device, dtype):
        provider = query_pooling.composed(case, device, dtype)
        load = provider.load
        provider.load = lambda parameters: load(
            parameters | {"w_v": parameters["w_v"] * (1 + error)}
        )
        return provider

    return build


def record(folder: Path) -> dict:
    (path,) = folder.glob(f"{STEM}-*.json")
    return json.loads(path.read_text())


def test_run_writes_samples_table_and_plots(tmp_path, capsys):
    assert run.main([*TINY, "--out", str(tmp_path)]) == 0
    found = record(tmp_path)
    assert found.keys() >= {
        "op",
        "case",
        "dtype",
        "backward_is",
        "environment",
        "ceilings",
        "work",
        "floor_seconds",
        "providers",
    }
    assert found["environment"].keys() >= {
        "versions",
        "device",
        "platform",
        "threads",
        "commit",
        "dirty",
        "started",
    }
    assert found["environment"]["versions"].keys() >= {"mmfused", "python", "torch", "triton"}
    for name in ("nn.MultiheadAttention", "projected KV + SDPA", "composed"):
        provider = found["providers"][name]
        assert provider["gate"] == "passed" and provider["saved_bytes"] > 0
        passes = provider["seconds"]["eager"]
        assert {which: len(samples) for which, samples in passes.items()} == {
            "forward": 2,
            "both": 2,
            "backward": 2,
        }
        assert passes["backward"] == [
            both - forward for both, forward in zip(passes["both"], passes["forward"], strict=True)
        ]
    assert (
        found["providers"]["fused"]["gate"] == "unavailable"
        and found["providers"]["fused"]["reasons"]
    )

    with (tmp_path / "query_pooling.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = sum("seconds" in provider for provider in found["providers"].values())
    assert len(rows) == 3 * timed and {row["pass"] for row in rows} == {
        "forward",
        "backward",
        "both",
    }
    for name in (f"{STEM}-float32.png", "query_pooling-roofline.png"):
        assert not MATPLOTLIB or (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
    assert "composed is faster" in capsys.readouterr().out


def test_fastest_of_ours_returns_the_fastest_provider_of_a_launch():
    def timed(**launches):
        seconds = {launch: {"both": [time] * 3} for launch, time in launches.items()}
        return {"gate": "passed", "seconds": seconds}

    found = {
        "backward": True,
        "providers": {
            "eager": timed(eager=0.1),
            "composed": timed(eager=2.0, graph=4.0),
            "fused": timed(eager=3.0, graph=1.0),
            "fused C++": {"gate": "unavailable", "reasons": ["not built"]},
        },
    }
    ours = ("composed", "fused", "fused C++")
    assert tables.fastest_of_ours(found, ours, "eager") == ("composed", 2.0)
    assert tables.fastest_of_ours(found, ours, "graph") == ("fused", 1.0)
    assert tables.fastest_of_ours(found, ("fused C++",), "eager") is None


def test_quick_run_does_not_replace_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    assert run.main(["query_pooling", "--case", "bottleneck", "--quick", "--repeats", "1"]) == 0
    assert (tmp_path / run.SCRATCH / "query_pooling-bottleneck-float32.json").is_file()
    assert run.main([*TINY, "--forward"]) == 0
    assert len(list(tmp_path.glob(f"results/*/{STEM}-float32.json"))) == 1


def test_run_without_matplotlib_draws_no_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run.main([*TINY, "--forward", "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed, so no picture was drawn." in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert record(tmp_path)["providers"]["composed"]["seconds"]["eager"].keys() == {"forward"}


def test_table_keeps_the_results_of_earlier_cases(tmp_path):
    for length in (5, 6):
        shape = f"B=1,N={length},D=8,L=2,H=1"
        assert (
            run.main(
                [
                    "query_pooling",
                    "--shape",
                    shape,
                    "--repeats",
                    "1",
                    "--forward",
                    "--out",
                    str(tmp_path),
                ]
            )
            == 0
        )
    with (tmp_path / "query_pooling.csv").open() as file:
        cases = {row["case"] for row in csv.DictReader(file)}
    assert cases == {"custom-B1-N5-D8-L2-H1", "custom-B1-N6-D8-L2-H1"}


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_composed_provider_that_fails_the_check_is_an_error(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(query_pooling.PROVIDERS, "composed", broken(error))
    assert run.main([*TINY, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "relative error" in printed and "is faster" not in printed
    providers = record(tmp_path)["providers"]
    assert providers["composed"]["gate"] == "failed" and "seconds" not in providers["composed"]
    assert "seconds" in providers["nn.MultiheadAttention"]


def test_baseline_that_fails_the_check_is_reported_and_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(query_pooling.PROVIDERS, "projected KV + SDPA", broken(1e-4))
    assert run.main([*TINY, "--out", str(tmp_path)]) == 0
    providers = record(tmp_path)["providers"]
    assert (
        providers["projected KV + SDPA"]["gate"] == "failed"
        and "seconds" not in providers["projected KV + SDPA"]
    )
    assert "seconds" in providers["composed"]
    assert "failed: " in capsys.readouterr().out


def test_compiling_is_skipped_if_the_budget_is_spent(tmp_path):
    assert run.main([*TINY[:-1], "--compile", "--budget-seconds", "0", "--out", str(tmp_path)]) == 0
    compiled = record(tmp_path)["providers"]["composed, compiled"]
    assert compiled["gate"] == "skipped" and "budget" in compiled["reasons"][0]


@pytest.mark.parametrize(
    "case", query_pooling.cases("cuda", quick=False), ids=lambda case: case.name
)
def test_every_provider_computes_the_same_function(case):
    """Compare outputs and gradients of all cases, in smaller sizes and float64."""
    small = query_pooling.Case(case.name, 2, 5, 24, min(case.L, 3), case.H, case.block)
    problem = query_pooling.make(small, torch.device("cpu"), torch.float64)
    check = measure.AccuracyCheck(query_pooling, small, problem)
    compared = set()
    for name in query_pooling.PROVIDERS:
        try:
            results = check.build(query_pooling.PROVIDERS[name]).results(problem)
        except measure.Unavailable:
            continue
        torch.testing.assert_close(
            query_pooling.comparable(results), check.exact, rtol=1e-10, atol=1e-12
        )
        compared.add(name)
    assert compared >= {"composed", "projected KV + SDPA"}
    assert ("nn.MultiheadAttention" in compared) == case.block


def test_work_of_pooling_matches_the_formulas():
    """With R = H L, a sample takes 4 R N D + 2 L D^2 FLOPs forward, 10 R N D + 4 L D^2 backward."""
    case = query_pooling.Case("", 1024, 197, 768, 32, 1, block=False)
    work = query_pooling.work(case, itemsize=2)
    by_pass = {
        which: sum(s["flops"] for s in stages if s["stage"] != "queries") / case.B
        for which, stages in work.items()
    }
    assert by_pass == {
        "forward": 4 * 32 * 197 * 768 + 2 * 32 * 768**2,
        "backward": 10 * 32 * 197 * 768 + 4 * 32 * 768**2,
    }
    pool = {
        which: next(s for s in stages if s["stage"] == "pool")["bytes"] / case.B
        for which, stages in work.items()
    }
    assert pool == {"forward": 2 * (197 + 32) * 768, "backward": 2 * 2 * (197 + 32) * 768}
    floors = measure.floor_seconds(work, {"flops_per_second": 790e12, "bytes_per_second": 4.3e12})
    assert floors["forward"] == pytest.approx(133e-6, rel=0.01)
    assert floors["both"] == floors["forward"] + floors["backward"]


NO_SUCH_OP = f"op: got 'no_such_op', expected one of {', '.join(run.OPS)}"
REJECTED = [
    (("no_such_op",), NO_SUCH_OP),
    (
        ("query_pooling", "--case", "nope"),
        "query_pooling on cpu: case: got 'nope', expected one of fluid, ",
    ),
    (("query_pooling", "--shape", "B=2,Q=3"), "shape: got Q, expected B, N, D, L, H"),
    (
        ("query_pooling", "--shape", "B=two"),
        "shape: got 'B=two', expected sizes such as B=8,N=197",
    ),
    (("query_pooling", "--shape", "D=10,H=3"), "expected positive sizes where H divides D"),
    (
        ("query_pooling", "--shape", "B=2", "--slice", "1/2"),
        "shape: got 'B=2' with case or slice, expected shape alone",
    ),
    (
        ("query_pooling", "--slice", "4/3"),
        "slice: got '4/3', expected I/N with 1 <= I <= N, such as 1/3",
    ),
    (("query_pooling", "--dtype", "int8"), "dtype: got 'int8', expected one of bf16, fp16, fp32"),
    (("query_pooling", "--repeats", "0"), "repeats: got 0, expected at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REJECTED)
@pytest.mark.parametrize(
    "main",
    [run.main, lambda arguments: cli.main(["bench", *arguments])],
    ids=["run.py", "mmfused bench"],
)
def test_rejected_arguments_give_a_one_line_error(main, arguments, message, capsys):
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_slices_together_contain_every_case():
    cases = query_pooling.cases("cuda", quick=False)
    parts = [run.sliced(cases, f"{part}/3") for part in (1, 2, 3)]
    assert sorted(case.name for part in parts for case in part) == sorted(
        case.name for case in cases
    )


def test_run_py_works_in_any_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "no_such_op"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith(f"{NO_SUCH_OP}\n")


@pytest.mark.parametrize("modalities", [1, 3])
def test_masked_info_nce_providers_pass_the_check(tmp_path, modalities):
    shape = f"B=50,D=16,K={modalities}"
    assert (
        run.main(
            [
                "masked_info_nce",
                "--shape",
                shape,
                "--repeats",
                "1",
                "--no-compile",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    (file,) = tmp_path.glob("masked_info_nce-*.json")
    found = json.loads(file.read_text())["providers"]
    results = {name: entry["gate"] for name, entry in found.items()}
    assert results["eager"] == results["checkpointed chunks"] == results["composed"] == "passed"
    assert results["bare GEMMs"] == ("not checked" if modalities == 1 else "unavailable")
    assert results["torch linear_cross_entropy"] in (
        {"passed", "unavailable"} if modalities == 1 else {"unavailable"}
    )
    assert found["composed"]["saved_bytes"] < 50 * 50 * 4


def test_work_of_masked_info_nce_matches_a_count_by_hand():
    case = masked_info_nce.Case("hand", B=10, D=4, K=2)
    work = masked_info_nce.work(case, itemsize=2)
    assert work["forward"] == [{"stage": "logits", "flops": 2 * 50 * 4, "bytes": 160}]
    assert [stage["flops"] for stage in work["backward"]] == [400, 800]
    key = masked_info_nce.modality(case, torch.device("cpu"))
    assert (
        key.bincount().tolist() == [5, 5]
        and masked_info_nce.modality(masked_info_nce.Case("", 10, 4), "cpu") is None
    )


@pytest.mark.parametrize("shape", ["T=40,E=6,k=3", "T=40,E=6,k=3,D=16,S=2"])
def test_topk_routing_providers_pass_the_check(tmp_path, shape):
    results = results_of_run("topk_routing", shape, tmp_path)
    assert results["eager"] == results["composed"] == "passed"
    assert (
        results["eager, 16-bit product"]
        == results["fused C++"]
        == results["fused"]
        == "unavailable"
    )


def test_grouped_mlp_providers_pass_the_check(tmp_path):
    results = results_of_run("grouped_mlp", "T=40,D=16,I=24,E=6,k=2", tmp_path)
    assert results["eager loop"] == results["dense, all experts"] == results["composed"] == "passed"
    # On a CPU, grouped_mm is available since torch 2.11.
    assert results["grouped_mm pattern"] in ("passed", "failed", "unavailable")
    assert results["Liger fused_moe"] == results["fused"] == "unavailable"


def test_gated_cross_attention_providers_pass_the_check(tmp_path):
    results = results_of_run("gated_cross_attention", "B=3,N=10,M=7,D=24,H=3", tmp_path)
    assert {results[name] for name in ("SDPA", "eager", "nn.MultiheadAttention", "composed")} == {
        "passed"
    }
    others = (
        "SDPA, samples with both gathered",
        "SDPA efficient",
        "SDPA cuDNN",
        "FlexAttention",
        "varlen_attn",
        "fused",
    )
    assert {results[name] for name in others} == {"unavailable"}


def results_of_run(op, shape, folder) -> dict[str, str]:
    assert (
        run.main([op, "--shape", shape, "--repeats", "1", "--no-compile", "--out", str(folder)])
        == 0
    )
    (file,) = folder.glob(f"{op}-*.json")
    return {
        name: entry["gate"] for name, entry in json.loads(file.read_text())["providers"].items()
    }


@pytest.mark.parametrize(
    "case", topk_routing.cases("cuda", quick=False), ids=lambda case: case.name
)
def test_routers_compute_the_same_function(case):
    """Compare outputs and gradients of all cases, in smaller sizes and float64.

    The order of the rows is compared separately, because no output depends on the order.
    """
    small = replace(case, T=50, D=case.D and 24)
    problem = topk_routing.make(small, torch.device("cpu"), torch.float64)
    problem.inputs = {
        name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()
    }
    check = measure.AccuracyCheck(topk_routing, small, problem)
    found = {}
    for name in ("eager", "composed"):
        provider = check.build(topk_routing.PROVIDERS[name])
        torch.testing.assert_close(provider.results(problem), check.exact, rtol=1e-10, atol=1e-10)
        found[name] = [tensor.long() for tensor in provider.module.sorted]
    torch.testing.assert_close(found["eager"], found["composed"], rtol=0, atol=0)


@pytest.mark.parametrize("case", grouped_mlp.cases("cuda", quick=False), ids=lambda case: case.name)
def test_experts_compute_the_same_function(case):
    """Compare outputs and gradients of all cases, in smaller sizes.

    Both float64 and float32 are tested, because torch's grouped_mm rejects float64.
    """
    small = replace(case, T=30, D=16, I=24)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        problem = grouped_mlp.make(small, torch.device("cpu"), dtype)
        check, compared = measure.AccuracyCheck(grouped_mlp, small, problem), set()
        for name, build in grouped_mlp.PROVIDERS.items():
            try:
                results = check.build(build).results(problem)
            except (
                measure.Unavailable,
                NotImplementedError,
            ):
                continue
            results = {
                part: tensor.double() for part, tensor in grouped_mlp.comparable(results).items()
            }
            torch.testing.assert_close(results, check.exact, rtol=tolerance, atol=tolerance)
            compared.add(name)
        assert compared >= {"eager loop", "dense, all experts", "composed"}


@pytest.mark.parametrize(
    "case", gated_cross_attention.cases("cuda", quick=False), ids=lambda case: case.name
)
def test_cross_attentions_compute_the_same_function(case, monkeypatch):
    """Compare outputs and gradients of all cases, in smaller sizes and float64.

    The exact results are computed in chunks.
    """
    monkeypatch.setattr(gated_cross_attention, "EXACT_CHUNK", 3)
    small = replace(case, B=7, N=9, M=6, D=24, H=3)
    problem = gated_cross_attention.make(small, torch.device("cpu"), torch.float64)
    check, compared = measure.AccuracyCheck(gated_cross_attention, small, problem), set()
    for name, build in gated_cross_attention.PROVIDERS.items():
        try:
            results = check.build(build).results(problem)
        except measure.Unavailable:
            continue
        torch.testing.assert_close(
            gated_cross_attention.comparable(results), check.exact, rtol=1e-10, atol=1e-11
        )
        compared.add(name)
    assert compared >= {"SDPA", "eager", "nn.MultiheadAttention", "composed"}
    assert ("SDPA, samples with both gathered" in compared) == case.missing


def test_baseline_with_the_gate_in_triton_passes_the_check(monkeypatch):
    """On a CPU, the gate runs in Triton's interpreter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(gated_cross_attention, "need_kernels", lambda device, dtype: None)
    case = gated_cross_attention.Case("", B=3, N=9, M=6, D=24, H=3)
    problem = gated_cross_attention.make(case, device, torch.float32)
    check = measure.AccuracyCheck(gated_cross_attention, case, problem)
    report = check.admit("SDPA, gate in Triton", None)[1]
    assert report["gate"] == "passed", report
    with pytest.raises(measure.Unavailable, match="there is no gate"):
        gated_cross_attention.triton_gate(replace(case, post_norm=True), device, torch.float32)


def test_results_with_dropout_need_only_be_finite():
    case = gated_cross_attention.Case("", B=2, N=5, M=4, D=8, H=2, p=0.5)
    problem = gated_cross_attention.make(case, torch.device("cpu"), torch.float32)
    check, inputs = (
        measure.AccuracyCheck(gated_cross_attention, case, problem),
        tuple(problem.inputs.values()),
    )
    for name in ("SDPA", "eager", "nn.MultiheadAttention", "composed"):
        provider, report = check.admit(name, None)
        assert report["gate"] == "passed", report
        assert not torch.equal(provider(*inputs), provider(*inputs))
    provider.module.register_forward_hook(
        lambda module, args, out: out * float("nan") if module.training else out
    )
    check.build = lambda builder: provider
    assert check.admit("composed", None)[1]["reasons"] == ["results with dropout are not finite"]


def test_choices_of_experts_have_the_named_distribution():
    shares = {}
    for routed in grouped_mlp.ROUTED:
        found = grouped_mlp.choices(grouped_mlp.Case("", T=2000, D=8, I=8, E=8, k=2, routed=routed))
        assert (found[:, 0] != found[:, 1]).all()
        shares[routed] = found.flatten().bincount(minlength=8) / 2000
    torch.testing.assert_close(shares["uniform"], torch.full((8,), 0.25), rtol=0, atol=0.05)
    assert (shares["zipf"][:-1] > shares["zipf"][1:]).all() and shares["zipf"][0] > 3 * shares[
        "zipf"
    ][-1]
    assert 0.9 < shares["hot"][0] < 0.94 and shares["one-hot"][0] == 1
    assert (shares["half"][4:] == 0).all() and (shares["half"][:4] > 0.4).all()


def test_the_eager_loop_is_not_compiled():
    case = grouped_mlp.Case("", T=8, D=8, I=8, E=2, k=1)
    check = measure.AccuracyCheck(
        grouped_mlp, case, grouped_mlp.make(case, torch.device("cpu"), torch.float32)
    )
    provider, report = check.admit("eager loop", "default")
    assert (
        provider is None
        and report["gate"] == "unavailable"
        and "graph break at each expert" in report["reasons"][0]
    )


# (forward, backward) in microseconds at 790 TFLOP/s and 4.3 TB/s, computed without work().
FLOORS = {
    grouped_mlp: {
        "fluid-512": (36.9, 72.2),
        "fluid-2048": (48.9, 97.9),
        "fluid-16384": (391, 783),
        "swiglu-e8": (179, 359),
        "swiglu-e4": (701, 1403),
        "swiglu-e128": (3132, 6263),
    },
    topk_routing: {
        "fluid-2048": (0.74, 1.51),
        "x-32768-e128": (31.8, 66.6),
        "logits-16384": (0.30, 0.49),
        "logits-131072-e64": (9.8, 15.6),
    },
    gated_cross_attention: {
        "uniecs": (300, 616),
        "uniecs-n50": (125, 254),
        "uniecs-n512": (990, 2115),
        "wide": (1591, 3232),
    },
}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, floors in FLOORS.items() for name in floors]
)
def test_floors_match_independent_numbers(op, name):
    (case,) = [case for case in op.cases("cuda", quick=False) if case.name == name]
    work = op.work(case, itemsize=2)
    if op is topk_routing:  # FLOORS counts only the stage "route"; other stages are short
        work = {
            which: [stage for stage in stages if stage["stage"] == "route"]
            for which, stages in work.items()
        }
    floors = measure.floor_seconds(work, {"flops_per_second": 790e12, "bytes_per_second": 4.3e12})
    assert (1e6 * floors["forward"], 1e6 * floors["backward"]) == pytest.approx(
        FLOORS[op][name], rel=0.02
    )


def test_cross_attention_reads_and_writes_every_token_once():
    """At 4.3 TB/s, this takes 64 us, even if samples lack a modality."""
    for name, expected in (("uniecs", 64), ("uniecs-missing", 64)):
        (case,) = [
            case for case in gated_cross_attention.cases("cuda", quick=False) if case.name == name
        ]
        stages = gated_cross_attention.work(case, itemsize=2)["forward"]
        assert sum(stage["bytes"] for stage in stages) / 4.3e6 == pytest.approx(expected, rel=0.02)
    assert stages[-1] == {"stage": "unchanged", "flops": 0, "bytes": 682 * 4 * 261 * 256}


@pytest.mark.parametrize(
    "call_seconds, on_cuda, samples",
    [(0.001, True, 31), (1.0, True, 20), (30.0, True, 3), (30.0, False, 31)],
)
def test_long_cases_have_fewer_samples_on_a_gpu(call_seconds, on_cuda, samples, monkeypatch):
    """A case of 262144 pairs would otherwise take half an hour."""
    rounds = []

    def interleaved(bursts, repeats, warmup):
        rounds.append((repeats, warmup))
        return {name: [call_seconds] * repeats for name in bursts}

    monkeypatch.setattr(measure, "interleaved_seconds", interleaved)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    bursts = {("one", which): list for which in ("forward", "both")} | {("two", "forward"): list}
    found = measure.seconds(bursts, 1, 31)
    assert len(found["one"]["both"]) == samples and rounds == [(1, 0), (samples, 1)]


@pytest.mark.parametrize("seconds, launches", [(0.05, {"eager", "graph"}), (0.2, {"eager"})])
def test_cases_of_long_calls_have_no_graphs(seconds, launches, monkeypatch):
    def timed(*arguments):
        return {"one": {"forward": [seconds, 2 * seconds], "both": [0.3]}}

    monkeypatch.setattr(measure, "eager_seconds", timed)
    monkeypatch.setattr(measure, "graph_seconds", lambda *arguments: (timed(), {}))
    monkeypatch.setattr(run, "footprint", lambda provider, problem: {})
    settings = SimpleNamespace(device=torch.device("cuda"), repeats=1, backward=True)
    found = {"one": {"reasons": []}}
    run.time_providers({"one": None}, found, None, settings)
    assert set(found["one"]["seconds"]) == launches
