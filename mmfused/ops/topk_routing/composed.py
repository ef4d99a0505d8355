"""The composed path of routing: plain PyTorch with a hand-written backward pass.

The equations and symbols are in reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import once_differentiable
from ...random import uniform
from .arguments import Inputs, Options, Score
from .order import Routing, expert_order_composed
from .reference import into_range, largest, nan_where


def routing_composed(logits: Tensor, inputs: Inputs, options: Options) -> Routing:
    """Compute the :class:`Routing` of logits (T, E) in float32 or float64."""
    experts, mask = logits.shape[1], inputs.token_padding_mask
    factor = None
    if options.jitter:
        assert inputs.jitter_seed is not None
        factor = 1 + options.jitter * (2 * uniform(inputs.jitter_seed, *logits.shape) - 1)
    in_range = into_range(experts, inputs, options)
    indices, bias = in_range.indices, inputs.selection_bias
    if indices is None:
        with torch.no_grad():
            scored = _scored(logits, factor, mask, in_range.usable, in_range.broken, options.score)
            logit, _, log_score = scored
            key = logit if bias is None else log_score.exp() + bias
            indices = largest(key, in_range.usable, options.k)
    order, position, offsets, tiles = expert_order_composed(indices, mask, experts)
    if in_range.segments is None:
        counts = offsets.diff().long()[None]
    else:
        counts = _counts(indices, mask, in_range.segments, options.num_segments, experts)
    weights, balance, z, entropy = _WeightsAndLosses.apply(
        logits,
        indices,
        counts,
        factor,
        mask,
        in_range.segments,
        inputs.available,
        in_range.usable,
        in_range.broken,
        options,
    )
    return Routing(indices, weights, counts, balance, z, entropy, order, position, offsets, tiles)


def _scored(
    logits: Tensor,
    factor: Tensor | None,
    mask: Tensor | None,
    usable: Tensor | None,
    broken: Tensor | None,
    score: Score,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return l, u and log s, each (T, E); l is ``logits`` with the jitter and the masks applied."""
    logits = logits if factor is None else logits * factor
    logits = logits if mask is None else logits.masked_fill(mask[:, None], 0.0)
    logits = logits if usable is None else logits.masked_fill(~usable, float("-inf"))
    logits = nan_where(logits, broken, mask)
    if score == "sigmoid":
        u = F.logsigmoid(logits)
        return logits, u, u
    return logits, logits, logits.log_softmax(-1)


def _counts(
    indices: Tensor,
    mask: Tensor | None,
    segments: Tensor,
    num_segments: int,
    experts: int,
) -> Tensor:
    """Return the number of assignments to each expert in each segment, (S, E) int64."""
    place = segments[:, None] * experts + indices
    if mask is not None:  # masked tokens are counted in an extra last element, which is dropped
        place = place.masked_fill(mask[:, None], num_segments * experts)
    sums = place.new_zeros(num_segments * experts + 1)
    sums.scatter_add_(0, place.flatten(), torch.ones_like(place).flatten())
    return sums[:-1].view(num_segments, experts)


class _WeightsAndLosses(torch.autograd.Function):
    """Compute the routing weights and the losses (balance, z, entropy) for given indices."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        indices: Tensor,
        counts: Tensor,
        factor: Tensor | None,
        mask: Tensor | None,
        segments: Tensor | None,
        available: Tensor | None,
        usable: Tensor | None,
        broken: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logit, u, log_score = _scored(logits, factor, mask, usable, broken, options.score)
        probs = log_score.exp() if options.score == "softmax" else u.softmax(-1)
        chosen = log_score.gather(1, indices)
        weights = chosen.softmax(-1) if options.renormalizes else chosen.exp()
        lse = logit.logsumexp(-1)
        weights = weights.masked_fill(lse.isnan()[:, None], float("nan"))
        weights = weights if mask is None else weights.masked_fill(mask[:, None], 0.0)
        valid = torch.ones_like(lse) if mask is None else (~mask).to(lse.dtype)
        total = valid.sum().clamp(min=1)
        z = (lse.square() * valid).sum() / total
        entropy = (torch.special.entr(probs).sum(-1) * valid).sum() / total
        loss, slope = _balance(probs, weights, indices, counts, valid, segments, available, options)
        ctx.save_for_backward(
            logit, probs, weights, indices, lse, valid, total, slope, factor, segments
        )
        ctx.options, ctx.dtype = options, logits.dtype
        ctx.set_materialize_grads(False)
        return weights, loss, z, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_weights: Tensor | None,
        d_balance: Tensor | None,
        d_z: Tensor | None,
        d_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        logit, probs, weights, indices, lse, valid, total, slope, factor, segments = saved
        options = ctx.options
        g_w: Tensor = torch.zeros_like(weights) if d_weights is None else d_weights
        g_p = torch.zeros_like(probs)
        if d_balance is not None:
            by_expert = slope[0] if segments is None else slope[segments]  # (E,) or (T, E)
            if options.balance == "mse":
                g_w = g_w + d_balance * by_expert.expand_as(probs).gather(1, indices)
            else:
                g_p = g_p + d_balance * by_expert
        if d_entropy is not None:
            g_p = g_p - d_entropy / total * torch.where(probs > 0, probs.log() + 1, 0.0)
        du = torch.zeros_like(probs)
        if options.renormalizes:
            centred = g_w - (g_w * weights).sum(-1, keepdim=True)
            # Subtract the weighted mean again, since the first subtraction leaves a rounding error.
            centred = centred - (centred * weights).sum(-1, keepdim=True)
            du = du.scatter_add(1, indices, weights * centred)
        elif options.score == "softmax":
            g_p = g_p.scatter_add(1, indices, g_w)
        else:
            du = du.scatter_add(1, indices, weights * g_w)
        through_p = probs * (g_p - (g_p * probs).sum(-1, keepdim=True))
        # Without rounding, through_p would sum to 0 over the experts. The error is largest if a
        # probability is close to 1.
        du = du + through_p - probs * through_p.sum(-1, keepdim=True)
        d_logits = du * torch.sigmoid(-logit) if options.score == "sigmoid" else du
        if d_z is not None:
            softmax = probs if options.score == "softmax" else logit.softmax(-1)
            d_logits = d_logits + (2 * d_z / total * lse)[:, None] * softmax
        d_logits = torch.where(valid[:, None] > 0, d_logits, 0.0)
        d_logits = d_logits if factor is None else d_logits * factor
        return d_logits.to(ctx.dtype), *[None] * 9


def _balance(
    probs: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    valid: Tensor,
    segments: Tensor | None,
    available: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return the balance loss and its derivatives (S, E).

    Element (s, e) is the derivative with respect to P_te (with "mse": w_te), which is the same for
    all tokens t of segment s.
    """
    num_segments, experts = counts.shape
    if available is None:
        num_available = valid.new_full((num_segments,), experts)
    else:
        num_available = available.sum(1).to(valid.dtype)
    if segments is None:
        member = valid[:, None]
    else:  # (T, S)
        member = segments[:, None] == torch.arange(num_segments, device=valid.device)
        member = member * valid[:, None]
    num_tokens = member.sum(0)
    divisor, nonempty = num_tokens.clamp(min=1)[:, None], (num_tokens > 0).sum().clamp(min=1)
    if options.balance == "mse":
        dense = torch.zeros_like(probs).scatter_add(1, indices, weights)
        target = (num_tokens > 0)[:, None] / num_available.clamp(min=1)[:, None]
        target = target if available is None else target * available
        difference = _sums(member, dense) / divisor - target
        return difference.square().sum() / nonempty, 2 * difference / divisor / nonempty
    share = counts.to(valid.dtype) / (options.k * divisor)
    if options.balance == "gshard":
        first = torch.zeros_like(probs).scatter(1, indices[:, :1], 1.0)
        share = (member.mT @ first) / divisor
    slope = num_available[:, None] * share / divisor / nonempty
    return (slope * _sums(member, probs)).sum(), slope


def _sums(member: Tensor, values: Tensor) -> Tensor:
    """Return the sums (S, E) of ``values`` (T, E) over the tokens of each segment.

    NaN in ``values`` affects the sum of its own segment only. In a single product, 0 * NaN would
    affect the sums of all segments.
    """
    nan = values.isnan()
    sums = member.mT @ values.masked_fill(nan, 0.0)
    return sums.masked_fill(member.mT @ nan.to(values.dtype) > 0, float("nan"))
