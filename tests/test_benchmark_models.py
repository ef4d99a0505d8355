"""Tests of the model benchmark: baselines without mmfused's ops, and loss curves."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfused.benchmarks import measure, models, run, torch_modules
from mmfused.benchmarks.model_steps import STEPS, Case, cases

CPU = torch.device("cpu")
# Functions in mmfused/ops that only call torch: checks, UniECS's packing, FLUID's gate.
PLAIN = {"pack_passes", "unit_rows", "<listcomp>", "check_temperature", "valid_or_nan", "share"}


def tiny(name: str) -> Case:
    return Case(name, 16 if name == "unite" else 6, small=True)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Hide the GPU, and replace the slow measurement of the ceilings by fixed numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        measure, "ceilings", lambda *_: {"flops_per_second": 1e11, "bytes_per_second": 1e10}
    )


@pytest.fixture(scope="module", params=STEPS)
def check(request):
    """Return an accuracy check in float64, where all providers agree up to rounding."""
    case = tiny(request.param)
    return measure.AccuracyCheck(models, case, models.make(case, CPU, torch.float64))


def test_every_provider_computes_the_model(check):
    for name in (models.BASELINE, "composed"):
        results = check.build(models.PROVIDERS[name]).results(check.problem)
        torch.testing.assert_close(models.comparable(results), check.exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(check.plain, check.exact, rtol=1e-9, atol=1e-12)
    parameters = {f"d{name}" for name in (*check.problem.inputs, *check.problem.parameters)}
    assert results.keys() == {"out"} | parameters  # every gradient is compared
    assert all(tensor.count_nonzero() for tensor in check.exact.values())


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def used(check, name: str) -> tuple[set[str], set[str]]:
    """Return the operators and the functions in mmfused/ops that a forward and backward call."""
    provider, functions = check.build(models.PROVIDERS[name]), set()

    def note(frame, event, _):
        if event == "call" and "/mmfused/ops/" in frame.f_code.co_filename.replace("\\", "/"):
            functions.add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with Operators() as operators:
            provider.results(check.problem)
    finally:
        sys.setprofile(before)
    return operators.names, functions


def test_the_baseline_calls_no_op_of_mmfused(check):
    operators, functions = used(check, models.BASELINE)
    assert operators and not [name for name in operators if name.startswith("mmfused")]
    assert functions <= PLAIN, functions - PLAIN
    # The composed provider calls ops, and ``used`` finds the calls.
    assert not used(check, "composed")[1] <= PLAIN


@pytest.mark.parametrize("name", [name for name in STEPS if name != "unite"])
def test_a_baseline_with_a_wrong_weight_fails_the_check(name):
    check = measure.AccuracyCheck(models, tiny(name), models.make(tiny(name), CPU, torch.float32))
    provider = check.build(models.torch_modules)
    assert result_of(check, provider) == "passed"
    with torch.no_grad():
        [
            p
            for name, p in provider.module.named_parameters()
            if name.endswith("weight") and p.dim() > 1
        ][-1].mul_(1 + 1e-3)
    assert result_of(check, provider) == "failed"


def test_a_baseline_with_a_wrong_temperature_fails_the_check():
    check = measure.AccuracyCheck(
        models, tiny("unite"), models.make(tiny("unite"), CPU, torch.float32)
    )
    provider = check.build(models.torch_modules)
    assert result_of(check, provider) == "passed"
    config = provider.module.model.config
    type(provider.module.model).config = dataclasses.replace(
        config, temperature=config.temperature * 1.01
    )
    assert result_of(check, provider) == "failed"


def result_of(check, provider) -> str:
    check.build = lambda builder: provider
    return check.admit(models.BASELINE, None)[1]["gate"]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Run all cases. Return the exit status, and the written records by file name."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(
            measure, "ceilings", lambda *_: {"flops_per_second": 1e11, "bytes_per_second": 1e10}
        )
        code = run.main(["models", "--quick", "--repeats", "1", "--out", str(folder)])
    return code, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_run_writes_times_and_loss_curves(quick_run):
    code, records = quick_run
    assert code == 0 and records.keys() == {f"models-{name}-float32" for name in STEPS}
    for record in records.values():
        for name in (models.BASELINE, "composed"):
            provider = record["providers"][name]
            steps = set() if record["case"]["name"] == "unite" else {"step"}
            assert (
                provider["gate"] == "passed"
                and provider["seconds"]["eager"].keys() == {"forward", "backward", "both"} | steps
            )
        assert record["providers"]["fused"]["gate"] == "unavailable"
        curves = record["curves"]
        assert curves["losses"].keys() == {
            models.BASELINE,
            f"{models.BASELINE}, float64",
            "composed",
        }
        for losses in curves["losses"].values():
            assert len(losses) == models.TRAINED and losses[-1] < 0.95 * losses[0]
        assert curves["difference"]["composed"] <= curves["bound"] < 1e-2 and not record["faults"]


def test_a_different_loss_curve_is_a_fault(monkeypatch, tmp_path, capsys):
    def other(case, device, dtype):
        provider = models._provider(models.library, "composed", case, device, dtype)
        provider.module.register_forward_hook(lambda module, args, out: out * 1.01)
        return provider

    case = tiny("unite")
    monkeypatch.setitem(models.PROVIDERS, "composed", other)
    found = models.extras(case, CPU, torch.float32)
    assert (
        found["curves"]["difference"]["composed"] == pytest.approx(0.01, rel=0.01)
        and "losses: got a relative difference" in found["faults"][0]
    )
    monkeypatch.undo()
    monkeypatch.setattr(
        measure, "ceilings", lambda *_: {"flops_per_second": 1e11, "bytes_per_second": 1e10}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "extras", lambda *_: found)
    assert (
        run.main(
            [
                "models",
                "--quick",
                "--case",
                "unite",
                "--forward",
                "--repeats",
                "1",
                "--out",
                str(tmp_path),
            ]
        )
        == 1
    )
    assert "losses: got a relative difference" in capsys.readouterr().out


def test_work_of_unite_matches_a_count_by_hand():
    """The work is one matrix product over all pairs in the forward, and two in the backward."""
    (case,) = [case for case in cases("cpu", quick=True) if case.name == "unite"]
    work, rows = models.work(case, itemsize=4), 3 * case.B * 24 * 4
    assert work["forward"] == [
        {"stage": "all", "flops": 2 * case.B * 2 * case.B * 24, "bytes": rows}
    ]
    assert work["backward"] == [
        {"stage": "all", "flops": 4 * case.B * 2 * case.B * 24, "bytes": 2 * rows}
    ]


def test_the_model_benchmark_rejects_a_shape(capsys):
    assert run.main(["models", "--shape", "B=3"]) == 2
    assert "models: shape: got" in capsys.readouterr().err


def test_replacing_a_missing_function_is_an_error():
    with pytest.raises(AttributeError, match="has no topk_router"):
        torch_modules.copy_of("fluid", topk_router=None)
