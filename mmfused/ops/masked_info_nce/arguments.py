"""Arguments of masked InfoNCE beside the embeddings, in groups.

A file of its own because the functions, the checks, the autograd function and the Module share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from torch import Tensor

SameId = Literal["drop", "mean", "sum"]
Reduction = Literal["mean", "sum", "none"]


class Labels(NamedTuple):
    """Vectors of a number for each of B queries or C candidates."""

    target: Tensor | None = None  # (B,) int64
    query_key: Tensor | None = None  # (B,) int64
    candidate_key: Tensor | None = None  # (C,) int64
    query_id: Tensor | None = None  # (B,) int64
    candidate_id: Tensor | None = None  # (C,) int64
    row_weight: Tensor | None = None  # (B,)


@dataclass(frozen=True)
class Options:
    """Numbers and switches of the loss; see :func:`masked_info_nce`."""

    same_id: SameId = "drop"
    symmetric: bool = False
    positive_weight: float = 0.0
    label_smoothing: float = 0.0
    false_negative_margin: float | None = None
    reduction: Reduction = "mean"


class LabelArguments(TypedDict, total=False):
    """The keywords of :class:`Labels`."""

    target: Tensor | None
    query_key: Tensor | None
    candidate_key: Tensor | None
    query_id: Tensor | None
    candidate_id: Tensor | None
    row_weight: Tensor | None


class OptionArguments(TypedDict, total=False):
    """The keywords of :class:`Options` that hold over ranks too."""

    same_id: SameId
    symmetric: bool
    positive_weight: float
    label_smoothing: float
    false_negative_margin: float | None


class LossArguments(LabelArguments, OptionArguments, total=False):
    """The keywords of a loss over ranks."""


def grouped(**arguments: object) -> tuple[Labels, Options]:
    """Sort the keywords of a loss into groups; ``TypeError`` for an unknown one."""
    labels = {name: arguments.pop(name) for name in Labels._fields if name in arguments}
    return Labels(**labels), Options(**arguments)  # type: ignore[arg-type]
