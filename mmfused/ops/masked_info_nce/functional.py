"""Masked InfoNCE: the softmax contrastive loss of multimodal retrieval, without a B x C matrix.

    S_ij = q_i . c_j / temperature,   nce_i = -log( exp(S_i,target) / sum over j in P_i of exp(S_ij)
    )                  (a row)

    P_i: all candidates, or those with the row's key (its target's modality: UNITE's MAMCL), those
    for everybody, and the target.
    Symmetric: the mean of a row's term and of its column's, the sum then over P's column.

The target leaves the sum: with n_i = log sum over P_i without the target of exp(S_ij), the term is
softplus(n_i - S_i,target) and its derivative -sigmoid of the same, so neither loses digits where
the target's probability nears 1, and a row without negatives (n_i = -inf) gives exactly 0. What
remains is one sweep over the pairs: forward for the n_i of rows and columns from the same logits,
backward for the two gradients and that of the scale, sum_ij dS_ij q_i . c_j: 8 B C D FLOPs in all
for both directions."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ...distributed import Ranks, gradient_needed, report_error
from ...library import choose, distinct, no_autocast, to_autocast
from .._common import valid_or_nan
from .autograd import InfoNCE
from .checks import OP, check


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
    same_id: str = "drop",
    symmetric: bool = False,
    positive_weight: float = 0.0,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The specification of :func:`masked_info_nce`: the whole matrix, one line per rule, any
    floating dtype, any device.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    target, query_key, query_id, broken = _defaults(
        query, candidate, target, query_key, candidate_key, query_id, candidate_id
    )
    temperature = temperature.reshape(()) if isinstance(temperature, Tensor) else temperature
    is_target = target[:, None] == torch.arange(candidate.shape[0], device=query.device)  # (B, C)
    allowed = torch.ones_like(is_target)
    if candidate_key is not None:
        allowed = (query_key[:, None] == candidate_key) | (candidate_key == -1) | is_target
    positive = is_target
    if candidate_id is not None:
        same = (query_id[:, None] == candidate_id) & allowed & ~is_target
        allowed, positive = (
            (allowed & ~same, positive) if same_id == "drop" else (allowed, positive | same)
        )
    query = query.to(dtype)
    candidate = candidate.to(dtype).masked_fill(
        ~allowed.any(0)[:, None], 0.0
    )  # one that nobody sees may hold NaN
    logits = query @ candidate.T / temperature
    if false_negative_margin is not None:
        curated = torch.zeros_like(is_target[0]) if candidate_key is None else candidate_key == -1
        limit = logits.gather(1, target[:, None]) + false_negative_margin / temperature
        above = (logits > limit) & ~is_target & ~curated
        allowed, positive = allowed & ~above, positive & ~above
    options = dict(average=same_id != "sum", smoothing=label_smoothing)
    loss = _cross_entropy(logits, allowed, positive, **options)
    if symmetric:
        own = slice(0, query.shape[0])
        loss = (
            loss
            + _cross_entropy(logits[:, own].T, allowed[:, own].T, positive[:, own].T, **options)
        ) / 2
    loss = loss + positive_weight * (1 - (query * candidate[target]).sum(-1))
    if broken is not None:
        loss = loss * torch.ones_like(loss).masked_fill(broken, float("nan"))  # the gradients too
    return _reduce(loss, row_weight, reduction)


def _cross_entropy(
    logits: Tensor,
    allowed: Tensor,
    positive: Tensor,
    average: bool,
    smoothing: float,
) -> Tensor:
    log_p = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1).masked_fill(~allowed, 0.0)
    wanted = positive.to(log_p.dtype)
    if average:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    uniform = allowed.to(log_p.dtype) / allowed.sum(-1, keepdim=True) * wanted.sum(-1, keepdim=True)
    loss = -(log_p * ((1 - smoothing) * wanted + smoothing * uniform)).sum(-1)
    return loss.masked_fill(allowed.sum(-1) == 1, 0.0)


def _defaults(query, candidate, target, query_key, candidate_key, query_id, candidate_id):
    """(target, query_key, query_id, broken) with the defaults filled in. ``broken`` (B,) bool, or
    None: the rows that give NaN, as their target or key is none, or as a candidate's key is none;
    ``target`` is a valid index also there."""
    broken = []
    if target is None:
        target = torch.arange(query.shape[0], device=query.device)
    else:
        given, target = target, target.clamp(0, candidate.shape[0] - 1)
        broken.append(given != target)
    if query_key is not None:
        broken.append(query_key < 0)
    if candidate_key is not None:
        broken.append((candidate_key < -1).any().expand(query.shape[0]))
        query_key = candidate_key[target] if query_key is None else query_key
    if candidate_id is not None and query_id is None:
        query_id = candidate_id[target]
    return target, query_key, query_id, reduce(torch.logical_or, broken) if broken else None


def _reduce(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
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


# ---- the function --------------------------------------------------------------------------------


def masked_info_nce(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: float | Tensor,
    target: Tensor | None = None,
    query_key: Tensor | None = None,
    candidate_key: Tensor | None = None,
    query_id: Tensor | None = None,
    candidate_id: Tensor | None = None,
    same_id: str = "drop",
    symmetric: bool = False,
    positive_weight: float = 0.0,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax contrastive loss of queries against candidates, masked by integer keys, without a B x
    C matrix.

    Args: query, candidate: (B, D) and (C, D), float32, float16, bfloat16 or float64, one dtype;
        normalise them first. temperature: divides the dot products; a float, or a tensor of one
        element, which gets its gradient. target: (B,) int64, each row's positive among the
        candidates; default ``arange(B)``. query_key, candidate_key: (B,), (C,) int64: a row sees
        the candidates with its own key, those with key -1, and its target.
            ``candidate_key`` alone: a row's key is its target's (UNITE's MAMCL); where that is -1
            it sees those with -1.
        query_id, candidate_id: (B,), (C,) int64 that mark the same item; ``candidate_id`` alone: a
        row's id is its target's.
        same_id: what another candidate with the row's id is: "drop", not in the sum; "mean", one
            more positive, the mean of their log-probabilities is maximised (SupCon); "sum", the
            same with their sum (UNITE).
        symmetric: the mean of both directions; needs the default target and C >= B. Column j < B
        sums over the same pairs.
        positive_weight: adds this times ``1 - query_i . candidate_target`` to each row (UniCA's
        positive similarity).
        row_weight: (B,) constant, >= 0: the mean is weighted by it (0 where all are 0), the sum and
        the single losses scaled.
        label_smoothing: this share of the wanted distribution is uniform over the allowed pairs.
        false_negative_margin: another candidate whose dot product with the query is above the
            target's plus this margin is taken for an unlabelled positive and left out; those for
            everybody (key -1: curated negatives) are spared. It has no kernel.
        reduction: "mean", "sum" or "none", (B,).

    Returns: float32, or float64 for float64 inputs. A row (or column) with one allowed pair has an
    nce of exactly 0 and counts in the mean. A candidate that nobody sees may hold NaN and gets
    gradient 0; another that is not finite makes the rows that see it NaN, and a query its own row
    and what that sees. Not twice differentiable: that raises. On a GPU the kernels wait for
    nothing; ``composed`` waits for the host to learn which blocks have pairs, so no CUDA graph
    takes it.

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")``
    cannot run, before any launch. Values in tensors are checked in eager mode on a CPU. Elsewhere a
    row gives NaN if its target is none of the candidates, or its key or weight negative, and every
    row if a candidate's key is below -1, or the temperature not above 0, or so small that its
    reciprocal is infinite (below 3e-39 in float32).

    Source: UNITE (arXiv 2505.19650), UniCA (arXiv 2606.28350), SupCon (arXiv 2004.11362); keys as
    masks are this library's."""
    weights = dict(
        positive_weight=positive_weight,
        row_weight=row_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    weights["false_negative_margin"] = false_negative_margin
    keys = dict(
        query_key=query_key,
        candidate_key=candidate_key,
        query_id=query_id,
        candidate_id=candidate_id,
        same_id=same_id,
    )
    return _loss(
        query,
        candidate,
        temperature=temperature,
        target=target,
        symmetric=symmetric,
        **keys,
        **weights,
    )


def scaled_info_nce(
    query: Tensor,
    candidate: Tensor,
    scale: float | Tensor,
    *,
    symmetric: bool = False,
) -> Tensor:
    """:func:`masked_info_nce` of logits ``scale * query candidate^T``. The scale may be any number,
    0, negative or NaN: what other libraries' losses take."""
    return _loss(query, candidate, scale=scale, symmetric=symmetric)


def loss_over_ranks(query: Tensor, candidate: Tensor, share_gradients: bool, **options) -> Tensor:
    """:func:`masked_info_nce` with the candidates of every rank; the sum of this rank's rows times
    W over the number of all rows (or over the sum of all row weights). Target and keys are this
    rank's own; ``share_gradients`` as in :class:`Ranks`.

    A rank without rows gives 0, with gradients of 0 and those that its candidates get from other
    ranks. Where one rank's inputs are refused, or differ in what must be the same, all ranks raise:
    that rank its own error, the others one that names it."""
    options["reduction"] = "sum"
    try:
        checked = _checked(query, candidate, over_ranks=True, **options)
    except Exception as error:
        report_error(OP, error, query)
        raise
    query, candidate, temperature, _, _, masks, weights = checked
    ranks = Ranks(OP, query, candidate, share_gradients, _settings(*checked, share_gradients))
    if not sum(ranks.rows):
        raise ValueError(f"{OP}: query: got 0 rows on every rank, expected at least one in all")
    loss, row_weight = _computed(*checked, ranks), weights["row_weight"]
    if row_weight is None:
        return loss * (ranks.world / sum(ranks.rows))
    total = ranks.total(row_weight.to(loss.dtype).sum())
    return loss * ranks.world / total.masked_fill(total == 0, 1.0)


def _settings(
    query,
    candidate,
    temperature,
    scale,
    chosen,
    masks,
    weights,
    share_gradients,
) -> dict[str, object]:
    """What ranks must agree in: the rules of the loss, and all that decides what they exchange."""
    given = {
        name: "given" if masks[name] is not None else "None"
        for name in ("candidate_key", "candidate_id")
    }
    rules = {
        name: weights[name]
        for name in ("positive_weight", "label_smoothing", "false_negative_margin")
    }
    settings = {
        "dim": query.shape[1],
        "gather": "'global'" if share_gradients else "'local'",
        "symmetric": bool(masks["symmetric"]),
        "same_id": repr(masks["same_id"]),
        "temperature": "a tensor" if isinstance(temperature, Tensor) else float(temperature),
        "row_weight": "None" if weights["row_weight"] is None else "given",
        **given,
        **{name: None if value is None else float(value) for name, value in rules.items()},
    }
    if share_gradients:
        settings["candidate's gradient"] = gradient_needed(candidate)
    if masks["symmetric"]:
        settings["the loss's gradient"] = gradient_needed(query, candidate, temperature)
    return settings


def _loss(query, candidate, **options) -> Tensor:
    return _computed(*_checked(query, candidate, **options), None)


def _checked(
    query,
    candidate,
    over_ranks=False,
    *,
    temperature=None,
    scale=None,
    target=None,
    query_key=None,
    candidate_key=None,
    query_id=None,
    candidate_id=None,
    same_id="drop",
    symmetric=False,
    positive_weight=0.0,
    row_weight=None,
    label_smoothing=0.0,
    false_negative_margin=None,
    reduction="mean",
) -> tuple:
    """All that can be refused, is; (query, candidate, temperature, scale, backend, masks, weights),
    what is computed from.
    """
    query, candidate = to_autocast(query, candidate)
    ids = dict(query_id=query_id, candidate_id=candidate_id, same_id=same_id)
    masks = dict(
        target=target, query_key=query_key, candidate_key=candidate_key, **ids, symmetric=symmetric
    )
    weights = dict(
        positive_weight=positive_weight,
        row_weight=row_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    weights["false_negative_margin"] = false_negative_margin
    check(query, candidate, over_ranks, temperature=temperature, **masks, **weights)
    temperature = valid_or_nan(temperature)
    no_kernel = [] if false_negative_margin is None else ["false_negative_margin has no kernel"]
    chosen = choose(OP, query.device, query.dtype, no_kernel, ("export", "onnx"))
    if over_ranks and chosen == "reference":
        raise RuntimeError(
            f"{OP}: backend 'reference' has no gather; it takes gather=None, or 'composed'."
        )
    return query, candidate, temperature, scale, chosen, masks, weights


def _computed(query, candidate, temperature, scale, chosen, masks, weights, ranks) -> Tensor:
    with no_autocast(query.device.type):
        if chosen == "reference":
            if scale is not None:
                query, temperature = (
                    query.to(torch.promote_types(query.dtype, torch.float32)) * scale,
                    1.0,
                )
            return masked_info_nce_reference(
                query, candidate, temperature=temperature, **masks, **weights
            )
        acc = torch.promote_types(query.dtype, torch.float32)
        if scale is None:
            scale = (
                temperature.to(acc).reciprocal()
                if isinstance(temperature, Tensor)
                else 1 / temperature
            )
        if isinstance(scale, Tensor):
            scale = scale.to(query.device, acc).reshape(())
            scale = scale + 0 * scale  # infinite: NaN, whatever the products are
        else:
            scale = torch.full((), scale, dtype=acc, device=query.device)
        names = ("target", "query_key", "candidate_key", "query_id", "candidate_id")
        target, query_key, query_id, broken = _defaults(
            query, candidate, *(masks[name] for name in names)
        )
        if ranks is not None:
            target = target + ranks.first_candidate
            chosen = chosen if len(query) else "composed"  # a kernel has no empty grid
        tensors = distinct(
            query,
            candidate,
            scale,
            target,
            broken,
            query_key,
            masks["candidate_key"],
            query_id,
            masks["candidate_id"],
        )
        options = (
            masks["same_id"],
            masks["symmetric"],
            weights["label_smoothing"],
            weights["false_negative_margin"],
        )
        nce, dots = InfoNCE.apply(*tensors, *options, chosen, ranks)
        positive_weight = weights["positive_weight"]
        loss = nce + positive_weight * (1 - dots) if positive_weight else nce
        return _reduce(loss, weights["row_weight"], weights["reduction"])
