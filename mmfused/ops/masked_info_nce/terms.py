"""Losses of rows or columns, and their derivatives, from the statistics of the forward sweep.

The equations are in :mod:`.reference`. ``logit`` (B,) holds the logits of the targets.
``statistics`` (5, B) holds for each row (or column) these numbers over the pairs that count, except
the target:

    0    logsumexp of the logits
    1    number of further positives
    2    sum of the logits of the further positives
    3    number of pairs
    4    sum of the logits of the pairs

A further positive is a candidate that has the id of the row but is not the target. Label smoothing
and further positives need statistics 1 to 4, which are computed only if ``everything`` is true.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Options


def target_term(
    statistics: Tensor,
    logit: Tensor,
    options: Options,
    everything: bool,
) -> Tensor:
    """Return the losses (B,), including label smoothing and further positives."""
    lse_of_others = statistics[0]
    if not everything:
        return -F.logsigmoid(logit - lse_of_others)
    positives, pairs = statistics[1] + 1, statistics[3] + 1
    sum_of_positives, sum_of_pairs = statistics[2] + logit, statistics[4] + logit
    summed = options.same_id == "sum"
    # Each positive has the label 1 ("sum") or 1 / positives.
    label_sum = positives if summed else 1.0
    hard = sum_of_positives if summed else sum_of_positives / positives
    smoothing = options.label_smoothing
    wanted = (1 - smoothing) * hard + smoothing * label_sum * sum_of_pairs / pairs
    # With one positive and no smoothing, the difference in parentheses is exactly 0.
    loss = (label_sum * logit - wanted) - label_sum * F.logsigmoid(logit - lse_of_others)
    return torch.where(pairs == 1, 0 * logit, loss)  # 0 * logit: a NaN logit stays NaN


def gradient_coefficients(
    statistics: Tensor,
    logit: Tensor,
    upstream: Tensor,
    options: Options,
    everything: bool,
) -> tuple[Tensor, Tensor]:
    """Return the coefficients (4, B) for the backward sweep, and the gradient (B,) of ``logit``.

    The coefficients lse, weight, positive and uniform are defined in
    :func:`.composed.sweep_blocks_backward`. They have the dtype of ``logit``. The weight corrects
    for the rounding of lse.
    """
    lse_of_others = statistics[0]
    lse = torch.logaddexp(lse_of_others, logit)
    rounded = lse.to(logit.dtype)
    correction = (rounded - lse).exp()
    if not everything:
        zero = torch.zeros_like(upstream)
        weight = (upstream * correction).to(logit.dtype)
        return torch.stack((rounded, weight, zero, zero)), -upstream * torch.sigmoid(
            lse_of_others - logit
        )
    positives, pairs = statistics[1] + 1, statistics[3] + 1
    upstream = upstream.masked_fill(pairs == 1, 0.0)
    summed = options.same_id == "sum"
    total = upstream * positives if summed else upstream  # upstream times the sum of the labels
    positive = (1 - options.label_smoothing) * (upstream if summed else upstream / positives)
    uniform = options.label_smoothing * total / pairs
    coefficients = torch.stack((rounded, total * correction, positive, uniform))
    d_logit = (total - positive - uniform) - total * torch.sigmoid(lse_of_others - logit)
    return coefficients.to(logit.dtype), d_logit
