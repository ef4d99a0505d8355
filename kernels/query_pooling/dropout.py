"""The dropout mask of query pooling, one bit for each probability.

Forward and backward both compute the mask in a separate kernel. The pooling kernels load one word
of the mask for each row of a tile, which takes fewer registers than Philox.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, philox_keep

STREAM = 0
BLOCK = 32  # number of words that one program writes


def keep_words(
    x: Tensor,
    seed: Tensor | None,
    p: float,
    batch: int,
    rows: int,
    length: int,
) -> Tensor | None:
    """Return the mask as (B, N / 64, R) int64 words on the device of x; None without dropout.

    Bit n % 64 of the word (b, n // 64, r) is set if row r of sample b keeps token n.
    """
    if not p:
        return None
    assert seed is not None  # the public function draws a seed if none is given
    words = seed.new_empty(batch, triton.cdiv(length, 64), rows, device=x.device)
    keep_words_kernel[(triton.cdiv(batch * rows, BLOCK), words.shape[1])](
        seed_ptr=seed,
        words_ptr=words,
        total=batch * rows,
        R=rows,
        p=p,
        STREAM=STREAM,
        BR=BLOCK,
        num_warps=4,
        num_stages=1,
        **OPTIONS,
    )
    return words


@triton.jit
def keep_words_kernel(
    seed_ptr,  # () int64
    words_ptr,  # (B, N / 64, R) int64
    total,
    R,
    p,
    STREAM: tl.constexpr,
    BR: tl.constexpr,
):
    """Write one word for each of BR rows of the (B R, N) mask. Grid (B R / BR, N / 64)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    kept = philox_keep(tl.load(seed_ptr), row, tl.program_id(1) * 64, p, STREAM, 64)
    word = tl.sum(kept.to(tl.int64) << tl.arange(0, 64).to(tl.int64)[None, :], 1)
    at = (row // R * tl.num_programs(1) + tl.program_id(1)) * R + row % R
    tl.store(words_ptr + at, word, mask=row < total)


@triton.jit
def rows_keep(
    words_ptr,
    b,
    start,
    BN: tl.constexpr,
    rows,
    N,
    R,
):
    """Return which probabilities of sample b are kept, (BN, rows) bool.

    The bits of the tokens start .. start + BN - 1 must be in one word.
    """
    at = (b * tl.cdiv(N, 64) + start // 64) * R + rows
    word = tl.load(words_ptr + at, mask=rows < R, other=0) >> (start % 64)
    if BN <= 32:
        word = word.to(tl.int32)
    return ((word[None, :] >> tl.arange(0, BN).to(word.dtype)[:, None]) & 1) != 0
