"""Sort the assignments by expert, and finish the statistics of a routing.

``sort`` runs the last two of the forward's three launches. ``order`` sorts a given choice, in three
launches. The assignments to an expert stay in the order of their tokens: the rank of an assignment
is the number of the expert's assignments in earlier blocks of tokens, plus the rank among the
expert's assignments in the same block. For the columns of the partial counts see choice.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, rounded_product, tile_block, tile_entries, tile_rows
from .plans import plan, width
from .scores import as_bytes, load_choice, tokens_kept

SCAN_ROWS = 512
SCAN_COLUMNS = 8


class Statistics(NamedTuple):
    """Inputs and outputs of ``sort`` for the statistics of a routing."""

    available: Tensor | None  # (S, E) bytes
    floats: Tensor  # (blocks, V) float32, the partial sums
    counts: Tensor  # (S, E) int64, output
    losses: Tensor  # (3,), output: balance, z, entropy
    coefficients: Tensor  # (S * E + 1,), output: derivatives of the balance loss, 1 / tokens


def order(
    indices: Tensor,  # (T, k) int64
    mask: Tensor | None,  # (T,) bool
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return order, position, offsets and tiles of a given choice, in three launches.

    Indices are clamped to [0, E).
    """
    tokens, k = indices.shape
    indices, mask = indices.contiguous(), as_bytes(mask)
    rows = plan(num_experts, torch.float32, arch_of(indices), False).rows
    blocks = triton.cdiv(tokens, rows.BR)
    partial = indices.new_empty(blocks, num_experts + 1, dtype=torch.int32)
    count_kernel[(blocks,)](
        indices_ptr=indices,
        mask_ptr=mask,
        ints_ptr=partial,
        T=tokens,
        E=num_experts,
        K=k,
        BE=width(num_experts),
        **asdict(rows),
        num_stages=1,
        **OPTIONS,
    )
    return sort(indices, mask, num_experts, 1, "none", rows.BR, partial)


def sort(
    indices: Tensor,
    mask: Tensor | None,
    experts: int,
    segments: int,
    balance: str,
    block: int,
    partial_counts: Tensor,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return order, position, offsets and tiles, in two launches.

    With ``statistics``, also write its outputs. ``partial_counts`` (blocks, W) has one row for each
    block of ``block`` tokens.
    """
    tokens, k = indices.shape
    rows, blocks, count_columns = tokens * k, *partial_counts.shape
    stats = statistics or (None, None, None, None, None)
    available, partial_floats, counts, losses, coefficients = stats
    float_columns = 0 if partial_floats is None else partial_floats.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return indices.new_empty(shape, dtype=dtype)

    prefix, totals = empty(blocks, experts + 1), empty(count_columns)
    sums = None if partial_floats is None else empty(float_columns, dtype=torch.float64)
    int_blocks = triton.cdiv(count_columns, SCAN_COLUMNS)
    scan_kernel[(int_blocks + triton.cdiv(float_columns, SCAN_COLUMNS),)](
        ints_ptr=partial_counts,
        floats_ptr=partial_floats,
        prefix_ptr=prefix,
        totals_ptr=totals,
        sums_ptr=sums,
        G=blocks,
        W=count_columns,
        V=float_columns,
        int_blocks=int_blocks,
        E=experts,
        BG=SCAN_ROWS,
        BC=SCAN_COLUMNS,
        num_warps=4,
        num_stages=3,
        **OPTIONS,
    )
    sorted_rows, position = empty(rows), empty(rows)
    offsets, tiles = empty(experts + 1), empty(rows // 16 + experts, 2)
    tile_blocks = triton.cdiv(len(tiles), tile_block(experts))
    finish_kernel[(blocks + tile_blocks + 1,)](
        indices_ptr=indices,
        mask_ptr=mask,
        available_ptr=available,
        prefix_ptr=prefix,
        totals_ptr=totals,
        sums_ptr=sums,
        order_ptr=sorted_rows,
        position_ptr=position,
        offsets_ptr=offsets,
        tiles_ptr=tiles,
        counts_ptr=counts,
        losses_ptr=losses,
        coefficients_ptr=coefficients,
        T=tokens,
        G=blocks,
        num_tiles=len(tiles),
        tile_blocks=tile_blocks,
        H=tile_rows(rows, experts),
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
        **OPTIONS,
    )
    return sorted_rows, position, offsets, tiles


@triton.jit
def count_kernel(
    indices_ptr,  # (T, K)
    mask_ptr,  # (T,) or None
    ints_ptr,  # (G, E + 1)
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """Count the assignments to each expert, and the masked tokens; grid (T / BR,)."""
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
    """Return how often each kept token chose each expert."""
    times = tl.zeros([BR, BE], tl.int32)
    for j in range(K):
        at, _ = load_choice(indices_ptr, n, j, keep, E, K)
        times += (keep[:, None] & (experts[None, :] == at[:, None])).to(tl.int32)
    return times


@triton.jit
def scan_kernel(
    ints_ptr,  # (G, W)
    floats_ptr,  # (G, V) or None
    prefix_ptr,  # (G, E + 1)
    totals_ptr,  # (W,)
    sums_ptr,  # (V,) float64, or None
    G,
    W,
    V,
    int_blocks,
    E: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
):
    """Sum the columns of the partial statistics over the G blocks; grid (W / BC + V / BC,).

    For each block, also write the sums of the first E + 1 integer columns over all earlier blocks.
    Floats are summed in float64.
    """
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
            at = g[:, None].to(tl.int64) * V + c[None, :]
            x = tl.load(floats_ptr + at, mask=inside, other=0.0)
            total += tl.sum(x.to(tl.float64), 0)
        tl.store(sums_ptr + c, total, mask=c < V)


@triton.jit
def finish_kernel(
    indices_ptr,  # (T, K)
    mask_ptr,  # (T,) or None
    available_ptr,  # (S, E) or None
    prefix_ptr,  # (G, E + 1)
    totals_ptr,  # (W,)
    sums_ptr,  # (V,) or None
    order_ptr,  # (T * K,)
    position_ptr,  # (T * K,)
    offsets_ptr,  # (E + 1,)
    tiles_ptr,  # (num_tiles, 2)
    counts_ptr,  # (S, E) or None
    losses_ptr,  # (3,) or None
    coefficients_ptr,  # (S * E + 1,) or None
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
    """Write order, position, tiles and offsets and, unless BALANCE is "none", the statistics.

    grid (G + tile_blocks + 1,). Each of the first G programs writes order and position of one block
    of tokens. Each of the next tile_blocks programs writes BI tiles of H rows. The last program
    writes everything else.
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
    """Write order and position of one block of tokens.

    Assignment t * K + j is slot j of token t. The assignments to an expert are in ascending order.
    The assignments of masked tokens come last.
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
        sorted_row = tl.where(keep, tl.sum(tl.where(here, row, 0), 1), masked_row + j)
        row += here.to(tl.int32)  # a given choice may hold an expert twice
        tl.store(position_ptr + n * K + j, sorted_row, mask=n < T)
        tl.store(order_ptr + sorted_row, n * K + j, mask=n < T)


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
    """Write counts, losses and coefficients, which are all 0 if every token is masked.

    Losses are computed in float64, because "mse" subtracts nearly equal numbers.
    """
    SEGMENTS_AT: tl.constexpr = E + 1 + S if S > 1 else 0
    FIRST_AT: tl.constexpr = E + 1 + S + (S * E if S > 1 else 0)
    exists = experts < E
    tokens = 0
    segments = 0
    for s in range(S):
        segment_tokens = tl.load(totals_ptr + E + 1 + s)
        tokens += segment_tokens
        segments += (segment_tokens > 0).to(tl.int32)
    balance = tl.full((), 0.0, tl.float64)
    for s in range(S):
        segment_tokens = tl.load(totals_ptr + E + 1 + s)
        nonempty = tl.maximum(segments, 1).to(tl.float64)
        share = 1.0 / (tl.maximum(segment_tokens, 1).to(tl.float64) * nonempty)
        times = tl.load(totals_ptr + SEGMENTS_AT + s * E + experts, mask=exists, other=0)
        tl.store(counts_ptr + s * E + experts, times.to(tl.int64), mask=exists)
        usable = exists
        if available_ptr is not None:
            usable = tl.load(available_ptr + s * E + experts, mask=exists, other=0) != 0
        num_available = tl.sum(usable.to(tl.int32), 0).to(tl.float64)
        mean = tl.load(sums_ptr + s * E + experts, mask=exists, other=0.0)
        mean = mean / tl.maximum(segment_tokens, 1).to(tl.float64)
        if BALANCE == "mse":
            target = tl.where(
                usable & (segment_tokens > 0), 1.0 / tl.maximum(num_available, 1.0), 0.0
            )
            difference = mean - target  # the mean of an unavailable expert is 0, or NaN
            slope = 2.0 * difference
            loss = tl.sum(rounded_product(difference, difference), 0)
        else:
            if BALANCE == "gshard":
                times = tl.load(totals_ptr + FIRST_AT + s * E + experts, mask=exists, other=0) * K
            slope = (
                num_available
                * times.to(tl.float64)
                / (K * tl.maximum(segment_tokens, 1).to(tl.float64))
            )
            loss = tl.sum(rounded_product(slope, mean), 0)
        balance += loss
        tl.store(coefficients_ptr + s * E + experts, (slope * share).to(tl.float32), mask=exists)
    per_token = 1.0 / tl.maximum(tokens, 1).to(tl.float64)
    tl.store(losses_ptr, (balance / tl.maximum(segments, 1).to(tl.float64)).to(tl.float32))
    tl.store(losses_ptr + 1, (tl.load(sums_ptr + S * E) * per_token).to(tl.float32))
    tl.store(losses_ptr + 2, (tl.load(sums_ptr + S * E + 1) * per_token).to(tl.float32))
    tl.store(coefficients_ptr + S * E, tl.where(tokens > 0, per_token, 0.0).to(tl.float32))
