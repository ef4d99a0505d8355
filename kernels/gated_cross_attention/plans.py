"""Tile sizes of gated cross-attention, chosen by widths, dtype and architecture.

``make compile-matrix`` checks the tiles for register spills, on every supported Triton and
architecture. The tiles were chosen by counts (benchmarks/NOTES.md); ``mmfused tune`` times them and
their alternatives, and what is faster on a user's GPU replaces them there (tuned.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from ..tuned import tunable

# Triton's version, where it needs other tiles.
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Tile:
    """The tile of a matrix product, BM rows by BN columns, and the options of its launch.

    A product sums BK terms at a time. If BK holds all terms, a program keeps its part of the weight
    in shared memory. In attention a tile is BM queries by BN keys.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255
    residents: int = 1  # programs on a multiprocessor at a time, which walk over tiles
    PART: int = 64  # columns at a time after the product


@dataclass(frozen=True)
class Plan:
    """The tiles of each kernel."""

    project: Tile
    attend: Tile
    most_keys: int  # attend: most keys of a sample that one tile holds
    d_attend: Tile | None  # one program for each sample and head; BN tokens stay, BM at a time
    d_attend_long: dict[str, Tile]  # the same without dropout, from few tokens that stay to many
    d_query: Tile  # where no tile of these is large enough
    d_key: Tile
    output: Tile
    output_dropout: Tile  # the same with dropout, whose random numbers take registers
    gate: Tile
    d_gate: Tile
    d_gate_dropout: Tile
    d_attended: Tile
    together: Tile | None  # gradient of the tokens and LayerNorm; None: rows do not fit a tile
    product: Tile  # the gradient of the normalised tokens, if not ``together``
    rows: Tile  # whole rows of BN columns


def power(n: int) -> int:
    """Return the smallest power of two that is at least 16 and at least n."""
    return max(16, 1 << (n - 1).bit_length())


@tunable("gated_cross_attention")
@functools.cache
def plan(
    dim: int,
    context_dim: int,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    dropout: bool = False,
    two_way: bool = True,
) -> Plan:
    """Return the tiles for these widths, this dtype and this architecture.

    ``two_way``: whether both sides have queries.
    """
    widest = power(max(dim, context_dim))
    rows = Tile(max(1, 2048 // widest), widest, 0, 4, 1)
    if dtype == torch.float32:  # no matrix instructions, so products need more registers
        tile = Tile(32, 32, 16, 4, 2, residents=4)
        together = Tile(16, widest, 16, 4, 2, residents=4, PART=widest)
    # Unaligned rows are loaded one element at a time, which takes registers.
    elif dim % 8 or context_dim % 8:
        tile = Tile(32, 64, 32, 4, 2, residents=4)
        together = Tile(32, widest, 32, 8, 2, residents=2)
    # These architectures have 227 KB of shared memory, from which matrix instructions can read
    # operands. On other architectures the operands are in registers.
    elif arch in (90, 100, 103):
        tile = Tile(128, 256, 64, 8, 3, PART=128 if arch == 90 else 64)
        together = Tile(128 if arch == 90 else 64, widest, 64, 8, 3)
        if arch == 90 and widest == 256:
            together = replace(together, num_warps=16, PART=64 if TRITON == (3, 8) else 32)
    else:
        tile = Tile(64, 128, 64, 8, 3, 128, residents=2, PART=32)
        together = replace(tile, BN=widest, num_stages=2, PART=16)
        if TRITON == (3, 6):
            together = replace(together, maxnreg=255)
    return Plan(
        **_attention(dim, head_dim, dtype, arch, dropout, two_way),
        **(_same(tile) | _epilogues(tile, widest, arch)),
        together=together if dim <= 256 else None,
        rows=rows,
    )


def _epilogues(tile: Tile, widest: int, arch: int) -> dict[str, Tile]:
    """Return the tiles of products that differ from the others, in 16 bits with aligned rows."""
    if tile.BK < 64:
        return {}
    if arch not in (90, 100, 103):  # random numbers of dropout take registers
        return dict.fromkeys(("output_dropout", "d_gate_dropout"), replace(tile, maxnreg=255))
    # More warps than for other products hide the time that the blend waits for x and A.
    # tcgen05 has no form for 16 warps, and narrow gates would compute products twice.
    if arch == 90 and widest >= 256:
        gate = replace(tile, num_warps=16, PART=32)
    else:
        gate = replace(tile, BN=128, PART=64)
    tiles = dict(
        output_dropout=replace(tile, PART=32),
        gate=gate,
        d_gate=replace(gate, PART=64),
        d_gate_dropout=gate,
    )
    if widest > 256:
        return tiles
    # A program keeps its part of the weight in shared memory. Two programs of four warps share a
    # multiprocessor if one stage is enough: while one of them waits for rows, the other computes.
    pair = Tile(64, 128, widest, 4, 1, residents=2)
    low = pair
    if arch != 90:  # sums come from tensor memory in whole rows, which takes registers
        pair = replace(pair, num_warps=8)
        low = replace(pair, maxnreg=128)
    return tiles | dict(
        project=pair,
        output=low,
        output_dropout=Tile(64, 64, widest, 4, 2, residents=2),
        d_gate=pair,
        d_gate_dropout=Tile(64, 128, widest, 8, 1),
        d_attended=low,
    )


def _same(tile: Tile) -> dict[str, Tile]:
    """Return the same tile for all products with weights."""
    names = ("project", "output", "output_dropout", "gate", "d_gate", "d_gate_dropout")
    return dict.fromkeys((*names, "d_attended", "product"), tile)


def _attention(
    dim: int,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    dropout: bool,
    two_way: bool,
) -> dict[str, Any]:
    """Return the tiles of the kernels that compute attention."""
    warps = 4 if head_dim <= 64 else 8
    tiled: dict[str, Any] = dict(most_keys=0, d_attend=None, d_attend_long={})
    if dtype == torch.float32:
        attend = Tile(32 if head_dim <= 64 else 16, 32, 0, warps, 1)
        d_query = attend if head_dim <= 64 else Tile(16, 16, 0, warps, 1)
        return tiled | dict(attend=attend, d_query=d_query, d_key=attend)
    # Unaligned heads are loaded one element at a time, which takes registers.
    if dim % 8 or head_dim % 8:
        attend = Tile(32, 32, 0, warps, 1)
        spills = arch >= 120 and TRITON == (3, 6)
        d_query = Tile(64, 16 if spills else 32, 0, 4, 1)
        return tiled | dict(attend=attend, d_query=d_query, d_key=attend)
    # Random numbers of dropout take registers: smaller tiles, or fewer programs at a time.
    big_shared = arch in (90, 100, 103)
    if head_dim <= 32:
        stages, registers = (3, 255 if dropout else 168) if big_shared else (2, 255)
        # With dropout and holes in the masks it spills on sm_90 in one direction (Triton 3.8, 3.9),
        # and on sm_120 (3.6).
        spills = dropout and not (big_shared and (two_way or arch != 90))
        return dict(
            attend=Tile(64, 32, 0, 4, 2) if dropout else Tile(64, 64, 0, 4, stages),
            most_keys=64,  # 256 take so many registers that half as many programs fit
            d_attend=None if spills else Tile(64, 64, 0, 4, stages, registers),
            d_attend_long={},
            # Four warps need 64 rows.
            d_query=Tile(64, 32 if dropout and not big_shared else 64, 0, 4, 2),
            d_key=Tile(64 if big_shared else 32, 64, 0, 4, 2),
        )
    if head_dim <= 64 and big_shared:
        low = arch == 90 and not dropout
        return tiled | dict(
            attend=Tile(128, 32 if dropout else 64, 0, 8, 3, 128 if low else 255),
            # Three programs of four warps share a multiprocessor of sm_90, or two of eight warps.
            d_attend_long={
                "64": Tile(32, 64, 0, 4, 3, 168),
                "128": Tile(32, 128, 0, 8, 3, 128 if arch == 90 else 255),
            },
            d_query=Tile(64, 32 if dropout else 64, 0, 4, 2),
            d_key=Tile(32 if dropout else 64, 64, 0, 4, 2),
        )
    # With wgmma, 8 warps need 128 rows; with mma.sync, d_key needs 32 columns for 4 warps.
    attend = Tile(64, 32 if dropout else 64, 0, 4, 2)
    if arch == 90:
        deep = Tile(128, 32 if dropout else 64, 0, 8, 2)
    else:  # a second stage spills with dropout (Triton 3.6)
        deep = Tile(64, 64, 0, 8, 1 if dropout else 2)
    return tiled | dict(
        attend=attend if head_dim <= 64 else deep,
        d_query=Tile(32, 32 if dropout else 64, 0, 4, 2),
        d_key=Tile(32, 32, 0, 4, 2),
    )
