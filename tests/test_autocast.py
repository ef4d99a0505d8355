"""Under autocast, ops and modules return the autocast dtype, like ``nn.Linear``.

The dtypes of weights and activations do not matter. Losses and routing return float32.
"""

import itertools

import pytest
import torch
from children_cases import ATTACHMENTS, MODULES, children
from torch import nn

import mmfused
from mmfused import fuse

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, N, D, E = 2, 3, 16, 4


def names(values):
    return "-".join(str(v).removeprefix("torch.") for v in values)


def weights(*shape):
    return torch.randn(*shape) * shape[-1] ** -0.5


def routing(tokens):
    index = torch.arange(2 * tokens).view(tokens, 2) % E
    return mmfused.routing_from_indices(index, torch.full((tokens, 2), 0.5), E)


def attention_weights(cast):
    w = [weights(D, D) for _ in range(4)] + [weights(D, 2 * D + 1)] + [weights(D) for _ in range(5)]
    return mmfused.CrossAttentionWeights(*(cast(t) for t in w))


def cross(a, w):
    norms = [(w(torch.ones(D)), w(torch.zeros(D))) for _ in range(2)]
    return mmfused.gated_cross_attention(
        a(torch.randn(B, N, D)),
        a(torch.randn(B, N, D)),
        attention_weights(w),
        num_heads=2,
        norm_x=norms[0],
        norm_context=norms[1],
    )


def both(a, w):
    norms = [(w(torch.ones(D)), w(torch.zeros(D))) for _ in range(2)]
    outs = mmfused.bidirectional_gated_cross_attention(
        a(torch.randn(B, N, D)),
        w(torch.randn(B, N, D)),  # the dtypes of the two sides may differ
        attention_weights(w),
        attention_weights(a),
        num_heads=2,
        norm_a=norms[0],
        norm_b=norms[1],
    )
    return torch.cat(outs, 1)


# name -> f(cast of activations, cast of weights)
OPS = {
    "query_pooling": lambda a, w: mmfused.query_pooling(
        a(torch.randn(B, N, D)), w(weights(2, D)), w(weights(D, D)), w(weights(D, D)), w(weights(D))
    ),
    "query_pooling, norm": lambda a, w: mmfused.query_pooling(
        a(torch.randn(B, N, D)),
        w(weights(2, D)),
        w(weights(D, D)),
        w(weights(D, D)),
        norm_weight=w(torch.ones(D)),
        norm_bias=w(torch.zeros(D)),
    ),
    "gated_cross_attention": cross,
    "bidirectional_gated_cross_attention": both,
    "grouped_linear": lambda a, w: mmfused.grouped_linear(
        a(torch.randn(6, D)), routing(6), w(weights(E, 8, D)), w(weights(E, 8))
    ),
    "grouped_mlp": lambda a, w: mmfused.grouped_mlp(
        a(torch.randn(6, D)), routing(6), w(weights(E, 8, D)), w(weights(E, D, 8))
    ),
    "topk_routing_from_input": lambda a, w: (
        mmfused.topk_routing_from_input(
            a(torch.randn(6, D)), w(weights(E, D)), 2, w(weights(E))
        ).weights
    ),
    "topk_routing": lambda a, w: mmfused.topk_routing(a(torch.randn(6, E)), 2).weights,
    "masked_info_nce": lambda a, w: mmfused.masked_info_nce(
        a(nn.functional.normalize(torch.randn(6, D))),
        w(nn.functional.normalize(torch.randn(6, D))),
        temperature=w(torch.tensor(0.5)),
        symmetric=True,
    ),
}
FLOAT32_OPS = ("topk_routing", "topk_routing_from_input", "masked_info_nce")
GRID = [(c, w, a) for c, w, a in itertools.product(HALVES, FLOATS, FLOATS)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", GRID, ids=names)
def test_ops_return_the_autocast_dtype(op, case):
    autocast, weight, activation = case
    torch.manual_seed(0)
    want = OPS[op](lambda x: x, lambda x: x)
    torch.manual_seed(0)
    with torch.autocast(DEVICE, autocast):
        out = OPS[op](lambda x: x.to(activation), lambda x: x.to(weight))
    assert out.dtype == (torch.float32 if op in FLOAT32_OPS else autocast)
    # Loose bounds for 16-bit numbers; other tests check the error budget.
    torch.testing.assert_close(out.float(), want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_return_the_autocast_dtype(name, backend):
    """Every gradient has the dtype of its parameter."""
    for autocast, weight, activation in GRID:
        torch.manual_seed(0)
        module = MODULES[name].make().to(weight)
        inputs = [x.to(activation) if x.is_floating_point() else x for x in MODULES[name].inputs()]
        with torch.autocast(DEVICE, autocast), mmfused.backend(backend):
            out = MODULES[name].call(module, *inputs)
        assert out.dtype == autocast, (autocast, weight, activation)
        out.float().sum().backward()
        assert all(p.grad.dtype == weight and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("attachment", ["forward hook", "norm: forward hook", "LoRA", "DoRA"])
@pytest.mark.parametrize("name", MODULES)
def test_called_children_run_under_autocast(name, attachment):
    """Without autocast, the children run in the dtype of their weights."""
    if ATTACHMENTS[attachment].needs:
        pytest.importorskip(ATTACHMENTS[attachment].needs)
    kind = nn.Linear if ATTACHMENTS[attachment].to == "linear" else nn.LayerNorm
    for autocast, dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (None, torch.bfloat16),
    ):
        if autocast == torch.float16 and "post-norm" in name and kind is nn.LayerNorm:
            continue  # the input of the bfloat16 norm would be float32, which torch rejects
        torch.manual_seed(0)
        module = MODULES[name].make()
        ATTACHMENTS[attachment].attach(module, children(module, kind))
        inputs = MODULES[name].inputs()
        want = MODULES[name].plain(module, *inputs)
        inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            out = MODULES[name].call(module.to(dtype), *inputs)
        assert out.dtype == (autocast or torch.bfloat16)
        # Check the median error, because rounding may route a token to another expert.
        assert (out - want).abs().median() < 0.02


@pytest.mark.parametrize("name", MODULES)
def test_called_children_in_float32_accept_bfloat16_tokens(name):
    module = MODULES[name].make()
    ATTACHMENTS["forward hook"].attach(module, children(module, nn.Linear))
    inputs = MODULES[name].inputs()
    want = MODULES[name].plain(module, *inputs)
    out = MODULES[name].call(
        module, *(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    )
    assert out.dtype == torch.bfloat16
    assert (out - want).abs().median() < 0.02


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_cast_to_16_bits_return_that_dtype(name, dtype):
    module = MODULES[name].make().to(dtype)
    out = MODULES[name].call(
        module, *(x.to(dtype) if x.is_floating_point() else x for x in MODULES[name].inputs())
    )
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in module.parameters())


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_selection_bias_stays_in_float32_if_the_module_is_cast(dtype):
    moe = mmfused.TopKMoE(8, 8, 4, selection_bias=True)
    moe.selection_bias.copy_(torch.tensor([1.0001, 0.0, 0.5003, 0.0]))
    bias = moe.selection_bias.clone()
    out, route = nn.Sequential(moe).to(dtype)[0](torch.randn(3, 8, dtype=dtype))
    mmfused.update_selection_bias(moe.selection_bias, route.counts, rate=0.0)
    assert out.dtype == dtype and moe.selection_bias.dtype == torch.float32
    assert torch.equal(moe.selection_bias, bias)
    state = {name: x.to(dtype) for name, x in moe.state_dict().items()}  # like DeepSpeed's
    moe.load_state_dict(state, assign=True)
    assert moe.selection_bias.dtype == torch.float32 and moe.w_up.dtype == dtype
    moe(torch.randn(3, 8, dtype=dtype))


@pytest.mark.parametrize("weight", FLOATS, ids=str)
def test_swapped_multihead_attention_matches_the_original(weight):
    for autocast, activation in itertools.product(HALVES, FLOATS):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(64, 1, batch_first=True).to(weight)
        query, x = torch.randn(1, 1, 64).to(activation), torch.randn(1, 40, 64).to(activation)
        with torch.autocast(DEVICE, autocast):
            want = module(query, x, x, need_weights=False)[0]
            assert fuse(module).swapped
            out = module(query, x, x, need_weights=False)[0]
        assert out.dtype == want.dtype == autocast
        torch.testing.assert_close(out, want, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("weight", FLOATS, ids=str)
def test_swapped_timm_pool_matches_the_original(weight):
    timm = pytest.importorskip("timm")
    for autocast, activation in itertools.product(HALVES, FLOATS):
        torch.manual_seed(0)
        module = timm.layers.AttentionPoolLatent(64, num_heads=2).to(weight)
        x = torch.randn(2, 40, 64).to(activation)
        with torch.autocast(DEVICE, autocast):
            want = module(x)
            assert fuse(module).swapped
            out = module(x)
        assert out.dtype == want.dtype
        torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
