"""Masked InfoNCE: a softmax contrastive loss in which integer keys select the pairs.

Row i of the B x C matrix of pairs belongs to the query q_i, column j to the candidate c_j. The
target t_i is the index of the positive of row i. P_i is the set of the candidates j that count for
row i:

    S_ij  = q_i . c_j / temperature
    nce_i = -log( exp(S_i,t_i) / sum over j in P_i of exp(S_ij) )

Without keys, all candidates count. With keys, P_i contains the candidates with the key of row i
(such as the modality of its target: UNITE's MAMCL), the candidates with key -1, and the target. The
options same_id and false_negative_margin can remove candidates from P_i. If symmetric, the loss of
row i is the mean of nce_i and the corresponding term of column t_i. The sum in this term runs over
the rows k that have t_i in P_k.

The fused and composed paths leave the target out of the sum. Let n_i be the logarithm of the sum of
exp(S_ij) over P_i without the target. Then nce_i = softplus(n_i - S_i,t_i), and its derivative with
respect to S_i,t_i is -sigmoid(n_i - S_i,t_i). Both expressions are accurate even if the probability
of the target is close to 1. A row without negatives has n_i = -inf and a loss of 0.

A sweep visits all pairs without storing a B x C matrix. The forward sweep computes n for rows and
columns from the same logits. Let dS be the gradient of the loss with respect to S. The backward
sweep computes the gradients of q and c, and the gradient of 1 / temperature, which is the sum of
dS_ij q_i . c_j over all pairs. Without keys, both sweeps together need 8 B C D FLOPs, symmetric or
not.

The code below is the specification. It stores the B x C matrix.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Labels, Options, Reduction, SameId


def masked_info_nce_reference(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: float | Tensor,
    target: Tensor | None = None,
    query_key: Tensor | None = None,
    candidate_key: Tensor | None = None,
    query_id: Tensor | None = None,
    candidate_id: Tensor | None = None,
    same_id: SameId = "drop",
    symmetric: bool = False,
    positive_weight: float = 0.0,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    false_negative_margin: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute :func:`masked_info_nce` in plain PyTorch.

    This is the specification. It supports any floating dtype, any device and derivatives of any
    order. It stores the B x C matrix.

    Examples:
        >>> import torch, mmfused
        >>> query, candidate = torch.randn(4, 16), torch.randn(6, 16)
        >>> key = torch.tensor([0, 0, 1, 1, 0, -1])  # -1: a candidate of every row
        >>> loss = mmfused.masked_info_nce(query, candidate, temperature=1.0, candidate_key=key)
        >>> exact = mmfused.masked_info_nce_reference(
        ...     query.double(), candidate.double(), temperature=1.0, candidate_key=key
        ... )
        >>> torch.allclose(loss.double(), exact, atol=1e-5)
        True
    """
    labels = Labels(
        target=target,
        query_key=query_key,
        candidate_key=candidate_key,
        query_id=query_id,
        candidate_id=candidate_id,
        row_weight=row_weight,
    )
    options = Options(
        same_id=same_id,
        symmetric=symmetric,
        positive_weight=positive_weight,
        label_smoothing=label_smoothing,
        false_negative_margin=false_negative_margin,
        reduction=reduction,
    )
    return whole_matrix_loss(query, candidate, temperature, labels, options)


def whole_matrix_loss(
    query: Tensor,
    candidate: Tensor,
    temperature: float | Tensor,
    labels: Labels,
    options: Options,
) -> Tensor:
    """Compute :func:`masked_info_nce_reference` from labels and options."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = resolve_rows(query, candidate, labels)
    temperature = temperature.reshape(()) if isinstance(temperature, Tensor) else temperature
    columns = torch.arange(candidate.shape[0], device=query.device)
    is_target = rows.target[:, None] == columns  # (B, C)
    allowed, positive = _pairs(is_target, rows, labels, options)
    query = query.to(dtype)
    # A candidate that does not count for any row may be NaN.
    candidate = candidate.to(dtype).masked_fill(~allowed.any(0)[:, None], 0.0)
    logits = query @ candidate.T / temperature
    if options.false_negative_margin is not None:
        shared = torch.zeros_like(is_target[0])
        if labels.candidate_key is not None:
            shared = labels.candidate_key == -1
        margin = options.false_negative_margin / temperature
        limit = logits.gather(1, rows.target[:, None]) + margin
        above = (logits > limit) & ~is_target & ~shared
        allowed, positive = allowed & ~above, positive & ~above
    loss = _cross_entropy(logits, allowed, positive, options)
    if options.symmetric:
        targets = slice(0, query.shape[0])  # the target of row i is column i
        logits, allowed, positive = (x[:, targets].T for x in (logits, allowed, positive))
        loss = (loss + _cross_entropy(logits, allowed, positive, options)) / 2
    similarity = (query * candidate[rows.target]).sum(-1)
    loss = loss + options.positive_weight * (1 - similarity)
    if rows.broken is not None:  # make the loss and the gradients NaN
        loss = loss * torch.ones_like(loss).masked_fill(rows.broken, float("nan"))
    return reduce_rows(loss, labels.row_weight, options.reduction)


def _pairs(
    is_target: Tensor,
    rows: Rows,
    labels: Labels,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return bool masks (B, C) of the pairs that count and of the positives, before the margin."""
    allowed, positive = torch.ones_like(is_target), is_target
    if labels.candidate_key is not None and rows.query_key is not None:
        same_key = rows.query_key[:, None] == labels.candidate_key
        allowed = same_key | (labels.candidate_key == -1) | is_target
    if labels.candidate_id is not None and rows.query_id is not None:
        same = (rows.query_id[:, None] == labels.candidate_id) & allowed & ~is_target
        if options.same_id == "drop":
            return allowed & ~same, positive
        return allowed, positive | same
    return allowed, positive


def _cross_entropy(
    logits: Tensor,
    allowed: Tensor,
    positive: Tensor,
    options: Options,
) -> Tensor:
    log_p = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1).masked_fill(~allowed, 0.0)
    wanted = positive.to(log_p.dtype)
    if options.same_id != "sum":
        wanted = wanted / wanted.sum(-1, keepdim=True)
    uniform = allowed.to(log_p.dtype) / allowed.sum(-1, keepdim=True)
    uniform = uniform * wanted.sum(-1, keepdim=True)
    smoothing = options.label_smoothing
    loss = -(log_p * ((1 - smoothing) * wanted + smoothing * uniform)).sum(-1)
    return loss.masked_fill(allowed.sum(-1) == 1, 0.0)


class Rows(NamedTuple):
    """The labels of the rows, with defaults filled in."""

    target: Tensor  # (B,), a valid index even in broken rows
    query_key: Tensor | None  # (B,)
    query_id: Tensor | None  # (B,)
    broken: Tensor | None  # (B,) bool: rows whose loss must be NaN


def resolve_rows(query: Tensor, candidate: Tensor, labels: Labels) -> Rows:
    """Fill in the defaults of target, query key and query id.

    A row is broken if its target or key is invalid. All rows are broken if any candidate key is
    invalid.
    """
    broken = []
    if labels.target is None:
        target = torch.arange(query.shape[0], device=query.device)
    else:
        target = labels.target.clamp(0, candidate.shape[0] - 1)
        broken.append(labels.target != target)
    query_key, query_id = labels.query_key, labels.query_id
    if query_key is not None:
        broken.append(query_key < 0)
    if labels.candidate_key is not None:
        broken.append((labels.candidate_key < -1).any().expand(query.shape[0]))
        query_key = labels.candidate_key[target] if query_key is None else query_key
    if labels.candidate_id is not None and query_id is None:
        query_id = labels.candidate_id[target]
    any_broken = reduce(torch.logical_or, broken) if broken else None
    return Rows(target=target, query_key=query_key, query_id=query_id, broken=any_broken)


def reduce_rows(loss: Tensor, row_weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Multiply the losses (B,) by the row weights and reduce them. A negative weight gives NaN."""
    if row_weight is not None:
        row_weight = row_weight.to(loss.dtype)
        row_weight = row_weight.masked_fill(row_weight < 0, float("nan"))
        loss = loss * row_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if row_weight is None:
        return loss.mean()
    total = row_weight.sum()
    return loss.sum() / total.masked_fill(total == 0, 1.0)
