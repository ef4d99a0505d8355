"""Tile sizes of grouped products, chosen by shape, dtype and architecture.

``make compile-matrix`` checks the tiles for register spills, on every supported Triton and
architecture. The tiles were chosen by estimates; ``mmfused tune`` times them and their
alternatives, and what is faster on a user's GPU replaces them there (tuned.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tiles import tile_rows
from ..tuned import bucket, tunable

KINDS = ("rows", "gated", "hidden", "gated hidden", "weights", "gathered weights")
# Two programs for each of an H200's 132 multiprocessors. The number is the same on every GPU, so
# that GPUs of one architecture use the same tiles.
PROGRAMS = 2 * 132


@dataclass(frozen=True)
class Tile:
    """A tile of BM x BN results, summed over BK terms at a time, and the launch options.

    ``halvings``: how many times the epilogue halves the tile's columns, to use fewer registers.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    halvings: int = 0


@tunable("grouped_mlp", rows=bucket)
def plan(
    kind: str,
    rows: int,
    experts: int,
    n: int,
    terms: int,
    dtype: torch.dtype,
    arch: int,
) -> Tile:
    """Return the tile of a product.

    Values of ``kind``:

    - "rows": a product (R, terms) x (terms, n).
    - "gated": two products of the same rows, (R, terms) x (terms, n) each.
    - "hidden", "gated hidden": a product with an epilogue that reads pre-activations.
    - "weights": a result (n, terms) for each expert, summed over the expert's rows.
    - "gathered weights": like "weights", with rows that are looked up by their indices.

    For the first four kinds, BM is ``tile_rows(rows, experts)``.
    """
    height = tile_rows(rows, experts)
    # These architectures have 227 KB of shared memory. The tiles for others fit into 99 KB.
    big_shared = arch in (90, 100, 103)
    odd = n % 16 != 0 or terms % 16 != 0  # elements are loaded one by one, which takes registers
    if kind.endswith("weights"):
        return _weights(kind, height, rows // experts, dtype, big_shared, odd)
    products = 2 if kind == "gated" else 1
    if dtype == torch.float32:
        warps = 8 if height >= 64 else 4
        return Tile(height, 64 // products, 16, warps, 2, 2 if kind.endswith("hidden") else 0)
    if odd:
        # Without halving, a tile of 128 rows spills 8 bytes on sm_120 under Triton 3.6.
        halvings = 1 if kind.endswith("hidden") or (kind == "rows" and height == 128) else 0
        return Tile(height, 64 // products, 32, 8 if height == 128 else 4, 2, halvings)
    if height == 128:
        return _tall(kind, rows, n, terms) if big_shared else _tall_small(kind)
    # With few rows, loading the weights takes most of the time. Narrow tiles give more programs,
    # which keep more loads in flight.
    tiles = rows // height + experts // 2
    width = 64 if height == 16 or tiles * -(-n * products // 128) < PROGRAMS else 128
    if height == 64:
        return Tile(64, width // products, 64, 4, 4 if big_shared else 3, 1 if width == 128 else 0)
    # Without halving, a tile of 16 rows spills 8 bytes on sm_90 under Triton 3.8.
    halvings = 1 if height == 16 and kind.endswith("hidden") else 0
    return Tile(height, width // products, 64, 4, 4, halvings)


def _tall(
    kind: str,
    rows: int,
    n: int,
    terms: int,
) -> Tile:
    """Return a tile of 128 rows for 227 KB of shared memory.

    A long sum gets the largest tile, which loads the fewest bytes per FLOP. For a short sum, two
    programs share a multiprocessor, so that one computes while the other runs its epilogue.
    """
    long = terms >= 1024 and (rows // 128) * (n // 128) >= PROGRAMS
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
    rows_each: int,
    dtype: torch.dtype,
    big_shared: bool,
    odd: bool,
) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 64, 16, 8, 2)
    if odd:
        return Tile(64, 32, 32, 4, 2)
    # Gathered rows are loaded after their indices, so the pipeline needs more stages.
    stages = 5 if kind == "gathered weights" else 3 if big_shared else 4
    if height <= 32:
        return Tile(64, 128, 32, 4, stages)
    if big_shared and rows_each >= 512:
        return Tile(128, 256, 64, 8, stages)
    return Tile(128, 128, 64 if big_shared else 32, 8, stages)


def combine_block(n: int) -> tuple[int, int]:
    """Return how many tokens and columns one program of combine_kernel computes.

    A program computes at most 4096 sums, so that even small batches have many programs.
    """
    width = min(512, 1 << (max(16, n) - 1).bit_length())
    return min(64, 4096 // width), width
