"""Which kernels and tiles masked InfoNCE runs with: fixed data by architecture, no benchmarking at
training time.

``make compile-matrix`` looks for spills in every entry, on every supported Triton and architecture.
Which of two clean entries is faster was reasoned, not measured, until benchmarks/results holds a
run that says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20
PROGRAMS = 264  # a wave of two programs on each of 132 multiprocessors; fixed, so that results do not depend on the card


@dataclass(frozen=True)
class Tile:
    """BM rows by BN columns of logits, BK columns of D at a time; and the launch. BD: columns of D
    that one program sums up.

    Of ``spread``, BM queries or BN candidates by BD columns, reading dS in tiles of BM x BN; those
    of ``pairs`` divide them."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    BD: int = 0
    maxnreg: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.maxnreg)


@dataclass(frozen=True)
class Plan:
    """``backward``: "owner", or "chunked" with ``pairs`` then ``spread`` twice."""

    sweep: Tile
    backward: str
    pairs: Tile
    spread: Tile
    owner: Tile
    partial_bytes: int = 512 * MIB  # of the forward's column partials
    chunk_bytes: int = (
        512 * MIB
    )  # of dS: at B = C = 65536 and D = 768 it makes 939 MB with both float32 gradients
    merge: tuple[int, int] = (16, 128)  # partials by rows at a time


def plan(
    dim: int,
    dtype: torch.dtype,
    arch: int,
    columns: bool,
    everything: bool,
    logits: bool = False,
) -> Plan:
    """Tiles, and which backward, of a loss over rows or, with ``columns``, over both;
    ``everything``: the sums too; ``logits``: the backward needs them beside dS, for masks or for
    the temperature's gradient.

    On an H200 (790 TFLOP/s, 4.3 TB/s) owner-computes spends 2 B C D FLOPs more than chunked, 2 D /
    790e12 s a pair, and chunked 6 bytes a pair more, 6 / 4.3e12 s: owner-computes wins below D =
    550. But its sums of all of D fit into registers, beside a tile of logits, up to D = 256 only.
    float32 has no matrix instructions here, FLOPs are all that costs: chunked."""
    if dtype == torch.float32:
        # The tile of `pairs`: forward and backward add up the same logits, which at 10^4 have no
        # digit to spare.
        sweep = Tile(32, 64, 16, 8, 2, maxnreg=255)
        owner = Tile(64, 32, 0, 8, 1, BD=_power(dim))
        return Plan(sweep, "chunked", sweep, Tile(64, 64, 16, 8, 2, BD=64), owner)
    way = "owner" if dim <= 256 else "chunked"
    if arch in (90, 100, 103):  # 228 KB of shared memory
        hopper = arch == 90
        short = everything or dim % 64 != 0  # sums, and masks of D, take registers
        if short:
            sweep = Tile(64, 64, 64, 8, 3) if hopper else Tile(128, 32, 64, 8, 3)
        else:
            both = Tile(64, 128, 64, 4, 3) if columns else Tile(128, 64, 64, 4, 3)
            sweep = Tile(128, 128, 64, 8, 3) if hopper else both
        pairs = Tile(128, 128 if hopper and not short else 64, 64, 8, 3)
        spread = Tile(128, 128, 64, 8, 3, BD=min(256 if hopper else 128, max(64, _power(dim))))
        crowded = logits and dim > 128
        narrow = (crowded if hopper else dim % 64 != 0 and dim > 64) or (everything and dim > 64)
        owner = Tile(
            64 if crowded and not hopper else 128, 32 if narrow else 64, 0, 8, 3, BD=_power(dim)
        )
        return Plan(sweep, way, pairs, spread, owner)
    wide = 64 if everything or dim % 32 else 128
    spread = Tile(128, 128, 32, 8, 3, BD=min(128, max(64, _power(dim))))
    owner = Tile(64, 64, 0, 8, 2, BD=_power(dim))
    sweep = Tile(64, wide, 32, 8, 3, maxnreg=255) if everything else Tile(128, wide, 32, 8, 3)
    return Plan(sweep, way, Tile(128, wide, 32, 8, 3), spread, owner)


def _power(dim: int) -> int:
    """Columns of a block that holds all of D."""
    return max(16, 1 << (dim - 1).bit_length())


def splits(blocks: int, most: int) -> int:
    """Into how many parts the work of ``blocks`` programs is cut, so that there are PROGRAMS of
    them; each has a tile.
    """
    return 1 if blocks >= PROGRAMS else max(1, min(most, -(-PROGRAMS // blocks)))


def sweep_grid(
    rows: int,
    columns: int,
    tile: Tile,
    partial_bytes: int,
    stats: int,
) -> tuple[int, int, int, int]:
    """(splits, column tiles of each, groups, row blocks of each): 4 waves of programs, or more of
    64 tiles each; all groups' partial results of the columns (``stats`` floats each, none if 0)
    stay within ``partial_bytes``."""
    blocks, tiles = -(-rows // tile.BM), -(-columns // tile.BN)
    most = max(1, partial_bytes // (4 * stats * columns)) if stats else blocks
    each = -(-blocks // min(blocks, most))
    groups = -(-blocks // each)
    length = min(tiles, 64, max(1, tiles * groups // (4 * PROGRAMS)))
    return -(-tiles // length), length, groups, each


def chunk(rows: int, columns: int, tile: Tile, chunk_bytes: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of a chunk of dS, multiples of the tile.

    Nearly square: float32 sums are read and written once for each chunk, (rows / chunk rows +
    columns / chunk columns) times D."""
    most = max(chunk_bytes // itemsize, tile.BM * tile.BN)
    side = int(most**0.5)
    high = _even(rows, max(side, most // _padded(columns, tile.BN)), tile.BM)
    return high, _even(columns, most // high, tile.BN)


def _padded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _even(length: int, most: int, unit: int) -> int:
    """Length of equal parts, a multiple of ``unit`` and at most ``most`` (or one unit)."""
    parts = -(-_padded(length, unit) // max(unit, most // unit * unit))
    return _padded(-(-length // parts), unit)
