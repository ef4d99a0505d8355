"""Tuples and tensor descriptors as arguments of kernels that run in the PTX machine (``--ptx``)."""

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from ptx.arguments import pack_arguments
from triton.tools.tensor_descriptor import TensorDescriptor

from mmfused.kernels import tiles
from mmfused.library import INTERPRETED, KERNELS_ON_CPU

pytestmark = pytest.mark.skipif(INTERPRETED or not KERNELS_ON_CPU, reason="needs --ptx")


class Norm(NamedTuple):
    """Members that may be missing."""

    weight: Any
    bias: Any


class Side(NamedTuple):
    """All kinds of members."""

    x: Any  # a tensor
    norm: Any  # a tuple
    first: Any  # an integer, of up to 64 bits
    scale: Any  # a number
    flag: Any  # a bool
    width: Any  # a constexpr


NO_SIDE = Side(None, None, None, None, None, None)


@triton.jit
def one_side(side, out_ptr, at):
    value = tl.load(side.x + at).to(tl.float32) * side.scale + side.first // 2
    if side.norm.weight is not None:
        value *= tl.load(side.norm.weight + at)
    if side.norm.bias is not None:
        value += tl.load(side.norm.bias + at)
    if side.flag:
        value += 1
    tl.store(out_ptr + at, tl.where(at < side.width, value, -value))


@triton.jit
def sides_kernel(left, right, outs, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    one_side(left, outs[0], at)
    # Not "right is not None": Triton 3.6 cannot compare a tuple that has a member None.
    if right.x is not None:
        one_side(right, outs[1], at)


def expected(side):
    value = side.x.float() * side.scale + side.first // 2
    value = value * (1 if side.norm.weight is None else side.norm.weight)
    value = value + (0 if side.norm.bias is None else side.norm.bias) + side.flag
    return torch.where(torch.arange(32) < side.width.value, value, -value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("first", [1, 6, -(2**33)])
def test_members_of_tuples_reach_the_kernel(dtype, first):
    x, weight, bias = torch.arange(32).to(dtype), torch.arange(32.0) - 9, torch.arange(32.0)
    both = Side(x, Norm(weight, bias), first, 0.5, True, tl.constexpr(16))
    left, right = both._replace(norm=Norm(None, bias), scale=2, flag=False), NO_SIDE
    for sides in [(both, left), (left, right)]:
        outs = torch.zeros(32), torch.zeros(32)
        sides_kernel[(1,)](*sides, outs, BLOCK=32)
        assert torch.equal(outs[0], expected(sides[0]))
        assert torch.equal(outs[1], torch.zeros(32) if right in sides else expected(left))


@triton.jit
def add_kernel(pair, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(pair.weight + at, mask=at < n)
    tl.store(pair.weight + at, value + tl.load(pair.bias + at, mask=at < n), mask=at < n)


def test_tensors_in_tuples_are_the_same_in_each_schedule():
    x = torch.arange(128.0)
    add_kernel[(1,)](Norm(x, torch.full((128,), 3.0)), 128, BLOCK=128)
    assert torch.equal(x, torch.arange(128.0) + 3)


def test_tensors_in_tuples_have_bounds():
    x = torch.arange(128.0)
    add_kernel[(1,)](Norm(x, torch.zeros(128)[:120]), 128, BLOCK=128)
    reports = triton.runtime.driver.active.session.take_reports()
    assert reports and all("out of bounds" in each for each in reports)
    assert "pair.bias+0x1e0 of 0x1e0" in reports[0]


@triton.jit
def copy_kernel(x_desc, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)
    tl.store(out[0] + at, x_desc.load([0, 0]))


@triton.jit
def copy_from_tuple_kernel(inputs, out_ptr, BLOCK: tl.constexpr):
    copy_kernel(inputs[0], (out_ptr,), BLOCK)


def describe(tensor, *block, **options):
    return TensorDescriptor.from_tensor(tensor, list(block), **options)


def test_a_descriptor_in_a_tuple_is_refused():
    descriptor, out = describe(torch.zeros(16, 16), 16, 16), torch.zeros(16, 16)
    message = r"copy_from_tuple_kernel: inputs\.0: got a tensor descriptor in a tuple"
    with pytest.raises(TypeError, match=message):
        copy_from_tuple_kernel[(1,)]((descriptor,), out, BLOCK=16)


def test_a_descriptor_of_another_device_is_refused():
    descriptor, out = describe(torch.zeros(16, 16, device="meta"), 16, 16), torch.zeros(16, 16)
    with pytest.raises(TypeError, match="x_desc: the PTX machine expected a tensor on the CPU"):
        copy_kernel[(1,)](descriptor, (out,), BLOCK=16)


@pytest.mark.skipif(tiles.pretended_arch != 90, reason="Triton refuses clusters on sm_80")
def test_clusters_are_refused():
    descriptor, out = describe(torch.zeros(16, 16), 16, 16), torch.zeros(16, 16)
    with pytest.raises(ValueError, match="copy_kernel: num_ctas: got 2, expected 1"):
        copy_kernel[(1,)](descriptor, (out,), BLOCK=16, num_ctas=2)


@pytest.mark.parametrize(
    ("kind", "fp4", "message"),
    [
        ("tensordesc<u8[16,128]>", True, "no fp4 descriptors"),
        ("tensordesc_im2col<fp16[16,64]>", False, "no im2col descriptors"),
    ],
)
def test_other_descriptors_are_refused(kind, fp4, message):
    descriptor = describe(torch.zeros(16, 128, dtype=torch.uint8), 16, 128)
    with pytest.raises(TypeError, match=f"copy_kernel: x_desc: the PTX machine has {message}"):
        pack_arguments("copy_kernel", {"x_desc": kind}, [descriptor], [{"fp4_padded": fp4}])


def test_a_box_that_cuda_refuses_is_refused():
    how = {"fp4_padded": False, "elem_size": 1, "elem_type": 0, "swizzle": 3}
    descriptor = describe(torch.zeros(16, 256, dtype=torch.uint8), 16, 256)
    with pytest.raises(ValueError, match="copy_kernel: x_desc: box: got a first dimension of 256"):
        pack_arguments(
            "copy_kernel",
            {"x_desc": "tensordesc<u8[16,256]>"},
            [descriptor],
            [how | {"block_size": [16, 256]}],
        )
