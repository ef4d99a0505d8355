"""Tests of the second derivatives of attention."""

import pytest
import torch
from gated_cross_attention_cases import make as make_gated
from query_pooling_cases import DEVICE, PADDINGS, make

import mmfused
from mmfused import query_pooling
from mmfused.ops._sdpa import attention
from mmfused.testing import saved_bytes

SMALL = (2, 4, 5, 3, 2, 4, 4)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("form", ["absorbed", "projected", "auto"])
def test_pooling_has_second_derivatives_in_every_form(monkeypatch, form, norm, dropout_p, padding):
    import query_pooling_cases as cases

    monkeypatch.setitem(cases.SHAPES, "small", SMALL)
    inputs, heads = make("small", norm=norm, padding=padding)
    floats = {name: value for name, value in inputs.items() if value.is_floating_point()}
    fixed = {name: value for name, value in inputs.items() if name not in floats}
    seed = torch.tensor(3, device=DEVICE)

    def call(*values):
        with mmfused.backend("composed"):
            given = dict(zip(floats, values, strict=True)) | fixed
            return query_pooling(
                **given, num_heads=heads, form=form, dropout_p=dropout_p, dropout_seed=seed
            )

    values = tuple(floats.values())
    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize("masks", ["mixed", "none"])
def test_gated_cross_attention_has_second_derivatives(monkeypatch, masks):
    import gated_cross_attention_cases as cases

    monkeypatch.setitem(cases.SHAPES, "small", (3, 2, 3, 4, 2, 4))
    module, inputs, extra = make_gated("small", masks=masks)

    def call(a, b):
        with mmfused.backend("composed"):
            return module(a, b, **extra)

    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def qkv():
    return [
        torch.randn(2, 2, n, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for n in (3, 5, 5)
    ]


@pytest.mark.parametrize("wanted", range(3))
def test_each_input_alone_has_second_derivatives(wanted):
    inputs = qkv()
    fixed = [y.detach() for y in inputs]

    def call(y):
        # The upstream gradient depends on the input too.
        return attention(*fixed[:wanted], y, *fixed[wanted + 1 :]).square().sum()

    assert torch.autograd.gradgradcheck(call, inputs[wanted])


def test_first_derivatives_and_saved_bytes_equal_those_of_torch():
    inputs = qkv()
    upstream = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=DEVICE)
    calls = attention, torch.nn.functional.scaled_dot_product_attention
    got, want = (torch.autograd.grad(call(*inputs), inputs, upstream) for call in calls)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    got, want = (saved_bytes(lambda call=call: call(*inputs), tuple(inputs)) for call in calls)
    assert got == want


def test_a_graph_can_be_differentiated_repeatedly():
    q, k, v = qkv()
    out = attention(q, k, v).square().sum()
    (first,) = torch.autograd.grad(out, q, create_graph=True)
    (plain,) = torch.autograd.grad(out, q, retain_graph=True)
    (second,) = torch.autograd.grad(out, q, create_graph=True)
    torch.testing.assert_close(first.detach(), plain)
    for gradient in (first, second):
        assert torch.autograd.grad(gradient.square().sum(), k, retain_graph=True)[0].any()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(plain.sum(), k)


def test_torch_func_grad_gives_the_same_gradient():
    q, k, v = (y.detach() for y in qkv())
    got = torch.func.grad(lambda q: attention(q, k, v).sum())(q)
    q.requires_grad_()
    (want,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    torch.testing.assert_close(got, want)


def test_a_gradient_with_a_graph_keeps_its_precision_under_autocast():
    q, k, v = (torch.randn(2, 2, n, 8, device=DEVICE, requires_grad=True) for n in (5, 7, 7))
    out = attention(q, k, v).square().sum()
    want = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(out, (q, k, v), create_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
