"""Query pooling with ``return_lse``: the log-sum-exp of the logits and its gradients."""

import math

import pytest
import torch
from query_pooling_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    PADDINGS,
    cast,
    make,
    run,
    run_with_lse,
    upstream_with_lse,
    use_half_precision_plan,
)
from torch import nn

import mmfused
from mmfused import query_pooling, query_pooling_reference
from mmfused.kernels.recording import launches_made
from mmfused.testing import over_budget

BACKENDS_AND_FORMS = [
    ("reference", "auto"),
    ("composed", "absorbed"),
    ("composed", "projected"),
    ("fused", "absorbed"),
]


def make_with_bias(*args, dtype=torch.float64, **options):
    """Return inputs with b_k, which moves the log-sum-exp."""
    inputs, heads = make(*args, **options)
    k_dim = inputs["w_k"].shape[0]
    inputs["b_k"] = torch.randn(k_dim, dtype=torch.float64, device=DEVICE, requires_grad=True)
    return cast(inputs, dtype), heads


def dropped(p):
    return dict(dropout_p=p, dropout_seed=torch.tensor(11, device=DEVICE)) if p else {}


def check_budget(inputs, heads, **options):
    upstream = upstream_with_lse(inputs, heads)
    exact = run_with_lse(cast(inputs, torch.float64), heads, "reference", upstream, **options)
    plain = run_with_lse(inputs, heads, "reference", upstream, **options)
    for backend in ("fused", "composed"):
        got = run_with_lse(inputs, heads, backend, upstream, **options)
        assert got["lse"].dtype == torch.float32
        assert not over_budget(got, exact, plain), backend


@pytest.mark.parametrize("padding", PADDINGS)
def test_reference_sums_over_the_tokens_that_count(padding):
    """Compare with an explicit computation, with dropout, which the log-sum-exp ignores."""
    inputs, heads = make_with_bias("row blocks", norm=True, padding=padding, grad=False)
    _, lse = query_pooling_reference(**inputs, num_heads=heads, return_lse=True, **dropped(0.5))
    x = nn.functional.layer_norm(
        inputs["x"], inputs["x"].shape[-1:], inputs["norm_weight"], inputs["norm_bias"]
    )
    k = (x @ inputs["w_k"].T + inputs["b_k"]).unflatten(-1, (heads, -1)).transpose(1, 2)
    q = inputs["queries"].unflatten(-1, (heads, -1)).transpose(0, 1)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    ignore = inputs.get("key_padding_mask")
    if padding == "lengths":
        ignore = torch.arange(x.shape[1], device=DEVICE) >= inputs["lengths"][:, None]
    if ignore is not None:
        logits = logits.masked_fill(ignore[:, None, None], -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_composed_equals_reference_in_float64(form, per_sample, norm, padding, p):
    inputs, heads = make_with_bias("row blocks", per_sample=per_sample, norm=norm, padding=padding)
    upstream = upstream_with_lse(inputs, heads)
    exact = run_with_lse(inputs, heads, "reference", upstream, **dropped(p))
    actual = run_with_lse(inputs, heads, "composed", upstream, form, **dropped(p))
    for name, want in exact.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10)
    assert exact["db_k"].any()  # through the log-sum-exp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    "shape, per_sample", [("one pass", False), ("row blocks", True), ("wide", False)]
)
def test_kernels_stay_within_the_budget(shape, per_sample, norm, padding, dtype):
    inputs, heads = make_with_bias(
        shape, per_sample=per_sample, norm=norm, padding=padding, dtype=dtype
    )
    check_budget(inputs, heads)


@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_kernels_stay_within_the_budget_with_dropout(norm, shape):
    inputs, heads = make_with_bias(shape, norm=norm, padding="mask", dtype=torch.float16)
    check_budget(inputs, heads, **dropped(0.3))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
def test_half_precision_plans_in_float32(monkeypatch, shape, norm, arch):
    if CUDA:
        pytest.skip("a 16-bit plan may not fit a GPU in float32; the interpreter runs it")
    use_half_precision_plan(monkeypatch, arch)
    inputs, heads = make_with_bias(shape, norm=norm, padding="mask", dtype=torch.float32)
    check_budget(inputs, heads)
    check_budget(inputs, heads, **dropped(0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_a_sample_without_tokens_has_minus_infinity_and_gradient_zero(backend, form, norm, dtype):
    """Not even an upstream gradient of NaN, as of logaddexp(-inf, -inf), has an effect."""
    inputs, heads = make_with_bias(norm=norm, padding="mask", dtype=dtype)
    if not norm:
        del inputs["b_k"]  # then nothing is added to the kernels' log-sum-exp
    upstream = upstream_with_lse(inputs, heads)
    want = run_with_lse(inputs, heads, backend, upstream, form)
    ignored = inputs["key_padding_mask"]
    with torch.no_grad():
        inputs["x"][ignored] = math.nan
    upstream[1][0] = math.nan
    got = run_with_lse(inputs, heads, backend, upstream, form)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    assert not got["dx"][ignored].any()
    with mmfused.backend(backend):
        _, lse = query_pooling(**inputs, num_heads=heads, form=form, return_lse=True)
    assert lse[0].isneginf().all() and lse[1:].isfinite().all()


@pytest.mark.parametrize("batch, length, queries", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_empty_inputs(monkeypatch, backend, form, batch, length, queries):
    import query_pooling_cases as cases

    monkeypatch.setitem(cases.SHAPES, "empty", (batch, length, 70, queries, 1, 24, 20))
    inputs, heads = make_with_bias("empty", norm=True, dtype=torch.float32)
    got = run_with_lse(inputs, heads, backend, upstream_with_lse(inputs, heads), form)
    assert got["lse"].shape == (batch, 1, queries)
    for name, value in got.items():
        assert not value.any(), name


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_a_nan_in_a_token_makes_the_log_sum_exp_nan(backend, form, norm):
    inputs, heads = make_with_bias(norm=norm, dtype=torch.float32, grad=False)
    inputs["x"][1, 3, 4] = math.nan
    with mmfused.backend(backend):
        _, lse = query_pooling(**inputs, num_heads=heads, form=form, return_lse=True)
    assert lse[1].isnan().all() and lse[0::2].isfinite().all()


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_poolings_of_parts_merge_to_that_of_all_tokens(backend, form):
    inputs, heads = make_with_bias("row blocks", norm=True, padding="lengths", dtype=torch.float32)
    lengths = inputs.pop("lengths")
    length = inputs["x"].shape[1]
    half = 40
    upstream = upstream_with_lse(inputs, heads)
    want = run_with_lse(inputs | {"lengths": lengths}, heads, backend, upstream, form)

    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    with mmfused.backend(backend):
        parts = [
            query_pooling(
                **leaves | {"x": leaves["x"][:, first:last]},
                num_heads=heads,
                form=form,
                lengths=(lengths - first).clamp(0, last - first),
                return_lse=True,
            )
            for first, last in ((0, half), (half, length))
        ]
    outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    lse = torch.logsumexp(lses, 0)
    shares = torch.exp(lses - lse.clamp_min(torch.finfo(lse.dtype).min))
    out = (outs.unflatten(-1, (heads, -1)) * shares.mT[..., None]).sum(0).flatten(-2)
    got = {"out": out.detach(), "lse": lse.detach().masked_fill(lse.isneginf(), 0.0)}
    used = lse.masked_fill(lse.isneginf(), 0.0)
    gradients = torch.autograd.grad(
        [out, used], list(leaves.values()), [u.float() for u in upstream]
    )
    got |= {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_either_result_may_stay_unused(backend, form):
    inputs, heads = make_with_bias(norm=True, dtype=torch.float32)
    upstream = upstream_with_lse(inputs, heads)
    zero = [torch.zeros_like(u) for u in upstream]
    plain = run(inputs, heads, backend, upstream[0], form)
    used = run_with_lse(inputs, heads, backend, (upstream[0], zero[1]), form)
    for name, value in plain.items():
        torch.testing.assert_close(used[name], value, rtol=1e-5, atol=1e-5, msg=name)
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    with mmfused.backend(backend):
        _, lse = query_pooling(**leaves, num_heads=heads, form=form, return_lse=True)
    got = torch.autograd.grad(
        lse, list(leaves.values()), upstream[1].float(), materialize_grads=True, allow_unused=True
    )
    want = run_with_lse(inputs, heads, backend, (zero[0], upstream[1]), form)
    for name, value in zip(leaves, got, strict=True):
        torch.testing.assert_close(value, want[f"d{name}"], rtol=1e-5, atol=1e-5, msg=name)


def test_no_gradient_of_the_log_sum_exp_is_compiled_in_without_it():
    inputs, heads = make_with_bias(dtype=torch.float16)
    for return_lse in (False, True):
        with launches_made() as launches, mmfused.backend("fused"):
            out = query_pooling(**inputs, num_heads=heads, return_lse=return_lse)
            sum(part.sum() for part in (out if return_lse else (out,))).backward()
        given = {
            launch.args["dlse_ptr"] is not None for launch in launches if "dlse_ptr" in launch.args
        }
        assert given == {return_lse}


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_repeats_are_bitwise_equal(backend):
    inputs, heads = make_with_bias("row blocks", norm=True, padding="mask", dtype=torch.float32)
    upstream = upstream_with_lse(inputs, heads)
    first, second = (run_with_lse(inputs, heads, backend, upstream) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("eps, padding", [(None, "mask"), (1e-5, "none")])
def test_opcheck(eps, padding):
    inputs, _ = make(padding=padding, dtype=torch.float32, grad=False)
    x, q = inputs["x"], torch.randn(7, 70, device=DEVICE)
    given = (inputs.get("key_padding_mask"), None, None, None)
    args = (x, q, *given, eps, 0.0, None)
    z, *saved = torch.ops.mmfused.query_pooling_fwd(*args)
    dlse = torch.randn(z.shape[:2], device=DEVICE)
    args = (torch.randn_like(z), None, dlse, x, q, z, *saved, *given, True, 0.0, None)
    torch.library.opcheck(torch.ops.mmfused.query_pooling_bwd, args)


def test_derivatives_of_second_order():
    """The composed backend has them; the kernels raise an error."""
    inputs, heads = make_with_bias(norm=True, padding="mask")

    def lse_of(x, backend):
        others = {name: value.detach().to(x.dtype) for name, value in inputs.items()}
        others["key_padding_mask"] = inputs["key_padding_mask"]
        with mmfused.backend(backend):
            _, lse = query_pooling(
                **others | {"x": x}, num_heads=heads, form="absorbed", return_lse=True
            )
        return lse.masked_fill(lse.isneginf(), 0.0)

    x = inputs["x"].detach()[:, :4].clone().requires_grad_()
    inputs["key_padding_mask"] = inputs["key_padding_mask"][:, :4]
    assert torch.autograd.gradgradcheck(lambda x: lse_of(x, "composed"), (x,), fast_mode=True)
    x = x.detach().float().requires_grad_()
    (dx,) = torch.autograd.grad(lse_of(x, "fused").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_function_transforms_run_plain_formulas():
    inputs, heads = make_with_bias(dtype=torch.float32, grad=False)

    def total(queries):
        _, lse = query_pooling(**inputs | {"queries": queries}, num_heads=heads, return_lse=True)
        return lse.sum()

    queries = inputs["queries"].clone().requires_grad_()
    (want,) = torch.autograd.grad(total(queries), queries)
    torch.testing.assert_close(torch.func.grad(total)(queries.detach()), want)


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_compiles_to_one_graph(monkeypatch, backend):
    monkeypatch.undo()  # the compiler would trace into conftest's patched torch.empty
    inputs, heads = make_with_bias(norm=True, padding="lengths", dtype=torch.float32)
    upstream = upstream_with_lse(inputs, heads)

    def call(inputs):
        return query_pooling(**inputs, num_heads=heads, form="absorbed", return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in inputs.items()}
        wanted = [v for v in leaves.values() if v.requires_grad]
        with mmfused.backend(backend):
            outs = function(leaves)
        gradients = torch.autograd.grad(outs, wanted, [u.float() for u in upstream])
        results.append([*outs, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_invalid_lengths_give_nan(monkeypatch):
    monkeypatch.setattr("mmfused.ops._common.check_value", lambda *_: None)  # as on CUDA
    inputs, heads = make_with_bias(padding="lengths", dtype=torch.float32, grad=False)
    inputs["lengths"] = torch.tensor([5, 38, 0], device=DEVICE)
    for backend, form in BACKENDS_AND_FORMS:
        with mmfused.backend(backend):
            _, lse = query_pooling(**inputs, num_heads=heads, form=form, return_lse=True)
        assert lse[0].isfinite().all() and lse[1].isnan().all() and lse[2].isneginf().all()
