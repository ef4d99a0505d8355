"""Which tiles top-k routing runs with: fixed data by shape, dtype and architecture, no benchmarking
at training time.

``make compile-matrix`` looks for spills in every entry, on every supported Triton and architecture.
Which of two clean entries is faster was reasoned, not measured, until benchmarks/results holds a
run that says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """BR tokens, each with all its experts: the blocks in which experts are chosen, counted and
    ordered, and gradients computed.
    """

    BR: int
    num_warps: int
    maxnreg: int = 168


@dataclass(frozen=True)
class Tile:
    """A product's BN tokens, all experts and chunks of BD columns of x. BN of ``route`` is a
    multiple of BR.
    """

    BN: int
    BD: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@dataclass(frozen=True)
class Plan:
    """``route``, ``dx`` and ``dw`` multiply; they are there where the logits come from x."""

    rows: Rows
    route: Tile | None = None
    dx: Tile | None = None
    dw: Tile | None = None
    experts: int = 0  # that dx and dw multiply at a time
    programs: int = 256  # what dx and dw are cut into where tokens or columns are few: fixed, so that no sum depends on the card


def width(num_experts: int, multiplied: bool = False) -> int:
    """Columns of a tile: a power of two, 16 at least where matrix instructions multiply."""
    return max(16 if multiplied else 2, 1 << (num_experts - 1).bit_length())


def plan(
    num_experts: int,
    dtype: torch.dtype,
    arch: int,
    from_input: bool,
    exact: bool = False,
) -> Plan:
    """``exact``: weights in float32 beside an x of 16 bits."""
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
    stages = (
        3 if arch in (80, 87, 90, 100, 103) else 2
    )  # 163 KB of shared memory or more; others run what fits into 99 KB
    if experts > 32 and arch not in (
        90,
        100,
        103,
    ):  # operands lie in registers, so they have to be short
        route, dx, dw = (
            Tile(64, 32 if exact else 64, 8, stages),
            Tile(64, 32, 8, 2),
            Tile(32, 64, 8, stages),
        )
        together = 64
    else:
        route = Tile(64, 64 if exact or experts > 64 else 128, warps, stages)
        dx, dw = Tile(64, 64, warps, 2), Tile(64, 64, warps, stages)
    if wide:
        route, dx, dw = (
            Tile(32, 32 if experts <= 256 else 16, 8, stages),
            Tile(32, 32, 8, 2),
            Tile(32, 64, 8, stages),
        )
    return Plan(rows, route, dx, dw, experts=together)
