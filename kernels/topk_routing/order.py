"""From choices to the order the experts work in: two launches of the forward, and three for a
routing made elsewhere.

Expert by expert, the assignments of a block of tokens go behind those of all blocks before it: a
scan over the blocks' counts, in a fixed order, and a rank within the block. Rows of the partial
counts: forward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import tile_entries
from .scores import load_choice, tokens_kept


@triton.jit
def count_kernel(
    indices_ptr,
    mask_ptr,
    ints_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """grid (T / BR,). E assignments to each expert and 1 count of masked tokens, for choices that
    come without logits.
    """
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    experts = tl.arange(0, BE)
    keep = tokens_kept(n, mask_ptr, T)
    times = _times(indices_ptr, n, keep, experts, E, K, BR, BE)
    ints_ptr += tl.program_id(0).to(tl.int64) * (E + 1)
    tl.store(ints_ptr + experts, tl.sum(times, 0), mask=experts < E)
    tl.store(ints_ptr + E, tl.sum(((n < T) & (keep == 0)).to(tl.int32), 0))


@triton.jit
def _times(
    indices_ptr,
    n,
    keep,
    experts,
    E: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """How often each kept token chose each expert."""
    times = tl.zeros([BR, BE], tl.int32)
    for j in range(K):
        at, _ = load_choice(indices_ptr, n, j, keep, E, K)
        times += (keep[:, None] & (experts[None, :] == at[:, None])).to(tl.int32)
    return times


@triton.jit
def scan_kernel(
    ints_ptr,
    floats_ptr,
    prefix_ptr,
    totals_ptr,
    sums_ptr,
    G,
    W,
    V,
    int_blocks,
    E: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
):
    """grid (W / BC + V / BC,). Column sums over the G blocks: integers, with what comes before each
    block in the first E + 1 columns, then floats, in float64."""
    program = tl.program_id(0)
    if program < int_blocks:
        c = program * BC + tl.arange(0, BC)
        count = tl.zeros([BC], tl.int32)
        for start in range(0, G, BG):
            g = start + tl.arange(0, BG)
            inside = (g[:, None] < G) & (c[None, :] < W)
            x = tl.load(ints_ptr + g[:, None].to(tl.int64) * W + c[None, :], mask=inside, other=0)
            before = tl.cumsum(x, 0) - x + count[None, :]
            at = g[:, None].to(tl.int64) * (E + 1) + c[None, :]
            tl.store(prefix_ptr + at, before, mask=inside & (c[None, :] <= E))
            count += tl.sum(x, 0)
        tl.store(totals_ptr + c, count, mask=c < W)
    elif floats_ptr is not None:
        c = (program - int_blocks) * BC + tl.arange(0, BC)
        total = tl.zeros([BC], tl.float64)
        for start in range(0, G, BG):
            g = start + tl.arange(0, BG)
            inside = (g[:, None] < G) & (c[None, :] < V)
            x = tl.load(
                floats_ptr + g[:, None].to(tl.int64) * V + c[None, :], mask=inside, other=0.0
            )
            total += tl.sum(x.to(tl.float64), 0)
        tl.store(sums_ptr + c, total, mask=c < V)


@triton.jit
def finish_kernel(
    indices_ptr,
    mask_ptr,
    available_ptr,
    prefix_ptr,
    totals_ptr,
    sums_ptr,
    order_ptr,
    position_ptr,
    offsets_ptr,
    tiles_ptr,
    counts_ptr,
    losses_ptr,
    coefficients_ptr,
    T,
    G,
    num_tiles,
    tile_blocks,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BALANCE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BI: tl.constexpr,
):
    """grid (G + tile blocks + 1,). Order and position of a block of tokens; BI tiles of H rows;
    offsets, losses and the like.
    """
    program = tl.program_id(0)
    experts = tl.arange(0, BE)
    size = tl.load(totals_ptr + experts, mask=experts < E, other=0)
    end = tl.cumsum(size, 0)
    if program < G:
        _place(
            indices_ptr,
            mask_ptr,
            prefix_ptr,
            order_ptr,
            position_ptr,
            program,
            T,
            experts,
            end - size,
            tl.sum(size, 0),
            E,
            K,
            BR,
            BE,
        )
    elif program < G + tile_blocks:
        i = (program - G) * BI + tl.arange(0, BI)
        expert, row = tile_entries(i, end - size, end, H)
        tl.store(tiles_ptr + 2 * i, expert, mask=i < num_tiles)
        tl.store(tiles_ptr + 2 * i + 1, row, mask=i < num_tiles)
    else:
        tl.store(offsets_ptr + experts, end - size, mask=experts < E)
        tl.store(offsets_ptr + E, tl.sum(size, 0))
        if BALANCE != "none":
            _losses(
                available_ptr,
                totals_ptr,
                sums_ptr,
                counts_ptr,
                losses_ptr,
                coefficients_ptr,
                experts,
                E,
                K,
                S,
                BALANCE,
            )


@triton.jit
def _place(
    indices_ptr,
    mask_ptr,
    prefix_ptr,
    order_ptr,
    position_ptr,
    program,
    T,
    experts,
    begin,
    valid_rows,
    E: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """Assignment t * K + j goes behind those of its expert that come before it: in other blocks, in
    other tokens, in slots < j.
    """
    n = program * BR + tl.arange(0, BR)
    keep = tokens_kept(n, mask_ptr, T)
    prefix_ptr += program.to(tl.int64) * (E + 1)
    times = _times(indices_ptr, n, keep, experts, E, K, BR, BE)
    base = begin + tl.load(prefix_ptr + experts, mask=experts < E, other=0)
    row = base[None, :] + tl.cumsum(times, 0) - times
    masked = ((n < T) & (keep == 0)).to(tl.int32)
    masked_row = valid_rows + K * (tl.load(prefix_ptr + E) + tl.cumsum(masked, 0) - masked)
    for j in range(K):
        at, _ = load_choice(indices_ptr, n, j, keep, E, K)
        here = experts[None, :] == at[:, None]
        mine = tl.where(keep, tl.sum(tl.where(here, row, 0), 1), masked_row + j)
        row += here.to(tl.int32)  # a replayed choice may name an expert twice
        tl.store(position_ptr + n * K + j, mine, mask=n < T)
        tl.store(order_ptr + mine, n * K + j, mask=n < T)


@triton.jit
def _losses(
    available_ptr,
    totals_ptr,
    sums_ptr,
    counts_ptr,
    losses_ptr,
    coefficients_ptr,
    experts,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BALANCE: tl.constexpr,
):
    """In float64 from sums in float64, which costs nothing here: "mse" is a difference of like
    numbers. Without tokens all is 0.
    """
    SEGMENTS_AT: tl.constexpr = E + 1 + S if S > 1 else 0
    FIRST_AT: tl.constexpr = E + 1 + S + (S * E if S > 1 else 0)
    exists = experts < E
    tokens = 0
    segments = 0
    for s in range(S):
        number = tl.load(totals_ptr + E + 1 + s)
        tokens += number
        segments += (number > 0).to(tl.int32)
    balance = tl.full((), 0.0, tl.float64)
    for s in range(S):
        number = tl.load(totals_ptr + E + 1 + s)
        share_of = 1.0 / (
            tl.maximum(number, 1).to(tl.float64) * tl.maximum(segments, 1).to(tl.float64)
        )
        times = tl.load(totals_ptr + SEGMENTS_AT + s * E + experts, mask=exists, other=0)
        tl.store(counts_ptr + s * E + experts, times.to(tl.int64), mask=exists)
        usable = exists
        if available_ptr is not None:
            usable = tl.load(available_ptr + s * E + experts, mask=exists, other=0) != 0
        size = tl.sum(usable.to(tl.int32), 0).to(tl.float64)
        mean = tl.load(sums_ptr + s * E + experts, mask=exists, other=0.0) / tl.maximum(
            number, 1
        ).to(tl.float64)
        if BALANCE == "mse":
            target = tl.where(usable & (number > 0), 1.0 / tl.maximum(size, 1.0), 0.0)
            off = mean - target  # what nobody may use has a mean of 0, or NaN
            slope = 2.0 * off
            loss = tl.sum(off * off, 0)
        else:
            if BALANCE == "gshard":
                times = tl.load(totals_ptr + FIRST_AT + s * E + experts, mask=exists, other=0) * K
            slope = size * times.to(tl.float64) / (K * tl.maximum(number, 1).to(tl.float64))
            loss = tl.sum(slope * mean, 0)
        balance += loss
        tl.store(coefficients_ptr + s * E + experts, (slope * share_of).to(tl.float32), mask=exists)
    each = 1.0 / tl.maximum(tokens, 1).to(tl.float64)
    tl.store(losses_ptr, (balance / tl.maximum(segments, 1).to(tl.float64)).to(tl.float32))
    tl.store(losses_ptr + 1, (tl.load(sums_ptr + S * E) * each).to(tl.float32))
    tl.store(losses_ptr + 2, (tl.load(sums_ptr + S * E + 1) * each).to(tl.float32))
    tl.store(coefficients_ptr + S * E, tl.where(tokens > 0, each, 0.0).to(tl.float32))
