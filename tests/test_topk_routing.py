"""Top-k routing: the reference against loops, composed against the reference, and properties.

The kernels are tested in test_topk_routing_fused.py.
"""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import (
    topk_routing,
    topk_routing_from_input,
    topk_routing_reference,
    update_selection_bias,
)
from mmfused.random import uniform

TOKENS, EXPERTS, SEGMENTS = 23, 7, 3
LOSSES = ("balance_loss", "z_loss", "entropy")


def make(score="softmax", **changes):
    options = dict(
        score=score,
        segments=torch.randint(0, SEGMENTS, (TOKENS,)),
        num_segments=SEGMENTS,
        token_padding_mask=torch.rand(TOKENS) < 0.2,
        available=torch.rand(SEGMENTS, EXPERTS) < 0.8,
    )
    options["available"][:, :3] = True
    return torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True), options | changes


def routing_in_loops(
    logits,
    k,
    score,
    renormalize,
    selection_bias,
    token_padding_mask,
    segments,
    num_segments,
    available,
    balance,
):
    """Compute the equations of a routing in loops over tokens and experts."""
    weights, probabilities, chosen, lses = {}, {}, {}, {}
    valid = [t for t in range(len(logits)) if not token_padding_mask[t]]
    for t in valid:
        usable = [e for e in range(logits.shape[1]) if available[segments[t], e]]
        total = sum(torch.exp(logits[t, e]) for e in usable)
        scores = {
            e: torch.exp(logits[t, e]) / total
            if score == "softmax"
            else torch.sigmoid(logits[t, e])
            for e in usable
        }
        key = {
            e: logits[t, e].item()
            if selection_bias is None
            else (scores[e] + selection_bias[e]).item()
            for e in usable
        }
        chosen[t] = sorted(usable, key=lambda e: (-key[e], e))[:k]
        norm = sum(scores[e] for e in chosen[t]) if renormalize else 1
        weights[t] = {e: scores[e] / norm for e in chosen[t]}
        probabilities[t] = {e: p / sum(scores.values()) for e, p in scores.items()}
        lses[t] = torch.log(total)
    terms = []
    for s in range(num_segments):
        members = [t for t in valid if segments[t] == s]
        if not members:
            continue
        usable = [e for e in range(logits.shape[1]) if available[s, e]]
        n, loss = len(members), 0
        for e in usable:
            mean_p = sum(probabilities[t][e] for t in members) / n
            if balance == "mse":
                loss = (
                    loss + (sum(weights[t].get(e, 0) for t in members) / n - 1 / len(usable)) ** 2
                )
            elif balance == "switch":
                loss = loss + len(usable) * sum(e in chosen[t] for t in members) / (k * n) * mean_p
            else:
                loss = loss + len(usable) * sum(chosen[t][0] == e for t in members) / n * mean_p
        terms.append(loss)
    entropy = sum(-sum(p * torch.log(p) for p in probabilities[t].values()) for t in valid) / len(
        valid
    )
    z = sum(lse**2 for lse in lses.values()) / len(valid)
    dense = torch.stack(
        [
            torch.stack(
                [
                    weights.get(t, {}).get(e, torch.zeros((), dtype=torch.float64))
                    for e in range(logits.shape[1])
                ]
            )
            for t in range(len(logits))
        ]
    )
    return dense, sum(terms) / len(terms), z, entropy, chosen


@pytest.mark.parametrize("balance", ["switch", "gshard", "mse"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "score, biased", [*itertools.product(["softmax", "sigmoid"], [False, True])]
)
def test_reference_equals_the_equations_in_loops(score, biased, renormalize, balance):
    logits, options = make(score, balance=balance, renormalize=renormalize)
    options["selection_bias"] = torch.randn(EXPERTS) if biased else None
    routing = topk_routing_reference(logits, 2, **options)
    *want, chosen = routing_in_loops(logits, 2, **options)
    dense = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(
        1, routing.indices, routing.weights
    )
    got = [dense, routing.balance_loss, routing.z_loss, routing.entropy]
    for t, experts in chosen.items():
        assert routing.indices[t].tolist() == experts
    upstream = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    d_got, d_want = (torch.autograd.grad(outs, logits, upstream)[0] for outs in (got, want))
    torch.testing.assert_close(d_got, d_want, rtol=1e-11, atol=1e-12)
    counts = torch.zeros(SEGMENTS, EXPERTS, dtype=torch.int64)
    for t, experts in chosen.items():
        counts[options["segments"][t], experts] += 1
    assert torch.equal(routing.counts, counts)


@pytest.mark.parametrize(
    "score, k, jitter, bias",
    [*itertools.product(["softmax", "sigmoid"], [1, 3], [0.0, 0.2], [False, True])],
)
def test_composed_equals_reference(score, k, jitter, bias):
    """All fields and gradients agree for every combination of options."""
    given = dict(
        score=score,
        jitter=jitter,
        jitter_seed=torch.tensor(9),
        selection_bias=torch.randn(EXPERTS) if bias else None,
    )
    names = ("segments", "token_padding_mask", "available")
    for use in itertools.product([False, True], repeat=3):
        for renormalize, balance in itertools.product([True, False], ["switch", "gshard", "mse"]):
            logits, options = make(**given, balance=balance, renormalize=renormalize)
            options |= {name: None for name, used in zip(names, use, strict=True) if not used}
            if not use[0]:
                options["num_segments"] = 1
                options["available"] = options["available"][:1] if use[2] else None
            upstream, results = torch.randn(TOKENS, k), []
            for backend in ("reference", "composed"):
                with mmfused.backend(backend):
                    routing = topk_routing(logits, k, **options)
                total = (
                    (routing.weights * upstream).sum()
                    + 1.3 * routing.balance_loss
                    + 0.7 * routing.z_loss
                    - routing.entropy
                )
                results.append([*routing, torch.autograd.grad(total, logits)[0]])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_balance_losses_of_a_uniform_routing_and_of_transformers():
    """transformers' load_balancing_loss_func is k times the loss of "switch"."""
    logits = torch.eye(4, dtype=torch.float64).repeat(3, 1) * 5
    for balance, want in (("switch", 1.0), ("gshard", 1.0), ("mse", 0.0)):
        assert (
            abs(
                topk_routing(logits, 1, balance=balance, renormalize=False).balance_loss.item()
                - want
            )
            < 1e-2 * (want == 0) + 1e-12
        )
    mixtral = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed"
    )
    logits, mask = torch.randn(2 * 9, 5), torch.rand(2, 9) < 0.3
    for k in (1, 2, 3):
        theirs = mixtral.load_balancing_loss_func((logits,), 5, k, (~mask).long())
        ours = topk_routing(logits, k, token_padding_mask=mask.flatten()).balance_loss
        torch.testing.assert_close(theirs, k * ours)


def test_a_single_weight_has_a_gradient_unless_it_is_renormalized():
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    for score in ("softmax", "sigmoid"):
        routing = topk_routing(logits, 1, score=score)
        d_logits = torch.autograd.grad(routing.weights.sum(), logits)[0]
        # By default, only sigmoid renormalizes a single weight, which is then always 1.
        assert d_logits.any() == (score == "softmax"), score
    routing = topk_routing(logits, 1, score="sigmoid", renormalize=False)
    assert torch.autograd.grad(routing.weights.sum(), logits)[0].any()


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_ties_go_to_the_lower_expert_and_minus_infinity_is_chosen_last(backend):
    with mmfused.backend(backend):
        check_ties()


def check_ties(inf=math.inf):
    logits = torch.tensor([[1.0, 2, 2, 1], [0, 0, 0, 0], [3, -inf, 3, -inf], [-inf, -inf, -inf, 0]])
    routing = topk_routing(logits, 2)
    assert routing.indices.tolist() == [[1, 2], [0, 1], [0, 2], [3, 0]]
    torch.testing.assert_close(
        routing.weights, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    )
    # Experts with probability 0 are chosen before the unavailable expert 0.
    available = torch.tensor([[False, True, True, True]])
    assert topk_routing(logits, 3, available=available).indices.tolist() == [
        [1, 2, 3],
        [1, 2, 3],
        [2, 1, 3],
        [3, 1, 2],
    ]


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_logits_make_their_token_nan(score, backend):
    logits = torch.randn(6, 5)
    logits[2, 3] = math.nan
    with mmfused.backend(backend):
        routing = topk_routing(logits, 2, score=score, renormalize=score == "softmax")
    assert routing.weights.isnan().all(1).tolist() == [t == 2 for t in range(6)]
    assert all(getattr(routing, name).isnan() for name in LOSSES)
    assert routing.indices[2].unique().numel() == 2 and 3 not in routing.indices[2]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_masked_tokens_have_no_effect_and_may_be_nan(score):
    logits, options = make(score)
    mask = options["token_padding_mask"]
    want = topk_routing(logits, 2, **options)
    with torch.no_grad():
        poisoned = logits.masked_fill(mask[:, None], math.nan)
    poisoned.requires_grad_()
    got = topk_routing(poisoned, 2, **options)
    for name in mmfused.Routing._fields:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    total = got.weights.sum() + sum(getattr(got, name) for name in LOSSES)
    d_logits = torch.autograd.grad(total, poisoned)[0]
    assert not d_logits[mask].any() and d_logits[~mask].any()
    assert not got.weights[mask].any() and ((got.indices >= 0) & (got.indices < EXPERTS)).all()


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("balance", ["switch", "gshard", "mse"])
def test_zero_or_only_masked_tokens_give_zeros(tokens, balance):
    logits = torch.randn(tokens, 5, requires_grad=True)
    routing = topk_routing(
        logits, 2, token_padding_mask=torch.ones(tokens, dtype=torch.bool), balance=balance
    )
    assert (
        not any(getattr(routing, name) for name in LOSSES)
        and not routing.weights.any()
        and not routing.counts.any()
    )
    assert routing.offsets.tolist() == [0] * 6 and sorted(routing.order.tolist()) == list(
        range(2 * tokens)
    )
    total = routing.weights.sum() + sum(getattr(routing, name) for name in LOSSES)
    assert not torch.autograd.grad(total, logits)[0].any()


def test_order_position_and_offsets_sort_the_choices_by_expert():
    logits, options = make()
    routing = topk_routing(logits, 3, **options)
    mask, expert = options["token_padding_mask"], routing.indices.flatten().tolist()
    live = [a for a in range(3 * TOKENS) if not mask[a // 3]]
    rows = sorted(live, key=lambda a: expert[a]) + [a for a in range(3 * TOKENS) if mask[a // 3]]
    assert routing.order.tolist() == rows
    assert routing.position.tolist() == [rows.index(a) for a in range(3 * TOKENS)]
    assert routing.offsets.tolist() == [
        sum(expert[a] < e for a in live) for e in range(EXPERTS + 1)
    ]
    assert routing.order.dtype == routing.position.dtype == routing.offsets.dtype == torch.int32


def test_given_indices_replay_a_routing():
    logits, options = make()
    first = topk_routing(logits, 2, **options)
    again = topk_routing(logits, 2, **options, indices=first.indices)
    for name in mmfused.Routing._fields:
        assert torch.equal(getattr(again, name), getattr(first, name)), name
    free = {**options, "available": None, "token_padding_mask": None}
    # Reversed indices give reversed weights.
    other = topk_routing(logits, 2, **free, indices=first.indices.flip(1))
    assert torch.equal(other.indices, first.indices.flip(1))
    torch.testing.assert_close(
        other.weights, topk_routing(logits, 2, **free, indices=first.indices).weights.flip(1)
    )


def test_jitter_depends_only_on_its_seed_or_the_generator():
    logits, options = make()
    clean = topk_routing(logits, 2, **options)
    seed = torch.tensor(5)
    a, b, c = (
        topk_routing(logits, 2, **options, jitter=0.3, jitter_seed=s)
        for s in (seed, seed, seed + 1)
    )
    assert (
        torch.equal(a.weights, b.weights)
        and not torch.equal(a.weights, c.weights)
        and not torch.equal(a.weights, clean.weights)
    )
    noise = 1 + 0.3 * (2 * uniform(seed, TOKENS, EXPERTS) - 1)
    assert noise.min() >= 0.7 and noise.max() <= 1.3
    torch.testing.assert_close(topk_routing(logits * noise, 2, **options).weights, a.weights)
    torch.manual_seed(3)
    first = topk_routing(logits, 2, **options, jitter=0.3)
    torch.manual_seed(3)
    assert torch.equal(topk_routing(logits, 2, **options, jitter=0.3).weights, first.weights)

    def loss(x):
        return topk_routing(x, 2, **options, jitter=0.3).weights.square().sum()

    torch.manual_seed(3)
    want = torch.autograd.grad(loss(logits), logits)[0]
    torch.manual_seed(3)
    assert torch.equal(
        torch.autograd.grad(checkpoint(loss, logits, use_reentrant=False), logits)[0], want
    )


def test_random_numbers_are_uniform_and_match_the_published_test_vector():
    """Philox4x32-10 with a counter and a key of zeros starts with 6627e8d5."""
    word = 0x6627E8D5
    assert (
        uniform(torch.tensor(0), 1, 1).item()
        == torch.tensor(float(word)).mul(torch.tensor(4.6566127342e-10)).item()
    )
    numbers = uniform(torch.tensor(2**63 - 1), 300, 200)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.002
    rows, columns = numbers - 0.5, numbers.T - 0.5
    assert (
        abs((rows[:, 1:] * rows[:, :-1]).mean()) < 0.002
        and abs((columns[:, 1:] * columns[:, :-1]).mean()) < 0.002
    )


def test_from_input_equals_a_linear_layer_and_routing():
    x = torch.randn(TOKENS, 12, dtype=torch.float64, requires_grad=True)
    weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((EXPERTS, 12), (EXPERTS,))
    )
    _, options = make()
    mask = options["token_padding_mask"]
    outs = []
    for routing in (
        topk_routing_from_input(x, weight, 2, bias, **options),
        topk_routing(x @ weight.T + bias, 2, **options),
    ):
        total = (
            (routing.weights * torch.arange(2 * TOKENS).view(TOKENS, 2)).sum()
            + routing.balance_loss
            + routing.z_loss
        )
        outs.append([total, *torch.autograd.grad(total, [x, weight, bias])])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        x[mask] = math.nan
    routing = topk_routing_from_input(x, weight, 2, bias, **options)
    gradients = torch.autograd.grad(
        routing.weights.square().sum() + routing.balance_loss, [x, weight, bias]
    )
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][mask].any()


def test_logits_are_float32_under_autocast_and_with_bfloat16_inputs():
    x, weight = torch.randn(50, 64), torch.randn(8, 64) / 8
    exact = topk_routing_from_input(x.bfloat16().double(), weight.double(), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = topk_routing_from_input(x, weight, 2)
    mixed = topk_routing_from_input(x.bfloat16(), weight, 2)
    for got in (routing, mixed):
        assert got.weights.dtype == torch.float32 and torch.equal(got.indices, exact.indices)
        torch.testing.assert_close(got.weights.double(), exact.weights, rtol=1e-5, atol=1e-6)


def test_updates_of_the_selection_bias_balance_the_experts():
    logits = torch.randn(400, 6) + torch.tensor([2.0, 1, 0, 0, -1, -2])
    bias = torch.zeros(6)
    before = topk_routing(logits, 2, score="sigmoid", selection_bias=bias).counts
    for _ in range(400):
        update_selection_bias(
            bias, topk_routing(logits, 2, score="sigmoid", selection_bias=bias).counts, rate=0.005
        )
    after = topk_routing(logits, 2, score="sigmoid", selection_bias=bias)
    assert before.float().std() > 100 and after.counts.float().std() < 10
    scores = logits.sigmoid().gather(1, after.indices)
    # The bias does not change the weights.
    torch.testing.assert_close(after.weights, scores / scores.sum(1, keepdim=True))
    counts, bias = torch.tensor([[3, 1], [1, 3]]), torch.zeros(2)
    update_selection_bias(bias, counts)
    assert not bias.any()  # over both segments, each expert got four tokens
    with pytest.raises(
        TypeError,
        match="bias: got dtype torch.bfloat16, expected float32: 16 bits lose steps of 0.001",
    ):
        update_selection_bias(bias.bfloat16(), counts)
    with pytest.raises(ValueError, match=r"counts: got shape \(2, 2\), expected 3 experts"):
        update_selection_bias(torch.zeros(3), counts)


def test_routing_from_indices_gives_the_same_routing():
    logits, options = make()
    mask = options["token_padding_mask"]
    want = topk_routing(logits, 2, token_padding_mask=mask)
    got = mmfused.routing_from_indices(want.indices, want.weights, EXPERTS, token_padding_mask=mask)
    for name in ("indices", "weights", "counts", "order", "position", "offsets"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.autograd.grad(got.weights.square().sum(), logits)[0].any()


BAD = {
    "k: got 0, expected 1 to 7": lambda x, o: topk_routing(x, 0),
    "k: got 8, expected 1 to 7": lambda x, o: topk_routing(x, 8),
    "logits: got shape (7,)": lambda x, o: topk_routing(x[0], 2),
    "logits: got shape (23, 7) and dtype torch.int64": lambda x, o: topk_routing(x.long(), 2),
    "logits: got a list": lambda x, o: topk_routing([1.0], 1),
    "score: got 'relu', expected one of softmax, sigmoid": lambda x, o: topk_routing(
        x, 2, score="relu"
    ),
    "balance: got 'none', expected one of switch, gshard, mse": lambda x, o: topk_routing(
        x, 2, balance="none"
    ),
    "token_padding_mask: got dtype torch.int64": lambda x, o: topk_routing(
        x, 2, token_padding_mask=torch.zeros(TOKENS).long()
    ),
    "token_padding_mask: got shape (22,), expected (23,)": lambda x, o: topk_routing(
        x, 2, token_padding_mask=o[1:]
    ),
    "segments: got dtype torch.int32": lambda x, o: topk_routing(
        x, 2, segments=torch.zeros(TOKENS).int()
    ),
    "segments: got shape (22,)": lambda x, o: topk_routing(x, 2, segments=torch.zeros(22).long()),
    "segments: got a value outside [0, 2)": lambda x, o: topk_routing(
        x, 2, segments=torch.full((TOKENS,), 2), num_segments=2
    ),
    "segments: got None with num_segments 2": lambda x, o: topk_routing(x, 2, num_segments=2),
    "num_segments: got 0": lambda x, o: topk_routing(x, 2, num_segments=0),
    "available: got dtype torch.float32": lambda x, o: topk_routing(
        x, 2, available=torch.ones(1, EXPERTS)
    ),
    "available: got shape (7,), expected (1, 7)": lambda x, o: topk_routing(
        x, 2, available=torch.ones(EXPERTS).bool()
    ),
    "available: got a segment with too few experts, expected at least k = 2": lambda x, o: (
        topk_routing(x, 2, available=torch.eye(EXPERTS)[:1].bool())
    ),
    "indices: got shape (23, 2), expected (23, 3)": lambda x, o: topk_routing(
        x, 3, indices=torch.zeros(TOKENS, 2).long()
    ),
    "indices: got dtype torch.int32": lambda x, o: topk_routing(
        x, 2, indices=torch.zeros(TOKENS, 2).int()
    ),
    "indices: got a value outside [0, 7)": lambda x, o: topk_routing(
        x, 2, indices=torch.full((TOKENS, 2), 7)
    ),
    "selection_bias: got shape (6,)": lambda x, o: topk_routing(
        x, 2, selection_bias=torch.zeros(6)
    ),
    "selection_bias: got dtype torch.bfloat16": lambda x, o: topk_routing(
        x, 2, selection_bias=torch.zeros(EXPERTS).bfloat16()
    ),
    "jitter: got 1, expected a number from 0 to below 1": lambda x, o: topk_routing(x, 2, jitter=1),
    "jitter_seed: got dtype torch.float32": lambda x, o: topk_routing(
        x, 2, jitter=0.1, jitter_seed=torch.tensor(1.0)
    ),
    "router_weight: got shape (7, 4), expected (experts, 7)": lambda x, o: topk_routing_from_input(
        x, x.detach()[:7, :4], 2
    ),
    "router_weight: got dtype torch.float16": lambda x, o: topk_routing_from_input(
        x, x.detach().half(), 2
    ),
    "router_bias: got shape (3,)": lambda x, o: topk_routing_from_input(
        x, x.detach(), 2, x.detach()[0, :3]
    ),
    "weights: got shape (2, 1), expected (2, 2)": lambda x, o: mmfused.routing_from_indices(
        torch.zeros(2, 2).long(), torch.ones(2, 1), 3
    ),
    "weights: got dtype torch.int64": lambda x, o: mmfused.routing_from_indices(
        *[torch.zeros(2, 2).long()] * 2, 3
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_refused(sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[sentence](
            torch.randn(TOKENS, EXPERTS, dtype=torch.float64), torch.zeros(TOKENS, dtype=torch.bool)
        )
    assert sentence in str(caught.value)
