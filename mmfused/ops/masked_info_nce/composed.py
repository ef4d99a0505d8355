"""The sweeps over all pairs in plain PyTorch, one block of rows at a time.

The equations and symbols are in :mod:`.reference`. Queries and candidates must be sorted by key.
The sweeps leave out the target of each row, and :mod:`.autograd` adds the target afterwards. So a
row without other pairs has a logsumexp of exactly -inf. The statistics are float64: rounding a
logsumexp of 20 to float32 would cause a relative error of 1e-6 in all probabilities of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of one block of logits.
BLOCK_BYTES = 16 * 2**20
# Largest allowed shift: exp(-2 * shift) must be a normal number, and the product of exp(2 * shift)
# and an upstream gradient of 2^24 (loss scaling) must not overflow.
SAFE_SHIFT = {torch.float32: 36.0, torch.float64: 320.0}


class SweepInputs(NamedTuple):
    """The inputs of both sweeps, sorted by key."""

    q: Tensor  # (B, D)
    c: Tensor  # (C, D)
    bias: Tensor | None  # (C,), added to the logits of a column: 0, or NaN for broken candidates
    scale: Tensor  # ()
    target: Tensor  # (B,), indices into the sorted candidates
    q_key: Tensor | None  # (B,)
    c_key: Tensor | None  # (C,)
    q_id: Tensor | None  # (B,)
    c_id: Tensor | None  # (C,)
    drop: bool  # whether to leave out further positives: other candidates with the row's id


def sweep_blocks(
    inputs: SweepInputs,
    columns: bool,
    everything: bool,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of rows and columns, see :mod:`.terms`, and the targets' dot products.

    Args:
        inputs: embeddings, scale and labels.
        columns: whether to compute the statistics of the columns.
        everything: whether to compute statistics 1 to 4 in addition to the logsumexp.
        margin: leave out pairs whose dot product exceeds that of the row's target by more than
            this number, unless the candidate has key -1.

    Returns:
        row: (5, B), the statistics of the rows.
        column: (5, C), the statistics of the columns; (5, 0) without ``columns``.
        dots: (B,), the dot products q . c of the targets. If a block contains the target, the dot
            product is taken from the matrix product of the block.
    """
    inputs = _widened(inputs)
    q, c = inputs.q, inputs.c
    shift = _safe_shift(q, c, inputs.bias, inputs.scale)
    row = torch.zeros(5, len(q), dtype=torch.float64, device=q.device)
    column = row.new_zeros(5, len(c) if columns else 0)
    dots = (q * c[inputs.target]).sum(-1)
    if shift is None:
        row[0], column[0] = float("-inf"), float("-inf")
    for block in _blocks(inputs, dots, margin, update_dots=True):
        sides = [(1, row[:, block.rows])]
        if columns:
            sides.append((0, column[:, block.columns]))
        if everything:
            for axis, out in sides:
                block.count(axis, out)
        logits = block.fill(block.logits, float("-inf"))
        if shift is not None:
            logits.sub_(shift).exp_()  # one exponential serves rows and columns
        for axis, out in sides:
            if shift is None:
                out[0] = torch.logaddexp(out[0], _logsumexp(logits, axis))
            else:
                out[0] += logits.sum(axis)
    if shift is not None:
        row[0].log_().add_(shift)
        column[0].log_().add_(shift)
    return row, column, dots


def sweep_blocks_backward(
    row: Tensor,
    column: Tensor | None,
    inputs: SweepInputs,
    everything: bool,
    need_dq: bool,
    need_dc: bool,
    need_scale: bool,
    dots: Tensor,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq / scale = dS c, dc / scale = dS^T q, and the gradient of the scale.

    ``row`` (4, B) and ``column`` (4, C) hold four coefficients for each row and each column: lse
    (the logsumexp with the target), weight, positive and uniform. They define a term of each pair:

        weight * exp(S_ij - lse) - uniform - (positive if the pair is a further positive)

    dS_ij is the term with the coefficients of row i. If ``column`` is given, the term with the
    coefficients of column j is added.

    Without ``everything``, uniform and positive are not read. ``dots`` (B,) holds the dot products
    of the targets. The gradient of the scale is a float64 scalar, the sum of dS_ij q_i . c_j. A
    gradient that is not needed has shape (0,).
    """
    inputs = _widened(inputs)
    q, c = inputs.q, inputs.c
    shift = _safe_shift(q, c, inputs.bias, inputs.scale)
    dq = torch.zeros_like(q) if need_dq or need_scale else q.new_empty(0)
    dc = torch.zeros_like(c) if need_dc else c.new_empty(0)
    for block in _blocks(inputs, dots, margin):
        sides = [row[:, block.rows, None]]
        if column is not None:
            sides.append(column[:, block.columns])
        ds = _softmax_gradient(block.logits, sides, shift)
        if everything:
            ds.sub_(sum(side[3] for side in sides))
            if block.same is not None:
                ds.sub_(block.same * sum(side[2] for side in sides))
        ds = block.fill(ds, 0.0)  # last: where a row's lse is NaN, excluded pairs are NaN too
        if need_dq or need_scale:
            dq[block.rows].addmm_(ds, c[block.columns])
        if need_dc:
            dc[block.columns].addmm_(ds.T, q[block.rows])
    d_scale = dq.new_empty(0, dtype=torch.float64)
    if need_scale:
        d_scale = (q * dq).sum(dtype=torch.float64)
    return dq if need_dq else dq.new_empty(0), dc, d_scale


def _softmax_gradient(logits: Tensor, sides: list[Tensor], shift: float | None) -> Tensor:
    """Return the sum over ``sides`` of weight * exp(logits - lse); may overwrite ``logits``."""
    # Where the weight is 0, lse = inf keeps exp(logits - lse) from overflowing.
    lses = [side[0].masked_fill(side[1] == 0, float("inf")) for side in sides]
    if shift is not None:
        factors = [
            (side[1] * (shift - lse.double()).exp()).to(logits.dtype)
            for side, lse in zip(sides, lses, strict=True)
        ]
        return logits.sub_(shift).exp_().mul_(sum(factors))
    terms = [(logits - lse).exp_().mul_(side[1]) for side, lse in zip(sides, lses, strict=True)]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _logsumexp(logits: Tensor, axis: int) -> Tensor:
    largest = logits.amax(axis, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    return (logits - largest).exp_().sum(axis).double().log().add_(largest.squeeze(axis))


class _Block(NamedTuple):
    """The logits of a slice of rows and a slice of columns, and the pairs that count."""

    logits: Tensor  # (R, M)
    rows: slice
    columns: slice
    targets: tuple[Tensor, Tensor]  # row and column indices of the targets inside the block
    excluded: Tensor | None  # (R, M) bool: pairs that do not count; None if all pairs count
    same: Tensor | None  # (R, M) bool: further positives; None if there can be none

    def fill(self, tensor: Tensor, value: float) -> Tensor:
        """Write ``value`` into each target and each excluded pair of ``tensor``, in place."""
        tensor[self.targets] = value
        return tensor if self.excluded is None else tensor.masked_fill_(self.excluded, value)

    def count(self, axis: int, out: Tensor) -> None:
        """Add this block's counts and sums over ``axis`` to statistics 1 to 4 in ``out`` (5, N)."""
        counts = self.fill(torch.ones_like(self.logits), 0.0)
        values = self.fill(self.logits.clone(), 0.0)
        out[3] += counts.sum(axis)
        out[4] += values.sum(axis)
        if self.same is not None:
            out[1] += self.same.sum(axis)
            out[2] += values.mul_(self.same).sum(axis)


class _Columns(NamedTuple):
    """A range of candidates that may count for a block of rows."""

    low: int
    high: int
    several_keys: bool = False  # whether the rows of the block have different keys
    shared: bool = False  # whether the candidates have key -1; the margin does not apply to key -1


def _blocks(
    inputs: SweepInputs,
    dots: Tensor,
    margin: float | None,
    update_dots: bool = False,
) -> Iterator[_Block]:
    """Yield blocks that cover all pairs that count.

    With keys, a block of rows is paired with two ranges of candidates: the candidates with key -1,
    and the candidates with the keys of the rows. ``update_dots``: whether to write the dot products
    of the targets into ``dots``.
    """
    q, c, target = inputs.q, inputs.c, inputs.target
    rows_at_once = max(16, BLOCK_BYTES // (4 * len(c)))
    starts = list(range(0, len(q), rows_at_once))
    ends = [min(start + rows_at_once, len(q)) for start in starts]
    ranges = [[_Columns(0, len(c))]] * len(starts)
    if inputs.q_key is not None and inputs.c_key is not None:
        first, last = inputs.q_key[starts], inputs.q_key[[end - 1 for end in ends]]
        ranges = _ranges(first, last, inputs.c_key)
    for start, end, parts in zip(starts, ends, ranges, strict=True):
        for part in parts:
            rows, columns = slice(start, end), slice(part.low, part.high)
            logits = torch.mm(q[rows], c[columns].T)
            inside = (target[rows] >= part.low) & (target[rows] < part.high)
            at = inside.nonzero()[:, 0]
            targets = at, target[rows][at] - part.low
            if update_dots:
                dots[rows][at] = logits[targets]
            logits.mul_(inputs.scale)
            if inputs.bias is not None:
                logits.add_(inputs.bias[columns])
            excluded, same = _key_and_id_masks(inputs, rows, columns, targets, part.several_keys)
            if margin is not None and not part.shared:
                above = logits > ((dots[rows, None] + margin) * inputs.scale)
                same = None if same is None else same & ~above
                excluded = above if excluded is None else excluded | above
            yield _Block(logits, rows, columns, targets, excluded, same)


def _key_and_id_masks(
    inputs: SweepInputs,
    rows: slice,
    columns: slice,
    targets: tuple[Tensor, Tensor],
    several_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the fields ``excluded`` and ``same`` of a block, without the margin."""
    excluded = None
    if several_keys and inputs.q_key is not None and inputs.c_key is not None:
        excluded = inputs.q_key[rows, None] != inputs.c_key[columns]
    if inputs.q_id is None or inputs.c_id is None:
        return excluded, None
    same = inputs.q_id[rows, None] == inputs.c_id[columns]
    if excluded is not None:
        same &= ~excluded
    same[targets] = False
    if inputs.drop:
        return same if excluded is None else excluded | same, None
    return excluded, same


def _ranges(first: Tensor, last: Tensor, c_key: Tensor) -> list[list[_Columns]]:
    """Return the ranges of candidates for blocks of rows with keys from ``first`` to ``last``."""
    num_shared = int(torch.searchsorted(c_key, 0))  # candidates with key -1
    # Rows with key -1 need only the shared range.
    low = torch.searchsorted(c_key, first).clamp_(min=num_shared).tolist()
    high = torch.searchsorted(c_key, last, right=True).tolist()
    several = (first != last).tolist()
    ranges = [
        (_Columns(0, num_shared, shared=True), _Columns(*part))
        for part in zip(low, high, several, strict=True)
    ]
    return [[part for part in parts if part.high > part.low] for parts in ranges]


def _widened(inputs: SweepInputs) -> SweepInputs:
    """Return the inputs with embeddings and scale in float32 or float64."""
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    return inputs._replace(
        q=inputs.q.to(dtype),
        c=inputs.c.to(dtype),
        scale=inputs.scale.to(dtype),
    )


def _safe_shift(
    q: Tensor,
    c: Tensor,
    bias: Tensor | None,
    scale: Tensor,
) -> float | None:
    """Return an upper bound of |logits|, to subtract instead of the maximum of each row and column.

    Returns None if the exponentials could underflow or overflow with this shift.
    """
    if len(q) == 0 or (bias is not None and bias.any()):  # some biases are NaN
        return None
    longest = torch.linalg.vector_norm(q, dim=1).max() * torch.linalg.vector_norm(c, dim=1).max()
    bound = float(longest * scale.abs())
    return bound if bound <= SAFE_SHIFT[q.dtype] else None  # None for NaN too
