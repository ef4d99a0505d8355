"""Tensor descriptors in the PTX machine (``--ptx``): TMA on sm_90, pointers on sm_80."""

import pytest
import torch
from ptx_tma_kernels import (
    matmul_kernel,
    project_kernel,
    shift_kernel,
    sum_kernel,
    transpose_kernel,
)
from triton.tools.tensor_descriptor import TensorDescriptor

from mmfused.kernels import tiles
from mmfused.library import INTERPRETED, KERNELS_ON_CPU

pytestmark = pytest.mark.skipif(INTERPRETED or not KERNELS_ON_CPU, reason="needs --ptx")


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def describe(tensor, *block, **options):
    return TensorDescriptor.from_tensor(tensor, list(block), **options)


def close(found, expected):
    """Check a result against float64: half a rounding of its dtype, and float32 sums."""
    eps = torch.finfo(found.dtype).eps
    bound = expected.abs() * eps + expected.abs().max() * 1e-5
    return bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("rows", [192, 150])
def test_a_persistent_projection_with_descriptors(rows):
    parts, c, d = 2, 64, 64
    x, w = random(rows, d), random(parts * c, d)
    bias, rstd = random(parts * c, dtype=torch.float32), random(rows, dtype=torch.float32)
    out = torch.full((rows, parts * c), float("nan"), dtype=torch.bfloat16)
    project_kernel[(4,)](
        describe(x, 64, d), w, bias, rstd, describe(out, 64, c), rows, D=d, C=c, PARTS=parts
    )
    assert close(out, rstd.double()[:, None] * (x.double() @ w.double().T) + bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipelined_product_with_descriptors(dtype):
    """K is no multiple of the tile: what lies outside is zero."""
    m, n, k = 100, 72, 328
    a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype)
    out = torch.full((m, n), float("nan"), dtype=dtype)
    matmul_kernel[(2, 2)](describe(a, 64, 64), describe(b, 64, 64), describe(out, 64, 64), k)
    assert close(out, a.double() @ b.double().T)


# Only TMA reduces 16-bit numbers.
SUMMED = [torch.int32, torch.float16] if tiles.pretended_arch == 90 else [torch.int32]


@pytest.mark.parametrize("kind", ["add", "min", "max"])
@pytest.mark.parametrize("dtype", SUMMED)
def test_programs_reduce_into_a_tensor(kind, dtype):
    """Sums of small integers are exact, so that they do not depend on the order of the programs."""
    x = torch.randint(-20, 20, (5, 16, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((16, 32), 7, dtype=dtype)
    sum_kernel[(5,)](describe(x, 1, 16, 32), describe(out, 16, 32), KIND=kind)
    every = torch.cat([x, torch.full_like(x[:1], 7)])
    expected = {"add": every.sum(0), "min": every.amin(0), "max": every.amax(0)}[kind]
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("padding", ["zero", "nan"])
@pytest.mark.parametrize("at", [(0, 0), (-3, 8), (20, 40), (5, -8), (100, 0)])
def test_elements_outside_of_the_tensor_are_zero_or_nan(at, padding):
    x = random(24, 48, dtype=torch.float32)[:, :44]
    fill = 0.0 if padding == "zero" else float("nan")
    out = torch.full((16, 32), -1.0)
    shift_kernel[(1,)](describe(x, 16, 32, padding=padding), out, *at, ROWS=16, COLS=32)
    wide = torch.full((400, 400), fill)
    wide[200:224, 200:244] = x
    expected = wide[200 + at[0] :, 200 + at[1] :][:16, :32]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_a_kernel_makes_its_descriptors():
    x = random(100, 40)
    out = torch.zeros(40, 104, dtype=torch.bfloat16)[:, :104]
    x = torch.cat([x, x[:4]])
    transpose_kernel[(4, 2)](x, out, 104, 40, BLOCK=32)
    assert torch.equal(out, x.T)
