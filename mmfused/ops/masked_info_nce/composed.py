"""The sweeps over all pairs in plain PyTorch, a block of rows at a time.

Nothing of size B x C is ever stored. Queries and candidates come sorted by key. The target of each
row is left out here (:mod:`.autograd` adds it): a row with nothing else then gets exactly -inf, and
a loss near 0 keeps its digits. The statistics are float64: a logsumexp of 20 rounded to float32
would put an error of 1e-6 on a whole row of probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of one block of logits: exponential and sums then find it in the cache.
BLOCK_BYTES = 16 * 2**20
# Bounds of a shift for which exp(-2 * shift) is still a normal number, and exp(2 * shift) has room
# for an upstream gradient of 2^24 (loss scaling).
SAFE_SHIFT = {torch.float32: 36.0, torch.float64: 320.0}


class SweepInputs(NamedTuple):
    """Inputs of both sweeps; queries and candidates are sorted by key."""

    q: Tensor  # (B, D)
    c: Tensor  # (C, D)
    bias: Tensor | None  # (C,), added to the logits of a column
    scale: Tensor  # ()
    target: Tensor  # (B,), places among the sorted candidates
    q_key: Tensor | None  # (B,)
    c_key: Tensor | None  # (C,)
    q_id: Tensor | None  # (B,)
    c_id: Tensor | None  # (C,)
    drop: bool  # whether another candidate with the row's id is left out; else it is a positive


def sweep_blocks(
    inputs: SweepInputs,
    columns: bool,
    everything: bool,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute statistics over all pairs but the targets, and the products of the targets.

    A product above that of the target plus ``margin`` does not count, unless the candidate's key
    is -1.

    Returns:
        Statistics of the rows (5, B) and, with ``columns``, of the columns (5, C), else (5, 0).
        Statistic 0 is the logsumexp of the allowed logits. With ``everything``, 1 and 2 are number
        and sum of the further positives, 3 and 4 those of all allowed pairs. Third, the targets'
        products q . c (B,), from the same matrix product as the others where that holds them.
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
    """Compute dq and dc over scale, dS c and dS^T q, and the gradient of the scale () float64.

    dS_ij = sum over row i and column j of weight * exp(S_ij - lse) - positive - every, and the
    gradient of the scale is the sum of dS_ij q_i . c_j.

    ``row`` (4, B) and ``column`` (4, C): lse, weight, and with ``everything`` what is subtracted
    from further positives and from every pair. ``dots`` (B,): the targets' products. A gradient
    that is not needed is (0,).
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
        ds = block.fill(ds, 0.0)  # last: in a broken row everything else is NaN
        if need_dq or need_scale:
            dq[block.rows].addmm_(ds, c[block.columns])
        if need_dc:
            dc[block.columns].addmm_(ds.T, q[block.rows])
    d_scale = dq.new_empty(0, dtype=torch.float64)
    if need_scale:
        d_scale = (q * dq).sum(dtype=torch.float64)
    return dq if need_dq else dq.new_empty(0), dc, d_scale


def _softmax_gradient(logits: Tensor, sides: list[Tensor], shift: float | None) -> Tensor:
    """Return the sum over ``sides`` of weight * exp(logits - lse); overwrites ``logits``."""
    # Without a weight exp(logit - lse) must not overflow.
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
    """The logits of a slice of rows and a slice of columns, and which of the pairs count."""

    logits: Tensor  # (R, M)
    rows: slice
    columns: slice
    targets: tuple[Tensor, Tensor]  # indices in the block of the targets that it holds
    excluded: Tensor | None  # (R, M) bool; None where every pair counts
    same: Tensor | None  # (R, M) bool: further positives; None where there are none

    def fill(self, tensor: Tensor, value: float) -> Tensor:
        """Write ``value`` into each target and each excluded pair of ``tensor``, in place."""
        tensor[self.targets] = value
        return tensor if self.excluded is None else tensor.masked_fill_(self.excluded, value)

    def count(self, axis: int, out: Tensor) -> None:
        """Add numbers and sums over ``axis`` to the statistics ``out`` (5, N)."""
        counts = self.fill(torch.ones_like(self.logits), 0.0)
        values = self.fill(self.logits.clone(), 0.0)
        out[3] += counts.sum(axis)
        out[4] += values.sum(axis)
        if self.same is not None:
            out[1] += self.same.sum(axis)
            out[2] += values.mul_(self.same).sum(axis)


class _Columns(NamedTuple):
    """A range of candidates that a block of rows sees."""

    low: int
    high: int
    several_keys: bool = False  # pairs of two keys are excluded
    shared: bool = False  # key -1, which the margin spares


def _blocks(
    inputs: SweepInputs,
    dots: Tensor,
    margin: float | None,
    update_dots: bool = False,
) -> Iterator[_Block]:
    """Generate blocks that cover all allowed pairs.

    With keys, a block of rows sees the candidates with key -1, which are sorted first, and the
    range of candidates with its own keys. ``update_dots``: write the targets' products into dots.
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
    """Return which pairs of a block are excluded, and which are further positives; None: none."""
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
    """Return what blocks of rows see whose keys go from ``first`` to ``last``."""
    shared = int(torch.searchsorted(c_key, 0))
    # A row with key -1, that of its target, sees no more than the shared range.
    low = torch.searchsorted(c_key, first).clamp_(min=shared).tolist()
    high = torch.searchsorted(c_key, last, right=True).tolist()
    several = (first != last).tolist()
    ranges = [
        (_Columns(0, shared, shared=True), _Columns(*own))
        for own in zip(low, high, several, strict=True)
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


def _safe_shift(q: Tensor, c: Tensor, bias: Tensor | None, scale: Tensor) -> float | None:
    """Return a bound of |logits| to use in place of the maximum of every row and column.

    None where exponentials could then underflow.
    """
    if len(q) == 0 or (bias is not None and bias.any()):  # NaN
        return None
    longest = torch.linalg.vector_norm(q, dim=1).max() * torch.linalg.vector_norm(c, dim=1).max()
    bound = float(longest * scale.abs())
    return bound if bound <= SAFE_SHIFT[q.dtype] else None  # None for NaN too
