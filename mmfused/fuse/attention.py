"""Attention over another input with torch's own weights: by query pooling where that saves work,
else on torch's attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..library import current_backend
from ..ops.query_pooling import query_pooling
from ..ops.query_pooling.functional import cheaper_form
from .base import LEFT, path_of


def attend(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    b_k: Tensor | None,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    **norm,
) -> Tensor:
    """As :func:`mmfused.query_pooling`; projected, it draws torch's dropout, which torch's
    attention never writes to memory.

    Keys and values are one product, as in nn.MultiheadAttention, but are read where it left them:
    that copies both."""
    absorbed = cheaper_form(x, queries, w_k, w_v, num_heads) == "absorbed"
    if absorbed or current_backend() in ("reference", "fused"):
        options = dict(num_heads=num_heads, key_padding_mask=key_padding_mask, dropout_p=dropout_p)
        return query_pooling(
            x,
            queries,
            w_k,
            w_v,
            b_v,
            b_k,
            **options,
            form="absorbed" if absorbed else "auto",
            **norm,
        )
    mask = key_padding_mask
    if mask is not None:
        x = x.masked_fill(mask[:, :, None], 0.0)  # ignored tokens may hold NaN
        mask = ~(mask & ~mask.all(1, keepdim=True))[
            :, None, None
        ]  # a sample without tokens is zeroed by the caller
    if norm:
        x = F.layer_norm(x, x.shape[-1:], norm["norm_weight"], norm["norm_bias"], norm["norm_eps"])
    bias = None if b_k is None else torch.cat([b_k, b_v])
    kv = F.linear(x, torch.cat([w_k, w_v]), bias)
    q = queries.expand(x.shape[0], *queries.shape[-2:])
    q, k, v = (
        y.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for y in (q, *kv.split([len(w_k), len(w_v)], -1))
    )
    return (
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        .transpose(1, 2)
        .flatten(2)
    )


def self_attention(name: str, parent: nn.Module) -> str | None:
    """The reason against an nn.MultiheadAttention of that name in ``parent``, where both tell that
    it never reads another input.
    """
    clip = path_of(type(parent)) == "open_clip.transformer.ResidualAttentionBlock"
    if clip and hasattr(parent, "ln_1_kv"):
        return "Its keys and values are normalised apart, so that key is not value."
    return "Self-attention: its tokens are its queries." if clip or "self" in name else None


_REASON = "It gives back the attention weights of both directions at every call; query_pooling, which has its outputs, forms none."
LEFT |= {
    "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention": _REASON,
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention": _REASON,
}
