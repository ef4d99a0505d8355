"""Tests of MOON2.0's dual alignment against a literal transcription of its equations."""

import math

import pytest
import torch

import mmfused
from mmfused.losses import dual_alignment, expert_shares


def literal(alignment, shares, members):
    """Compute the equations of ``dual_alignment``'s docstring element by element."""
    experts, objectives = alignment.shape
    p = [
        [
            torch.exp(alignment[z, m]) / sum(torch.exp(alignment[z, k]) for k in range(objectives))
            for m in range(objectives)
        ]
        for z in range(experts)
    ]
    omega = []
    for m in range(objectives):
        batch = [b for b in range(len(shares)) if members[b, m]]
        total = sum(sum(p[z][m] * shares[b, z] for z in range(experts)) for b in batch)
        omega.append(total / len(batch) if batch else torch.zeros((), dtype=torch.float64))
    sparsity = sum(-sum(q * torch.log(q) for q in row) for row in p) / experts
    return torch.stack(omega), sparsity


def make(experts=4, objectives=5, batch=6):
    alignment = torch.randn(experts, objectives, dtype=torch.float64, requires_grad=True)
    shares = torch.rand(batch, experts, dtype=torch.float64)
    return (
        alignment,
        (shares / shares.sum(1, keepdim=True)).requires_grad_(),
        torch.rand(batch, objectives) < 0.6,
    )


@pytest.mark.parametrize("all_members", [True, False])
def test_dual_alignment_matches_the_equations(all_members):
    alignment, shares, members = make()
    members[:, 2] = False  # an objective without samples
    members = torch.ones_like(members) if all_members else members
    got, want = (
        dual_alignment(alignment, shares, members=None if all_members else members),
        literal(alignment, shares, members),
    )
    upstream = torch.randn(5, dtype=torch.float64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    for a, b in zip(
        *(torch.autograd.grad(o @ upstream + 3 * s, (alignment, shares)) for o, s in (got, want)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert all_members or got[0][2] == 0


def test_zero_alignment_weighs_all_objectives_equally():
    _, shares, _ = make()
    omega, sparsity = dual_alignment(torch.zeros(4, 5, dtype=torch.float64), shares)
    torch.testing.assert_close(omega, torch.full((5,), 0.2, dtype=torch.float64))
    assert abs(sparsity.item() - math.log(5)) < 1e-14


def test_detached_routing_still_learns_the_alignment():
    alignment, shares, _ = make()
    omega, _ = dual_alignment(alignment, shares, detach_routing=True)
    d_alignment, d_shares = torch.autograd.grad(omega[0], (alignment, shares), allow_unused=True)
    assert d_shares is None and d_alignment.any()
    torch.testing.assert_close(omega, dual_alignment(alignment, shares)[0])


@pytest.mark.parametrize("total", [1, 5.0])
def test_normalised_weights_have_the_given_sum(total):
    alignment, shares, members = make()
    plain, _ = dual_alignment(alignment, shares, members=members)
    omega, _ = dual_alignment(alignment, shares, members=members, normalise=total)
    torch.testing.assert_close(omega, plain * total / plain.sum())
    none = torch.zeros_like(members)
    omega, _ = dual_alignment(alignment, shares, members=none, normalise=total)
    assert not omega.any() and not torch.autograd.grad(omega.sum(), alignment)[0].any()


def test_shares_of_a_sample_are_the_mean_over_its_tokens():
    logits, masked = (
        torch.randn(15, 4, dtype=torch.float64, requires_grad=True),
        torch.zeros(15, dtype=torch.bool),
    )
    masked[[3, 4, 5, 10, 11, 12, 13, 14]] = True  # 10 to 14 are the last sample
    routing = mmfused.topk_routing(logits, 2, token_padding_mask=masked)
    shares = expert_shares(routing, 3)
    want = torch.zeros(3, 4, dtype=torch.float64)
    for t in range(15):
        for e, w in zip(routing.indices[t].tolist(), routing.weights[t], strict=True):
            want[t // 5, e] += w.detach() / (~masked[t // 5 * 5 : t // 5 * 5 + 5]).sum().clamp(
                min=1
            )
    torch.testing.assert_close(shares.detach(), want)
    torch.testing.assert_close(
        shares.sum(1).detach(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    )
    d_logits = torch.autograd.grad(shares[0] @ torch.randn(4, dtype=torch.float64), logits)[0]
    assert d_logits[:3].any() and not d_logits[3:].any()


def test_dual_alignment_computes_in_float32_under_autocast_and_for_bfloat16():
    alignment, shares, _ = make()
    want, sparsity = dual_alignment(alignment, shares)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got_sparsity = dual_alignment(alignment.float(), shares.float())
    assert got.dtype == got_sparsity.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert dual_alignment(alignment.bfloat16(), shares.bfloat16())[0].dtype == torch.float32


BAD = {
    "alignment: got shape (4,)": lambda a, s, m: dual_alignment(a[:, 0], s),
    "shares: got shape (6, 3)": lambda a, s, m: dual_alignment(a, s[:, :3]),
    "members: got shape (6, 5) and dtype torch.int64": lambda a, s, m: dual_alignment(
        a, s, members=m.long()
    ),
    "members: got shape (5, 5)": lambda a, s, m: dual_alignment(a, s, members=m[1:]),
    "normalise: got 0, expected a positive sum": lambda a, s, m: dual_alignment(a, s, normalise=0),
    "samples: got 4, expected a divisor of the routing's 6 tokens": lambda a, s, m: expert_shares(
        mmfused.topk_routing(s, 2), 4
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises(message):
    with pytest.raises(ValueError) as caught:
        BAD[message](*make())
    assert message in str(caught.value)
