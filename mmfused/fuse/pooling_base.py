"""Base of the classes that swap pooling modules, and checks of inputs and children."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..children import dense, why_called
from . import counts
from .base import Family, Swap

Sizes = tuple[int, int | None, int, int, int]


class Pooling(Swap):
    """A module that pools tokens with queries."""

    family: ClassVar[Family] = "pooling"

    @staticmethod
    def sizes(module: Any) -> Sizes:
        """Return token width, number of queries, key width, value width and number of heads.

        The number of queries is None if each call brings its own queries.
        """
        raise NotImplementedError

    @staticmethod
    def dropout_of(module: Any) -> float:
        """Return the probability with which attention weights are dropped in training."""
        return 0.0

    @classmethod
    def describe(cls, module: Any) -> str:
        """Return what this swapped module does, and how its dropout differs."""
        p = cls.dropout_of(module)
        if not p:
            return cls.description
        return (
            f"{cls.description}; dropout {p} of attention weights has the same distribution, but "
            "drops different weights for the same seed"
        )

    @classmethod
    def estimate_benefit(cls, module: Any) -> str:
        """Return the expected benefit, counted in FLOPs."""
        return counts.pooling_benefit(*cls.sizes(module))


def not_linear(linear: nn.Module, name: str) -> str | None:
    """Return why the weight of a child does not determine the child's output, or None."""
    why = why_called(linear)
    return why and f"{name} {why}: its weight alone does not determine what it computes."


def unsupported_dropout(p: float, name: str) -> str | None:
    """Return why the dropout probability ``p`` prevents the swap, or None."""
    if 0 <= p < 1:
        return None
    return f"{name} is {p}: query_pooling takes a number from 0 to below 1."


def are_tokens(x: Any) -> bool:
    """Return whether ``x`` is a plain floating tensor of three dimensions."""
    return isinstance(x, Tensor) and dense(x) and x.dim() == 3 and x.is_floating_point()


def padding_of(
    mask: Any,
    heads: int,
    rows: int,
    x: Tensor,
) -> Tensor | None:
    """Convert an attention mask to the equivalent key padding mask (B, N), True = ignore.

    ``mask`` must be bool, True = attend, and (B, heads, rows, N), where the first three dimensions
    may be 1. Return None unless the dimensions of heads and rows are 1 or expanded, because
    comparing the values of heads or rows would wait for the GPU.
    """
    if not isinstance(mask, Tensor) or not dense(mask):
        return None
    if mask.dtype != torch.bool or mask.dim() != 4:
        return None
    sizes = (x.shape[0], heads, rows)
    broadcasts = all(mask.shape[dim] in (1, size) for dim, size in enumerate(sizes))
    same = all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))
    if mask.shape[3] != x.shape[1] or not broadcasts or not same:
        return None
    return ~mask[:, 0, 0].expand(x.shape[0], -1)


def projections_of(mha: nn.MultiheadAttention) -> list[Tensor]:
    """Return the weights of the input projections (packed or separate) and of the output."""
    packed: Tensor | None = mha.in_proj_weight
    if packed is not None:
        return [packed, mha.out_proj.weight]
    return [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight, mha.out_proj.weight]
