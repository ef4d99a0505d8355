"""Settings and fixtures for all tests.

Without a GPU, kernels run under Triton's interpreter, or with --ptx in the machine of tools/ptx.
"""

import os
import signal
import sys

import numpy as np
import pytest
import torch

# The files that take longest, longest first. They start first: one worker runs a whole file, and
# the others would wait for it at the end.
LONG_FILES = (
    "test_examples.py",
    "test_compile.py",
    "test_packaging.py",
    "test_csrc.py",
    "test_cli.py",
    "test_compile_gated.py",
    "test_kills.py",
    "test_fuse.py",
    "test_masked_info_nce.py",
    "test_topk_routing_values.py",
    "test_gated_cross_attention_fused.py",
    "test_children.py",
    "test_distributed.py",
    "test_export.py",
    "test_compile_moe.py",
    "test_sanitize.py",
    "test_types.py",
    "test_inspect.py",
    "test_distributed_refusals.py",
    "test_on_cuda.py",
    "test_moon2.py",
    "test_grouped_mlp_fused.py",
    "test_query_pooling_values.py",
    "test_uniecs.py",
    "test_topk_routing_fused.py",
    "test_encoders.py",
    "test_folders.py",
)


def pytest_addoption(parser):
    group = parser.getgroup("mmfused")
    group.addoption(
        "--ptx",
        type=int,
        choices=(80, 90),
        help="run the kernels as compiled for sm_80 or sm_90, on the CPU, in tools/ptx",
    )
    group.addoption(
        "--ptx-schedules",
        choices=("plain", "adversarial", "all"),
        default="adversarial",
        help="the orders of execution whose results must be equal (default: adversarial)",
    )
    group.addoption(
        "--ptx-seed",
        type=int,
        default=1,
        help="seed of the random order (default: 1)",
    )


def pytest_configure(config):
    """Choose what runs the kernels, before any test module imports triton."""
    if not config.option.ptx:  # else xdist starts the files with the most tests first
        config.option.loadscopereorder = False
    if config.option.ptx:
        import ptx_plugin

        options = config.option
        try:
            plugin = ptx_plugin.start(options.ptx, options.ptx_schedules, options.ptx_seed)
        except ValueError as error:
            raise pytest.UsageError(f"--ptx: {error}") from error
        config.pluginmanager.register(plugin)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if not config.option.ptx and os.environ.get("TRITON_INTERPRET") == "1":
        import fast_interpreter
        import triton.runtime.interpreter

        fast_interpreter.speed_up(triton.runtime.interpreter)
        _multiply_in_float64(triton.runtime.interpreter)
    _fill_caches()


def pytest_collection_modifyitems(items):
    """Put LONG_FILES first; the order is otherwise unchanged."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def _fill_caches():
    """Use two functions of torch once, which then cache references to torch's functions.

    This must happen before poison_empty_memory replaces some of these functions.
    """
    with torch.device("meta"):
        torch.empty(0)
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


def _multiply_in_float64(interpreter):
    """Multiply matrices in float64, then round the product to the dtype of the accumulator.

    In float32, BLAS may round the products of equal rows differently. Some tests require that equal
    rows give bitwise equal products.
    """

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


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
    # Dynamo lists torch's functions at its first use, and again after a process group was made.
    # The list must hold the original functions.
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    get_torch_obj_rule_map()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def default_sigint_handler():
    """Install Python's SIGINT handler, because a shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
