"""Top-k routing: launchers around the kernels. Shapes and maths:
mmfused/ops/topk_routing/functional.py and order.py.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
from torch import Tensor

from ..tiles import arch_of, dense, launch, tile_block, tile_rows, upcasts
from . import backward as bwd
from . import forward as fwd
from . import order as ord
from .plans import plan, width

__all__ = ["backward", "forward", "input_backward", "order", "plan"]

SCAN_ROWS, SCAN_COLUMNS = 512, 8


def forward(
    source: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalize: bool,
    selection_bias: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    available: Tensor | None,
    balance: str,
    indices: Tensor | None,
    jitter: float,
    jitter_seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """source (T, E) of any strides, or (T, D), last stride 1, beside router_weight (E, D) ->
    logits, indices, weights, counts, losses, order, position, offsets, tiles, coefficients, as the
    schema says. Three launches."""
    tokens = len(source)
    from_input = router_weight is not None
    experts = len(router_weight) if from_input else source.shape[1]
    exact = from_input and router_weight.dtype != source.dtype
    tiles = plan(experts, source.dtype, arch_of(source), from_input, exact)
    block = tiles.rows.BR
    programs = triton.cdiv(tokens, tiles.route.BN if from_input else block)
    blocks = programs * (tiles.route.BN // block if from_input else 1)
    cells = num_segments * experts
    ints = (
        experts
        + 1
        + num_segments
        + (cells if num_segments > 1 else 0)
        + (cells if balance == "gshard" else 0)
    )
    floats = cells + 2

    def empty(*shape, dtype=torch.float32):
        return source.new_empty(shape, dtype=dtype)

    mask, available = _bytes(mask), _bytes(available)
    segments = dense(segments)
    given = dense(indices)
    chosen = empty(*((tokens, k) if given is None else (0,)), dtype=torch.int64)
    weights, logits = empty(tokens, k), empty(*((tokens, experts) if from_input else (0,)))
    partial_ints, partial_floats = empty(blocks, ints, dtype=torch.int32), empty(blocks, floats)
    inputs = (
        dense(selection_bias),
        mask,
        segments,
        available,
        given,
        jitter_seed if jitter else None,
    )
    common = (*inputs, chosen, weights, partial_ints, partial_floats, tokens, ints, floats, jitter)
    flags = dict(
        E=experts,
        K=k,
        S=num_segments,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        BALANCE=balance,
        BR=block,
        BE=width(experts, from_input),
        BS=triton.next_power_of_2(k),
    )
    if from_input:
        launch(
            fwd.route_x_kernel,
            (programs,),
            logits,
            *common,
            source,
            router_weight.contiguous(),
            dense(router_bias),
            source.stride(0),
            D=source.shape[1],
            PARTS=_parts(source.dtype) if exact else 1,
            UPCAST=upcasts(source.dtype),
            **asdict(tiles.route),
            **flags,
        )
    else:
        flags |= asdict(tiles.rows) | dict(num_stages=1)
        launch(fwd.route_kernel, (programs,), source, *common, *source.stride(), **flags)
    counts, losses, coefficients = (
        empty(num_segments, experts, dtype=torch.int64),
        empty(3),
        empty(cells + 1),
    )
    statistics = (available, partial_ints, partial_floats, counts, losses, coefficients)
    sorted_rows = _sort(
        chosen if given is None else given, mask, experts, num_segments, balance, block, *statistics
    )
    return logits, chosen, weights, counts, losses, *sorted_rows, coefficients


def order(
    indices: Tensor,
    mask: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices (T, k) int64, forced into [0, E) -> order, position, offsets, tiles. Three launches."""
    tokens, k = indices.shape
    indices, mask = indices.contiguous(), _bytes(mask)
    rows = plan(num_experts, torch.float32, arch_of(indices), False).rows
    blocks = triton.cdiv(tokens, rows.BR)
    partial = indices.new_empty(blocks, num_experts + 1, dtype=torch.int32)
    launch(
        ord.count_kernel,
        (blocks,),
        indices,
        mask,
        partial,
        tokens,
        E=num_experts,
        K=k,
        BE=width(num_experts),
        **asdict(rows),
        num_stages=1,
    )
    return _sort(
        indices, mask, num_experts, 1, "none", rows.BR, None, partial, None, None, None, None
    )


def _sort(
    indices,
    mask,
    experts,
    segments,
    balance,
    block,
    available,
    partial_ints,
    partial_floats,
    counts,
    losses,
    coefficients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the choices and the partial counts of blocks of tokens to the permutation, and into the
    last three what they hold.
    """
    tokens, k = indices.shape
    rows, blocks, ints = tokens * k, *partial_ints.shape
    floats = 0 if partial_floats is None else partial_floats.shape[1]

    def empty(*shape, dtype=torch.int32):
        return indices.new_empty(shape, dtype=dtype)

    prefix, totals = empty(blocks, experts + 1), empty(ints)
    sums = None if partial_floats is None else empty(floats, dtype=torch.float64)
    int_blocks = triton.cdiv(ints, SCAN_COLUMNS)
    launch(
        ord.scan_kernel,
        (int_blocks + triton.cdiv(floats, SCAN_COLUMNS),),
        partial_ints,
        partial_floats,
        prefix,
        totals,
        sums,
        blocks,
        ints,
        floats,
        int_blocks,
        E=experts,
        BG=SCAN_ROWS,
        BC=SCAN_COLUMNS,
        num_warps=4,
        num_stages=3,
    )
    order, position, offsets, tiles = (
        empty(rows),
        empty(rows),
        empty(experts + 1),
        empty(rows // 16 + experts, 2),
    )
    tile_blocks = triton.cdiv(len(tiles), tile_block(experts))
    launch(
        ord.finish_kernel,
        (blocks + tile_blocks + 1,),
        indices,
        mask,
        available,
        prefix,
        totals,
        sums,
        order,
        position,
        offsets,
        tiles,
        counts,
        losses,
        coefficients,
        tokens,
        blocks,
        len(tiles),
        tile_blocks,
        tile_rows(rows, experts),
        E=experts,
        K=k,
        S=segments,
        BALANCE=balance,
        BE=width(experts),
        BI=tile_block(experts),
        BR=block,
        num_warps=8 if experts > 256 else 4,
        num_stages=1,
        maxnreg=128,
    )
    return order, position, offsets, tiles


def backward(
    d_weights: Tensor | None,
    d_balance: Tensor | None,
    d_z: Tensor | None,
    d_entropy: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    sigmoid: bool,
    renormalize: bool,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    available: Tensor | None,
    balance: str,
    jitter: float,
    jitter_seed: Tensor | None,
) -> Tensor:
    """d_weights (T, k), the others 0-dim, what forward took and gave -> d_logits (T, E) contiguous.
    One launch.
    """
    tokens, experts = logits.shape
    rows = plan(experts, logits.dtype, arch_of(logits), False).rows
    d_logits = logits.new_empty(logits.shape)
    segments = dense(segments)
    launch(
        bwd.logits_kernel,
        (triton.cdiv(tokens, rows.BR),),
        dense(d_weights),
        d_balance,
        d_z,
        d_entropy,
        logits,
        indices.contiguous(),
        weights,
        coefficients,
        _bytes(mask),
        segments,
        _bytes(available),
        jitter_seed if jitter else None,
        d_logits,
        tokens,
        *logits.stride(),
        jitter,
        E=experts,
        K=indices.shape[1],
        S=num_segments,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        BALANCE=balance,
        BE=width(experts),
        **asdict(rows),
        num_stages=1,
    )
    return d_logits


def input_backward(
    d_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """d_logits (T, E) float32 contiguous, x (T, D), last stride 1 -> dx as x, dw as router_weight;
    (0,) for one not needed.
    """
    (tokens, dim), experts = x.shape, len(router_weight)
    exact = router_weight.dtype != x.dtype
    tiles = plan(experts, x.dtype, arch_of(x), True, exact)
    mask = _bytes(mask)
    together = tiles.experts
    flags = dict(
        D=dim, E=experts, BE=together, SCALE=x.dtype == torch.float16, UPCAST=upcasts(x.dtype)
    )
    dx = x.new_empty(x.shape if need_dx else (0,))
    if need_dx:
        tile = tiles.dx
        blocks, chunks = triton.cdiv(tokens, tile.BN), triton.cdiv(dim, tile.BD)
        parts = min(chunks, triton.cdiv(tiles.programs, max(blocks, 1)))
        span = triton.cdiv(chunks, parts)
        launch(
            bwd.dx_kernel,
            (blocks, triton.cdiv(chunks, span)),
            d_logits,
            router_weight.contiguous(),
            mask,
            dx,
            tokens,
            span,
            PARTS=1 if x.dtype == torch.float32 else 2,
            W_PARTS=2 if exact else 1,
            **flags,
            **asdict(tile),
        )
    if not need_dw:
        return dx, router_weight.new_empty(0)
    tile = tiles.dw
    blocks, chunks = triton.cdiv(tokens, tile.BN), triton.cdiv(dim, tile.BD)
    span = triton.cdiv(blocks, min(max(blocks, 1), triton.cdiv(tiles.programs, chunks))) * tile.BN
    parts = max(1, triton.cdiv(tokens, max(span, 1)))
    dw = x.new_empty(parts, experts, dim, dtype=torch.float32)
    launch(
        bwd.dw_kernel,
        (chunks, parts, triton.cdiv(experts, together)),
        d_logits,
        x,
        mask,
        dw,
        tokens,
        span,
        x.stride(0),
        PARTS=_parts(x.dtype) if exact else 1 if x.dtype == torch.float32 else 2,
        **flags,
        **asdict(tile),
    )
    return dx, (dw[0] if parts == 1 else dw.sum(0)).to(router_weight.dtype)


def _parts(dtype: torch.dtype) -> int:
    """Numbers of this dtype that add up to any of float32."""
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous().view(torch.uint8)
