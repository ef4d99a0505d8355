"""Masked InfoNCE: launchers around the kernels. Shapes and maths:
mmfused/ops/masked_info_nce/functional.py and composed.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, launch, upcasts
from . import backward as bwd
from . import forward as fwd
from .plans import Plan, Tile, chunk, plan, splits, sweep_grid

__all__ = ["plan", "sweep", "sweep_backward"]

SWIZZLE = 16  # row blocks that share the columns in L2


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
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, D), c (C, D), sorted by key -> statistics of the rows (5, B) and, where ``columns``, of
    the columns (5, C), float64; and the targets' products q . c (B,) float32."""
    tiles = plan(q.shape[1], q.dtype, arch_of(q), columns, everything)
    q, c, target = q.contiguous(), c.contiguous(), target.contiguous()
    tile, stats = tiles.sweep, 6 if everything else 2
    parts, length, groups, blocks = sweep_grid(
        len(q), len(c), tile, tiles.partial_bytes, stats * columns
    )
    row = q.new_empty(parts, stats, len(q), dtype=torch.float32)
    column = q.new_empty(groups, stats, len(c) if columns else 0, dtype=torch.float32)
    if (
        c_key is not None or blocks > 1
    ):  # a tile that a group does not visit, or the first of several that it adds up
        column[:, 0] = float("-inf")
        column[:, 1:] = 0
    elif (
        everything and _kind(c_id, drop) != "same"
    ):  # there are no further positives, whose sums the kernel would write
        column[:, 2:4] = 0
    launch(
        fwd.sweep_kernel,
        (parts, groups),
        q,
        c,
        bias,
        scale,
        _bound(q, c, scale),
        target,
        *_row_ranges(q_key, c_key),
        *_ids(q_id, c_id),
        row,
        column,
        len(q),
        len(c),
        blocks,
        length,
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        KEYS=c_key is not None,
        IDS=_kind(c_id, drop),
        COLUMNS=columns,
        EVERYTHING=everything,
        MERGE=blocks > 1,
        UPCAST=upcasts(q.dtype),
        **tile.launch,
    )
    return (
        _merged(row, tiles, everything),
        _merged(column, tiles, everything),
        _target_products(q, c, target, tile),
    )


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
    """Coefficients row (4, B), column (4, C) and what ``sweep`` took -> dq (B, D) and dc (C, D)
    over scale, float32, and the sum of dS_ij q_i . c_j, the scale's gradient, () float64; (0,) for
    one that is not needed, which costs nothing then."""
    masked = c_key is not None or c_id is not None
    tiles = plan(
        q.shape[1], q.dtype, arch_of(q), column is not None, everything, masked or need_scale
    )
    q, c, target = q.contiguous(), c.contiguous(), target.contiguous()
    if need_scale:  # found from the logits
        scale = scale.masked_fill(scale == 0, 1e-20)
    row, column = _coefficients(row), None if column is None else _coefficients(column)
    common = (bias, scale, _bound(q, c, scale), _gain(row, column, q.dtype), target)
    ranges = (_row_ranges(q_key, c_key), _column_ranges(q_key, c_key))
    flags = dict(
        KEYS=c_key is not None,
        IDS=_kind(c_id, drop),
        EVERYTHING=everything,
        UPCAST=upcasts(q.dtype),
    )
    run = _owner if tiles.backward == "owner" else _chunked
    dq, dc, moments = run(
        tiles,
        row,
        column,
        q,
        c,
        common,
        ranges,
        _ids(q_id, c_id),
        flags,
        need_dq,
        need_dc,
        need_scale,
    )
    if not need_scale:
        return dq, dc, row.new_empty(0, dtype=torch.float64)
    gain = 1.0 if common[3] is None else common[3].double()
    return (
        dq,
        dc,
        torch.stack([part.sum(dtype=torch.float64) for part in moments]).sum()
        / (scale.double() * gain),
    )


def _owner(
    tiles: Plan,
    row,
    column,
    q,
    c,
    common,
    ranges,
    ids,
    flags,
    need_dq,
    need_dc,
    need_scale,
):
    """dq, dc, and parts of the sum of dS S."""
    tile, gradients, moments = tiles.owner, [], []
    for swap, needed in ((False, need_dq or need_scale), (True, need_dc)):
        if not needed:
            gradients.append(q.new_empty(0, dtype=torch.float32))
            continue
        x, y = (c, q) if swap else (q, c)
        x_side, y_side = (column, row) if swap else (row, column)
        x_id, y_id = reversed(ids) if swap else ids
        blocks = triton.cdiv(len(x), tile.BM)
        parts = splits(blocks, triton.cdiv(len(y), tile.BN))
        out = x.new_empty(parts, *x.shape, dtype=torch.float32)
        moment = (
            x.new_empty(parts, len(x), dtype=torch.float32) if need_scale and not swap else None
        )
        moments += [] if moment is None else [moment]
        launch(
            bwd.owner_kernel,
            (parts, blocks),
            x,
            y,
            *common,
            *ranges[swap],
            x_id,
            y_id,
            x_side,
            y_side,
            out,
            moment,
            len(x),
            len(y),
            D=x.shape[1],
            BM=tile.BM,
            BN=tile.BN,
            BD=tile.BD,
            SWAP=swap,
            **flags,
            **tile.launch,
        )
        gradients.append(out[0] if parts == 1 else out.sum(0))
    return gradients[0] if need_dq else q.new_empty(0, dtype=torch.float32), gradients[1], moments


def _chunked(
    tiles: Plan,
    row,
    column,
    q,
    c,
    common,
    ranges,
    ids,
    flags,
    need_dq,
    need_dc,
    need_scale,
):
    """dq, dc, and parts of the sum of dS S."""
    tile, moments, bx, by = tiles.pairs, [], tiles.spread.BM, tiles.spread.BN
    height, width = chunk(len(q), len(c), tiles.spread, tiles.chunk_bytes, q.element_size())
    ds = q.new_empty(height, width)
    dq, dc = (
        x.new_empty(x.shape if needed else 0, dtype=torch.float32)
        for x, needed in ((q, need_dq), (c, need_dc))
    )
    for row0 in range(0, len(q), height):
        rows = (row0, min(row0 + height, len(q)))
        for col0 in range(0, len(c), width):
            cols = (col0, min(col0 + width, len(c)))
            grid = (
                triton.cdiv(rows[1] - row0, bx) * (bx // tile.BM),
                triton.cdiv(cols[1] - col0, by) * (by // tile.BN),
            )
            moment = q.new_empty(grid, dtype=torch.float32) if need_scale else None
            moments += [] if moment is None else [moment]
            launch(
                bwd.pairs_kernel,
                grid,
                q,
                c,
                *common,
                *ranges[0],
                *ids,
                row,
                column,
                ds,
                moment,
                len(q),
                len(c),
                row0,
                col0,
                width,
                D=q.shape[1],
                BM=tile.BM,
                BN=tile.BN,
                BK=tile.BK,
                BX=bx,
                BY=by,
                GROUP=SWIZZLE,
                **flags,
                **tile.launch,
            )
            if need_dq:
                _spread(
                    tiles.spread,
                    ds,
                    (width, 1),
                    c,
                    common[3],
                    ranges[0],
                    dq,
                    rows,
                    cols,
                    (bx, by),
                    col0 == 0,
                    flags,
                )
            if need_dc:
                _spread(
                    tiles.spread,
                    ds,
                    (1, width),
                    q,
                    common[3],
                    ranges[1],
                    dc,
                    cols,
                    rows,
                    (by, bx),
                    row0 == 0,
                    flags,
                )
    return dq, dc, moments


def _spread(
    tile: Tile,
    ds,
    strides,
    y,
    gain,
    ranges,
    out,
    x_span,
    y_span,
    blocks,
    first,
    flags,
) -> None:
    """out[x0:x1] = or += dS y over a chunk; in parts that are summed up where the chunk has few
    blocks.
    """
    (x0, x1), (y0, y1), (bx, by) = x_span, y_span, blocks
    grid = (triton.cdiv(y.shape[1], tile.BD), triton.cdiv(x1 - x0, bx))
    parts = splits(grid[0] * grid[1], triton.cdiv(y1 - y0, by))
    mine = out[x0:x1]
    into = mine if parts == 1 else out.new_empty(parts, *mine.shape)
    launch(
        bwd.spread_kernel,
        (*grid, parts),
        ds,
        y,
        gain,
        *ranges,
        into,
        len(out),
        len(y),
        x0,
        x1,
        y0,
        y1,
        *strides,
        D=y.shape[1],
        BX=bx,
        BY=by,
        BK=min(tile.BK, by),
        BD=tile.BD,
        KEYS=flags["KEYS"],
        FIRST=first or parts > 1,
        UPCAST=flags["UPCAST"],
        **tile.launch,
    )
    if parts > 1:
        mine.copy_(into.sum(0)) if first else mine.add_(into.sum(0))


def _merged(partial: Tensor, tiles: Plan, everything: bool) -> Tensor:
    parts, _, length = partial.shape
    out = partial.new_empty(5, length, dtype=torch.float64)
    bp, bn = tiles.merge
    launch(
        fwd.merge_kernel,
        (triton.cdiv(length, bn),),
        partial,
        out,
        parts,
        length,
        BP=bp,
        BN=bn,
        EVERYTHING=everything,
        num_warps=4,
        num_stages=2,
    )
    return out


def _target_products(q: Tensor, c: Tensor, target: Tensor, tile: Tile) -> Tensor:
    """q . c_target (B,) float32, to the bit what a sweep with these tiles has in the target's
    place: of two equal candidates neither may be the likelier, and at logits of 10^4 another order
    of summation would be an error of 10^-3."""
    out = q.new_empty(len(q), dtype=torch.float32)
    launch(
        fwd.target_kernel,
        (triton.cdiv(len(q), min(tile.BM, tile.BN)),),
        q,
        c,
        target,
        out,
        len(q),
        len(c),
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        UPCAST=upcasts(q.dtype),
        **tile.launch,
    )
    return out


def _bound(q: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """A bound of |logits| on the device, NaN where a number is. Not for float32: exp(S) exp(-lse)
    rounds twice as often as exp(S - lse), and where nothing but FLOPs costs there is nothing to
    win."""
    if q.dtype == torch.float32:
        return q.new_full((), float("inf"))
    longest = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax() for x in (q, c)]
    return longest[0] * longest[1] * scale.abs()


def _coefficients(side: Tensor) -> Tensor:
    """(4, N) float32. What rounding takes off lse goes into the weight: it would be an error common
    to a whole row. Where the weight is 0 (candidates beyond the B-th in a symmetric loss) lse
    becomes inf, so that exp(s - lse) is 0 whatever s is."""
    rounded = side.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rounded[1] *= torch.exp(rounded[0] - side[0])
    rounded[0].masked_fill_(rounded[1] == 0, float("inf"))
    return rounded


def _gain(row: Tensor, column: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The power of two that brings the largest weight to 2^12 .. 2^13, for float16: |dS| is at most
    four times that.
    """
    if dtype != torch.float16:
        return None
    sides = row[1] if column is None else torch.cat((row[1], column[1]))
    largest = sides.abs().nan_to_num(0.0, 0.0, 0.0).amax().clamp(min=1e-30)
    return torch.exp2(13 - largest.log2().ceil())


def _row_ranges(
    q_key: Tensor | None, c_key: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """low and high (B,): each row's own candidates; shared (1,): how many are for everybody. int32,
    no sync.
    """
    if c_key is None:
        return None, None, None
    low, high = (
        torch.searchsorted(c_key, q_key, right=right, out_int32=True) for right in (False, True)
    )
    return low, high, torch.searchsorted(c_key, c_key.new_zeros(1), out_int32=True)


def _column_ranges(
    q_key: Tensor | None, c_key: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """low and high (C,): the rows that see each candidate, all of them where it is for everybody."""
    if c_key is None:
        return None, None, None
    low, high = (
        torch.searchsorted(q_key, c_key, right=right, out_int32=True) for right in (False, True)
    )
    high = high.masked_fill(c_key < 0, len(q_key))  # low is 0 there: no query has a negative key
    return low, high, c_key.new_zeros(1, dtype=torch.int32)


def _ids(q_id: Tensor | None, c_id: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids as int32 ranks among the candidates' (-1: no candidate has it): 64-bit ones of a tile's
    columns take 64 registers.
    """
    if c_id is None:
        return None, None
    order = c_id.sort().values
    q_rank, c_rank = (torch.searchsorted(order, x, out_int32=True) for x in (q_id, c_id))
    there = order[q_rank.clamp(max=len(order) - 1)] == q_id
    return q_rank.masked_fill(~there, -1), c_rank


def _kind(c_id: Tensor | None, drop: bool) -> str:
    return "none" if c_id is None else "drop" if drop else "same"
