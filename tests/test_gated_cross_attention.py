"""Tests of gated cross-attention: reference, composed backend and modules.

Expected values come from a literal transcription of the equations. The kernels are tested in
test_gated_cross_attention_fused.py.
"""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import (
    BidirectionalGatedCrossAttention,
    GatedCrossAttention,
    TokenGate,
    gated_cross_attention,
    pack_passes,
)
from mmfused.testing import dropout_mask

B, N, M, D, HEADS = 4, 6, 5, 12, 3
PRESENT = torch.tensor([True, False, True, True])


def module(cls=BidirectionalGatedCrossAttention, **options):
    built = cls(D, HEADS, **options).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def linear(layer, x):
    out = torch.stack([(row * x).sum() for row in layer.weight])
    return out if layer.bias is None else out + layer.bias


def normed(norm, x):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias


def literal(
    direction,
    norm_x,
    norm_context,
    x,
    context,
    context_ignored,
    context_present,
    x_has_tokens,
    x_ignored,
    options,
    dropout_factors,
):
    """Compute one direction by loops over samples, tokens and heads."""
    missing, gate, pre_norm = options["missing"], options["gate"], options["pre_norm"]
    readable = [
        [j for j in range(context.shape[1]) if not context_ignored[s][j]] for s in range(len(x))
    ]
    has_context = [bool(context_present[s]) and bool(readable[s]) for s in range(len(x))]
    out = []
    for s in range(len(x)):
        keys = readable[s] if has_context[s] or missing in ("attend", "constant") else []
        rows = []
        for i in range(x.shape[1]):
            skip = missing == "skip" and not (has_context[s] and x_has_tokens[s])
            if skip or x_ignored[s][i]:
                rows.append(x[s, i])
                continue
            q = linear(direction.q_proj, normed(norm_x, x[s, i]) if pre_norm else x[s, i])
            head_dim, heads = D // HEADS, []
            for h in range(HEADS):
                part = slice(h * head_dim, (h + 1) * head_dim)
                logits, values = [], []
                for j in keys:
                    c = normed(norm_context, context[s, j]) if pre_norm else context[s, j]
                    logits.append(
                        (q[part] * linear(direction.k_proj, c)[part]).sum() / math.sqrt(head_dim)
                    )
                    values.append(linear(direction.v_proj, c)[part])
                denominator = sum(torch.exp(logit) for logit in logits)
                factors = [dropout_factors[0][s, h, i, j] for j in keys]
                terms = [
                    torch.exp(a) / denominator * v * k
                    for a, v, k in zip(logits, values, factors, strict=True)
                ]
                heads.append(sum(terms) if keys else torch.zeros(head_dim, dtype=torch.float64))
            attn_out = torch.zeros(D, dtype=torch.float64)
            if keys:
                attn_out = linear(direction.out_proj, torch.cat(heads)) * dropout_factors[1][s, i]
            if gate == "none":
                total = x[s, i] + attn_out
                rows.append(total if pre_norm else normed(norm_x, total))
                continue
            parts = [x[s, i], attn_out]
            if options["indicator"]:
                flag = any(has_context) if options["indicator"] == "batch" else has_context[s]
                parts.append(torch.tensor([float(flag)], dtype=torch.float64))
            g = 1 / (1 + torch.exp(-linear(direction.gate_proj, torch.cat(parts))))
            rows.append(g * attn_out + (1 - g) * x[s, i])
        out.append(torch.stack(rows))
    return torch.stack(out)


def both_ways(built, a, b, masks, options, p, seed):
    ignore = {
        side: masks.get(f"{side}_key_padding_mask", torch.zeros(B, n).bool())
        for side, n in (("a", N), ("b", M))
    }
    present = {side: masks.get(f"{side}_present", torch.ones(B).bool()) for side in "ab"}
    has_tokens = {side: present[side] & ~ignore[side].all(1) for side in "ab"}

    def dropout_factors(stream, queries, keys):
        shapes = (B, HEADS, queries, keys), (B, queries, D)
        return [
            dropout_mask(seed, shape, p, 2 * stream + i).double() / (1 - p)
            for i, shape in enumerate(shapes)
        ]

    to_a = (
        built.to_a,
        built.norm_a,
        built.norm_b,
        a,
        b,
        ignore["b"],
        present["b"],
        has_tokens["a"],
        ignore["a"],
        options,
        dropout_factors(0, N, M),
    )
    to_b = (
        built.to_b,
        built.norm_b,
        built.norm_a,
        b,
        a,
        ignore["a"],
        present["a"],
        has_tokens["b"],
        ignore["b"],
        options,
        dropout_factors(1, M, N),
    )
    return literal(*to_a), literal(*to_b)


def padding():
    ignore_a, ignore_b = torch.rand(B, N) < 0.3, torch.rand(B, M) < 0.3
    ignore_b[3] = True  # fully masked
    ignore_a[0, 0] = False
    return dict(a_key_padding_mask=ignore_a, b_key_padding_mask=ignore_b)


CASES = [
    *itertools.product(
        ["channel"], [True], ["skip", "zero", "attend"], [True], [False, True], [0.0]
    ),
    *itertools.product(
        ["token", "channel", "none"], [False, "batch"], ["zero", "skip"], [True], [True], [0.0, 0.4]
    ),
    *itertools.product(["none"], [True], ["skip", "zero", "attend"], [False], [True], [0.0, 0.4]),
]


@pytest.mark.parametrize("gate, indicator, missing, pre_norm, padded, p", CASES)
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_module_matches_the_equations(backend, gate, indicator, missing, pre_norm, padded, p):
    options = dict(gate=gate, indicator=indicator, missing=missing, pre_norm=pre_norm)
    built = module(**options, dropout=p)
    a, b, seed = randn(B, N, D), randn(B, M, D), torch.tensor(11)
    masks = (padding() if padded else {}) | dict(a_present=PRESENT, b_present=PRESENT.roll(1))
    with mmfused.backend(backend):
        got = built(a, b, **masks, dropout_seed=seed)
    want = both_ways(built, a, b, masks, options, p, seed)
    inputs = [a, b, *built.parameters()]
    upstream = [torch.randn_like(x) for x in want]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    gradients = [
        torch.autograd.grad(outs, inputs, upstream, materialize_grads=True, allow_unused=True)
        for outs in (got, want)
    ]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


BACKENDS = ("reference", "composed")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_direction_matches_the_bidirectional_module(backend):
    both = module(missing="zero")
    one = module(GatedCrossAttention, missing="zero")
    state = both.state_dict()
    norms = {
        "norm_x.weight": both.norm_a.weight,
        "norm_x.bias": both.norm_a.bias,
        "norm_context.weight": both.norm_b.weight,
        "norm_context.bias": both.norm_b.bias,
    }
    to_a = {k.removeprefix("to_a."): v for k, v in state.items() if k.startswith("to_a.")}
    one.load_state_dict(to_a | norms)
    a, b, lengths = randn(B, N, D), randn(B, M, D), torch.tensor([5, 0, 2, 1])
    ignore = torch.arange(M) >= lengths[:, None]
    with mmfused.backend(backend):
        want = both(a, b, b_key_padding_mask=ignore, b_present=PRESENT)[0]
        assert torch.equal(
            one(a, b, context_key_padding_mask=ignore, context_present=PRESENT), want
        )
        assert torch.equal(one(a, b, context_lengths=lengths, context_present=PRESENT), want)
        narrow = GatedCrossAttention(D, HEADS, context_dim=7).double()
        assert narrow(a, randn(B, M, 7)).shape == a.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_missing_constant_matches_missing_attend(backend, p):
    """All valid tokens of an absent context are equal, so attention to one of them suffices."""
    built, seed = module(GatedCrossAttention, missing="constant", dropout=p), torch.tensor(3)
    x, context = randn(B, N, D), randn(B, M, D).detach()
    context[~PRESENT] = context[~PRESENT][:, :1]
    ignore = torch.arange(M) >= torch.tensor([5, 5, 2, 1])[:, None]
    ignore[1, ::2] = True  # the first valid token is between two ignored tokens
    context[ignore] = math.nan
    results = []
    for missing in ("constant", "attend"):
        built.options["missing"] = missing
        leaf = context.clone().requires_grad_()
        with mmfused.backend(backend):
            out = built(
                x, leaf, context_present=PRESENT, context_key_padding_mask=ignore, dropout_seed=seed
            )
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
        dx, d_context, *others = torch.autograd.grad(out, [x, leaf, *built.parameters()], upstream)
        # The modes divide the gradient differently among equal tokens, so the sums are compared.
        results.append([out, dx, d_context.sum(1), *others])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_passes_match_separate_calls(backend):
    built, a, b = module(missing="constant"), randn(B, N, D), randn(B, M, D)
    packed_a, packed_b, a_present, b_present = pack_passes(a, b)
    with mmfused.backend(backend):
        packed = built(packed_a, packed_b, a_present=a_present, b_present=b_present)
        flags = torch.ones(B).bool()
        zero_a, zero_b = torch.zeros_like(a), torch.zeros_like(b)
        calls = [
            built(a, b),
            built(a, zero_b, b_present=~flags),
            built(zero_a, b, a_present=~flags),
        ]
    for got, want in zip(packed, zip(*calls, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-12, atol=1e-12)
    assert a_present.tolist() == [True] * 8 + [False] * 4
    assert b_present.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    message = r"pack_passes: passes: got \('c',\), expected some of both, a, b"
    with pytest.raises(ValueError, match=message):
        pack_passes(a, b, ("c",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_samples_and_ignored_tokens_are_returned_unchanged(backend):
    built, a, b = module(), randn(B, N, D), randn(B, M, D)
    ignored = torch.rand(B, N) < 0.3
    ignored[:, 0] = False
    masks = dict(b_present=PRESENT, a_key_padding_mask=ignored)

    def run(a, b):
        with mmfused.backend(backend):
            outs = built(a, b, **masks)
        total = (outs[1][PRESENT] * torch.arange(1, D + 1)).sum()
        total = total + (outs[0][PRESENT] * ~ignored[PRESENT, :, None]).sum()
        return outs, torch.autograd.grad(total, [a, b, *built.parameters()])

    outs, want = run(a, b)
    assert torch.equal(outs[0][1], a[1]) and torch.equal(outs[1][1], b[1])
    assert torch.equal(outs[0][ignored], a[ignored])
    poisoned_a, poisoned_b = a.detach().clone(), b.detach().clone()
    poisoned_a[ignored] = math.nan
    poisoned_b[~PRESENT] = math.nan
    _, got = run(poisoned_a.requires_grad_(), poisoned_b.requires_grad_())
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["skip", "zero"])
def test_every_parameter_has_a_gradient_if_all_contexts_are_missing(backend, missing):
    built, x = module(GatedCrossAttention, missing=missing), randn(B, N, D)
    context = torch.full((B, M, D), math.nan).double().requires_grad_()
    with mmfused.backend(backend):
        out = built(x, context, context_present=torch.zeros(B).bool())
    named = dict(built.named_parameters())
    gradients = torch.autograd.grad(out.sum(), list(named.values()))
    gradients = dict(zip(named, gradients, strict=True))
    assert all(g.isfinite().all() for g in gradients.values())
    assert not gradients["k_proj.weight"].any() and not gradients["out_proj.bias"].any()
    assert torch.equal(out, x) == (missing == "skip")
    assert gradients["gate_proj.weight"].any() == (missing == "zero")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_give_finite_outputs_and_gradients(batch, queries, keys, backend):
    built = module(GatedCrossAttention, missing="zero")
    x, context = randn(batch, queries, D), randn(batch, keys, D)
    with mmfused.backend(backend):
        out = built(x, context)
    assert out.shape == x.shape and out.isfinite().all()
    gradients = torch.autograd.grad(out.sum(), [x, context, *built.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dropout_is_random_reproducible_and_off_in_eval_mode():
    built, a, b = module(dropout=0.5), randn(B, N, D), randn(B, M, D)
    assert not torch.equal(built(a, b)[0], built(a, b)[0])
    torch.manual_seed(1)
    first = built(a, b)
    torch.manual_seed(1)
    again = checkpoint(built, a, b, use_reentrant=False)
    assert torch.equal(first[0], again[0])
    upstream = torch.randn_like(first[0])
    gradients = (torch.autograd.grad(outs[0], [a, b], upstream) for outs in (first, again))
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)
    plain = module(dropout=0.0)
    plain.load_state_dict(built.state_dict())
    assert torch.equal(built.eval()(a, b)[1], plain(a, b)[1])


def test_dropout_masks_have_the_right_frequencies_and_are_independent():
    seed, shape = torch.tensor(12345), (40, 5, 60, 70)
    keep = dropout_mask(seed, shape, 0.3).double()
    assert abs(keep.mean() - 0.7) < 0.002
    centred = keep - keep.mean()
    for other in (dropout_mask(seed, shape, 0.3, 1), dropout_mask(seed + 1, shape, 0.3)):
        assert abs((centred * (other.double() - 0.7)).mean()) < 0.001
    for shift in range(1, 4):
        for dim in (1, 2, 3):
            assert abs((centred * centred.roll(shift, dim)).mean()) < 0.002, (shift, dim)
    assert dropout_mask(seed, (3, 0), 0.3).shape == (3, 0) and dropout_mask(seed, shape, 0.0).all()
    # Whether an element is dropped depends on its row and column, not on the number of columns.
    wide = dropout_mask(seed, (6, 70), 0.3)
    assert torch.equal(dropout_mask(seed, (6, 9), 0.3), wide[:, :9])


def test_mean_over_seeds_is_the_result_without_dropout():
    """There is no gate, so the output is linear in each dropout mask."""
    built = module(GatedCrossAttention, gate="none", dropout=0.2)
    x, context = randn(2, 3, D), randn(2, 4, D)
    with torch.no_grad():
        outs = torch.stack([built(x, context, dropout_seed=torch.tensor(s)) for s in range(3000)])
        want = built.eval()(x, context)
    error = (outs.mean(0) - want).abs() / (outs.std(0) / 3000**0.5)
    assert error.max() < 5 and error.mean() < 1.1


def test_shared_weights_and_state_dicts():
    shared = module(share_weights=True)
    assert shared.to_a is shared.to_b and len(list(shared.parameters())) == 4 + 10
    separate = module()
    assert set(separate.state_dict()) == set(shared.state_dict())
    separate.load_state_dict(shared.state_dict())
    a, b = randn(B, N, D), randn(B, M, D)
    for x, y in zip(shared(a, b), separate(a, b), strict=True):
        assert torch.equal(x, y)
    names = set(GatedCrossAttention(D, HEADS).state_dict())
    linears = {
        f"{name}_proj.{part}"
        for name in ("q", "k", "v", "out", "gate")
        for part in ("weight", "bias")
    }
    norms = {f"norm_{side}.{part}" for side in ("x", "context") for part in ("weight", "bias")}
    assert names == linears | norms
    assert GatedCrossAttention(D, HEADS).gate_proj.weight.shape == (D, 2 * D + 1)
    token = GatedCrossAttention(D, HEADS, gate="token", indicator=False)
    assert token.gate_proj.weight.shape == (1, 2 * D)
    assert GatedCrossAttention(D, HEADS, gate="none", pre_norm=False, bias=False).gate_proj is None


def test_autocast_and_bfloat16_tokens_give_bfloat16_outputs():
    built, a, b = module(), randn(B, N, D), randn(B, M, D)
    exact = built(a, b, b_present=PRESENT)
    low = BidirectionalGatedCrossAttention(D, HEADS)
    low.load_state_dict(built.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = low(a.float(), b.float(), b_present=PRESENT)
    mixed = low(a.bfloat16(), b.bfloat16(), b_present=PRESENT)
    for outs in (got, mixed):
        for x, y in zip(outs, exact, strict=True):
            assert x.dtype == torch.bfloat16 and (x - y).norm() / y.norm() < 2e-2
    low.zero_grad()
    sum(out.float().sum() for out in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in low.parameters())


def test_token_gate_matches_the_equations():
    gate, a, b = TokenGate(D, hidden=(7,)).double(), randn(B, N, D), randn(B, N, D)
    first, last = gate.mlp[0], gate.mlp[3]
    for s, i in ((0, 0), (3, 5)):
        hidden = linear(first, torch.cat([a[s, i], b[s, i]])).clamp(min=0)
        share = 1 / (1 + torch.exp(-linear(last, hidden)))
        torch.testing.assert_close(gate.share(a, b)[s, i], share[0])
        torch.testing.assert_close(gate(a, b)[s, i], share * a[s, i] + (1 - share) * b[s, i])
    assert TokenGate(D).mlp[0].weight.shape == (D, 2 * D)
    message = r"b: got shape \(4, 5, 12\), expected \(4, 6, 12\), as a has"
    with pytest.raises(ValueError, match=message):
        gate(a, randn(B, M, D))


def call(**changes):
    built = module(GatedCrossAttention)
    x, context = randn(B, N, D), randn(B, M, D)
    args = dict(
        x=x,
        context=context,
        weights=built.weights(),
        num_heads=HEADS,
        norm_x=(built.norm_x.weight, built.norm_x.bias),
        norm_context=(built.norm_context.weight, built.norm_context.bias),
    )
    return gated_cross_attention(**args | changes)


BAD = {
    "num_heads: got 5, expected a divisor of dim = 12": lambda: GatedCrossAttention(D, 5),
    "num_heads: got 7, expected a divisor": lambda: call(num_heads=7),
    "gate: got 'soft', expected one of channel, token, none": lambda: GatedCrossAttention(
        D, HEADS, gate="soft"
    ),
    "missing: got 'drop', expected one of skip, zero, attend, constant": lambda: (
        GatedCrossAttention(D, HEADS, missing="drop")
    ),
    "indicator: got 'sample'": lambda: GatedCrossAttention(D, HEADS, indicator="sample"),
    "gate: got 'channel' with pre_norm=False": lambda: GatedCrossAttention(
        D, HEADS, pre_norm=False
    ),
    "dropout: got 1.0, expected a number from 0 to below 1": lambda: GatedCrossAttention(
        D, HEADS, dropout=1.0
    ),
    "dropout_p: got -0.1, expected a number from 0 to below 1": lambda: call(dropout_p=-0.1),
    "context: got shape (4, 12)": lambda: call(context=randn(B, D)),
    "context: got shape (3, 5, 12), expected (4, tokens, dim)": lambda: call(
        context=randn(3, M, D)
    ),
    "x: got dtype torch.int64": lambda: call(x=torch.zeros(B, N, D).long()),
    "context: got dtype torch.float32": lambda: call(context=torch.zeros(B, M, D)),
    "weights: got a tuple, expected CrossAttentionWeights": lambda: call(weights=(1,)),
    "context: got width 7, expected 12, the number of columns of weights.w_k": lambda: call(
        context=randn(B, M, 7)
    ),
    "x: got width 10, expected 12, the number of columns of weights.w_q": lambda: call(
        x=randn(B, N, 10)
    ),
    "a: got width 10, expected 12, the number of columns of to_a.w_q": lambda: module()(
        randn(B, N, 10), randn(B, M, D)
    ),
    "weights.w_g: got shape (12, 25) with gate 'channel', expected (12, 24)": lambda: call(
        indicator=False
    ),
    "weights.w_g: got shape (12, 25) with gate 'none', expected None": lambda: call(gate="none"),
    "norm_context: got None, expected a LayerNorm's weight and bias": lambda: call(
        norm_context=None
    ),
    "norm_context: got a norm with pre_norm=False": lambda: call(
        gate="none", pre_norm=False, weights=module(GatedCrossAttention, gate="none").weights()
    ),
    "context_key_padding_mask: got a mask and context_lengths": lambda: call(
        context_key_padding_mask=torch.zeros(B, M).bool(), context_lengths=torch.ones(B).long()
    ),
    "context_key_padding_mask: got shape (4, 6), expected (4, 5)": lambda: call(
        context_key_padding_mask=torch.zeros(B, N).bool()
    ),
    "context_lengths: got dtype torch.float32": lambda: call(context_lengths=torch.ones(B)),
    "context_lengths: got a value out of range": lambda: call(context_lengths=torch.full((B,), 6)),
    "context_present: got shape (3,), expected (4,)": lambda: call(
        context_present=torch.ones(3).bool()
    ),
    "context_present: got dtype torch.float32": lambda: call(context_present=torch.ones(B)),
    "dropout_seed: got dtype torch.float32": lambda: call(
        dropout_p=0.1, dropout_seed=torch.tensor(1.0)
    ),
    "b: got width 7, expected 12, the number of columns of to_a.w_k": lambda: module()(
        randn(B, N, D), randn(B, M, 7)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message]()
    assert message in str(caught.value)
