"""Which tiles gated cross-attention runs with: fixed data by dtype, widths and architecture, no
benchmarking at training time.

``make compile-matrix`` looks for spills in every entry, on every supported Triton and architecture.
Which of two clean entries is faster was reasoned, not measured, until benchmarks/results holds a
run that says so.

Forward has two forms behind the projections, which write the same: "epilogue", attention by head
and then out-projection, gate and blend; "block", one launch for all of it, a block of queries at a
time. ``MMFUSED_CROSS_ATTENTION=epilogue|block`` chooses, read at every call; backward is the same
after both.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

FORMS = ("epilogue", "block")
FORM = "epilogue"  # where MMFUSED_CROSS_ATTENTION says nothing
_asked: ContextVar[str | None] = ContextVar("form", default=None)


@dataclass(frozen=True)
class Tile:
    """A product's BM rows by BN columns, BK at a time; in attention BM queries by BN keys."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@dataclass(frozen=True)
class Plan:
    """``product``: with any weight but the projections' own. ``together``: out-projection and
    blend, as one launch (else None).
    """

    project: Tile
    attend: Tile
    d_query: Tile
    d_key: Tile
    product: Tile
    rows: Tile  # whole rows of BN columns
    together: Tile | None
    block: (
        Tile | None
    )  # all heads of BM queries, BN keys and then BN columns of the output at a time
    partials: int = 256  # partial sums of the norms' gradients: fixed, so that the sum does not depend on the card


def power(n: int) -> int:
    """Columns of a tile that holds n: a power of two, 16 at least for the matrix instructions."""
    return max(16, 1 << (n - 1).bit_length())


@contextmanager
def form(name: str):
    """As MMFUSED_CROSS_ATTENTION, inside ``with``, for this thread and context alone."""
    before = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(before)


def asked_block(chosen: Plan, dim: int, heads: int) -> Tile | None:
    """The tile of the form "block" if that is to run, else None. What it does not take is an error
    only where it was asked for.
    """
    asked = _asked.get() or os.environ.get("MMFUSED_CROSS_ATTENTION")
    if asked not in (None, *FORMS):
        raise ValueError(
            f"MMFUSED_CROSS_ATTENTION: got {asked!r}, expected one of {', '.join(FORMS)}"
        )
    if asked == "block" and chosen.block is None:
        raise ValueError(
            f"MMFUSED_CROSS_ATTENTION is 'block', but dim is {dim} with {heads} heads; block takes dim <= 256 and heads of at most "
            "64 channels, 32 in float32."
        )
    return chosen.block if (asked or FORM) == "block" else None


def block_takes(dim: int, head_dim: int, dtype: torch.dtype) -> bool:
    """False where its out-projection would spill: the weights of one head lie in registers on their
    way to the product.
    """
    return dim <= 256 and head_dim <= (32 if dtype == torch.float32 else 64)


def _block(dim: int, head_dim: int, dtype: torch.dtype, arch: int) -> Tile | None:
    if not block_takes(dim, head_dim, dtype):
        return None
    if dtype == torch.float32:
        return Tile(16, 32, 32, 8, 1)
    if dim % 8 or head_dim % 8:
        return Tile(16, 32, 32, 8, 1)
    if head_dim <= 32 and arch in (90, 100, 103):
        return Tile(64, 64, 64, 8, 2)
    return Tile(32, 32, 64, 8, 2)  # 64 keys at a time spill on sm_80 and sm_120 under Triton 3.6


def plan(dim: int, context_dim: int, head_dim: int, dtype: torch.dtype, arch: int) -> Plan:
    widest = power(max(dim, context_dim))
    rows = Tile(max(1, 2048 // widest), widest, 0, 4, 1)
    block = _block(dim, head_dim, dtype, arch)
    warps = 4 if head_dim <= 64 else 8
    if dtype == torch.float32:  # multiplied without matrix instructions, which costs registers
        tile = Tile(32, 32, 16, 4, 2)
        attend = Tile(32 if head_dim <= 64 else 16, 32, 0, warps, 1)
        d_query = attend if head_dim <= 64 else Tile(16, 16, 0, warps, 1)
        return Plan(tile, attend, d_query, attend, tile, rows, tile if dim <= 256 else None, block)
    hopper = arch in (
        90,
        100,
        103,
    )  # others multiply out of registers, and some have 99 KB of shared memory
    project = Tile(64, 64, widest if widest <= 256 and hopper else 64, 4, 2)
    wide = head_dim > (64 if hopper else 32)
    # Under Triton 3.8 wide heads spill 80 bytes with 32 queries at a time in d_key, and on sm_120 8
    # with four warps in attend; there a product of 128 columns spills 8.
    attend = Tile(64, 64, 0, 8 if wide and arch >= 120 else warps, 2)
    d_query = (
        Tile(32, 64, 0, 4, 2) if wide else Tile(64, 64, 0, 8, 2)
    )  # four warps spill under Triton 3.8
    d_key = Tile(16, 64, 0, 8, 2) if wide else Tile(32, 64, 0, 4, 2)
    product, together = Tile(64, 64 if arch >= 120 else 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)
    # Rows and heads that begin at odd places are loaded number by number, and each takes an
    # address.
    if head_dim % 8:
        attend = d_query = Tile(32, 32, 0, warps, 1)
        d_key = Tile(32, 32, 0, 8, 1)  # four warps spill 24 bytes on sm_100 and sm_120
    if dim % 8 or context_dim % 8:
        project = product = together = Tile(32, 64, 32, 4, 2)
    return Plan(
        project, attend, d_query, d_key, product, rows, together if dim <= 256 else None, block
    )
