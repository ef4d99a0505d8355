"""The kernels and tiles of query pooling: fixed by architecture, without autotuning.

``make compile-matrix`` checks every entry for spills, on every supported Triton and architecture.
The choice between two entries without spills is reasoned, not measured, unless benchmarks/results
has a run of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """BN tokens by BR query rows by chunks of BD columns, and the options of the launch.

    BN is at most 64 (see tiles.tokens_kept).
    """

    BN: int
    BR: int
    BD: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# Triton 3.6 spills 8 bytes on sm_90 with three chunks of normalised tokens and 32 rows, and with
# four chunks of 32 tokens.
_OLDEST = triton.__version__.startswith("3.6.")


@dataclass(frozen=True)
class Plan:
    """The tile of each kernel to run.

    Forward: ``onepass``, or ``logits`` then ``pool``; before either ``moments`` with a norm.
    Backward: ``onepass``, or ``dlogits``, then ``dx`` and ``dq``.
    """

    forward: dict[str, Tile]
    backward: dict[str, Tile]
    # Number of partial sums of the gradient of shared queries: fixed, so that no sum depends on
    # the GPU.
    partials: int = 128


def plan(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    arch: int,
    norm: bool,
    dropout: bool = False,
) -> Plan:
    """Plan the kernels of forward and backward, and their tiles.

    X is read once where all of Z^T (forward) or dQ'^T (backward) fits into registers, and twice
    elsewhere.
    """
    hopper = arch in (90, 100, 103)  # 228 KB of shared memory; the others get 99 KB
    # float32 is multiplied without matrix instructions, which costs registers.
    wide_type = dtype == torch.float32
    forward = {"moments": Tile(16, 16, 128, 4, 1)} if norm else {}
    if dim > (1024 if hopper else 768) or wide_type:
        forward |= _two_reads(("logits", "pool"), rows, hopper, wide_type, norm)
    else:
        forward["onepass"] = _onepass_forward(rows, dim, arch, hopper, norm, dropout)
    if rows <= 16 and hopper and dim <= 1024 and not wide_type:
        # With more rows only 16 tokens would fit beside dQ'^T, too few to keep the matrix units
        # busy.
        tokens = 16 if norm or (dropout and dim > 768) else 32
        stages = 2 if norm or dropout else 1
        backward = {"onepass": Tile(tokens, 16, column_chunk(dim), 8, stages)}
    else:
        backward = _two_reads(("dlogits", "dx", "dq"), rows, hopper, wide_type, norm)
    return Plan(forward, backward)


def _onepass_forward(
    rows: int,
    dim: int,
    arch: int,
    hopper: bool,
    norm: bool,
    dropout: bool,
) -> Tile:
    chunk = column_chunk(dim)
    blackwell = hopper and arch > 90
    small = rows <= 16 or not hopper
    small = small or (norm and dim > (512 if _OLDEST else 768))
    small = small or (dropout and blackwell and chunk < 256)
    if not small:
        return Tile(32, 32, chunk, 8, 2 if blackwell or norm else 3)
    # Norm and dropout together leave too few registers for the largest tiles.
    crowded = norm and dropout and not hopper
    tokens = 16 if crowded or (_OLDEST and dim > 768) else 32
    stages = 1 if crowded else 2
    return Tile(tokens, 16, chunk, 8, stages, 255 if chunk < 256 else None)


def _two_reads(
    kernels: tuple[str, ...],
    rows: int,
    hopper: bool,
    wide_type: bool,
    norm: bool,
) -> dict[str, Tile]:
    """Return the tiles of ``kernels``, which are those of a forward or of a backward."""
    if wide_type:
        columns = {kernel: 32 if "logits" in kernel else 64 for kernel in kernels}
        return {kernel: Tile(32, 16, BD, 8, 2, 255) for kernel, BD in columns.items()}
    few_rows = 16 if rows <= 16 or not hopper else 32
    rows_back = 64 if rows > 32 and hopper else few_rows
    tokens = 64 if hopper else 32
    dlogits_warps = 8 if norm or rows_back > 32 else 4
    tiles = {
        "logits": Tile(64, few_rows, 64, 4, 3, 255),
        "pool": Tile(tokens, few_rows, 128, 4, 3, 255),
        "dlogits": Tile(64, rows_back, 64, dlogits_warps, 3, 255),
        "dx": Tile(64, rows_back, 128, 4, 2, 255),
        "dq": Tile(tokens, few_rows, 128, 4, 2 if norm and not hopper else 3, 255),
    }
    return {kernel: tiles[kernel] for kernel in kernels}


def column_chunk(dim: int) -> int:
    """Return the power of two from 64 to 256 that wastes the fewest columns.

    The largest of these if several do: 768 is 3 x 256, 192 is 3 x 64.
    """
    return min((256, 128, 64), key=lambda chunk: -(-dim // chunk) * chunk)
