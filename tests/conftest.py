"""Without a GPU, kernels run under Triton's interpreter; memory that mmfused allocates and does not write is NaN."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; compile tests run in processes of their own

with torch.device("meta"):
    torch.empty(0)  # torch notes here, once, what takes a default device; the patched functions below would not be found


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("mmfused") and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch):
    """A kernel that reads what nobody wrote must not pass by luck."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
