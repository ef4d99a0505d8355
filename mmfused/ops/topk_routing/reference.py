"""Top-k routing of a mixture of experts: choice of experts, weights, losses and order.

For T tokens x (T, D) and E experts, with router weight W_r (E, D) and bias b_r (E,):

    l    = x W_r^T + b_r                    logits (T, E)

    score "softmax":  s = P = softmax(l)                      scores s and probabilities P (T, E)
    score "sigmoid":  s = sigmoid(l), P = s / sum over e of s

    C_t  = the k experts with the largest l (with a selection bias: the largest s + bias)
    w_te = s_te / sum over C_t of s         routing weights (without renormalisation: s_te)

In the losses, mean_t is the mean over the tokens that are not masked. With several segments, the
balance loss is computed for each segment, and averaged over the segments that have tokens. With
``available``, the number of experts available to the segment replaces E, and the sums over e run
over these experts.

    balance, "switch" = E sum_e f_e mean_t P_te     f_e: share of expert e in all assignments
                                                    (Switch Transformer, eq. 4)
    balance, "gshard" = E sum_e f_e mean_t P_te     f_e: share of expert e in the first choices
                                                    (GShard, algorithm 1)
    balance, "mse"    = sum_e (mean_t w_te - 1/E)^2                    (FLUID's public code)
    z                 = mean_t (log sum_e exp l_te)^2                  (ST-MoE, eq. 5)
    entropy           = mean_t -sum_e P_te log P_te                    (LIMoE)

For the gradients let u = l with "softmax" and u = log sigmoid(l) with "sigmoid". For both scores
P = softmax(u), and the renormalised weights are softmax(u) over C_t. The shares f_e are not
differentiated. A balance loss depends on P (with "mse": on w) only through the mean over the
unmasked tokens of a segment, so its derivative with respect to P_te (w_te) is the same for all
these tokens t. Let g_P, g_w and g_z be the gradients with respect to P, w and z, where g_P comes
from the balance loss and the entropy. Let n be the number of tokens that are not masked,
lse = log sum_e exp l_te, and <a, b> the sum over experts of a b. Then, with renormalised weights,

    du = P (g_P - <g_P, P>) + w (g_w - <g_w, w>)                 the second term on C_t only
    dl = du + (2 g_z lse / n) softmax(l)                         with "softmax"
    dl = du sigmoid(-l) + (2 g_z lse / n) softmax(l)             with "sigmoid"

One kernel computes dl from the logits. The forward pass launches three kernels: the first chooses
experts, the second sums over blocks of tokens, the third writes the order and the losses. The
launches do not synchronise with the CPU.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...random import uniform
from .arguments import Balance, Inputs, Options, Score
from .order import Routing, sort_by_expert


def topk_routing_reference(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    token_padding_mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int = 1,
    available: Tensor | None = None,
    balance: Balance = "switch",
    indices: Tensor | None = None,
    jitter: float = 0.0,
    jitter_seed: Tensor | None = None,
) -> Routing:
    """Compute :func:`topk_routing` in plain PyTorch.

    This is the specification. It supports any floating dtype, any device and derivatives of any
    order.

    Examples:
        >>> import torch, mmfused
        >>> logits = torch.randn(10, 4)
        >>> exact = mmfused.topk_routing_reference(logits.double(), 2)
        >>> routing = mmfused.topk_routing(logits, 2)
        >>> torch.equal(routing.indices, exact.indices)
        True
        >>> torch.allclose(routing.balance_loss.double(), exact.balance_loss, atol=1e-5)
        True
    """
    inputs = Inputs(
        selection_bias=selection_bias,
        token_padding_mask=token_padding_mask,
        segments=segments,
        available=available,
        indices=indices,
        jitter_seed=jitter_seed,
    )
    options = Options(
        k,
        score=score,
        renormalize=renormalize,
        num_segments=num_segments,
        balance=balance,
        jitter=jitter,
    )
    return routing_by_equations(logits, inputs, options)


def routing_by_equations(logits: Tensor, inputs: Inputs, options: Options) -> Routing:
    """Compute :func:`topk_routing_reference` from inputs and options."""
    tokens, experts = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = inputs.token_padding_mask
    if mask is None:
        valid = torch.ones(tokens, dtype=torch.bool, device=logits.device)
    else:
        valid = ~mask
    in_range = into_range(experts, inputs, options)
    logits, usable = _allowed_logits(logits, valid, in_range, inputs, options)

    log_score = logits.log_softmax(-1) if options.score == "softmax" else F.logsigmoid(logits)
    probs = log_score.softmax(-1)
    indices, bias = in_range.indices, inputs.selection_bias
    if indices is None:
        key = logits if bias is None else log_score.exp() + bias
        indices = largest(key, usable, options.k)
    chosen = log_score.gather(1, indices)
    weights = chosen.softmax(-1) if options.renormalizes else chosen.exp()
    weights = weights.masked_fill(logits.isnan().any(1, keepdim=True), float("nan"))
    weights = weights.masked_fill(~valid[:, None], 0.0)
    counts, balance = _balance(probs, weights, indices, valid, in_range.segments, inputs, options)

    def mean_of_all(per_token: Tensor) -> Tensor:
        return per_token.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)

    log_probs = log_score.log_softmax(-1).masked_fill(probs == 0, 0.0)  # 0 log 0 = 0
    return Routing(
        indices,
        weights,
        counts,
        balance,
        mean_of_all(logits.logsumexp(-1).square()),
        mean_of_all(-(probs * log_probs).sum(-1)),
        *sort_by_expert(indices, mask, experts),
    )


def _allowed_logits(
    logits: Tensor,
    valid: Tensor,
    in_range: InRange,
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return the logits (T, E) with jitter, and the mask ``usable`` (T, E).

    Logits of masked tokens become 0, then logits of unusable experts become -inf. All logits of a
    broken token that is not masked become NaN.
    """
    tokens, experts = logits.shape
    usable = in_range.usable
    if usable is None:
        usable = torch.ones(experts, dtype=torch.bool, device=logits.device)
    usable = usable.expand(tokens, experts)
    if options.jitter:
        assert inputs.jitter_seed is not None
        noise = uniform(inputs.jitter_seed, tokens, experts)
        logits = logits * (1 + options.jitter * (2 * noise - 1))
    logits = logits.masked_fill(~valid[:, None], 0.0)  # a masked token may be NaN
    logits = logits.masked_fill(~usable, float("-inf"))
    return nan_where(logits, in_range.broken, inputs.token_padding_mask), usable


def _balance(
    probs: Tensor,
    weights: Tensor,
    indices: Tensor,
    valid: Tensor,
    segments: Tensor | None,
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return the counts (S, E), and the balance loss averaged over the segments with tokens."""
    tokens, experts = probs.shape
    if segments is None:
        segments = torch.zeros(tokens, dtype=torch.int64, device=probs.device)
    available = inputs.available
    if available is None:
        shape = options.num_segments, experts
        available = torch.ones(shape, dtype=torch.bool, device=probs.device)

    def by_expert(choice: Tensor, value: Tensor) -> Tensor:  # (T, n) -> (T, E)
        return value.new_zeros(tokens, experts).scatter_add(1, choice, value)

    dense, assigned = by_expert(indices, weights), by_expert(indices, torch.ones_like(indices))
    first = by_expert(indices[:, :1], torch.ones_like(indices[:, :1]))
    counts, losses = [], []
    for segment in range(options.num_segments):
        member = (valid & (segments == segment))[:, None]
        counts.append((assigned * member).sum(0))
        num_tokens = member.sum().clamp(min=1).to(probs.dtype)
        num_available = available[segment].sum().clamp(min=1).to(probs.dtype)

        # The mean over the tokens of the segment. masked_fill keeps out NaN of other segments.
        def mean(values: Tensor, member: Tensor = member, count: Tensor = num_tokens) -> Tensor:
            return values.masked_fill(~member, 0.0).sum(0) / count

        if options.balance == "mse":
            loss = (mean(dense) - available[segment] / num_available).square().sum()
        else:
            share = counts[segment] / (options.k * num_tokens)
            if options.balance == "gshard":
                share = mean(first)
            loss = num_available * (share * mean(probs)).sum()
        losses.append(torch.where(member.any(), loss, 0.0))
    nonempty = (torch.stack(counts).sum(1) > 0).sum().clamp(min=1)
    return torch.stack(counts), torch.stack(losses).sum() / nonempty


# ---- values out of range -------------------------------------------------------------------------
#
# On CUDA and in compiled graphs, values out of range raise no error. Instead, the results of the
# affected tokens become NaN. The composed path uses the functions below too.


class InRange(NamedTuple):
    """Arguments clamped to valid values, and the tokens that had invalid values."""

    segments: Tensor | None  # (T,) in [0, S)
    indices: Tensor | None  # (T, k) in [0, E)
    usable: Tensor | None  # (E,) or (T, E) bool, the experts that a token may use; None for all
    broken: Tensor | None  # (T,) or () bool, the tokens whose results become NaN


def into_range(num_experts: int, inputs: Inputs, options: Options) -> InRange:
    """Clamp segments and indices to valid values.

    A token with an invalid segment or fewer than k available experts may use all experts, so that k
    experts can be chosen for every token.
    """
    segments, indices, available = inputs.segments, inputs.indices, inputs.available
    broken: list[Tensor] = []
    usable = None
    if segments is not None:
        given, segments = segments, segments.clamp(0, options.num_segments - 1)
        broken.append(given != segments)
    if available is not None:
        too_few = available.sum(1) < options.k
        row = 0 if segments is None else segments
        broken.append(too_few[row])
        usable = available[row] | reduce(torch.logical_or, broken)[..., None]
    if indices is not None:
        given, indices = indices, indices.clamp(0, num_experts - 1)
        broken.append((given != indices).any(1))
    any_broken = reduce(torch.logical_or, broken) if broken else None
    return InRange(segments, indices, usable, any_broken)


def largest(key: Tensor, usable: Tensor | None, k: int) -> Tensor:
    """Return the columns (T, k) of the k largest numbers in each row, in descending order.

    Ties go to the lower column, since argmax returns the first of equal numbers. NaN and -inf rank
    below finite numbers, and above unusable experts.
    """
    limits = torch.finfo(key.dtype)
    key = key.detach().nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    key = key if usable is None else key.masked_fill(~usable, float("-inf"))
    chosen: list[Tensor] = []
    for _ in range(k):
        chosen.append(key.argmax(-1, keepdim=True))
        key = key.scatter(1, chosen[-1], float("-inf"))
    return torch.cat(chosen, 1)


def nan_where(logits: Tensor, broken: Tensor | None, mask: Tensor | None) -> Tensor:
    """Set the logits of tokens that are broken and not masked to NaN."""
    if broken is None:
        return logits
    broken = broken if mask is None else broken & ~mask
    nan = torch.zeros_like(broken, dtype=logits.dtype).masked_fill(broken, float("nan"))
    return logits + nan[..., None]
