"""Tests that the public references of gated cross-attention agree with the functions."""

import pytest
import torch

import mmfused

B, N, M, D, HEADS = 3, 5, 4, 12, 2


def norm():
    return torch.rand(D, dtype=torch.float64) + 0.5, torch.randn(D, dtype=torch.float64)


def weights():
    parts = [torch.randn(D, width, dtype=torch.float64) for width in (D, D, D, D, 2 * D + 1)]
    return mmfused.CrossAttentionWeights(
        *parts, *(torch.randn(D, dtype=torch.float64) for _ in range(5))
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_public_references_match_the_functions(p):
    a, b = torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, M, D, dtype=torch.float64)
    present, lengths = torch.tensor([True, False, True]), torch.tensor([3, 2, 0])
    shared = dict(num_heads=HEADS, missing="zero", dropout_p=p, dropout_seed=torch.tensor(5))
    to_a, to_b, norms = weights(), weights(), (norm(), norm())
    one = dict(
        norm_x=norms[0],
        norm_context=norms[1],
        context_lengths=lengths,
        context_present=present,
        **shared,
    )
    two = dict(norm_a=norms[0], norm_b=norms[1], b_lengths=lengths, b_present=present, **shared)
    with mmfused.backend("composed"):
        alone = mmfused.gated_cross_attention(a, b, to_a, **one)
        both = mmfused.bidirectional_gated_cross_attention(a, b, to_a, to_b, **two)
    torch.testing.assert_close(
        mmfused.gated_cross_attention_reference(a, b, to_a, **one), alone, rtol=1e-11, atol=1e-12
    )
    reference = mmfused.bidirectional_gated_cross_attention_reference(a, b, to_a, to_b, **two)
    torch.testing.assert_close(reference, both, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(reference[0], alone, rtol=1e-11, atol=1e-12)


def test_reference_draws_a_dropout_seed():
    a, b = torch.randn(B, N, D), torch.randn(B, M, D)
    w = mmfused.CrossAttentionWeights(*(t.float() for t in weights()))
    w = w._replace(w_g=None, b_g=None)
    options = dict(num_heads=HEADS, pre_norm=False, gate="none", indicator=False, dropout_p=0.5)
    norm_x = torch.ones(D), torch.zeros(D)
    outs = [
        mmfused.gated_cross_attention_reference(a, b, w, norm_x=norm_x, **options) for _ in range(2)
    ]
    assert not torch.equal(*outs)
