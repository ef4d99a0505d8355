"""Launchers of the backward of the attention; for the equations see attend_backward.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tiles import cdiv
from .attend_backward import AttentionGradients, d_attend_kernel
from .call import Call, padded, tile_options
from .d_attend_long import d_attend_long_kernel
from .d_key import d_key_kernel
from .d_query import d_query_kernel
from .plans import Tile
from .results import Saved
from .tokens import Rows


def attention_gradients(
    call: Call,
    saved: Saved,
    sides: list[Rows],
    d_attended: list[Tensor],
) -> list[Tensor]:
    """Return the gradients of queries, keys and values."""
    d_projected = [torch.empty_like(x) for x in saved.projected]
    gradients = [
        AttentionGradients(
            x,
            saved.attended[side] if side < call.directions else None,
            d_attended[side] if side < call.directions else None,
            saved.lse[side] if side < call.directions else None,
            None,
            d_projected[side],
        )
        for side, x in enumerate(saved.projected)
    ]
    if not _one_pass(call, sides, gradients):
        _two_passes(call, saved, sides, gradients)
    return d_projected


def _one_pass(call: Call, sides: list[Rows], gradients: list[AttentionGradients]) -> bool:
    """Compute all gradients in one launch, unless no tile holds the tokens that stay."""
    tile, scale = call.plan.d_attend, call.head_dim**-0.5
    heads = call.directions * call.batch * call.heads
    arguments = (gradients[0], sides[0], gradients[1], sides[1])
    constants = call.attention_constants()
    if tile is not None and (loops := _loops(call, tile, ("queries", "keys"))):
        d_attend_kernel[(heads,)](
            *arguments,
            call.seed,
            scale,
            call.p,
            **loops,
            **constants,
            **tile_options(d_attend_kernel, tile),
        )
        return True
    if call.seed is not None:
        return False
    del constants["DROPOUT"], constants["HOLES"]
    for tile in call.plan.d_attend_long.values():
        # Keys first: where both fit, the loop over keys takes fewer registers.
        if loops := _loops(call, tile, ("keys", "queries")):
            d_attend_long_kernel[(heads,)](
                *arguments,
                scale,
                **loops,
                **constants,
                **tile_options(d_attend_long_kernel, tile),
            )
            return True
    return False


def _loops(call: Call, tile: Tile, preferred: tuple[str, str]) -> dict[str, Any]:
    """Return the sizes of tiles and what each direction loops over; {} if the tile is too small.

    ``preferred`` is the order in which "queries" and "keys" are tried.
    """
    loops = []
    for direction in range(call.directions):
        queries, keys = call.sizes[direction], call.sizes[1 - direction]
        stays = dict(queries=keys, keys=queries)
        loops.append(next((loop for loop in preferred if stays[loop] <= tile.BN), None))
    if None in loops:
        return {}
    return dict(STAY=tile.BN, STEP=tile.BM, LOOP0=loops[0], LOOP1=loops[-1])


def _two_passes(
    call: Call,
    saved: Saved,
    sides: list[Rows],
    gradients: list[AttentionGradients],
) -> None:
    """Compute dQ, and then dK and dV, for any number of tokens."""
    exact = call.tokens[0].dtype == torch.float32
    deltas = [x.new_empty(2 if exact else 1, *x.shape) for x in saved.lse]
    gradients = [
        x._replace(delta_ptr=delta)
        for x, delta in zip(gradients, padded(deltas, None), strict=True)
    ]
    arguments = (
        gradients[0],
        sides[0],
        gradients[1],
        sides[1],
        call.seed,
        call.head_dim**-0.5,
        call.p,
    )
    constants = call.attention_constants()
    heads = call.batch * call.heads
    tile = call.plan.d_query
    tiles = sum(cdiv(n, tile.BM) for n in call.sizes[: call.directions])
    d_query_kernel[(heads * tiles,)](
        *arguments, EXACT=exact, **constants, **tile_options(d_query_kernel, tile)
    )
    tile = call.plan.d_key
    tiles = sum(cdiv(n, tile.BN) for n in call.sizes[-call.directions :])
    d_key_kernel[(heads * tiles,)](
        *arguments, EXACT=exact, **constants, **tile_options(d_key_kernel, tile)
    )
