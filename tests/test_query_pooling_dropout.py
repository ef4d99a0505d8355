"""Dropout of query pooling: a seed gives the same mask on every backend and in every form.

test_compile.py compiles it.
"""

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
    upstream_for,
    use_half_precision_plan,
)
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import QTransform, QueryPooling, query_pooling, query_pooling_reference
from mmfused.kernels.recording import launches_made
from mmfused.random import draw_seed
from mmfused.testing import (
    dropout_mask,
    over_budget,
    relative_error,
    saved_bytes,
    value_and_gradients,
)

P = 0.3
BACKENDS_AND_FORMS = [
    ("reference", "auto"),
    ("composed", "absorbed"),
    ("composed", "projected"),
    ("fused", "absorbed"),
]


def seed(value=2**40 + 7):
    return torch.tensor(value, device=DEVICE)


def dropout_options(p=P, value=2**40 + 7):
    return dict(dropout_p=p, dropout_seed=seed(value))


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_composed_equals_reference_in_float64(form, per_sample, norm, padding):
    inputs, heads = make("row blocks", per_sample=per_sample, norm=norm, padding=padding)
    inputs["b_k"] = torch.randn(
        inputs["w_k"].shape[0], dtype=torch.float64, device=DEVICE, requires_grad=True
    )
    upstream = upstream_for(inputs)
    exact = run(inputs, heads, "reference", upstream, **dropout_options())
    actual = run(inputs, heads, "composed", upstream, form, **dropout_options())
    for name, want in exact.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10)
    assert relative_error(run(inputs, heads, "reference", upstream)["out"], exact["out"]) > 0.1


def test_reference_drops_attention_probabilities():
    """Compare with an explicit computation for one head."""
    inputs, _ = make(padding="mask", grad=False)
    x = inputs["x"].masked_fill(inputs["key_padding_mask"][:, :, None], 0.0)
    logits = (
        inputs["queries"] @ (x @ inputs["w_k"].T).transpose(1, 2) * inputs["w_k"].shape[0] ** -0.5
    )
    probs = (
        logits.masked_fill(inputs["key_padding_mask"][:, None], -torch.inf)
        .softmax(-1)
        .nan_to_num(0.0)
    )
    probs = torch.where(dropout_mask(seed(), (3, 1, 5, 37), P)[:, 0], probs / (1 - P), 0.0)
    want = probs @ (x @ inputs["w_v"].T + inputs["b_v"])
    torch.testing.assert_close(
        query_pooling_reference(**inputs, **dropout_options()), want, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    "shape, per_sample",
    [("one pass", False), ("short", False), ("row blocks", True), ("wide", False)],
)
def test_kernels_stay_within_the_budget(shape, per_sample, norm, padding, dtype):
    inputs, heads = make(shape, per_sample=per_sample, norm=norm, padding=padding, dtype=dtype)
    check_budget(inputs, heads)


@pytest.mark.parametrize("shape", ["head dim 96", "one query"])
def test_kernels_stay_within_the_budget_at_more_shapes(shape):
    """With 70 % dropped, dS is the difference of larger terms than in plain PyTorch's formula."""
    inputs, heads = make(shape, padding="mask", dtype=torch.float32)
    check_budget(inputs, heads, p=0.7, factor=4.0)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_kernels_stay_within_the_budget_without_biases(norm):
    """Without biases, the operator's output ``ksum`` is unused and has no gradient."""
    inputs, heads = make(norm=norm, dtype=torch.float16)
    check_budget({k: v for k, v in inputs.items() if k not in ("b_v", "norm_bias")}, heads)


def check_budget(inputs, heads, p=P, factor=2.0):
    upstream = upstream_for(inputs)
    exact = run(cast(inputs, torch.float64), heads, "reference", upstream, **dropout_options(p))
    plain = run(inputs, heads, "reference", upstream, **dropout_options(p))
    for backend in ("fused", "composed"):
        results = run(inputs, heads, backend, upstream, **dropout_options(p))
        assert not over_budget(results, exact, plain, factor=factor), backend


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks", "short"])
def test_half_precision_plans_in_float32(monkeypatch, shape, norm, arch):
    if CUDA:
        pytest.skip("a 16-bit plan may not fit a GPU in float32; the interpreter runs it")
    use_half_precision_plan(monkeypatch, arch)
    inputs, heads = make(shape, norm=norm, padding="mask", dtype=torch.float32)
    check_budget(inputs, heads)


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["mask", "lengths"])
def test_samples_without_tokens_give_zero_and_nan_in_ignored_tokens_has_no_effect(
    padding, dtype, backend, form
):
    inputs, heads = make(norm=True, padding=padding, dtype=dtype)
    want = run(inputs, heads, backend, form=form, **dropout_options())
    assert not want["out"][0].any() and not want["dx"][0].any() and want["out"][1].any()
    ignored = inputs.get("key_padding_mask")
    if ignored is None:
        ignored = torch.arange(inputs["x"].shape[1], device=DEVICE) >= inputs["lengths"][:, None]
    with torch.no_grad():
        inputs["x"][ignored] = torch.nan
    for name, value in run(inputs, heads, backend, form=form, **dropout_options()).items():
        assert torch.equal(value, want[name]), name
    assert not want["dx"][ignored].any()


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_empty_inputs(batch, length, backend, form):
    inputs, heads = make(dtype=torch.float32)
    inputs["x"] = (
        inputs["x"].detach()[:1].expand(batch, -1, -1)[:, :length].clone().requires_grad_()
    )
    got = run(inputs, heads, backend, form=form, **dropout_options())
    assert got["out"].shape[0] == batch and not got["out"].any() and not got["dqueries"].any()


def test_gradcheck_and_gradgradcheck():
    x, q, w, b = (
        torch.randn(*s, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for s in ((2, 5, 4), (2, 4), (4, 4), (4,))
    )

    def call(x, q, w, b):
        with mmfused.backend("composed"):
            return query_pooling(
                x, q, w, w, b, norm_weight=b, norm_bias=b, form="absorbed", **dropout_options()
            )

    assert torch.autograd.gradcheck(call, (x, q, w, b)) and torch.autograd.gradgradcheck(
        call, (x, q, w, b)
    )


# ---- the mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_mask_equals_dropout_mask(dtype, backend, form):
    """With equal logits and one-hot tokens, the output is the mask, up to a factor."""
    batch, length, queries, heads = 3, 150, 5, 2
    eye = torch.eye(length, dtype=dtype, device=DEVICE)
    zeros = torch.zeros(queries, 4, dtype=dtype, device=DEVICE)
    with mmfused.backend(backend):
        out = query_pooling(
            eye.expand(batch, -1, -1),
            zeros,
            eye[:4],
            torch.cat([eye] * heads),
            num_heads=heads,
            form=form,
            **dropout_options(),
        )
    got = out.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, L, N)
    kept = dropout_mask(seed(), got.shape, P)
    assert torch.equal(got != 0, kept)
    torch.testing.assert_close(got[kept], torch.full_like(got[kept], 1 / (1 - P) / length))


def test_the_mask_is_random():
    """All statistics are within 5 standard deviations of their expected values.

    The statistics are the shares of kept elements, and the correlations between neighbors, between
    streams and between seeds.
    """
    shape, p = (40, 3, 7, 301), 0.2
    mask = dropout_mask(seed(0), shape, p)
    size, within = (
        mask.numel(),
        lambda share, n: abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5,
    )
    assert within(mask.double().mean().item(), size)
    assert all(within(share, size / shape[3]) for share in mask.double().mean((0, 1, 2)).tolist())
    assert all(within(share, size / shape[0]) for share in mask.double().mean((1, 2, 3)).tolist())
    x = (mask.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    for dim in range(4):
        for step in range(1, 5):
            a, b = (
                x.narrow(dim, 0, max(shape[dim] - step, 0)),
                x.narrow(dim, min(step, shape[dim]), max(shape[dim] - step, 0)),
            )
            assert a.numel() == 0 or abs((a * b).mean().item()) < 5 / a.numel() ** 0.5, (dim, step)
    others = [dropout_mask(seed(0), shape, p, stream) for stream in (1, 2, 3)]
    others += [dropout_mask(seed(s), shape, p) for s in (1, 2, 2**32, 2**62, -1)]
    for other in others:
        assert abs((x * (other.double() - (1 - p))).mean().item()) < 5 * (p * (1 - p) / size) ** 0.5


@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_the_mean_over_many_masks_equals_no_dropout(form):
    inputs, heads = make(norm=True, padding="mask")
    many = 3000
    one = inputs | {
        k: inputs[k].detach()[2:3].requires_grad_(k == "x") for k in ("x", "key_padding_mask")
    }
    repeated = one | {
        k: one[k].detach().expand(many, -1, -1)[:, :, : one[k].shape[-1]].clone() for k in ("x",)
    }
    repeated["x"].requires_grad_()
    repeated["key_padding_mask"] = one["key_padding_mask"].expand(many, -1)
    upstream = torch.randn(1, 5, 20, dtype=torch.float64, device=DEVICE)
    want = run(one, heads, "composed", upstream, form)
    got = run(repeated, heads, "composed", upstream.expand(many, -1, -1), form, **dropout_options())
    for name in ("out", "dx"):
        error = (got[name].mean(0) - want[name][0]).abs()
        assert (error <= 6 * got[name].std(0) / many**0.5 + 1e-12).all() and got[name].std(
            0
        ).any(), name
    for name in ("dqueries", "dw_k", "dw_v", "db_v", "dnorm_weight", "dnorm_bias"):
        assert relative_error(got[name] / many, want[name]) < 0.1, name


# ---- behavior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_equal_seeds_give_equal_bits_and_other_seeds_other_results(backend, form):
    inputs, heads = make("row blocks", dtype=torch.float32, norm=True, padding="mask")
    upstream = upstream_for(inputs)
    want = run(inputs, heads, backend, upstream, form, **dropout_options())
    for name, value in run(inputs, heads, backend, upstream, form, **dropout_options()).items():
        assert torch.equal(value, want[name]), name
    assert not torch.equal(
        run(inputs, heads, backend, upstream, form, **dropout_options(value=8))["out"], want["out"]
    )
    without = run(inputs, heads, backend, upstream, form)
    for name, value in run(inputs, heads, backend, upstream, form, **dropout_options(0.0)).items():
        assert torch.equal(value, without[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_a_recomputation_draws_the_same_mask(backend, form, reentrant):
    inputs, heads = make(dtype=torch.float32, norm=True)
    names = list(inputs)

    def pool(*tensors):
        with mmfused.backend(backend):
            return query_pooling(
                **dict(zip(names, tensors, strict=True)), num_heads=heads, form=form, dropout_p=P
            )

    def plain(**tensors):
        torch.manual_seed(4)
        return pool(*tensors.values())

    def checkpointed(**tensors):
        torch.manual_seed(4)
        out = checkpoint(pool, *tensors.values(), use_reentrant=reentrant)
        torch.rand(3)  # advances the generator before backward
        return out

    want = value_and_gradients(plain, inputs)
    if reentrant:  # a reentrant checkpoint does not support torch.autograd.grad
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        out = checkpointed(**leaves)
        out.backward(torch.ones_like(out))
        got = {"out": out.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}
    else:
        got = value_and_gradients(checkpointed, inputs)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    assert not torch.equal(
        want["out"], value_and_gradients(lambda **t: pool(*t.values()), inputs)["out"]
    )


def test_no_mask_is_saved_and_no_mask_is_made_without_dropout():
    inputs, heads = make(dtype=torch.float32)

    def saved(**options):
        with mmfused.backend("fused"):
            return saved_bytes(
                lambda: query_pooling(**inputs, num_heads=heads, **options), tuple(inputs.values())
            )

    def masks_made(launches):
        return [launch.name for launch in launches].count("keep_words_kernel")

    with launches_made() as launches:
        without = saved()
    assert masks_made(launches) == 0
    rows = 3 * 5  # dropout saves the seed, and one more number for each row
    with launches_made() as launches:
        assert saved(**dropout_options()) - without <= rows * 4 + 8
    assert masks_made(launches) == 1
    with launches_made() as launches:
        run(inputs, heads, "fused", **dropout_options())
    assert masks_made(launches) == 2


@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
def test_autocast(backend):
    inputs, heads = make(dtype=torch.float32, norm=True)
    low = torch.float16 if CUDA else torch.bfloat16
    with torch.autocast(DEVICE, dtype=low):
        got = run(
            inputs,
            heads,
            "composed" if backend == "fused" and not CUDA else backend,
            **dropout_options(),
        )
    exact = run(cast(inputs, torch.float64), heads, "reference", **dropout_options())
    assert got["out"].dtype == low
    for name, value in got.items():
        assert relative_error(value, exact[name]) < 3e-2, name


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_module(backend, heads):
    """The module equals the reference in training, and a module without dropout in evaluation."""
    pool = QueryPooling(
        32, 4, heads, q_proj=True, out_proj=True, bias=True, norm_kv=True, dropout=P
    ).to(DEVICE)
    without_dropout = QueryPooling(
        32, 4, heads, q_proj=True, out_proj=True, bias=True, norm_kv=True
    ).to(DEVICE)
    with torch.no_grad():
        for bias in (pool.v_proj.bias, pool.out_proj.bias, pool.norm_kv.bias):
            bias.normal_()
    without_dropout.load_state_dict(pool.state_dict())
    x, ignore = (
        torch.randn(9, 6, 32, device=DEVICE),
        torch.zeros(9, 6, dtype=torch.bool, device=DEVICE),
    )
    ignore[3] = True

    def call(module, name, **options):
        with mmfused.backend(name):
            return module(x, ignore, **options)

    want = call(pool, "reference", dropout_seed=seed())
    torch.testing.assert_close(call(pool, backend, dropout_seed=seed()), want, rtol=1e-4, atol=1e-5)
    assert not want[3].any() and not torch.equal(call(pool, backend), call(pool, backend))
    torch.manual_seed(5)
    drawn = call(pool, backend)
    torch.manual_seed(5)
    assert torch.equal(drawn, call(pool, backend, dropout_seed=draw_seed(torch.device(DEVICE))))
    assert torch.equal(call(pool.eval(), backend), call(without_dropout, backend))
    assert "dropout=0.3" in repr(pool)


def test_q_transform_drops_attention_probabilities():
    model = QTransform(16, 3, depth=2, num_heads=2, dropout=0.2).to(DEVICE)
    x = torch.randn(4, 5, 16, device=DEVICE)
    assert [block.pool.dropout for block in model.blocks] == [0.2, 0.2]
    for block in model.blocks:
        block.drop.p = 0.0
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


BAD = {
    "dropout_p: got 1.0, expected a number from 0 to below 1": dict(dropout_p=1.0),
    "dropout_p: got -0.1, expected a number from 0 to below 1": dict(dropout_p=-0.1),
    "dropout_p: got nan, expected a number from 0 to below 1": dict(dropout_p=float("nan")),
    "dropout_seed: got dtype torch.int32 and shape (), expected a torch.int64 scalar": dict(
        dropout_p=0.1, dropout_seed=torch.tensor(3, dtype=torch.int32)
    ),
    "dropout_seed: got dtype torch.int64 and shape (1,), expected": dict(
        dropout_p=0.1, dropout_seed=torch.tensor([3])
    ),
    "dropout_seed: got a tensor on meta, expected cpu, where x is": dict(
        dropout_p=0.1, dropout_seed=torch.tensor(3, device="meta")
    ),
    "dropout_seed: got a int, expected a torch.Tensor": dict(dropout_p=0.1, dropout_seed=3),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_raises_a_one_line_message(sentence):
    inputs, _ = make(dtype=torch.float32, grad=False, device="cpu")
    with pytest.raises((TypeError, ValueError)) as error:
        query_pooling(**inputs, **BAD[sentence])
    assert sentence in str(error.value)
    assert str(error.value).startswith("query_pooling: ") and str(error.value).count("\n") == 0


def test_a_module_refuses_a_dropout_of_1_or_more():
    with pytest.raises(
        ValueError, match="QueryPooling: dropout: got 1.5, expected a number from 0 to below 1"
    ):
        QueryPooling(8, 2, dropout=1.5)


def test_auto_form_under_dropout_compares_only_flops():
    from mmfused.ops.query_pooling.composed import cheaper_form

    x, q, w = (
        torch.empty(8, 257, 768, device="meta"),
        torch.empty(8, 32, 768, device="meta"),
        torch.empty(768, 768, device="meta"),
    )
    assert cheaper_form(x, q, w, w, 12) == "projected"
    assert cheaper_form(x, q, w, w, 12, 0.1) == "absorbed"
    assert cheaper_form(x, q, w, w, 32, 0.1) == "projected"


# ---- one token has all the attention weight ------------------------------------------------------


@pytest.mark.parametrize("shape", ["small", "wide"])
@pytest.mark.parametrize("p", [0.1, P])
@pytest.mark.parametrize(("backend", "form"), BACKENDS_AND_FORMS)
def test_logits_have_no_gradient_if_one_token_has_all_the_weight(backend, form, p, shape):
    """The gradient of the logits is the difference of two equal terms, rounded equally."""
    torch.manual_seed(5)
    batch, length, dim = (3, 5, 24) if shape == "small" else (2, 3, 1100)
    x = torch.randn(batch, length, dim, device=DEVICE) * 10
    queries = torch.randn(batch, 2, dim, device=DEVICE).requires_grad_()
    w_k, w_v, b_v = (
        torch.eye(dim, device=DEVICE),
        torch.randn(3, dim, device=DEVICE),
        torch.randn(3, device=DEVICE),
    )
    with mmfused.backend(backend):
        out = query_pooling(x, queries, w_k, w_v, b_v, scale=1e4, form=form, **dropout_options(p))
        (gradient,) = torch.autograd.grad(out, queries, torch.randn_like(out))
    assert gradient.abs().max() == 0
