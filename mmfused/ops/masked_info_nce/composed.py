"""The sweep over all pairs in plain PyTorch, one block of rows at a time: nothing of size B x C is
ever alive.

Queries and candidates come sorted by key. Each row's target is left out here (:mod:`.autograd`
treats it by itself): a row with nothing else then gets exactly -inf, and a loss near 0 keeps its
digits. The statistics are float64: a logsumexp of 20 rounded to float32 would put an error of 1e-6
on a whole row of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20  # of one block of logits, so that exponential and sums find it in cache
# exp(-2 * shift) is still a normal number, and exp(2 * shift) has room for an upstream gradient of
# 2^24 (loss scaling)
SAFE_SHIFT = {torch.float32: 36.0, torch.float64: 320.0}


def sweep(
    q: Tensor,
    c: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    target: Tensor,
    q_key: Tensor | None,
    c_key: Tensor | None,
    q_id: Tensor | None,
    c_id: Tensor | None,
    drop: bool,
    columns: bool,
    everything: bool,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over all pairs but the targets: for the rows (5, B), and for the columns (5, C)
    where ``columns``; and the targets' products q . c (B,), from the same product of matrices as
    the others where it holds them.

    Row 0: logsumexp of the allowed logits. With ``everything`` also: 1, 2 number and sum of the
    further positives, 3, 4 of all allowed pairs. ``bias`` (C,) is added to the logits of a column;
    a product above the target's plus ``margin`` does not count, unless the candidate is for
    everybody."""
    q, c, scale = _widened(q, c, scale)
    shift = _safe_shift(q, c, bias, scale)
    row, column = (
        torch.zeros(5, n, dtype=torch.float64, device=q.device)
        for n in (len(q), len(c) if columns else 0)
    )
    dots = (q * c[target]).sum(-1)
    if shift is None:
        row[0], column[0] = float("-inf"), float("-inf")
    for block in _blocks(
        q, c, bias, scale, target, (q_key, c_key), (q_id, c_id), drop, dots, margin, own_dots=True
    ):
        sides = ((1, row, block.rows), (0, column, block.columns))[: 1 + columns]
        if everything:
            for axis, out, where in sides:
                block.count(axis, out[:, where])
        logits = block.hidden(block.logits, float("-inf"))
        if shift is not None:
            logits.sub_(shift).exp_()  # one exponential serves rows and columns
        for axis, out, where in sides:
            if shift is None:
                out[0, where] = torch.logaddexp(out[0, where], _logsumexp(logits, axis))
            else:
                out[0, where] += logits.sum(axis)
    if shift is not None:
        row[0].log_().add_(shift)
        column[0].log_().add_(shift)
    return row, column, dots


def sweep_backward(
    row: Tensor,
    column: Tensor | None,
    q: Tensor,
    c: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    target: Tensor,
    q_key: Tensor | None,
    c_key: Tensor | None,
    q_id: Tensor | None,
    c_id: Tensor | None,
    drop: bool,
    everything: bool,
    need_dq: bool,
    need_dc: bool,
    need_scale: bool,
    dots: Tensor,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dc) over scale, and the scale's gradient () float64: dS c, dS^T q, and the sum of dS_ij
    q_i . c_j, with dS_ij = sum over row i and column j of weight * exp(S_ij - lse) - positive -
    any.

    row (4, B) and column (4, C): lse, weight, and with ``everything`` what is taken off further
    positives and off every pair. ``dots`` (B,): the targets' products. A gradient that is not
    needed is (0,)."""
    q, c, scale = _widened(q, c, scale)
    shift = _safe_shift(q, c, bias, scale)
    dq, dc = (
        torch.zeros_like(x) if needed else x.new_empty(0)
        for x, needed in ((q, need_dq or need_scale), (c, need_dc))
    )
    for block in _blocks(
        q, c, bias, scale, target, (q_key, c_key), (q_id, c_id), drop, dots, margin
    ):
        sides = [row[:, block.rows, None]] + ([] if column is None else [column[:, block.columns]])
        lses = [
            side[0].masked_fill(side[1] == 0, float("inf")) for side in sides
        ]  # no weight: exp(logit - lse) must not overflow
        logits = block.logits
        if shift is not None:
            factors = [
                (side[1] * (shift - lse.double()).exp()).to(q.dtype)
                for side, lse in zip(sides, lses, strict=True)
            ]
            grad = logits.sub_(shift).exp_().mul_(sum(factors))
        else:
            grad = 0
            for side, lse in zip(sides, lses, strict=True):
                grad = grad + (logits - lse).exp_().mul_(side[1])
        if everything:
            grad.sub_(sum(side[3] for side in sides))
            if block.same is not None:
                grad.sub_(block.same * sum(side[2] for side in sides))
        grad = block.hidden(grad, 0.0)  # last: of a broken row everything else is NaN
        if need_dq or need_scale:
            dq[block.rows].addmm_(grad, c[block.columns])
        if need_dc:
            dc[block.columns].addmm_(grad.T, q[block.rows])
    d_scale = (
        (q * dq).sum(dtype=torch.float64) if need_scale else dq.new_empty(0, dtype=torch.float64)
    )
    return dq if need_dq else dq.new_empty(0), dc, d_scale


def _logsumexp(logits: Tensor, axis: int) -> Tensor:
    largest = logits.amax(axis, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    return (logits - largest).exp_().sum(axis).double().log().add_(largest.squeeze(axis))


class _Block:
    """The logits (R, M) of a slice of rows and a slice of columns, and which of the pairs count."""

    def __init__(self, logits, rows, columns, targets, denied, same):
        self.logits, self.rows, self.columns = logits, rows, columns
        self.targets = targets  # (row, column) indices of the targets inside
        self.denied = denied  # (R, M) bool, or None where every pair counts
        self.same = same  # (R, M) bool: further positives; None where there are none

    def hidden(self, tensor: Tensor, value: float) -> Tensor:
        """``tensor`` with ``value`` in each target and in each pair that does not count, in place."""
        tensor[self.targets] = value
        return tensor if self.denied is None else tensor.masked_fill_(self.denied, value)

    def count(self, axis: int, out: Tensor) -> None:
        counts = self.hidden(torch.ones_like(self.logits), 0.0)
        values = self.hidden(self.logits.clone(), 0.0)
        out[3] += counts.sum(axis)
        out[4] += values.sum(axis)
        if self.same is not None:
            out[1] += self.same.sum(axis)
            out[2] += values.mul_(self.same).sum(axis)


def _blocks(q, c, bias, scale, target, keys, ids, drop, dots, margin, own_dots=False):
    """Blocks that cover all allowed pairs. With keys, a block of rows sees the candidates for
    everybody (key -1, sorted first) and the range of candidates with its own keys; pairs of two
    keys are denied where a block holds several."""
    rows_at_once = max(16, BLOCK_BYTES // (4 * len(c)))
    starts = list(range(0, len(q), rows_at_once))
    ends = [min(start + rows_at_once, len(q)) for start in starts]
    ranges = [[(0, len(c), False, False)]] * len(starts)
    if keys[0] is not None:
        ranges = _ranges(keys[0][starts], keys[0][[end - 1 for end in ends]], keys[1])
    for start, end, parts in zip(starts, ends, ranges, strict=True):
        for low, high, mixed, spared in parts:
            rows, columns = slice(start, end), slice(low, high)
            logits = torch.mm(q[rows], c[columns].T)
            inside = (target[rows] >= low) & (target[rows] < high)
            at = inside.nonzero()[:, 0]
            targets = at, target[rows][at] - low
            if own_dots:
                dots[rows][at] = logits[targets]
            logits.mul_(scale)
            if bias is not None:
                logits.add_(bias[columns])
            denied = keys[0][rows, None] != keys[1][columns] if mixed else None
            same = None if ids[0] is None else ids[0][rows, None] == ids[1][columns]
            if same is not None and denied is not None:
                same &= ~denied
            if same is not None:
                same[targets] = False
            if same is not None and drop:
                denied, same = same if denied is None else denied | same, None
            if margin is not None and not spared:
                above = logits > ((dots[rows, None] + margin) * scale)
                same = None if same is None else same & ~above
                denied = above if denied is None else denied | above
            yield _Block(logits, rows, columns, targets, denied, same)


def _ranges(first: Tensor, last: Tensor, c_key: Tensor) -> list[list[tuple[int, int, bool, bool]]]:
    shared = int(torch.searchsorted(c_key, 0))
    # A row whose own key is -1 (its target is for everybody) has no more than the shared range.
    low = torch.searchsorted(c_key, first).clamp_(min=shared).tolist()
    high = torch.searchsorted(c_key, last, right=True).tolist()
    several = (first != last).tolist()
    own = zip(low, high, several, strict=True)
    return [
        [part for part in ((0, shared, False, True), (*mine, False)) if part[1] > part[0]]
        for mine in own
    ]


def _widened(q: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(dtype), c.to(dtype), scale.to(dtype)


def _safe_shift(q: Tensor, c: Tensor, bias: Tensor | None, scale: Tensor) -> float | None:
    """A bound of |logits| that may stand in for every row's and column's maximum; None where
    exponentials could then underflow.
    """
    if len(q) == 0 or (bias is not None and bias.any()):  # NaN
        return None
    bound = float(
        torch.linalg.vector_norm(q, dim=1).max()
        * torch.linalg.vector_norm(c, dim=1).max()
        * scale.abs()
    )
    return bound if bound <= SAFE_SHIFT[q.dtype] else None  # False for NaN too
