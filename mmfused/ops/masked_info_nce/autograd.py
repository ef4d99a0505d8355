"""The loss of every row under autograd: two sweeps over the pairs, as operators, and vectors of
length B and C around them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import no_autocast, once_differentiable, register, register_composed
from .composed import sweep, sweep_backward

# ---- the sweep as an operator: kernels for CUDA, blocks of rows elsewhere; the compiler looks into neither

_SWEEP = (
    "(Tensor q, Tensor c, Tensor? bias, Tensor scale, Tensor target, Tensor? q_key, Tensor? c_key, Tensor? q_id, Tensor? c_id,"
    " bool drop, bool columns, bool everything) -> (Tensor row, Tensor column, Tensor dots)"
)
_SWEEP_BACKWARD = (
    "(Tensor row, Tensor? column, Tensor q, Tensor c, Tensor? bias, Tensor scale, Tensor target, Tensor? q_key, Tensor? c_key,"
    " Tensor? q_id, Tensor? c_id, bool drop, bool everything, bool need_dq, bool need_dc, bool need_scale)"
    " -> (Tensor dq, Tensor dc, Tensor d_scale)"
)


def _with(argument: str, schema: str) -> str:
    return schema.replace(") ->", f", {argument}) ->")


def _fake_sweep(
    q,
    c,
    bias,
    scale,
    target,
    q_key,
    c_key,
    q_id,
    c_id,
    drop,
    columns,
    everything,
    margin=None,
):
    row, column = (
        q.new_empty(5, n, dtype=torch.float64) for n in (q.shape[0], c.shape[0] if columns else 0)
    )
    return row, column, q.new_empty(q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_sweep_backward(
    row,
    column,
    q,
    c,
    bias,
    scale,
    target,
    q_key,
    c_key,
    q_id,
    c_id,
    drop,
    everything,
    need_dq,
    need_dc,
    need_scale,
    dots=None,
    margin=None,
):
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dc = (
        q.new_empty(q.shape if need_dq else 0, dtype=dtype),
        c.new_empty(c.shape if need_dc else 0, dtype=dtype),
    )
    return dq, dc, q.new_empty(() if need_scale else 0, dtype=torch.float64)


def _sweep_flops(q, c, *rest, out_shape):
    return 2 * q[0] * c[0] * q[1]


def _sweep_backward_flops(
    row,
    column,
    q,
    c,
    bias,
    scale,
    target,
    q_key,
    c_key,
    q_id,
    c_id,
    drop,
    everything,
    need_dq,
    need_dc,
    need_scale,
    *rest,
    out_shape,
):
    """The logits again, and a product for each gradient."""
    return _sweep_flops(q, c, out_shape=None) * (1 + (need_dq or need_scale) + need_dc)


_sweeps = _fake_sweep, _sweep_flops
_backwards = _fake_sweep_backward, _sweep_backward_flops


def _launch_sweep(*args):
    from ...kernels import masked_info_nce as kernels

    return kernels.sweep(*args)


def _launch_sweep_backward(*args):
    from ...kernels import masked_info_nce as kernels

    return kernels.sweep_backward(*args)


register("info_nce_sweep", _SWEEP, _launch_sweep, *_sweeps)
register("info_nce_sweep_bwd", _SWEEP_BACKWARD, _launch_sweep_backward, *_backwards)
register_composed("info_nce_sweep_composed", _with("float? margin", _SWEEP), sweep, *_sweeps)
register_composed(
    "info_nce_sweep_bwd_composed",
    _with("Tensor dots, float? margin", _SWEEP_BACKWARD),
    sweep_backward,
    *_backwards,
)


class InfoNCE(torch.autograd.Function):
    """(nce (B,), q . c_target (B,)), float32 or float64. Saves the embeddings and vectors of length
    B and C.

    ``broken`` (B,) bool, or None: rows that give NaN. With ``ranks``, candidate and its keys are
    this rank's own, and target counts among the candidates of all."""

    @staticmethod
    def forward(
        ctx,
        query,
        candidate,
        scale,
        target,
        broken,
        q_key,
        c_key,
        q_id,
        c_id,
        same_id,
        symmetric,
        smoothing,
        margin,
        backend,
        ranks,
    ):
        ctx.same_id, ctx.symmetric, ctx.smoothing, ctx.margin = (
            same_id,
            symmetric,
            smoothing,
            margin,
        )
        ctx.backend, ctx.ranks, ctx.device_type = backend, ranks, query.device.type
        query, candidate = (
            query.contiguous(),
            candidate.contiguous(),
        )  # products of matrices round by layout: one for both sweeps
        if ranks is not None:
            candidate, c_key, c_id = (
                None if x is None else ranks.gather(x) for x in (candidate, c_key, c_id)
            )
        ctx.everything = smoothing > 0 or (c_id is not None and same_id != "drop")
        q_order, c_order = (
            (None, None)
            if c_key is None
            else (q_key.argsort(stable=True), c_key.argsort(stable=True))
        )
        bias, nan = None, _nan_rows(query)
        if (
            c_key is not None or c_id is not None
        ):  # some pairs are hidden, and must stay so: 0 times NaN is NaN
            candidate, bias = _without_nan(candidate)
        else:
            nan = nan | _nan_rows(candidate).any()
        broken = nan if broken is None else nan | broken
        place = _place(target, c_order)
        args = (
            _pick(query, q_order),
            _pick(candidate, c_order),
            _pick(bias, c_order),
            scale,
            _pick(place, q_order),
            _pick(q_key, q_order),
            _pick(c_key, c_order),
            _pick(q_id, q_order),
            _pick(c_id, c_order),
            same_id == "drop",
        )
        acc = torch.promote_types(query.dtype, torch.float32)
        row, column, dots = _operate(
            "info_nce_sweep", ctx, (*args, symmetric, ctx.everything), margin
        )
        dots = _unpick(dots, q_order, 0)
        if bias is not None:
            dots = dots + bias[target].to(acc)
        dots = dots.masked_fill(broken, float("nan"))
        row, column = (
            row.double(),
            column.double(),
        )  # vectors: what they cost is nothing, and a logsumexp keeps its digits
        row, column = _unpick(row, q_order), _unpick(column, c_order) if symmetric else None
        if symmetric:
            if bias is None:
                column = column.masked_fill(nan.any(), float("nan"))
            column = (column if ranks is None else ranks.merge_columns(column))[:, target]
        logit = dots * scale
        logit = logit + 0 * logit  # infinite: NaN, not a target that outweighs all
        nce = _term(row, logit, ctx)
        if symmetric:
            nce = (nce + _term(column, logit, ctx)) / 2
        ctx.save_for_backward(
            query,
            candidate,
            bias,
            scale,
            target,
            q_key,
            c_key,
            q_id,
            c_id,
            q_order,
            c_order,
            row,
            column,
            dots,
        )
        return nce.to(
            acc, copy=True
        ), dots  # a cast that does nothing would lose the gradient under torch 2.11's compiler

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nce, d_dots):
        (
            query,
            candidate,
            bias,
            scale,
            target,
            q_key,
            c_key,
            q_id,
            c_id,
            q_order,
            c_order,
            row,
            column,
            dots,
        ) = ctx.saved_tensors
        if bias is not None:  # a broken row's lse is NaN: so is its dS, where its pairs count
            query = query.masked_fill(_nan_rows(query)[:, None], 0.0)
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
            _pick(row, q_order, 1),
            _pick(column, c_order, 1),
            _pick(query, q_order),
            _pick(candidate, c_order),
            _pick(bias, c_order),
            scale,
            _pick(_place(target, c_order), q_order),
            _pick(q_key, q_order),
            _pick(c_key, c_order),
            _pick(q_id, q_order),
            _pick(c_id, c_order),
            ctx.same_id == "drop",
            ctx.everything,
        )
        need_query, need_candidate, need_scale = ctx.needs_input_grad[:3]
        args = (*args, need_query, need_candidate, need_scale)
        dq, dc, d_scale = _operate(
            "info_nce_sweep_bwd", ctx, args, _pick(dots, q_order), ctx.margin
        )
        d_query = d_candidate = None
        pair = (d_logit * scale + d_dots).to(acc)[:, None]
        # Two large sums that nearly cancel.
        d_scale = (d_scale + (d_logit * dots).sum()).to(scale.dtype) if need_scale else None
        if need_query:
            d_query = (
                _unpick(dq, q_order, 0)
                .mul_(scale)
                .add_(pair * candidate[target].to(acc))
                .to(query.dtype)
            )
        if need_candidate:
            dc = _add_rows(_unpick(dc, c_order, 0).mul_(scale), target, pair * query.to(acc))
            d_candidate = (dc if ctx.ranks is None else ctx.ranks.return_gradient(dc)).to(
                candidate.dtype
            )
        return d_query, d_candidate, d_scale, *[None] * 12


def _operate(name: str, ctx, args: tuple, *margin):
    with no_autocast(ctx.device_type):  # some call backward under autocast
        if ctx.backend == "fused":
            return getattr(torch.ops.mmfused, name)(*args)
        return getattr(torch.ops.mmfused, f"{name}_composed")(*args, *margin)


def _nan_rows(x: Tensor) -> Tensor:
    """Which rows are not finite: told by their sum, for which no matrix of flags is made."""
    return ~x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()


def _without_nan(candidate: Tensor) -> tuple[Tensor, Tensor]:
    """A candidate that is not finite as zeros, and a bias that makes its logits NaN: so it reaches
    only rows that may see it.
    """
    broken = _nan_rows(candidate)
    bias = torch.zeros(candidate.shape[0], device=candidate.device).masked_fill_(
        broken, float("nan")
    )
    return candidate.masked_fill(broken[:, None], 0.0), bias


def _add_rows(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """x[at] += rows, in place and always in the same order, whatever is in ``at`` twice: of torch's
    two, each device has one.
    """
    return (
        x.index_add_(0, at, rows)
        if x.device.type == "cpu"
        else x.index_put_((at,), rows, accumulate=True)
    )


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
    loss = (share * logit - wanted) - share * F.logsigmoid(
        logit - others
    )  # with one positive the first is 0: no digit is lost
    return torch.where(count[1] == 1, 0 * logit, loss)  # 0, unless the row is broken


def _coefficients(
    statistics: Tensor,
    logit: Tensor,
    upstream: Tensor,
    ctx,
) -> tuple[Tensor, Tensor]:
    """What the backward sweep needs of a row (or column), (4, B) in the logits' dtype: lse, weight
    of the softmax, and what is taken off further positives and off every pair; and the derivative
    to the target's logit. The weight makes good for the rounding of lse."""
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
