"""The modules of query pooling, and the validation of the public function."""

import pytest
import torch
from query_pooling_cases import DEVICE, cast, make
from torch import nn

import mmfused
from mmfused import QTransform, QueryPooling, query_pooling, query_pooling_reference

# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_module_equals_multihead_attention(backend, batch, heads):
    """The module folds its output projection only for 9 samples and one head."""
    dtype = torch.float64 if backend == "composed" else torch.float32
    mha = nn.MultiheadAttention(32, heads, batch_first=True).to(DEVICE, dtype)
    pool = QueryPooling(32, 5, heads, q_proj=True, out_proj=True, bias=True).to(DEVICE, dtype)
    with torch.no_grad():
        for bias in (mha.in_proj_bias, mha.out_proj.bias):
            bias.normal_()
        for proj, w, b in zip(
            (pool.q_proj, pool.k_proj, pool.v_proj),
            mha.in_proj_weight.chunk(3),
            mha.in_proj_bias.chunk(3),
            strict=True,
        ):
            proj.weight.copy_(w), proj.bias.copy_(b)
        pool.out_proj.load_state_dict(mha.out_proj.state_dict())
    x = torch.randn(batch, 11, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    upstream = torch.randn(batch, 5, 32, device=DEVICE, dtype=dtype)
    want = mha(pool.queries.expand(batch, -1, -1), x, x, need_weights=False)[0]
    with mmfused.backend(backend):
        got = pool(x)
    tolerance = (
        dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    )
    torch.testing.assert_close(got, want, **tolerance)
    pairs = [
        torch.autograd.grad(o, [x, pool.queries, p.out_proj.weight, p.out_proj.bias], upstream)
        for o, p in ((got, pool), (want, mha))
    ]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_the_module_gives_zero_for_samples_without_tokens():
    x = torch.randn(9, 6, 32, device=DEVICE)
    ignore = torch.zeros(9, 6, dtype=torch.bool, device=DEVICE)
    ignore[3] = True
    for heads in (1, 2):
        pool = QueryPooling(32, 4, heads, out_proj=True, bias=True, norm_kv=True).to(DEVICE)
        for name in ("reference", "composed"):
            with mmfused.backend(name):
                out = pool(x, ignore)
            assert not out[3].any() and out[2].any()
            assert torch.equal(out, pool(x, lengths=(~ignore).sum(1))) or name == "reference"


def test_state_dict_keys_and_given_queries():
    pool = QueryPooling(32, 4, 2, kv_dim=20, q_proj=True, out_proj=True, bias=True, norm_kv=True)
    names = {
        "queries",
        *(
            f"{m}.{p}"
            for m in ("q_proj", "k_proj", "v_proj", "out_proj", "norm_kv")
            for p in ("weight", "bias")
        ),
    }
    assert set(pool.state_dict()) == names
    other = QueryPooling(32, 4, 2, kv_dim=20, q_proj=True, out_proj=True, bias=True, norm_kv=True)
    other.load_state_dict(pool.state_dict())
    x = torch.randn(3, 6, 20)
    assert torch.equal(pool(x), other(x))
    queries = pool.queries.expand(3, -1, -1)
    torch.testing.assert_close(pool(x, queries=queries), pool(x))
    bare = QueryPooling(32, None, 2)
    assert set(bare.state_dict()) == {"k_proj.weight", "v_proj.weight"}
    with pytest.raises(ValueError, match="queries: got None, expected a tensor"):
        bare(torch.randn(3, 6, 32))
    with pytest.raises(ValueError, match="num_heads: got 3, expected a divisor of dim = 32"):
        QueryPooling(32, 4, 3)


def test_q_transform_equals_its_equations():
    """Each block computes q = LN(q + MHA(q, x, x)) and then q = LN(q + FFN(q))."""
    model = QTransform(24, 5, depth=2, num_heads=3, ffn=40).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    ignore = torch.tensor([[False] * 7, [True] * 7])
    q = model.queries.expand(2, -1, -1)
    for block in model.blocks:
        p = block.pool
        pooled = query_pooling_reference(
            x,
            p.q_proj(q),
            p.k_proj.weight,
            p.v_proj.weight,
            p.v_proj.bias,
            p.k_proj.bias,
            num_heads=3,
            key_padding_mask=ignore,
        )
        read = p.out_proj(pooled) * torch.tensor([1.0, 0.0])[:, None, None]
        q = nn.functional.layer_norm(q + read, (24,), block.norm_pool.weight, block.norm_pool.bias)
        q = nn.functional.layer_norm(
            q + block.ffn(q), (24,), block.norm_ffn.weight, block.norm_ffn.bias
        )
    for name in ("reference", "composed"):
        with mmfused.backend(name):
            torch.testing.assert_close(model(x, ignore), q, rtol=1e-12, atol=1e-12)


def test_q_transform_gives_every_parameter_a_gradient():
    model = QTransform(16, 3, depth=2, num_heads=2, dropout=0.1)
    model(torch.randn(4, 5, 16)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- bad input -----------------------------------------------------------------------------------

BAD = {
    "x: got shape (3, 37), expected (batch, tokens, dim)": lambda t: t.update(x=t["x"][..., 0]),
    "x: got dtype torch.int64, expected float32, float16": lambda t: t.update(x=t["x"].long()),
    "queries: got dtype torch.float64, expected torch.float32": lambda t: t.update(
        queries=t["queries"].double()
    ),
    "queries: got shape (2, 5, 24), expected (L, Dk) or (3, L, Dk)": lambda t: t.update(
        queries=t["queries"].expand(2, -1, -1)
    ),
    "w_k: got shape (24, 69), expected (24, 70)": lambda t: t.update(w_k=t["w_k"][:, 1:]),
    "w_v: got shape (20,), expected (Dv, 70)": lambda t: t.update(w_v=t["w_v"][:, 0]),
    "b_v: got shape (19,), expected (20,)": lambda t: t.update(b_v=t["b_v"][1:]),
    "num_heads: got 5, expected a divisor of Dk = 24 and Dv = 20": lambda t: t.update(num_heads=5),
    "num_heads: got 0, expected a divisor": lambda t: t.update(num_heads=0),
    "key_padding_mask: got shape (3, 36), expected (3, 37)": lambda t: t.update(
        key_padding_mask=torch.zeros(3, 36, dtype=torch.bool)
    ),
    "key_padding_mask: got dtype torch.float32, expected torch.bool": lambda t: t.update(
        key_padding_mask=torch.zeros(3, 37)
    ),
    "lengths: got dtype torch.float32, expected torch.int32 or torch.int64": lambda t: t.update(
        lengths=torch.zeros(3)
    ),
    "lengths: got shape (2,), expected (3,)": lambda t: t.update(
        lengths=torch.zeros(2, dtype=torch.int64)
    ),
    "lengths: got a value out of range, expected 0 to": lambda t: t.update(
        lengths=torch.tensor([1, 2, 38])
    ),
    "key_padding_mask: got a mask and lengths, expected at most one of the two": lambda t: t.update(
        key_padding_mask=torch.zeros(3, 37, dtype=torch.bool),
        lengths=torch.zeros(3, dtype=torch.int64),
    ),
    "norm_bias: got a tensor without norm_weight": lambda t: t.update(norm_bias=torch.zeros(70)),
    "form: got 'quick', expected one of auto, absorbed, projected": lambda t: t.update(
        form="quick"
    ),
    "w_k: got a tensor on meta, expected cpu, where x is": lambda t: t.update(
        w_k=t["w_k"].to("meta")
    ),
    "x: got a list, expected a torch.Tensor": lambda t: t.update(x=[1.0]),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_raises_a_one_line_message(sentence):
    inputs, _ = make(dtype=torch.float32, grad=False, device="cpu")
    BAD[sentence](inputs)
    with pytest.raises((TypeError, ValueError)) as error:
        query_pooling(**inputs)
    assert sentence in str(error.value)
    assert str(error.value).startswith("query_pooling: ") and str(error.value).count("\n") == 0


def test_fused_raises_if_it_has_no_kernel():
    inputs, heads = make(dtype=torch.float64)
    with mmfused.backend("fused"):
        with pytest.raises(RuntimeError, match="cannot run here: .*dtype torch.float64"):
            query_pooling(**inputs, num_heads=heads)
        with pytest.raises(RuntimeError, match="form='projected' has no kernel"):
            query_pooling(**cast(inputs, torch.float32), num_heads=heads, form="projected")


def test_auto_form_follows_flops_and_measurements():
    from mmfused.ops.query_pooling.composed import cheaper_form

    def form(length, queries, heads, per_sample=False, device="meta"):
        x = torch.empty(8, length, 768, device=device)
        q = torch.empty(*((8,) if per_sample else ()), queries, 768, device=device)
        w = torch.empty(768, 768, device=device)
        return cheaper_form(x, q, w, w, heads)

    assert (
        form(197, 32, 1)
        == form(197, 1, 12)
        == form(197, 16, 12)
        == form(32, 2, 1)
        == form(197, 32, 8)
        == "absorbed"
    )
    assert form(197, 64, 12) == form(197, 32, 12) == form(8, 32, 1) == "projected"
    assert form(257, 32, 12, per_sample=True) == "projected"
    # On a CPU, the absorbed form is chosen for a smaller saving of FLOPs than on CUDA.
    assert form(197, 32, 12, device="cpu") == "absorbed"
