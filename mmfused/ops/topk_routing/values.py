"""Values that routing does not take, on CUDA and in compiled graphs, where nothing can raise: their
tokens become NaN.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Values(NamedTuple):
    """Arguments of routing that can be indexed with, and which tokens had others."""

    segments: Tensor | None  # (T,) in [0, S)
    indices: Tensor | None  # (T, k) in [0, E)
    usable: Tensor | None  # (E,) or (T, E) bool, the experts a token may use, at least k
    void: Tensor | None  # (T,) or () bool, the tokens that become NaN


def take(
    k: int,
    num_experts: int,
    segments: Tensor | None,
    num_segments: int,
    available: Tensor | None,
    indices: Tensor | None,
) -> Values:
    """A void token may use every expert, so that its choice is of k different ones like any other."""
    void, usable = [], None
    if segments is not None:
        given, segments = segments, segments.clamp(0, num_segments - 1)
        void.append(given != segments)
    if available is not None:
        few = available.sum(1) < k
        row = 0 if segments is None else segments
        void.append(few[row])
        usable = available[row] | reduce(torch.logical_or, void)[..., None]
    if indices is not None:
        given, indices = indices, indices.clamp(0, num_experts - 1)
        void.append((given != indices).any(1))
    return Values(segments, indices, usable, reduce(torch.logical_or, void) if void else None)


def largest(key: Tensor, usable: Tensor | None, k: int) -> Tensor:
    """(T, k), columns of the k largest of each row, ties to the lower column: k rounds of argmax,
    which names the first of equals. NaN counts as the least, but before what is not usable."""
    limits = torch.finfo(key.dtype)
    key = key.detach().nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    key = key if usable is None else key.masked_fill(~usable, float("-inf"))
    chosen = []
    for _ in range(k):
        chosen.append(key.argmax(-1, keepdim=True))
        key = key.scatter(1, chosen[-1], float("-inf"))
    return torch.cat(chosen, 1)


def spoil(logits: Tensor, void: Tensor | None, mask: Tensor | None) -> Tensor:
    """NaN, of which a gradient is NaN too, in the rows of void tokens that are not masked."""
    if void is None:
        return logits
    void = void if mask is None else void & ~mask
    return (
        logits
        + torch.zeros_like(void, dtype=logits.dtype).masked_fill(void, float("nan"))[..., None]
    )
