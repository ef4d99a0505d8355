"""The autograd function of masked InfoNCE: a forward and a backward sweep over all pairs.

The equations are in :mod:`.reference`. Each sweep has two registered operators: one launches the
kernels, for backend "fused", and one runs blocks of rows in plain PyTorch, for backend "composed".
torch.compile does not trace into registered operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...distributed import Ranks
from ...library import launching, no_autocast, once_differentiable, operator
from .arguments import Options
from .composed import SweepInputs, sweep_blocks, sweep_blocks_backward
from .terms import gradient_coefficients, target_term

# ---- the sweeps as operators ---------------------------------------------------------------------

_INPUTS = (
    "Tensor q, Tensor c, Tensor? bias, Tensor scale, Tensor target, "
    "Tensor? q_key, Tensor? c_key, Tensor? q_id, Tensor? c_id, bool drop"
)
_FORWARD = f"{_INPUTS}, bool columns, bool everything"
_FORWARD_OUT = "(Tensor row, Tensor column, Tensor dots)"
_BACKWARD = (
    f"Tensor row, Tensor? column, {_INPUTS}, bool everything, "
    "bool need_dq, bool need_dc, bool need_scale"
)
_BACKWARD_OUT = "(Tensor dq, Tensor dc, Tensor d_scale)"
_SIZE = len(SweepInputs._fields)


def _forward_arguments(args: tuple[Any, ...]) -> tuple[SweepInputs, tuple[Any, ...]]:
    """Split the arguments of the forward sweep: inputs, (columns, everything, ...)."""
    return SweepInputs(*args[:_SIZE]), args[_SIZE:]


def _backward_arguments(
    args: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None, SweepInputs, tuple[Any, ...]]:
    """Split the arguments of the backward sweep: row, column, inputs, (everything, ...)."""
    row, column, *rest = args
    return row, column, SweepInputs(*rest[:_SIZE]), tuple(rest[_SIZE:])


def _sweep_shapes(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (columns, *_) = _forward_arguments(args)
    q, c = inputs.q, inputs.c
    row = q.new_empty(5, q.shape[0], dtype=torch.float64)
    column = q.new_empty(5, c.shape[0] if columns else 0, dtype=torch.float64)
    return row, column, q.new_empty(q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


def _sweep_backward_shapes(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, inputs, (_, need_dq, need_dc, need_scale, *_) = _backward_arguments(args)
    q, c = inputs.q, inputs.c
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(q.shape if need_dq else 0, dtype=dtype)
    dc = c.new_empty(c.shape if need_dc else 0, dtype=dtype)
    return dq, dc, q.new_empty(() if need_scale else 0, dtype=torch.float64)


def _sweep_flops(*args: Any, out_shape: object) -> int:
    inputs, _ = _forward_arguments(args)
    return _products_flops(inputs)


def _sweep_backward_flops(*args: Any, out_shape: object) -> int:
    """Count one product for the logits, one for dq or d_scale, and one for dc."""
    _, _, inputs, (_, need_dq, need_dc, need_scale, *_) = _backward_arguments(args)
    return _products_flops(inputs) * (1 + (need_dq or need_scale) + need_dc)


def _products_flops(shapes: Any) -> int:
    """Return the FLOPs of all dot products q . c, from the shapes of the inputs."""
    return 2 * shapes.q[0] * shapes.c[0] * shapes.q[1]


@operator(f"({_FORWARD}) -> {_FORWARD_OUT}", _sweep_shapes, _sweep_flops)
def info_nce_sweep(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels of the forward sweep."""
    from ...kernels.masked_info_nce.forward import sweep

    with launching(args):
        return sweep(*args)


@operator(f"({_BACKWARD}) -> {_BACKWARD_OUT}", _sweep_backward_shapes, _sweep_backward_flops)
def info_nce_sweep_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels of the backward sweep."""
    from ...kernels.masked_info_nce.gradients import sweep_backward

    with launching(args):
        return sweep_backward(*args)


@operator(
    f"({_FORWARD}, float? margin) -> {_FORWARD_OUT}",
    _sweep_shapes,
    _sweep_flops,
    devices="all",
)
def info_nce_sweep_composed(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward sweep in plain PyTorch, block by block."""
    inputs, rest = _forward_arguments(args)
    return sweep_blocks(inputs, *rest)


@operator(
    f"({_BACKWARD}, Tensor dots, float? margin) -> {_BACKWARD_OUT}",
    _sweep_backward_shapes,
    _sweep_backward_flops,
    devices="all",
)
def info_nce_sweep_bwd_composed(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward sweep in plain PyTorch, block by block."""
    row, column, inputs, rest = _backward_arguments(args)
    return sweep_blocks_backward(row, column, inputs, *rest)


# ---- autograd ------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """The inputs of both sweeps in the caller's order.

    ``query_order`` and ``candidate_order`` are the permutations that sort by key.
    """

    query: Tensor
    candidate: Tensor
    bias: Tensor | None
    scale: Tensor
    target: Tensor
    query_key: Tensor | None
    candidate_key: Tensor | None
    query_id: Tensor | None
    candidate_id: Tensor | None
    query_order: Tensor | None
    candidate_order: Tensor | None

    def by_key(self, drop: bool) -> SweepInputs:
        """Return the inputs of a sweep, sorted by key."""
        by_row, by_column = self.query_order, self.candidate_order
        return SweepInputs(
            q=_sort(self.query, by_row),
            c=_sort(self.candidate, by_column),
            bias=_sort_given(self.bias, by_column),
            scale=self.scale,
            target=_sort(_place(self.target, by_column), by_row),
            q_key=_sort_given(self.query_key, by_row),
            c_key=_sort_given(self.candidate_key, by_column),
            q_id=_sort_given(self.query_id, by_row),
            c_id=_sort_given(self.candidate_id, by_column),
            drop=drop,
        )


class InfoNCE(torch.autograd.Function):
    """Compute nce (B,) and the dot products q . c (B,) of the targets, in float32 or float64.

    ``broken`` (B,) bool, or None: rows whose loss must be NaN. With ``ranks``, candidate,
    candidate_key and candidate_id are those of this rank, but target indexes the candidates of all
    ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        candidate: Tensor,
        scale: Tensor,
        target: Tensor,
        broken: Tensor | None,
        query_key: Tensor | None,
        candidate_key: Tensor | None,
        query_id: Tensor | None,
        candidate_id: Tensor | None,
        options: Options,
        backend: str,
        ranks: Ranks | None,
    ) -> tuple[Tensor, Tensor]:
        """Sweep over the pairs, and add the targets."""
        ctx.options, ctx.backend, ctx.ranks = options, backend, ranks
        ctx.device_type = query.device.type
        # The rounding of a matrix product depends on the layout, so both sweeps use one layout.
        query, candidate = query.contiguous(), candidate.contiguous()
        if ranks is not None:
            candidate = ranks.gather(candidate)
            candidate_key = None if candidate_key is None else ranks.gather(candidate_key)
            candidate_id = None if candidate_id is None else ranks.gather(candidate_id)
        positives = candidate_id is not None and options.same_id != "drop"
        ctx.everything = options.label_smoothing > 0 or positives
        bias, nan = None, _nan_rows(query)
        if candidate_key is not None or candidate_id is not None:
            # 0 * NaN is NaN: a NaN candidate would reach rows for which it does not count.
            candidate, bias = _without_nan(candidate)
        else:
            nan = nan | _nan_rows(candidate).any()
        inputs = _Inputs(
            query=query,
            candidate=candidate,
            bias=bias,
            scale=scale,
            target=target,
            query_key=query_key,
            candidate_key=candidate_key,
            query_id=query_id,
            candidate_id=candidate_id,
            query_order=_order(query_key, candidate_key),
            candidate_order=_order(candidate_key, candidate_key),
        )
        args = (*inputs.by_key(options.same_id == "drop"), options.symmetric, ctx.everything)
        if backend == "fused":
            swept = info_nce_sweep(*args)
        else:
            swept = info_nce_sweep_composed(*args, options.false_negative_margin)
        broken = nan if broken is None else nan | broken
        row, column, dots = _statistics(swept, inputs, options, ranks, nan, broken)
        logit = dots * scale
        logit = logit + 0 * logit  # an infinite logit becomes NaN
        nce = target_term(row, logit, options, ctx.everything)
        if column is not None:
            nce = (nce + target_term(column, logit, options, ctx.everything)) / 2
        ctx.save_for_backward(*inputs, row, column, dots)
        # Without copy=True, a cast to the same dtype loses the gradient under torch.compile (2.11).
        return nce.to(dots.dtype, copy=True), dots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nce: Tensor, d_dots: Tensor) -> tuple[Tensor | None, ...]:
        """Sweep over the pairs again, and add the gradients through the targets."""
        query, *others = ctx.saved_tensors[:-3]
        row, column, dots = ctx.saved_tensors[-3:]
        inputs = _Inputs(query, *others)
        if inputs.bias is not None:
            # The lse of a query that is set to 0 here is NaN, so dS is NaN for pairs that count.
            query = query.masked_fill(_nan_rows(query)[:, None], 0.0)
            inputs = _Inputs(query, *others)
        options, everything, logit = ctx.options, ctx.everything, dots * inputs.scale
        d_nce = d_nce / 2 if options.symmetric else d_nce
        row, d_logit = gradient_coefficients(row, logit, d_nce, options, everything)
        if options.symmetric:
            column, of_column = gradient_coefficients(column, logit, d_nce, options, everything)
            d_logit = d_logit + of_column
            # Only the columns of targets have a loss.
            column = column.new_zeros(4, inputs.candidate.shape[0]).index_copy_(
                1, inputs.target, column
            )
            column = column if ctx.ranks is None else ctx.ranks.share_columns(column)
        dq, dc, d_scale = _swept_backward(ctx, inputs, row, column, dots)
        wide = dots.dtype
        d_target = (d_logit * inputs.scale + d_dots).to(wide)[:, None]
        need_query, need_candidate, need_scale = ctx.needs_input_grad[:3]
        d_query = d_candidate = None
        if need_query:
            dq = _unsort(dq, inputs.query_order, 0).mul_(inputs.scale)
            targets = inputs.candidate[inputs.target].to(wide)
            d_query = dq.add_(d_target * targets).to(query.dtype)
        if need_candidate:
            dc = _unsort(dc, inputs.candidate_order, 0).mul_(inputs.scale)
            dc = _add_rows(dc, inputs.target, d_target * query.to(wide))
            dc = dc if ctx.ranks is None else ctx.ranks.return_gradient(dc)
            d_candidate = dc.to(inputs.candidate.dtype)
        # d_scale and the added sum may nearly cancel, so both are float64.
        d_scale = (d_scale + (d_logit * dots).sum()).to(inputs.scale.dtype) if need_scale else None
        return d_query, d_candidate, d_scale, *[None] * 9


def _statistics(
    swept: tuple[Tensor, Tensor, Tensor],
    inputs: _Inputs,
    options: Options,
    ranks: Ranks | None,
    nan: Tensor,
    broken: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the results of the forward sweep in the caller's order.

    The results are the statistics (5, B) of the rows, the statistics (5, B) of the targets' columns
    (None unless symmetric), and the dot products (B,) of the targets. ``nan`` (B,) bool: rows whose
    query is not finite; without keys and ids, all rows if a candidate is not finite. ``broken``
    (B,) bool: rows whose dot product is set to NaN.
    """
    row, column, dots = swept
    dots = _unsort(dots, inputs.query_order, 0)
    if inputs.bias is not None:
        dots = dots + inputs.bias[inputs.target].to(dots.dtype)
    dots = dots.masked_fill(broken, float("nan"))
    row = _unsort(row.double(), inputs.query_order)
    if not options.symmetric:
        return row, None, dots
    column = _unsort(column.double(), inputs.candidate_order)
    if inputs.bias is None:
        column = column.masked_fill(nan.any(), float("nan"))
    column = column if ranks is None else ranks.merge_columns(column)
    return row, column[:, inputs.target], dots


def _swept_backward(
    ctx: Any,
    inputs: _Inputs,
    row: Tensor,
    column: Tensor | None,
    dots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq / scale and dc / scale, sorted by key, and d_scale without the targets' part."""
    options = ctx.options
    args = (
        _sort(row, inputs.query_order, 1),
        _sort_given(column, inputs.candidate_order, 1),
        *inputs.by_key(options.same_id == "drop"),
        ctx.everything,
        *ctx.needs_input_grad[:3],
    )
    with no_autocast(ctx.device_type):  # backward may be called under autocast
        if ctx.backend == "fused":
            return info_nce_sweep_bwd(*args)
        dots = _sort(dots, inputs.query_order)
        return info_nce_sweep_bwd_composed(*args, dots, options.false_negative_margin)


def _nan_rows(x: Tensor) -> Tensor:
    """Return a bool vector, True for rows whose sum is not finite."""
    return ~x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()


def _without_nan(candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the candidates (C, D), with 0 for candidates that are not finite, and a bias (C,).

    The bias is NaN for candidates that are not finite, and 0 for the others. If it is added to the
    logits, a row becomes NaN only if a candidate that is not finite counts for the row.
    """
    broken = _nan_rows(candidate)
    bias = torch.zeros(candidate.shape[0], device=candidate.device)
    return candidate.masked_fill(broken[:, None], 0.0), bias.masked_fill_(broken, float("nan"))


def _add_rows(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows`` to ``x[at]`` in place, deterministically even if ``at`` repeats an index.

    index_add_ is deterministic on a CPU, and index_put_ on CUDA.
    """
    if x.device.type == "cpu":
        return x.index_add_(0, at, rows)
    return x.index_put_((at,), rows, accumulate=True)


def _order(key: Tensor | None, candidate_key: Tensor | None) -> Tensor | None:
    return None if key is None or candidate_key is None else key.argsort(stable=True)


def _sort(x: Tensor, order: Tensor | None, dim: int = 0) -> Tensor:
    return x if order is None else x.index_select(dim, order)


def _sort_given(x: Tensor | None, order: Tensor | None, dim: int = 0) -> Tensor | None:
    return None if x is None else _sort(x, order, dim)


def _unsort(x: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(dim, order, x)


def _place(target: Tensor, order: Tensor | None) -> Tensor:
    """Return the index of each target among the candidates as sorted by ``order``."""
    if order is None:
        return target
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return place[target]
