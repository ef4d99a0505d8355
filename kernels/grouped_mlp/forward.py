"""Forward of the experts: products of sorted rows with the matrices of their experts.

``rows_kernel`` runs one program for each tile of rows and block of columns. All rows of a tile
belong to one expert. The backward launches this kernel too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, dense, dot, upcasts
from .combine import combine_rows
from .plans import plan
from .rows import (
    Rows,
    activate,
    column_pieces,
    load_inside,
    product,
    sorted_rows,
    source_rows,
    tile_and_block,
    tile_options,
    tile_span,
    zero_tail,
)


def linear_forward(
    x: Tensor,  # (T, I), or (R, I) without gather
    weight: Tensor,  # (E, O, I)
    bias: Tensor | None,  # (E, O)
    combine_weights: Tensor | None,  # (T, k) float32
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    k: int,
    gather: bool,
) -> Tensor:
    """Compute grouped_linear: (R, O), 0 for masked tokens; with ``combine_weights`` (T, O)."""
    rows = sorted_rows(order, position, offsets, tiles, k)
    y = x.new_empty(rows.number, weight.shape[1])
    multiply_rows(
        rows,
        x,
        weight,
        y,
        bias=bias,
        gather=gather,
        tail=combine_weights is None,
    )
    return y if combine_weights is None else combine_rows(rows, y, combine_weights)


def mlp_forward(
    x: Tensor,  # (T, D)
    w_up: Tensor,  # (E, I, D); packed (E, 2 I, D)
    w_gate: Tensor | None,  # (E, I, D)
    w_down: Tensor,  # (E, Dout, I)
    b_up: Tensor | None,  # (E, I)
    b_down: Tensor | None,  # (E, Dout)
    combine_weights: Tensor,  # (T, k) float32
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, Dout) and the pre-activations (1 or 2, R, I), the gate's first."""
    rows = sorted_rows(order, position, offsets, tiles, combine_weights.shape[1])
    up, gate = up_and_gate(w_up, w_gate, packed)
    width = w_down.shape[2]
    hidden = x.new_empty(1 if gate is None else 2, rows.number, width)
    a = x.new_empty(rows.number, width)
    multiply_rows(
        rows,
        x,
        up,
        a,
        second=gate,
        bias=b_up,
        hidden=hidden,
        activation=activation,
        gather=True,
    )
    y = x.new_empty(rows.number, w_down.shape[1])
    multiply_rows(rows, a, w_down, y, bias=b_down)
    return combine_rows(rows, y, combine_weights), hidden


def up_and_gate(
    w_up: Tensor,
    w_gate: Tensor | None,
    packed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the up and gate weights (E, I, D), with equal strides; the gate may be None."""
    if packed:
        gate, up = w_up.chunk(2, 1)
        return up, gate
    if w_gate is not None and w_gate.stride() != w_up.stride():
        return w_up.contiguous(), w_gate.contiguous()
    return w_up, w_gate


def multiply_rows(
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
    """Compute out (R, N) = act(a weight^T + bias).

    ``second``: b2 of rows_kernel. weight (E, N, K) may have any strides, and ``second`` has the
    same strides. ``tail``: write zeros to the rows of masked tokens.
    """
    _, n, width = weight.shape
    kind = "gated" if activation == "swiglu" else "rows"
    terms = width if second is None or activation == "swiglu" else 2 * width
    tile = plan(kind, rows.number, rows.experts, n, terms, a.dtype, arch_of(a))
    slots = rows.slots(tile.BM)
    stride_be, stride_bn, stride_bk = weight.stride()
    rows_kernel[(slots * triton.cdiv(n, tile.BN),)](
        a_ptr=a,
        b_ptr=weight,
        b2_ptr=second,
        bias_ptr=dense(bias),
        order_ptr=rows.order,
        offsets_ptr=rows.offsets,
        tiles_ptr=rows.tiles,
        hidden_ptr=hidden,
        out_ptr=out,
        R=rows.number,
        E=rows.experts,
        slots=slots,
        stride_a=a.stride(0),
        stride_be=stride_be,
        stride_bn=stride_bn,
        stride_bk=stride_bk,
        N=n,
        K=width,
        k=rows.k,
        **tile_options(tile),
        HALVINGS=tile.halvings,
        GROUP=16,
        GATHER=gather,
        ACTIVATION=activation,
        TAIL=tail,
        UPCAST=upcasts(a.dtype),
        **OPTIONS,
    )


@triton.jit
def rows_kernel(
    a_ptr,  # (T, K) with GATHER, else (R, K)
    b_ptr,  # (E, K, N)
    b2_ptr,  # (E, K, N) or None
    bias_ptr,  # (E, N) or None
    order_ptr,  # (R,)
    offsets_ptr,  # (E + 1,)
    tiles_ptr,  # (R // 16 + E, 2)
    hidden_ptr,  # (1 or 2, R, N) or None
    out_ptr,  # (R, N)
    R,
    E,
    slots,
    stride_a,
    stride_be,
    stride_bn,
    stride_bk,
    N: tl.constexpr,
    K: tl.constexpr,
    k: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVINGS: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute out = act(A B + bias); grid (slots * N / BN,).

    With "swiglu", b2 is the gate's B, and the gate's pre-activations are stored first in hidden.
    With "none", hidden is not written. If b2 is given with "none", A has 2 K columns, and the
    second half is multiplied by b2.
    """
    tile, block = tile_and_block(slots, tl.cdiv(N, BN), GROUP)
    cols = block * BN + tl.arange(0, BN)
    if TAIL:
        zero_tail(out_ptr, tile, tl.load(offsets_ptr + E), R, cols, N, BM, BN)
    expert, first, end = tile_span(tiles_ptr, offsets_ptr, tile, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    # Beyond the end, read the last row again, never a row of another expert.
    a_rows = source_rows(order_ptr, tl.minimum(rows, end - 1), k, GATHER)
    weight_at = expert.to(tl.int64) * stride_be
    acc = tl.zeros([BM, BN], tl.float32)
    gate = acc
    if ACTIVATION == "swiglu":
        acc, gate = gated_product(
            acc,
            gate,
            a_ptr,
            a_rows,
            stride_a,
            b_ptr + weight_at,
            b2_ptr + weight_at,
            cols,
            stride_bn,
            stride_bk,
            N,
            K,
            BN,
            BK,
            UPCAST,
        )
    elif b2_ptr is not None:
        acc = product(
            acc,
            a_ptr,
            a_rows,
            stride_a,
            b_ptr + weight_at,
            b2_ptr + weight_at,
            cols,
            stride_bn,
            stride_bk,
            N,
            K,
            BN,
            BK,
            UPCAST,
        )
    else:
        acc = product(
            acc,
            a_ptr,
            a_rows,
            stride_a,
            b_ptr + weight_at,
            None,
            cols,
            stride_bn,
            stride_bk,
            N,
            K,
            BN,
            BK,
            UPCAST,
        )
    bias_at = expert.to(tl.int64) * N
    accs = column_pieces(acc, BM, BN, HALVINGS)
    gates = column_pieces(gate, BM, BN, HALVINGS)
    WIDTH: tl.constexpr = BN // 2**HALVINGS
    for i in tl.static_range(2**HALVINGS):
        piece = block * BN + i * WIDTH + tl.arange(0, WIDTH)
        _finish(
            accs[i],
            gates[i],
            bias_ptr,
            bias_at,
            rows,
            piece,
            end,
            R,
            hidden_ptr,
            out_ptr,
            N,
            ACTIVATION,
        )


@triton.jit
def _finish(
    acc,
    gate,
    bias_ptr,  # (E, N) or None
    bias_at,
    rows,
    cols,
    end,
    R,
    hidden_ptr,  # (1 or 2, R, N) or None
    out_ptr,  # (R, N)
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add the bias, apply the activation and store these columns."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + bias_at + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    inside = (rows < end)[:, None] & (cols < N)[None, :]
    if ACTIVATION == "swiglu":
        tl.store(hidden_ptr + at, gate, mask=inside)
        hidden_ptr += tl.cast(R, tl.int64) * N
    if ACTIVATION != "none":
        tl.store(hidden_ptr + at, acc, mask=inside)
        acc, _, _ = activate(acc, gate, ACTIVATION)
    tl.store(out_ptr + at, acc, mask=inside)


@triton.jit
def gated_product(
    acc,
    gate,
    a_ptr,  # (rows, K)
    a_rows,
    stride_a,
    b_ptr,  # (K, N)
    gate_ptr,  # (K, N)
    cols,
    stride_bn,
    stride_bk,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return acc + A[a_rows] B and gate + A[a_rows] G, reading A once; G has the strides of B."""
    ks = tl.arange(0, BK)
    a_ptrs = a_ptr + a_rows[:, None] * stride_a + ks[None, :]
    b_at = ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
    for start in range(0, K, BK):
        inside = start + ks < K
        a = load_inside(a_ptrs + start, inside, inside, True, K % BK == 0)
        at = tl.cast(start, tl.int64) * stride_bk + b_at
        g = load_inside(gate_ptr + at, inside, cols < N, K % BK == 0, N % BN == 0)
        gate = dot(a, g, gate, UPCAST)
        b = load_inside(b_ptr + at, inside, cols < N, K % BK == 0, N % BN == 0)
        acc = dot(a, b, acc, UPCAST)
    return acc, gate
