"""Query pooling with many rows of queries, where torch computes the products (products.py)."""

import math

import pytest
import torch
from query_pooling_cases import DEVICE, cast, run

from mmfused.kernels.query_pooling import products
from mmfused.kernels.recording import launches_made
from mmfused.testing import over_budget

SEED = torch.tensor(2**40 + 7, device=DEVICE)


def make(batch, length, dim, queries, heads, per_sample=False):
    def randn(*shape, std=1.0):
        drawn = torch.randn(*shape, dtype=torch.float64) * std
        return drawn.to(DEVICE, torch.float16).requires_grad_()

    width = 8 * heads
    return dict(
        x=randn(batch, length, dim),
        queries=randn(*([batch] if per_sample else []), queries, width),
        w_k=randn(width, dim, std=dim**-0.5),
        w_v=randn(width, dim, std=dim**-0.5),
        b_v=randn(width),
    )


def fused(inputs, heads, upstream, **options):
    with launches_made() as launches:
        got = run(inputs, heads, "fused", upstream, **options)
    assert {launch.name for launch in launches} >= {"softmax_kernel", "dsoftmax_kernel"}
    return got


def upstream_of(inputs):
    batch, queries = inputs["x"].shape[0], inputs["queries"].shape[-2]
    shape = (batch, queries, inputs["w_v"].shape[0])
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize("length, queries, heads", [(1, 33, 1), (65, 9, 4), (257, 3, 12)])
def test_results_stay_within_the_budget(length, queries, heads, per_sample, dropout):
    inputs = make(3, length, 40, queries, heads, per_sample)
    upstream = upstream_of(inputs)
    options = dict(dropout_p=dropout, dropout_seed=SEED) if dropout else {}
    exact = run(cast(inputs, torch.float64), heads, "reference", upstream, **options)
    exact = {name: value if value.norm() > 1e-12 else value * 0 for name, value in exact.items()}
    plain = run(inputs, heads, "reference", upstream, **options)
    assert not over_budget(fused(inputs, heads, upstream, **options), exact, plain)


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
def test_samples_are_processed_in_chunks(monkeypatch, per_sample):
    inputs = make(5, 21, 24, 35, 1, per_sample)
    upstream = upstream_of(inputs)
    want = fused(inputs, 1, upstream)
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * 4 * 21 * 35 + 1)
    with launches_made() as launches:
        got = run(inputs, 1, "fused", upstream)
    names = [launch.name for launch in launches]
    assert names.count("softmax_kernel") == names.count("dsoftmax_kernel") == 3
    for name in ("out", "dx"):
        assert torch.equal(got[name], want[name]), name
    for name, value in got.items():
        assert torch.allclose(value, want[name], rtol=2e-3, atol=2e-3), name


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0)])
def test_without_samples_or_tokens(batch, length, per_sample):
    inputs = make(batch, length, 24, 35, 1, per_sample)
    got = run(inputs, 1, "fused", upstream_of(inputs))
    assert not any(value.any() for value in got.values())


def test_x_need_not_be_contiguous():
    inputs = make(3, 21, 24, 35, 1)
    upstream = upstream_of(inputs)
    want = fused(inputs, 1, upstream)
    x = inputs["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for name, value in fused(inputs | {"x": x}, 1, upstream).items():
        assert torch.equal(value, want[name]), name


def test_what_is_not_finite_stays_in_its_sample():
    inputs = make(3, 21, 24, 35, 1)
    upstream = upstream_of(inputs)
    want = fused(inputs, 1, upstream)
    x = inputs["x"].detach().clone()
    x[1, 4, 5] = math.nan
    got = fused(inputs | {"x": x.requires_grad_()}, 1, upstream)
    assert not got["out"][1].isfinite().any()
    for name in ("out", "dx"):
        assert torch.equal(got[name][::2], want[name][::2]), name


def test_logits_have_no_gradient_if_one_token_has_all_the_weight():
    inputs = make(2, 9, 24, 35, 1, per_sample=True)
    inputs["queries"] = (inputs["queries"].detach() * 300).requires_grad_()
    x, queries, w_k = (inputs[name].double() for name in ("x", "queries", "w_k"))
    weights = torch.softmax(queries @ (x @ w_k.T).mT * 8**-0.5, -1)
    certain = weights.amax(-1) > 1 - 1e-12
    assert certain.float().mean() > 0.5
    got = fused(inputs, 1, upstream_of(inputs))
    assert got["dqueries"].any() and not got["dqueries"][certain].any()


@pytest.mark.parametrize("length", [9, 270])
def test_logits_far_below_zero(length):
    """Where a tile has no token, the logit is 0, and the others are so small that exp overflows."""
    inputs = make(2, length, 24, 35, 1)
    upstream = upstream_of(inputs)
    inputs["x"] = (inputs["x"].detach() * 0.1 + 2).requires_grad_()
    inputs["w_k"] = (inputs["w_k"].detach() * 0.1 + 2).requires_grad_()
    inputs["queries"] = (inputs["queries"].detach() * 0.1 - 1).requires_grad_()
    options = dict(dropout_p=0.1, dropout_seed=SEED)
    exact = run(cast(inputs, torch.float64), 1, "reference", upstream, **options)
    plain = run(inputs, 1, "reference", upstream, **options)
    got = fused(inputs, 1, upstream, **options)
    assert all(value.isfinite().all() for value in got.values())
    assert not over_budget(got, exact, plain)
