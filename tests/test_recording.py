"""Tests of recorded launches: what kernels are compiled for, without a GPU."""

from types import SimpleNamespace
from unittest import mock

import inspected_kernels
import pytest
import torch
import triton
from compiling import ROOT, run_python
from inspected_kernels import Inner, Side
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mmfused.cli.compiling import cases_of
from mmfused.kernels.recording import is_descriptor, launches_for, specialize
from mmfused.ops import OPS


def on_meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def on_cpu(meta):
    """Return an argument with CPU tensors in place of meta tensors; its elements share memory."""
    if isinstance(meta, torch.Tensor):
        return torch.zeros(1, dtype=meta.dtype).as_strided(meta.shape, [0] * meta.ndim)
    if isinstance(meta, tuple):
        return type(meta)(*map(on_cpu, meta))
    if is_descriptor(meta):
        fields = {**vars(meta), "base": on_cpu(meta.base)}
        return type(meta)(**fields)
    return meta


def specialised_by_launching(launch, arch):
    """Return what Triton's own launch would compile for, with CPU tensors."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    given = {name: on_cpu(value) for name, value in launch.args.items()}
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(type(kernel), "_do_compile", return_value=None) as compile_,
    ):
        kernel.run(grid=(1,), warmup=True, **given, **launch.constexprs, **launch.options)
    _, signature, _, constexprs, _, attributes, _ = compile_.call_args.args
    return signature, constexprs, attributes


def own_launches():
    with launches_for(90) as launches:
        inspected_kernels.launch(on_meta)
    return launches


def test_members_of_tuples_are_specialised_like_arguments():
    first, second, *_ = own_launches()
    assert list(first.args) == ["side", "out_ptr", "n"] and first.constexprs == {"BN": 128}
    signature, constexprs, attributes = specialize(first, 90)
    assert signature == {
        "side": Side("*bf16", "i32", "constexpr", Inner("*fp32", "constexpr"), "fp32", "i64"),
        "out_ptr": "*fp32",
        "n": "i32",
        "BN": "constexpr",
    }
    assert type(signature["side"]) is Side
    assert constexprs == {(0, 2): None, (0, 3, 1): 1, (3,): 128}
    divisible = {path for path, found in attributes.items() if found}
    assert divisible == {(0, 0), (0, 1), (0, 3, 0), (0, 5), (1,)}
    signature, constexprs, attributes = specialize(second, 90)
    assert signature["side"] == Side("*bf16", "i32", "*fp32", Inner("*fp32", "i32"), "u1", "i32")
    assert constexprs == {(3,): 128}
    divisible = {path for path, found in attributes.items() if found}
    assert divisible == {(0, 0), (0, 1), (0, 2), (0, 3, 0), (1,), (2,)}


def test_descriptors_are_specialised_by_their_block_and_layout():
    *_, tile, _, gluon = own_launches()
    assert specialize(tile, 90).signature["x_desc"] == "tensordesc<bf16[64, 64]>"
    kind = specialize(gluon, 90).signature["x_desc"]
    assert kind.startswith("tensordesc<bf16[64, 64],NVMMASharedLayout(swizzle_byte_width=128")


@pytest.mark.parametrize("name", ["own", *OPS])
def test_launches_are_specialised_as_triton_does_when_it_launches(name):
    if name == "own":
        launches = own_launches()
    else:
        cases = cases_of(name)
        with launches_for(90) as launches:
            cases.launch(next(iter(cases.CASES.values())))
    assert launches
    for launch in launches:
        assert tuple(specialize(launch, 90)) == specialised_by_launching(launch, 90), launch.name


def test_descriptor_in_a_tuple_is_rejected():
    x = on_meta((128, 64), torch.bfloat16)
    tile = TensorDescriptor.from_tensor(x, [64, 64])
    side = Side(x, 32, None, Inner(tile, 1), 0.5, 2)
    message = r"sides_kernel: side\.inner\.bias_ptr: got a tensor descriptor inside of a tuple"
    with launches_for(90), pytest.raises(ValueError, match=message):
        inspected_kernels.sides_kernel[(1,)](side, x, 7, BN=128, **inspected_kernels.OPTIONS)


def test_launch_with_an_unknown_option_is_rejected():
    launch = own_launches()[0]
    launch.options["num_wraps"] = 4
    with pytest.raises(KeyError, match="num_wraps"):
        specialize(launch, 90)


def test_kernels_with_tuples_descriptors_and_loops_compile(tmp_path):
    """Count instructions of which arithmetic says how many there must be."""
    code = """
import pickle
import inspected_kernels, torch
from mmfused.cli import sass
from mmfused.cli.compiling import compiled, job_of
from mmfused.kernels.recording import launches_for

source = open(inspected_kernels.__file__).read().splitlines()
with launches_for(90) as launches:
    inspected_kernels.launch(lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
for launch in launches:
    cubin = compiled(pickle.loads(pickle.dumps(job_of("op", "case", "sm_90", launch)))).asm["cubin"]
    code = sass.read(cubin)
    print(launch.name, code.total.products)
    for loop in code.main_loops:
        print(loop.products, loop.opcodes["LDGSTS"], code.rest.opcodes["STG"])
        lines = sass.read_lines(cubin)
        print(sum(lines.values()) == code.total.instructions)
        [loads] = (n for n, text in enumerate(source, 1) if "acc = tl.dot(" in text)
        print(lines[inspected_kernels.__file__, loads] > 4 + 8)
"""
    path = str(ROOT / "tests")
    done = run_python("-W", "ignore", "-c", code, PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout.splitlines() == [
        "sides_kernel {}",
        "sides_kernel {}",
        "descriptor_kernel {'HGMMA 64x64x16': 4}",
        "product_kernel {'HGMMA 64x64x16': 4}",
        # Two tiles of 64 x 64 of 2 bytes, in copies of 16, and a result of 4 bytes, 128 threads.
        "{'HGMMA 64x64x16': 4} 8 8",
        "True",
        "True",
        "gluon_kernel {}",
    ], done.stderr[-2000:]
