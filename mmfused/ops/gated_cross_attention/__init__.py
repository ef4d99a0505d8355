"""Gated cross-attention: two modalities read each other, a gate decides how much stays, a missing
one costs nothing.
"""

from .functional import bidirectional_gated_cross_attention, gated_cross_attention
from .modules import BidirectionalGatedCrossAttention, GatedCrossAttention, TokenGate, pack_passes
from .reference import (
    CrossAttentionWeights,
    bidirectional_gated_cross_attention_reference,
    gated_cross_attention_reference,
)

__all__ = [
    "BidirectionalGatedCrossAttention",
    "CrossAttentionWeights",
    "GatedCrossAttention",
    "TokenGate",
    "bidirectional_gated_cross_attention",
    "bidirectional_gated_cross_attention_reference",
    "gated_cross_attention",
    "gated_cross_attention_reference",
    "pack_passes",
]
