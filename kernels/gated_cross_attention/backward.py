"""Launchers of the backward of gated cross-attention.

For the equations see gradients.py and attend_backward.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import attend_backward, gradients
from .call import B_G, B_O, B_Q, FIELDS, W_G, W_K, W_O, W_Q, Call, bits, both, tile_options
from .parameters import d_gate_weight, d_linear, d_norm
from .plans import power


def backward(
    d_outs: list[Tensor],
    tokens: list[Tensor],
    norms: list[Tensor],
    ignores: list[Tensor],
    absents: list[Tensor],
    weights: list[Tensor],
    flags: list[Tensor],
    saved: list[Tensor],
    num_heads: int,
    gate: str,
    missing: str,
    pre_norm: bool,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """Return d_tokens of both sides, d_norms and d_weights in one list.

    ``saved`` are the results of the forward without ``outs``. The other arguments are those of the
    forward.
    """
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
    n = call.directions
    projected, moments, attended, lse, attn_out = (
        saved[first:last]
        for first, last in ((0, 2), (2, 4), (4, 4 + n), (4 + n, 4 + 2 * n), (4 + 2 * n, None))
    )
    d_tokens, d_norms, d_weights = (
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
        for given in (tokens, norms, weights)
    )
    dz, dy = _d_blend(call, d_outs, attn_out, moments, lse, d_tokens, d_norms)
    d_projected = _d_attend(call, projected, attended, lse, dy)
    for side in (0, 1):
        clean = _d_side(
            call,
            side,
            d_projected[side],
            moments[side],
            d_tokens[side],
            d_norms[2 * side : 2 * side + 2],
            d_weights,
        )
        if side < n:
            d_w = d_weights[FIELDS * side : FIELDS * (side + 1)]
            rows = call.rows[side]
            d_linear(
                dy[side].view(rows, call.dim),
                attended[side].view(rows, call.dim),
                d_w[W_O],
                d_w[B_O],
            )
            if gate != "none":
                d_gate_weight(
                    dz[side].flatten(0, 1),
                    clean,
                    attn_out[side].view(rows, call.dim),
                    flags[side],
                    call.batch,
                    d_w[W_G],
                    d_w[B_G],
                )
    return [*d_tokens, *d_norms, *d_weights]


def _d_blend(
    call: Call,
    d_outs,
    attn_out,
    moments,
    lse,
    d_tokens,
    d_norms,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return dz and dy of each direction.

    Write dx without the attention's part to d_tokens and, with post-norm, the gradients to d_norms.
    """
    dy = [torch.empty_like(d) for d in d_outs]
    dz = [
        d.new_empty(
            *d.shape[:2], call.dim if call.gate == "channel" else 1 if call.gate == "token" else 0
        )
        for d in d_outs
    ]
    dx = d_tokens[: call.directions]
    biased = bits(call.weights[B_G::FIELDS])
    if call.gate != "channel":
        tile = call.plan.rows
        partials = call.partials(max(call.rows[: call.directions]))
        shape = (2, partials, call.dim) if not call.pre_norm else (0,)
        sums = [dy[0].new_empty(shape, dtype=torch.float32) for _ in d_outs]
        gradients.d_rows_kernel[(partials, call.directions)](
            *both(d_outs),
            *call.tokens,
            *both(attn_out),
            *call.of(W_G),
            *call.of(B_G),
            *both(call.flags),
            *call.norm(0),
            *moments,
            *both(lse),
            *both(dz),
            *both(dy),
            *both(dx),
            *both(sums),
            *call.mask_bytes,
            call.seed,
            call.batch,
            *call.lengths,
            *call.strides,
            call.p,
            H=call.heads,
            D=call.dim,
            BIAS_G=biased,
            **call.masks,
            GATE=call.gate,
            INDICATOR=call.indicator,
            POSTNORM=not call.pre_norm,
            DROPOUT=call.p > 0,
            **tile_options(gradients.d_rows_kernel, tile),
        )
        if not call.pre_norm:
            for side, partial in enumerate(sums):
                d_norm(partial, *d_norms[2 * side : 2 * side + 2])
        return dz, dy
    packed = [w[:, : 2 * call.dim].contiguous() for w in call.weights[W_G::FIELDS]]
    tile = call.plan.product
    grid = (call.row_blocks(tile.BM) * triton.cdiv(call.dim, tile.BN), call.directions)
    gradients.d_gate_kernel[grid](
        *both(d_outs),
        *call.tokens,
        *both(attn_out),
        *both(packed),
        *call.of(W_G),
        *call.of(B_G),
        *both(call.flags),
        *both(dz),
        *both(dy),
        *both(dx),
        *call.mask_bytes,
        call.batch,
        *call.lengths,
        *call.strides,
        D=call.dim,
        BIAS_G=biased,
        INDICATOR=call.indicator,
        **call.given,
        **tile_options(gradients.d_gate_kernel, tile),
    )
    tile = call.plan.product
    grid = (call.row_blocks(tile.BM) * 2 * triton.cdiv(call.dim, tile.BN), call.directions)
    gradients.through_gate_kernel[grid](
        *both(dz),
        *both(packed),
        *both(dy),
        *both(dx),
        *both(lse),
        *call.mask_bytes,
        call.seed,
        call.batch,
        *call.lengths,
        call.p,
        H=call.heads,
        D=call.dim,
        DROPOUT=call.p > 0,
        **call.given,
        **tile_options(gradients.through_gate_kernel, tile),
    )
    return dz, dy


def _d_attend(
    call: Call,
    projected,
    attended,
    lse,
    dy,
) -> list[Tensor]:
    """Return the gradients of the projections of both sides."""
    d_attended, d_projected = (
        [torch.empty_like(x) for x in like] for like in (attended, projected)
    )
    exact = projected[0].dtype == torch.float32
    delta = [x.new_empty(2 if exact else 1, *x.shape) for x in lse]
    tile = call.plan.product
    grid = (call.row_blocks(tile.BM) * triton.cdiv(call.dim, tile.BN), call.directions)
    gradients.d_attended_kernel[grid](
        *both(dy),
        *call.of(W_O),
        *both(d_attended),
        *call.mask_bytes,
        call.batch,
        *call.lengths,
        D=call.dim,
        **call.given,
        **tile_options(gradients.d_attended_kernel, tile),
    )
    programs_per_tile = call.directions * call.batch * call.heads
    options = dict(
        H=call.heads,
        DH=call.head_dim,
        WQ=call.widths[0],
        WK=call.widths[1],
        FIRST_KEY=call.first_key,
        BH=power(call.head_dim),
        COLLAPSE=call.collapse,
        DROPOUT=call.p > 0,
        EXACT=exact,
        **call.given,
    )

    def last_arguments(tiles):
        return (
            *call.mask_bytes,
            call.seed,
            call.batch,
            *call.lengths,
            tiles,
            call.head_dim**-0.5,
            call.p,
        )

    common = (*both(lse), *both(delta), *d_projected)
    tiles = triton.cdiv(max(call.lengths[: call.directions]), call.plan.d_query.BM)
    attend_backward.d_query_kernel[(programs_per_tile * tiles,)](
        *projected,
        *both(attended),
        *both(d_attended),
        *common,
        *last_arguments(tiles),
        **options,
        **tile_options(attend_backward.d_query_kernel, call.plan.d_query),
    )
    tiles = triton.cdiv(max(call.lengths[-call.directions :]), call.plan.d_key.BN)
    attend_backward.d_key_kernel[(programs_per_tile * tiles,)](
        *projected,
        *both(d_attended),
        *common,
        *last_arguments(tiles),
        **options,
        **tile_options(attend_backward.d_key_kernel, call.plan.d_key),
    )
    return d_projected


def _d_side(
    call: Call,
    side: int,
    d_projected,
    moments,
    dx,
    d_norms,
    d_weights,
) -> Tensor | None:
    """Compute the gradients of one side's tokens, norm and projections.

    Return the tokens (rows, D) that the gate read, with 0 in other rows, or None if no gate read
    tokens of this side.
    """
    x, rows = call.tokens[side], call.rows[side]
    parts, width = call.parts(side), x.shape[-1]
    is_query_side, is_key_side = side < call.directions, 1 - side < call.directions
    weights = [call.parameter(*part) for part in parts]
    d_normed = x.new_empty(rows, width)
    sizes = dict(SIDE=side, IS_QUERY_SIDE=is_query_side, READ=is_key_side)
    tile = call.plan.product
    gradients.d_normed_kernel[(triton.cdiv(rows, tile.BM) * triton.cdiv(width, tile.BN),)](
        d_projected,
        *weights,
        *weights[:1] * (3 - len(parts)),
        d_normed,
        *call.mask_bytes,
        rows,
        call.lengths[side],
        **sizes,
        PARTS=len(parts),
        C=call.dim,
        D=width,
        **call.given,
        **tile_options(gradients.d_normed_kernel, tile),
    )
    # Without masks every token is changed, so the gate read x itself.
    plain = x.is_contiguous() and not (call.given["IGNORE"] or call.given["ABSENT"])
    gated = is_query_side and call.gate != "none"
    writes_clean = gated and not plain
    normed, clean = x.new_empty(rows, width), x.new_empty((rows, width) if writes_clean else (0,))
    partials = call.partials(rows)
    sums = x.new_empty((2, partials, width) if call.pre_norm else (0,), dtype=torch.float32)
    gradients.d_tokens_kernel[(partials,)](
        d_normed,
        x,
        *call.norms[2 * side : 2 * side + 2],
        moments,
        dx,
        normed,
        clean,
        sums,
        *call.mask_bytes,
        rows,
        call.lengths[side],
        x.stride(0),
        x.stride(1),
        **sizes,
        CLEAN=writes_clean,
        NORM=call.pre_norm,
        COLLAPSE=call.collapse,
        D=width,
        **call.masks,
        **tile_options(gradients.d_tokens_kernel, call.plan.rows),
    )
    if call.pre_norm:
        d_norm(sums, *d_norms)
    by_row = d_projected.view(rows, len(parts) * call.dim)
    for i, (direction, field) in enumerate(parts):
        d_weight, d_bias = (d_weights[FIELDS * direction + f] for f in (field, field - W_Q + B_Q))
        d_linear(
            by_row[:, i * call.dim : (i + 1) * call.dim],
            normed,
            d_weight,
            d_bias,
            bias_matters=field != W_K,
        )
    return clean if writes_clean else x.reshape(rows, width) if gated else None
