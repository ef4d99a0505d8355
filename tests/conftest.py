"""Settings and fixtures for all tests.

Without a GPU, kernels run under Triton's interpreter.
"""

import functools
import os
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported

# On first use, torch and its compiler cache references to torch's functions. Use both here, before
# poison_empty_memory replaces some of these functions.
with torch.device("meta"):
    torch.empty(0)
torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


def _speed_up(interpreter):
    """Cache two steps that the interpreter repeats in every call."""
    patch, done = interpreter._patch_lang, set()

    def patch_lang(function):
        if function.__module__ in done:  # this launch has patched the module already
            return None
        scope = patch(function)
        if not done:  # the outermost call of a launch undoes all patches
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.add(function.__module__)
        return scope

    pointer, find = interpreter.tl.pointer_type, interpreter._get_np_dtype
    find_scalar = functools.cache(find)

    def get_np_dtype(dtype):
        scalar = dtype.scalar
        # Pointer types are not hashable.
        return find(scalar) if isinstance(scalar, pointer) else find_scalar(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype


def _multiply_in_float64(interpreter):
    """Multiply matrices in float64, then round the product to the dtype of the accumulator.

    In float32, BLAS may round the products of equal rows differently. Some tests require that equal
    rows give bitwise equal products.
    """

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.runtime.interpreter

    _speed_up(triton.runtime.interpreter)
    _multiply_in_float64(triton.runtime.interpreter)


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
    """Fill uninitialized floating-point tensors of mmfused with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
