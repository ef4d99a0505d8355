"""Tiles of top-k routing: fixed data by shape, dtype, architecture; no benchmarks while training.

``make compile-matrix`` looks for spills in every entry, on every supported Triton and architecture.
Which of two entries without spills is faster was reasoned, not measured, until benchmarks/results
holds a run that shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """BR tokens by all experts: the block of the choice, the order and the logits' gradient."""

    BR: int
    num_warps: int
    maxnreg: int = 168


@dataclass(frozen=True)
class Tile:
    """A product of BN tokens and all experts, over chunks of BD columns of x.

    BN of ``route`` is a multiple of BR.
    """

    BN: int
    BD: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@dataclass(frozen=True)
class Plan:
    """Tiles of a routing; those of ``route``, ``dx`` and ``dw`` only if logits come from x."""

    rows: Rows
    route: Tile | None = None
    dx: Tile | None = None
    dw: Tile | None = None
    experts: int = 0  # in one step of dx and dw
    # Where tokens or columns are few, dx and dw are split to reach this number of programs. It is
    # fixed, so that no sum depends on the GPU.
    programs: int = 256


def width(num_experts: int, multiplied: bool = False) -> int:
    """Return the columns of a tile: a power of two, at least 16 for matrix instructions."""
    return max(16 if multiplied else 2, 1 << (num_experts - 1).bit_length())


def plan(
    num_experts: int,
    dtype: torch.dtype,
    arch: int,
    from_input: bool,
    exact: bool = False,
) -> Plan:
    """Return the tiles of a routing; ``exact``: float32 weights with x in 16 bits."""
    experts = width(num_experts, from_input)
    warps = 8 if experts > 16 else 4
    rows = Rows(min(64, max(1, 2048 // experts)), warps)
    if not from_input:
        return Plan(rows)
    wide = experts > 128
    together = 64 if wide else experts
    if dtype == torch.float32:  # multiplied without matrix instructions, which costs registers
        height = 32 if experts <= 64 else 16
        rows = Rows(max(1, 1024 // experts) if wide else 16, warps)
        return Plan(rows, *[Tile(height, 32, warps, 2)] * 3, experts=together)
    # These have at least 163 KB of shared memory; the tiles of the others fit into 99 KB.
    stages = 3 if arch in (80, 87, 90, 100, 103) else 2
    if experts > 32 and arch not in (90, 100, 103):
        # Operands are in registers, so tiles have to be small.
        route = Tile(64, 32 if exact else 64, 8, stages)
        dx, dw = Tile(64, 32, 8, 2), Tile(32, 64, 8, stages)
        together = 64
    else:
        route = Tile(64, 64 if exact or experts > 64 else 128, warps, stages)
        dx, dw = Tile(64, 64, warps, 2), Tile(64, 64, warps, stages)
    if wide:
        route = Tile(32, 32 if experts <= 256 else 16, 8, stages)
        dx, dw = Tile(32, 32, 8, 2), Tile(32, 64, 8, stages)
    return Plan(rows, route, dx, dw, experts=together)


def parts_of(dtype: torch.dtype) -> int:
    """Return how many numbers of this dtype it takes to write any float32 as their sum."""
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]
