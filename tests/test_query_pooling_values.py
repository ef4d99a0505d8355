"""Query pooling with invalid lengths, non-finite values, empty tensors and large logits."""

import math

import pytest
import torch
from query_pooling_cases import DEVICE, DTYPES, cast, make, run, upstream_for
from torch import nn

import mmfused
from mmfused import QueryPooling
from mmfused.testing import over_budget, relative_error

BACKENDS_AND_FORMS = [
    ("reference", "auto"),
    ("composed", "absorbed"),
    ("composed", "projected"),
    ("fused", "absorbed"),
]
BAD_LENGTHS = [-1, 38, 2**40, -(2**40) + 20]


@pytest.fixture
def unchecked(monkeypatch):
    """Skip the checks of values, as on CUDA."""
    monkeypatch.setattr("mmfused.ops._common.check_value", lambda *_: None)


@pytest.mark.parametrize("bad", BAD_LENGTHS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_an_invalid_length_gives_nan_only_for_its_sample(unchecked, backend, form, norm, bad):
    inputs, heads = make(norm=norm, padding="lengths", dtype=torch.float32)
    inputs["lengths"] = torch.tensor([5, 20, 37], device=DEVICE)
    want = run(inputs, heads, backend, form=form)
    inputs["lengths"][1] = bad
    got = run(inputs, heads, backend, form=form)
    assert got["out"][1].isnan().all()
    # A length below 0 counts as no tokens, so the gradients of the weights may be finite.
    assert bad < 0 or got["dw_v"].isnan().all()
    for name in ("out", "dx"):
        assert torch.equal(got[name][0::2], want[name][0::2]), name


def test_a_module_gives_nan_for_an_invalid_length(unchecked):
    pool = QueryPooling(8, 3, 2, out_proj=True, bias=True).to(DEVICE)
    for name in ("reference", "composed"):
        with mmfused.backend(name):
            out = pool(
                torch.randn(4, 5, 8, device=DEVICE),
                lengths=torch.tensor([-1, 6, 0, 5], device=DEVICE),
            )
        assert out[:2].isnan().all() and not out[2].any() and out[3].isfinite().all()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    "shape, value",
    [("one pass", math.nan), ("one pass", math.inf), ("one pass", -math.inf), ("wide", math.nan)],
)
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_a_non_finite_token_or_query_affects_only_its_own_outputs(
    backend, form, shape, norm, value
):
    inputs, heads = make(shape, norm=norm, dtype=torch.float32, per_sample=True)
    want = run(inputs, heads, backend, form=form)
    token = inputs | {"x": inputs["x"].detach().clone()}
    token["x"][1, 3, 4] = value
    token["x"].requires_grad_()
    got = run(token, heads, backend, form=form)
    others = [i for i in range(len(inputs["x"])) if i != 1]
    assert not got["out"][1].isfinite().any()
    for name in ("out", "dx", "dqueries"):
        torch.testing.assert_close(got[name][others], want[name][others], rtol=1e-5, atol=1e-6)

    query = inputs | {"queries": inputs["queries"].detach().clone()}
    query["queries"][1, 2, :] = value
    query["queries"].requires_grad_()
    got = run(query, heads, backend, form=form)
    rows = [i for i in range(inputs["queries"].shape[1]) if i != 2]
    assert not got["out"][1, 2].isfinite().any()
    torch.testing.assert_close(got["out"][others], want["out"][others], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["out"][1, rows], want["out"][1, rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got["dqueries"][1, rows], want["dqueries"][1, rows], rtol=1e-4, atol=1e-5
    )


# ---- empty inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("batch, length, queries", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_empty_inputs_give_zeros(
    monkeypatch, backend, form, batch, length, queries, dropout_p, norm
):
    import query_pooling_cases as cases

    monkeypatch.setitem(cases.SHAPES, "empty", (batch, length, 70, queries, 1, 24, 20))
    inputs, heads = make("empty", norm=norm, dtype=torch.float32)
    got = run(inputs, heads, backend, form=form, dropout_p=dropout_p)
    assert got["out"].shape == (batch, queries, 20)
    for name, value in got.items():
        assert not value.any(), name
        assert name == "out" or value.shape == inputs[name[1:]].shape


def test_a_module_without_tokens_gives_zero():
    for heads in (1, 2):
        pool = QueryPooling(8, 9, heads, out_proj=True, bias=True, norm_kv=True).to(DEVICE)
        for name in ("reference", "composed"):
            with mmfused.backend(name):
                assert not pool(torch.randn(4, 0, 8, device=DEVICE)).any()


# ---- large logits --------------------------------------------------------------------------------


def with_logits_up_to(largest, inputs, heads):
    x, norm = inputs["x"], [inputs.get("norm_weight"), inputs.get("norm_bias")]
    x = x if norm[0] is None else nn.functional.layer_norm(x, x.shape[-1:], *norm)
    q = inputs["queries"].unflatten(-1, (heads, -1)).transpose(0, 1)
    k = (x @ inputs["w_k"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
    factor = largest / ((q @ k.transpose(2, 3)).abs().max() * q.shape[-1] ** -0.5)
    return inputs | {"queries": (inputs["queries"] * factor).detach().requires_grad_()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [1e3, 1e4])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS[1:])
def test_large_logits_stay_within_the_budget(backend, form, shape, norm, logit, dtype):
    """One token has nearly all the weight, so the gradients of the logits nearly vanish.

    Several draws are compared together, because a few rows dominate the error of each draw.
    """
    got, exact, plain = {}, {}, {}
    for _ in range(6):
        inputs, heads = make(shape, norm=norm, padding="mask", dtype=torch.float64)
        inputs = cast(with_logits_up_to(logit, inputs, heads), dtype)
        upstream = upstream_for(inputs)
        doubles = cast(inputs, torch.float64)
        ways = (
            (got, backend, form, inputs),
            (exact, "reference", "auto", doubles),
            (plain, "reference", "auto", inputs),
        )
        for results, name, how, given in ways:
            for key, value in run(given, heads, name, upstream, how).items():
                results[key] = torch.stack([*results.get(key, ()), value])
    # At logits of 10^4, compare only results in which plain PyTorch is accurate.
    if logit > 1e3:
        accurate = [
            key
            for key, value in plain.items()
            if relative_error(value, exact[key]) < 10 * torch.finfo(dtype).eps
        ]
        # bfloat16 rounds a normalised token so that a logit of 10^4 moves by tens.
        inaccurate = shape != "one pass" or (norm and dtype == torch.bfloat16)
        assert "db_v" in accurate and ("out" in accurate or inaccurate)
        got, exact, plain = (
            {key: results[key] for key in accurate} for results in (got, exact, plain)
        )
    assert not over_budget(got, exact, plain)


@pytest.mark.parametrize("logit", [100, 10_000])
@pytest.mark.parametrize("dim", [24, 1100], ids=["one pass", "wide"])
@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_a_large_constant_in_all_logits_does_not_reduce_accuracy(backend, dim, logit):
    """The logits are sums of integers, so plain PyTorch computes them exactly."""
    x = torch.randint(-1, 2, (2, 37, dim), device=DEVICE).float()
    queries = torch.randint(-1, 2, (5, dim), device=DEVICE).float()
    queries[:, 20:] = 0.0
    x[..., 0], queries[:, 0] = 1, logit
    w_v = torch.randn(3, dim, device=DEVICE)
    inputs = dict(x=x, queries=queries, w_k=torch.eye(dim, device=DEVICE), w_v=w_v)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    upstream = torch.randn(2, 5, 3, dtype=torch.float64, device=DEVICE)
    plain, got = (run(inputs, 1, name, upstream, scale=1.0) for name in ("reference", backend))
    exact = run(cast(inputs, torch.float64), 1, "reference", upstream, scale=1.0)
    assert not over_budget(got, exact, plain)
