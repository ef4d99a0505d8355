"""Gated cross-attention: launchers around the kernels. Shapes and maths:
mmfused/ops/gated_cross_attention/functional.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, launch, upcasts
from . import attend, attend_backward, blend, block, gradients, project
from .parameters import d_gate_weight, d_linear, d_norm
from .plans import Tile, asked_block, plan, power

__all__ = ["backward", "forward", "plan"]

FIELDS = 10  # w_q, w_k, w_v, w_o, w_g, b_q, b_k, b_v, b_o, b_g of each direction
W_Q, W_K, W_V, W_O, W_G, B_Q, B_K, B_V, B_O, B_G = range(FIELDS)


def _both(tensors: list[Tensor]) -> list[Tensor]:
    """Of one direction alone, the same tensor stands for the other."""
    return tensors if len(tensors) == 2 else tensors * 2


def _bits(tensors: list[Tensor]) -> int:
    return sum((tensor.numel() > 0) << i for i, tensor in enumerate(tensors))


def _run(kernel, tile: Tile, grid: tuple[int, ...], *args, **constexprs) -> None:
    sizes = asdict(tile)
    kept = {name: size for name, size in sizes.items() if name in kernel.arg_names}
    launch(
        kernel,
        grid,
        *args,
        **kept,
        **constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )


@dataclass
class _Call:
    """The lists of the op, by name, and what follows from them."""

    tokens: list[Tensor]
    norms: list[Tensor]
    ignores: list[Tensor]
    absents: list[Tensor]
    weights: list[Tensor]
    flags: list[Tensor]
    heads: int
    gate: str
    missing: str
    pre_norm: bool
    eps: float
    p: float
    seed: Tensor | None

    def __post_init__(self):
        self.directions = len(self.weights) // FIELDS
        self.batch, _, self.dim = self.tokens[0].shape
        self.lengths = [x.shape[1] for x in self.tokens]
        self.rows = [self.batch * n for n in self.lengths]
        self.head_dim = self.dim // self.heads
        self.widths = (
            (3 * self.dim, 3 * self.dim) if self.directions == 2 else (self.dim, 2 * self.dim)
        )
        self.first_key = self.dim if self.directions == 2 else 0
        self.who = [x.view(torch.uint8) for x in (*self.ignores, *self.absents)]
        self.strides = [x.stride(i) for i in (0, 1) for x in self.tokens]
        x = self.tokens[0]
        self.plan = plan(self.dim, self.tokens[1].shape[-1], self.head_dim, x.dtype, arch_of(x))
        absent = _bits(self.absents)
        self.masks = dict(IGNORE=_bits(self.ignores), ABSENT=absent, MISSING=self.missing)
        self.given = dict(**self.masks, UPCAST=upcasts(x.dtype))
        self.collapse = self.missing == "constant" and self.p == 0 and absent != 0
        self.indicator = self.gate != "none" and self.weights[W_G].shape[1] > 2 * self.dim

    def of(self, field: int) -> list[Tensor]:
        """One weight or bias of both directions."""
        return _both(self.weights[field::FIELDS])

    def norm(self, part: int) -> list[Tensor]:
        return self.norms[part::2]

    def parts(self, side: int) -> list[tuple[int, int]]:
        """(direction, weight) of what is projected from a side: its queries, then keys and values
        for the other direction.
        """
        asked = [(side, W_Q)] if side < self.directions else []
        return asked + ([(1 - side, W_K), (1 - side, W_V)] if 1 - side < self.directions else [])

    def parameter(self, direction: int, field: int) -> Tensor:
        return self.weights[FIELDS * direction + field]

    def partials(self, rows: int) -> int:
        """Programs that share the rows: 1 at least, so that sums over no rows are written too."""
        return max(1, min(self.plan.partials, triton.cdiv(rows, self.plan.rows.BM)))

    def row_blocks(self, height: int) -> int:
        return triton.cdiv(max(self.rows[: self.directions]), height)


def forward(
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
) -> list[Tensor]:
    """Lists as the op's schema has them -> outs, projected, moments, attended, lse, kept."""
    call = _Call(
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
    outs, attended, kept = ([x.new_empty(x.shape) for x in asking] for _ in range(3))
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
        _blend(call, attended, lse, packed, kept, outs, moments)
    else:
        _block(call, whole, projected, attended, lse, packed, kept, outs, moments)
    return [*outs, *projected, *moments, *attended, *lse, *kept]


def _project(call: _Call, side: int, out: Tensor, moments: Tensor, packed: Tensor | None) -> None:
    """One launch; ``packed``: this side's W_g is packed by the way."""
    x, tile = call.tokens[side], call.plan.project
    parts = call.parts(side)
    weights = [call.parameter(*part) for part in parts]
    biases = [call.parameter(direction, field - W_Q + B_Q) for direction, field in parts]
    fill = 3 - len(parts)
    blocks = triton.cdiv(call.rows[side], tile.BM) * len(parts)
    gate = weights[0] if packed is None else call.parameter(side, W_G)
    _run(
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
        *call.who,
        call.rows[side],
        call.lengths[side],
        blocks,
        x.stride(0),
        x.stride(1),
        call.eps,
        SIDE=side,
        PARTS=len(parts),
        ASKS=side < call.directions,
        BIAS=_bits(biases),
        NORM=call.pre_norm,
        C=call.dim,
        D=x.shape[-1],
        **call.given,
    )


def _attend(
    call: _Call,
    projected: list[Tensor],
    attended: list[Tensor],
    lse: list[Tensor],
) -> None:
    tile = call.plan.attend
    tiles = triton.cdiv(max(call.lengths[: call.directions]), tile.BM)
    _run(
        attend.attend_kernel,
        tile,
        (call.directions * call.batch * call.heads * tiles,),
        *projected,
        *_both(attended),
        *_both(lse),
        *call.who,
        call.seed,
        call.batch,
        *call.lengths,
        tiles,
        call.head_dim**-0.5,
        call.p,
        **_reads(call),
        **call.given,
    )


def _reads(call: _Call) -> dict:
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


def _gates(call: _Call) -> dict:
    """What the end of forward is compiled for."""
    biased = _bits(call.weights[B_G::FIELDS])
    return dict(
        GATE=call.gate,
        INDICATOR=call.indicator,
        POSTNORM=not call.pre_norm,
        BIAS_G=biased,
        D=call.dim,
    )


def _block(call: _Call, tile: Tile, projected, attended, lse, packed, kept, outs, moments) -> None:
    tiles = triton.cdiv(max(call.lengths[: call.directions]), tile.BM)
    _run(
        block.block_kernel,
        tile,
        (call.directions * call.batch * tiles,),
        *projected,
        *call.tokens,
        *_both(attended),
        *_both(kept),
        *_both(outs),
        *_both(lse),
        *call.of(W_O),
        *call.of(B_O),
        *_both(packed),
        *call.of(W_G),
        *call.of(B_G),
        *_both(call.flags),
        *call.norm(0),
        *call.norm(1),
        *moments,
        *call.who,
        call.seed,
        call.batch,
        *call.lengths,
        *call.strides,
        tiles,
        call.head_dim**-0.5,
        call.eps,
        call.p,
        BIAS_O=_bits(call.weights[B_O::FIELDS]),
        BD=power(call.dim),
        **_reads(call),
        **_gates(call),
        **call.given,
    )


def _blend(call: _Call, attended, lse, packed, kept, outs, moments) -> None:
    norms = (*call.norm(0), *call.norm(1), *moments)
    sizes = (call.batch, *call.lengths, *call.strides, call.eps)

    def run(tile, read, blended):
        columns = 1 if read and blended else triton.cdiv(call.dim, tile.BN)
        _run(
            blend.blend_kernel,
            tile,
            (call.row_blocks(tile.BM) * columns, call.directions),
            *call.tokens,
            *_both(attended),
            *_both(kept),
            *_both(outs),
            *_both(lse),
            *call.of(W_O),
            *call.of(B_O),
            *_both(packed),
            *call.of(W_G),
            *call.of(B_G),
            *_both(call.flags),
            *norms,
            *call.who,
            call.seed,
            *sizes,
            call.p,
            READ=read,
            BLEND=blended,
            H=call.heads,
            BIAS_O=_bits(call.weights[B_O::FIELDS]),
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
    _run(
        blend.blend_rows_kernel,
        tile,
        (call.row_blocks(tile.BM), call.directions),
        *call.tokens,
        *_both(kept),
        *_both(outs),
        *call.of(W_G),
        *call.of(B_G),
        *_both(call.flags),
        *norms,
        *call.who,
        *sizes,
        **_gates(call),
        **call.masks,
    )


def backward(
    d_outs,
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
    saved,
    num_heads,
    gate,
    missing,
    pre_norm,
    norm_eps,
    dropout_p,
    dropout_seed,
) -> list[Tensor]:
    """What forward took, and gave after the outs -> d_tokens by side, d_norms, d_weights."""
    call = _Call(
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
    projected, moments, attended, lse, kept = (
        saved[first:last]
        for first, last in ((0, 2), (2, 4), (4, 4 + n), (4 + n, 4 + 2 * n), (4 + 2 * n, None))
    )
    d_tokens, d_norms, d_weights = (
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
        for given in (tokens, norms, weights)
    )
    dz, dy = _d_blend(call, d_outs, kept, moments, lse, d_tokens, d_norms)
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
                    kept[side].view(rows, call.dim),
                    flags[side],
                    call.batch,
                    d_w[W_G],
                    d_w[B_G],
                )
    return [*d_tokens, *d_norms, *d_weights]


def _d_blend(
    call: _Call,
    d_outs,
    kept,
    moments,
    lse,
    d_tokens,
    d_norms,
) -> tuple[list[Tensor], list[Tensor]]:
    """dz and dy of each direction; writes what reaches x past the attention into d_tokens."""
    dy = [torch.empty_like(d) for d in d_outs]
    dz = [
        d.new_empty(
            *d.shape[:2], call.dim if call.gate == "channel" else 1 if call.gate == "token" else 0
        )
        for d in d_outs
    ]
    dx = d_tokens[: call.directions]
    biased = _bits(call.weights[B_G::FIELDS])
    if call.gate != "channel":
        tile = call.plan.rows
        partials = call.partials(max(call.rows[: call.directions]))
        shape = (2, partials, call.dim) if not call.pre_norm else (0,)
        sums = [dy[0].new_empty(shape, dtype=torch.float32) for _ in d_outs]
        _run(
            gradients.d_rows_kernel,
            tile,
            (partials, call.directions),
            *_both(d_outs),
            *call.tokens,
            *_both(kept),
            *call.of(W_G),
            *call.of(B_G),
            *_both(call.flags),
            *call.norm(0),
            *moments,
            *_both(lse),
            *_both(dz),
            *_both(dy),
            *_both(dx),
            *_both(sums),
            *call.who,
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
        )
        if not call.pre_norm:
            for side, partial in enumerate(sums):
                d_norm(partial, *d_norms[2 * side : 2 * side + 2])
        return dz, dy
    packed = [w[:, : 2 * call.dim].contiguous() for w in call.weights[W_G::FIELDS]]
    tile = call.plan.product
    _run(
        gradients.d_gate_kernel,
        tile,
        (call.row_blocks(tile.BM) * triton.cdiv(call.dim, tile.BN), call.directions),
        *_both(d_outs),
        *call.tokens,
        *_both(kept),
        *_both(packed),
        *call.of(W_G),
        *call.of(B_G),
        *_both(call.flags),
        *_both(dz),
        *_both(dy),
        *_both(dx),
        *call.who,
        call.batch,
        *call.lengths,
        *call.strides,
        D=call.dim,
        BIAS_G=biased,
        INDICATOR=call.indicator,
        **call.given,
    )
    tile = call.plan.product
    _run(
        gradients.through_gate_kernel,
        tile,
        (call.row_blocks(tile.BM) * 2 * triton.cdiv(call.dim, tile.BN), call.directions),
        *_both(dz),
        *_both(packed),
        *_both(dy),
        *_both(dx),
        *_both(lse),
        *call.who,
        call.seed,
        call.batch,
        *call.lengths,
        call.p,
        H=call.heads,
        D=call.dim,
        DROPOUT=call.p > 0,
        **call.given,
    )
    return dz, dy


def _d_attend(call: _Call, projected, attended, lse, dy) -> list[Tensor]:
    """dy -> the gradients of the projections."""
    d_attended, d_projected = (
        [torch.empty_like(x) for x in like] for like in (attended, projected)
    )
    exact = projected[0].dtype == torch.float32
    delta = [x.new_empty(2 if exact else 1, *x.shape) for x in lse]
    tile = call.plan.product
    _run(
        gradients.d_attended_kernel,
        tile,
        (call.row_blocks(tile.BM) * triton.cdiv(call.dim, tile.BN), call.directions),
        *_both(dy),
        *call.of(W_O),
        *_both(d_attended),
        *call.who,
        call.batch,
        *call.lengths,
        D=call.dim,
        **call.given,
    )
    lines = call.directions * call.batch * call.heads
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

    def rest(tiles):
        return (*call.who, call.seed, call.batch, *call.lengths, tiles, call.head_dim**-0.5, call.p)

    results = (*_both(lse), *_both(delta), *d_projected)
    tiles = triton.cdiv(max(call.lengths[: call.directions]), call.plan.d_query.BM)
    _run(
        attend_backward.d_query_kernel,
        call.plan.d_query,
        (lines * tiles,),
        *projected,
        *_both(attended),
        *_both(d_attended),
        *results,
        *rest(tiles),
        **options,
    )
    tiles = triton.cdiv(max(call.lengths[-call.directions :]), call.plan.d_key.BN)
    _run(
        attend_backward.d_key_kernel,
        call.plan.d_key,
        (lines * tiles,),
        *projected,
        *_both(d_attended),
        *results,
        *rest(tiles),
        **options,
    )
    return d_projected


def _d_side(call: _Call, side: int, d_projected, moments, dx, d_norms, d_weights) -> Tensor | None:
    """From one side's projections to its tokens, its norm and the weights that projected it; what
    the gate saw of it, (rows, D).
    """
    x, rows = call.tokens[side], call.rows[side]
    parts, width = call.parts(side), x.shape[-1]
    asks, read = side < call.directions, 1 - side < call.directions
    weights = [call.parameter(*part) for part in parts]
    d_normed = x.new_empty(rows, width)
    sizes = dict(SIDE=side, ASKS=asks, READ=read)
    tile = call.plan.product
    _run(
        gradients.d_normed_kernel,
        tile,
        (triton.cdiv(rows, tile.BM) * triton.cdiv(width, tile.BN),),
        d_projected,
        *weights,
        *weights[:1] * (3 - len(parts)),
        d_normed,
        *call.who,
        rows,
        call.lengths[side],
        **sizes,
        PARTS=len(parts),
        C=call.dim,
        D=width,
        **call.given,
    )
    plain = x.is_contiguous() and not (
        call.given["IGNORE"] or call.given["ABSENT"]
    )  # every row is changed and may be read
    cleans = asks and call.gate != "none" and not plain
    normed, clean = x.new_empty(rows, width), x.new_empty((rows, width) if cleans else (0,))
    partials = call.partials(rows)
    sums = x.new_empty((2, partials, width) if call.pre_norm else (0,), dtype=torch.float32)
    _run(
        gradients.d_tokens_kernel,
        call.plan.rows,
        (partials,),
        d_normed,
        x,
        *call.norms[2 * side : 2 * side + 2],
        moments,
        dx,
        normed,
        clean,
        sums,
        *call.who,
        rows,
        call.lengths[side],
        x.stride(0),
        x.stride(1),
        **sizes,
        CLEAN=cleans,
        NORM=call.pre_norm,
        COLLAPSE=call.collapse,
        D=width,
        **call.masks,
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
            shifts=field != W_K,
        )
    return clean if cleans else x.reshape(rows, width) if asks and call.gate != "none" else None
