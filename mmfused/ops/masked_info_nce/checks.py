"""What :func:`masked_info_nce` refuses, one sentence each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...library import check_fractions, check_numbers, check_tensors, check_value
from .._common import check_temperature

OP = "masked_info_nce"
SAME_ID, REDUCTIONS = ("drop", "mean", "sum"), ("mean", "sum", "none")


def check(
    query,
    candidate,
    over_ranks,
    *,
    temperature,
    target,
    query_key,
    candidate_key,
    query_id,
    candidate_id,
    same_id,
    symmetric,
    positive_weight,
    row_weight,
    label_smoothing,
    false_negative_margin,
    reduction,
):
    """``over_ranks``: other ranks may have rows where this one has none."""
    check_first(query, candidate, over_ranks)
    vectors = dict(
        target=target,
        query_key=query_key,
        candidate_key=candidate_key,
        query_id=query_id,
        candidate_id=candidate_id,
    )
    check_tensors(OP, query=query, **vectors, row_weight=row_weight)
    sizes = dict(
        target="query",
        query_key="query",
        candidate_key="candidate",
        query_id="query",
        candidate_id="candidate",
    )
    for name, tensor in vectors.items():
        length = query.shape[0] if sizes[name] == "query" else candidate.shape[0]
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{OP}: {name}: got dtype {tensor.dtype}, expected torch.int64")
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(
                f"{OP}: {name}: got shape {tuple(tensor.shape)}, expected ({length},), one for each {sizes[name]}"
            )
    for kind, (mine, theirs) in {
        "key": (query_key, candidate_key),
        "id": (query_id, candidate_id),
    }.items():
        if mine is not None and theirs is None:
            raise ValueError(
                f"{OP}: query_{kind}: got given without candidate_{kind}, expected both, or candidate_{kind} alone"
            )
    _check_options(
        symmetric, target, query, candidate, same_id, label_smoothing, reduction, positive_weight
    )
    check_numbers(OP, false_negative_margin=false_negative_margin)
    if (
        false_negative_margin is not None and not -math.inf < false_negative_margin < math.inf
    ):  # the compiler knows no isfinite
        raise ValueError(
            f"{OP}: false_negative_margin: got {false_negative_margin}, expected a finite number, or None"
        )
    if temperature is not None:  # the scale is given
        check_temperature(OP, temperature, query)
        _check_reciprocal(temperature, query)
    _check_row_weight(row_weight, query)
    _check_values(target, query_key, candidate_key, candidate.shape[0])


def check_first(query: Tensor, candidate: Tensor, over_ranks: bool) -> None:
    """The embeddings themselves: before anything asks for their length."""
    for name, tensor in (("query", query), ("candidate", candidate)):
        if tensor is None:
            raise TypeError(f"{OP}: {name}: got None, expected a torch.Tensor")
    check_tensors(OP, query=query, candidate=candidate)
    if not query.is_floating_point() or query.dtype != candidate.dtype:
        raise TypeError(
            f"{OP}: query and candidate have dtypes {query.dtype} and {candidate.dtype}; they take one dtype, "
            "float32, float16, bfloat16 or float64."
        )
    for name, tensor in (("query", query), ("candidate", candidate)):
        if tensor.dim() != 2 or tensor.shape[1] == 0 or (tensor.shape[0] == 0 and not over_ranks):
            zero = "dim not 0" if over_ranks else "neither of them 0"
            raise ValueError(
                f"{OP}: {name}: got shape {tuple(tensor.shape)}, expected (rows, dim), {zero}"
            )
    if query.shape[1] != candidate.shape[1]:
        raise ValueError(
            f"{OP}: candidate: got dim {candidate.shape[1]}, expected {query.shape[1]} as query has"
        )


def _check_options(
    symmetric,
    target,
    query,
    candidate,
    same_id,
    label_smoothing,
    reduction,
    positive_weight,
) -> None:
    if symmetric and target is not None:
        raise ValueError(
            f"{OP}: symmetric and target are both given; symmetric takes the default target, arange(B)."
        )
    if target is None and candidate.shape[0] < query.shape[0]:
        raise ValueError(
            f"{OP}: there are {candidate.shape[0]} candidates for {query.shape[0]} queries; without a target it takes at least "
            "as many."
        )
    if candidate.shape[0] == 0 < query.shape[0]:  # over ranks; a target is one of this rank's
        raise ValueError(
            f"{OP}: there are 0 candidates for {query.shape[0]} queries with a target; it takes at least one."
        )
    if same_id not in SAME_ID:
        raise ValueError(f"{OP}: same_id: got {same_id!r}, expected one of {', '.join(SAME_ID)}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{OP}: reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}"
        )
    check_fractions(OP, label_smoothing=label_smoothing)
    check_numbers(OP, positive_weight=positive_weight)
    if not positive_weight >= 0:
        raise ValueError(
            f"{OP}: positive_weight: got {positive_weight}, expected a number of at least 0"
        )


def _check_reciprocal(temperature: float | Tensor, query: Tensor) -> None:
    """Logits are multiplied by it; their dtype must hold it."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    sentence = f"{OP}: temperature holds a number too small for 1 / temperature in {dtype}."
    if isinstance(temperature, Tensor):
        check_value(lambda: temperature.to(dtype).reciprocal().isfinite().all(), sentence)
    elif not 1 / temperature <= torch.finfo(dtype).max:
        raise ValueError(sentence)


def _check_row_weight(row_weight: Tensor | None, query: Tensor) -> None:
    if row_weight is None:
        return
    if row_weight.shape != query.shape[:1]:
        raise ValueError(
            f"{OP}: row_weight: got shape {tuple(row_weight.shape)}, expected ({query.shape[0]},)"
        )
    if row_weight.requires_grad:
        raise ValueError(f"{OP}: row_weight requires grad; it takes a constant: detach() it.")
    check_value(
        lambda: (row_weight >= 0).all(),
        f"{OP}: row_weight holds a negative number; it takes numbers of at least 0.",
    )


def _check_values(target, query_key, candidate_key, candidates: int) -> None:
    if target is not None:
        inside = lambda: ((target >= 0) & (target < candidates)).all()  # noqa: E731

        def outside():
            return (
                f"{OP}: target holds a value outside [0, {candidates}), the candidates there are."  # noqa: E731
            )

        check_value(inside, outside)
    if query_key is not None:
        check_value(
            lambda: (query_key >= 0).all(),
            f"{OP}: query_key holds a negative value; it takes keys of at least 0.",
        )
    if candidate_key is not None:
        lowest = lambda: (candidate_key >= -1).all()  # noqa: E731
        check_value(
            lowest,
            f"{OP}: candidate_key holds a value below -1; it takes keys of at least 0, or -1 for everybody.",
        )
