"""Sums over the k rows of each token: the output in forward, the gradient of x in backward.

In backward, the same launch computes the gradient of the routing weights. Rows are gathered through
``position``, without scatter or atomics, in the same order on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, dense, rounded_product
from .plans import combine_block
from .rows import Rows


class RoutingGradient(NamedTuple):
    """Inputs and output of the gradient of the routing weights."""

    partial: Tensor  # (parts, R) float32, from hidden_kernel
    d_out: Tensor  # (T, D)
    bias: Tensor | None  # (E, D)
    d_combine: Tensor  # (T, k) float32, output


def combine_rows(
    rows: Rows,
    y: Tensor | None,
    combine_weights: Tensor | None = None,
    gradient: RoutingGradient | None = None,
) -> Tensor:
    """Sum y (R, N), times the routing weights if given, over the rows of each token, to (T, N).

    Without y the result is (0,). With ``gradient``, its d_combine is written too.
    """
    partial, d_out, bias, d_combine = gradient or (None, None, None, None)
    tokens = rows.number // rows.k
    like = d_out if y is None else y
    assert like is not None
    n = 0 if y is None else y.shape[1]
    inner = 0 if d_out is None else d_out.shape[1]
    out = like.new_empty((tokens, n) if y is not None else (0,))
    height, width = combine_block(max(n, inner))
    combine_kernel[(triton.cdiv(tokens, height), triton.cdiv(n, width) + (gradient is not None))](
        y_ptr=y,
        weights_ptr=dense(combine_weights),
        position_ptr=rows.position,
        offsets_ptr=rows.offsets,
        out_ptr=out,
        partial_ptr=partial,
        d_out_ptr=d_out,
        bias_ptr=dense(bias),
        ds_ptr=d_combine,
        T=tokens,
        R=rows.number,
        E=rows.experts,
        parts=0 if partial is None else len(partial),
        stride_d=0 if d_out is None else d_out.stride(0),
        N=n,
        D=inner,
        k=rows.k,
        BT=height,
        BN=width,
        BE=triton.next_power_of_2(rows.experts),
        num_warps=4,
        num_stages=1,
        **OPTIONS,
    )
    return out


@triton.jit
def combine_kernel(
    y_ptr,  # (R, N) or None
    weights_ptr,  # (T, k) or None
    position_ptr,  # (R,)
    offsets_ptr,  # (E + 1,)
    out_ptr,  # (T, N)
    partial_ptr,  # (parts, R)
    d_out_ptr,  # (T, D)
    bias_ptr,  # (E, D) or None
    ds_ptr,  # (T, k) or None
    T,
    R,
    E,
    parts,
    stride_d,
    N: tl.constexpr,
    D: tl.constexpr,
    k: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """Compute out_t = sum over j of w_tj y[position of (t, j)]; without weights, w = 1.

    grid (T / BT, N / BN). With ``ds_ptr``, one more column of programs computes dS, the gradient of
    the routing weights. Without y, the grid has only this column.
    """
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    valid = tl.load(offsets_ptr + E)
    if ds_ptr is not None:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _routing_gradient(
                partial_ptr,
                d_out_ptr,
                bias_ptr,
                position_ptr,
                offsets_ptr,
                ds_ptr,
                tokens,
                T,
                R,
                E,
                valid,
                parts,
                stride_d,
                D,
                k,
                BT,
                BN,
                BE,
            )
            return
    if y_ptr is not None:
        cols = tl.program_id(1) * BN + tl.arange(0, BN)
        acc = tl.zeros([BT, BN], tl.float32)
        for j in tl.static_range(k):
            a = tokens.to(tl.int64) * k + j
            row = tl.load(position_ptr + a, mask=tokens < T, other=R)
            inside = (row < valid)[:, None] & (cols < N)[None, :]
            at = row[:, None].to(tl.int64) * N + cols[None, :]
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if weights_ptr is not None:
                y *= tl.load(weights_ptr + a, mask=row < valid, other=0.0)[:, None]
            acc += y
        at = tokens[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(out_ptr + at, acc, mask=(tokens < T)[:, None] & (cols < N)[None, :])


@triton.jit
def _routing_gradient(
    partial_ptr,  # (parts, R)
    d_out_ptr,  # (T, D)
    bias_ptr,  # (E, D) or None
    position_ptr,  # (R,)
    offsets_ptr,  # (E + 1,)
    ds_ptr,  # (T, k)
    tokens,
    T,
    R,
    E,
    valid,
    parts,
    stride_d,
    D: tl.constexpr,
    k: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """Compute dS: the sum of hidden_kernel's parts, in order, plus dO . b with the expert's bias b.

    dS is 0 for masked tokens.
    """
    for j in range(k):
        a = tokens.to(tl.int64) * k + j
        row = tl.load(position_ptr + a, mask=tokens < T, other=R)
        keep = row < valid
        ds = tl.zeros([BT], tl.float32)
        for start in range(0, parts, 16):
            part = start + tl.arange(0, 16)
            at = part[None, :].to(tl.int64) * R + row[:, None]
            inside = keep[:, None] & (part < parts)[None, :]
            ds += tl.sum(tl.load(partial_ptr + at, mask=inside, other=0.0), 1)
        if bias_ptr is not None:
            experts = tl.arange(0, BE)
            ends = tl.load(offsets_ptr + 1 + experts, mask=experts < E, other=2147483647)
            expert = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1).to(tl.int64)
            for start in range(0, D, BN // 4):
                cols = start + tl.arange(0, BN // 4)
                inside = keep[:, None] & (cols < D)[None, :]
                at = tokens[:, None].to(tl.int64) * stride_d + cols[None, :]
                d = tl.load(d_out_ptr + at, mask=inside, other=0.0)
                b = tl.load(bias_ptr + expert[:, None] * D + cols[None, :], mask=inside, other=0.0)
                ds += tl.sum(rounded_product(d.to(tl.float32), b.to(tl.float32)), 1)
        tl.store(ds_ptr + a, ds, mask=tokens < T)
