"""Gated cross-attention in plain PyTorch, with fewer matrix products than the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...children import Called, layer_norm, linear
from ...random import keep_mask
from .._common import masked_softmax
from .._sdpa import attention
from .reference import (
    CrossAttentionOptions,
    CrossAttentionWeights,
    Side,
    gate_logits,
    indicator_of,
    read_context,
    unchanged_tokens,
)

Normed = Callable[[Tensor, Side], Tensor]


def attend_composed(
    x: Side,
    context: Side,
    w: CrossAttentionWeights,
    options: CrossAttentionOptions,
    normed: Normed,
    direction: int = 0,
) -> Tensor:
    """Compute :func:`.reference.attend_reference`, faster.

    One product computes keys and values, and the inputs of the gate are not concatenated. Without
    dropout, torch's attention is used. ``normed``: see :func:`shared_norms`.
    """
    dropout_p, seed = options.dropout_p, options.dropout_seed
    context_tokens, ignore = read_context(context, options.missing, collapse=dropout_p == 0)
    unchanged = unchanged_tokens(x, context, options.missing)
    tokens = x.tokens if unchanged is None else x.tokens.masked_fill(unchanged[:, :, None], 0.0)

    q = linear(normed(tokens, x), w.w_q, w.b_q)
    k, v = _keys_and_values(normed(context_tokens, context), w)
    q, k, v = (y.unflatten(-1, (options.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    attended = _attention(q, k, v, ignore, options, 2 * direction)
    attn_out = linear(attended.transpose(1, 2).flatten(2), w.w_o, w.b_o)
    if ignore is not None:
        attn_out = attn_out.masked_fill(ignore.all(1)[:, None, None], 0.0)
    if seed is not None and dropout_p:
        kept = keep_mask(seed, attn_out.shape, dropout_p, 2 * direction + 1)
        attn_out = attn_out * kept / (1 - dropout_p)

    if options.gate == "none":
        out = tokens + attn_out
        if not options.pre_norm:
            assert x.norm is not None
            out = layer_norm(out, x.norm, options.norm_eps)
    else:
        g = _gate_logits(tokens, attn_out, context, w, options).sigmoid()
        # lerp saves for backward only tensors that other operations save too.
        out = torch.lerp(tokens, attn_out, g)
    return out if unchanged is None else torch.where(unchanged[:, :, None], x.tokens, out)


def shared_norms(options: CrossAttentionOptions) -> Normed:
    """Return a function that normalises the tokens of a side, and caches the results.

    Without ``pre_norm`` the function returns the tokens unchanged.
    """
    cache: list[tuple[Tensor, Side, Tensor]] = []

    def normed(tokens, side):
        if not options.pre_norm:
            return tokens
        for cached_tokens, cached_side, out in cache:
            if cached_tokens is tokens and cached_side is side:
                return out
        out = side.norm_tokens(tokens, options.norm_eps)
        cache.append((tokens, side, out))
        return out

    return normed


def samples_to_compute(sides: list[Side], options: CrossAttentionOptions) -> Tensor | None:
    """Return the indices of the samples that "skip" does not skip, or None to compute all samples.

    Samples are skipped only on a CPU in eager mode, where the indices need no synchronisation.
    Dropout needs all samples, since the dropout mask of a sample depends on its batch index.
    """
    absents = [side.absent for side in sides if side.absent is not None]
    if options.missing != "skip" or options.dropout_p or not absents:
        return None
    if absents[0].device.type != "cpu" or torch.compiler.is_compiling():
        return None
    absent = torch.stack(absents).any(0)
    return (~absent).nonzero()[:, 0] if absent.any() else None


def _keys_and_values(tokens: Tensor, w: CrossAttentionWeights) -> tuple[Tensor, Tensor]:
    """Compute keys and values in one product, unless a projection module must be called."""
    if isinstance(w.w_k, Called) or isinstance(w.w_v, Called):
        return linear(tokens, w.w_k, w.b_k), linear(tokens, w.w_v, w.b_v)
    b_k = w.w_k.new_zeros(len(w.w_k)) if w.b_k is None else w.b_k
    b_v = w.w_v.new_zeros(len(w.w_v)) if w.b_v is None else w.b_v
    both = F.linear(tokens, torch.cat([w.w_k, w.w_v]), torch.cat([b_k, b_v]))
    k, v = both.chunk(2, -1)
    return k, v


def _gate_logits(
    x: Tensor,
    attn_out: Tensor,
    context: Side,
    w: CrossAttentionWeights,
    options: CrossAttentionOptions,
) -> Tensor:
    """Return the logits of the gate, ``x W_gx^T + A W_ga^T + e w_e^T + b_g``."""
    assert w.w_g is not None
    if isinstance(w.w_g, Called):
        return gate_logits(x, attn_out, context, w, options.indicator)
    dim = x.shape[-1]
    logits = F.linear(x, w.w_g[:, :dim], w.b_g)
    logits = logits + F.linear(attn_out, w.w_g[:, dim : 2 * dim])
    if options.indicator:
        e = indicator_of(context, x.shape[0], options.indicator, logits)
        logits = logits + e[:, None, None] * w.w_g[:, -1]
    return logits


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ignore: Tensor | None,
    options: CrossAttentionOptions,
    stream: int,
) -> Tensor:
    dropout_p, seed = options.dropout_p, options.dropout_seed
    if dropout_p == 0:
        if ignore is None:
            return attention(q, k, v)
        # Some backends of torch's attention do not give output 0 and gradient 0 for a sample whose
        # context is fully masked. Here such a sample attends to all tokens, and the caller sets the
        # output to 0 afterwards.
        allowed = ~(ignore & ~ignore.all(1, keepdim=True))[:, None, None]
        return attention(q, k, v, allowed)
    assert seed is not None
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs = masked_softmax(logits, None if ignore is None else ignore[:, None, None], -1)
    probs = probs * keep_mask(seed, probs.shape, dropout_p, stream) / (1 - dropout_p)
    return probs.to(v.dtype) @ v
