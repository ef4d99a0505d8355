"""Which kernels and tiles query pooling runs with: fixed data by architecture, no benchmarking at
training time.

``make compile-matrix`` looks for spills in every entry, on every supported Triton and architecture.
Which of two clean entries is faster was reasoned, not measured, until benchmarks/results holds a
run that says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """BN tokens by BR query rows by chunks of BD columns, and the launch. BN is at most 64
    (tiles.tokens_kept).
    """

    BN: int
    BR: int
    BD: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# Triton 3.6 spills 8 bytes on sm_90 where three chunks of normalised tokens meet 32 rows, or four
# chunks 32 tokens.
_OLDEST = triton.__version__.startswith("3.6.")


@dataclass(frozen=True)
class Plan:
    """Forward: ``onepass``, or ``logits`` then ``pool``. Backward: ``onepass``, or ``dlogits``,
    then ``dx`` and ``dq``.
    """

    forward: dict[str, Tile]
    backward: dict[str, Tile]
    partials: int = 128  # partial sums of a shared q's gradient: fixed, so that the sum does not depend on the card


def plan(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    arch: int,
    norm: bool,
    dropout: bool = False,
) -> Plan:
    """One pass where all of Z^T (forward) or dQ'^T (backward) fits into the registers of one block,
    two reads of X elsewhere.
    """
    narrow = rows <= 16
    hopper = arch in (90, 100, 103)  # 228 KB of shared memory; others run what fits into 99 KB
    wide_type = (
        dtype == torch.float32
    )  # multiplied without matrix instructions, which costs registers
    chunk = column_chunk(dim)
    blackwell = hopper and arch > 90
    tight = norm and dropout  # in one pass they leave too few registers for the largest tiles
    light = 255 if chunk < 256 else None
    forward = {"moments": Tile(16, 16, 128, 4, 1)} if norm else {}
    if dim > (1024 if hopper else 768) or wide_type:
        forward |= _two_reads(("logits", "pool"), rows, hopper, wide_type, norm)
    elif (
        narrow
        or not hopper
        or (norm and dim > (512 if _OLDEST else 768))
        or (dropout and blackwell and chunk < 256)
    ):
        crowded = tight and not hopper
        few = crowded or (_OLDEST and dim > 768)
        forward["onepass"] = Tile(16 if few else 32, 16, chunk, 8, 1 if crowded else 2, light)
    else:
        forward["onepass"] = Tile(32, 32, chunk, 8, 2 if blackwell or norm else 3)
    if narrow and hopper and dim <= 1024 and not wide_type:
        # With more rows only 16 tokens would fit beside dQ'^T, too few to keep the matrix units
        # busy.
        few = norm or (dropout and dim > 768)
        backward = {"onepass": Tile(16 if few else 32, 16, chunk, 8, 2 if norm or dropout else 1)}
    else:
        backward = _two_reads(("dlogits", "dx", "dq"), rows, hopper, wide_type, norm)
    return Plan(forward, backward)


def _two_reads(
    kernels: tuple[str, ...],
    rows: int,
    hopper: bool,
    wide_type: bool,
    norm: bool,
) -> dict[str, Tile]:
    if wide_type:
        return {
            kernel: Tile(32, 16, 32 if "logits" in kernel else 64, 8, 2, 255) for kernel in kernels
        }
    few = 16 if rows <= 16 or not hopper else 32
    many = 64 if rows > 32 and hopper else few
    tiles = {
        "logits": Tile(64, few, 64, 4, 3, 255),
        "pool": Tile(64 if hopper else 32, few, 128, 4, 3, 255),
        "dlogits": Tile(64, many, 64, 8 if norm or many > 32 else 4, 3, 255),
        "dx": Tile(64, many, 128, 4, 2, 255),
        "dq": Tile(64 if hopper else 32, few, 128, 4, 2 if norm and not hopper else 3, 255),
    }
    return {kernel: tiles[kernel] for kernel in kernels}


def column_chunk(dim: int) -> int:
    """The power of two from 64 to 256 that wastes the fewest columns, the largest of equals: 768 is
    3 x 256, 192 is 3 x 64.
    """
    return min((256, 128, 64), key=lambda chunk: -(-dim // chunk) * chunk)
