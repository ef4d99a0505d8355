"""Types that group the arguments of masked InfoNCE, except embeddings and temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from torch import Tensor

SameId = Literal["drop", "mean", "sum"]
Reduction = Literal["mean", "sum", "none"]


class Labels(NamedTuple):
    """Vectors with one number per query (B,) or per candidate (C,)."""

    target: Tensor | None = None  # (B,) int64
    query_key: Tensor | None = None  # (B,) int64
    candidate_key: Tensor | None = None  # (C,) int64
    query_id: Tensor | None = None  # (B,) int64
    candidate_id: Tensor | None = None  # (C,) int64
    row_weight: Tensor | None = None  # (B,)


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`masked_info_nce` that are not tensors, except the temperature."""

    same_id: SameId = "drop"
    symmetric: bool = False
    positive_weight: float = 0.0
    label_smoothing: float = 0.0
    false_negative_margin: float | None = None
    reduction: Reduction = "mean"


class LabelArguments(TypedDict, total=False):
    """Keyword arguments with the names and types of the fields of :class:`Labels`."""

    target: Tensor | None
    query_key: Tensor | None
    candidate_key: Tensor | None
    query_id: Tensor | None
    candidate_id: Tensor | None
    row_weight: Tensor | None


class OptionArguments(TypedDict, total=False):
    """Keyword arguments with the names and types of the fields of :class:`Options`.

    ``reduction`` is left out.
    """

    same_id: SameId
    symmetric: bool
    positive_weight: float
    label_smoothing: float
    false_negative_margin: float | None


class LossArguments(LabelArguments, OptionArguments, total=False):
    """Keyword arguments of :func:`.functional.loss_over_ranks`, except the temperature."""


def grouped(**arguments: object) -> tuple[Labels, Options]:
    """Group keyword arguments into labels and options. An unknown name raises ``TypeError``."""
    labels = {name: arguments.pop(name) for name in Labels._fields if name in arguments}
    return Labels(**labels), Options(**arguments)  # type: ignore[arg-type]
