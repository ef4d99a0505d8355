"""Experts: launchers around the kernels. Shapes and maths: mmfused/ops/grouped_mlp/functional.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, dense, launch, tile_map, upcasts
from .combine import combine_kernel
from .gradients import hidden_kernel, weights_kernel
from .plans import Tile, combine_block, plan
from .rows import rows_kernel

__all__ = ["linear_backward", "linear_forward", "mlp_backward", "mlp_forward", "plan"]


class Rows(NamedTuple):
    """R = T k sorted rows of E experts; see Routing in mmfused/ops/topk_routing/order.py."""

    order: Tensor
    position: Tensor
    offsets: Tensor
    tiles: Tensor
    k: int

    @property
    def count(self) -> int:
        return len(self.order)

    @property
    def experts(self) -> int:
        return len(self.offsets) - 1

    def slots(self, height: int) -> int:
        """The most tiles there can be: the host does not wait to learn how many there are."""
        return min(self.count, triton.cdiv(self.count, height) + self.experts - 1)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    combine_weights: Tensor | None,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    k: int,
    gather: bool,
) -> Tensor:
    """x (T, I), or (R, I) without ``gather``; weight (E, O, I) -> (R, O), zeros beyond the experts'
    rows, or combined (T, O).
    """
    rows = _rows(order, position, offsets, tiles, k)
    y = x.new_empty(rows.count, weight.shape[1])
    _product(rows, x, weight, y, bias=bias, gather=gather, tail=combine_weights is None)
    return y if combine_weights is None else _combine(rows, y, combine_weights)


def linear_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    combine_weights: Tensor | None,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    k: int,
    gather: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw, db and, where ``combine_weights`` is given, d_combine (T, k)."""
    rows = _rows(order, position, offsets, tiles, k)
    combines = combine_weights is not None
    dx = x.new_empty((rows.count, weight.shape[2]) if need_dx else (0,))
    d_combine = x.new_empty(combine_weights.shape if combines else (0,), dtype=torch.float32)
    operand, gathered, parts = x, gather, None
    if combines:
        if need_dw:  # x times the routing weight, sorted
            operand, gathered = x.new_empty(rows.count, weight.shape[2]), False
        partial = _hidden(
            rows,
            d_out,
            weight,
            x,
            combine_weights,
            dx if need_dx else None,
            operand if need_dw else None,
            gather=gather,
            tail=not gather,
        )
        parts = (partial, d_out, bias, d_combine)
    elif need_dx:
        _product(rows, d_out, weight.mT, dx, tail=not gather)
    dw, db = _weight_gradients(
        rows,
        d_out,
        operand,
        combine_weights,
        [weight],
        need_dw,
        need_db,
        gather_y=combines,
        gather_x=gathered,
    )
    if need_dx and gather:
        dx = _combine(rows, dx, None, parts)
    elif combines:
        _combine(rows, None, None, parts)
    return dx, dw[0], db, d_combine


def mlp_forward(
    x: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    combine_weights: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """x (T, D), weights (E, I, D) and (E, Dout, I) -> out (T, Dout) and the pre-activations (1 or
    2, R, I).
    """
    rows = _rows(order, position, offsets, tiles, combine_weights.shape[1])
    up, gate = _halves(w_up, w_gate, packed)
    width = w_down.shape[2]
    hidden, a = (
        x.new_empty(1 if gate is None else 2, rows.count, width),
        x.new_empty(rows.count, width),
    )
    _product(
        rows, x, up, a, second=gate, bias=b_up, hidden=hidden, activation=activation, gather=True
    )
    y = x.new_empty(rows.count, w_down.shape[1])
    _product(rows, a, w_down, y, bias=b_down)
    return _combine(rows, y, combine_weights), hidden


def mlp_backward(
    d_out: Tensor,
    x: Tensor,
    hidden: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    combine_weights: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    packed: bool,
    need_dx: bool,
    need_dw: bool,
    need_db_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_up, dw_gate, dw_down, db_up, db_down and d_combine (T, k)."""
    rows = _rows(order, position, offsets, tiles, combine_weights.shape[1])
    up, gate = _halves(w_up, w_gate, packed)
    d_hidden = (
        x.new_empty(rows.count, len(hidden) * hidden.shape[2])
        if need_dx or need_dw or need_db_up
        else None
    )
    scaled = x.new_empty(hidden.shape[1:]) if need_dw else None
    partial = _hidden(
        rows, d_out, w_down, hidden, combine_weights, d_hidden, scaled, activation=activation
    )
    (dw_down,), db_down = _weight_gradients(
        rows,
        d_out,
        scaled,
        combine_weights,
        [w_down],
        need_dw,
        need_dw and b_down is not None,
        gather_y=True,
    )
    del scaled
    dw, db_up = _weight_gradients(
        rows,
        d_hidden,
        x,
        None,
        [w_up] if gate is None else [gate, up],
        need_dw,
        need_db_up,
        packed=packed,
        gather_x=True,
    )
    d_combine = x.new_empty(combine_weights.shape, dtype=torch.float32)
    parts = (partial, d_out, b_down, d_combine)
    dx = dx_rows = None
    if need_dx:
        dx_rows = x.new_empty(rows.count, x.shape[1])
        _product(
            rows,
            d_hidden,
            (up if gate is None else gate).mT,
            dx_rows,
            second=None if gate is None else up.mT,
        )
    dx = _combine(rows, dx_rows, None, parts)
    dw_gate = x.new_empty(0) if len(dw) == 1 else dw[0]
    return dx, dw[-1], dw_gate, dw_down, db_up, db_down, d_combine


def _rows(order: Tensor, position: Tensor, offsets: Tensor, tiles: Tensor, k: int) -> Rows:
    order, position, offsets, tiles = (
        dense(tensor) for tensor in (order, position, offsets, tiles)
    )
    if not len(tiles):
        tiles = tile_map(offsets, len(order), len(offsets) - 1)
    return Rows(order, position, offsets, tiles, k)


def _halves(w_up: Tensor, w_gate: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None]:
    """Views (E, I, D) of up and gate, of the same strides."""
    if packed:
        gate, up = w_up.chunk(2, 1)
        return up, gate
    if w_gate is not None and w_gate.stride() != w_up.stride():
        return w_up.contiguous(), w_gate.contiguous()
    return w_up, w_gate


def _product(
    rows: Rows,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    activation: str = "none",
    gather: bool = False,
    tail: bool = False,
) -> None:
    """out (R, N) = act(a weight^T + bias), weight (E, N, K) of any strides; ``second`` of the same:
    see rows_kernel.
    """
    _, n, k = weight.shape
    kind = "gated" if activation == "swiglu" else "rows"
    terms = k if second is None or activation == "swiglu" else 2 * k
    tile = plan(kind, rows.count, rows.experts, n, terms, a.dtype, arch_of(a))
    slots = rows.slots(tile.BM)
    launch(
        rows_kernel,
        (slots * triton.cdiv(n, tile.BN),),
        a,
        weight,
        second,
        dense(bias),
        rows.order,
        rows.offsets,
        rows.tiles,
        hidden,
        out,
        rows.count,
        rows.experts,
        slots,
        a.stride(0),
        *weight.stride(),
        N=n,
        K=k,
        k=rows.k,
        **_blocks(tile),
        HALVINGS=tile.halvings,
        GROUP=16,
        GATHER=gather,
        ACTIVATION=activation,
        TAIL=tail,
        UPCAST=upcasts(a.dtype),
    )


def _hidden(
    rows: Rows,
    d_out: Tensor,
    weight: Tensor,
    h: Tensor,
    combine_weights: Tensor,
    dh: Tensor | None,
    scaled: Tensor | None,
    *,
    activation: str = "none",
    gather: bool = False,
    tail: bool = False,
) -> Tensor:
    """dh and scaled, and d_combine in parts (N / BN, R); weight (E, O, I) is that of the last
    product.
    """
    _, k, n = weight.shape
    kind = "gated hidden" if activation == "swiglu" else "hidden"
    tile = plan(kind, rows.count, rows.experts, n, k, h.dtype, arch_of(h))
    slots, blocks = rows.slots(tile.BM), triton.cdiv(n, tile.BN)
    partial = h.new_empty(blocks, rows.count, dtype=torch.float32)
    stride_e, stride_k, stride_n = weight.stride()
    launch(
        hidden_kernel,
        (slots * blocks,),
        d_out,
        weight,
        h,
        dense(combine_weights),
        rows.order,
        rows.offsets,
        rows.tiles,
        dh,
        scaled,
        partial,
        rows.count,
        rows.experts,
        slots,
        d_out.stride(0),
        stride_e,
        stride_n,
        stride_k,
        h.stride(-2),
        N=n,
        K=k,
        k=rows.k,
        **_blocks(tile),
        HALVINGS=tile.halvings,
        GROUP=16,
        GATHER=gather,
        ACTIVATION=activation,
        TAIL=tail,
        UPCAST=upcasts(h.dtype),
    )
    return partial


def _weight_gradients(
    rows: Rows,
    y: Tensor,
    x: Tensor,
    combine_weights: Tensor | None,
    weights: list[Tensor],
    need_dw: bool,
    need_db: bool,
    *,
    packed: bool = False,
    gather_y: bool = False,
    gather_x: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """dW of each of the weights (E, O, I), which take one after the other O columns of y (R, .),
    and the sums of the last's columns (E, O); (0,) for what is not needed. ``packed``: the weights
    are one, and so are their gradients."""
    experts, n, width = weights[0].shape
    db = weights[0].new_empty((experts, n) if need_db else (0,))
    if not (need_dw or need_db):
        return [db.new_empty(0) for _ in weights[packed:]], db
    if not need_dw:  # the sums come beside a product, as narrow a one as there is
        x, width = x[:, :16], min(width, 16)
    joint = y.new_empty(experts, len(weights) * n, width) if packed else None
    dw = (
        [y.new_empty(experts, n, width) for _ in weights]
        if joint is None
        else list(joint.chunk(2, 1))
    )
    kind = "gathered weights" if gather_y or gather_x else "weights"
    tile = plan(kind, rows.count, rows.experts, n, width, y.dtype, arch_of(y))
    blocks = len(weights) * triton.cdiv(n, tile.BM) * triton.cdiv(width, tile.BN)
    launch(
        weights_kernel,
        (experts * blocks,),
        y,
        x,
        dense(combine_weights),
        rows.order,
        rows.offsets,
        dw[0],
        dw[1] if len(dw) == 2 else None,
        db if need_db else None,
        y.stride(0),
        x.stride(0),
        dw[0].stride(0),
        N=n,
        K=width,
        k=rows.k,
        **_blocks(tile),
        GROUP=8,
        GATHER_Y=gather_y,
        GATHER_X=gather_x,
        UPCAST=upcasts(y.dtype),
    )
    wanted = dw if joint is None else [joint]
    return wanted if need_dw else [y.new_empty(0) for _ in wanted], db


def _combine(
    rows: Rows,
    y: Tensor | None,
    combine_weights: Tensor | None,
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    """Sums (T, N) of y (R, N) over each token's rows, or (0,) without y; ``parts``: what d_combine
    (the last) is made from.
    """
    partial, d_out, bias, d_combine = parts or (None, None, None, None)
    tokens = rows.count // rows.k
    like = d_out if y is None else y
    n, inner = (0 if tensor is None else tensor.shape[1] for tensor in (y, d_out))
    out = like.new_empty((tokens, n) if y is not None else (0,))
    height, width = combine_block(max(n, inner))
    launch(
        combine_kernel,
        (triton.cdiv(tokens, height), triton.cdiv(n, width) + (parts is not None)),
        y,
        dense(combine_weights),
        rows.position,
        rows.offsets,
        out,
        partial,
        d_out,
        dense(bias),
        d_combine,
        tokens,
        rows.count,
        rows.experts,
        0 if partial is None else len(partial),
        0 if d_out is None else d_out.stride(0),
        N=n,
        D=inner,
        k=rows.k,
        BT=height,
        BN=width,
        BE=triton.next_power_of_2(rows.experts),
        num_warps=4,
        num_stages=1,
    )
    return out


def _blocks(tile: Tile) -> dict[str, int]:
    return dict(
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.num_warps, num_stages=tile.num_stages
    )
