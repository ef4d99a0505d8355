"""Tests of the kernels of gated cross-attention."""

import math

import pytest
import torch
from gated_cross_attention_cases import CUDA, DEVICE, DTYPES, SHAPES, make, run, upstream_for
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused.kernels.recording import launches_made
from mmfused.ops.gated_cross_attention import autograd
from mmfused.testing import dropout_mask, over_budget

# ---- forward and every gradient ------------------------------------------------------------------


def check_budget(module, inputs, extra):
    dtype, upstream = inputs[0].dtype, upstream_for(inputs)
    exact = run(module, inputs, extra, "reference", torch.float64, upstream)
    plain = run(module, inputs, extra, "reference", dtype, upstream)
    fused = run(module, inputs, extra, "fused", dtype, upstream)
    # Some exact gradients are 0, for example those of queries and keys if there is a single key.
    # The rounding errors of these gradients are compared with the largest norm of all results.
    size = max(want.norm() for want in exact.values())
    for name in [name for name, want in exact.items() if not want.any()]:
        rounding = fused[name].double().norm()
        assert rounding <= 4 * torch.finfo(dtype).eps * size, (name, rounding)
        fused, exact, plain = (
            {k: v for k, v in part.items() if k != name} for part in (fused, exact, plain)
        )
    # Where no tile has all keys, the kernels take delta = rowsum(dO * O) from the rounded output.
    # Then the gradients of a row's logits do not sum to 0 exactly, as they almost do in plain
    # float32.
    factor = 3.0 if dtype == torch.float32 else 2.0
    assert not over_budget(fused, exact, plain, factor=factor)


BOTH_DIRECTIONS = [
    dict(dropout=0.3),
    dict(missing="zero", gate="token"),
    dict(missing="constant", indicator="batch"),
    dict(missing="attend", gate="none", dropout=0.3),
    dict(missing="zero", gate="none", pre_norm=False, dropout=0.3),
    dict(missing="constant", gate="token", indicator=False, dropout=0.3, bias=False),
    dict(missing="zero", indicator=False, masks="present"),
    dict(share_weights=True, masks="none"),
]
ONE_DIRECTION = [
    dict(),
    dict(missing="constant"),
    dict(missing="zero", gate="token", indicator="batch", dropout=0.3),
    dict(missing="attend", dropout=0.3, masks="present"),
    dict(gate="none", pre_norm=False, missing="attend"),
    dict(gate="none", bias=False, masks="none", dropout=0.3),
]


@pytest.mark.parametrize("options", BOTH_DIRECTIONS, ids=str)
def test_both_directions_stay_within_the_budget(options):
    check_budget(*make(**options, dtype=torch.float32))


@pytest.mark.parametrize("options", ONE_DIRECTION, ids=str)
def test_one_direction_stays_within_the_budget(options):
    check_budget(*make(**options, both=False, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "options", [BOTH_DIRECTIONS[0], BOTH_DIRECTIONS[1], BOTH_DIRECTIONS[4]], ids=str
)
def test_half_precision_stays_within_the_budget(options, dtype):
    check_budget(*make("odd", **options, dtype=dtype))


@pytest.mark.parametrize(
    "shape, options",
    [("several tiles", BOTH_DIRECTIONS[0]), ("many keys", BOTH_DIRECTIONS[2])],
    ids=str,
)
def test_several_tiles_stay_within_the_budget(shape, options):
    check_budget(*make(shape, **options, dtype=torch.float32))


PLAN_CASES = {
    "several tiles": BOTH_DIRECTIONS[0],
    "many keys": BOTH_DIRECTIONS[3],
    "head dim 96": BOTH_DIRECTIONS[0],
    "long": BOTH_DIRECTIONS[1],
    "wide": BOTH_DIRECTIONS[0],
    "wide token": BOTH_DIRECTIONS[1],
    "wide none": BOTH_DIRECTIONS[4],
}


@pytest.mark.not_on_ptx("16-bit plans become very long code in float32")
@pytest.mark.parametrize("case", PLAN_CASES)
def test_16_bit_plans_keep_the_budget_in_float32(monkeypatch, case):
    """Run 16-bit plans in float32, because 16-bit rounding could hide errors."""
    if CUDA:
        pytest.skip("16-bit plans may not fit a GPU in float32; only the interpreter runs them")
    from mmfused.kernels.gated_cross_attention import call as launcher

    real = launcher.plan
    monkeypatch.setattr(
        launcher, "plan", lambda *widths_and_dtype: real(*widths_and_dtype[:3], torch.float16, 90)
    )
    shape = "wide" if case.startswith("wide") else case
    check_budget(*make(shape, **PLAN_CASES[case], dtype=torch.float32))


def test_dropout_keeps_the_elements_of_dropout_mask():
    module, inputs, extra = make(gate="none", dropout=0.4, masks="none", dtype=torch.float32)
    got = run(module, inputs, extra, "fused", seed=5)
    for i, x in enumerate(inputs):
        keep = dropout_mask(torch.tensor(5, device=DEVICE), x.shape, 0.4, 2 * i + 1)
        assert torch.equal(got[f"out{i}"] != x, keep)


# ---- missing samples, masks and empty inputs -----------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nan_in_ignored_tokens_does_not_spread(dropout):
    module, inputs, extra = make(dropout=dropout, dtype=torch.float32)
    want = run(module, inputs, extra, "fused")
    lacking = ~extra["a_present"] | ~extra["b_present"] | extra["b_key_padding_mask"].all(1)
    ignored = (
        torch.arange(inputs[0].shape[1], device=DEVICE) >= extra["a_lengths"][:, None],
        extra["b_key_padding_mask"],
    )
    hidden = [mask | lacking[:, None] for mask in ignored]
    with torch.no_grad():
        for x, rows in zip(inputs, hidden, strict=True):
            x[rows] = math.nan
    got = run(module, inputs, extra, "fused")
    for i, rows in enumerate(hidden):
        assert got[f"out{i}"][rows].isnan().all()
        assert torch.equal(got[f"out{i}"][~rows], want[f"out{i}"][~rows])
        assert torch.equal(want[f"d x{i}"][rows], torch.ones_like(want[f"d x{i}"][rows]))
    for name, value in got.items():
        assert name.startswith("out") or torch.equal(value, want[name]), name


@pytest.mark.parametrize("missing", ["skip", "zero", "constant"])
def test_only_needed_tokens_of_an_absent_context_are_read(missing):
    module, inputs, extra = make(both=False, missing=missing, dtype=torch.float32)
    want = run(module, inputs, extra, "fused")
    ignore = extra["context_key_padding_mask"].clone()
    absent = ~extra["context_present"]
    ignore[absent] = True
    if missing == "constant":
        ignore[absent, 1] = extra["context_key_padding_mask"][absent, 1]
        extra["context_key_padding_mask"][absent, 1] = ignore[absent, 1] = False
        want = run(module, inputs, extra, "fused")
    with torch.no_grad():
        inputs[1][ignore] = math.nan
    got = run(module, inputs, extra, "fused")
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    assert not got["d x1"][ignore].any()


def count_products(monkeypatch, call):
    from triton.runtime.interpreter import InterpreterBuilder

    counted, real = [0], InterpreterBuilder.create_dot

    def count(*args, **kwargs):
        counted[0] += 1
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", count)
        result = call()
    return counted[0], result


@pytest.mark.not_on_ptx("counts the products of the interpreter")
def test_skipped_samples_need_no_products(monkeypatch):
    check_skip(monkeypatch)


def check_skip(monkeypatch):
    """Check that no matrix product is computed if no sample has both sides.

    Samples must be returned unchanged. The parameters' gradients must be zeros, not None.
    """
    if CUDA:
        pytest.skip("products are counted only in the interpreter")
    module, inputs, extra = make(dtype=torch.float32, dropout=0.3, masks="present")
    some, _ = count_products(monkeypatch, lambda: run(module, inputs, extra, "fused"))
    extra["a_present"][:], extra["b_present"][:2], extra["b_present"][2:] = True, False, False
    none, got = count_products(monkeypatch, lambda: run(module, inputs, extra, "fused"))
    assert none == 0 < some
    for name, value in got.items():
        want = torch.ones_like(value) if name.startswith("d x") else torch.zeros_like(value)
        if name.startswith("out"):
            want = inputs[int(name[-1])]
        assert torch.equal(value, want), name


@pytest.mark.not_on_ptx("counts the calls of a jit function in the interpreter")
@pytest.mark.parametrize("missing", ["skip", "zero"])
def test_attention_computes_only_tiles_with_valid_keys(monkeypatch, missing):
    """Tiles are computed only for present samples, and only up to the last valid key."""
    if CUDA:
        pytest.skip("tiles are counted only in the interpreter")
    from mmfused.kernels.gated_cross_attention import attend, attend_backward, d_key, d_query

    module, inputs, _ = make(
        "many keys", both=False, missing=missing, dtype=torch.float32, masks="none"
    )
    computed = []
    for owner in (attend, attend_backward, d_key, d_query):
        real = owner.dot
        monkeypatch.setattr(
            owner, "dot", lambda *args, real=real: (computed.append(1), real(*args))[1]
        )

    def tiles(**extra):
        computed.clear()
        run(module, inputs, extra, "fused")
        return len(computed)

    full = tiles()
    half = tiles(context_present=torch.tensor([True, False]))
    none = tiles(context_present=torch.tensor([False, False]))
    padded = tiles(context_lengths=torch.tensor([32, 64]))
    assert none == 0 < half == full // 2
    assert padded == full * 3 // 10  # valid keys are in 1 and 2 of 5 tiles


@pytest.mark.parametrize("missing", ["skip", "zero", "attend"])
@pytest.mark.parametrize("batch, n, m", [(0, 6, 7), (2, 0, 7), (2, 6, 0)])
def test_empty_inputs_match_the_reference(batch, n, m, missing):
    module, inputs, _ = make(missing=missing, dtype=torch.float32, masks="none")
    inputs = [
        x.detach()[:1, :length].expand(batch, -1, -1).clone()
        for x, length in zip(inputs, (n, m), strict=True)
    ]
    got, want = (run(module, inputs, {}, backend) for backend in ("fused", "reference"))
    for name, value in got.items():
        torch.testing.assert_close(
            value, want[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- layouts -------------------------------------------------------------------------------------


def test_strided_tokens_and_gradients_give_the_same_results():
    module, inputs, extra = make(dtype=torch.float32)
    want = run(module, inputs, extra, "fused")
    views = [
        torch.cat([torch.full_like(inputs[0][:, :1], math.nan), inputs[0].detach()], 1)[:, 1:],
        inputs[1].detach().transpose(0, 1).contiguous().transpose(0, 1),
    ]
    swapped = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    expanded = [torch.ones((), device=DEVICE).expand(x.shape) for x in inputs]
    extra["b_key_padding_mask"] = extra["b_key_padding_mask"].T.contiguous().T
    for tokens in (views, swapped):
        for name, value in run(module, tokens, extra, "fused", upstream=expanded).items():
            assert torch.equal(value, want[name]), name


# ---- registration, launches ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [BOTH_DIRECTIONS[0] | dict(masks="none"), dict(both=False, gate="none", pre_norm=False)],
    ids=str,
)
def test_operators_pass_opcheck(monkeypatch, options):
    module, inputs, extra = make(**options, dtype=torch.float32)
    calls = []
    with monkeypatch.context() as patch:
        for name in ("gated_cross_attention_fwd", "gated_cross_attention_bwd"):
            real = getattr(autograd, name)
            patch.setattr(
                autograd,
                name,
                lambda *args, real=real: (calls.append((real, args)), real(*args))[1],
            )
        run(module, inputs, extra, "fused")
    assert len(calls) == 2
    for op, args in calls:
        args = torch.utils._pytree.tree_map(
            lambda x: x.detach() if isinstance(x, torch.Tensor) else x, args
        )
        # With masks, saved elements that are never read are uninitialized, so two runs may differ.
        utils = ["test_schema", "test_faketensor"]
        if options.get("masks") == "none":
            utils += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(op, args, test_utils=utils)


@pytest.mark.parametrize("shape", ["narrow", "wide"])
@pytest.mark.parametrize("masks, count", [("none", 5), ("present", 6), ("mixed", 7)])
def test_forward_makes_five_launches_or_seven_with_masks(shape, masks, count):
    module, inputs, extra = make(shape, masks=masks, dtype=torch.float16)
    with torch.no_grad(), mmfused.backend("fused"), launches_made() as launches:
        module(*inputs, **extra)
    assert len(launches) == count, [launch.name for launch in launches]


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_tile_sizes_are_powers_of_two(arch):
    from mmfused.kernels.gated_cross_attention import plan

    for dim, context, heads in (
        (64, 64, 2),
        (192, 1024, 2),
        (256, 256, 8),
        (768, 768, 12),
        (1024, 256, 8),
    ):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tiles = plan(dim, context, dim // heads, dtype, arch)
            names = ("project", "attend", "d_query", "d_key", "product", "rows")
            for tile in [getattr(tiles, name) for name in names] + [*tiles.d_attend_long.values()]:
                assert all(size & (size - 1) == 0 for size in (tile.BM, tile.BN, tile.BK))
            assert tiles.rows.BN >= max(dim, context)
            assert (tiles.together is not None) == (dim <= 256)


# ---- behaviour -----------------------------------------------------------------------------------


def test_repeats_and_checkpoints_agree_bit_for_bit():
    module, inputs, extra = make(dtype=torch.float32, dropout=0.3)
    upstream = upstream_for(inputs)
    want = run(module, inputs, extra, "fused", upstream=upstream)
    for name, value in run(module, inputs, extra, "fused", upstream=upstream).items():
        assert torch.equal(value, want[name]), name
    seed = torch.tensor(11, device=DEVICE)

    def attend(*tokens):
        # The backend is set here because checkpoint calls this function again in backward.
        with mmfused.backend("fused"):
            return module(*tokens, **extra, dropout_seed=seed)

    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = checkpoint(attend, *leaves, use_reentrant=False)
    named = {"x0": leaves[0], "x1": leaves[1]} | dict(module.named_parameters())
    gradients = torch.autograd.grad(outs, list(named.values()), [u.float() for u in upstream])
    for name, value in zip(named, gradients, strict=True):
        assert torch.equal(value, want[f"d {name}"]), name


def test_double_backward_raises():
    module, inputs, extra = make(dtype=torch.float32, both=False)
    with mmfused.backend("fused"):
        out = module(*inputs, **extra)
    with pytest.raises(RuntimeError, match="differentiat"):
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
        gradient.sum().backward()


def test_shapes_match_their_names():
    *_, dim, heads, _ = SHAPES["head dim 96"]
    assert SHAPES["wide"][3] > 256 >= dim
    assert dim == 96 * heads
