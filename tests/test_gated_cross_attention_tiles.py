"""The large tiles of 16-bit dtypes, and tokens whose mean is not 0."""

import pytest
from gated_cross_attention_cases import DTYPES, make
from test_gated_cross_attention_fused import check_budget

ALIGNED = {
    "16 dropout": ("several tiles", dict(dropout=0.3)),
    "64 dropout": ("2 heads of 32", dict(dropout=0.3)),
    "64 dense": ("2 heads of 32", dict(missing="zero", gate="token", masks="none")),
    "64 one way": ("2 heads of 32", dict(both=False, masks="none")),
    # The rounding of the attention's result must not add up in the gradients of w_q and b_q.
    "64 short and long": ("short and long", dict(missing="zero", gate="token", masks="none")),
    "128 short and long": (
        "short and long, wide",
        dict(missing="zero", gate="token", masks="none"),
    ),
    "128 dropout": ("2 heads of 64", dict(missing="zero", dropout=0.3)),
    "128 short": ("2 heads of 64", dict(missing="constant")),
    "128 long": ("long", dict()),
    "128 long dense": ("long", dict(missing="zero", gate="none", masks="none")),
    "128 long one way": ("long", dict(both=False, gate="token")),
    "256 dense": ("8 heads of 32", dict(masks="none")),
    "256 dropout": ("8 heads of 32", dict(missing="constant", indicator="batch", dropout=0.3)),
    "256 one way": ("8 heads of 32", dict(both=False, missing="zero", dropout=0.3)),
    "rows dense": ("many rows", dict(masks="none", dropout=0.3)),
    "rows none": ("many rows", dict(missing="attend", gate="none", pre_norm=False)),
}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ALIGNED)
def test_aligned_widths_stay_within_the_budget(case, dtype):
    shape, options = ALIGNED[case]
    check_budget(*make(shape, **options, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [1, 10, 100])
def test_a_mean_beside_the_spread_keeps_the_budget(mean, dtype):
    """LayerNorm subtracts the mean, and what it loses must not exceed what the reference loses.

    All tokens fit one tile, for which delta is computed without the rounded output (see
    check_budget): its rounding would dominate the gradients of queries, whatever the mean is.
    """
    module, inputs, extra = make("short", dtype=dtype)
    inputs = [(x.detach() + mean).requires_grad_() for x in inputs]
    check_budget(module, inputs, extra)
