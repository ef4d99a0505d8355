"""HeadProduct, with which the fused backend multiplies queries and pooled tokens by head."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmfused.ops.query_pooling.autograd import HeadProduct


def make(dtype=torch.float64):
    shapes = (5, 3, 4), (3, 4, 6), (3, 6)
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_derivatives(with_bias, scale):
    a, b, bias = make()
    bias = bias if with_bias else None
    want = scale * torch.einsum("mhk,hkn->mhn", a, b) + (0 if bias is None else bias)
    assert torch.allclose(HeadProduct.apply(a, b, bias, scale), want, atol=1e-12)
    inputs = (a, b, bias, scale)
    assert torch.autograd.gradcheck(HeadProduct.apply, inputs)
    assert torch.autograd.gradgradcheck(HeadProduct.apply, inputs)


def test_results_lie_in_the_order_of_the_next_product():
    a, b, bias = make()
    out = HeadProduct.apply(a, b, bias, 0.5)
    da, db = torch.autograd.grad(out, (a, b), torch.randn_like(out))
    assert out.is_contiguous() and da.is_contiguous() and db.is_contiguous()
    b = b.detach().mT.contiguous().mT.requires_grad_()
    (db,) = torch.autograd.grad(HeadProduct.apply(a, b, bias, 0.5), b, torch.randn_like(out))
    assert db.stride() == b.stride()


@pytest.mark.parametrize("frozen", range(3))
def test_no_gradient_is_computed_that_nobody_needs(frozen):
    inputs = make()
    inputs[frozen].requires_grad_(False)
    needed = [x for x in inputs if x.requires_grad]
    out = HeadProduct.apply(*inputs, 0.5)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, needed, torch.ones_like(out))
    products = sum(x.dim() == 3 for x in needed)
    assert counter.get_total_flops() == products * 2 * 5 * 3 * 4 * 6


def test_compiled_and_eager_agree():
    inputs = make(torch.float32)

    def step(compute):
        out = compute(*inputs, 0.25)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    compiled = torch.compile(HeadProduct.apply, backend="aot_eager", fullgraph=True)
    for got, want in zip(step(compiled), step(HeadProduct.apply), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
