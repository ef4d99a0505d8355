"""Launchers of masked InfoNCE.

For the equations see reference.py and composed.py in mmfused/ops/masked_info_nce.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, launch, upcasts
from . import forward as fwd
from .gradients import Gradients, chunked_gradients, owner_gradients
from .plans import Plan, Tile, plan, sweep_grid
from .vectors import (
    column_ranges,
    half_gain,
    id_ranks,
    id_rule,
    logit_bound,
    rounded_coefficients,
    row_ranges,
)

__all__ = ["plan", "sweep", "sweep_backward"]


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
    """Compute statistics over all pairs except the targets, and the products of the targets.

    q (B, D) and c (C, D) are sorted by key. Return the statistics of the rows, (5, B) float64, of
    the columns, (5, C) float64 (or (5, 0) without ``columns``), and q . c of each row's target,
    (B,) float32. For the statistics see forward.py.
    """
    tiles = plan(q.shape[1], q.dtype, arch_of(q), columns, everything)
    tile = tiles.sweep
    q, c, target = q.contiguous(), c.contiguous(), target.contiguous()
    stats = 6 if everything else 2
    grid = sweep_grid(len(q), len(c), tile, tiles.partial_bytes, stats * columns)
    row = q.new_empty(grid.splits, stats, len(q), dtype=torch.float32)
    column = q.new_empty(grid.groups, stats, len(c) if columns else 0, dtype=torch.float32)
    ids = id_rule(c_id, drop)
    if c_key is not None or grid.blocks > 1:
        # A group may skip tiles, or merge results of several blocks.
        column[:, 0] = float("-inf")
        column[:, 1:] = 0
    elif everything and ids != "same":
        # Without further positives the kernel does not write their sums.
        column[:, 2:4] = 0
    q_rank, c_rank = id_ranks(q_id, c_id)
    launch(
        fwd.sweep_kernel,
        (grid.splits, grid.groups),
        q_ptr=q,
        c_ptr=c,
        bias_ptr=bias,
        scale_ptr=scale,
        bound_ptr=logit_bound(q, c, scale),
        target_ptr=target,
        **row_ranges(q_key, c_key).pointers(),
        q_id_ptr=q_rank,
        c_id_ptr=c_rank,
        row_ptr=row,
        column_ptr=column,
        B=len(q),
        C=len(c),
        blocks=grid.blocks,
        tiles=grid.tiles,
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        KEYS=c_key is not None,
        IDS=ids,
        COLUMNS=columns,
        EVERYTHING=everything,
        MERGE=grid.blocks > 1,
        UPCAST=upcasts(q.dtype),
        **tile.launch,
    )
    row = _merge_partials(row, tiles, everything)
    column = _merge_partials(column, tiles, everything)
    return row, column, _target_products(q, c, target, tile)


def _merge_partials(partial: Tensor, tiles: Plan, everything: bool) -> Tensor:
    """Merge partial results (parts, 2 or 6, N) into statistics (5, N) float64."""
    parts, _, length = partial.shape
    out = partial.new_empty(5, length, dtype=torch.float64)
    height, width = tiles.merge
    launch(
        fwd.merge_kernel,
        (triton.cdiv(length, width),),
        partial_ptr=partial,
        out_ptr=out,
        P=parts,
        N=length,
        BP=height,
        BN=width,
        EVERYTHING=everything,
        num_warps=4,
        num_stages=2,
    )
    return out


def _target_products(q: Tensor, c: Tensor, target: Tensor, tile: Tile) -> Tensor:
    """Return q . c of each row's target, (B,) float32, bitwise equal to a sweep with this tile.

    Equal candidates must get equal probabilities. With logits of 10^4, another order of summation
    would change a logit by 10^-3.
    """
    out = q.new_empty(len(q), dtype=torch.float32)
    launch(
        fwd.target_kernel,
        (triton.cdiv(len(q), min(tile.BM, tile.BN)),),
        q_ptr=q,
        c_ptr=c,
        target_ptr=target,
        out_ptr=out,
        B=len(q),
        C=len(c),
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        UPCAST=upcasts(q.dtype),
        **tile.launch,
    )
    return out


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
    other inputs are those of :func:`sweep`. The gradient of the scale, () float64, is the sum of
    dS_ij q_i . c_j. A gradient that is not needed is not computed and has the shape (0,).
    """
    masked = c_key is not None or c_id is not None
    both = column is not None
    tiles = plan(q.shape[1], q.dtype, arch_of(q), both, everything, masked or need_scale)
    q, c = q.contiguous(), c.contiguous()
    if need_scale:  # the sum of dS S is divided by scale below
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
