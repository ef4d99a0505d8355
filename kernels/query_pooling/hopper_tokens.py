"""Code shared by the Gluon kernels of query pooling, for sm_90.

A block of 9 warps keeps one multiprocessor busy. A producer, one warp, loads tiles of BN tokens by
TMA, in chunks of BD columns, into a ring of slots. Two consumers, of four warps each, compute. Each
of them owns one half of the columns.

For each slot there are two mbarriers: ``full`` completes when a chunk has arrived, ``empty`` when
its owner no longer needs it. The chunks of a tile alternate between the owners, so that both can
start early.

TMA fills what is outside of a tensor with zeros: tokens from N on, rows from R on, and columns from
D on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import tiles
from ..gluon import load
from ..tiles import INTERPRETED

LOG2E = gl.constexpr(1.4426950408889634)
BN = gl.constexpr(64)  # tokens of a tile: the height of wgmma, and the bits of a word of the mask
BD = gl.constexpr(64)  # columns of a chunk: 128 bytes, the width of the swizzle
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # a chunk in registers


def descriptor(tensor: Tensor, tokens: int, samples: int = 1) -> TensorDescriptor:
    """Return a descriptor of (B, N, D) or (R, D) with boxes of (samples, tokens, BD)."""
    if tensor.dim() == 2:
        tensor = tensor[None]
    block = [samples, tokens, BD.value]
    element = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor.from_tensor(tensor, block, layout)


def can_describe(*tensors: Tensor) -> bool:
    """Return whether TMA can load these tensors of 16 bits: their rows begin at 16 bytes each.

    Always False in Triton's interpreter, which has no Gluon.
    """
    return not (INTERPRETED and tiles.pretended_arch is None) and all(
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] % 8 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


@gluon.jit
def load_tile(
    desc,
    b,
    start,
    ring,
    full,
    empty,
    step,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """Load the tile of sample b that begins with row ``start``. Return the next step."""
    for i in gl.static_range(CHUNKS):
        slot = (step + i) % SLOTS
        mbarrier.wait(empty.index(slot), ((step + i) // SLOTS & 1) ^ 1)
        mbarrier.expect(full.index(slot), BN * BD * 2)
        chunk = i % 2 * (CHUNKS // 2) + i // 2
        load(desc, [b, start, chunk * BD], full.index(slot), ring.index(slot))
    return step + CHUNKS


@gluon.jit
def load_rows(
    desc,
    b,
    first,
    bar,
    tiles,
    CHUNKS: gl.constexpr,
):
    """Load all columns of some rows of sample b, as chunks; ``bar`` completes when all are here."""
    BR: gl.constexpr = desc.block_type.shape[1]
    mbarrier.expect(bar, CHUNKS * BR * BD * 2)
    for c in gl.static_range(CHUNKS):
        load(desc, [b, first, c * BD], bar, tiles.index(c))


@gluon.jit
def span_of(
    b,
    span_ptr,
    N,
    MASK: gl.constexpr,
):
    """Return lo and hi: the valid tokens of sample b are in [lo, hi), and BN divides lo."""
    lo = 0
    hi = N
    if MASK == "lengths":
        # Clamped, so that a wrong length never makes the kernel read out of bounds.
        hi = gl.maximum(gl.minimum(gl.load(span_ptr + b), N), 0).to(gl.int32)
    if MASK == "padding":
        lo = gl.load(span_ptr + 2 * b) // BN * BN
        hi = gl.load(span_ptr + 2 * b + 1)
    return lo, hi


@gluon.jit
def word_of(
    b,
    start,
    words_ptr,
    W,
    MASK: gl.constexpr,
):
    """Return the word of the padding mask for the tile that begins with token ``start``."""
    word = -1
    if MASK == "padding":
        word = gl.load(words_ptr + b * W + start // BN)
    return word


@gluon.jit
def kept(
    word,
    start,
    hi,
    token,
    MASK: gl.constexpr,
):
    """Return which tokens of a tile are valid."""
    keep = start + token < hi
    if MASK == "padding":
        keep = keep & (((word >> token.to(gl.int64)) & 1) != 0)
    return keep


@gluon.jit
def _must_rewrite(
    word,
    start,
    hi,
    N,
    MASK: gl.constexpr,
    NORM: gl.constexpr,
):
    """Return whether a tile has ignored tokens, or tokens to normalise."""
    rewrite = gl.to_tensor(NORM)
    if MASK == "lengths":
        rewrite = rewrite | ((start + BN > hi) & (hi < N))
    if MASK == "padding":
        there = gl.minimum(N - start, BN).to(gl.int64)  # the number of tokens before N
        rewrite = rewrite | ((~word << (BN - there)) != 0)
    return rewrite


@gluon.jit
def rewrite_half(
    half: gl.constexpr,
    ring,
    full,
    step,
    word,
    b,
    start,
    hi,
    tokens,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    MASK: gl.constexpr,
    NORM: gl.constexpr,
):
    """Rewrite one half of the columns of a tile, if there is anything to change."""
    _, _, _, _, N, _ = tokens
    if _must_rewrite(word, start, hi, N, MASK, NORM):
        token = gl.arange(0, BN, layout=gl.SliceLayout(1, ROWS))
        keep = kept(word, start, hi, token, MASK)
        n = b.to(gl.int64) * N + start + token
        rewrite(half, ring, full, step, keep, n, tokens, D, SLOTS, CHUNKS, NORM)


@gluon.jit
def rewrite(
    half: gl.constexpr,
    ring,
    full,
    step,
    keep,
    n,
    tokens,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    NORM: gl.constexpr,
):
    """Set ignored tokens, which may be NaN, to 0; with NORM, normalise the others.

    Changes one half of the columns of a tile, in shared memory. ``keep`` and ``n``: which tokens of
    the tile are valid, and where their moments are. ``tokens``: the arguments that describe them.
    """
    _, _, mean_ptr, rstd_ptr, _, _ = tokens
    if NORM:
        mean = gl.load(mean_ptr + n, mask=keep, other=0.0)
        rstd = gl.load(rstd_ptr + n, mask=keep, other=0.0)
    for i in range(CHUNKS // 2):
        at = step + 2 * i + half
        mbarrier.wait(full.index(at % SLOTS), (at // SLOTS) & 1)
        tile = ring.index(at % SLOTS).reshape([BN, BD])
        x = tile.load(ROWS)
        inside = keep[:, None]
        if NORM:
            y = (x.to(gl.float32) - mean[:, None]) * rstd[:, None]
            x = y.to(x.dtype)
            if D % (CHUNKS * BD) != 0:
                col = (half * (CHUNKS // 2) + i) * BD
                col += gl.arange(0, BD, layout=gl.SliceLayout(0, ROWS))
                inside = inside & (col < D)[None, :]
        tile.store(gl.where(inside, x, 0.0))
    fence_async_shared()


@gluon.jit
def rows_kept(
    keep_ptr,
    b,
    start,
    token,
    rows,
    N,
    R,
):
    """Return which probabilities of a tile are kept by dropout, (tokens, rows)."""
    at = (b.to(gl.int64) * ((N + BN - 1) // BN) + start // BN) * R + rows
    word = gl.load(keep_ptr + at, mask=rows < R, other=0)
    return ((word[None, :] >> token.to(gl.int64)[:, None]) & 1) != 0
