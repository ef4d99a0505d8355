"""The last step of the gradients of weights, biases and norms: adding up partial sums.

weights_kernel in weights.py computes partial sums of G = d^T a and of d over the rows. For
projections w of normalised tokens, ``a`` are the tokens before the norm's weight and bias, gamma
and beta. Then, for the sums db of d:

    dw[c, j] = G[c, j] gamma[j] + db[c] beta[j]
    d gamma[j] = sum_c w[c, j] G[c, j]          d beta[j] = sum_c w[c, j] db[c]

All sums are added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import cdiv, rounded_product


class Projections(NamedTuple):
    """The projections of one side's tokens; pointers of projections that do not exist are None."""

    partial_ptr: Tensor | None  # (splits, P D, K): those of q, k and v that exist
    sums_ptr: Tensor | None  # (splits, 2, P D); None without norm and biases
    splits: int
    gamma_ptr: Tensor | None  # (K,), or None if the tokens are not normalised
    beta_ptr: Tensor | None  # (K,)
    norm_ptr: Tensor | None  # (2, P D / BM, K) float32, written: partial sums for norm_kernel
    w_q_ptr: Tensor | None  # (D, K); the weights are needed only with gamma
    w_k_ptr: Tensor | None
    w_v_ptr: Tensor | None
    d_w_q_ptr: Tensor | None  # (D, K), written
    d_w_k_ptr: Tensor | None
    d_w_v_ptr: Tensor | None
    d_b_q_ptr: Tensor | None  # (D,), written, or None
    d_b_k_ptr: Tensor | None
    d_b_v_ptr: Tensor | None


class Layer(NamedTuple):
    """An output projection or a gate; without it, the pointers are None."""

    partial_ptr: Tensor | None = None  # (splits, C, K)
    sums_ptr: Tensor | None = None  # (splits, 2, C)
    splits: int = 0
    d_w_ptr: Tensor | None = None  # (C, K), or (C, K + 1) with a column for the indicator; written
    d_b_ptr: Tensor | None = None  # (C,), written, or None


class NormSums(NamedTuple):
    """Partial sums of the gradients of a norm; without it, the pointers are None."""

    partial_ptr: Tensor | None = None  # (2, partials, K) float32: for gamma and for beta
    partials: int = 0
    d_gamma_ptr: Tensor | None = None  # (K,), written
    d_beta_ptr: Tensor | None = None  # (K,), written


@triton.jit
def finish_kernel(
    first,
    second,
    first_output,
    second_output,
    first_gate,
    second_gate,
    D: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add the partial sums up, and write the gradients in the parameters' dtype.

    GATE is the number of the gate's outputs: D, 1, or 0. A program computes BM rows and BN columns
    of one gradient. Grid: the sum of finish_programs over both sides.
    """
    pid = tl.program_id(0)
    # The programs of each section follow those of the section before.
    pid = _finish_projections(first, pid, D, K0, BM, BN)
    pid = _finish_projections(second, pid, D, K1, BM, BN)
    pid = _finish_layer(first_output, pid, D, D, False, BM, BN)
    pid = _finish_layer(second_output, pid, D, D, False, BM, BN)
    pid = _finish_layer(first_gate, pid, GATE, 2 * D, INDICATOR, BM, BN)
    _finish_layer(second_gate, pid, GATE, 2 * D, INDICATOR, BM, BN)


def finish_programs(
    parts: int,
    dim: int,
    width: int,
    is_query: bool,
    gate: int,
    BM: int,
    BN: int,
) -> int:
    """Return the programs of finish_kernel for a side with ``parts`` projections.

    ``width``: that of the side's tokens. ``gate``: the number of the gate's outputs.
    """
    d_blocks = cdiv(dim, BM)
    programs = parts * d_blocks * cdiv(width, BN)
    if is_query:
        programs += d_blocks * cdiv(dim, BN)
        programs += cdiv(gate, BM) * cdiv(2 * dim, BN)
    return programs


@triton.jit
def _finish_projections(
    side,
    pid,
    D: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Finish the projections of one side if ``pid`` is one of its programs; return the next pid."""
    Q: tl.constexpr = 0 if side.d_w_q_ptr is None else 1
    PARTS: tl.constexpr = Q + (0 if side.d_w_k_ptr is None else 2)
    k_blocks: tl.constexpr = (K + BN - 1) // BN
    each: tl.constexpr = (D + BM - 1) // BM * k_blocks
    if side.d_w_q_ptr is not None:
        if (pid >= 0) & (pid < each):
            _finish_projection(
                side,
                pid,
                0,
                side.w_q_ptr,
                side.d_w_q_ptr,
                side.d_b_q_ptr,
                PARTS,
                D,
                K,
                BM,
                BN,
                False,
            )
    if side.d_w_k_ptr is not None:
        if (pid >= Q * each) & (pid < (Q + 1) * each):
            _finish_projection(
                side,
                pid - Q * each,
                Q,
                side.w_k_ptr,
                side.d_w_k_ptr,
                side.d_b_k_ptr,
                PARTS,
                D,
                K,
                BM,
                BN,
                True,
            )
        if (pid >= (Q + 1) * each) & (pid < (Q + 2) * each):
            _finish_projection(
                side,
                pid - (Q + 1) * each,
                Q + 1,
                side.w_v_ptr,
                side.d_w_v_ptr,
                side.d_b_v_ptr,
                PARTS,
                D,
                K,
                BM,
                BN,
                False,
            )
    return pid - PARTS * each


@triton.jit
def _finish_projection(
    side,
    pid,
    PART: tl.constexpr,
    w_ptr,
    d_w_ptr,
    d_b_ptr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    C: tl.constexpr = PARTS * D
    k_blocks: tl.constexpr = (K + BN - 1) // BN
    row_blocks: tl.constexpr = (D + BM - 1) // BM
    cs = pid // k_blocks * BM + tl.arange(0, BM)
    ks = pid % k_blocks * BN + tl.arange(0, BN)
    at = cs[:, None] * K + ks[None, :]
    inside = (cs[:, None] < D) & (ks[None, :] < K)
    g = _add_splits(side.partial_ptr + PART * (D * K) + at, inside, side.splits, C * K)
    sums = tl.zeros([BM], tl.float32)
    # The softmax does not change with the keys' bias, so the sums of its gradient are exactly 0.
    if not IS_KEY:
        if side.sums_ptr is not None:
            sums = _add_splits(side.sums_ptr + PART * D + cs, cs < D, side.splits, 2 * C)
    if d_b_ptr is not None:
        if pid % k_blocks == 0:
            tl.store(d_b_ptr + cs, sums.to(d_b_ptr.dtype.element_ty), mask=cs < D)
    d_w = g
    if side.gamma_ptr is not None:
        gamma = tl.load(side.gamma_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        beta = tl.load(side.beta_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        d_w = g * gamma[None, :] + sums[:, None] * beta[None, :]
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        norm_ptr = side.norm_ptr + (PART * row_blocks + pid // k_blocks) * K + ks
        tl.store(norm_ptr, tl.sum(rounded_product(w, g), 0), mask=ks < K)
        beta_sums = tl.sum(rounded_product(w, sums[:, None] + tl.zeros_like(w)), 0)
        tl.store(norm_ptr + PARTS * row_blocks * K, beta_sums, mask=ks < K)
    tl.store(d_w_ptr + at, d_w.to(d_w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_layer(
    layer,
    pid,
    C: tl.constexpr,
    K: tl.constexpr,
    INDICATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Finish one layer if ``pid`` is one of its programs; return the next section's pid."""
    k_blocks: tl.constexpr = (K + BN - 1) // BN
    programs: tl.constexpr = (C + BM - 1) // BM * k_blocks
    width: tl.constexpr = K + 1 if INDICATOR else K
    if layer.d_w_ptr is not None:
        if (pid >= 0) & (pid < programs):
            cs = pid // k_blocks * BM + tl.arange(0, BM)
            ks = pid % k_blocks * BN + tl.arange(0, BN)
            inside = (cs[:, None] < C) & (ks[None, :] < K)
            g = _add_splits(
                layer.partial_ptr + cs[:, None] * K + ks[None, :], inside, layer.splits, C * K
            )
            d_w_ptr = layer.d_w_ptr + cs[:, None] * width
            tl.store(d_w_ptr + ks[None, :], g.to(layer.d_w_ptr.dtype.element_ty), mask=inside)
            if pid % k_blocks == 0:
                if layer.d_b_ptr is not None:
                    sums = _add_splits(layer.sums_ptr + cs, cs < C, layer.splits, 2 * C)
                    tl.store(
                        layer.d_b_ptr + cs, sums.to(layer.d_b_ptr.dtype.element_ty), mask=cs < C
                    )
                if INDICATOR:
                    sums = _add_splits(layer.sums_ptr + C + cs, cs < C, layer.splits, 2 * C)
                    tl.store(
                        layer.d_w_ptr + cs * width + K,
                        sums.to(layer.d_w_ptr.dtype.element_ty),
                        mask=cs < C,
                    )
        pid -= programs
    return pid


@triton.jit
def _add_splits(
    pointers,
    ok,
    splits,
    STRIDE: tl.constexpr,
):
    """Return the sum of the values at these pointers over all splits, in their order."""
    acc = tl.load(pointers, mask=ok, other=0.0)
    # Unrolled, so that several loads are under way at once.
    for _ in tl.range(1, splits, loop_unroll_factor=8):
        pointers += STRIDE
        acc += tl.load(pointers, mask=ok, other=0.0)
    return acc


@triton.jit
def norm_kernel(
    first,
    second,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add up the partial sums of the norms' gradients; grid (K0 / BN + K1 / BN,)."""
    pid = tl.program_id(0)
    programs: tl.constexpr = (K0 + BN - 1) // BN
    if pid < programs:
        if first.partial_ptr is not None:
            _finish_norm(first, pid, K0, BM, BN)
    else:
        if second.partial_ptr is not None:
            _finish_norm(second, pid - programs, K1, BM, BN)


@triton.jit
def _finish_norm(
    norm,
    pid,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ks = pid * BN + tl.arange(0, BN)
    d_gamma = tl.zeros([BM, BN], tl.float32)
    d_beta = tl.zeros([BM, BN], tl.float32)
    for start in range(0, norm.partials, BM):
        row = start + tl.arange(0, BM)
        ok = (row[:, None] < norm.partials) & (ks[None, :] < K)
        at = row[:, None] * K + ks[None, :]
        d_gamma += tl.load(norm.partial_ptr + at, mask=ok, other=0.0)
        d_beta += tl.load(norm.partial_ptr + norm.partials * K + at, mask=ok, other=0.0)
    gamma_type = norm.d_gamma_ptr.dtype.element_ty
    tl.store(norm.d_gamma_ptr + ks, tl.sum(d_gamma, 0).to(gamma_type), mask=ks < K)
    beta_type = norm.d_beta_ptr.dtype.element_ty
    tl.store(norm.d_beta_ptr + ks, tl.sum(d_beta, 0).to(beta_type), mask=ks < K)
