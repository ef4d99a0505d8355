"""Tests of gated cross-attention with unusual values.

The inputs have a large mean, a single key, invalid lengths or tokens that are not finite.
"""

import math

import pytest
import torch
from gated_cross_attention_cases import DEVICE, DTYPES, make, run, upstream_for

from mmfused.testing import over_budget

BACKENDS_AND_DTYPES = [
    ("composed", dtype) for dtype in sorted({*DTYPES, torch.bfloat16}, key=str)
] + [("fused", dtype) for dtype in DTYPES]


@pytest.mark.parametrize("mean", [1, 10, 100])
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES, ids=str)
def test_tokens_with_a_large_mean_keep_the_error_budget(backend, dtype, mean):
    module, inputs, extra = make("odd", masks="present")
    module = module.to(dtype)
    inputs = [(x.detach() + mean).to(dtype).requires_grad_() for x in inputs]
    upstream = upstream_for(inputs)
    plain = with_biases_as_columns(run(module, inputs, extra, "reference", upstream=upstream))
    actual = with_biases_as_columns(run(module, inputs, extra, backend, upstream=upstream))
    exact = with_biases_as_columns(run(module, inputs, extra, "reference", torch.float64, upstream))
    assert not over_budget(actual, exact, plain)


def with_biases_as_columns(results):
    """Append the gradients of query and key biases to the gradients of their weights.

    The exact gradient of a key bias is 0. The errors of both biases are therefore measured relative
    to the gradients of the weights.
    """
    for name in [name for name in results if name.endswith(("q_proj.bias", "k_proj.bias"))]:
        weight = name.replace("bias", "weight")
        results[weight] = torch.cat([results[weight], results.pop(name)[:, None]], 1)
    return results


# (shape, dropout): each kernel that computes the backward of the attention.
SINGLE_KEY = [
    ("narrow", 0.0),
    ("narrow", 0.3),
    ("short", 0.0),
    ("2 heads of 64", 0.0),
    ("four heads of 48", 0.0),
]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES, ids=str)
def test_single_key_gives_queries_and_keys_zero_gradients(backend, dtype):
    """The softmax of one logit is always 1, so these gradients must be exactly 0.

    Adam would turn a rounding error into a full step.
    """
    for shape, dropout in SINGLE_KEY:
        module, inputs, _ = make(shape, both=False, masks="none", dtype=dtype, dropout=dropout)
        inputs[1] = inputs[1].detach()[:, :1].requires_grad_()
        got = run(module, inputs, {}, backend)
        for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight"):
            assert not got[f"d {name}"].any()
        assert got["d v_proj.weight"].any()


@pytest.mark.parametrize(
    "missing, bad", [("skip", -1), ("skip", 8), ("zero", 8), ("attend", 2**40)]
)
@pytest.mark.parametrize("both", [True, False], ids=["both", "one way"])
@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
def test_invalid_length_gives_nan_for_its_sample_only(monkeypatch, backend, both, missing, bad):
    monkeypatch.setattr("mmfused.ops._common.check_value", lambda *_: None)
    module, inputs, _ = make(both=both, masks="none", missing=missing, dtype=torch.float32)
    name = "b_lengths" if both else "context_lengths"
    lengths = torch.tensor([7, 2, 3, 5], device=DEVICE)
    want = run(module, inputs, {name: lengths.clone()}, backend)
    lengths[1] = bad
    got = run(module, inputs, {name: lengths}, backend)
    for key in ("out0", "out1") if both else ("out0",):
        assert got[key][1].isnan().all()
        torch.testing.assert_close(got[key][[0, 2, 3]], want[key][[0, 2, 3]], rtol=1e-6, atol=1e-6)
    assert got["d x0"][[0, 2, 3]].isfinite().all() and got["d x1"][[0, 2, 3]].isfinite().all()
    if bad > 0:
        # The weights' gradients must also be NaN, so that the error is noticed.
        values = [name for name in got if name.endswith("v_proj.weight")]
        assert all(got[name].isnan().any() for name in values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
def test_non_finite_token_affects_only_its_own_sample(backend, value):
    module, inputs, _ = make(masks="none", dtype=torch.float32)
    want = run(module, inputs, {}, backend)
    for side in (0, 1):
        broken = [x.detach().clone() for x in inputs]
        broken[side][1, 2, 3] = value
        got = run(module, [x.requires_grad_() for x in broken], {}, backend)
        for name in ("out0", "out1", "d x0", "d x1"):
            torch.testing.assert_close(
                got[name][[0, 2, 3]], want[name][[0, 2, 3]], rtol=1e-5, atol=1e-5
            )
        own_out, other_out = ("out0", "out1") if side == 0 else ("out1", "out0")
        # Every token of the other side attends to the broken token.
        assert got[other_out][1].isnan().all()
        rows = [i for i in range(inputs[side].shape[1]) if i != 2]
        torch.testing.assert_close(
            got[own_out][1, rows], want[own_out][1, rows], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("logit", [100, 10_000])
def test_kernel_keeps_the_error_budget_if_logits_have_a_large_mean(logit):
    """Queries and keys are integers, so that the reference's logits and their maximum are exact.

    The composed backend is not tested, because torch's fused attention is less accurate here.
    """
    module, _, _ = make(
        "several tiles",
        both=False,
        dtype=torch.float32,
        gate="none",
        indicator=False,
        pre_norm=False,
    )
    for projection in (module.q_proj, module.k_proj):
        projection.weight.data = torch.eye(16, device=DEVICE)
        projection.bias.data = torch.zeros(16, device=DEVICE)
        # The first feature of all tokens is 1 and the scale is 1/4: every logit grows by ``logit``.
        projection.weight.data[0, 0] = (4 * logit) ** 0.5
    inputs = [torch.randint(-1, 2, (2, count, 16), device=DEVICE).float() for count in (67, 35)]
    for tokens in inputs:
        tokens[..., 0] = 1
    inputs = [tokens.requires_grad_() for tokens in inputs]
    upstream = upstream_for(inputs)
    plain, actual = (
        run(module, inputs, {}, name, upstream=upstream) for name in ("reference", "fused")
    )
    exact = run(module, inputs, {}, "reference", torch.float64, upstream)
    plain, actual, exact = (with_biases_as_columns(part) for part in (plain, actual, exact))
    assert not over_budget(actual, exact, plain)
