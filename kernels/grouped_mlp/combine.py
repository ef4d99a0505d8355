"""Sums over a token's k rows, gathered through position: no scatter, no atomics, and the same order
on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _routing_gradient(
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
    live,
    parts,
    stride_d,
    D: tl.constexpr,
    k: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """dS (T, k): the parts that hidden_kernel left, added up in order, and <dO, bias of the
    expert>; 0 for masked tokens.
    """
    for j in range(k):
        a = tokens.to(tl.int64) * k + j
        row = tl.load(position_ptr + a, mask=tokens < T, other=R)
        keep = row < live
        ds = tl.zeros([BT], tl.float32)
        for start in range(0, parts, 16):
            part = start + tl.arange(0, 16)
            at = part[None, :].to(tl.int64) * R + row[:, None]
            ds += tl.sum(
                tl.load(partial_ptr + at, mask=keep[:, None] & (part < parts)[None, :], other=0.0),
                1,
            )
        if bias_ptr is not None:
            experts = tl.arange(0, BE)
            ends = tl.load(offsets_ptr + 1 + experts, mask=experts < E, other=2147483647)
            expert = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1).to(tl.int64)
            for start in range(0, D, BN // 4):
                cols = start + tl.arange(0, BN // 4)
                inside = keep[:, None] & (cols < D)[None, :]
                d = tl.load(
                    d_out_ptr + tokens[:, None].to(tl.int64) * stride_d + cols[None, :],
                    mask=inside,
                    other=0.0,
                )
                b = tl.load(bias_ptr + expert[:, None] * D + cols[None, :], mask=inside, other=0.0)
                ds += tl.sum(d.to(tl.float32) * b.to(tl.float32), 1)
        tl.store(ds_ptr + a, ds, mask=tokens < T)


@triton.jit
def combine_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    offsets_ptr,
    out_ptr,
    partial_ptr,
    d_out_ptr,
    bias_ptr,
    ds_ptr,
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
    """grid (T / BT, N / BN), and one more along the second where dS is wanted; only that one where
    y is not given.

    out (T, N): sum over j of y[position of (t, j)], y (R, N) sorted, times weights (T, k) where
    given."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    live = tl.load(offsets_ptr + E)
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
                live,
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
            inside = (row < live)[:, None] & (cols < N)[None, :]
            y = tl.load(
                y_ptr + row[:, None].to(tl.int64) * N + cols[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            if weights_ptr is not None:
                y *= tl.load(weights_ptr + a, mask=row < live, other=0.0)[:, None]
            acc += y
        at = tokens[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(out_ptr + at, acc, mask=(tokens < T)[:, None] & (cols < N)[None, :])
