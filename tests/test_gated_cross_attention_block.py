"""The form "block" of gated cross-attention: attention and all that follows it as one launch, through the modules."""

import pytest
import torch
from gated_cross_attention_cases import CUDA, DEVICE, DTYPES, SHAPES, make, run, upstream_for
from test_gated_cross_attention_fused import BOTH, ONE, check_budget, count_products

import mmfused
from mmfused.kernels import gated_cross_attention as kernels
from mmfused.kernels.gated_cross_attention import plans
from mmfused.testing import dropout_mask


@pytest.fixture(autouse=True)
def block(monkeypatch):
    monkeypatch.setenv("MMFUSED_CROSS_ATTENTION", "block")


def launches(monkeypatch, call):
    """Names of the kernels that a call launches, and what it gives."""
    launched, real = [], kernels.launch
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "launch", lambda kernel, *a, **k: (launched.append(kernel.fn.__name__), real(kernel, *a, **k)))
        result = call()
    return launched, result


# ---- 1: forward and every gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_both_directions_stay_within_the_budget(options):
    check_budget(*make(**options, dtype=torch.float32))


@pytest.mark.parametrize("options", ONE, ids=str)
def test_one_direction_stays_within_the_budget(options):
    check_budget(*make(**options, both=False, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", [BOTH[0], BOTH[1], BOTH[4]], ids=str)
def test_half_precision_stays_within_the_budget(options, dtype):
    check_budget(*make("odd", **options, dtype=dtype))


@pytest.mark.parametrize("shape, options", [("several tiles", BOTH[0]), ("many keys", BOTH[2])], ids=str)
def test_several_tiles_stay_within_the_budget(shape, options):
    check_budget(*make(shape, **options, dtype=torch.float32))


PLANNED = {"several tiles": BOTH[0], "many keys": BOTH[3], "four heads of 48": BOTH[0], "odd": BOTH[1]}


@pytest.mark.parametrize("case", PLANNED)
def test_half_precision_plans_in_float32(monkeypatch, case):
    """The tiles of 16 bits, whose faults would drown in 16-bit rounding."""
    if CUDA:
        pytest.skip("16-bit plans need not fit a card in float32; the interpreter runs them")
    real = kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda *widths_and_dtype: real(*widths_and_dtype[:3], torch.float16, 90))
    check_budget(*make(case, **PLANNED[case], dtype=torch.float32))


# ---- 2: the same as the form "epilogue" -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [BOTH[0], BOTH[3], BOTH[4]], ids=str)
def test_both_forms_write_the_same(monkeypatch, options):
    """Outputs to rounding; and where dropout, a missing sample or a mask leaves nothing of A, exactly."""
    module, inputs, extra = make("several tiles", **options, dtype=torch.float32)
    upstream = upstream_for(inputs)
    got = run(module, inputs, extra, "fused", upstream=upstream)
    monkeypatch.setenv("MMFUSED_CROSS_ATTENTION", "epilogue")
    want = run(module, inputs, extra, "fused", upstream=upstream)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for i, x in enumerate(inputs):
        assert torch.equal(got[f"out{i}"] == x, want[f"out{i}"] == x)


def test_dropout_drops_what_it_says():
    module, inputs, extra = make("several tiles", gate="none", dropout=0.4, masks="none", dtype=torch.float32)
    got = run(module, inputs, extra, "fused", seed=5)
    for i, x in enumerate(inputs):
        kept = dropout_mask(torch.tensor(5, device=DEVICE), x.shape, 0.4, 2 * i + 1)
        assert torch.equal(got[f"out{i}"] != x, kept)


def test_dropout_is_that_of_composed():
    module, inputs, extra = make(dropout=0.3, dtype=torch.float32)
    got, want = (run(module, inputs, extra, backend) for backend in ("fused", "composed"))
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_repeats_are_bitwise():
    module, inputs, extra = make("several tiles", dtype=torch.float32, dropout=0.3)
    want, got = (run(module, inputs, extra, "fused") for _ in range(2))
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


# ---- 3: what is missing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nan_that_nobody_may_read_stays_where_it_is(dropout):
    module, inputs, extra = make(dropout=dropout, dtype=torch.float32)
    want = run(module, inputs, extra, "fused")
    lacking = ~extra["a_present"] | ~extra["b_present"] | extra["b_key_padding_mask"].all(1)
    ignored = torch.arange(inputs[0].shape[1], device=DEVICE) >= extra["a_lengths"][:, None], extra["b_key_padding_mask"]
    hidden = [mask | lacking[:, None] for mask in ignored]
    with torch.no_grad():
        for x, gone in zip(inputs, hidden, strict=True):
            x[gone] = float("nan")
    got = run(module, inputs, extra, "fused")
    for i, gone in enumerate(hidden):
        assert got[f"out{i}"][gone].isnan().all() and torch.equal(got[f"out{i}"][~gone], want[f"out{i}"][~gone])
    for name, value in got.items():
        assert name.startswith("out") or torch.equal(value, want[name]), name


def test_skip_does_no_work(monkeypatch):
    """Nothing is multiplied, forward or backward; samples come back as they were, with no gradient but their own."""
    if CUDA:
        pytest.skip("the interpreter counts; on a card the benchmarks show it")
    module, inputs, extra = make(dtype=torch.float32, dropout=0.3, masks="present")
    some, _ = count_products(monkeypatch, lambda: run(module, inputs, extra, "fused"))
    extra["a_present"][:], extra["b_present"][:2], extra["b_present"][2:] = True, False, False
    none, got = count_products(monkeypatch, lambda: run(module, inputs, extra, "fused"))
    assert none == 0 < some
    for name, value in got.items():
        want = torch.ones_like(value) if name.startswith("d x") else torch.zeros_like(value)
        assert torch.equal(value, inputs[int(name[-1])] if name.startswith("out") else want), name


@pytest.mark.parametrize("missing", ["skip", "zero", "attend"])
@pytest.mark.parametrize("batch, n, m", [(0, 6, 7), (2, 0, 7), (2, 6, 0)])
def test_empty_inputs(batch, n, m, missing):
    module, inputs, _ = make(missing=missing, dtype=torch.float32, masks="none")
    inputs = [x.detach()[:1, :length].expand(batch, -1, -1).clone() for x, length in zip(inputs, (n, m), strict=True)]
    got, want = (run(module, inputs, {}, backend) for backend in ("fused", "reference"))
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# ---- 4: the switch --------------------------------------------------------------------------------------------------------------


def forward(module, inputs, extra):
    with torch.no_grad(), mmfused.backend("fused"):
        return module(*inputs, **extra)


@pytest.mark.parametrize("gate", ["channel", "none"])
def test_forward_takes_three_launches(monkeypatch, gate):
    launched, _ = launches(monkeypatch, lambda: forward(*make(gate=gate, dtype=torch.float16)))
    assert launched == ["project_kernel", "project_kernel", "block_kernel"]


@pytest.mark.parametrize("form", plans.FORMS)
def test_without_the_variable_the_default_runs(monkeypatch, form):
    """Shapes that the block does not take run all the same where nobody has asked for it."""
    monkeypatch.delenv("MMFUSED_CROSS_ATTENTION")
    monkeypatch.setattr(plans, "FORM", form)
    launched, _ = launches(monkeypatch, lambda: forward(*make(dtype=torch.float32)))
    assert ("block_kernel" in launched) == (form == "block")
    launched, _ = launches(monkeypatch, lambda: forward(*make("wide", dtype=torch.float16)))
    assert "block_kernel" not in launched


def test_an_unknown_form_is_one_sentence(monkeypatch):
    monkeypatch.setenv("MMFUSED_CROSS_ATTENTION", "whole")
    with pytest.raises(ValueError, match="^MMFUSED_CROSS_ATTENTION is 'whole'; it takes one of epilogue, block.$"):
        forward(*make(dtype=torch.float32))


@pytest.mark.parametrize("shape, dtype", [("wide", torch.float16), ("head dim 96", torch.float16), ("odd", torch.float32)], ids=str)
def test_what_the_block_does_not_take_is_one_sentence(shape, dtype):
    """Before any launch; nothing falls back in silence."""
    dim, heads = SHAPES[shape][3:5]
    sentence = f"^MMFUSED_CROSS_ATTENTION is 'block', but dim is {dim} with {heads} heads; block takes dim <= 256 and heads of"
    with pytest.raises(ValueError, match=sentence):
        forward(*make(shape, dtype=dtype))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_plans_are_powers_of_two(arch):
    for dim, heads, limit in ((64, 4, 32), (70, 2, 64), (256, 8, 32), (256, 4, 64), (256, 2, 0), (264, 8, 0)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tile = kernels.plan(dim, 300, dim // heads, dtype, arch).block
            assert (tile is None) == (limit == 0 or (dtype == torch.float32 and limit > 32))
            assert tile is None or all(size & (size - 1) == 0 for size in (tile.BM, tile.BN, tile.BK))
