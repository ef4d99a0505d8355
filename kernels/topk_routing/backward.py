"""Backward kernels of top-k routing: one from the logits, and for x and the router's weights the
two products with what it wrote.

Everything is recomputed from the logits; the balance asks for one number an expert and segment
(coefficients). Of float32 numbers beside ones of 16 bits no digit is lost: they are split as in
forward, for float16 after a power of two brought the largest near 1. No atomics: dx of a token has
one owner, dw goes into a fixed number of partial sums, added up in order."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, load_tokens, store_rows_t
from .scores import (
    choices_outside,
    jitter_factor,
    load_allowed,
    load_choice,
    load_logits,
    load_segment,
    scores,
    tokens_kept,
)


@triton.jit
def _upstream(
    d_weights_ptr,
    d_balance_ptr,
    indices_ptr,
    weights_ptr,
    coefficients_ptr,
    n,
    j,
    keep,
    segment,
    E: tl.constexpr,
    K: tl.constexpr,
    BALANCE: tl.constexpr,
):
    """The expert in slot j, its weight and the gradient of that, of "mse" too."""
    at, _ = load_choice(indices_ptr, n, j, keep, E, K)
    w = tl.load(weights_ptr + n.to(tl.int64) * K + j, mask=keep, other=0.0)
    g = tl.zeros_like(w)
    if d_weights_ptr is not None:
        g += tl.load(d_weights_ptr + n.to(tl.int64) * K + j, mask=keep, other=0.0)
    if d_balance_ptr is not None and BALANCE == "mse":
        g += tl.load(d_balance_ptr) * tl.load(coefficients_ptr + segment * E + at)
    return at, w, g


@triton.jit
def logits_kernel(
    d_weights_ptr,
    d_balance_ptr,
    d_z_ptr,
    d_entropy_ptr,
    logits_ptr,
    indices_ptr,
    weights_ptr,
    coefficients_ptr,
    mask_ptr,
    segments_ptr,
    available_ptr,
    seed_ptr,
    d_logits_ptr,
    T,
    stride_n,
    stride_e,
    jitter,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BALANCE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """grid (T / BR,). The gradient of the logits from those of weights, balance, z and entropy;
    None = it has none. That of a softmax sums to 0. What rounding leaves instead (1 - P of a P near
    1, where the others know better) is taken off."""
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    experts = tl.arange(0, BE)
    keep = tokens_kept(n, mask_ptr, T)
    logits = load_logits(logits_ptr, n, experts, keep, stride_n, stride_e, E)
    if seed_ptr is not None:
        factor = jitter_factor(seed_ptr, jitter, n, experts)
        logits *= factor
    segment, void = load_segment(segments_ptr, n, T, S)
    allowed, void = load_allowed(available_ptr, segment, void, experts, E, K)
    void = void | choices_outside(indices_ptr, n, keep, E, K)
    logits = tl.where((void & keep)[:, None], float("nan"), logits)
    _, p, log_p, p_logits, lse = scores(logits, allowed, SIGMOID)
    each = tl.load(coefficients_ptr + S * E)
    gp = tl.zeros([BR, BE], tl.float32)
    du = tl.zeros([BR, BE], tl.float32)
    if d_balance_ptr is not None and BALANCE != "mse":
        c = tl.load(
            coefficients_ptr + segment[:, None] * E + experts[None, :],
            mask=experts[None, :] < E,
            other=0.0,
        )
        gp += tl.load(d_balance_ptr) * c
    if d_entropy_ptr is not None:
        gp -= tl.where(p > 0, tl.load(d_entropy_ptr) * each * (log_p + 1.0), 0.0)
    if d_weights_ptr is not None or (d_balance_ptr is not None and BALANCE == "mse"):
        mean = tl.zeros([BR], tl.float32)
        rest = tl.zeros([BR], tl.float32)
        if RENORMALIZE:
            for j in range(K):
                at, w, g = _upstream(
                    d_weights_ptr,
                    d_balance_ptr,
                    indices_ptr,
                    weights_ptr,
                    coefficients_ptr,
                    n,
                    j,
                    keep,
                    segment,
                    E,
                    K,
                    BALANCE,
                )
                mean += w * g
            for j in range(K):
                at, w, g = _upstream(
                    d_weights_ptr,
                    d_balance_ptr,
                    indices_ptr,
                    weights_ptr,
                    coefficients_ptr,
                    n,
                    j,
                    keep,
                    segment,
                    E,
                    K,
                    BALANCE,
                )
                rest += w * (g - mean)
        for j in range(K):
            at, w, g = _upstream(
                d_weights_ptr,
                d_balance_ptr,
                indices_ptr,
                weights_ptr,
                coefficients_ptr,
                n,
                j,
                keep,
                segment,
                E,
                K,
                BALANCE,
            )
            here = experts[None, :] == at[:, None]
            if RENORMALIZE or SIGMOID:
                du += tl.where(here, (w * (g - mean - rest))[:, None], 0.0)
            else:
                gp += tl.where(here, g[:, None], 0.0)
    d = p * (gp - tl.sum(p * gp, 1)[:, None])
    d += du - p * tl.sum(d, 1)[:, None]
    if SIGMOID:
        d *= tl.sigmoid(-logits)
    if d_z_ptr is not None:
        d += (tl.load(d_z_ptr) * each * 2.0) * lse[:, None] * p_logits
    if seed_ptr is not None:
        d *= factor
    d = tl.where(keep[:, None] & allowed, d, 0.0)
    at = n[:, None].to(tl.int64) * E + experts[None, :]
    tl.store(d_logits_ptr + at, d, mask=(n[:, None] < T) & (experts[None, :] < E))


@triton.jit
def _split(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """PARTS numbers of ``dtype`` that add up to x, the largest first."""
    parts = ()
    for _ in tl.static_range(PARTS):
        part = x.to(dtype)
        parts += (part,)
        x -= part.to(tl.float32)
    return parts


@triton.jit
def _power_below(x):
    """The power of two not above x >= 0, such that its inverse is a normal number too; NaN and inf
    have one as well.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 1 << 23), 252 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(power):
    """1 / power, exactly: a division is allowed to err."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


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
def dx_kernel(
    g_ptr,
    w_ptr,
    mask_ptr,
    dx_ptr,
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
    """grid (T / BN, parts of D). dx = g w, ``span`` chunks of BD columns a program; g stays on chip
    where BE holds all experts.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    keep = tokens_kept(n, mask_ptr, T)
    power = tl.zeros([BN], tl.float32)
    if SCALE:
        for e in range(0, E, BE):
            power = tl.maximum(
                power, tl.max(tl.abs(load_tokens(g_ptr, n, e + tl.arange(0, BE), keep, E, E)), 1)
            )
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
    g_ptr,
    x_ptr,
    mask_ptr,
    dw_ptr,
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
    """grid (D / BD, parts of T, E / BE). A chunk of dw^T = x^T g over ``span`` tokens, a multiple
    of BN: matrix instructions want 64 rows on their first side. The power of two grows with the
    largest g of an expert, as the maximum of an online softmax."""
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
