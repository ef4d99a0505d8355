"""Kernels and tile sizes of masked InfoNCE, chosen by width, dtype and architecture.

``make compile-matrix`` checks the tiles for register spills, on every supported Triton and
architecture. The tiles were chosen by estimates; ``mmfused tune`` times them and their
alternatives, and what is faster on a user's GPU replaces them there (tuned.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ..tuned import tunable

MIB = 2**20
# Two programs for each of an H200's 132 multiprocessors. The number is the same on every GPU, so
# that GPUs of one architecture compute the same sums.
PROGRAMS = 264


@dataclass(frozen=True)
class Tile:
    """Sizes of a kernel's tiles, and its launch options.

    A tile of logits has BM rows and BN columns, and is computed from BK elements of each embedding
    at a time. In ``apply_ds``, BM x BN is a tile of dS, of which a product reads BK columns (for
    dq) or BK rows (for dc) at a time. The BM and BN of ``apply_ds`` are multiples of the BM and BN
    of ``pairs``. One program of ``apply_ds`` or ``owner`` computes the gradient of BD elements of
    each embedding.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    BD: int = 0
    maxnreg: int | None = None

    @property
    def launch(self) -> dict[str, Any]:
        """Options of the kernel launch."""
        return dict(
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            maxnreg=self.maxnreg,
        )


@dataclass(frozen=True)
class Plan:
    """Tiles of all kernels.

    An owner-computes backward runs ``owner``. A chunked backward runs ``pairs`` and ``apply_ds``.
    """

    sweep: Tile
    backward: Literal["owner", "chunked"]
    pairs: Tile
    apply_ds: Tile
    owner: Tile
    partial_bytes: int = 512 * MIB  # limit for the forward's partial results of the columns
    # Limit for a chunk of dS. The chunk and both float32 gradients take 939 MB at B = C = 65536 and
    # D = 768.
    chunk_bytes: int = 512 * MIB
    merge: tuple[int, int] = (16, 128)  # tile of merge_kernel: partial results, rows or columns


@tunable("masked_info_nce")
def plan(
    dim: int,
    dtype: torch.dtype,
    arch: int,
    columns: bool,
    everything: bool,
    logits: bool = False,
) -> Plan:
    """Choose the tiles and the kind of backward.

    ``columns``: the forward computes statistics of the columns of S too (symmetric loss).
    ``everything``: the statistics include numbers and sums of logits, beside the logsumexp.
    ``logits``: the backward needs the logits beside dS, for masks or the temperature's gradient.

    On an H200 (790 TFLOP/s, 4.3 TB/s) owner-computes needs 2 B C D FLOPs more than chunked, or
    2 D / 790e12 s per pair. Chunked moves 6 bytes more per pair, or 6 / 4.3e12 s. So owner-computes
    is faster below D = 550, but its sums fit into registers only up to D = 256. In float32, which
    uses no matrix instructions here, FLOPs dominate, so the backward is always chunked.
    """
    if dtype == torch.float32:
        return _float32_plan(dim)
    backward = "owner" if dim <= 256 else "chunked"
    if arch in (90, 100, 103):  # 227 KB of shared memory
        return _large_plan(dim, backward, arch == 90, columns, everything, logits)
    width = 64 if everything or dim % 32 else 128
    sweep = Tile(128, width, 32, num_warps=8, num_stages=3)
    if everything:
        sweep = Tile(64, width, 32, num_warps=8, num_stages=3, maxnreg=255)
    return Plan(
        sweep=sweep,
        backward=backward,
        pairs=Tile(128, width, 32, num_warps=8, num_stages=3),
        apply_ds=Tile(128, 128, 32, num_warps=8, num_stages=3, BD=min(128, max(64, _power(dim)))),
        owner=Tile(64, 64, 0, num_warps=8, num_stages=2, BD=_power(dim)),
    )


def _float32_plan(dim: int) -> Plan:
    # Logits near 10^4 have no digits to spare in float32. Forward and backward use the same tile,
    # so that their logits are bitwise equal.
    sweep = Tile(32, 64, 16, num_warps=8, num_stages=2, maxnreg=255)
    return Plan(
        sweep=sweep,
        backward="chunked",
        pairs=sweep,
        apply_ds=Tile(64, 64, 16, num_warps=8, num_stages=2, BD=64),
        owner=Tile(64, 32, 0, num_warps=8, num_stages=1, BD=_power(dim)),
    )


def _large_plan(
    dim: int,
    backward: Literal["owner", "chunked"],
    hopper: bool,
    columns: bool,
    everything: bool,
    logits: bool,
) -> Plan:
    """Choose tiles for 16-bit inputs on a GPU with 227 KB of shared memory."""
    small = everything or dim % 64 != 0  # more sums, or masks over D, take registers
    if small:
        height, width = (64, 64) if hopper else (128, 32)
        sweep = Tile(height, width, 64, num_warps=8, num_stages=3)
    elif hopper:
        sweep = Tile(128, 128, 64, num_warps=8, num_stages=3)
    else:
        height, width = (64, 128) if columns else (128, 64)
        sweep = Tile(height, width, 64, num_warps=4, num_stages=3)
    crowded = logits and dim > 128
    narrow = crowded if hopper else dim % 64 != 0 and dim > 64
    narrow = narrow or (everything and dim > 64)
    height = 64 if crowded and not hopper else 128
    max_width = 256 if hopper else 128
    return Plan(
        sweep=sweep,
        backward=backward,
        pairs=Tile(128, 128 if hopper and not small else 64, 64, num_warps=8, num_stages=3),
        apply_ds=Tile(
            128, 128, 64, num_warps=8, num_stages=3, BD=min(max_width, max(64, _power(dim)))
        ),
        owner=Tile(height, 32 if narrow else 64, 0, num_warps=8, num_stages=3, BD=_power(dim)),
    )


def _power(dim: int) -> int:
    """Return the width of a block that holds all columns: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def num_splits(blocks: int, most: int) -> int:
    """Return the number of splits of each block; all blocks together have about PROGRAMS splits.

    There are at most ``most`` splits, the number of tiles of a block.
    """
    return 1 if blocks >= PROGRAMS else max(1, min(most, -(-PROGRAMS // blocks)))


class Grid(NamedTuple):
    """The grid of the forward sweep, (splits, groups), and the work of each program."""

    splits: int
    tiles: int  # column tiles of a split
    groups: int
    blocks: int  # row blocks of a group


def sweep_grid(
    rows: int,
    columns: int,
    tile: Tile,
    partial_bytes: int,
    stats: int,
) -> Grid:
    """Choose a grid of about 4 * PROGRAMS programs.

    There are fewer programs if there are fewer tiles. There are more if there are more groups, or
    if a split would exceed 64 tiles. Each group writes ``stats`` floats per column. All groups
    together write at most ``partial_bytes``, unless a single group writes more.
    """
    blocks, tiles = -(-rows // tile.BM), -(-columns // tile.BN)
    max_groups = max(1, partial_bytes // (4 * stats * columns)) if stats else blocks
    blocks_per_group = -(-blocks // min(blocks, max_groups))
    groups = -(-blocks // blocks_per_group)
    tiles_per_split = min(tiles, 64, max(1, tiles * groups // (4 * PROGRAMS)))
    return Grid(
        splits=-(-tiles // tiles_per_split),
        tiles=tiles_per_split,
        groups=groups,
        blocks=blocks_per_group,
    )


def chunk(
    rows: int,
    columns: int,
    tile: Tile,
    chunk_bytes: int,
    itemsize: int,
) -> tuple[int, int]:
    """Return (rows, columns) of a chunk of dS, multiples of the tile.

    Each chunk reads and writes the float32 gradients of its rows and columns once, so nearly square
    chunks keep traffic low.
    """
    max_elements = max(chunk_bytes // itemsize, tile.BM * tile.BN)
    side = int(max_elements**0.5)
    height = _even(rows, max(side, max_elements // _padded(columns, tile.BN)), tile.BM)
    return height, _even(columns, max_elements // height, tile.BN)


def _padded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _even(length: int, most: int, unit: int) -> int:
    """Divide ``length`` into nearly equal parts, and return the length of a part.

    The part is a multiple of ``unit``, and at most ``most`` unless ``most`` is less than one unit.
    """
    parts = -(-_padded(length, unit) // max(unit, most // unit * unit))
    return _padded(-(-length // parts), unit)
