"""Query pooling: values and gradients, layouts, registration, behavior, and large offsets.

On a CPU the kernels run in Triton's interpreter.
"""

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
    upstream_for,
    use_half_precision_plan,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import QueryPooling, query_pooling, query_pooling_reference
from mmfused.kernels.recording import launches_made
from mmfused.testing import over_budget, relative_error, saved_bytes, value_and_gradients


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
    exact = run(inputs, heads, "reference", upstream)
    actual = run(inputs, heads, "composed", upstream, form)
    for name, want in exact.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10)
    if form == "absorbed":
        assert not actual["db_k"].any()


def test_reference_equals_multihead_attention():
    mha = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        mha.in_proj_bias.normal_(), mha.out_proj.bias.normal_()
    x, q = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 4, 24, dtype=torch.float64)
    ignore = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    want, _ = mha(q, x, x, key_padding_mask=ignore)
    (w_q, w_k, w_v), (b_q, b_k, b_v) = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    pooled = query_pooling_reference(
        x, q @ w_q.T + b_q, w_k, w_v, b_v, b_k, num_heads=3, key_padding_mask=ignore
    )
    torch.testing.assert_close(mha.out_proj(pooled), want, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(
    "shape", ["head dim 96", "more samples than partial sums", "one query", "short row blocks"]
)
def test_kernels_stay_within_the_budget_at_more_shapes(shape):
    inputs, heads = make(shape, padding="mask", dtype=torch.float32)
    check_budget(inputs, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["1 token", "31 tokens", "32 tokens", "65 tokens"])
def test_lengths_around_the_tiles_stay_within_the_budget(shape, norm, dtype):
    inputs, heads = make(shape, norm=norm, dtype=dtype, per_sample=shape == "32 tokens")
    check_budget(inputs, heads)


def check_budget(inputs, heads):
    upstream = upstream_for(inputs)
    exact = run(cast(inputs, torch.float64), heads, "reference", upstream)
    plain = run(inputs, heads, "reference", upstream)
    fused = run(inputs, heads, "fused", upstream)
    assert not over_budget(fused, exact, plain)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks", "short", "short row blocks"])
def test_half_precision_plans_in_float32(monkeypatch, shape, norm, padding, arch):
    """Run the plans for 16 bits on float32 inputs: 16-bit rounding could hide errors."""
    if CUDA:
        pytest.skip("a 16-bit plan may not fit a GPU in float32; the interpreter runs it")
    use_half_precision_plan(monkeypatch, arch)
    inputs, heads = make(shape, norm=norm, padding=padding, dtype=torch.float32)
    check_budget(inputs, heads)


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_plan_chooses_kernels_by_size_and_architecture(arch):
    from mmfused.kernels.query_pooling import plan

    def kernels(rows, dim, dtype=torch.bfloat16, **options):
        tiles = plan(rows, dim, dtype, arch, False, **options)
        return set(tiles.forward), set(tiles.backward)

    assert kernels(32, 768)[0] == kernels(256, 768, padded=True)[0] == {"onepass"}
    assert kernels(32, 768, length=33)[0] == {"onepass"}
    for length in (1, 16, 17, 32):
        short = {"onepass" if arch == 100 else "short"}
        assert kernels(32, 768, length=length)[0] == short
        with_dropout = kernels(32, 768, length=length, dropout=True)[0]
        assert with_dropout == (short if length <= 16 or arch == 80 else {"onepass"})
        assert kernels(32, 768, length=length, per_sample=True)[0] == {"onepass"}
        assert kernels(32, 2048, length=length)[0] == {"logits", "pool"}
    assert kernels(32, 2048)[0] == kernels(256, 2048, padded=True)[0] == {"logits", "pool"}
    assert kernels(2, 768)[1] == kernels(256, 768, padded=True)[1] == {"dlogits", "dx", "dq"}
    assert kernels(33, 768) == kernels(256, 2048) == ({"softmax"}, {"softmax"})


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["kept", "dropped"])
@pytest.mark.parametrize("shape", ["one pass", "short", "short row blocks"])
def test_a_sample_does_not_depend_on_the_others(shape, p):
    """Not even its bits do, and neither do NaNs in the other samples reach it."""
    inputs, heads = make(shape, norm=True, padding="mask", dtype=torch.float16, grad=False)
    options = dict(num_heads=heads, return_lse=True, dropout_p=p)
    options |= dict(dropout_seed=torch.zeros((), dtype=torch.int64, device=DEVICE)) if p else {}

    def pool(samples):
        parts = {name: inputs[name][samples] for name in ("x", "key_padding_mask")}
        with mmfused.backend("fused"):
            return query_pooling(**(inputs | parts), **options)

    want = pool(slice(0, 4))  # dropout depends on the index of a sample
    for got in (pool(slice(0, 2)), pool(slice(None))):
        for value, other in zip(got, want, strict=True):
            assert torch.equal(value[:2], other[:2])
    inputs["x"][2] = math.nan
    assert not pool(slice(None))[0][2].isfinite().any()
    for value, other in zip(pool(slice(None)), want, strict=True):
        assert torch.equal(value[:2], other[:2])


@pytest.mark.parametrize("shape", ["short", "short row blocks"])
def test_a_program_pools_several_short_samples(monkeypatch, shape):
    from mmfused.kernels.query_pooling import short_forward

    use_half_precision_plan(monkeypatch, 80)
    inputs, heads = make(shape, dtype=torch.float16)
    want = run(inputs, heads, "fused")
    monkeypatch.setattr(short_forward, "multiprocessors", lambda x: 1)
    with launches_made() as launches:
        got = run(inputs, heads, "fused")
    assert "short_forward_kernel" in {launch.name for launch in launches}
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


NAN_CASES = [
    (b, f, torch.float32) for b in ("reference", "composed") for f in ("absorbed", "projected")
]
NAN_CASES += [
    ("fused", "absorbed", dtype) for dtype in (torch.float32, torch.float16)
]  # each dtype has its own plan


@pytest.mark.parametrize("backend, form, dtype", NAN_CASES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_samples_without_tokens_give_zero(norm, backend, form, dtype):
    inputs, heads = make(norm=norm, padding="mask", dtype=dtype)
    got = run(inputs, heads, backend, form=form)
    assert not got["out"][0].any() and not got["dx"][0].any()
    assert got["out"][1].any() and got["dx"][1].any()
    inputs["key_padding_mask"][:] = True
    for name, value in run(inputs, heads, backend, form=form).items():
        assert not value.any(), name


@pytest.mark.parametrize("backend, form, dtype", NAN_CASES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("padding", ["mask", "lengths"])
def test_nan_in_ignored_tokens_has_no_effect(padding, norm, backend, form, dtype):
    inputs, heads = make(norm=norm, padding=padding, dtype=dtype)
    want = run(inputs, heads, backend, form=form)
    length = inputs["x"].shape[1]
    ignored = inputs.get("key_padding_mask")
    if ignored is None:
        ignored = torch.arange(length, device=DEVICE) >= inputs["lengths"][:, None]
    with torch.no_grad():
        inputs["x"][ignored] = math.nan
    for name, value in run(inputs, heads, backend, form=form).items():
        assert torch.equal(value, want[name]), name
    assert not want["dx"][ignored].any()


@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_empty_inputs(batch, length, backend):
    inputs, heads = make(dtype=torch.float32)
    inputs["x"] = (
        inputs["x"].detach()[:1].expand(batch, -1, -1)[:, :length].clone().requires_grad_()
    )
    if not length:
        inputs["lengths"] = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    got = run(inputs, heads, backend)
    assert got["out"].shape[0] == batch and not got["out"].any()
    assert got["dx"].shape == inputs["x"].shape and not got["dqueries"].any()


@pytest.mark.parametrize("factor, mean", [(300, 0), (1, 1)])
def test_large_logits_and_a_common_mean_stay_within_the_budget(factor, mean):
    """Queries times 300 give large logits. The norm removes a constant that is added to x."""
    inputs, heads = make(norm=True, padding="mask", dtype=torch.float32)
    with torch.no_grad():
        inputs["queries"].mul_(factor), inputs["x"].add_(mean)
    check_budget(inputs, heads)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_strided_inputs_and_gradients(backend):
    inputs, heads = make(dtype=torch.float32, padding="mask")
    batch, length, dim = inputs["x"].shape
    want = run(inputs, heads, backend, torch.ones(batch, 5, 20, device=DEVICE))
    views = {
        "tokens after a class token": torch.cat(
            [torch.full((batch, 1, dim), math.nan, device=DEVICE), inputs["x"].detach()], 1
        )[:, 1:],
        "time first": inputs["x"].detach().transpose(0, 1).contiguous().transpose(0, 1),
        "columns last": inputs["x"].detach().transpose(1, 2).contiguous().transpose(1, 2),
    }
    for name, view in views.items():
        strided = inputs | {
            "x": view.requires_grad_(),
            "key_padding_mask": inputs["key_padding_mask"].T.contiguous().T,
        }
        got = run(strided, heads, backend, torch.ones((), device=DEVICE).expand(batch, 5, 20))
        for key, value in got.items():
            torch.testing.assert_close(
                value,
                want[key],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, n=name, k=key: f"{n}, {k}: {m}",
            )


@pytest.mark.parametrize("backend", ["composed", "fused"])
@pytest.mark.parametrize("layout", ["transpose", "cat"])
def test_upstream_gradients_may_have_any_layout(layout, backend):
    inputs, heads = make(dtype=torch.float32)
    weight = torch.randn(3, 20, 5, device=DEVICE)

    def call(**tensors):
        with mmfused.backend(backend):
            out = query_pooling(**tensors, num_heads=heads, form="absorbed")
        if layout == "transpose":
            return (out.transpose(1, 2) * weight).sum()
        return (
            torch.cat([out, out * 2], -1) * torch.cat([weight, weight], 1).transpose(1, 2)
        ).sum()

    got = value_and_gradients(call, inputs)
    backend = "reference"
    want = value_and_gradients(call, inputs)
    for key, value in got.items():
        assert relative_error(value, want[key]) < 1e-5, key


# ---- registration (torch.compile: tests/test_compile.py) -----------------------------------------


@pytest.mark.parametrize("eps, padding", [(None, "mask"), (1e-5, "lengths"), (1e-5, "none")])
def test_opcheck(eps, padding):
    inputs, _ = make(padding=padding, dtype=torch.float32, grad=False)
    x, q = inputs["x"], torch.randn(7, 70, device=DEVICE)
    tokens = (inputs.get("key_padding_mask"), inputs.get("lengths"), None, None)
    for dropout in ((0.0, None), (0.3, torch.tensor(5, device=DEVICE))):
        args = (x, q, *tokens, eps, *dropout)
        torch.library.opcheck(torch.ops.mmfused.query_pooling_fwd, args)
        z, *saved = torch.ops.mmfused.query_pooling_fwd(*args)
        dksum = torch.randn(z.shape[:2], device=DEVICE) if dropout[0] else None
        for need_dx in (True, False):
            upstream = (torch.randn_like(z), dksum, None)
            args = (*upstream, x, q, z, *saved, *tokens, need_dx, *dropout)
            torch.library.opcheck(torch.ops.mmfused.query_pooling_bwd, args)


# ---- behavior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
def test_autocast_and_master_weights(backend):
    """Under autocast, the output has 16 bits. The gradients of float32 inputs are float32."""
    inputs, heads = make(dtype=torch.float32, norm=True)
    low = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    with torch.autocast(DEVICE, dtype=low):
        got = run(inputs, heads, "composed" if backend == "fused" and not CUDA else backend)
    assert got["out"].dtype == low
    assert all(value.dtype == torch.float32 for name, value in got.items() if name != "out")
    exact = run(cast(inputs, torch.float64), heads, "reference")
    for name, value in got.items():
        assert relative_error(value, exact[name]) < 3e-2, name
    mixed = inputs | {"x": inputs["x"].detach().to(low).requires_grad_()}
    assert run(mixed, heads, "composed")["dw_k"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_checkpoint_and_bitwise_repeats(backend):
    inputs, heads = make("row blocks", dtype=torch.float32, norm=True, padding="mask")
    upstream = upstream_for(inputs)
    want = run(inputs, heads, backend, upstream)

    def pool(tensors):
        # backward() calls pool again, after a context around the forward would have ended.
        with mmfused.backend(backend):
            return query_pooling(**tensors, num_heads=heads, form="absorbed")

    def call(**tensors):
        return checkpoint(pool, tensors, use_reentrant=False)

    for got in (run(inputs, heads, backend, upstream), value_and_gradients(call, inputs, upstream)):
        for key, value in got.items():
            assert torch.equal(value, want[key]), key


@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
@pytest.mark.parametrize("only", ["x", "queries", "w_k", "w_v", "b_v"])
def test_only_the_required_gradient_is_computed(only, backend):
    inputs, heads = make(dtype=torch.float32)
    want = run(inputs, heads, backend)
    frozen = {k: v.detach().requires_grad_(k == only) for k, v in inputs.items()}
    got = run(frozen, heads, backend)
    assert set(got) == {"out", f"d{only}"}
    assert torch.equal(got[f"d{only}"], want[f"d{only}"])


def test_no_gradient_of_x_is_computed_if_x_needs_none():
    for shape, frozen in (
        ("row blocks", True),
        ("row blocks", False),
        ("one pass", True),
        ("one pass", False),
    ):
        inputs, heads = make(shape, dtype=torch.float16, padding="mask")
        inputs["x"].requires_grad_(not frozen)
        with launches_made() as launches:
            run(inputs, heads, "fused")
        makes_dx = any(
            launch.name == "dx_kernel" or launch.constexprs.get("NEED_DX") for launch in launches
        )
        assert makes_dx != frozen, shape
        assert any(
            launch.name == "dq_kernel" or "NEED_DX" in launch.constexprs for launch in launches
        )


@pytest.mark.not_on_ptx("counts the products of the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_of_padding_are_skipped(monkeypatch, dtype):
    """The number of matrix products depends only on the valid tokens."""
    if CUDA:
        pytest.skip("only the interpreter can count matrix products")
    from triton.runtime.interpreter import InterpreterBuilder

    counted = [0]
    real = InterpreterBuilder.create_dot
    inputs, heads = make("row blocks", dtype=dtype)

    def count(*args, **kwargs):
        counted[0] += 1
        return real(*args, **kwargs)

    def dots(**padding):
        counted[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_dot", count)
            run(inputs | padding, heads, "fused")
        return counted[0]

    def left_padded(*lengths):
        return torch.arange(65) < 65 - torch.tensor(lengths)[:, None]

    full, half, none = (
        dots(lengths=torch.tensor(lengths)) for lengths in ([65, 65], [65, 0], [0, 0])
    )
    assert none == 0 < half == full // 2
    full, half, none = (
        dots(key_padding_mask=left_padded(*lengths)) for lengths in ([65, 65], [65, 0], [0, 0])
    )
    assert none == 0 < half == full // 2
    assert dots(key_padding_mask=left_padded(1, 1)) < full / 2


def test_double_backward():
    """The composed backend supports double backward; the kernels raise an error."""

    def call(x, backend):
        with mmfused.backend(backend):
            return query_pooling(
                x, queries.to(x.dtype), w.to(x.dtype), w.to(x.dtype), form="absorbed"
            )

    x, queries, w = (
        torch.randn(*s, dtype=torch.float64, device=DEVICE) for s in ((2, 3, 4), (2, 4), (4, 4))
    )
    assert torch.autograd.gradgradcheck(lambda x: call(x, "composed"), (x.requires_grad_(),))
    x = x.detach().float().requires_grad_()
    for power in (2, 1):  # the upstream gradient has a graph, or is constant
        (dx,) = torch.autograd.grad(call(x, "fused").pow(power).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_keys_and_values_are_never_saved():
    """nn.MultiheadAttention saves the keys and the values; the absorbed form saves neither."""
    x = torch.randn(4, 197, 768, device=DEVICE)
    pool = QueryPooling(768, 32, 1).to(DEVICE)
    mha = nn.MultiheadAttention(768, 1, batch_first=True).to(DEVICE)
    x.requires_grad_()
    queries = pool.queries.expand(4, -1, -1)
    ours = saved_bytes(lambda: pool(x), (x, *pool.parameters()))
    theirs = saved_bytes(
        lambda: mha(queries, x, x, need_weights=False)[0], (x, pool.queries, *mha.parameters())
    )
    keys = 4 * 197 * 768 * 4
    assert theirs > 2 * keys
    assert ours < keys


# ---- offsets past 2^31 ---------------------------------------------------------------------------


def test_offsets_are_64_bit():
    """Load a tile of x that starts more than 2^31 elements after the first element."""
    from mmfused.kernels.tiles import load_tokens

    if CUDA:
        pytest.skip("tested in the interpreter, which runs the same source")
    import triton
    import triton.language as tl

    @triton.jit
    def probe(x_ptr, out_ptr, first, stride, D: tl.constexpr):
        n = first + tl.arange(0, 16)
        cols = tl.arange(0, 16)
        tile = load_tokens(x_ptr, n, cols, n < first + 3, stride, D)
        tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + cols[None, :], tile)

    probe.fn.__globals__["load_tokens"] = load_tokens
    rows, stride = 70_000, 32_000
    x = torch.zeros(rows * stride, dtype=torch.uint8)  # 2.2 GB of virtual memory, hardly any used
    x[(rows - 5) * stride : (rows - 5) * stride + 10] = 7
    out = torch.full((16, 16), 9, dtype=torch.uint8)
    probe[(1,)](x, out, rows - 5, stride, D=10)
    assert (out[0, :10] == 7).all() and not out[0, 10:].any() and not out[1:].any()
