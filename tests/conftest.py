"""Settings for all tests.

Without a GPU, kernels run under Triton's interpreter. Memory that mmfused allocates is filled with
NaN.
"""

import functools
import os
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports triton; compile tests use separate processes
    )

# torch and its compiler cache references to torch's functions on first use, so they would not see
# the patched functions below.
with torch.device("meta"):
    torch.empty(0)
torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


def _hasten(interpreter):
    """Cache two steps that the interpreter repeats in every call, saving a third of the time."""
    patch, done = interpreter._patch_lang, set()

    def patch_lang(function):
        if function.__module__ in done:  # within a launch, which has patched `triton.language`
            return None
        scope = patch(function)
        if not done:  # the launch itself: only its patches are undone
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.add(function.__module__)
        return scope

    pointer, find = interpreter.tl.pointer_type, interpreter._get_np_dtype
    find_scalar = functools.cache(find)

    def get_np_dtype(dtype):
        scalar = dtype.scalar
        # A pointer is not hashable.
        return find(scalar) if isinstance(scalar, pointer) else find_scalar(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype


def _accumulate_in_float64(interpreter):
    """Multiply matrices in float64, and round once.

    BLAS rounds a float32 product by the element's place in the matrix and by the type of the CPU.
    On a GPU equal rows give bitwise equal products, and tests rely on that.
    """

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.runtime.interpreter

    _hasten(triton.runtime.interpreter)
    _accumulate_in_float64(triton.runtime.interpreter)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if (
            sys._getframe(1).f_globals.get("__name__", "").startswith("mmfused")
            and tensor.is_floating_point()
        ):
            tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch):
    """Fill empty memory with NaN, so that kernels which read unwritten memory fail."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
