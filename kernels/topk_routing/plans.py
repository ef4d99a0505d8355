"""Tile sizes of top-k routing, chosen by shape, dtype and architecture.

``make compile-matrix`` checks the tiles for register spills, on every supported Triton and
architecture. The tiles were chosen by estimates; ``mmfused tune`` times them and their
alternatives, and what is faster on a user's GPU replaces them there (tuned.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tuned import tunable


@dataclass(frozen=True)
class Rows:
    """A tile of BR tokens by all experts, for routing, sorting and the gradient of the logits."""

    BR: int
    num_warps: int
    maxnreg: int = 168


@dataclass(frozen=True)
class Tile:
    """The tile of a matrix product: BN tokens, BD columns of x, and the launch options.

    In ``Plan.route``, BN is a multiple of ``Rows.BR``.
    """

    BN: int
    BD: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@dataclass(frozen=True)
class Plan:
    """Tiles of a routing; ``route``, ``dx`` and ``dw`` are None if the logits are given."""

    rows: Rows
    route: Tile | None = None
    dx: Tile | None = None
    dw: Tile | None = None
    experts: int = 0  # number of experts in a tile of dx and dw
    # dx and dw are split until they have about this many programs. The number does not depend on
    # the number of multiprocessors, so that GPUs of one architecture compute the same sums.
    programs: int = 256


def width(num_experts: int, multiplied: bool = False) -> int:
    """Return the width of a tile of all experts: a power of two, at least 16 for a product."""
    return max(16 if multiplied else 2, 1 << (num_experts - 1).bit_length())


@tunable("topk_routing")
def plan(
    num_experts: int,
    dtype: torch.dtype,
    arch: int,
    from_input: bool,
    exact: bool = False,
) -> Plan:
    """Return the tiles of a routing.

    ``from_input``: the logits are computed from x. ``exact``: the router's weight is float32, but x
    has 16 bits.
    """
    experts = width(num_experts, from_input)
    warps = 8 if experts > 16 else 4
    rows = Rows(min(64, max(1, 2048 // experts)), warps)
    if not from_input:
        return Plan(rows)
    wide = experts > 128
    step_experts = 64 if wide else experts
    if dtype == torch.float32:  # without matrix instructions, products need more registers
        height = 32 if experts <= 64 else 16
        rows = Rows(max(1, 1024 // experts) if wide else 16, warps)
        return Plan(rows, *[Tile(height, 32, warps, 2)] * 3, experts=step_experts)
    # These architectures have at least 163 KB of shared memory, the others have 99 KB.
    stages = 3 if arch in (80, 87, 90, 100, 103) else 2
    if experts > 32 and arch not in (90, 100, 103):
        # These GPUs' matrix instructions read operands from registers, so tiles have to be small.
        route = Tile(64, 32 if exact else 64, 8, stages)
        dx, dw = Tile(64, 32, 8, 2), Tile(32, 64, 8, stages)
        step_experts = 64
    else:
        route = Tile(64, 64 if exact or experts > 64 else 128, warps, stages)
        dx, dw = Tile(64, 64, warps, 2), Tile(64, 64, warps, stages)
    if wide:
        route = Tile(32, 32 if experts <= 256 else 16, 8, stages)
        dx, dw = Tile(32, 32, 8, 2), Tile(32, 64, 8, stages)
    return Plan(rows, route, dx, dw, experts=step_experts)


def parts_of(dtype: torch.dtype) -> int:
    """Return the number of parts of this dtype that a float32 number is split into.

    Three bfloat16 parts hold all 24 significant bits. Two float16 parts hold 23, if they are scaled
    to the range of float16.
    """
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]
