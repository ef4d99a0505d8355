"""Kernels and tile sizes of query pooling, chosen by shape, dtype and architecture.

``make compile-matrix`` checks the tiles for register spills, on every supported Triton and
architecture. The tiles were chosen by estimates; ``mmfused tune`` times them and their
alternatives, and what is faster on a user's GPU replaces them there (tuned.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...supported import TRITONS
from ..tiles import SHARED_MEMORY, cdiv
from ..tuned import bucket, tunable


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
    """A tile of the Gluon kernels for sm_90 (see hopper_tokens.py).

    It has BR rows of queries and all columns, in CHUNKS chunks of 64. SLOTS chunks of tokens fit
    into shared memory beside the rest.
    """

    BR: int
    CHUNKS: int
    SLOTS: int


@dataclass(frozen=True)
class SoftmaxTile:
    """A tile of BN tokens and BR rows of the kernels in products.py.

    If it holds all tokens of a sample, they are read once.
    """

    BN: int
    BR: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 255  # with its own limit, ptxas spills up to 16 bytes


# Samples of up to this many tokens are processed in pairs, two in a tile.
PAIR_TOKENS = 32
LONG = 2**20  # tokens: longer than any short sample
_TRITON_3_6 = triton.__version__.startswith("3.6.")
# Gluon is experimental: its kernels run where they were compiled and tested.
_GLUON = triton.__version__.startswith(TRITONS)


@dataclass(frozen=True)
class Plan:
    """The tiles of the kernels that run, by kernel name.

    Forward: ``softmax`` (see products.py), ``short``, ``hopper`` or ``onepass``, or ``logits`` then
    ``pool``. With a norm, ``moments`` runs first. Backward: ``softmax``, ``pairs`` or ``hopper``,
    or ``dlogits``, ``dx`` and ``dq`` in this order.
    """

    # Tile; HopperTile for ``pairs`` and ``hopper``, SoftmaxTile for ``softmax``
    forward: dict[str, Any]
    backward: dict[str, Any]
    # Maximum number of partial sums for the gradient of shared queries, except with ``softmax``. It
    # does not depend on the number of multiprocessors, so that GPUs of one architecture compute the
    # same sums.
    partials: int


def has_gluon(arch: int, dtype: torch.dtype) -> bool:
    """Return whether the Gluon kernels serve an architecture and dtype, for shapes that fit."""
    return arch == 90 and _GLUON and dtype in (torch.float16, torch.bfloat16)


@tunable("query_pooling", length=bucket)
def plan(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    arch: int,
    norm: bool,
    dropout: bool = False,
    per_sample: bool = False,
    tma: bool = False,
    dlse: bool = False,
    length: int = LONG,
    padded: bool = False,
) -> Plan:
    """Choose the kernels of forward and backward, and their tiles.

    ``per_sample``: whether each sample has its own queries. ``tma``: whether TMA can load the
    tokens (see hopper_tokens.can_describe). ``dlse``: whether the log-sum-exp has a gradient.
    ``length``: the number of tokens of a sample. ``padded``: whether there may be tokens to ignore,
    or tokens are packed.

    ``onepass`` reads X once for each block of BR rows, and runs if all columns of Z^T fit into
    registers. So do ``short``, for samples whose tokens fit into one tile, and ``hopper``, forward
    and backward. ``pairs`` is ``hopper`` for short samples. ``softmax`` runs for many rows, where
    these would read X too often; but it neither normalises tokens nor skips padding. For the
    symbols see forward.py and backward.py.
    """
    # These architectures have 227 KB of shared memory. The tiles for others fit into 99 KB.
    big_shared = arch in (90, 100, 103)
    # Products of float32 use no matrix instructions, and need more registers.
    float32 = dtype == torch.float32
    if rows > 32 and not (norm or padded) and _has_products(dtype):
        tiles = {"softmax": _softmax(length)}
        return Plan(tiles, tiles, 1)
    forward = {"moments": Tile(16, 16, 128, 4, 1)} if norm else {}
    hopper = has_gluon(arch, dtype) and tma and dim <= 1024
    short = None if float32 or per_sample else _short(dim, arch, norm or dropout, length)
    if short is not None:
        forward["short"] = short
    elif hopper:
        forward["hopper"] = _hopper_forward(rows, dim)
    elif dim > (1024 if big_shared else 768) or float32:
        forward |= _tiles_of(("logits", "pool"), rows, big_shared, float32, norm)
    else:
        forward["onepass"] = _onepass(dim, arch, dropout)
    if hopper and not per_sample and rows <= 16 and length <= PAIR_TOKENS and dim <= 768:
        backward = {"pairs": _hopper_backward(rows, dim, True)}
    elif hopper and _hopper_backward_fits(rows, dim, norm, dropout, per_sample, dlse):
        backward = {"hopper": _hopper_backward(rows, dim, False)}
    else:
        backward = _tiles_of(("dlogits", "dx", "dq"), rows, big_shared, float32, norm, dropout)
    # ``dq`` has blocks of rows and columns too, which fill the GPU with fewer partial sums.
    return Plan(forward, backward, 128 if rows <= 32 else max(16, 4096 // rows))


def _has_products(dtype: torch.dtype) -> bool:
    """Return whether torch multiplies matrices of this type with a float32 result."""
    if dtype == torch.float16:  # if sums are float16 too, torch refuses
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return dtype == torch.bfloat16


def _softmax(length: int) -> SoftmaxTile:
    if length <= 256:  # more would not fit into registers
        tokens = max(16, triton.next_power_of_2(length))
        return SoftmaxTile(tokens, 16, max(1, tokens // 64))
    return SoftmaxTile(64, 32, 4)


def _hopper_forward(rows: int, dim: int) -> HopperTile:
    rows = 16 if rows <= 16 or dim > 768 else 32  # more would not fit into registers
    chunks = _hopper_chunks(dim)
    # For each row: the queries (16 bits), two tiles of P (16 bits), four parts of S (32 bits).
    free = SHARED_MEMORY[90] - 2048 - rows * (128 * chunks + 256 + 1024)
    return HopperTile(rows, chunks, min(24, free // 8192))


def _hopper_backward_fits(
    rows: int,
    dim: int,
    norm: bool,
    dropout: bool,
    per_sample: bool,
    dlse: bool,
) -> bool:
    """Return whether the kernel for sm_90 can have the rows of a sample, without spills."""
    if rows <= 16:
        return not (_TRITON_3_6 and dim > 768 and norm and dropout)
    crowded = norm or (dropout and (per_sample or dlse))
    if _TRITON_3_6:
        crowded = crowded or dropout or per_sample or dlse
    return rows <= 32 and dim <= 768 and not crowded


def _hopper_backward(rows: int, dim: int, pairs: bool) -> HopperTile:
    rows = 16 if rows <= 16 else 32
    chunks = _hopper_chunks(dim)
    # For each row: queries and the dZ of each sample (16 bits), two parts (32 bits), two tiles of
    # dS (16 bits), and ten numbers.
    columns = 128 * chunks
    free = SHARED_MEMORY[90] - 1024 - rows * ((3 if pairs else 2) * columns + 512 + 256 + 40)
    return HopperTile(rows, chunks, min(24, free // 8192))


def _hopper_chunks(dim: int) -> int:
    """Return the number of chunks of 64 columns, the same for both consumers."""
    return 2 * cdiv(dim, 128)


def _onepass(dim: int, arch: int, dropout: bool) -> Tile:
    """Return the tile of the forward that reads X once.

    It has few rows and warps, so that a multiprocessor holds several blocks, one of which loads
    while another computes. A tile of 32 rows would halve the reads of X, which L2 serves, but one
    block would fill the registers.
    """
    chunk = column_chunk(dim)
    if dim > 768:
        return Tile(32, 16, max(128, chunk), 8, 2)
    if arch in (100, 103):  # Z^T is in tensor memory
        # A norm spills up to 16 bytes with ptxas's own limit, dropout beside a norm with this one.
        return Tile(32, 16, chunk, 4, 2, None if dropout else 255)
    # With dropout, 4 warps spill up to 24 bytes on sm_80 (Triton 3.6) and sm_120.
    warps = 8 if dropout and arch != 90 and chunk == 256 else 4
    return Tile(16, 16, chunk, warps, 3 if arch == 90 else 2, 255 if chunk < 256 else None)


def _short(dim: int, arch: int, crowded: bool, length: int) -> Tile | None:
    """Return the tile that holds all tokens of a short sample; None if samples are longer.

    Two blocks fit onto a multiprocessor, by their registers and, on sm_90, their shared memory.
    ``crowded``: whether there is a norm or dropout, with which 32 tokens spill up to 48 bytes on
    sm_86, sm_89 and sm_90. On sm_120 they do in any case.
    """
    tokens = 32 if arch in (80, 87) or (arch in (86, 89, 90) and not crowded) else 16
    # Z^T is in tensor memory on sm_100, for which this kernel's time was not estimated.
    if length > tokens or dim > 768 or arch in (100, 103):
        return None
    if length <= 16:
        return Tile(16, 16, column_chunk(dim), 4, 3, 255)
    return Tile(32, 16, column_chunk(dim), 4, 2)


def _tiles_of(
    kernels: tuple[str, ...],
    rows: int,
    big_shared: bool,
    float32: bool,
    norm: bool,
    dropout: bool = False,
) -> dict[str, Tile]:
    """Return the tiles of the given kernels, which together read X more than once."""
    if float32:
        columns = {kernel: 32 if "logits" in kernel else 64 for kernel in kernels}
        return {kernel: Tile(32, 16, BD, 8, 2, 255) for kernel, BD in columns.items()}
    few_rows = 16 if rows <= 16 or not big_shared else 32
    many_rows = 64 if rows > 32 and big_shared else few_rows
    tokens = 64 if big_shared else 32
    tiles = {
        "logits": Tile(64, few_rows, 64, 4, 3, 255),
        "pool": Tile(tokens, few_rows, 128, 4, 3, 255),
        "dlogits": _dlogits(rows, big_shared, norm, dropout),
        "dx": Tile(64, many_rows, 128, 4, 2),
        "dq": Tile(32 if rows <= 8 else tokens, many_rows, 128, 4, 3, 255),
    }
    if norm:
        # Fewer elements a thread, because the normalised tokens are computed in registers.
        tiles["dx"] = Tile(32, 16, 128, 4, 2, 168)
        tiles["dq"] = Tile(32, 16 if rows <= 16 else 32, 128, 4, 2, 168)
    elif rows <= 16:
        tiles["dx"] = Tile(32, 16, 256 if big_shared else 128, 4, 2)
    return {kernel: tiles[kernel] for kernel in kernels}


def _dlogits(rows: int, big_shared: bool, norm: bool, dropout: bool) -> Tile:
    few_rows = 16 if rows <= 16 else 32
    if norm:
        # With more stages, Triton 3.8 leaves out a fence on sm_90 if R D is not a multiple of 16
        # and each sample has its own queries. It takes the fence of the first product, whose
        # operand comes from registers, to cover the copies of dZ and Z too, which complete later.
        if rows <= 16:  # with ptxas's own limit, sm_100 spills 8 bytes
            return Tile(64, 16, 128, 4, 1, 255 if big_shared else None)
        if dropout and not big_shared:  # on sm_120, 32 rows or fewer registers spill 8 bytes
            return Tile(64, 16, 64, 4, 1, 255)
        return Tile(64, 32, 64, 4, 1)
    if rows > 32 and big_shared:
        return Tile(64, 64, 64, 8, 3, 255)
    if rows <= 8:
        return Tile(32, 16, 64, 2, 3)
    return Tile(64, few_rows, 64, 4, 3 if big_shared else 2)


def column_chunk(dim: int) -> int:
    """Return the width of a column chunk: the one of 64, 128 and 256 that pads ``dim`` the least.

    If several pad it equally, the widest is used: 768 is 3 x 256, 192 is 3 x 64.
    """
    return min((256, 128, 64), key=lambda chunk: -(-dim // chunk) * chunk)
