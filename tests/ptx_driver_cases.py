"""Tests that test_ptx_options.py runs in a process with --ptx; those named faulty must fail."""

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl


class Side(NamedTuple):
    """A tuple that a kernel gets as one argument."""

    x: Any
    bias: Any
    scale: Any


@triton.jit
def scale_kernel(side, flag, first, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(side.x + at, mask=at < N) * side.scale
    if side.bias is not None:
        value += tl.load(side.bias + at, mask=at < N)
    if flag:
        value += 1.0
    tl.store(out_ptr + at, value + (first // 2**32), mask=at < N)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arguments_reach_the_kernel(biased, flag, dtype):
    x = torch.arange(50, dtype=dtype)
    side = Side(x, x + 1 if biased else None, 0.5)
    out = torch.full((50,), -1.0)
    scale_kernel[(2,)](side, flag, 5 * 2**32, out, 50, BLOCK=32)
    want = x.float() * 0.5 + (x.float() + 1 if biased else 0) + flag + 5
    assert torch.equal(out, want)


def test_a_grid_without_blocks_launches_nothing():
    out = torch.full((8,), -1.0)
    scale_kernel[(0,)](Side(out, None, 2.0), False, 2**40, out, 8, BLOCK=32)
    assert (out == -1).all()


def test_inputs_are_the_same_in_each_schedule():
    """The kernel changes its input in place; each of the 128 threads has an element of its own."""
    x = torch.ones(8, requires_grad=True)
    view = x.detach()[2:6]
    scale_kernel[(1,)](Side(view, None, 3.0), False, 2**33, view, 4, BLOCK=128)
    assert x.tolist() == [1, 1, 5, 5, 5, 5, 1, 1]


@triton.jit
def last_kernel(out_ptr, MASKED: tl.constexpr):
    i = tl.arange(0, 32)
    tl.store(out_ptr + i * 0, tl.program_id(0) + i * 0, mask=i == 0 if MASKED else i >= 0)


def test_faulty_results_differ():
    """Each block writes its number to the same element, so the last block decides."""
    last_kernel[(8,)](torch.zeros(4, 3, dtype=torch.int32)[2, 1:], MASKED=True)


def test_faulty_view_is_left():
    """The kernel reads memory of the tensor that is not of the view that it gets."""
    x, out = torch.zeros(64), torch.zeros(64)
    scale_kernel[(2,)](Side(x[:60], None, 2.0), False, 2**40, out, 64, BLOCK=32)


@pytest.mark.not_on_ptx("its reason")
def test_faulty_but_skipped():
    raise AssertionError
