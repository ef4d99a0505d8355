"""Launchers of the backward of masked InfoNCE: owner-computes, or dS in chunks.

Both forms return dq and dc, divided by the scale, and a list of partial sums of dS S, which is
empty if the scale needs no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..tiles import OPTIONS, arch_of, upcasts
from . import backward as bwd
from .plans import Plan, chunk, num_splits, plan
from .vectors import (
    Ranges,
    column_ranges,
    half_gain,
    id_ranks,
    id_rule,
    logit_bound,
    rounded_coefficients,
    row_ranges,
)

SWIZZLE = 16  # number of row blocks that read the same columns while the columns are in L2


@dataclass(frozen=True)
class Gradients:
    """Inputs of the backward kernels, and which gradients are needed."""

    q: Tensor  # (B, D)
    c: Tensor  # (C, D)
    bias: Tensor | None  # (C,), 0 or NaN
    scale: Tensor  # ()
    bound: Tensor  # (), upper bound of |logits|
    gain: Tensor | None  # (), a power of two; None except for float16
    target: Tensor  # (B,)
    q_id: Tensor | None  # (B,) int32
    c_id: Tensor | None  # (C,) int32
    row: Tensor  # (4, B), coefficients
    column: Tensor | None  # (4, C), coefficients
    row_ranges: Ranges  # the candidates that each query sees
    column_ranges: Ranges  # the queries that see each candidate
    ids: str  # "none", "drop" or "same"
    everything: bool
    need_dq: bool
    need_dc: bool
    need_scale: bool

    def shared_arguments(self) -> dict[str, Tensor | None]:
        """Return the arguments that pairs_kernel and owner_kernel take for either side."""
        return dict(
            bias_ptr=self.bias,
            scale_ptr=self.scale,
            bound_ptr=self.bound,
            gain_ptr=self.gain,
            target_ptr=self.target,
        )

    def flags(self) -> dict[str, bool | str]:
        """Return the constants of pairs_kernel and owner_kernel."""
        return dict(
            KEYS=self.has_keys,
            IDS=self.ids,
            EVERYTHING=self.everything,
            UPCAST=upcasts(self.q.dtype),
        )

    @property
    def has_keys(self) -> bool:
        """Whether queries and candidates have keys."""
        return self.row_ranges.low is not None


Result = tuple[Tensor, Tensor, list[Tensor]]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq (B, D) and dc (C, D), float32, both divided by scale, and the scale's gradient.

    ``row`` (4, B) and ``column`` (4, C) are coefficients (see load_coefficients in pairs.py). The
    other inputs are those of ``sweep``. The gradient of the scale, () float64, is the sum of
    dS_ij q_i . c_j. A gradient that is not needed has the shape (0,).
    """
    masked = c_key is not None or c_id is not None
    both = column is not None
    tiles = plan(q.shape[1], q.dtype, arch_of(q), both, everything, masked or need_scale)
    q, c = q.contiguous(), c.contiguous()
    if need_scale:  # the sum of dS S is divided by scale below, so scale must not be 0
        scale = scale.masked_fill(scale == 0, 1e-20)
    row = rounded_coefficients(row)
    column = None if column is None else rounded_coefficients(column)
    q_rank, c_rank = id_ranks(q_id, c_id)
    gradients = Gradients(
        q=q,
        c=c,
        bias=bias,
        scale=scale,
        bound=logit_bound(q, c, scale),
        gain=half_gain(row, column, q.dtype),
        target=target.contiguous(),
        q_id=q_rank,
        c_id=c_rank,
        row=row,
        column=column,
        row_ranges=row_ranges(q_key, c_key),
        column_ranges=column_ranges(q_key, c_key),
        ids=id_rule(c_id, drop),
        everything=everything,
        need_dq=need_dq,
        need_dc=need_dc,
        need_scale=need_scale,
    )
    compute = owner_gradients if tiles.backward == "owner" else chunked_gradients
    dq, dc, moments = compute(tiles, gradients)
    if not need_scale:
        return dq, dc, row.new_empty(0, dtype=torch.float64)
    gain = 1.0 if gradients.gain is None else gradients.gain.double()
    moment = torch.stack([part.sum(dtype=torch.float64) for part in moments]).sum()
    return dq, dc, moment / (scale.double() * gain)


def owner_gradients(tiles: Plan, given: Gradients) -> Result:
    """Compute S once for each side, and keep dS and the sums on chip."""
    dq = dc = given.q.new_empty(0, dtype=torch.float32)
    moments = []
    if given.need_dq or given.need_scale:
        out, moment = _owned(tiles, given, swap=False)
        dq = out if given.need_dq else dq
        moments = [] if moment is None else [moment]
    if given.need_dc:
        dc, _ = _owned(tiles, given, swap=True)
    return dq, dc, moments


def _owned(tiles: Plan, given: Gradients, swap: bool) -> tuple[Tensor, Tensor | None]:
    """Return dS c, and partial sums of dS S if needed; or, with ``swap``, dS^T q and None."""
    tile = tiles.owner
    x, y = (given.c, given.q) if swap else (given.q, given.c)
    x_id, y_id = (given.c_id, given.q_id) if swap else (given.q_id, given.c_id)
    x_side, y_side = (given.column, given.row) if swap else (given.row, given.column)
    ranges = given.column_ranges if swap else given.row_ranges
    blocks = triton.cdiv(len(x), tile.BM)
    splits = num_splits(blocks, triton.cdiv(len(y), tile.BN))
    out = x.new_empty(splits, *x.shape, dtype=torch.float32)
    moment = None
    if given.need_scale and not swap:
        moment = x.new_empty(splits, len(x), dtype=torch.float32)
    bwd.owner_kernel[(splits, blocks)](
        x_ptr=x,
        y_ptr=y,
        **given.shared_arguments(),
        **ranges.pointers(),
        x_id_ptr=x_id,
        y_id_ptr=y_id,
        x_side_ptr=x_side,
        y_side_ptr=y_side,
        out_ptr=out,
        moment_ptr=moment,
        X=len(x),
        Y=len(y),
        D=x.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BD=tile.BD,
        SWAP=swap,
        **given.flags(),
        **tile.launch,
        **OPTIONS,
    )
    return out[0] if splits == 1 else out.sum(0), moment


def chunked_gradients(tiles: Plan, given: Gradients) -> Result:
    """Write each chunk of dS once, and multiply the chunk by c and its transpose by q."""
    q, c = given.q, given.c
    height, width = chunk(len(q), len(c), tiles.apply_ds, tiles.chunk_bytes, q.element_size())
    ds = q.new_empty(height, width)
    dq = q.new_empty(q.shape if given.need_dq else 0, dtype=torch.float32)
    dc = c.new_empty(c.shape if given.need_dc else 0, dtype=torch.float32)
    moments = []
    for row0 in range(0, len(q), height):
        rows = range(row0, min(row0 + height, len(q)))
        for col0 in range(0, len(c), width):
            cols = range(col0, min(col0 + width, len(c)))
            moment = _write_ds(tiles, given, ds, rows, cols)
            moments += [] if moment is None else [moment]
            if given.need_dq:
                _apply_ds(tiles, given, ds, dq, rows, cols, transposed=False)
            if given.need_dc:
                _apply_ds(tiles, given, ds, dc, cols, rows, transposed=True)
    return dq, dc, moments


def _write_ds(
    tiles: Plan,
    given: Gradients,
    ds: Tensor,
    rows: range,
    cols: range,
) -> Tensor | None:
    """Write a chunk of dS, and return partial sums of dS S if the scale needs a gradient."""
    q, c, tile = given.q, given.c, tiles.pairs
    height, width = tiles.apply_ds.BM, tiles.apply_ds.BN
    grid = (
        triton.cdiv(len(rows), height) * (height // tile.BM),
        triton.cdiv(len(cols), width) * (width // tile.BN),
    )
    moment = q.new_empty(grid, dtype=torch.float32) if given.need_scale else None
    bwd.pairs_kernel[grid](
        q_ptr=q,
        c_ptr=c,
        **given.shared_arguments(),
        **given.row_ranges.pointers(),
        q_id_ptr=given.q_id,
        c_id_ptr=given.c_id,
        row_ptr=given.row,
        column_ptr=given.column,
        ds_ptr=ds,
        moment_ptr=moment,
        B=len(q),
        C=len(c),
        row0=rows.start,
        col0=cols.start,
        width=ds.shape[1],
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        BX=height,
        BY=width,
        GROUP=SWIZZLE,
        **given.flags(),
        **tile.launch,
        **OPTIONS,
    )
    return moment


def _apply_ds(
    tiles: Plan,
    given: Gradients,
    ds: Tensor,
    out: Tensor,
    x_span: range,
    y_span: range,
    transposed: bool,
) -> None:
    """Add dS y of a chunk to out[x_span]; the first chunk of y overwrites out[x_span].

    x = q and y = c, or the reverse if ``transposed``. If the chunk has few blocks, the sum over y
    is computed in splits, which are added up here.
    """
    tile = tiles.apply_ds
    y = given.q if transposed else given.c
    ranges = given.column_ranges if transposed else given.row_ranges
    x_block, y_block = (tile.BN, tile.BM) if transposed else (tile.BM, tile.BN)
    stride_x, stride_y = (1, ds.shape[1]) if transposed else (ds.shape[1], 1)
    first = y_span.start == 0
    grid = (triton.cdiv(y.shape[1], tile.BD), triton.cdiv(len(x_span), x_block))
    splits = num_splits(grid[0] * grid[1], triton.cdiv(len(y_span), y_block))
    out_rows = out[x_span.start : x_span.stop]
    written = out_rows if splits == 1 else out.new_empty(splits, *out_rows.shape)
    bwd.apply_ds_kernel[(*grid, splits)](
        ds_ptr=ds,
        y_ptr=y,
        gain_ptr=given.gain,
        **ranges.pointers(),
        out_ptr=written,
        X=len(out),
        Y=len(y),
        x0=x_span.start,
        x1=x_span.stop,
        y0=y_span.start,
        y1=y_span.stop,
        stride_x=stride_x,
        stride_y=stride_y,
        D=y.shape[1],
        BX=x_block,
        BY=y_block,
        BK=min(tile.BK, y_block),
        BD=tile.BD,
        KEYS=given.has_keys,
        FIRST=first or splits > 1,
        UPCAST=upcasts(given.q.dtype),
        **tile.launch,
        **OPTIONS,
    )
    if splits > 1:
        total = written.sum(0)
        out_rows.copy_(total) if first else out_rows.add_(total)
