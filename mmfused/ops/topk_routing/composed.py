"""The composed path of routing: what the kernels do, in plain PyTorch; one softmax, and a gradient
written by hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import once_differentiable
from ...random import uniform
from .order import Routing
from .values import largest, spoil, take


def routing_composed(
    logits,
    k,
    *,
    score,
    renormalize,
    selection_bias,
    token_padding_mask,
    segments,
    num_segments,
    available,
    balance,
    indices,
    jitter,
    jitter_seed,
) -> Routing:
    noise = 1 + jitter * (2 * uniform(jitter_seed, *logits.shape) - 1) if jitter else None
    segments, indices, usable, void = take(
        k, logits.shape[1], segments, num_segments, available, indices
    )
    if indices is None:
        with torch.no_grad():
            scores = _scores(logits, noise, token_padding_mask, usable, void, score)
            key = scores[0] if selection_bias is None else scores[2].exp() + selection_bias
            indices = largest(key, usable, k)
    order, position, offsets, tiles = torch.ops.mmfused.expert_order_composed(
        indices, token_padding_mask, logits.shape[1]
    )
    counts = (
        _counts(indices, token_padding_mask, segments, num_segments, logits.shape[1])
        if segments is not None
        else None
    )
    counts = offsets.diff().long()[None] if counts is None else counts
    renormalize = renormalize and (k > 1 or score == "sigmoid")
    losses = _Scores.apply(
        logits,
        indices,
        counts,
        noise,
        token_padding_mask,
        segments,
        available,
        usable,
        void,
        score,
        renormalize,
        balance,
    )
    return Routing(indices, losses[0], counts, *losses[1:], order, position, offsets, tiles)


def _scores(logits, noise, mask, usable, void, score) -> tuple[Tensor, Tensor, Tensor]:
    """l, u and log s of every token and expert: s is the score, softmax(u) the probabilities."""
    logits = logits if noise is None else logits * noise
    logits = logits if mask is None else logits.masked_fill(mask[:, None], 0.0)
    logits = logits if usable is None else logits.masked_fill(~usable, float("-inf"))
    logits = spoil(logits, void, mask)
    if score == "sigmoid":
        u = F.logsigmoid(logits)
        return logits, u, u
    return logits, logits, logits.log_softmax(-1)


def _counts(indices, mask, segments, num_segments, experts) -> Tensor:
    """(S, E) int64; what masked tokens chose goes into a place of its own."""
    place = segments[:, None] * experts + indices
    if mask is not None:
        place = place.masked_fill(mask[:, None], num_segments * experts)
    sums = place.new_zeros(num_segments * experts + 1).scatter_add_(
        0, place.flatten(), torch.ones_like(place).flatten()
    )
    return sums[:-1].view(num_segments, experts)


class _Scores(torch.autograd.Function):
    """Weights, balance, z and entropy of chosen experts; the gradients are those of the module
    docstring of function.py.
    """

    @staticmethod
    def forward(
        ctx,
        logits,
        indices,
        counts,
        noise,
        mask,
        segments,
        available,
        usable,
        void,
        score,
        renormalize,
        balance,
    ):
        logit, u, log_score = _scores(logits, noise, mask, usable, void, score)
        probs = log_score.exp() if score == "softmax" else u.softmax(-1)
        chosen = log_score.gather(1, indices)
        weights = chosen.softmax(-1) if renormalize else chosen.exp()
        lse = logit.logsumexp(-1)
        weights = weights.masked_fill(lse.isnan()[:, None], float("nan"))
        weights = weights if mask is None else weights.masked_fill(mask[:, None], 0.0)
        live = torch.ones_like(lse) if mask is None else (~mask).to(lse.dtype)
        total = live.sum().clamp(min=1)
        z, entropy = (
            (lse.square() * live).sum() / total,
            (torch.special.entr(probs).sum(-1) * live).sum() / total,
        )
        loss, slope = _balance(balance, probs, weights, indices, counts, live, segments, available)
        ctx.save_for_backward(
            logit, probs, weights, indices, lse, live, total, slope, noise, segments
        )
        ctx.score, ctx.renormalize, ctx.balance, ctx.dtype = (
            score,
            renormalize,
            balance,
            logits.dtype,
        )
        ctx.set_materialize_grads(False)
        return weights, loss, z, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights, d_balance, d_z, d_entropy):
        logit, probs, weights, indices, lse, live, total, slope, noise, segments = ctx.saved_tensors
        d_weights = torch.zeros_like(weights) if d_weights is None else d_weights
        d_probs = torch.zeros_like(probs)
        if d_balance is not None:
            mine = slope[0] if segments is None else slope[segments]  # (E,) or (T, E)
            if ctx.balance == "mse":
                d_weights = d_weights + d_balance * mine.expand_as(probs).gather(1, indices)
            else:
                d_probs = d_probs + d_balance * mine
        if d_entropy is not None:
            d_probs = d_probs - d_entropy / total * torch.where(probs > 0, probs.log() + 1, 0.0)
        du = torch.zeros_like(probs)
        if ctx.renormalize:
            away = d_weights - (d_weights * weights).sum(-1, keepdim=True)
            du = du.scatter_add(
                1, indices, weights * (away - (away * weights).sum(-1, keepdim=True))
            )
        elif ctx.score == "softmax":
            d_probs = d_probs.scatter_add(1, indices, d_weights)
        else:
            du = du.scatter_add(1, indices, weights * d_weights)
        d_probs = probs * (d_probs - (d_probs * probs).sum(-1, keepdim=True))
        # A softmax's gradient sums to 0: what rounding leaves of 1 - P near 1, where the others
        # know better, is taken off here too.
        du = du + d_probs - probs * d_probs.sum(-1, keepdim=True)
        if ctx.score == "sigmoid":
            du = du * torch.sigmoid(-logit)
        if d_z is not None:
            softmax = probs if ctx.score == "softmax" else logit.softmax(-1)
            du = du + (2 * d_z / total * lse)[:, None] * softmax
        du = torch.where(live[:, None] > 0, du, 0.0)
        return (du if noise is None else du * noise).to(ctx.dtype), *[None] * 11


def _balance(
    form,
    probs,
    weights,
    indices,
    counts,
    live,
    segments,
    available,
) -> tuple[Tensor, Tensor]:
    """The loss, and (S, E): its derivative to each P_te, or each w_te for "mse", the same for all
    tokens of a segment.
    """
    num_segments, experts = counts.shape
    sizes = (
        live.new_full((num_segments,), experts)
        if available is None
        else available.sum(1).to(live.dtype)
    )
    if segments is None:
        member = live[:, None]
    else:
        member = (segments[:, None] == torch.arange(num_segments, device=live.device)) * live[
            :, None
        ]  # (T, S)
    number = member.sum(0)
    clamped, nonempty = number.clamp(min=1)[:, None], (number > 0).sum().clamp(min=1)
    if form == "mse":
        dense = torch.zeros_like(probs).scatter_add(1, indices, weights)
        target = (number > 0)[:, None] / sizes.clamp(min=1)[:, None]
        away = _sums(member, dense) / clamped - (
            target if available is None else target * available
        )
        return away.square().sum() / nonempty, 2 * away / clamped / nonempty
    k = indices.shape[1]
    share = counts.to(live.dtype) / (k * clamped)
    if form == "gshard":
        first = torch.zeros_like(probs).scatter(1, indices[:, :1], 1.0)
        share = (member.mT @ first) / clamped
    slope = sizes[:, None] * share / clamped / nonempty
    return (slope * _sums(member, probs)).sum(), slope


def _sums(member: Tensor, values: Tensor) -> Tensor:
    """(S, E): the values (T, E) added up by segment. NaN stays in its own, where a product would
    have 0 times NaN elsewhere.
    """
    void = values.isnan()
    sums = member.mT @ values.masked_fill(void, 0.0)
    return sums.masked_fill(member.mT @ void.to(values.dtype) > 0, float("nan"))
