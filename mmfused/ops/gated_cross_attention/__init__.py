"""Gated cross-attention: modalities attend to each other, and a gate blends tokens and result."""

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
