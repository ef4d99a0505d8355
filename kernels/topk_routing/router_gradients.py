"""Gradients of x and of the router's weight, from the gradient of the logits.

If x has 16 bits, float32 factors (the logits' gradient g, and a float32 router weight) are split
into 16-bit parts. In float16, g is first divided by a power of two for each token (dx) or expert
(dw), which brings the largest element of the token or expert between 1 and 2. There are no atomics:
each element of dx is written by one program, and dw is computed as partial sums, which are added up
in a fixed order.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, dot, load_tokens, store_rows_t, upcasts
from .plans import Plan, parts_of, plan
from .scores import as_bytes, tokens_kept


def input_backward(
    d_logits: Tensor,  # (T, E) float32, contiguous
    x: Tensor,  # (T, D), last stride 1
    router_weight: Tensor,  # (E, D)
    mask: Tensor | None,  # (T,) bool
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """Compute dx and dw; a gradient that is not needed has the shape (0,)."""
    exact = router_weight.dtype != x.dtype
    tiles = plan(len(router_weight), x.dtype, arch_of(x), True, exact)
    mask = as_bytes(mask)
    dx, dw = x.new_empty(0), router_weight.new_empty(0)
    if need_dx:
        dx = _input_gradient(d_logits, x, router_weight, mask, tiles, exact)
    if need_dw:
        dw = _weight_gradient(d_logits, x, router_weight, mask, tiles, exact)
    return dx, dw


def _input_gradient(
    d_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    tiles: Plan,
    exact: bool,
) -> Tensor:
    (tokens, dim), tile = x.shape, tiles.dx
    dx = x.new_empty(x.shape)
    blocks, chunks = triton.cdiv(tokens, tile.BN), triton.cdiv(dim, tile.BD)
    splits = min(chunks, triton.cdiv(tiles.programs, max(blocks, 1)))
    span = triton.cdiv(chunks, splits)
    dx_kernel[(blocks, triton.cdiv(chunks, span))](
        g_ptr=d_logits,
        w_ptr=router_weight.contiguous(),
        mask_ptr=mask,
        dx_ptr=dx,
        T=tokens,
        span=span,
        D=dim,
        E=len(router_weight),
        BE=tiles.experts,
        PARTS=1 if x.dtype == torch.float32 else 2,
        W_PARTS=2 if exact else 1,
        SCALE=x.dtype == torch.float16,
        UPCAST=upcasts(x.dtype),
        **asdict(tile),
        **OPTIONS,
    )
    return dx


def _weight_gradient(
    d_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    tiles: Plan,
    exact: bool,
) -> Tensor:
    (tokens, dim), experts, tile = x.shape, len(router_weight), tiles.dw
    blocks, chunks = triton.cdiv(tokens, tile.BN), triton.cdiv(dim, tile.BD)
    max_splits = min(max(blocks, 1), triton.cdiv(tiles.programs, chunks))
    span = triton.cdiv(blocks, max_splits) * tile.BN
    splits = max(1, triton.cdiv(tokens, max(span, 1)))
    dw = x.new_empty(splits, experts, dim, dtype=torch.float32)
    g_parts = 1 if x.dtype == torch.float32 else 2
    dw_kernel[(chunks, splits, triton.cdiv(experts, tiles.experts))](
        g_ptr=d_logits,
        x_ptr=x,
        mask_ptr=mask,
        dw_ptr=dw,
        T=tokens,
        span=span,
        stride_n=x.stride(0),
        D=dim,
        E=experts,
        BE=tiles.experts,
        PARTS=parts_of(x.dtype) if exact else g_parts,
        SCALE=x.dtype == torch.float16,
        UPCAST=upcasts(x.dtype),
        **asdict(tile),
        **OPTIONS,
    )
    return (dw[0] if splits == 1 else dw.sum(0)).to(router_weight.dtype)


@triton.jit
def dx_kernel(
    g_ptr,  # (T, E)
    w_ptr,  # (E, D)
    mask_ptr,  # (T,) or None
    dx_ptr,  # (T, D)
    T,
    span,
    D: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    W_PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dx = g w, ``span`` chunks of BD columns per program.

    grid (T / BN, splits of D). g is split into PARTS numbers, w into W_PARTS. g stays on chip if BE
    holds all experts.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    keep = tokens_kept(n, mask_ptr, T)
    power = tl.zeros([BN], tl.float32)
    if SCALE:
        for e in range(0, E, BE):
            g_chunk = load_tokens(g_ptr, n, e + tl.arange(0, BE), keep, E, E)
            power = tl.maximum(power, tl.max(tl.abs(g_chunk), 1))
        power = _power_below(power)
    if E <= BE:
        g = _load_parts(g_ptr, n, tl.arange(0, BE), keep, power, dtype, E, PARTS, SCALE)
    first = tl.program_id(1) * span * BD
    for start in range(first, tl.minimum(first + span * BD, D), BD):
        cols = start + tl.arange(0, BD)
        acc = tl.zeros([BN, BD], tl.float32)
        for e in range(0, E, BE):
            experts = e + tl.arange(0, BE)
            if E > BE:
                g = _load_parts(g_ptr, n, experts, keep, power, dtype, E, PARTS, SCALE)
            w = load_tokens(w_ptr, experts, cols, experts < E, D, D)
            part = w.to(dtype)
            for i in tl.static_range(PARTS):
                acc = dot(g[i], part, acc, UPCAST)
            if W_PARTS == 2:
                acc = dot(g[0], (w - part.to(tl.float32)).to(dtype), acc, UPCAST)
        if SCALE:
            acc *= power[:, None]
        at = n[:, None].to(tl.int64) * D + cols[None, :]
        tl.store(dx_ptr + at, acc, mask=(n[:, None] < T) & (cols[None, :] < D))


@triton.jit
def dw_kernel(
    g_ptr,  # (T, E)
    x_ptr,  # (T, D)
    mask_ptr,  # (T,) or None
    dw_ptr,  # (splits, E, D)
    T,
    span,
    stride_n,
    D: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a tile of dw^T = x^T g, summed over ``span`` tokens; ``span`` is a multiple of BN.

    grid (D / BD, splits of T, E / BE). dw is computed transposed, because matrix instructions of
    sm_90 need 64 rows in their first operand, and there may be fewer experts. In float16, the power
    of two that divides an expert's g grows with the largest g so far, like the maximum in an online
    softmax.
    """
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    experts = tl.program_id(2) * BE + tl.arange(0, BE)
    acc = tl.zeros([BD, BE], tl.float32)
    power = tl.full([BE], 0.0, tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, T), BN):
        n = start + tl.arange(0, BN)
        keep = tokens_kept(n, mask_ptr, T)
        x = load_tokens(x_ptr, n, cols, keep, stride_n, D)
        g = load_tokens(g_ptr, n, experts, keep, E, E)
        if SCALE:
            grown = tl.maximum(power, _power_below(tl.max(tl.abs(g), 0)))
            acc *= (power * _inverse(grown))[None, :]
            power = grown
            g *= _inverse(power)[None, :]
        for _part in tl.static_range(PARTS):
            rounded = g.to(x.dtype)
            acc = dot(tl.trans(x), rounded, acc, UPCAST)
            g -= rounded.to(tl.float32)
    if SCALE:
        acc *= power[None, :]
    store_rows_t(dw_ptr + tl.program_id(1).to(tl.int64) * E * D, acc, experts, cols, E, D)


@triton.jit
def _load_parts(
    g_ptr,
    n,
    experts,
    keep,
    power,
    dtype: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
):
    g = load_tokens(g_ptr, n, experts, keep, E, E)
    if SCALE:
        g *= _inverse(power)[:, None]
    return _split(g, dtype, PARTS)


@triton.jit
def _split(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """Split x into PARTS numbers of ``dtype`` that add up to nearly x, the largest first."""
    parts = ()
    for _ in tl.static_range(PARTS):
        part = x.to(dtype)
        parts += (part,)
        x -= part.to(tl.float32)
    return parts


@triton.jit
def _power_below(x):
    """Return the largest power of two that is at most x, for x >= 0.

    The power is clamped so that it and its inverse are normal numbers, even if x is NaN or inf.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 1 << 23), 252 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(power):
    """Return the exact inverse of a power of two, which a division might round."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
