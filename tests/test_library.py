"""The switch, the checks and the registration that all ops share."""

import subprocess
import sys

import pytest
import torch

import mmfused
from mmfused import library
from mmfused.testing import over_budget


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | env)


def test_backend_is_a_context_manager_and_a_setter():
    assert library.current_backend() == "auto"
    with mmfused.backend("reference"):
        assert library.current_backend() == "reference"
        with mmfused.backend("composed"):
            assert library.current_backend() == "composed"
        assert library.current_backend() == "reference"
    assert library.current_backend() == "auto"
    mmfused.backend("composed")
    assert library.current_backend() == "composed"
    mmfused.backend("auto")


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), mmfused.backend("reference"):
        raise KeyError
    assert library.current_backend() == "auto"


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend name is 'fast'; it takes one of auto, reference, composed, fused"):
        mmfused.backend("fast")
    assert library.current_backend() == "auto"


def test_environment_variable():
    done = run_python("import mmfused; print(mmfused.library.current_backend())", MMFUSED_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr
    done = run_python("import mmfused", MMFUSED_BACKEND="quick")
    assert done.returncode and "MMFUSED_BACKEND is 'quick'; it takes one of" in done.stderr


def test_auto_takes_composed_on_a_cpu_and_fused_says_why_not():
    code = """
import torch, mmfused
from mmfused.library import choose
x = torch.zeros(1)
print(choose("op", x.device, x.dtype))
with mmfused.backend("fused"):
    try:
        choose("op", x.device, torch.float64, ["the moon is full"])
    except RuntimeError as error:
        print(error)
"""
    lines = run_python(code).stdout.splitlines()
    assert lines[0] == "composed"
    assert lines[1] == (
        "op: backend 'fused' cannot run here: the tensors are on cpu and the kernels need CUDA; "
        "dtype torch.float64 is none of float32, float16, bfloat16; the moon is full."
    )


def test_reasons_are_complete():
    assert "the tensors are on meta and the kernels need CUDA" in library.why_not_fused("meta", torch.float32)
    assert any("float64" in reason for reason in library.why_not_fused("meta", torch.float64))


def test_tensors_are_checked_by_name():
    x = torch.zeros(2)
    with pytest.raises(TypeError, match="op: y is a list; it takes a torch.Tensor"):
        library.check_tensors("op", x=x, y=[1])
    with pytest.raises(ValueError, match="op: y is on meta but x is on cpu; they must share one device"):
        library.check_tensors("op", x=x, z=None, y=torch.zeros(2, device="meta"))


def test_dtensors_are_refused():
    class DTensor(torch.Tensor):  # the check goes by the type's name, so that it needs no process group
        pass

    with pytest.raises(TypeError, match="op: x is a DTensor; .* FSDP"):
        library.check_tensors("op", x=torch.zeros(2).as_subclass(DTensor))


def test_values_are_checked_on_cpu():
    library.check_value(lambda: torch.tensor(True), "never")
    with pytest.raises(ValueError, match="wrong value"):
        library.check_value(lambda: torch.tensor(False), "wrong value")


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_budget_that_is_not_finite_allows_nothing(number):
    exact, plain = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.0, number])
    wanted = ["x: plain PyTorch's is not finite, which would allow anything."]
    assert over_budget({"x": torch.ones(3)}, {"x": exact}, {"x": plain}) == wanted
