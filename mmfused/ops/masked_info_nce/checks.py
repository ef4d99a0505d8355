"""Input validation for masked_info_nce."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...library import check_fractions, check_numbers, check_tensors, check_value
from .._common import check_temperature
from .arguments import Labels, Options

OP = "masked_info_nce"
SAME_ID = ("drop", "mean", "sum")
REDUCTIONS = ("mean", "sum", "none")


def check_arguments(
    query: Tensor,
    candidate: Tensor,
    temperature: float | Tensor | None,
    labels: Labels,
    options: Options,
    over_ranks: bool,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on bad input.

    ``temperature``: None if the caller has a scale instead. ``over_ranks``: whether the loss spans
    several ranks. Then this rank may have no rows.
    """
    _check_embeddings(query, candidate, over_ranks)
    _check_shapes(query, candidate, labels)
    _check_candidates(query, candidate, labels.target, options.symmetric)
    _check_options(options)
    if temperature is not None:
        check_temperature(OP, temperature, query)
        _check_reciprocal(temperature, query)
    _check_row_weight(labels.row_weight, query)
    _check_values(labels, candidate.shape[0])


def _check_embeddings(query: Tensor, candidate: Tensor, over_ranks: bool) -> None:
    """Check the embeddings, whose shapes the other checks read."""
    for name, tensor in (("query", query), ("candidate", candidate)):
        if tensor is None:
            raise TypeError(f"{OP}: {name}: got None, expected a torch.Tensor")
    check_tensors(OP, query=query, candidate=candidate)
    if not query.is_floating_point():
        raise TypeError(
            f"{OP}: query: got dtype {query.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if query.dtype != candidate.dtype:
        raise TypeError(
            f"{OP}: candidate: got dtype {candidate.dtype}, expected {query.dtype} as query has"
        )
    for name, tensor in (("query", query), ("candidate", candidate)):
        if tensor.dim() != 2 or tensor.shape[1] == 0 or (tensor.shape[0] == 0 and not over_ranks):
            positive = "dim" if over_ranks else "rows and dim"
            raise ValueError(
                f"{OP}: {name}: got shape {tuple(tensor.shape)}, "
                f"expected (rows, dim) with {positive} above 0"
            )
    if query.shape[1] != candidate.shape[1]:
        raise ValueError(
            f"{OP}: candidate: got dim {candidate.shape[1]}, expected {query.shape[1]} as query has"
        )


def _check_shapes(query: Tensor, candidate: Tensor, labels: Labels) -> None:
    named = dict(zip(Labels._fields, labels, strict=True))
    check_tensors(OP, query=query, **named)
    sides = {"query": query, "candidate": candidate}
    for name, tensor in named.items():
        if tensor is None or name == "row_weight":
            continue
        side = "candidate" if name.startswith("candidate") else "query"
        length = sides[side].shape[0]
        if tensor.dtype != torch.int64:
            raise TypeError(f"{OP}: {name}: got dtype {tensor.dtype}, expected torch.int64")
        if tensor.shape != (length,):
            raise ValueError(
                f"{OP}: {name}: got shape {tuple(tensor.shape)}, expected ({length},), "
                f"one for each {side}"
            )
    for kind, of_query, of_candidate in (
        ("key", labels.query_key, labels.candidate_key),
        ("id", labels.query_id, labels.candidate_id),
    ):
        if of_query is not None and of_candidate is None:
            raise ValueError(
                f"{OP}: query_{kind}: got a tensor without candidate_{kind}, expected both, "
                f"or candidate_{kind} alone"
            )


def _check_candidates(
    query: Tensor,
    candidate: Tensor,
    target: Tensor | None,
    symmetric: bool,
) -> None:
    rows, candidates = query.shape[0], candidate.shape[0]
    if symmetric and target is not None:
        raise ValueError(
            f"{OP}: symmetric: got True with a target, expected the default target, arange(B)"
        )
    if target is None and candidates < rows:
        raise ValueError(
            f"{OP}: candidate: got {candidates} rows, expected at least {rows} as query has, "
            "or a target"
        )
    if candidates == 0 < rows:  # even over ranks, a target must be on this rank
        raise ValueError(f"{OP}: candidate: got 0 rows, expected at least one, as query has {rows}")


def _check_options(options: Options) -> None:
    for name, value, choices in (
        ("same_id", options.same_id, SAME_ID),
        ("reduction", options.reduction, REDUCTIONS),
    ):
        if value not in choices:
            raise ValueError(f"{OP}: {name}: got {value!r}, expected one of {', '.join(choices)}")
    check_fractions(OP, label_smoothing=options.label_smoothing)
    check_numbers(OP, positive_weight=options.positive_weight)
    if not options.positive_weight >= 0:
        raise ValueError(
            f"{OP}: positive_weight: got {options.positive_weight}, expected a number of at least 0"
        )
    margin = options.false_negative_margin
    check_numbers(OP, false_negative_margin=margin)
    # torch.compile cannot trace math.isfinite.
    if margin is not None and not -math.inf < margin < math.inf:
        raise ValueError(
            f"{OP}: false_negative_margin: got {margin}, expected a finite number, or None"
        )


def _check_reciprocal(temperature: float | Tensor, query: Tensor) -> None:
    """Check that 1 / temperature is finite in the dtype of the logits."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    message = (
        f"{OP}: temperature: got a number too small for 1 / temperature in {dtype}, "
        "expected a larger number"
    )
    if isinstance(temperature, Tensor):
        check_value(temperature, lambda x: x.to(dtype).reciprocal().isfinite().all(), message)
    elif not 1 / temperature <= torch.finfo(dtype).max:
        raise ValueError(message)


def _check_row_weight(row_weight: Tensor | None, query: Tensor) -> None:
    if row_weight is None:
        return
    if row_weight.shape != query.shape[:1]:
        raise ValueError(
            f"{OP}: row_weight: got shape {tuple(row_weight.shape)}, expected ({query.shape[0]},)"
        )
    if row_weight.requires_grad:
        raise ValueError(
            f"{OP}: row_weight: got a tensor that requires grad, expected a constant: detach() it"
        )
    check_value(
        row_weight,
        lambda x: (x >= 0).all(),
        f"{OP}: row_weight: got a negative number, expected numbers of at least 0",
    )


def _check_values(labels: Labels, candidates: int) -> None:
    target, query_key, candidate_key = labels.target, labels.query_key, labels.candidate_key
    if target is not None:
        check_value(
            target,
            lambda x: ((x >= 0) & (x < candidates)).all(),
            # A function, since a number in a string would become a constant of an exported graph.
            lambda: (
                f"{OP}: target: got a value outside [0, {candidates}), expected the index of a "
                "candidate"
            ),
        )
    if query_key is not None:
        check_value(
            query_key,
            lambda x: (x >= 0).all(),
            f"{OP}: query_key: got a negative value, expected keys of at least 0",
        )
    if candidate_key is not None:
        check_value(
            candidate_key,
            lambda x: (x >= -1).all(),
            f"{OP}: candidate_key: got a value below -1, expected keys of at least 0, "
            "or -1 for all rows",
        )
