"""Gluon kernels with TMA, mbarriers and specialised warps in the PTX machine (``--ptx 90``)."""

import re
from pathlib import Path

import ptx_gluon_kernels
import pytest
import torch
import triton
from ptx import driver
from ptx.machine import Program
from ptx_gluon_kernels import pool_kernel, ring_matmul_kernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mmfused.kernels import tiles
from mmfused.library import INTERPRETED, KERNELS_ON_CPU

pytestmark = [
    pytest.mark.skipif(INTERPRETED or not KERNELS_ON_CPU, reason="needs --ptx"),
    pytest.mark.skipif(tiles.pretended_arch != 90, reason="sm_80 has no TMA"),
]
HEADS, COLUMNS = 32, 128  # of the pooling kernel


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def describe(tensor, *block):
    element = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
    return TensorDescriptor.from_tensor(tensor, list(block), layout)


def multiply(steps=5, dtype=torch.bfloat16, broken=""):
    """Return a product, and the same in float64."""
    a, b = random(64, 64 * steps, dtype=dtype), random(64, 64 * steps, dtype=dtype).flip(0)
    out = torch.full((64, 64), float("nan"), dtype=dtype)
    tensors = (describe(tensor, 64, 64) for tensor in (a, b, out))
    ring_matmul_kernel[(1,)](*tensors, steps, SLOTS=3, BROKEN=broken)
    return out, a.double() @ b.double().T


def pool(batch=3, tokens=150, broken=""):
    """Return what the tokens of each sample are pooled to, and inputs: tokens and queries."""
    x, q = random(batch * tokens, COLUMNS), random(HEADS, COLUMNS) / 8
    z = torch.full((batch, HEADS, COLUMNS), float("nan"))
    tensors = describe(x, 64, 64), describe(q, HEADS, 64)
    pool_kernel[(2,)](*tensors, z, batch, tokens, SLOTS=2, BROKEN=broken)
    return z, x.view(batch, tokens, COLUMNS).double(), q.double()


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_from_a_ring_of_tiles(steps, dtype):
    out, expected = multiply(steps, dtype)
    bound = expected.abs() * torch.finfo(dtype).eps + expected.abs().max() * 1e-5
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [64, 150, 320])
def test_pooling_with_a_producer_and_two_consumers(tokens):
    z, x, q = pool(tokens=tokens)
    weights = torch.softmax(q @ x.mT, -1)
    # The kernel rounds each weight to bfloat16.
    bound = weights @ x.abs() * torch.finfo(torch.bfloat16).eps
    assert ((z - weights @ x).abs() <= bound).all()


# What each broken variant is reported as (a pattern), and code of the line that is named.
BROKEN_PRODUCTS = {
    "expects too little": [
        ("copy in flight", "acc = warpgroup_mma(a_ring"),
        ("transaction", "mbarrier.expect(full.index(slot), part)"),
    ],
    "expects too much": [("deadlock", "mbarrier.wait(full.index(slot), (step // SLOTS) & 1)")],
    "no wait": [("copy in flight", "acc = warpgroup_mma(a_ring")],
    "refills too soon": [("race", "load(a_desc"), ("race", "load(b_desc")],
    "no wait for the store": [("unfinished", "store(out_desc")],
}
BROKEN_POOLS = {
    "no empty barrier": [("race|copy in flight", "load(x_desc")],
    "no full barrier": [("copy in flight", "load(x_desc")],
}


@pytest.mark.parametrize("broken", BROKEN_PRODUCTS)
def test_a_broken_product_is_reported(broken):
    multiply(broken=broken)
    check_reports(BROKEN_PRODUCTS[broken])


@pytest.mark.parametrize("broken", BROKEN_POOLS)
def test_broken_pooling_is_reported(broken):
    pool(broken=broken)
    check_reports(BROKEN_POOLS[broken])


@pytest.mark.parametrize(
    ("run", "code"), [(multiply, "store(out_desc"), (pool, "z = warpgroup_mma(")]
)
def test_a_missing_fence_is_reported(run, code, monkeypatch):
    """The fences are removed from the PTX: since 3.8, Triton adds those that the source lacks."""

    def without_fences(text):
        assert "fence.proxy.async" in text
        return Program(re.sub(r"fence\.proxy\.async\S*;", "", text))

    monkeypatch.setattr(driver, "program_of", without_fences)
    run()
    check_reports([("missing proxy fence", code)])


@pytest.mark.parametrize("run", [multiply, pool])
def test_each_arrival_wait_and_commit_is_needed(run, monkeypatch):
    """And each fence; not each barrier, of which Triton writes more than these kernels need."""
    needed = re.compile(
        r"\s*(@\S+ )?(mbarrier\.|fence\.proxy|\S+\.(wait|commit)_group)",
    )
    texts, program_of = [], driver.program_of
    monkeypatch.setattr(driver, "program_of", lambda text: texts.append(text) or program_of(text))
    run()
    lines = texts[0].splitlines()
    found = [number for number, line in enumerate(lines) if needed.match(line)]
    assert len(found) > 10
    for number in found:
        is_wait = ".try_wait." in lines[number]  # its loop is in the next line
        program = Program("\n".join(lines[:number] + lines[number + 1 + is_wait :]))
        monkeypatch.setattr(driver, "program_of", lambda _, program=program: program)
        run()
        assert take_reports(), lines[number]


def take_reports():
    return triton.runtime.driver.active.session.take_reports()


def check_reports(expected):
    """Check that there is a report of each kind that names the line with some code."""
    path = Path(ptx_gluon_kernels.__file__)
    lines = path.read_text().splitlines()
    reports = take_reports()
    for kind, code in expected:
        number = next(number for number, line in enumerate(lines, 1) if code in line)
        place = f"{path.parent.name}/{path.name}:{number} "
        report = re.compile(rf"\w+: ({kind}): .*{re.escape(place)}")
        assert any(map(report.match, reports)), (report.pattern, reports)
