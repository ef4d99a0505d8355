"""Tests of gated cross-attention: absent contexts, missing biases, strides and large offsets."""

import itertools

import numpy
import pytest
import torch
import triton
import triton.language as tl
from gated_cross_attention_cases import CUDA, DEVICE, make, run, upstream_for
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import GatedCrossAttention, gated_cross_attention, pack_passes
from mmfused.kernels.gated_cross_attention.tokens import tile_at
from mmfused.testing import over_budget

BACKENDS = ("reference", "composed", "fused")


def assert_close(got, want, tolerance=2e-5):
    """Assert that the norm of each error is at most ``tolerance`` * (1 + norm of ``want``)."""
    for name, value in got.items():
        assert (value - want[name]).norm() <= tolerance * (1 + want[name].norm()), name


# ---- absent contexts -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize(
    "gate, missing", [*itertools.product(["channel", "token", "none"], ["skip", "zero"])]
)
def test_gradients_are_zeros_if_all_contexts_are_absent(gate, missing, both, backend):
    """The context, and the parameters applied to the context, have gradients of zeros, not None.

    The context holds NaN, unless the other direction computes with the context as its queries.
    """
    module, inputs, _ = make(
        gate=gate, missing=missing, both=both, dropout=0.3, dtype=torch.float32
    )
    side = "b" if both else "context"
    is_query_side = both and missing == "zero"
    inputs[1] = torch.full_like(inputs[1], 0.5 if is_query_side else torch.nan)
    absent = torch.zeros(len(inputs[0]), dtype=torch.bool, device=DEVICE)
    got = run(module, inputs, {f"{side}_present": absent}, backend)
    names = [name for name in got if not name.startswith(("out", "d x"))]
    if is_query_side:
        names = [name for name in names if "to_a" in name]
    for name in names:
        has_gradient = missing == "zero" and "gate_proj" in name
        assert got[name].isfinite().all() and bool(got[name].any()) == has_gradient, name
    assert len(names) >= 8
    if missing == "skip":
        assert torch.equal(got["out0"], inputs[0])
        assert torch.equal(got["d x0"], torch.ones_like(inputs[0]))
    if not both:
        assert not got["d x1"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["skip", "zero", "attend", "constant"])
def test_context_without_tokens_counts_as_absent(missing, backend):
    """The mode "skip" returns x, and the other modes set the indicator to 0."""
    module, inputs, _ = make(both=False, missing=missing, dtype=torch.float32)
    batch, width = len(inputs[0]), inputs[1].shape[-1]
    empty = inputs[1].detach()[:, :0]
    masked = {"context_key_padding_mask": torch.zeros(batch, 0, dtype=torch.bool, device=DEVICE)}
    plain = run(module, [inputs[0], empty], {}, backend)
    for name, value in run(module, [inputs[0], empty], masked, backend).items():
        assert torch.equal(value, plain[name]), name
    assert torch.equal(plain["out0"], inputs[0]) == (missing == "skip")
    absent = {"context_present": torch.zeros(batch, dtype=torch.bool, device=DEVICE)}
    if missing in ("skip", "zero"):
        want = run(module, [inputs[0], torch.ones(batch, 1, width, device=DEVICE)], absent, backend)
        assert_close({name: value for name, value in plain.items() if name != "d x1"}, want)
    else:
        assert not plain["d gate_proj.weight"][:, -2:].any()


# ---- pairs of options ----------------------------------------------------------------------------

# With the cases of test_gated_cross_attention_fused.py, every value of gate occurs with every value
# of missing, and every value of masks with every value of gate and of missing.
PAIRS = [
    (True, dict(gate="token", masks="present")),
    (True, dict(gate="none", missing="constant", masks="present")),
    (True, dict(gate="none", missing="zero", masks="present")),
    (False, dict(gate="token", missing="attend", masks="none")),
    (False, dict(missing="constant", masks="none")),
    (False, dict(gate="none", missing="zero", masks="none")),
    (False, dict(gate="none")),
    (False, dict(shape="many keys", dropout=0.3, masks="none")),
]


@pytest.mark.parametrize("both, options", PAIRS, ids=str)
def test_pairs_of_options_keep_the_error_budget(both, options):
    module, inputs, extra = make(both=both, **options, dtype=torch.float32)
    check_budget(module, inputs, extra)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize(
    "gate, missing",
    [*itertools.product(["channel", "token", "none"], ["skip", "zero", "attend", "constant"])],
)
def test_composed_matches_the_reference(gate, missing, both, dropout):
    """Some samples lack a side, so gathering the other samples changes their indices."""
    module, inputs, extra = make(gate=gate, missing=missing, both=both, dropout=dropout)
    if missing == "constant":
        absent = ~extra["b_present" if both else "context_present"]
        with torch.no_grad():
            inputs[1][absent] = inputs[1][absent][:, :1]
    upstream = upstream_for(inputs)
    got, want = (
        run(module, inputs, extra, backend, upstream=upstream)
        for backend in ("composed", "reference")
    )
    assert_close(got, want, 1e-11)


def check_budget(module, inputs, extra):
    upstream = upstream_for(inputs)
    exact, plain, fused = (
        run(module, inputs, extra, backend, precision, upstream)
        for backend, precision in (
            ("reference", torch.float64),
            ("reference", torch.float32),
            ("fused", torch.float32),
        )
    )
    # Over so few rows, plain PyTorch's error depends on the CPU's BLAS. The default factor is 2.
    assert not over_budget(fused, exact, plain, factor=3)


def test_packed_passes_match_separate_calls_in_the_kernels():
    module, inputs, _ = make(missing="constant", dtype=torch.float32)
    flags = torch.ones(len(inputs[0]), dtype=torch.bool, device=DEVICE)
    a, b = (x.detach() for x in inputs)
    with mmfused.backend("fused"):
        packed_a, packed_b, a_present, b_present = pack_passes(a, b)
        packed = module(packed_a, packed_b, a_present=a_present, b_present=b_present)
        zeros = torch.zeros_like(a), torch.zeros_like(b)
        calls = [
            module(a, b),
            module(a, zeros[1], b_present=~flags),
            module(zeros[0], b, a_present=~flags),
        ]
    for got, want in zip(packed, zip(*calls, strict=True), strict=True):
        assert torch.equal(got, torch.cat(want))


# ---- absent parameters, gradients of some inputs, strides ----------------------------------------


def functional(backend, module, inputs, wanted=None, **changes):
    """Return the output, and the gradients of the inputs in ``wanted`` (default: all)."""
    weights = module.weights()
    named = dict(zip(("x", "context"), inputs, strict=True))
    named |= {field: weight for field, weight in weights._asdict().items() if weight is not None}
    named |= {
        f"norm_{side}_{part}": getattr(getattr(module, f"norm_{side}"), part)
        for side in ("x", "context")
        for part in ("weight", "bias")
    }
    named = {k: v for k, v in (named | changes).items() if v is not None}
    leaves = {k: v.detach().requires_grad_(wanted is None or k in wanted) for k, v in named.items()}
    norms = {
        f"norm_{side}": tuple(leaves[f"norm_{side}_{part}"] for part in ("weight", "bias"))
        for side in ("x", "context")
    }
    given = {field: leaves.get(field) for field in weights._fields}
    with mmfused.backend(backend):
        out = gated_cross_attention(
            leaves["x"],
            leaves["context"],
            type(weights)(**given),
            num_heads=module.options["num_heads"],
            **norms,
            dropout_p=0.3,
            dropout_seed=torch.tensor(7, device=DEVICE),
        )
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstream = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_depend_on_which_inputs_need_gradients(backend):
    module, inputs, _ = make(both=False, dtype=torch.float32)
    want = functional(backend, module, inputs)
    for wanted in (["x"], ["context"], ["w_v", "b_g"], ["norm_context_weight"], ["w_g", "context"]):
        got = functional(backend, module, inputs, wanted)
        assert set(got) == {"out", *wanted}
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize(
    "missing", [("b_k",), ("b_q", "b_v"), ("b_o",), ("b_g",), ("b_q", "b_k", "b_v", "b_o")], ids=str
)
def test_any_bias_may_be_missing(missing):
    module, inputs, _ = make(both=False, dtype=torch.float32)
    changes = dict.fromkeys(missing)
    assert_close(
        functional("fused", module, inputs, **changes),
        functional("reference", module, inputs, **changes),
    )


@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize("lacking", ["to_a", "to_b"])
def test_biases_may_be_missing_in_one_direction(lacking, gate):
    module, inputs, extra = make(gate=gate, dtype=torch.float32)
    for linear in getattr(module, lacking).children():
        linear.bias = None
    check_budget(module, inputs, extra)


def test_strided_parameters_give_the_same_results():
    module, inputs, _ = make(both=False, dtype=torch.float32)
    want = functional("fused", module, inputs)
    weights = module.weights()._asdict() | {
        f"norm_{side}_{part}": getattr(getattr(module, f"norm_{side}"), part)
        for side in ("x", "context")
        for part in ("weight", "bias")
    }
    strided = {
        name: torch.stack([w, torch.full_like(w, torch.nan)], -1)[..., 0]
        for name, w in weights.items()
    }
    for name, value in functional("fused", module, inputs, **strided).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_recomputes_the_same_dropout(backend):
    module, inputs, extra = make(dtype=torch.float32, dropout=0.3)

    def attend(*tokens):
        with mmfused.backend(backend):
            return module(*tokens, **extra)

    def gradients(outs, leaves):
        torch.rand(3)  # advance the generator before backward recomputes the call
        losses = [out.square().sum() for out in outs]
        return [*outs, *torch.autograd.grad(losses, [*leaves, *module.parameters()])]

    results = []
    for call in (attend, lambda *tokens: checkpoint(attend, *tokens, use_reentrant=False)):
        torch.manual_seed(4)
        leaves = [x.detach().requires_grad_() for x in inputs]
        results.append(gradients(call(*leaves), leaves))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(attend(*inputs)[0], results[0][0])


# ---- independent dropout -------------------------------------------------------------------------


def test_directions_and_samples_drop_different_elements():
    """With equal sides and equal weights, the directions differ only in their dropout."""
    module, inputs, _ = make(
        gate="none", share_weights=True, dropout=0.5, masks="none", dtype=torch.float32
    )
    module.norm_b = module.norm_a
    x = inputs[0].detach()[:1].expand_as(inputs[0])
    with mmfused.backend("fused"):
        a, b = module(x, x, dropout_seed=torch.tensor(3, device=DEVICE))
        evaluated = module.eval()(x, x)
    torch.testing.assert_close(evaluated[0], evaluated[1], rtol=1e-5, atol=1e-5)
    kept = [(out != x).flatten(0, 1) for out in (a, b)]
    agree = torch.stack(
        [
            (kept[0] == kept[1]).float().mean(),
            *((kept[0] == kept[0].roll(i, 0)).float().mean() for i in (1, 6)),
        ]
    )
    assert ((agree - 0.5).abs() < 5 * 0.5 / kept[0].numel() ** 0.5).all(), agree


# ---- offsets above 2^31 --------------------------------------------------------------------------


@triton.jit
def _offsets_kernel(out_ptr, first, width):
    at = tile_at(first + tl.arange(0, 4), tl.arange(0, 16), width)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :], at)


def test_offsets_are_64_bit():
    """Test the offsets of an output tile, and inputs whose last sample is beyond element 2^31.

    The inputs use little memory, because most of the storage is never touched.
    """
    if CUDA:
        pytest.skip("this test runs only in the interpreter")
    got, first, width = torch.zeros(4, 16, dtype=torch.int64), 2**31 // 768 - 1, 768
    _offsets_kernel[(1,)](got, first, width)
    assert torch.equal(got, (first + torch.arange(4))[:, None] * width + torch.arange(16))
    assert got.max() > 2**31

    stride = 2**30 + 8
    storage = torch.from_numpy(numpy.zeros(2 * stride + 2**12, numpy.float16))
    module, inputs, _ = make(dtype=torch.float16, masks="none")
    inputs = [x.detach()[:3] for x in inputs]
    want = run(module, inputs, {}, "fused")
    for side in (0, 1):
        far = list(inputs)
        far[side] = storage.as_strided(inputs[side].shape, (stride, inputs[side].shape[2] + 2, 1))
        far[side].copy_(inputs[side])
        for name, value in run(module, far, {}, "fused").items():
            assert torch.equal(value, want[name]), name


def test_errors_of_modules_name_the_module():
    message = "GatedCrossAttention: dropout: got nan, expected a number from 0 to below 1"
    with pytest.raises(ValueError, match=message):
        GatedCrossAttention(8, 2, dropout=float("nan"))
