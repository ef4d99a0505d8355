"""The ops of the library as functions in plain PyTorch, for the baseline in torch_modules.py.

The functions call F.grouped_mm on rows sorted by expert, without padding; index_select to move
rows; and F.cross_entropy on masked logits. The functions support only what the models use.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfused.ops.topk_routing import Routing  # a named tuple

# ---- mixture of experts --------------------------------------------------------------------------


def topk_routing(
    logits: Tensor,
    k: int,
    *,
    balance: str = "switch",
    mask: Tensor | None = None,
) -> Routing:
    """Route each token to its k best experts; masked tokens get weight 0 and are sorted last."""
    tokens, experts = logits.shape
    probs = logits.softmax(-1)
    weights, indices = probs.topk(k)
    weights = weights / weights.sum(-1, keepdim=True) if k > 1 else weights
    live = torch.ones_like(probs[:, :1]) if mask is None else (~mask)[:, None].to(probs.dtype)
    number, counted = live.sum().clamp(min=1), indices if balance == "switch" else indices[:, :1]
    share = (F.one_hot(counted, experts).sum(1) * live).sum(0) / (counted.shape[1] * number)
    balance_loss = experts * (share * (probs * live).sum(0) / number).sum()
    z_loss = (logits.logsumexp(-1, keepdim=True).square() * live).sum() / number
    expert = (
        indices.flatten() if mask is None else indices.masked_fill(mask[:, None], experts).flatten()
    )
    expert, order = expert.sort(stable=True)
    offsets = torch.searchsorted(
        expert, torch.arange(experts + 1, device=expert.device), out_int32=True
    )
    return Routing(
        indices,
        weights * live,
        None,
        balance_loss,
        z_loss,
        None,
        order,
        order.argsort(),
        offsets,
        None,
    )


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row by the weight of its expert: (R, I), (E, O, I) -> (R, O).

    The rows are sorted by expert. Rows of the result that belong to no expert are undefined.
    """
    weight = weight.to(rows.dtype)
    if rows.dtype != torch.float64:
        return F.grouped_mm(rows, weight.mT, offs=offsets[1:])
    ends = [*offsets.tolist(), len(rows)]  # grouped_mm does not support float64
    parts = [rows[start:end] @ w.T for start, end, w in zip(ends, ends[1:], weight, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-2], weight.shape[1])])


def combine(rows: Tensor, routing: Routing) -> Tensor:
    """Return the weighted sum of each token's k rows."""
    chosen = rows.index_select(0, routing.position).unflatten(0, routing.indices.shape)
    return (chosen * routing.weights[:, :, None]).sum(1).to(rows.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which F.linear computes with ``x``, with or without autocast."""
    device = x.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64
        else x.dtype
    )


def grouped_linear(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor,
    *,
    gather: bool,
    combine: bool,
) -> Tensor:
    x = x.to(compute_dtype(x))
    rows = x.index_select(0, routing.order // routing.indices.shape[1]) if gather else x
    # Select biases with a one-hot matmul, whose backward sums in float32, unlike index_select's.
    expert = F.one_hot(routing.indices.flatten()[routing.order], len(weight))
    out = grouped_product(rows, weight, routing.offsets) + expert.to(x.dtype) @ bias.to(x.dtype)
    return _combine(out, routing) if combine else out


_combine = combine


# ---- contrastive losses --------------------------------------------------------------------------


def masked_info_nce(
    query,
    candidate,
    *,
    temperature,
    query_key=None,
    candidate_key=None,
    query_id=None,
    candidate_id=None,
    same_id="drop",
    symmetric=False,
    positive_weight=0.0,
    row_weight=None,
) -> Tensor:
    """Compute masked InfoNCE with F.cross_entropy over all logits, in float32 or float64."""
    if same_id != "drop":
        raise ValueError(f"same_id: got {same_id!r}, expected 'drop'")
    wide = torch.promote_types(query.dtype, torch.float32)
    count, at = len(query), torch.arange(len(query), device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        query, candidate = query.to(wide), candidate.to(wide)
        logits = query @ candidate.T / temperature
        masked = []
        if candidate_key is not None:
            masked.append((query_key[:, None] != candidate_key) & (candidate_key != -1))
        if candidate_id is not None:
            masked.append(query_id[:, None] == candidate_id)
        if masked:
            positive = at[:, None] == torch.arange(len(candidate), device=query.device)
            logits = logits.masked_fill(reduce(torch.logical_or, masked) & ~positive, float("-inf"))
        loss = F.cross_entropy(logits, at, reduction="none")
        if symmetric:
            loss = (loss + F.cross_entropy(logits[:, :count].T, at, reduction="none")) / 2
        if positive_weight:
            loss = loss + positive_weight * (1 - (query * candidate[:count]).sum(-1))
        if row_weight is None:
            return loss.mean()
        total = row_weight.sum()
        return (loss * row_weight).sum() / total.masked_fill(total == 0, 1)
