"""Query pooling of packed tokens: x (total, D) with ``cu_seqlens``."""

import importlib
import math

import pytest
import torch
from query_pooling_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    cast,
    make,
    run,
    run_with_lse,
    upstream_with_lse,
    use_half_precision_plan,
)

import mmfused
from mmfused import QueryPooling, query_pooling
from mmfused.testing import over_budget

BACKENDS_AND_FORMS = [
    ("reference", "auto"),
    ("composed", "absorbed"),
    ("composed", "projected"),
    ("fused", "absorbed"),
]
TAIL = 7  # rows of x after the last sample


def pack(inputs, *, first=0, dtype=torch.int32):
    """Return the inputs with packed tokens, and the same tokens with ``lengths``.

    ``first``: number of rows of x before the first sample.
    """
    x = inputs["x"].detach()
    batch, length, dim = x.shape
    lengths = torch.randint(0, length + 1, (batch,))
    special = [length // 2 + 1, length] if batch == 2 else [length // 2 + 1, 0, length]
    lengths[: len(special)] = torch.tensor(special)
    offsets = first + torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = torch.randn(int(offsets[-1]) + TAIL, dim, dtype=torch.float64).to(DEVICE, x.dtype)
    for sample, tokens in enumerate(x):
        packed[offsets[sample] : offsets[sample + 1]] = tokens[: lengths[sample]]
    packed.requires_grad_(inputs["x"].requires_grad)
    offsets = offsets.to(DEVICE, dtype)
    return (
        inputs | dict(x=packed, cu_seqlens=offsets),
        inputs | dict(lengths=lengths.to(DEVICE)),
        dict(max_seqlen=length),
    )


def make_packed(*args, first=0, dtype=torch.float64, **options):
    inputs, heads = make(*args, **options)
    k_dim = inputs["w_k"].shape[0]
    inputs["b_k"] = torch.randn(k_dim, dtype=torch.float64, device=DEVICE, requires_grad=True)
    packed, padded, sizes = pack(cast(inputs, dtype), first=first)
    return packed, padded, sizes, heads


def dropped(p):
    return dict(dropout_p=p, dropout_seed=torch.tensor(11, device=DEVICE)) if p else {}


def of_packed(results, packed, padded):
    """Return results of padded tokens with the gradient of x as that of packed tokens."""
    dx = torch.zeros_like(packed["x"])
    for sample, length in enumerate(padded["lengths"]):
        first = packed["cu_seqlens"][sample]
        dx[first : first + length] = results["dx"][sample, :length]
    return results | dict(dx=dx)


def check_budget(packed, sizes, heads, **options):
    upstream = upstream_of(packed, heads)
    options |= sizes
    exact = run_with_lse(cast(packed, torch.float64), heads, "reference", upstream, **options)
    plain = run_with_lse(packed, heads, "reference", upstream, **options)
    got = run_with_lse(packed, heads, "fused", upstream, **options)
    assert not over_budget(got, exact, plain)


def upstream_of(packed, heads):
    batch = len(packed["cu_seqlens"]) - 1
    return upstream_with_lse(packed | dict(x=packed["x"].new_empty(batch, 0)), heads)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize(
    "backend, form", [(name, form) for name, form in BACKENDS_AND_FORMS if name != "fused"]
)
def test_packed_tokens_equal_padded_tokens_in_float64(backend, form, per_sample, norm, p):
    packed, padded, sizes, heads = make_packed(
        "row blocks", per_sample=per_sample, norm=norm, first=3
    )
    upstream = upstream_of(packed, heads)
    exact = run_with_lse(padded, heads, "reference", upstream, **dropped(p))
    actual = run_with_lse(packed, heads, backend, upstream, form, **sizes, **dropped(p))
    for name, want in of_packed(exact, packed, padded).items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    "shape, per_sample",
    [
        ("one pass", False),
        ("row blocks", True),
        ("wide", False),
        ("more samples than partial sums", False),
    ],
)
def test_kernels_stay_within_the_budget(shape, per_sample, norm, dtype):
    packed, _, sizes, heads = make_packed(shape, per_sample=per_sample, norm=norm, dtype=dtype)
    check_budget(packed, sizes, heads)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
def test_kernels_stay_within_the_budget_with_dropout(shape, norm):
    packed, _, sizes, heads = make_packed(shape, norm=norm, first=5, dtype=torch.float16)
    check_budget(packed, sizes, heads, **dropped(0.3))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
def test_half_precision_plans_in_float32(monkeypatch, shape, norm, arch):
    if CUDA:
        pytest.skip("a 16-bit plan may not fit a GPU in float32; the interpreter runs it")
    use_half_precision_plan(monkeypatch, arch)
    packed, _, sizes, heads = make_packed(shape, norm=norm, dtype=torch.float32)
    check_budget(packed, sizes, heads)
    check_budget(packed, sizes, heads, **dropped(0.3))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
def test_kernels_compute_packed_and_padded_tokens_alike(monkeypatch, shape, dtype, p):
    """The tiles of a sample start at its first token, so even the bits are equal.

    Packed tokens have no Gluon kernels, so padded tokens do not use them here either.
    """
    for name in ("forward", "backward"):
        module = importlib.import_module(f"mmfused.kernels.query_pooling.{name}")
        monkeypatch.setattr(module, "can_describe", lambda *_: False)
    packed, padded, sizes, heads = make_packed(shape, norm=True, dtype=dtype)
    upstream = upstream_of(packed, heads)
    want = run_with_lse(padded, heads, "fused", upstream, **dropped(p))
    got = run_with_lse(packed, heads, "fused", upstream, **sizes, **dropped(p))
    for name, value in of_packed(want, packed, padded).items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["one pass", "wide"])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_rows_outside_of_all_samples_have_no_effect(backend, form, shape, norm, dtype):
    packed, padded, sizes, heads = make_packed(shape, norm=norm, first=5, dtype=dtype)
    upstream = upstream_of(packed, heads)
    want = run_with_lse(packed, heads, backend, upstream, form, **sizes)
    outside = torch.ones(len(packed["x"]), dtype=torch.bool)
    outside[5 : packed["cu_seqlens"][-1]] = False
    with torch.no_grad():
        packed["x"][outside.to(DEVICE)] = math.nan
    got = run_with_lse(packed, heads, backend, upstream, form, **sizes)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    assert not got["dx"][outside].any() and not got["out"][padded["lengths"] == 0].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_repeats_are_bitwise_equal_for_any_bound_and_dtype_of_the_offsets(backend, dtype):
    packed, _, sizes, heads = make_packed("row blocks", norm=True, dtype=torch.float32)
    upstream = upstream_of(packed, heads)
    want = run_with_lse(packed, heads, backend, upstream, **sizes, **dropped(0.3))
    packed["cu_seqlens"] = packed["cu_seqlens"].to(dtype)
    got = run_with_lse(packed, heads, backend, upstream, **sizes, **dropped(0.3))
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    loose = dict(max_seqlen=sizes["max_seqlen"] + 70)
    got = run_with_lse(packed, heads, backend, upstream, **loose, **dropped(0.3))
    for name, value in got.items():
        if backend == "fused":
            assert torch.equal(value, want[name]), name
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_strided_tokens_and_frozen_tokens(backend, need_dx):
    packed, _, sizes, heads = make_packed("one pass", norm=True, dtype=torch.float32)
    packed["x"].requires_grad_(need_dx)
    want = run(packed, heads, backend, **sizes)
    for view in (
        torch.cat([packed["x"].detach(), packed["x"].detach()], 1)[:, :70],
        packed["x"].detach().t().contiguous().t(),
    ):
        got = run(packed | dict(x=view.requires_grad_(need_dx)), heads, backend, **sizes)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
    assert ("dx" in got) == need_dx


@pytest.mark.parametrize("offsets, bound", [([0], 4), ([0, 0, 0], 0), ([0, 0, 0], 4)])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_empty_inputs_give_zeros(backend, form, p, norm, offsets, bound):
    inputs, heads = make(norm=norm, dtype=torch.float32)
    inputs["x"] = torch.zeros(0, 70, device=DEVICE, requires_grad=True)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    got = run(inputs, heads, backend, form=form, max_seqlen=bound, dropout_p=p)
    assert got["out"].shape == (len(offsets) - 1, 5, 20)
    for name, value in got.items():
        assert not value.any(), name
        assert name == "out" or value.shape == inputs[name[1:]].shape


@pytest.mark.parametrize("hooked", [False, True], ids=["weights", "called"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
def test_a_module_pools_packed_tokens(backend, heads, hooked):
    """With one head and few columns, the output projection is folded."""
    pool = QueryPooling(8, 5, heads, q_proj=True, out_proj=True, bias=True, norm_kv=True)
    pool = pool.to(DEVICE)
    if hooked:
        pool.k_proj.register_forward_hook(lambda *_: None)
    lengths = [5, 0, 2, 9]
    x = torch.randn(sum(lengths) + TAIL, 8, device=DEVICE)
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    with mmfused.backend(backend):
        out = pool(x, cu_seqlens=offsets, max_seqlen=9)
        for sample, length in enumerate(lengths):
            want = pool(x[None, offsets[sample] : offsets[sample] + length])
            torch.testing.assert_close(out[sample : sample + 1], want, rtol=1e-5, atol=1e-5)
    assert not out[1].any()


# ---- registration --------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 1e-5])
def test_opcheck(eps):
    packed, _, sizes, _ = make_packed(dtype=torch.float32, grad=False)
    x, q = packed["x"], torch.randn(7, 70, device=DEVICE)
    tokens = (None, None, packed["cu_seqlens"], sizes["max_seqlen"])
    for dropout in ((0.0, None), (0.3, torch.tensor(5, device=DEVICE))):
        args = (x, q, *tokens, eps, *dropout)
        torch.library.opcheck(torch.ops.mmfused.query_pooling_fwd, args)
        z, *saved = torch.ops.mmfused.query_pooling_fwd(*args)
        dksum = torch.randn(z.shape[:2], device=DEVICE) if dropout[0] else None
        for need_dx in (True, False):
            upstream = (torch.randn_like(z), dksum, torch.randn(z.shape[:2], device=DEVICE))
            args = (*upstream, x, q, z, *saved, *tokens, need_dx, *dropout)
            torch.library.opcheck(torch.ops.mmfused.query_pooling_bwd, args)


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_compiles_to_one_graph_for_any_number_of_rows(monkeypatch, backend):
    monkeypatch.undo()  # the compiler would trace into conftest's patched torch.empty

    def call(inputs, max_seqlen):
        return query_pooling(**inputs, max_seqlen=max_seqlen, num_heads=heads, form="absorbed")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for _ in range(3):
        packed, _, sizes, heads = make_packed(norm=True, dtype=torch.float32)
        results = []
        for function in (call, compiled):
            leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in packed.items()}
            wanted = [v for v in leaves.values() if v.requires_grad]
            with mmfused.backend(backend):
                out = function(leaves, **sizes)
            results.append([out, *torch.autograd.grad(out.sum(), wanted)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_exported_module_takes_any_number_of_rows_and_samples():
    pool = QueryPooling(8, 3, 2, out_proj=True, bias=True, norm_kv=True).to(DEVICE)

    class Packed(torch.nn.Module):
        def forward(self, x, cu_seqlens):
            return pool(x, cu_seqlens=cu_seqlens, max_seqlen=9)

    inputs = [
        (torch.randn(rows, 8, device=DEVICE), torch.tensor(offsets, device=DEVICE))
        for rows, offsets in ((20, [0, 9, 9, 15]), (31, [0, 9, 12, 20, 29]))
    ]
    sizes = ({0: torch.export.Dim("rows")}, {0: torch.export.Dim("offsets", min=3)})
    with torch.no_grad(), mmfused.backend("composed"):
        exported = torch.export.export(Packed(), inputs[0], dynamic_shapes=sizes).module()
        torch.testing.assert_close(exported(*inputs[1]), Packed()(*inputs[1]))


# ---- errors --------------------------------------------------------------------------------------


OFFSETS = torch.tensor([0, 3, 9], device=DEVICE)
ERRORS = {
    "x: got shape (9, 4, 8), expected (tokens, dim), as cu_seqlens is given": dict(
        x=torch.ones(9, 4, 8, device=DEVICE)
    ),
    "cu_seqlens: got dtype torch.float32, expected torch.int32 or torch.int64": dict(
        cu_seqlens=OFFSETS.float()
    ),
    "cu_seqlens: got shape (1, 3), expected (batch + 1,)": dict(cu_seqlens=OFFSETS[None]),
    "cu_seqlens: got shape (0,), expected (batch + 1,)": dict(cu_seqlens=OFFSETS[:0]),
    "cu_seqlens: got a list, expected a torch.Tensor": dict(cu_seqlens=[0, 3, 9]),
    "cu_seqlens: got offsets and lengths, expected at most one of the two": dict(
        lengths=OFFSETS[1:]
    ),
    "cu_seqlens: got offsets and key_padding_mask, expected at most one of the two": dict(
        key_padding_mask=torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    ),
    "max_seqlen: got a NoneType, expected an int, as cu_seqlens is given": dict(max_seqlen=None),
    "max_seqlen: got a Tensor, expected an int, as cu_seqlens is given": dict(
        max_seqlen=OFFSETS[-1]
    ),
    "max_seqlen: got -1, expected 0 or more": dict(max_seqlen=-1),
    "max_seqlen: got 6 without cu_seqlens, expected cu_seqlens too": dict(
        cu_seqlens=None, x=torch.ones(2, 9, 8, device=DEVICE)
    ),
    "queries: got shape (3, 4, 8), expected (L, Dk) or (2, L, Dk)": dict(
        queries=torch.ones(3, 4, 8, device=DEVICE)
    ),
}
VALUE_ERROR = (
    "cu_seqlens: got offsets that are not valid, expected sorted ones from 0 to 9, at most "
    "max_seqlen = 6 apart"
)
BAD_OFFSETS = [[-1, 3, 9], [0, 3, 10], [0, 5, 3], [0, 2, 9]]
if not CUDA:
    ERRORS |= {f"{VALUE_ERROR} {bad}": dict(cu_seqlens=torch.tensor(bad)) for bad in BAD_OFFSETS}


@pytest.mark.parametrize("message", ERRORS)
@pytest.mark.parametrize("caller", ["function", "module"])
def test_errors(message, caller):
    w = torch.eye(8, device=DEVICE)
    inputs = dict(x=torch.ones(9, 8, device=DEVICE), queries=w, cu_seqlens=OFFSETS, max_seqlen=6)
    inputs |= ERRORS[message]
    with pytest.raises((TypeError, ValueError)) as error:
        if caller == "function":
            query_pooling(w_k=w, w_v=w, **inputs)
        else:
            QueryPooling(8, None).to(DEVICE)(**inputs)
    assert str(error.value) == f"query_pooling: {message.split(' [')[0]}"


@pytest.mark.parametrize("bad", BAD_OFFSETS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("backend, form", BACKENDS_AND_FORMS)
def test_invalid_offsets_give_nan_for_their_samples(monkeypatch, backend, form, norm, bad):
    monkeypatch.setattr("mmfused.ops.query_pooling.checks.check_value", lambda *_: None)
    inputs, heads = make(norm=norm, dtype=torch.float32, grad=False)
    inputs |= dict(x=inputs["x"][0, :9], cu_seqlens=torch.tensor(bad, device=DEVICE))
    with mmfused.backend(backend):
        out, lse = query_pooling(
            **inputs, max_seqlen=6, num_heads=heads, form=form, return_lse=True
        )
    broken = [not 0 <= a <= b <= min(9, a + 6) for a, b in zip(bad[:-1], bad[1:], strict=True)]
    assert out.isnan().all((1, 2)).tolist() == broken
    assert lse.isnan().all((1, 2)).tolist() == broken
