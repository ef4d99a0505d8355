"""Vectors that the kernels of masked InfoNCE read beside the embeddings, computed with torch.

None of these functions waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranges(NamedTuple):
    """Ranges of rows of the other side that each of N rows sees: [low, high) and [0, shared).

    Both sides are sorted by key. Without keys, the fields are None.
    """

    low: Tensor | None = None  # (N,) int32
    high: Tensor | None = None  # (N,) int32
    shared: Tensor | None = None  # (1,) int32

    def pointers(self) -> dict[str, Tensor | None]:
        """Return the kernels' arguments, by name."""
        return dict(low_ptr=self.low, high_ptr=self.high, shared_ptr=self.shared)


def row_ranges(q_key: Tensor | None, c_key: Tensor | None) -> Ranges:
    """Return the candidates that each query sees: the candidates with its key or key -1."""
    if q_key is None or c_key is None:
        return Ranges()
    return Ranges(
        low=torch.searchsorted(c_key, q_key, out_int32=True),
        high=torch.searchsorted(c_key, q_key, right=True, out_int32=True),
        shared=torch.searchsorted(c_key, c_key.new_zeros(1), out_int32=True),
    )


def column_ranges(q_key: Tensor | None, c_key: Tensor | None) -> Ranges:
    """Return the queries that see each candidate: all for key -1, else the queries with its key."""
    if q_key is None or c_key is None:
        return Ranges()
    low = torch.searchsorted(q_key, c_key, out_int32=True)
    high = torch.searchsorted(q_key, c_key, right=True, out_int32=True)
    return Ranges(
        low=low,  # 0 for key -1: no query has a negative key
        high=high.masked_fill(c_key < 0, len(q_key)),
        shared=c_key.new_zeros(1, dtype=torch.int32),
    )


def id_ranks(q_id: Tensor | None, c_id: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the ids as int32 ranks among the candidates' ids; -1 if no candidate has the id.

    64-bit ids would take twice the registers.
    """
    if q_id is None or c_id is None:
        return None, None
    order = c_id.sort().values
    q_rank, c_rank = (torch.searchsorted(order, x, out_int32=True) for x in (q_id, c_id))
    found = order[q_rank.clamp(max=len(order) - 1)] == q_id
    return q_rank.masked_fill(~found, -1), c_rank


def id_rule(c_id: Tensor | None, drop: bool) -> str:
    """Return the kernels' constant IDS: "none", "drop", or "same" if equal ids are positives."""
    if c_id is None:
        return "none"
    return "drop" if drop else "same"


def logit_bound(q: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """Return an upper bound of |logits| as a () tensor.

    In 16 bits, the bound is NaN if an embedding holds NaN. In float32 it is infinite, so that the
    kernels compute exp(S - lse). The alternative, exp(S) exp(-lse), saves an exponential but has
    larger rounding errors.
    """
    if q.dtype == torch.float32:
        return q.new_full((), float("inf"))
    longest = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax() for x in (q, c)]
    return longest[0] * longest[1] * scale.abs()


def rounded_coefficients(side: Tensor) -> Tensor:
    """Return the coefficients (4, N), of which the first two are lse and weight, in float32.

    The weight is corrected for the rounding error of lse, which would affect a whole row. If the
    weight is 0 (as for candidates beyond the B-th in a symmetric loss), lse becomes inf, so that
    exp(s - lse) is 0 for any s.
    """
    rounded = side.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rounded[1] *= torch.exp(rounded[0] - side[0])
    rounded[0].masked_fill_(rounded[1] == 0, float("inf"))
    return rounded


def half_gain(row: Tensor, column: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the power of two that scales the largest weight to 2^12 .. 2^13; None unless float16.

    |dS| is then at most four times the largest scaled weight, so at most 2^15.
    """
    if dtype != torch.float16:
        return None
    sides = row[1] if column is None else torch.cat((row[1], column[1]))
    largest = sides.abs().nan_to_num(0.0, 0.0, 0.0).amax().clamp(min=1e-30)
    return torch.exp2(13 - largest.log2().ceil())
