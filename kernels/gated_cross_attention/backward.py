"""Launchers of the backward of gated cross-attention.

For the equations see gradients.py, attend_backward.py, d_tokens.py and weights.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..tiles import cdiv
from .call import Call, given, padded, tile_options
from .d_attend_launch import attention_gradients
from .d_gate import GateSide, d_gate_kernel
from .d_tokens import TokenSide, d_tokens_kernel, d_tokens_rows_kernel
from .gradients import RowSide, d_rows_kernel
from .products import ProductSide, d_attended_kernel, d_normed_kernel
from .results import Gradients, Norm, Saved, Weights
from .tokens import FACTORS, Rows
from .weights_launch import Operands, Parameters, weight_gradients

ROW_PROGRAMS = 1023  # not a multiple of 16, see Call.row_programs


def backward(
    d_outs: list[Tensor],
    tokens: list[Tensor],
    norms: list[Tensor],
    ignores: list[Tensor],
    lengths: list[Tensor],
    presents: list[Tensor],
    weights: list[Tensor],
    flat_saved: list[Tensor],
    num_heads: int,
    gate: str,
    indicator: str,
    missing: str,
    pre_norm: bool,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """Return d_tokens of both sides, d_norms and d_weights in one list.

    ``flat_saved`` are the results of the forward without its outputs. The other arguments are those
    of the forward.
    """
    call = Call(
        tokens=tokens,
        norms=[Norm(*norms[:2]), Norm(*norms[2:])],
        ignores=ignores,
        lengths=lengths,
        presents=presents,
        weights=Weights.of(weights),
        heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        eps=norm_eps,
        p=dropout_p,
        seed=dropout_seed if dropout_p > 0 else None,
    )
    saved = Saved.of(flat_saved, call.directions)
    sides = [call.rows(saved, side) for side in (0, 1)]
    d = _allocate(call, d_outs)
    _d_rows(call, saved, sides, d)
    if gate == "channel":
        _d_gate(call, saved, sides, d)
    d_projected = attention_gradients(call, saved, sides, _d_attended(call, saved, sides, d))
    normed = _d_tokens(call, saved, sides, d, d_projected)
    _weights(call, saved, sides, d, d_projected, normed)
    flat = (tensor for parts in (*d.norms, *d.weights) for tensor in parts)
    return [*d.tokens, *flat]


def _allocate(call: Call, d_outs: list[Tensor]) -> Gradients:
    gates = dict(channel=call.dim, token=1, none=0)[call.gate]
    rows = call.capacities[: call.directions]
    like = d_outs[0]

    def empty(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]

    weighted = call.is_packed and call.gate != "none" and call.indicator != "none"
    partials = [_row_programs(call, n) if not call.pre_norm else 0 for n in rows]
    return Gradients(
        d_outs,
        tokens=empty(call.tokens),
        norms=[Norm(*empty(norm)) for norm in call.norms],
        weights=[Weights(*empty(weights)) for weights in call.weights],
        logits=[like.new_empty(n, gates) for n in rows],
        output=[like.new_empty(n, call.dim) for n in rows],
        direct=[like.new_empty(n, call.dim) for n in rows],
        norm_sums=[like.new_empty(2, n, call.dim, dtype=torch.float32) for n in partials],
        factors=[like.new_empty(n if weighted else 0, FACTORS.value) for n in rows],
    )


def _row_programs(call: Call, rows: int) -> int:
    """Return the programs that walk over the rows; their number is also that of partial sums.

    It does not depend on the number of multiprocessors, so that GPUs of one architecture compute
    the same sums.
    """
    return min(ROW_PROGRAMS, call.row_programs(rows, call.plan.rows.BM))


def _d_rows(call: Call, saved: Saved, sides: list[Rows], d: Gradients) -> None:
    """Compute dz, or dy and the direct part of dx; write dx of tokens that are not rows."""
    arguments = [_row_side(call, saved, d, side) for side in (0, 1)]
    d_rows_kernel[(sum(side.programs for side in arguments),)](
        arguments[0],
        sides[0],
        arguments[1],
        sides[1],
        call.seed,
        call.p,
        D0=call.inputs[0],
        D1=call.inputs[1],
        GATE=call.gate,
        INDICATOR=call.indicator != "none",
        **tile_options(d_rows_kernel, call.plan.rows),
    )


def _row_side(call: Call, saved: Saved, d: Gradients, side: int) -> RowSide:
    place, programs = call.place(saved, side), _row_programs(call, call.capacities[side])
    if side >= call.directions:
        # Without masks, every token of a side of keys is a row.
        return RowSide(
            place_ptr=place, dx_ptr=d.tokens[side], programs=0 if place is None else programs
        )
    whole, w = call.gate != "channel", call.weights[side]
    return RowSide(
        d_out_ptr=d.outs[side],
        stride_b=d.outs[side].stride(0),
        stride_n=d.outs[side].stride(1),
        x_ptr=call.packed_tokens(saved, side),
        attn_out_ptr=saved.attn_out[side],
        z_ptr=None if whole else saved.logits[side],
        weight_ptr=given(w.w_g) if whole else None,
        bias_ptr=given(w.b_g) if whole else None,
        gamma_ptr=None if call.pre_norm else call.norms[side].gamma,
        moments_ptr=None if call.pre_norm else saved.out_moments[side],
        lse_ptr=saved.lse[side],
        place_ptr=place,
        dz_ptr=d.logits[side] if call.gate != "none" else None,
        dy_ptr=d.output[side] if whole else None,
        dx_part_ptr=d.direct[side] if whole else None,
        dx_ptr=d.tokens[side],
        partial_ptr=None if call.pre_norm else d.norm_sums[side],
        factors_ptr=given(d.factors[side]),
        programs=programs,
    )


def _d_gate(call: Call, saved: Saved, sides: list[Rows], d: Gradients) -> None:
    """Compute dy and the direct part of dx of a gate per channel."""
    tile = call.plan.d_gate if call.seed is None else call.plan.d_gate_dropout
    programs = call.programs(tile, [2 * cdiv(call.dim, tile.BN)] * call.directions, call.dim)
    gates = [
        GateSide(
            dz_ptr=d.logits[i],
            z_ptr=saved.logits[i],
            d_out_ptr=d.outs[i],
            stride_b=d.outs[i].stride(0),
            stride_n=d.outs[i].stride(1),
            weight_ptr=saved.gate[i],
            lse_ptr=saved.lse[i],
            dx_part_ptr=d.direct[i],
            dy_ptr=d.output[i],
        )
        for i in range(call.directions)
    ]
    gates = padded(gates, GateSide())
    d_gate_kernel[(programs,)](
        gates[0],
        sides[0],
        gates[1],
        sides[1],
        call.seed,
        call.p,
        D=call.dim,
        UPCAST=call.upcast,
        **tile_options(d_gate_kernel, tile),
    )


def _d_attended(call: Call, saved: Saved, sides: list[Rows], d: Gradients) -> list[Tensor]:
    """Return the gradient of the attention's result."""
    tile = call.plan.d_attended
    programs = call.programs(tile, [cdiv(call.dim, tile.BN)] * call.directions, call.dim)
    d_attended = [torch.empty_like(x) for x in saved.attended]
    products = [ProductSide(d.output[i], w.w_o, d_attended[i]) for i, w in enumerate(call.weights)]
    products = padded(products, ProductSide())
    d_attended_kernel[(programs,)](
        products[0],
        sides[0],
        products[1],
        sides[1],
        D=call.dim,
        UPCAST=call.upcast,
        **tile_options(d_attended_kernel, tile),
    )
    return d_attended


def _d_tokens(
    call: Call,
    saved: Saved,
    sides: list[Rows],
    d: Gradients,
    d_projected: list[Tensor],
) -> list[Tensor]:
    """Write the gradients of the tokens; return the tokens that were projected, normalised."""
    normed = [
        saved.projected[side].new_empty(call.capacities[side], call.inputs[side])
        if call.pre_norm
        else call.packed_tokens(saved, side)
        for side in (0, 1)
    ]
    together = call.plan.together if max(call.inputs) <= 256 else None
    options = dict(D0=call.inputs[0], D1=call.inputs[1])
    widths = dict(W0=call.widths[0], W1=call.widths[1], UPCAST=call.upcast)
    d_normed: list[Tensor | None] = [None, None]
    if together is None:
        tile = call.plan.product
        blocks = [cdiv(width, tile.BN) for width in call.inputs]
        programs = call.programs(tile, blocks, max(call.widths))
        d_normed = [
            x.new_empty(rows, width)
            for x, rows, width in zip(d_projected, call.capacities, call.inputs, strict=True)
        ]
        products = [ProductSide(d_projected[i], saved.folded[i], d_normed[i]) for i in (0, 1)]
        d_normed_kernel[(programs,)](
            products[0],
            sides[0],
            products[1],
            sides[1],
            **options,
            **widths,
            **tile_options(d_normed_kernel, tile),
        )
    tile = together or call.plan.rows
    arguments = [
        TokenSide(
            d_projected_ptr=d_projected[side],
            weight_ptr=saved.folded[side],
            dn_ptr=d_normed[side],
            x_ptr=call.packed_tokens(saved, side),
            moments_ptr=saved.moments[side] if call.pre_norm else None,
            dx_part_ptr=d.direct[side] if side < call.directions else None,
            dx_ptr=d.tokens[side],
            normed_ptr=normed[side] if call.pre_norm else None,
        )
        for side in (0, 1)
    ]
    kernel = d_tokens_kernel if together else d_tokens_rows_kernel
    blocks = sum(cdiv(rows, tile.BM) for rows in call.capacities)
    programs = call.programs(tile, [1, 1], max(call.widths)) if together else blocks
    kernel[(programs,)](
        arguments[0],
        sides[0],
        arguments[1],
        sides[1],
        **options,
        **(widths if together else {}),
        **tile_options(kernel, tile),
    )
    return normed


def _weights(
    call: Call,
    saved: Saved,
    sides: list[Rows],
    d: Gradients,
    d_projected: list[Tensor],
    normed: list[Tensor],
) -> None:
    """Write the gradients of weights, biases and norms."""
    has_gate = call.gate != "none"
    projections, outputs, gates, parameters = [], [], [], []
    for side in (0, 1):
        own, other = call.weights_of(side)
        d_own, d_other = (d.weights[i] if i < call.directions else None for i in (side, 1 - side))
        parameters.append(
            Parameters(
                norm=call.norms[side] if call.pre_norm else None,
                d_norm=d.norms[side] if call.pre_norm or own else None,
                own=own,
                other=other,
                d_own=d_own,
                d_other=d_other,
                norm_sums=None if call.pre_norm or not own else d.norm_sums[side],
                factors=given(d.factors[side]) if own else None,
            )
        )
        width = call.inputs[side]
        projections.append(Operands(d_projected[side], normed[side].view(-1, width)))
        x = call.packed_tokens(saved, side).view(-1, width)
        outputs.append(Operands(d.output[side], saved.attended[side]) if own else None)
        gates.append(
            Operands(d.logits[side], x, saved.attn_out[side]) if own and has_gate else None
        )
    weight_gradients(
        (sides[0], sides[1]),
        projections,
        outputs,
        gates,
        parameters,
        call.indicator != "none" and has_gate,
    )
