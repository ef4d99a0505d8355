"""Masked InfoNCE: the softmax contrastive loss of multimodal retrieval, without a B x C matrix.

    S_ij = q_i . c_j / temperature,   nce_i = -log( exp(S_i,target) / sum over j in P_i of exp(S_ij) )                  (a row)

    P_i: all candidates, or those with the row's key (its target's modality: UNITE's MAMCL), those for everybody, and the target.
    Symmetric: the mean of a row's term and of its column's, the sum then over P's column.

The target leaves the sum: with n_i = log sum over P_i without the target of exp(S_ij), the term is softplus(n_i - S_i,target) and
its derivative -sigmoid of the same, so neither loses digits where the target's probability nears 1, and a row without negatives
(n_i = -inf) gives exactly 0. What remains is one sweep over the pairs: forward for the n_i of rows and columns from the same
logits, backward for the two gradients, 8 B C D FLOPs in all for both directions. d scale = <q, dq> / scale needs no sweep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import autocast_dtype, choose, distinct, no_autocast, once_differentiable, register, register_composed
from .checks import check, check_first
from .composed import sweep, sweep_backward
from .distributed import Ranks


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
    """The specification of :func:`masked_info_nce`: the whole matrix, one line per rule, any floating dtype, any device."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    target, query_key, query_id = _defaults(query, target, query_key, candidate_key, query_id, candidate_id)
    is_target = target[:, None] == torch.arange(candidate.shape[0], device=query.device)  # (B, C)
    allowed = torch.ones_like(is_target)
    if candidate_key is not None:
        allowed = (query_key[:, None] == candidate_key) | (candidate_key == -1) | is_target
    positive = is_target
    if candidate_id is not None:
        same = (query_id[:, None] == candidate_id) & allowed & ~is_target
        allowed, positive = (allowed & ~same, positive) if same_id == "drop" else (allowed, positive | same)
    query = query.to(dtype)
    candidate = candidate.to(dtype).masked_fill(~allowed.any(0)[:, None], 0.0)  # one that nobody sees may hold NaN
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
        loss = (loss + _cross_entropy(logits[:, own].T, allowed[:, own].T, positive[:, own].T, **options)) / 2
    loss = loss + positive_weight * (1 - (query * candidate[target]).sum(-1))
    return _reduce(loss, row_weight, reduction)


def _cross_entropy(logits: Tensor, allowed: Tensor, positive: Tensor, average: bool, smoothing: float) -> Tensor:
    log_p = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1).masked_fill(~allowed, 0.0)
    wanted = positive.to(log_p.dtype)
    if average:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    uniform = allowed.to(log_p.dtype) / allowed.sum(-1, keepdim=True) * wanted.sum(-1, keepdim=True)
    loss = -(log_p * ((1 - smoothing) * wanted + smoothing * uniform)).sum(-1)
    return loss.masked_fill(allowed.sum(-1) == 1, 0.0)


def _defaults(query, target, query_key, candidate_key, query_id, candidate_id):
    if target is None:
        target = torch.arange(query.shape[0], device=query.device)
    if candidate_key is not None and query_key is None:
        query_key = candidate_key[target]
    if candidate_id is not None and query_id is None:
        query_id = candidate_id[target]
    return target, query_key, query_id


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Floats in the dtype autocast asks for; what is no such thing is left to the checks."""

    def cast(x):
        dtype = autocast_dtype(x.device.type) if isinstance(x, Tensor) and x.is_floating_point() else None
        return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)

    return [cast(x) for x in tensors]


def _reduce(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    if row_weight is not None:
        loss = loss * row_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if row_weight is None:
        return loss.mean()
    total = row_weight.to(loss.dtype).sum()
    return loss.sum() / total.masked_fill(total == 0, 1.0)


# ---- the sweep as an operator: kernels for CUDA, blocks of rows elsewhere; the compiler looks into neither ----------------------

_SWEEP = (
    "(Tensor q, Tensor c, Tensor? bias, Tensor scale, Tensor target, Tensor? q_key, Tensor? c_key, Tensor? q_id, Tensor? c_id,"
    " bool drop, bool columns, bool everything) -> (Tensor row, Tensor column)"
)
_SWEEP_BACKWARD = (
    "(Tensor row, Tensor? column, Tensor q, Tensor c, Tensor? bias, Tensor scale, Tensor target, Tensor? q_key, Tensor? c_key,"
    " Tensor? q_id, Tensor? c_id, bool drop, bool everything, bool need_dq, bool need_dc) -> (Tensor dq, Tensor dc)"
)


def _with_limit(schema: str) -> str:
    return schema.replace(") ->", ", Tensor? limit) ->")


def _fake_sweep(q, c, bias, scale, target, q_key, c_key, q_id, c_id, drop, columns, everything, limit=None):
    return q.new_empty(5, q.shape[0], dtype=torch.float64), q.new_empty(5, c.shape[0] if columns else 0, dtype=torch.float64)


def _fake_sweep_backward(
    row, column, q, c, bias, scale, target, q_key, c_key, q_id, c_id, drop, everything, need_dq, need_dc, limit=None
):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape if need_dq else 0, dtype=dtype), c.new_empty(c.shape if need_dc else 0, dtype=dtype)


register("info_nce_sweep", _SWEEP, "masked_info_nce:sweep", _fake_sweep)
register("info_nce_sweep_bwd", _SWEEP_BACKWARD, "masked_info_nce:sweep_backward", _fake_sweep_backward)
register_composed("info_nce_sweep_composed", _with_limit(_SWEEP), sweep, _fake_sweep)
register_composed("info_nce_sweep_bwd_composed", _with_limit(_SWEEP_BACKWARD), sweep_backward, _fake_sweep_backward)


class _InfoNCE(torch.autograd.Function):
    """(nce (B,), q . c_target (B,)), float32 or float64. Saves the embeddings and vectors of length B and C.

    With ``ranks``, candidate and its keys are this rank's own, and target counts among the candidates of all.
    """

    @staticmethod
    def forward(
        ctx, query, candidate, scale, target, q_key, c_key, q_id, c_id, same_id, symmetric, smoothing, margin, backend, ranks
    ):  # fmt: skip
        ctx.same_id, ctx.symmetric, ctx.smoothing, ctx.margin = same_id, symmetric, smoothing, margin
        ctx.backend, ctx.ranks = backend, ranks
        if ranks is not None:
            candidate, c_key, c_id = (None if x is None else ranks.gather(x) for x in (candidate, c_key, c_id))
        ctx.everything = smoothing > 0 or (c_id is not None and same_id != "drop")
        q_order, c_order = (None, None) if c_key is None else (q_key.argsort(stable=True), c_key.argsort(stable=True))
        candidate, bias = _without_nan(candidate, c_key is not None or c_id is not None)
        place = _place(target, c_order)
        args = (
            _pick(query, q_order), _pick(candidate, c_order), _pick(bias, c_order), scale, _pick(place, q_order),
            _pick(q_key, q_order), _pick(c_key, c_order), _pick(q_id, q_order), _pick(c_id, c_order), same_id == "drop",
        )  # fmt: skip
        acc = torch.promote_types(query.dtype, torch.float32)
        dots = (query.to(acc) * candidate[target].to(acc)).sum(-1)
        if bias is not None:
            dots = dots + bias[target].to(acc)
        row, column = _operate("info_nce_sweep", ctx, (*args, symmetric, ctx.everything), dots, scale, q_order)
        row, column = row.double(), column.double()  # vectors: what they cost is nothing, and a logsumexp keeps its digits
        row, column = _unpick(row, q_order), _unpick(column, c_order) if symmetric else None
        if symmetric:
            column = (column if ranks is None else ranks.merge_columns(column))[:, target]
        logit = dots * scale
        nce = _term(row, logit, ctx)
        if symmetric:
            nce = (nce + _term(column, logit, ctx)) / 2
        ctx.save_for_backward(
            query, candidate, bias, scale, target, q_key, c_key, q_id, c_id, q_order, c_order, row, column, dots
        )  # fmt: skip
        return nce.to(acc, copy=True), dots  # a cast that does nothing would lose the gradient under torch 2.11's compiler

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nce, d_dots):
        query, candidate, bias, scale, target, q_key, c_key, q_id, c_id, q_order, c_order, row, column, dots = ctx.saved_tensors
        d_nce, logit = d_nce / 2 if ctx.symmetric else d_nce, dots * scale
        acc = dots.dtype
        row, d_logit = _coefficients(row, logit, d_nce, ctx)
        if ctx.symmetric:
            column, more = _coefficients(column, logit, d_nce, ctx)
            d_logit = d_logit + more
            # The other candidates have no column term.
            column = column.new_zeros(4, candidate.shape[0]).index_copy_(1, target, column)
            column = column if ctx.ranks is None else ctx.ranks.share_columns(column)
        args = (
            _pick(row, q_order, 1), _pick(column, c_order, 1), _pick(query, q_order), _pick(candidate, c_order),
            _pick(bias, c_order), scale, _pick(_place(target, c_order), q_order), _pick(q_key, q_order), _pick(c_key, c_order),
            _pick(q_id, q_order), _pick(c_id, c_order), ctx.same_id == "drop", ctx.everything,
        )  # fmt: skip
        need_query, need_candidate, need_scale = ctx.needs_input_grad[:3]
        args = (*args, need_query or need_scale, need_candidate)
        dq, dc = _operate("info_nce_sweep_bwd", ctx, args, dots, scale, q_order)
        d_query = d_candidate = d_scale = None
        pair = (d_logit * scale + d_dots).to(acc)[:, None]
        if need_query or need_scale:
            dq = _unpick(dq, q_order, 0)
        if need_scale:  # two large sums that nearly cancel
            d_scale = ((query.to(acc) * dq).sum(dtype=torch.float64) + (d_logit * dots).sum()).to(scale.dtype)
        if need_query:
            d_query = dq.mul_(scale).add_(pair * candidate[target].to(acc)).to(query.dtype)
        if need_candidate:
            dc = _add_rows(_unpick(dc, c_order, 0).mul_(scale), target, pair * query.to(acc))
            d_candidate = (dc if ctx.ranks is None else ctx.ranks.return_gradient(dc)).to(candidate.dtype)
        return d_query, d_candidate, d_scale, *[None] * 11


def _operate(name: str, ctx, args: tuple, dots: Tensor, scale: Tensor, q_order: Tensor | None):
    with no_autocast(dots.device.type):  # some call backward under autocast
        if ctx.backend == "fused":
            return getattr(torch.ops.mmfused, name)(*args)
        limit = None if ctx.margin is None else _pick((dots + ctx.margin) * scale, q_order)
        return getattr(torch.ops.mmfused, f"{name}_composed")(*args, limit)


def _without_nan(candidate: Tensor, masked: bool) -> tuple[Tensor, Tensor | None]:
    """A candidate that is not finite as zeros, and a bias that makes its logits NaN: so it reaches only rows that may see it."""
    if not masked:
        return candidate, None
    broken = ~candidate.isfinite().all(-1)
    bias = torch.zeros(candidate.shape[0], device=candidate.device).masked_fill_(broken, float("nan"))
    return candidate.masked_fill(broken[:, None], 0.0), bias


def _add_rows(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """x[at] += rows, in place and always in the same order, whatever is in ``at`` twice: of torch's two, each device has one."""
    return x.index_add_(0, at, rows) if x.device.type == "cpu" else x.index_put_((at,), rows, accumulate=True)


def _pick(x: Tensor | None, order: Tensor | None, dim: int = 0) -> Tensor | None:
    return x if x is None or order is None else x.index_select(dim, order)


def _unpick(x: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(dim, order, x)


def _place(target: Tensor, c_order: Tensor | None) -> Tensor:
    """Where the targets are among the sorted candidates."""
    if c_order is None:
        return target
    place = torch.empty_like(c_order)
    place[c_order] = torch.arange(c_order.shape[0], device=c_order.device)
    return place[target]


def _term(statistics: Tensor, logit: Tensor, ctx) -> Tensor:
    """-log p of the target, from the statistics of a row (or column) without it."""
    others, count, total = statistics[0], statistics[1:4:2] + 1, statistics[2:5:2] + logit
    if not ctx.everything:
        return -F.logsigmoid(logit - others)
    share = count[0] if ctx.same_id == "sum" else 1.0
    mean = total[0] if ctx.same_id == "sum" else total[0] / count[0]
    wanted = (1 - ctx.smoothing) * mean + ctx.smoothing * share * total[1] / count[1]
    loss = (share * logit - wanted) - share * F.logsigmoid(logit - others)  # with one positive the first is 0: no digit is lost
    return loss.masked_fill(count[1] == 1, 0.0)


def _coefficients(statistics: Tensor, logit: Tensor, upstream: Tensor, ctx) -> tuple[Tensor, Tensor]:
    """What the backward sweep needs of a row (or column), (4, B) in the logits' dtype: lse, weight of the softmax, and what is
    taken off further positives and off every pair; and the derivative to the target's logit. The weight makes good for the
    rounding of lse."""
    others, count = statistics[0], statistics[1:4:2] + 1
    lse = torch.logaddexp(others, logit)
    rounded = lse.to(logit.dtype)
    undo = (rounded - lse).exp()
    if not ctx.everything:
        zero = torch.zeros_like(upstream)
        coefficients = torch.stack((rounded, (upstream * undo).to(logit.dtype), zero, zero))
        return coefficients, -upstream * torch.sigmoid(others - logit)
    upstream = upstream.masked_fill(count[1] == 1, 0.0)
    share = upstream * count[0] if ctx.same_id == "sum" else upstream
    positive = (1 - ctx.smoothing) * (upstream if ctx.same_id == "sum" else upstream / count[0])
    uniform = ctx.smoothing * share / count[1]
    coefficients = torch.stack((rounded, share * undo, positive, uniform)).to(logit.dtype)
    return coefficients, (share - positive - uniform) - share * torch.sigmoid(others - logit)


# ---- the function ---------------------------------------------------------------------------------------------------------------


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
    """Softmax contrastive loss of queries against candidates, masked by integer keys, without a B x C matrix.

    Args:
        query, candidate: (B, D) and (C, D), float32, float16, bfloat16 or float64, one dtype; normalise them first.
        temperature: divides the dot products; a float, or a tensor of one element, which gets its gradient.
        target: (B,) int64, each row's positive among the candidates; default ``arange(B)``.
        query_key, candidate_key: (B,), (C,) int64: a row sees the candidates with its own key, those with key -1, and its target.
            ``candidate_key`` alone: a row's key is its target's (UNITE's MAMCL); where that is -1 it sees those with -1.
        query_id, candidate_id: (B,), (C,) int64 that mark the same item; ``candidate_id`` alone: a row's id is its target's.
        same_id: what another candidate with the row's id is: "drop", not in the sum; "mean", one more positive, the mean of their
            log-probabilities is maximised (SupCon); "sum", the same with their sum (UNITE).
        symmetric: the mean of both directions; needs the default target and C >= B. Column j < B sums over the same pairs.
        positive_weight: adds this times ``1 - query_i . candidate_target`` to each row (UniCA's positive similarity).
        row_weight: (B,) constant, >= 0: the mean is weighted by it (0 where all are 0), the sum and the single losses scaled.
        label_smoothing: this share of the wanted distribution is uniform over the allowed pairs.
        false_negative_margin: another candidate whose dot product with the query is above the target's plus this margin is taken
            for an unlabelled positive and left out; those for everybody (key -1: curated negatives) are spared. It has no kernel.
        reduction: "mean", "sum" or "none", (B,).

    Returns: float32, or float64 for float64 inputs. A row (or column) with one allowed pair has an nce of exactly 0 and counts in
    the mean. A candidate that nobody sees may hold NaN and gets gradient 0. Not twice differentiable: that raises. On a GPU the
    kernels wait for nothing; ``composed`` waits for the host to learn which blocks have pairs, so no CUDA graph takes it.

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")`` cannot run, before any launch.

    Source: UNITE (arXiv 2505.19650), UniCA (arXiv 2606.28350), SupCon (arXiv 2004.11362); keys as masks are this library's.
    """
    weights = dict(positive_weight=positive_weight, row_weight=row_weight, label_smoothing=label_smoothing, reduction=reduction)
    weights["false_negative_margin"] = false_negative_margin
    keys = dict(query_key=query_key, candidate_key=candidate_key, query_id=query_id, candidate_id=candidate_id, same_id=same_id)
    return _loss(query, candidate, None, temperature=temperature, target=target, symmetric=symmetric, **keys, **weights)


def loss_over_ranks(
    query: Tensor, candidate: Tensor, share_gradients: bool, *, row_weight: Tensor | None = None, **options
) -> Tensor:
    """:func:`masked_info_nce` with the candidates of every rank; the sum of this rank's rows times W over the number of all rows
    (or over the sum of all row weights). Target and keys are this rank's own; ``share_gradients`` as in :class:`Ranks`."""
    query, candidate = _autocast(query, candidate)
    check_first(query, candidate)
    ranks = Ranks(query, candidate, share_gradients)
    loss = _loss(query, candidate, ranks, row_weight=row_weight, **{**options, "reduction": "sum"})
    if row_weight is None:
        return loss * (ranks.world / sum(ranks.rows))
    total = ranks.total(row_weight.to(loss.dtype).sum())
    return loss * ranks.world / total.masked_fill(total == 0, 1.0)


def _loss(
    query, candidate, ranks, *, temperature, target=None, query_key=None, candidate_key=None, query_id=None, candidate_id=None,
    same_id="drop", symmetric=False, positive_weight=0.0, row_weight=None, label_smoothing=0.0,
    false_negative_margin=None, reduction="mean",
):  # fmt: skip
    query, candidate = _autocast(query, candidate)
    ids = dict(query_id=query_id, candidate_id=candidate_id, same_id=same_id)
    options = dict(target=target, query_key=query_key, candidate_key=candidate_key, **ids, symmetric=symmetric)
    rest = dict(positive_weight=positive_weight, row_weight=row_weight, label_smoothing=label_smoothing, reduction=reduction)
    rest["false_negative_margin"] = false_negative_margin
    check(query, candidate, temperature=temperature, **options, **rest)
    no_kernel = [] if false_negative_margin is None else ["false_negative_margin has no kernel"]
    chosen = choose("masked_info_nce", query.device, query.dtype, no_kernel)
    with no_autocast(query.device.type):
        if chosen == "reference":
            if ranks is not None:
                raise RuntimeError("masked_info_nce: backend 'reference' has no gather; it takes gather=None, or 'composed'.")
            return masked_info_nce_reference(query, candidate, temperature=temperature, **options, **rest)
        acc = torch.promote_types(query.dtype, torch.float32)
        if isinstance(temperature, Tensor):
            scale = temperature.to(acc).reshape(()).reciprocal()
        else:
            scale = torch.full((), 1 / temperature, dtype=acc, device=query.device)
        target, query_key, query_id = _defaults(query, target, query_key, candidate_key, query_id, candidate_id)
        if ranks is not None:
            target = target + ranks.first_candidate
        tensors = distinct(query, candidate, scale, target, query_key, candidate_key, query_id, candidate_id)
        options = (same_id, symmetric, label_smoothing, false_negative_margin)
        nce, dots = _InfoNCE.apply(*tensors, *options, chosen, ranks)
        loss = nce + positive_weight * (1 - dots) if positive_weight else nce
        return _reduce(loss, row_weight, reduction)
