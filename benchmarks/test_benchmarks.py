"""Run the cases of benchmarks/run.py under pytest-benchmark.

    pytest benchmarks --benchmark-autosave       save the times
    pytest benchmarks --benchmark-compare        compare the times with saved ones
    pytest benchmarks -k "fluid-block and both"

The batch sizes are those of a full run. Compiled providers are not timed.
"""

from __future__ import annotations

import pytest
import torch

from mmfused.benchmarks import measure, run

pytest.importorskip(
    "pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'mmfused[bench]'"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
OPS = {name: run.load_op(name) for name in run.OPS}
CASES = [
    pytest.param((name, case), id=f"{name}-{case.name}")
    for name, op in OPS.items()
    for case in op.cases(DEVICE.type, quick=False)
]
PROVIDERS = sorted({provider for op in OPS.values() for provider in op.PROVIDERS})


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Return the op, the case and the accuracy check for all providers of the case."""
    name, case = request.param
    return (
        OPS[name],
        case,
        measure.AccuracyCheck(OPS[name], case, OPS[name].make(case, DEVICE, DTYPE)),
    )


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_speed(benchmark, case, name, which):
    op, case, check = case
    if name not in op.PROVIDERS:
        pytest.skip(f"{name} is not a provider of this op")
    provider, entry = check.admit(name, None)
    why = "; ".join([entry["gate"], *entry["reasons"]])
    assert entry["gate"] != "failed" or name not in op.OURS, why
    if provider is None:
        pytest.skip(why)
    copies = measure.rotation(check.problem)
    step = measure.steps(provider, check.problem.upstream, backward=True)[which]
    benchmark.group = f"{case.name} {which}"
    benchmark.extra_info.update(calls=len(copies), dtype=str(DTYPE))
    benchmark.pedantic(burst, (step, copies), rounds=11, warmup_rounds=2)


def burst(step, copies):
    """Call ``step`` once for each copy of the inputs."""
    for inputs in copies:
        step(inputs)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
