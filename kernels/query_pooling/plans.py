"""Kernels and tile sizes of query pooling, chosen by shape, dtype and architecture.

There is no autotuning. ``make compile-matrix`` checks the tiles for register spills, on every
supported Triton and architecture. The tiles were chosen by estimates; ``make gpu`` times each tile
and its variants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """A tile of BN tokens, BR rows of queries and BD columns, and the launch options.

    BN is at most 64 (see tiles.tokens_kept).
    """

    BN: int
    BR: int
    BD: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class HopperTile:
    """A tile of the Gluon kernels for sm_90: BR rows of queries, CHUNKS x 64 columns.

    SLOTS is the number of chunks that fit into the ring (see hopper_tokens.py).
    """

    BR: int
    CHUNKS: int
    SLOTS: int


# On sm_90 Triton 3.6 spills 8 bytes in two cases: with 32 rows of queries and three column chunks
# of normalised tokens, and with four column chunks of 32 tokens.
_TRITON_3_6 = triton.__version__.startswith("3.6.")


@dataclass(frozen=True)
class Plan:
    """The tiles of the kernels that run, by kernel name.

    Forward: ``onepass``, or ``logits`` then ``pool``. With a norm, ``moments`` runs first.
    Backward: ``onepass``, or ``dlogits``, ``dx`` and ``dq`` in this order.
    """

    forward: dict[str, Tile]
    backward: dict[str, Tile]
    # Maximum number of partial sums for the gradient of shared queries. It does not depend on the
    # number of multiprocessors, so that GPUs of one architecture compute the same sums.
    partials: int = 128


def plan(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    arch: int,
    norm: bool,
    dropout: bool = False,
) -> Plan:
    """Choose the kernels of forward and backward, and their tiles.

    ``onepass`` reads X once for each block of BR rows, and runs if all columns of Z^T (forward) or
    dQ'^T (backward) fit into registers. For the symbols see forward.py and backward.py.
    """
    # These architectures have 227 KB of shared memory. The tiles for others fit into 99 KB.
    big_shared = arch in (90, 100, 103)
    # Products of float32 use no matrix instructions, and need more registers.
    float32 = dtype == torch.float32
    forward = {"moments": Tile(16, 16, 128, 4, 1)} if norm else {}
    if dim > (1024 if big_shared else 768) or float32:
        forward |= _tiles_of(("logits", "pool"), rows, big_shared, float32, norm)
    else:
        forward["onepass"] = _onepass_forward(rows, dim, arch, big_shared, norm, dropout)
    # With more than 16 rows, too few tokens fit beside dQ'^T to keep the matrix units busy.
    if rows <= 16 and big_shared and dim <= 1024 and not float32:
        tokens = 16 if norm or (dropout and dim > 768) else 32
        stages = 2 if norm or dropout else 1
        backward = {"onepass": Tile(tokens, 16, column_chunk(dim), 8, stages)}
    else:
        backward = _tiles_of(("dlogits", "dx", "dq"), rows, big_shared, float32, norm)
    return Plan(forward, backward)


def _onepass_forward(
    rows: int,
    dim: int,
    arch: int,
    big_shared: bool,
    norm: bool,
    dropout: bool,
) -> Tile:
    chunk = column_chunk(dim)
    tcgen05 = big_shared and arch > 90  # sm_100 and sm_103
    small = rows <= 16 or not big_shared
    small = small or (norm and dim > (512 if _TRITON_3_6 else 768))
    small = small or (dropout and tcgen05 and chunk < 256)
    if not small:
        return Tile(32, 32, chunk, 8, 2 if tcgen05 or norm else 3)
    # On the other architectures, norm and dropout together leave too few registers for 32 tokens.
    crowded = norm and dropout and not big_shared
    tokens = 16 if crowded or (_TRITON_3_6 and dim > 768) else 32
    stages = 1 if crowded else 2
    return Tile(tokens, 16, chunk, 8, stages, 255 if chunk < 256 else None)


def _tiles_of(
    kernels: tuple[str, ...],
    rows: int,
    big_shared: bool,
    float32: bool,
    norm: bool,
) -> dict[str, Tile]:
    """Return the tiles of the given kernels, which together read X more than once."""
    if float32:
        columns = {kernel: 32 if "logits" in kernel else 64 for kernel in kernels}
        return {kernel: Tile(32, 16, BD, 8, 2, 255) for kernel, BD in columns.items()}
    few_rows = 16 if rows <= 16 or not big_shared else 32
    many_rows = 64 if rows > 32 and big_shared else few_rows
    tokens = 64 if big_shared else 32
    dlogits_warps = 8 if norm or many_rows > 32 else 4
    tiles = {
        "logits": Tile(64, few_rows, 64, 4, 3, 255),
        "pool": Tile(tokens, few_rows, 128, 4, 3, 255),
        "dlogits": Tile(64, many_rows, 64, dlogits_warps, 3, 255),
        "dx": Tile(64, many_rows, 128, 4, 2, 255),
        "dq": Tile(tokens, few_rows, 128, 4, 2 if norm and not big_shared else 3, 255),
    }
    return {kernel: tiles[kernel] for kernel in kernels}


def column_chunk(dim: int) -> int:
    """Return the width of a column chunk: the one of 64, 128 and 256 that pads ``dim`` the least.

    If several pad it equally, the widest is used: 768 is 3 x 256, 192 is 3 x 64.
    """
    return min((256, 128, 64), key=lambda chunk: -(-dim // chunk) * chunk)
