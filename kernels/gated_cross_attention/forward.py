"""Launchers of the forward of gated cross-attention.

For the equations see mmfused/ops/gated_cross_attention/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiles import OPTIONS, cdiv
from .attend import Attention, attend_kernel
from .blend import Gate, Output, Whole, gate_kernel, out_kernel, rows_kernel
from .call import Call, bytes_of, given, padded, tile_options
from .prepare import (
    WEIGHTS,
    Masks,
    Source,
    Weight,
    count_kernel,
    pack_kernel,
    prepare_kernel,
)
from .project import Projection, project_kernel
from .results import Norm, Saved, Weights, empty_results
from .tokens import Rows


def forward(
    tokens: list[Tensor],
    norms: list[Tensor],
    ignores: list[Tensor],
    lengths: list[Tensor],
    presents: list[Tensor],
    weights: list[Tensor],
    num_heads: int,
    gate: str,
    indicator: str,
    missing: str,
    pre_norm: bool,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """Return the outputs and then what the backward needs (see results.Saved), in one list."""
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
    outs, saved = empty_results(tokens, call.masks, call.directions, num_heads, gate, pre_norm)
    if call.is_packed:
        _pack(call, saved)
    sides = [call.rows(saved, side) for side in (0, 1)]
    vectors = [outs[0].new_empty(2, width, dtype=torch.float32) for width in call.widths]
    gate_vectors = [outs[0].new_empty(2, call.dim, dtype=torch.float32) for _ in outs]
    _prepare(call, saved, sides, outs, vectors, gate_vectors)
    _project(call, saved, sides, vectors)
    _attend(call, saved, sides)
    _output(call, saved, sides)
    if gate == "channel":
        _gate(call, saved, sides, outs, gate_vectors)
    else:
        _whole_rows(call, saved, sides, outs)
    return [*outs, *saved.flat()]


def _pack(call: Call, saved: Saved) -> None:
    """Number the rows of both sides."""
    counts = [
        mask.new_empty(call.batch, dtype=torch.int32) if mask.numel() else None
        for mask in call.ignores
    ]
    masks = [
        Masks(bytes_of(ignore), given(length), bytes_of(present), count)
        for ignore, length, present, count in zip(
            call.ignores, call.lengths, call.presents, counts, strict=True
        )
    ]
    options = dict(num_warps=4, num_stages=1, **OPTIONS)
    if call.has_holes:
        count_kernel[(call.batch,)](*masks, *call.sizes, BN=512, **options)
    arguments = [(masks[side], call.rows(saved, side), call.place(saved, side)) for side in (0, 1)]
    pack_kernel[(call.batch,)](
        *arguments[0],
        *arguments[1],
        TWO_WAY=call.directions == 2,
        MISSING=call.missing,
        COLLAPSE=call.missing == "constant" and call.p == 0,
        ANY_PRESENT=call.indicator == "batch",
        BB=512,
        BN=256,
        **options,
    )


def _prepare(
    call: Call,
    saved: Saved,
    sides: list[Rows],
    outs: list[Tensor],
    vectors: list[Tensor],
    gate_vectors: list[Tensor],
) -> None:
    """Write the packed tokens, their moments, the folded weights, and unchanged outputs."""
    tile = call.plan.rows
    sources, folds = [], []
    for side, x in enumerate(call.tokens):
        sources.append(
            Source(
                x_ptr=x,
                stride_b=x.stride(0),
                stride_n=x.stride(1),
                place_ptr=call.place(saved, side),
                rows_ptr=given(saved.packed[side]),
                out_ptr=outs[side] if side < call.directions else None,
                moments_ptr=saved.moments[side] if call.pre_norm else None,
            )
        )
        folds += _folds(call, side, saved.folded[side], vectors[side])
    gates = [Weight()] * 2
    if call.gate == "channel":
        given_gates = [
            Weight(
                weight_ptr=w.w_g,
                bias_ptr=given(w.b_g),
                folded_ptr=copy,
                added_ptr=added[0],
                column_ptr=added[1],
            )
            for w, copy, added in zip(call.weights, saved.gate, gate_vectors, strict=True)
        ]
        gates = padded(given_gates, Weight())
    blocks = [cdiv(rows, tile.BM) for rows in call.capacities]
    weight_blocks = WEIGHTS.value * cdiv(call.dim, tile.BM)
    prepare_kernel[(weight_blocks + sum(blocks),)](
        sources[0],
        sides[0],
        sources[1],
        sides[1],
        *folds,
        *gates,
        blocks[0],
        call.eps,
        C=call.dim,
        D0=call.inputs[0],
        D1=call.inputs[1],
        INDICATOR=call.indicator != "none",
        **tile_options(prepare_kernel, tile),
    )


def _folds(call: Call, side: int, folded: Tensor, vectors: Tensor) -> list[Weight]:
    """Return the weights of queries, keys and values of one side, to fold the LayerNorm into.

    They follow each other in ``folded`` (W, D) and ``vectors`` (2, W).
    """
    own, other = call.weights_of(side)
    norm = call.norms[side] if call.pre_norm else None
    parts = [
        (own.w_q, own.b_q) if own else None,
        (other.w_k, other.b_k) if other else None,
        (other.w_v, other.b_v) if other else None,
    ]
    found, row = [], 0
    for part in parts:
        if part is None:
            found.append(Weight())
            continue
        weight, bias = part
        found.append(
            Weight(
                weight_ptr=weight,
                bias_ptr=given(bias),
                gamma_ptr=norm.gamma if norm else None,
                beta_ptr=norm.beta if norm else None,
                folded_ptr=folded[row:],
                added_ptr=vectors[0, row:],
                column_ptr=vectors[1, row:],
            )
        )
        row += call.dim
    return found


def _project(call: Call, saved: Saved, sides: list[Rows], vectors: list[Tensor]) -> None:
    """Compute queries, keys and values of both sides."""
    tile = call.plan.project
    blocks = [cdiv(width, tile.BN) for width in call.widths]
    programs = call.programs(tile, blocks, max(call.inputs))
    projections = [
        Projection(
            x_ptr=call.packed_tokens(saved, side),
            moments_ptr=saved.moments[side] if call.pre_norm else None,
            weight_ptr=saved.folded[side],
            vectors_ptr=vectors[side],
            out_ptr=saved.projected[side],
        )
        for side in (0, 1)
    ]
    project_kernel[(programs,)](
        projections[0],
        sides[0],
        projections[1],
        sides[1],
        W0=call.widths[0],
        W1=call.widths[1],
        D0=call.inputs[0],
        D1=call.inputs[1],
        SHIFT=call.pre_norm and call.tokens[0].dtype == torch.float32,
        UPCAST=call.upcast,
        **tile_options(project_kernel, tile),
    )


def _attend(call: Call, saved: Saved, sides: list[Rows]) -> None:
    """Compute the attention of both directions."""
    tile = call.plan.attend
    attentions = [
        Attention(
            saved.projected[side],
            saved.attended[side] if side < call.directions else None,
            saved.lse[side] if side < call.directions else None,
        )
        for side in (0, 1)
    ]
    tiles = sum(cdiv(n, tile.BM) for n in call.sizes[: call.directions])
    keys = [call.all_keys(1), call.all_keys(0)]
    attend_kernel[(call.batch * tiles,)](
        attentions[0],
        sides[0],
        attentions[1],
        sides[1],
        call.seed,
        call.head_dim**-0.5,
        call.p,
        ALL0=keys[0],
        ALL1=keys[1],
        **call.attention_constants(),
        **tile_options(attend_kernel, tile),
    )


def _output(call: Call, saved: Saved, sides: list[Rows]) -> None:
    """Compute A: output projection and dropout."""
    tile = call.plan.output if call.seed is None else call.plan.output_dropout
    programs = call.programs(tile, [cdiv(call.dim, tile.BN)] * call.directions, call.dim)
    outputs = [
        Output(
            attended_ptr=saved.attended[i],
            lse_ptr=saved.lse[i],
            weight_ptr=w.w_o,
            bias_ptr=given(w.b_o),
            attn_out_ptr=saved.attn_out[i],
        )
        for i, w in enumerate(call.weights)
    ]
    outputs = padded(outputs, Output())
    out_kernel[(programs,)](
        outputs[0],
        sides[0],
        outputs[1],
        sides[1],
        call.seed,
        call.p,
        D=call.dim,
        UPCAST=call.upcast,
        **tile_options(out_kernel, tile),
    )


def _gate(
    call: Call,
    saved: Saved,
    sides: list[Rows],
    outs: list[Tensor],
    vectors: list[Tensor],
) -> None:
    """Blend the tokens and A by a gate per channel."""
    tile = call.plan.gate
    blocks = [cdiv(call.dim, tile.BN)] * call.directions
    programs = call.programs(tile, blocks, 2 * call.dim)
    gates = [
        Gate(
            x_ptr=call.packed_tokens(saved, i),
            attn_out_ptr=saved.attn_out[i],
            weight_ptr=saved.gate[i],
            vectors_ptr=vectors[i],
            z_ptr=saved.logits[i],
            out_ptr=out,
        )
        for i, out in enumerate(outs)
    ]
    gates = padded(gates, Gate())
    gate_kernel[(programs,)](
        gates[0],
        sides[0],
        gates[1],
        sides[1],
        D=call.dim,
        INDICATOR=call.indicator != "none",
        UPCAST=call.upcast,
        **tile_options(gate_kernel, tile),
    )


def _whole_rows(call: Call, saved: Saved, sides: list[Rows], outs: list[Tensor]) -> None:
    """Blend the tokens and A by a gate per token, or add them, by whole rows."""
    tile = call.plan.rows
    wholes = [
        Whole(
            x_ptr=call.packed_tokens(saved, i),
            attn_out_ptr=saved.attn_out[i],
            weight_ptr=given(w.w_g),
            bias_ptr=given(w.b_g),
            gamma_ptr=None if call.pre_norm else call.norms[i].gamma,
            beta_ptr=None if call.pre_norm else call.norms[i].beta,
            moments_ptr=None if call.pre_norm else saved.out_moments[i],
            out_ptr=outs[i],
            programs=call.row_programs(call.capacities[i], tile.BM),
        )
        for i, w in enumerate(call.weights)
    ]
    programs = sum(whole.programs for whole in wholes)
    wholes = padded(wholes, Whole())
    rows_kernel[(programs,)](
        wholes[0],
        sides[0],
        wholes[1],
        sides[1],
        call.eps,
        D=call.dim,
        GATE=call.gate,
        INDICATOR=call.indicator != "none",
        POSTNORM=not call.pre_norm,
        **tile_options(rows_kernel, tile),
    )
