"""Tiles of the grouped products: fixed for each architecture, without autotuning.

``make compile-matrix`` looks for spills in every entry, on every supported Triton and architecture.
Which of two entries without spills is faster was reasoned, not measured, until benchmarks/results
holds a run that shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tiles import tile_rows

KINDS = ("rows", "gated", "hidden", "gated hidden", "weights", "gathered weights")
# Two for each multiprocessor of an H200; fixed, so that results do not depend on the GPU.
PROGRAMS = 2 * 132


@dataclass(frozen=True)
class Tile:
    """BM by BN elements of the result, BK terms of the sum at a time, and options of the launch.

    ``halvings``: how often the columns of the tile are halved for the epilogue.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    halvings: int = 0


def plan(
    kind: str,
    rows: int,
    experts: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    arch: int,
) -> Tile:
    """Return the tile of a product.

    Values of ``kind``:

    - "rows": a product (R, k) x (k, n).
    - "gated": two such products of the same rows.
    - "hidden", "gated hidden": a product with an epilogue that reads pre-activations.
    - "weights": a result (n, k) for each expert, summed over the expert's rows.
    - "gathered weights": the same, with rows whose indices are looked up first.

    All but the last two have BM = tile_rows.
    """
    height = tile_rows(rows, experts)
    large = arch in (90, 100, 103)  # 228 KB of shared memory; tiles of the others fit into 99 KB
    odd = n % 16 != 0 or k % 16 != 0  # loaded one element at a time, which takes registers
    if kind.endswith("weights"):
        return _weights(kind, height, rows // experts, dtype, large, odd)
    both = 2 if kind == "gated" else 1
    if dtype == torch.float32:
        warps = 8 if height >= 64 else 4
        return Tile(height, 64 // both, 16, warps, 2, 2 if kind.endswith("hidden") else 0)
    if odd:
        # An undivided epilogue of 128 rows spills 8 bytes on sm_120 under Triton 3.6.
        halvings = 1 if kind.endswith("hidden") or (kind == "rows" and height == 128) else 0
        return Tile(height, 64 // both, 32, 8 if height == 128 else 4, 2, halvings)
    if height == 128:
        return _tall(kind, rows, n, k) if large else _tall_small(kind)
    # With few rows the weights are streamed, one block of columns after the other. That needs
    # enough programs to keep loads in flight.
    tiles = rows // height + experts // 2
    wide = 64 if height == 16 or tiles * -(-n * both // 128) < PROGRAMS else 128
    if height == 64:
        return Tile(64, wide // both, 64, 4, 4 if large else 3, 1 if wide == 128 else 0)
    # An undivided epilogue of 16 rows spills 8 bytes on sm_90 under Triton 3.8, and with eight
    # warps on sm_100 under 3.9.
    halvings = 1 if height == 16 and kind.endswith("hidden") else 0
    return Tile(height, wide // both, 64, 4, 4, halvings)


def _tall(kind: str, rows: int, n: int, k: int) -> Tile:
    """Return a tile of 128 rows for 228 KB of shared memory.

    Long sums hide the epilogue, and need the fewest bytes per FLOP. For short sums two programs
    share a multiprocessor, so that one computes during the epilogue of the other.
    """
    long = k >= 1024 and (rows // 128) * (n // 128) >= PROGRAMS
    if kind == "gated":
        return Tile(128, 128, 64, 8, 4, 2) if long else Tile(128, 64, 64, 8, 3, 1)
    if kind == "rows":
        return Tile(128, 256, 64, 8, 4, 2) if long else Tile(128, 128, 64, 8, 3, 1)
    return Tile(128, 128, 64, 8, 3, 3 if kind == "gated hidden" else 2)


def _tall_small(kind: str) -> Tile:
    if kind == "gated":
        return Tile(128, 64, 32, 8, 4)
    return Tile(128, 128, 32, 8, 4, 1 if kind == "rows" else 2)


def _weights(
    kind: str,
    height: int,
    each: int,
    dtype: torch.dtype,
    large: bool,
    odd: bool,
) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 64, 16, 8, 2)
    if odd:
        return Tile(64, 32, 32, 4, 2)
    # Looking up the rows first takes half of the pipeline's stages.
    stages = 5 if kind == "gathered weights" else 3 if large else 4
    if height <= 32:
        return Tile(64, 128, 32, 4, stages)
    if large and each >= 512:
        return Tile(128, 256, 64, 8, stages)
    return Tile(128, 128, 64 if large else 32, 8, stages)


def combine_block(n: int) -> tuple[int, int]:
    """Return how many tokens and columns one program of combine_kernel sums.

    At most 4096 sums, so that even a small batch has a program for each multiprocessor.
    """
    width = min(512, 1 << (max(16, n) - 1).bit_length())
    return min(64, 4096 // width), width
