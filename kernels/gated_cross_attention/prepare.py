"""The first kernels of gated cross-attention: masks become rows, and LayerNorms are folded.

A token of a side is a row (see tokens.py) if no mask ignores it, and if the mode MISSING needs it:

    skip       samples in which both sides are present
    zero       queries: all samples; keys: samples in which their side is present
    attend     all samples
    constant   all samples; without dropout one key is enough in samples whose side is absent

A side is absent in a sample if its flag says so, or if all of its tokens are ignored.

LayerNorm is folded into the projections. With mean m, standard deviation s, weight gamma and bias
beta, a projection by w and b is

    LN(x) w^T + b = (x W^T - m c) / s + (b + w beta),    W = w gamma, c = row sums of W

c sums the rounded W, so that the mean cancels up to float32's precision.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import rounded_product
from .tokens import load_given, load_vector, store_tile, tile_at

WEIGHTS = tl.constexpr(8)  # queries, keys and values of two sides, and two gates


class Masks(NamedTuple):
    """What is given of one side; all are None if not given."""

    ignore_ptr: Tensor | None = None  # (B, N) uint8
    lengths_ptr: Tensor | None = None  # (B,) int32 or int64
    present_ptr: Tensor | None = None  # (B,) uint8
    count_ptr: Tensor | None = None  # (B,) int32, with ignore_ptr: the number of unmasked tokens


class Source(NamedTuple):
    """The tokens of one side, and what prepare_kernel writes for them."""

    x_ptr: Tensor  # (B, N, D)
    stride_b: int
    stride_n: int
    place_ptr: Tensor | None  # (B N,) int32: the row of each token, or -1
    rows_ptr: Tensor | None  # (R, D): packed copy; None if x is packed already
    out_ptr: Tensor | None  # (B N, D): gets the tokens that are not rows; None for keys only
    moments_ptr: Tensor | None  # (2, B N) float32: mean and 1 / standard deviation of the rows


class Weight(NamedTuple):
    """A weight of a projection to fold, or of a gate to copy; weight_ptr is None if absent."""

    weight_ptr: Tensor | None = None  # (C, K), or with the gate's indicator (C, K + 1)
    bias_ptr: Tensor | None = None  # (C,)
    gamma_ptr: Tensor | None = None  # (K,)
    beta_ptr: Tensor | None = None  # (K,)
    folded_ptr: Tensor | None = None  # (C, K)
    added_ptr: Tensor | None = None  # (C,) float32: gets the bias
    column_ptr: Tensor | None = None  # (C,) float32: gets c, or the indicator's column


# ---- masks --------------------------------------------------------------------------------------


@triton.jit
def _unmasked(masks, b, n, N, ok):
    """Return which tokens n of sample b no mask ignores."""
    if masks.ignore_ptr is not None:
        ok = ok & (tl.load(masks.ignore_ptr + b.to(tl.int64) * N + n, mask=ok, other=1) == 0)
    if masks.lengths_ptr is not None:
        ok = ok & (n < tl.load(masks.lengths_ptr + b))
    return ok


@triton.jit
def _count(masks, b, N, ok):
    """Return the number of unmasked tokens of the samples b."""
    count = tl.where(ok, N, 0)
    if masks.count_ptr is not None:
        count = tl.load(masks.count_ptr + b, mask=ok, other=0)
    if masks.lengths_ptr is not None:
        # Clamped, so that a wrong length never makes a kernel read out of bounds.
        length = tl.load(masks.lengths_ptr + b, mask=ok, other=0)
        count = tl.minimum(tl.maximum(length, 0), N).to(tl.int32)
    return count


@triton.jit
def _is_present(masks, b, count):
    """Return which of the samples b have this side."""
    present = count > 0
    if masks.present_ptr is not None:
        present = present & (tl.load(masks.present_ptr + b, mask=present, other=0) != 0)
    return present


@triton.jit
def _keys(count, present, other_present, MISSING: tl.constexpr, COLLAPSE: tl.constexpr):
    """Return how many tokens of this side the other side attends to."""
    if MISSING == "skip":
        count = tl.where(present & other_present, count, 0)
    if MISSING == "zero":
        count = tl.where(present, count, 0)
    if COLLAPSE:
        count = tl.where(present, count, tl.minimum(count, 1))
    return count


@triton.jit
def _used(count, keys, present, other_present, QUERIES: tl.constexpr, MISSING: tl.constexpr):
    """Return how many tokens of this side become rows."""
    if MISSING == "skip":
        used = tl.where(present & other_present, count, 0)
    elif QUERIES:
        used = count
    else:
        used = keys
    return used


@triton.jit
def count_kernel(
    first,
    second,
    N0,
    N1,
    BN: tl.constexpr,
):
    """Count the unmasked tokens of the sides that have a padding mask; grid (B,)."""
    b = tl.program_id(0)
    if first.count_ptr is not None:
        _count_sample(first, b, N0, BN)
    if second.count_ptr is not None:
        _count_sample(second, b, N1, BN)


@triton.jit
def _count_sample(masks, b, N, BN: tl.constexpr):
    count = 0
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        count += tl.sum(_unmasked(masks, b, n, N, n < N).to(tl.int32), 0)
    tl.store(masks.count_ptr + b, count)


@triton.jit
def pack_kernel(
    first,
    first_rows,
    first_place_ptr,
    second,
    second_rows,
    second_place_ptr,
    TWO_WAY: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
    ANY_PRESENT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """Number the rows of both sides; grid (B,), a sample for each program.

    ANY_PRESENT: the indicator of every sample is whether the side is present in any sample.
    """
    b = tl.program_id(0)
    B = first_rows.batch
    before0 = 0
    before1 = 0
    any0 = 0
    any1 = 0
    for start in range(0, B, BB):
        i = start + tl.arange(0, BB)
        count0 = _count(first, i, first_rows.length, i < B)
        count1 = _count(second, i, second_rows.length, i < B)
        present0 = _is_present(first, i, count0)
        present1 = _is_present(second, i, count1)
        keys1 = _keys(count1, present1, present0, MISSING, COLLAPSE)
        used0 = _used(count0, count0, present0, present1, True, MISSING)
        used1 = _used(count1, keys1, present1, present0, TWO_WAY, MISSING)
        before0 += tl.sum(tl.where(i < b, used0, 0), 0)
        before1 += tl.sum(tl.where(i < b, used1, 0), 0)
        any0 = tl.maximum(any0, tl.max(present0.to(tl.int32), 0))
        any1 = tl.maximum(any1, tl.max(present1.to(tl.int32), 0))
    # The same for this sample, as a vector of one element, because the functions take vectors.
    one = b + tl.arange(0, 1)
    count0 = _count(first, one, first_rows.length, one < B)
    count1 = _count(second, one, second_rows.length, one < B)
    present0 = _is_present(first, one, count0)
    present1 = _is_present(second, one, count1)
    keys0 = _keys(count0, present0, present1, MISSING, COLLAPSE)
    keys1 = _keys(count1, present1, present0, MISSING, COLLAPSE)
    used0 = _used(count0, count0, present0, present1, True, MISSING)
    used1 = _used(count1, keys1, present1, present0, TWO_WAY, MISSING)
    flag0 = present0
    flag1 = present1
    if ANY_PRESENT:
        flag0 = present0 | (any0 > 0)
        flag1 = present1 | (any1 > 0)
    _pack_sample(first, first_rows, first_place_ptr, one, before0, used0, keys0, flag0, BN)
    _pack_sample(second, second_rows, second_place_ptr, one, before1, used1, keys1, flag1, BN)


@triton.jit
def _pack_sample(masks, rows, place_ptr, one, before, used, keys, flag, BN: tl.constexpr):
    """Write the rows of one sample; ``used``, ``keys`` and ``flag`` have one element."""
    N = rows.length
    tl.store(rows.start_ptr + one, before + tl.zeros_like(used))
    tl.store(rows.start_ptr + one + 1, before + used, mask=one == rows.batch - 1)
    tl.store(rows.keys_ptr + one, keys)
    tl.store(rows.present_ptr + one, flag.to(tl.float32))
    b = tl.program_id(0)
    end = tl.max(used, 0)
    rank = 0
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        ok = _unmasked(masks, b, n, N, n < N)
        place = rank + tl.cumsum(ok.to(tl.int32), 0) - 1
        ok = ok & (place < end)
        rank += tl.sum(ok.to(tl.int32), 0)
        tl.store(rows.token_ptr + before + place, b * N + n, mask=ok)
        tl.store(place_ptr + b * N + n, tl.where(ok, before + place, -1), mask=n < N)


# ---- tokens and weights -------------------------------------------------------------------------


@triton.jit
def prepare_kernel(
    first,
    first_rows,
    second,
    second_rows,
    first_query,
    first_key,
    first_value,
    second_query,
    second_key,
    second_value,
    first_gate,
    second_gate,
    first_blocks,
    eps,
    C: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    INDICATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write the packed tokens, their moments, the folded weights, and the outputs of other tokens.

    Grid (WEIGHTS * C / BM + blocks of BM tokens of both sides,): the weights' programs are first.
    """
    pid = tl.program_id(0)
    weight_blocks: tl.constexpr = (C + BM - 1) // BM
    i = pid % weight_blocks
    which = pid // weight_blocks
    if which == 0:
        _fold(first_query, i, C, D0, BM, BN)
    elif which == 1:
        _fold(first_key, i, C, D0, BM, BN)
    elif which == 2:
        _fold(first_value, i, C, D0, BM, BN)
    elif which == 3:
        _fold(second_query, i, C, D1, BM, BN)
    elif which == 4:
        _fold(second_key, i, C, D1, BM, BN)
    elif which == 5:
        _fold(second_value, i, C, D1, BM, BN)
    elif which == 6:
        _copy_gate(first_gate, second_rows, i, C, INDICATOR, BM, BN)
    elif which == 7:
        _copy_gate(second_gate, first_rows, i, C, INDICATOR, BM, BN)
    else:
        block = pid - WEIGHTS * weight_blocks
        if block < first_blocks:
            _prepare_tokens(first, first_rows, block, eps, D0, BM, BN)
        else:
            _prepare_tokens(second, second_rows, block - first_blocks, eps, D1, BM, BN)


@triton.jit
def _prepare_tokens(source, rows, block, eps, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    t = block * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    count = rows.batch * rows.length
    there = t < count
    inside = cols[None, :] < D
    row = t
    wanted = there
    if source.place_ptr is not None:
        row = tl.load(source.place_ptr + t, mask=there, other=-1)
        if source.out_ptr is None:
            wanted = row >= 0
    x = load_given(source.x_ptr, source.stride_b, source.stride_n, rows.length, t, wanted, cols, D)
    if source.place_ptr is not None:
        if source.out_ptr is not None:
            store_tile(source.out_ptr, x, t, there & (row < 0), cols, D)
        there = row >= 0
    if source.rows_ptr is not None:
        store_tile(source.rows_ptr, x, row, there, cols, D)
    if source.moments_ptr is not None:
        x = x.to(tl.float32)
        mean = tl.sum(x, 1) / D
        centred = tl.where(inside, x - mean[:, None], 0.0)
        variance = tl.sum(rounded_product(centred, centred), 1) / D
        tl.store(source.moments_ptr + row, mean, mask=there)
        tl.store(source.moments_ptr + count + row, 1.0 / tl.sqrt(variance + eps), mask=there)


@triton.jit
def _fold(
    weight,
    block,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Fold the LayerNorm into BM rows of a projection's weight."""
    if weight.weight_ptr is not None:
        c = block * BM + tl.arange(0, BM)
        k = tl.arange(0, BN)
        ok = (c < C)[:, None] & (k < K)[None, :]
        w = tl.load(weight.weight_ptr + tile_at(c, k, K), mask=ok, other=0.0).to(tl.float32)
        bias = load_vector(weight.bias_ptr, c, c < C)
        if weight.gamma_ptr is not None:
            bias += tl.sum(rounded_product(w, load_vector(weight.beta_ptr, k, k < K)[None, :]), 1)
            w = w * load_vector(weight.gamma_ptr, k, k < K)[None, :]
        folded = w.to(weight.folded_ptr.dtype.element_ty)
        tl.store(weight.folded_ptr + tile_at(c, k, K), folded, mask=ok)
        tl.store(weight.added_ptr + c, bias, mask=c < C)
        tl.store(weight.column_ptr + c, tl.sum(folded.to(tl.float32), 1), mask=c < C)


@triton.jit
def _copy_gate(
    weight,
    context_rows,
    block,
    C: tl.constexpr,
    INDICATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Copy BM rows of a gate's weight without the indicator's column w_e.

    Rows of 2 C + 1 numbers are unaligned, and could only be loaded one number at a time. Without
    masks every context is present, and w_e is added to the bias.
    """
    if weight.weight_ptr is not None:
        c = block * BM + tl.arange(0, BM)
        bias = load_vector(weight.bias_ptr, c, c < C)
        width: tl.constexpr = 2 * C + 1 if INDICATOR else 2 * C
        for start in range(0, 2 * C, BN):
            k = start + tl.arange(0, BN)
            ok = (c < C)[:, None] & (k < 2 * C)[None, :]
            w = tl.load(weight.weight_ptr + tile_at(c, k, width), mask=ok, other=0.0)
            tl.store(weight.folded_ptr + tile_at(c, k, 2 * C), w, mask=ok)
        if INDICATOR:
            at = c.to(tl.int64) * width + 2 * C
            column = tl.load(weight.weight_ptr + at, mask=c < C, other=0.0).to(tl.float32)
            tl.store(weight.column_ptr + c, column, mask=c < C)
            if context_rows.start_ptr is None:
                bias += column
        tl.store(weight.added_ptr + c, bias, mask=c < C)
