"""The public functions of masked InfoNCE, for one process and across ranks.

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
    """Compute the softmax contrastive loss of queries and candidates, masked by integer keys.

    The kernels and the composed path store no B x C matrix. The equations are in
    :mod:`mmfused.ops.masked_info_nce.reference`.

    Args:
        query: (B, D), float32, float16, bfloat16 or float64. The function does not normalise.
        candidate: (C, D), in the dtype of ``query``.
        temperature: divides the dot products; a float, or a tensor of one element, which may
            require grad.
        target: (B,) int64, index of the positive candidate of each row; default ``arange(B)``.
        query_key: (B,) int64, at least 0; accepted only together with ``candidate_key``.
        candidate_key: (C,) int64, at least -1. A candidate counts for a row if it has the row's key
            or key -1, or is the target. Without ``query_key`` each row has the key of its target
            (UNITE's MAMCL). If that is -1, only candidates with key -1 count for the row.
        query_id: (B,) int64, accepted only together with ``candidate_id``. Equal ids mark the same
            item.
        candidate_id: (C,) int64. Without ``query_id`` each row has the id of its target.
        same_id: what to do with candidates that have the row's id but are not its target. "drop":
            leave them out. "mean": treat them as further positives, and average the
            log-probabilities of all positives (SupCon). "sum": like "mean", but sum (UNITE).
        symmetric: whether to average the losses of rows and columns. Needs the default target and
            C >= B. The pairs that count are the same in both directions.
        positive_weight: ``positive_weight * (1 - q . c)`` is added to the loss of each row q, where
            c is the target (UniCA's positive similarity).
        row_weight: (B,), constant and >= 0, multiplies the losses of the rows. Reduction "mean"
            divides by the sum of the weights, and gives 0 if all weights are 0.
        label_smoothing: share of the label distribution that is uniform over the pairs that count.
        false_negative_margin: leave out candidates whose dot product with the query exceeds that of
            the target by more than this number; such candidates may be unlabelled positives.
            Candidates with key -1 (curated negatives) are kept. No kernel supports this option.
        reduction: "mean", "sum" or "none"; "none" returns the losses (B,).

    Returns:
        The loss in float32, or in float64 for float64 inputs. A row (or column) for which only the
        target counts has a contrastive loss of exactly 0 and is included in the mean.

        A candidate that counts for no row may be NaN and gets gradient 0. If another candidate is
        not finite, the rows for which the candidate counts become NaN. If a query is not finite,
        its row becomes NaN, and the candidates that count for the row get NaN gradients.

        Second derivatives raise, except under ``backend("reference")``. The kernels do not
        synchronise with the CPU. On a GPU, the composed path synchronises, so a CUDA graph cannot
        capture it.

    Raises:
        TypeError: bad input.
        ValueError: bad input. Values in tensors are checked only on a CPU in eager mode. Elsewhere
            a row becomes NaN if its target is out of range, its query key is negative, or its
            weight is negative. All rows become NaN if any candidate key is below -1, if the
            temperature is not above 0, or if 1 / temperature overflows (in float32: temperature
            below 3e-39).
        RuntimeError: ``backend("fused")`` cannot run; raised before any kernel is launched.

    Source: UNITE (arXiv 2505.19650), UniCA (arXiv 2606.28350), SupCon (arXiv 2004.11362). Masking
    by keys is specific to this library.

    Examples:
        >>> import torch, mmfused
        >>> from torch.nn.functional import cross_entropy, normalize
        >>> query, candidate = (normalize(torch.randn(4, 16), dim=-1) for _ in range(2))
        >>> loss = mmfused.masked_info_nce(query, candidate, temperature=0.07)
        >>> torch.allclose(loss, cross_entropy(query @ candidate.T / 0.07, torch.arange(4)))
        True
        >>> label = torch.tensor([5, 6, 5, 7])  # rows 0 and 2 show the same product
        >>> dropped = mmfused.masked_info_nce(
        ...     query, candidate, temperature=0.07, query_id=label, candidate_id=label
        ... )
        >>> bool(dropped < loss)  # it counts as a negative no more
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
    return _computed(_checked(query, candidate, labels, options, temperature=temperature))


def scaled_info_nce(
    query: Tensor,
    candidate: Tensor,
    scale: float | Tensor,
    *,
    symmetric: bool = False,
) -> Tensor:
    """Compute :func:`masked_info_nce` of the logits ``scale * query candidate^T``.

    The scale may be any number, including 0, negative numbers and NaN.
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

    The result is the sum of the losses of this rank's rows, times the number of ranks, divided by
    the sum of the row weights on all ranks. Without row weights, each weight is 1. A rank without
    rows returns 0.

    All tensors are those of this rank, and ``target`` indexes the candidates of this rank.
    ``share_gradients``: whether candidates get gradients from the rows of all ranks, or only from
    the rows of their own rank.

    Raises:
        TypeError, ValueError: the inputs of this rank are bad.
        ValueError: the settings of the ranks differ, or no rank has rows.
        RuntimeError: another rank has failed; the message names that rank.
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
        raise ValueError(f"{OP}: query: got 0 rows on every rank, expected at least one row")
    loss = _computed(call, ranks)
    if labels.row_weight is None:
        return loss * (ranks.world / sum(ranks.rows))
    total = ranks.total(labels.row_weight.to(loss.dtype).sum())
    return loss * ranks.world / total.masked_fill(total == 0, 1.0)


class _Call(NamedTuple):
    """The checked arguments of a loss. One of temperature and scale is None."""

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
    """Return the settings that must be equal on all ranks, by their names in error messages."""
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
    """Return the factor of the dot products, as a float32 or float64 scalar tensor."""
    query, scale, temperature = call.query, call.scale, call.temperature
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        scale = temperature.to(dtype).reciprocal()
    elif temperature is not None:
        scale = 1 / temperature
    assert scale is not None  # either temperature or scale is given
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=dtype, device=query.device)
    scale = scale.to(query.device, dtype).reshape(())
    return scale + 0 * scale  # an infinite scale becomes NaN
