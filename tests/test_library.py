"""The backend switch and the input checks that all ops share."""

import subprocess
import sys
import warnings

import pytest
import torch

import mmfused
from mmfused import library
from mmfused.testing import over_budget


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | env
    )


def test_mmfused_backend_and_mmfused_check_are_read():
    code = "import mmfused.library as l; print(l.current_backend(), l.CHECK_ON_DEVICE)"
    done = run_python(code, MMFUSED_BACKEND="reference", MMFUSED_CHECK="1")
    assert done.stdout.strip() == "reference True", done.stderr
    done = run_python(code, MMFUSED_CHECK="0")
    assert done.stdout.strip() == "auto False", done.stderr
    done = run_python("import mmfused", MMFUSED_BACKEND="quick")
    assert done.returncode and "MMFUSED_BACKEND: got 'quick', expected one of" in done.stderr
    done = run_python("import mmfused", MMFUSED_CHECK="yes")
    assert done.returncode and "MMFUSED_CHECK: got 'yes', expected 1 or 0" in done.stderr


X, W = torch.randn(4, 6), torch.randn(6, 6)
NUMBERS = {
    "query_pooling: scale": lambda t: mmfused.query_pooling(X[None], X, W, W, scale=t),
    "query_pooling: norm_eps": lambda t: mmfused.query_pooling(
        X[None], X, W, W, norm_weight=X[0], norm_eps=t
    ),
    "query_pooling: dropout_p": lambda t: mmfused.query_pooling(X[None], X, W, W, dropout_p=t),
    "masked_info_nce: label_smoothing": lambda t: mmfused.masked_info_nce(
        X, X, temperature=1.0, label_smoothing=t
    ),
    "masked_info_nce: positive_weight": lambda t: mmfused.masked_info_nce(
        X, X, temperature=1.0, positive_weight=t
    ),
    "masked_info_nce: false_negative_margin": lambda t: mmfused.masked_info_nce(
        X, X, temperature=1.0, false_negative_margin=t
    ),
    "topk_routing: jitter": lambda t: mmfused.topk_routing(X, 2, jitter=t),
    "BidirectionalGatedCrossAttention: dropout": lambda t: mmfused.BidirectionalGatedCrossAttention(
        6, 2, dropout=t
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_not_be_a_tensor(name):
    """The gradient of such a tensor would be lost."""
    with pytest.raises(TypeError, match=f"{name}: got a Tensor, expected a number$"):
        NUMBERS[name](torch.tensor(0.1, requires_grad=True))


def test_auto_is_composed_on_a_cpu_and_fused_raises_with_all_reasons():
    code = """
import torch, mmfused
from mmfused.library import choose
x = torch.zeros(1)
print(choose("op", x.device, x.dtype))
with mmfused.backend("fused"):
    try:
        choose("op", x.device, torch.float64, ["dim is odd"])
    except RuntimeError as error:
        print(error)
"""
    lines = run_python(code).stdout.splitlines()
    assert lines[0] == "composed"
    assert lines[1] == (
        "op: backend 'fused' cannot run here: the tensors are on cpu and the kernels need CUDA; "
        "dtype torch.float64 is not float32, float16 or bfloat16; dim is odd"
    )


def test_a_build_of_torch_for_rocm_runs_composed(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with mmfused.backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = library.choose("query_pooling", torch.device("cuda"), torch.bfloat16)
    assert chosen == "composed"
    assert any("ROCm" in reason for reason in library.why_not_fused("cuda", torch.bfloat16))


def test_why_not_fused_lists_the_device_and_the_dtype():
    assert "the tensors are on meta and the kernels need CUDA" in library.why_not_fused(
        "meta", torch.float32
    )
    assert any("float64" in reason for reason in library.why_not_fused("meta", torch.float64))


def test_check_tensors_names_the_wrong_argument():
    x = torch.zeros(2)
    with pytest.raises(TypeError, match="op: y: got a list, expected a torch.Tensor"):
        library.check_tensors("op", x=x, y=[1])
    with pytest.raises(ValueError, match="op: y: got a tensor on meta, expected cpu, where x is"):
        library.check_tensors("op", x=x, z=None, y=torch.zeros(2, device="meta"))


def test_dtensors_are_refused():
    # The check compares the type's name, so this test needs no process group.
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="op: x: got a DTensor, .* FSDP"):
        library.check_tensors("op", x=torch.zeros(2).as_subclass(DTensor))


def test_check_value_raises_on_a_cpu():
    library.check_value(torch.ones(2), lambda x: (x > 0).all(), "never")
    with pytest.raises(ValueError, match="wrong value"):
        library.check_value(torch.zeros(2), lambda x: (x > 0).all(), "wrong value")


@pytest.mark.parametrize("enabled", [False, True])
def test_check_value_asserts_on_a_device_only_if_enabled(enabled, monkeypatch):
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda holds, message: asserted.append(message))
    monkeypatch.setattr(library, "CHECK_ON_DEVICE", enabled)
    computed = []

    def condition(x):
        computed.append(x)
        return (x > 0).all()

    library.check_value(torch.zeros(2, device="meta"), condition, "wrong value")
    assert asserted == ["wrong value"] * enabled
    assert len(computed) == enabled  # computing it would launch kernels


def test_compiled_graphs_assert_values_only_if_enabled():
    code = """
import torch, mmfused

found = []

def find_assertions(graph, inputs):
    found.extend(node for node in graph.graph.nodes if "assert" in str(node.target))
    return graph

target, key, lengths = torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.tensor([3, 4])

def loss(x):
    return mmfused.masked_info_nce(
        x, x, temperature=x.abs().mean(), target=target, candidate_key=key
    )

def route(x):
    return mmfused.topk_routing(
        x, 2, segments=target % 2, num_segments=2, indices=target[:, None] % 2 + target[:2]
    ).weights

def pool(x):
    return mmfused.query_pooling(x[None].expand(2, -1, -1), x, x, x, lengths=lengths)

for enabled in (False, True):
    mmfused.library.CHECK_ON_DEVICE = enabled
    torch._dynamo.reset()
    for call in (loss, route, pool):
        torch.compile(call, backend=find_assertions)(torch.rand(4, 4))
    print(len(found))
"""
    done = run_python(code)
    without, with_checks = map(int, done.stdout.split())
    assert without == 0 and with_checks >= 3, done.stderr


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_over_budget_reports_a_non_finite_baseline(number):
    exact, plain = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.0, number])
    wanted = ["x: plain PyTorch has no finite error, so there is no budget."]
    assert over_budget({"x": torch.ones(3)}, {"x": exact}, {"x": plain}) == wanted
