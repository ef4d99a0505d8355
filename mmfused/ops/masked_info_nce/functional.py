"""The functions of masked InfoNCE: validation, choice of the backend, and the other ranks.

The equations are in :mod:`.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...distributed import Ranks, gradient_needed, report_error
from ...library import choose, distinct, no_autocast, to_autocast
from .._common import valid_or_nan
from .arguments import Labels, Options, Reduction, SameId, grouped
from .autograd import InfoNCE
from .checks import OP, check_arguments
from .reference import reduce_rows, resolve_rows, whole_matrix_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .arguments import LossArguments


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
    same_id: SameId = "drop",
    symmetric: bool = False,
    positive_weight: float = 0.0,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    false_negative_margin: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Softmax contrastive loss of queries against candidates, masked by integer keys.

    No B x C matrix is stored. Equations: :mod:`mmfused.ops.masked_info_nce.reference`.

    Args:
        query: (B, D), float32, float16, bfloat16 or float64; normalise the embeddings first.
        candidate: (C, D), of the same dtype.
        temperature: divides the dot products; a float, or a tensor of one element, which gets its
            gradient.
        target: (B,) int64, the positive of each row among the candidates; default ``arange(B)``.
        query_key: (B,) int64, together with ``candidate_key``.
        candidate_key: (C,) int64. A row sees the candidates with its own key, those with key -1,
            and its target. Without ``query_key`` a row's key is that of its target (UNITE's MAMCL);
            where that is -1, the row sees the candidates with -1.
        query_id: (B,) int64, together with ``candidate_id``: equal numbers mark the same item.
        candidate_id: (C,) int64. Without ``query_id`` a row's id is that of its target.
        same_id: what another candidate with the row's id counts as. "drop": it is left out of the
            sum; "mean": a further positive, the mean of whose log-probabilities is maximised
            (SupCon); "sum": the same with their sum (UNITE).
        symmetric: the mean of both directions. It needs the default target and C >= B; column
            j < B sums over the same pairs.
        positive_weight: adds this times ``1 - query_i . candidate_target`` to each row (UniCA's
            positive similarity).
        row_weight: (B,), constant and >= 0. The mean is weighted by it (0 where all are 0), the sum
            and the single losses are scaled.
        label_smoothing: this share of the wanted distribution is uniform over the allowed pairs.
        false_negative_margin: another candidate whose dot product with the query exceeds that of
            the target by more than this is taken for an unlabelled positive and left out, except
            for candidates with key -1 (curated negatives). There is no kernel for it.
        reduction: "mean", "sum" or "none", (B,).

    Returns:
        The loss, float32, or float64 for float64 inputs. A row (or column) with one allowed pair
        has an nce of exactly 0 and counts in the mean. A candidate that no row sees may hold NaN
        and gets gradient 0. Any other candidate that is not finite makes the rows that see it NaN;
        a query that is not finite makes its own row NaN and gives NaN gradients to the candidates
        that it sees. A second differentiation raises. On a GPU the kernels never wait for the
        host; ``composed`` does, to learn which blocks have pairs, so it cannot be captured in a
        CUDA graph.

    Raises:
        TypeError: bad input.
        ValueError: bad input. Values in tensors are checked in eager mode on a CPU. Elsewhere a
            row is NaN if its target is no candidate or its key or weight is negative, and every row
            is if a candidate's key is below -1, or the temperature is not above 0 or so small that
            its reciprocal is infinite (below 3e-39 in float32).
        RuntimeError: ``backend("fused")`` cannot run; raised before any launch.

    Source: UNITE (arXiv 2505.19650), UniCA (arXiv 2606.28350), SupCon (arXiv 2004.11362); keys as
    masks are this library's.
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
    return _computed(_checked(query, candidate, labels, options, temperature=temperature))


def scaled_info_nce(
    query: Tensor,
    candidate: Tensor,
    scale: float | Tensor,
    *,
    symmetric: bool = False,
) -> Tensor:
    """Compute :func:`masked_info_nce` of the logits ``scale * query candidate^T``.

    The scale may be any number, 0, negative or NaN, as in the losses of other libraries.
    """
    options = Options(symmetric=symmetric)
    return _computed(_checked(query, candidate, Labels(), options, scale=scale))


def loss_over_ranks(
    query: Tensor,
    candidate: Tensor,
    share_gradients: bool,
    *,
    temperature: float | Tensor,
    **arguments: Unpack[LossArguments],
) -> Tensor:
    """Compute :func:`masked_info_nce` with the candidates of every rank.

    The result is the sum over this rank's rows, times W over the number of all rows (or over the
    sum of all row weights). Target and keys are this rank's own; ``share_gradients`` as in
    :class:`mmfused.distributed.Ranks`. A rank without rows gives 0, with gradients of 0 and those
    that its candidates get from other ranks.

    Raises:
        TypeError, ValueError: where the inputs of one rank are bad, or where inputs differ that
            must be the same, all ranks raise: that rank its own error, the others a RuntimeError
            that names it.
    """
    try:
        labels, options = grouped(**arguments, reduction="sum")
        call = _checked(
            query,
            candidate,
            labels,
            options,
            temperature=temperature,
            over_ranks=True,
        )
    except Exception as error:
        report_error(OP, error, query)
        raise
    settings = _settings(call, share_gradients)
    ranks = Ranks(OP, call.query, call.candidate, share_gradients, settings)
    if not sum(ranks.rows):
        raise ValueError(f"{OP}: query: got 0 rows on every rank, expected at least one in all")
    loss = _computed(call, ranks)
    if labels.row_weight is None:
        return loss * (ranks.world / sum(ranks.rows))
    total = ranks.total(labels.row_weight.to(loss.dtype).sum())
    return loss * ranks.world / total.masked_fill(total == 0, 1.0)


class _Call(NamedTuple):
    """The checked arguments of a loss; one of temperature and scale is given."""

    query: Tensor
    candidate: Tensor
    labels: Labels
    options: Options
    temperature: float | Tensor | None
    scale: float | Tensor | None
    backend: str


def _checked(
    query: Tensor,
    candidate: Tensor,
    labels: Labels,
    options: Options,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    over_ranks: bool = False,
) -> _Call:
    """Check all arguments and choose the backend."""
    query, candidate = to_autocast(query, candidate)
    check_arguments(query, candidate, temperature, labels, options, over_ranks)
    no_kernel = []
    if options.false_negative_margin is not None:
        no_kernel = ["false_negative_margin has no kernel"]
    backend = choose(OP, query.device, query.dtype, no_kernel, ("export", "onnx"))
    if over_ranks and backend == "reference":
        raise RuntimeError(
            f"{OP}: gather: got backend 'reference', expected another backend, or gather=None"
        )
    return _Call(
        query=query,
        candidate=candidate,
        labels=labels,
        options=options,
        temperature=None if temperature is None else valid_or_nan(temperature),
        scale=scale,
        backend=backend,
    )


def _settings(call: _Call, share_gradients: bool) -> dict[str, object]:
    """Return what must be the same on all ranks: the rules of the loss, and what is exchanged."""
    labels, options = call.labels, call.options
    settings: dict[str, object] = {
        "dim": call.query.shape[1],
        "gather": "'global'" if share_gradients else "'local'",
        "symmetric": bool(options.symmetric),
        "same_id": repr(options.same_id),
        "temperature": _number(call.temperature),
        "row_weight": _given(labels.row_weight),
        "candidate_key": _given(labels.candidate_key),
        "candidate_id": _given(labels.candidate_id),
        "positive_weight": _number(options.positive_weight),
        "label_smoothing": _number(options.label_smoothing),
        "false_negative_margin": _number(options.false_negative_margin),
    }
    if share_gradients:
        settings["candidate's gradient"] = gradient_needed(call.candidate)
    if options.symmetric:
        tensors = (call.query, call.candidate, call.temperature)
        settings["the loss's gradient"] = gradient_needed(*tensors)
    return settings


def _given(argument: Tensor | None) -> str:
    return "None" if argument is None else "given"


def _number(argument: float | Tensor | None) -> object:
    if isinstance(argument, Tensor):
        return "a tensor"
    return None if argument is None else float(argument)


def _computed(call: _Call, ranks: Ranks | None = None) -> Tensor:
    with no_autocast(call.query.device.type):
        if call.backend == "reference":
            return _from_whole_matrix(call)
        labels, options = call.labels, call.options
        rows = resolve_rows(call.query, call.candidate, labels)
        target, backend = rows.target, call.backend
        if ranks is not None:
            target = target + ranks.first_candidate
            # A kernel cannot run on an empty grid.
            backend = backend if len(call.query) else "composed"
        tensors = distinct(
            call.query,
            call.candidate,
            _scale(call),
            target,
            rows.broken,
            rows.query_key,
            labels.candidate_key,
            rows.query_id,
            labels.candidate_id,
        )
        loss, similarity = InfoNCE.apply(*tensors, options, backend, ranks)
        if options.positive_weight:
            loss = loss + options.positive_weight * (1 - similarity)
        return reduce_rows(loss, labels.row_weight, options.reduction)


def _from_whole_matrix(call: _Call) -> Tensor:
    query, temperature = call.query, call.temperature
    if call.scale is not None:
        query = query.to(torch.promote_types(query.dtype, torch.float32)) * call.scale
    if temperature is None:
        temperature = 1.0
    return whole_matrix_loss(query, call.candidate, temperature, call.labels, call.options)


def _scale(call: _Call) -> Tensor:
    """Return the factor of the logits as a tensor of their dtype."""
    query, scale, temperature = call.query, call.scale, call.temperature
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        scale = temperature.to(dtype).reciprocal()
    elif temperature is not None:
        scale = 1 / temperature
    assert scale is not None  # one of both is given
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=dtype, device=query.device)
    scale = scale.to(query.device, dtype).reshape(())
    return scale + 0 * scale  # NaN for an infinite scale, whatever the products are
