"""The loss of a row (or column) and its derivatives, from the statistics of the sweep.

A file of its own because :mod:`.autograd` holds the operators: here are only vectors of length B.
``statistics`` (5, B): logsumexp of the allowed logits without the target; with ``everything``,
which label smoothing and further positives need, number and sum of the further positives, number
and sum of all allowed pairs. ``logit`` (B,): that of the target.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Options


def target_term(statistics: Tensor, logit: Tensor, options: Options, everything: bool) -> Tensor:
    """Return -log p of the target, with label smoothing and further positives."""
    others = statistics[0]
    if not everything:
        return -F.logsigmoid(logit - others)
    positives, pairs = statistics[1] + 1, statistics[3] + 1
    sum_of_positives, sum_of_pairs = statistics[2] + logit, statistics[4] + logit
    summed = options.same_id == "sum"
    share = positives if summed else 1.0
    mean = sum_of_positives if summed else sum_of_positives / positives
    smoothing = options.label_smoothing
    wanted = (1 - smoothing) * mean + smoothing * share * sum_of_pairs / pairs
    # With one positive the difference in brackets is 0: no digit is lost.
    loss = (share * logit - wanted) - share * F.logsigmoid(logit - others)
    return torch.where(pairs == 1, 0 * logit, loss)  # 0, unless the row is broken


def gradient_coefficients(
    statistics: Tensor,
    logit: Tensor,
    upstream: Tensor,
    options: Options,
    everything: bool,
) -> tuple[Tensor, Tensor]:
    """Return the coefficients (4, B) for the backward sweep, and the target logit's derivative.

    The coefficients, in the dtype of the logits: lse, weight of the softmax, and what is subtracted
    from further positives and from every pair. The weight corrects for the rounding of lse.
    """
    others = statistics[0]
    lse = torch.logaddexp(others, logit)
    rounded = lse.to(logit.dtype)
    correction = (rounded - lse).exp()
    if not everything:
        zero = torch.zeros_like(upstream)
        weight = (upstream * correction).to(logit.dtype)
        return torch.stack((rounded, weight, zero, zero)), -upstream * torch.sigmoid(others - logit)
    positives, pairs = statistics[1] + 1, statistics[3] + 1
    upstream = upstream.masked_fill(pairs == 1, 0.0)
    summed = options.same_id == "sum"
    share = upstream * positives if summed else upstream
    positive = (1 - options.label_smoothing) * (upstream if summed else upstream / positives)
    uniform = options.label_smoothing * share / pairs
    coefficients = torch.stack((rounded, share * correction, positive, uniform))
    d_logit = (share - positive - uniform) - share * torch.sigmoid(others - logit)
    return coefficients.to(logit.dtype), d_logit
