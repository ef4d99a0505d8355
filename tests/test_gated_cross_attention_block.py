"""Tests of the form "block" of gated cross-attention: one kernel after the projections."""

import pytest
import torch
from gated_cross_attention_cases import CUDA, DEVICE, DTYPES, SHAPES, make, run
from test_gated_cross_attention_fused import (
    BOTH_DIRECTIONS,
    ONE_DIRECTION,
    check_budget,
    check_skip,
)

import mmfused
from mmfused.kernels.gated_cross_attention import call as launcher
from mmfused.kernels.gated_cross_attention import plans
from mmfused.kernels.recording import launches_made


@pytest.fixture(autouse=True)
def block(monkeypatch):
    monkeypatch.setenv("MMFUSED_CROSS_ATTENTION", "block")


def forward(module, inputs, extra):
    with torch.no_grad(), mmfused.backend("fused"):
        return module(*inputs, **extra)


def launches_of_forward(*shape, **options):
    """Return the names of the kernels that a forward pass launches."""
    case = make(*shape, **options)
    with launches_made() as launches:
        forward(*case)
    return [launch.name for launch in launches]


# ---- the form "block" compared with the form "epilogue" ------------------------------------------


NARROW = [
    ("narrow", options)
    for options in (*BOTH_DIRECTIONS, *({**one, "both": False} for one in ONE_DIRECTION))
]


@pytest.mark.parametrize(
    "shape, options",
    [*NARROW, *(("several tiles", BOTH_DIRECTIONS[i]) for i in (0, 2, 4))],
    ids=str,
)
def test_both_forms_give_the_same_outputs(monkeypatch, shape, options):
    """The outputs agree up to rounding, and they equal the input at the same elements."""
    module, inputs, extra = make(shape, **options, dtype=torch.float32)
    extra["dropout_seed"] = torch.tensor(3, device=DEVICE)
    outs = {}
    for form in plans.FORMS:
        monkeypatch.setenv("MMFUSED_CROSS_ATTENTION", form)
        found = forward(module, inputs, extra)
        outs[form] = found if isinstance(found, tuple) else (found,)
    for x, got, want in zip(inputs, outs["block"], outs["epilogue"], strict=False):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got == x, want == x)


@pytest.mark.parametrize(
    "options", [BOTH_DIRECTIONS[0], BOTH_DIRECTIONS[2], BOTH_DIRECTIONS[4]], ids=str
)
def test_gradients_stay_within_the_budget(options):
    check_budget(*make(**options, dtype=torch.float32))


def test_half_precision_stays_within_the_budget():
    check_budget(*make("odd", **BOTH_DIRECTIONS[1], dtype=DTYPES[1]))


PLAN_CASES = {
    "several tiles": BOTH_DIRECTIONS[0],
    "many keys": BOTH_DIRECTIONS[3],
    "four heads of 48": BOTH_DIRECTIONS[0],
}


@pytest.mark.parametrize("case", PLAN_CASES)
def test_16_bit_plans_keep_the_budget_in_float32(monkeypatch, case):
    """Run the tiles of 16-bit plans in float32, because 16-bit rounding could hide errors."""
    if CUDA:
        pytest.skip("16-bit plans may not fit a GPU in float32; only the interpreter runs them")
    real = launcher.plan
    monkeypatch.setattr(
        launcher, "plan", lambda *widths_and_dtype: real(*widths_and_dtype[:3], torch.float16, 90)
    )
    check_budget(*make(case, **PLAN_CASES[case], dtype=torch.float32))


def test_repeated_calls_agree_bit_for_bit():
    module, inputs, extra = make("several tiles", dtype=torch.float32, dropout=0.3)
    want, got = (run(module, inputs, extra, "fused") for _ in range(2))
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


# ---- missing samples and empty inputs ------------------------------------------------------------


@pytest.mark.not_on_ptx("counts the products of the interpreter")
def test_skipped_samples_need_no_products(monkeypatch):
    check_skip(monkeypatch)


@pytest.mark.parametrize("batch, n, m", [(0, 6, 7), (2, 0, 7), (2, 6, 0)])
def test_empty_inputs_match_the_reference(batch, n, m):
    module, inputs, _ = make(missing="zero", dtype=torch.float32, masks="none")
    inputs = [
        x.detach()[:1, :length].expand(batch, -1, -1).clone()
        for x, length in zip(inputs, (n, m), strict=True)
    ]
    got, want = (run(module, inputs, {}, backend) for backend in ("fused", "reference"))
    for name, value in got.items():
        torch.testing.assert_close(
            value, want[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- choice of the form --------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["channel", "none"])
def test_forward_makes_three_launches(gate):
    launched = launches_of_forward(gate=gate, dtype=torch.float16)
    assert launched == ["project_kernel", "project_kernel", "block_kernel"]


@pytest.mark.parametrize("form", plans.FORMS)
def test_default_form_runs_without_the_environment_variable(monkeypatch, form):
    """By default, shapes that "block" does not support run in the form "epilogue"."""
    monkeypatch.delenv("MMFUSED_CROSS_ATTENTION")
    monkeypatch.setattr(plans, "FORM", form)
    launched = launches_of_forward(dtype=torch.float32)
    assert ("block_kernel" in launched) == (form == "block")
    assert "block_kernel" not in launches_of_forward("wide", dtype=torch.float16)


def test_unknown_form_raises(monkeypatch):
    monkeypatch.setenv("MMFUSED_CROSS_ATTENTION", "whole")
    message = "^MMFUSED_CROSS_ATTENTION: got 'whole', expected one of epilogue, block$"
    with pytest.raises(ValueError, match=message):
        forward(*make(dtype=torch.float32))


@pytest.mark.parametrize(
    "shape, dtype",
    [("wide", torch.float16), ("head dim 96", torch.float16), ("odd", torch.float32)],
    ids=str,
)
def test_unsupported_shape_raises(shape, dtype):
    dim, heads = SHAPES[shape][3:5]
    message = (
        f"^MMFUSED_CROSS_ATTENTION: got 'block' with dim {dim} and {heads} heads, "
        "expected dim <= 256 and heads of"
    )
    with pytest.raises(ValueError, match=message):
        forward(*make(shape, dtype=dtype))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_tile_sizes_are_powers_of_two(arch):
    for dim, heads, limit in (
        (64, 4, 32),
        (70, 2, 64),
        (256, 8, 32),
        (256, 4, 64),
        (256, 2, 0),
        (264, 8, 0),
    ):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tile = launcher.plan(dim, 300, dim // heads, dtype, arch).block
            assert (tile is None) == (limit == 0 or (dtype == torch.float32 and limit > 32))
            assert tile is None or all(
                size & (size - 1) == 0 for size in (tile.BM, tile.BN, tile.BK)
            )
