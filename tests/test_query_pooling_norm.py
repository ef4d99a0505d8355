"""Query pooling with a folded LayerNorm is accurate at any mean and with zero variance."""

import pytest
import torch
from query_pooling_cases import (
    DEVICE,
    DTYPES,
    cast,
    make,
    run,
    upstream_for,
    use_half_precision_plan,
)

from mmfused.testing import over_budget

MEANS = (0, 1, 3, 10, 100)  # in standard deviations
BACKENDS_FORMS_DTYPES = [
    ("composed", form, dtype)
    for form in ("absorbed", "projected")
    for dtype in {*DTYPES, torch.bfloat16}
]
BACKENDS_FORMS_DTYPES += [("fused", "absorbed", dtype) for dtype in DTYPES]
BACKENDS_FORMS_DTYPES.sort(key=str)


def check_budget(inputs, heads, backend, form, factor=2.0):
    upstream = upstream_for(inputs)
    exact = run(cast(inputs, torch.float64), heads, "reference", upstream)
    # A result whose norm is at most 1e-12 is 0 up to rounding.
    exact = {name: value if value.norm() > 1e-12 else value * 0 for name, value in exact.items()}
    plain = run(inputs, heads, "reference", upstream)
    actual = run(inputs, heads, backend, upstream, form)
    assert not over_budget(actual, exact, plain, factor=factor)


def shifted(inputs, mean):
    return inputs | {"x": (inputs["x"].detach() + mean).requires_grad_()}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("backend, form, dtype", BACKENDS_FORMS_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, padding", [("one pass", "mask"), ("row blocks", "none"), ("wide", "lengths")]
)
def test_a_common_mean_does_not_reduce_accuracy(shape, padding, backend, form, dtype, mean):
    inputs, heads = make(shape, norm=True, padding=padding, dtype=dtype)
    check_budget(shifted(inputs, mean), heads, backend, form)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", ["one pass", "row blocks", "short"])
def test_half_precision_plans_in_float32_at_any_mean(monkeypatch, shape, arch, mean):
    if DEVICE == "cuda":
        pytest.skip("a 16-bit plan may not fit a GPU in float32; the interpreter runs it")
    use_half_precision_plan(monkeypatch, arch)
    inputs, heads = make(shape, norm=True, padding="mask", dtype=torch.float32)
    check_budget(shifted(inputs, mean), heads, "fused", "absorbed")


def test_many_queries_of_each_sample_whose_rows_are_not_aligned(monkeypatch):
    """Triton loads the queries through registers then, but still copies dZ and Z ahead."""
    import query_pooling_cases as cases

    monkeypatch.setitem(cases.SHAPES, "41 rows", (2, 63, 200, 41, 1, 16, 16))
    inputs, heads = make("41 rows", norm=True, per_sample=True, dtype=torch.float16)
    check_budget(inputs, heads, "fused", "absorbed")


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("backend, form, dtype", BACKENDS_FORMS_DTYPES, ids=str)
def test_tokens_of_few_columns(monkeypatch, backend, form, dtype, dim):
    """The derivative of a LayerNorm has rank D - 2 for D > 1 columns, and is 0 for one column."""
    import query_pooling_cases as cases

    monkeypatch.setitem(cases.SHAPES, "few columns", (24, 9, dim, 4, 2, 8, 6))
    inputs, heads = make("few columns", norm=True, padding="mask", dtype=dtype)
    # Two columns are normalized to +1 and -1, so the kernel's gradient would be rounding error.
    if (backend, dim) == ("fused", 2):
        with pytest.raises(RuntimeError, match="a LayerNorm of two features has no kernel"):
            run(inputs, heads, backend, form="auto")
        return
    # Of two columns, all that is left are rounding errors, whose size depends on the machine.
    check_budget(shifted(inputs, 3), heads, backend, form, factor=8 if dim == 2 else 2)


@pytest.mark.parametrize("backend, form, dtype", BACKENDS_FORMS_DTYPES, ids=str)
def test_equal_columns_are_normalized_to_zero(backend, form, dtype):
    """With zero variance, rstd = eps^-0.5 = 316, and 300 * 316 overflows float16."""
    inputs, heads = make(norm=True, dtype=dtype)
    inputs["x"] = torch.full_like(inputs["x"].detach(), 300.0).requires_grad_()
    out = run(inputs, heads, backend, form=form)["out"]
    want = run(cast(inputs, torch.float64), heads, "reference")["out"]
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
