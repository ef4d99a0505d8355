"""Gated cross-attention: the forward launcher.

Shapes and maths: mmfused/ops/gated_cross_attention/reference.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import attend, blend, block, project
from .call import B_G, B_O, B_Q, FIELDS, W_G, W_O, W_Q, Call, bits, both, launch_tile
from .plans import Tile, asked_block, power


def forward(
    tokens: list[Tensor],
    norms: list[Tensor],
    ignores: list[Tensor],
    absents: list[Tensor],
    weights: list[Tensor],
    flags: list[Tensor],
    num_heads: int,
    gate: str,
    missing: str,
    pre_norm: bool,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """Lists as the op's schema has them -> outs, projected, moments, attended, lse, attn_out."""
    call = Call(
        tokens,
        norms,
        ignores,
        absents,
        weights,
        flags,
        num_heads,
        gate,
        missing,
        pre_norm,
        norm_eps,
        dropout_p,
        dropout_seed,
    )
    whole = asked_block(call.plan, call.dim, call.heads)
    asking = tokens[: call.directions]
    outs, attended, attn_out = ([x.new_empty(x.shape) for x in asking] for _ in range(3))
    projected = [
        x.new_empty(*x.shape[:2], width) for x, width in zip(tokens, call.widths, strict=True)
    ]
    moments = [x.new_empty(2, *x.shape[:2], dtype=torch.float32) for x in tokens]
    lse = [x.new_empty(x.shape[0], num_heads, x.shape[1], dtype=torch.float32) for x in asking]
    packs = gate == "channel" and call.indicator
    packed = (
        [x.new_empty(call.dim, 2 * call.dim) for x in asking]
        if packs
        else call.weights[W_G::FIELDS]
    )
    for side in (0, 1):
        _project(
            call,
            side,
            projected[side],
            moments[side],
            packed[side] if packs and side < call.directions else None,
        )
    if whole is None:
        _attend(call, projected, attended, lse)
        _blend(call, attended, lse, packed, attn_out, outs, moments)
    else:
        _block(call, whole, projected, attended, lse, packed, attn_out, outs, moments)
    return [*outs, *projected, *moments, *attended, *lse, *attn_out]


def _project(call: Call, side: int, out: Tensor, moments: Tensor, packed: Tensor | None) -> None:
    """One launch; ``packed``: this side's W_g is packed by the way."""
    x, tile = call.tokens[side], call.plan.project
    parts = call.parts(side)
    weights = [call.parameter(*part) for part in parts]
    biases = [call.parameter(direction, field - W_Q + B_Q) for direction, field in parts]
    fill = 3 - len(parts)
    blocks = triton.cdiv(call.rows[side], tile.BM) * len(parts)
    gate = weights[0] if packed is None else call.parameter(side, W_G)
    launch_tile(
        project.project_kernel,
        tile,
        (blocks + (0 if packed is None else call.dim),),
        x,
        *weights,
        *weights[:1] * fill,
        *biases,
        *biases[:1] * fill,
        *call.norms[2 * side : 2 * side + 2],
        out,
        moments,
        gate,
        out if packed is None else packed,
        *call.mask_bytes,
        call.rows[side],
        call.lengths[side],
        blocks,
        x.stride(0),
        x.stride(1),
        call.eps,
        SIDE=side,
        PARTS=len(parts),
        IS_QUERY_SIDE=side < call.directions,
        BIAS=bits(biases),
        NORM=call.pre_norm,
        C=call.dim,
        D=x.shape[-1],
        **call.given,
    )


def _attend(
    call: Call,
    projected: list[Tensor],
    attended: list[Tensor],
    lse: list[Tensor],
) -> None:
    tile = call.plan.attend
    tiles = triton.cdiv(max(call.lengths[: call.directions]), tile.BM)
    launch_tile(
        attend.attend_kernel,
        tile,
        (call.directions * call.batch * call.heads * tiles,),
        *projected,
        *both(attended),
        *both(lse),
        *call.mask_bytes,
        call.seed,
        call.batch,
        *call.lengths,
        tiles,
        call.head_dim**-0.5,
        call.p,
        **_reads(call),
        **call.given,
    )


def _reads(call: Call) -> dict:
    """What the forward of attention is compiled for."""
    return dict(
        H=call.heads,
        DH=call.head_dim,
        WQ=call.widths[0],
        WK=call.widths[1],
        FIRST_KEY=call.first_key,
        BH=power(call.head_dim),
        COLLAPSE=call.collapse,
        DROPOUT=call.p > 0,
    )


def _gates(call: Call) -> dict:
    """What the end of forward is compiled for."""
    biased = bits(call.weights[B_G::FIELDS])
    return dict(
        GATE=call.gate,
        INDICATOR=call.indicator,
        POSTNORM=not call.pre_norm,
        BIAS_G=biased,
        D=call.dim,
    )


def _block(
    call: Call, tile: Tile, projected, attended, lse, packed, attn_out, outs, moments
) -> None:
    tiles = triton.cdiv(max(call.lengths[: call.directions]), tile.BM)
    launch_tile(
        block.block_kernel,
        tile,
        (call.directions * call.batch * tiles,),
        *projected,
        *call.tokens,
        *both(attended),
        *both(attn_out),
        *both(outs),
        *both(lse),
        *call.of(W_O),
        *call.of(B_O),
        *both(packed),
        *call.of(W_G),
        *call.of(B_G),
        *both(call.flags),
        *call.norm(0),
        *call.norm(1),
        *moments,
        *call.mask_bytes,
        call.seed,
        call.batch,
        *call.lengths,
        *call.strides,
        tiles,
        call.head_dim**-0.5,
        call.eps,
        call.p,
        BIAS_O=bits(call.weights[B_O::FIELDS]),
        BD=power(call.dim),
        **_reads(call),
        **_gates(call),
        **call.given,
    )


def _blend(call: Call, attended, lse, packed, attn_out, outs, moments) -> None:
    norms = (*call.norm(0), *call.norm(1), *moments)
    sizes = (call.batch, *call.lengths, *call.strides, call.eps)

    def run(tile, read, blended):
        columns = 1 if read and blended else triton.cdiv(call.dim, tile.BN)
        launch_tile(
            blend.blend_kernel,
            tile,
            (call.row_blocks(tile.BM) * columns, call.directions),
            *call.tokens,
            *both(attended),
            *both(attn_out),
            *both(outs),
            *both(lse),
            *call.of(W_O),
            *call.of(B_O),
            *both(packed),
            *call.of(W_G),
            *call.of(B_G),
            *both(call.flags),
            *norms,
            *call.mask_bytes,
            call.seed,
            *sizes,
            call.p,
            READ=read,
            BLEND=blended,
            H=call.heads,
            BIAS_O=bits(call.weights[B_O::FIELDS]),
            DROPOUT=call.p > 0,
            **_gates(call),
            **call.given,
        )

    if call.plan.together is not None:
        return run(call.plan.together, True, True)
    run(call.plan.product, True, False)
    if call.gate == "channel":
        return run(call.plan.product, False, True)
    tile = call.plan.rows
    launch_tile(
        blend.blend_rows_kernel,
        tile,
        (call.row_blocks(tile.BM), call.directions),
        *call.tokens,
        *both(attn_out),
        *both(outs),
        *call.of(W_G),
        *call.of(B_G),
        *both(call.flags),
        *norms,
        *call.mask_bytes,
        *sizes,
        **_gates(call),
        **call.masks,
    )
