"""Tile sizes of gated cross-attention, chosen by widths, dtype and architecture.

There is no autotuning. ``make compile-matrix`` checks the tiles for register spills, on every
supported Triton and architecture. The tiles were chosen by estimates; ``make gpu`` times each tile
and its variants.

After the projections, the forward pass has two forms, whose results agree up to rounding.
"epilogue" computes the attention of each head in one launch, then output projection, gate and blend
in one or two more launches. "block" computes everything in one launch, one block of queries per
program. ``MMFUSED_CROSS_ATTENTION=epilogue|block`` chooses the form, and is read at every call. The
backward pass does not depend on the form.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

FORMS = ("epilogue", "block")
FORM = "epilogue"  # the default if MMFUSED_CROSS_ATTENTION is not set
_requested: ContextVar[str | None] = ContextVar("form", default=None)


@dataclass(frozen=True)
class Tile:
    """The tile of a matrix product, BM rows by BN columns, and the options of its launch.

    A product sums BK terms at a time. In attention a tile is BM queries by BN keys.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@dataclass(frozen=True)
class Plan:
    """The tiles of each kernel.

    ``product``: matrix products with weights, except the projections. ``together``: output
    projection and blend in one launch; None if they run in two launches.
    """

    project: Tile
    attend: Tile
    d_query: Tile
    d_key: Tile
    product: Tile
    rows: Tile  # whole rows of BN columns
    together: Tile | None
    # BM queries with all heads: BN keys at a time, then BN columns of the output at a time.
    block: Tile | None
    # Maximum number of partial sums for the norms' gradients. It does not depend on the number of
    # multiprocessors, so that GPUs of one architecture compute the same sums.
    partials: int = 256


def power(n: int) -> int:
    """Return the smallest power of two that is at least 16 and at least n."""
    return max(16, 1 << (n - 1).bit_length())


@contextmanager
def form(name: str):
    """Use the form ``name`` inside ``with``, not that of MMFUSED_CROSS_ATTENTION."""
    before = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(before)


def tile_of_block_form(chosen: Plan, dim: int, heads: int) -> Tile | None:
    """Return the tile of the form "block", or None if the form "epilogue" is to run.

    Raise ValueError if "block" was requested but does not support these sizes.
    """
    requested = _requested.get() or os.environ.get("MMFUSED_CROSS_ATTENTION")
    if requested not in (None, *FORMS):
        raise ValueError(
            f"MMFUSED_CROSS_ATTENTION: got {requested!r}, expected one of {', '.join(FORMS)}"
        )
    if requested == "block" and chosen.block is None:
        raise ValueError(
            f"MMFUSED_CROSS_ATTENTION: got 'block' with dim {dim} and {heads} heads, expected "
            "dim <= 256 and heads of at most 64 channels, 32 in float32"
        )
    return chosen.block if (requested or FORM) == "block" else None


def block_supports(dim: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether the form "block" supports these sizes.

    At larger sizes the output projection of "block" would spill, because the weights of one head
    pass through registers.
    """
    return dim <= 256 and head_dim <= (32 if dtype == torch.float32 else 64)


def _block(
    dim: int,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
) -> Tile | None:
    if not block_supports(dim, head_dim, dtype):
        return None
    if dtype == torch.float32:
        return Tile(16, 32, 32, 8, 1)
    if dim % 8 or head_dim % 8:
        return Tile(16, 32, 32, 8, 1)
    if head_dim <= 32 and arch in (90, 100, 103):
        return Tile(64, 64, 64, 8, 2)
    return Tile(32, 32, 64, 8, 2)  # 64 keys at a time spill on sm_80 and sm_120 under Triton 3.6


def plan(
    dim: int,
    context_dim: int,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
) -> Plan:
    """Return the tiles for these widths, this dtype and this architecture."""
    widest = power(max(dim, context_dim))
    rows = Tile(max(1, 2048 // widest), widest, 0, 4, 1)
    block = _block(dim, head_dim, dtype, arch)
    warps = 4 if head_dim <= 64 else 8
    if dtype == torch.float32:  # no matrix instructions, so products need more registers
        tile = Tile(32, 32, 16, 4, 2)
        attend = Tile(32 if head_dim <= 64 else 16, 32, 0, warps, 1)
        d_query = attend if head_dim <= 64 else Tile(16, 16, 0, warps, 1)
        return Plan(tile, attend, d_query, attend, tile, rows, tile if dim <= 256 else None, block)
    # These architectures have 227 KB of shared memory, from which matrix instructions can read
    # operands. On other architectures the operands are in registers.
    big_shared = arch in (90, 100, 103)
    project = Tile(64, 64, widest if widest <= 256 and big_shared else 64, 4, 2)
    wide = head_dim > (64 if big_shared else 32)
    # Under Triton 3.8, wide heads spill 80 bytes in d_key with 32 queries at a time. On sm_120,
    # wide heads spill 8 bytes in attend with four warps, and so does a product of 128 columns.
    attend = Tile(64, 64, 0, 8 if wide and arch >= 120 else warps, 2)
    # In d_query, 64 queries spill with four warps under Triton 3.8.
    d_query = Tile(32, 64, 0, 4, 2) if wide else Tile(64, 64, 0, 8, 2)
    d_key = Tile(16, 64, 0, 8, 2) if wide else Tile(32, 64, 0, 4, 2)
    product, together = Tile(64, 64 if arch >= 120 else 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)
    # Unaligned rows and heads are loaded one element at a time, which takes registers.
    if head_dim % 8:
        attend = d_query = Tile(32, 32, 0, warps, 1)
        d_key = Tile(32, 32, 0, 8, 1)  # four warps spill 24 bytes on sm_100 and sm_120
    if dim % 8 or context_dim % 8:
        project = product = together = Tile(32, 64, 32, 4, 2)
    return Plan(
        project, attend, d_query, d_key, product, rows, together if dim <= 256 else None, block
    )
