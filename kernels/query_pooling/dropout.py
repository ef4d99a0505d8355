"""Dropout of query pooling: which probabilities are kept, 64 tokens a word, made anew for the
forward and for the backward.

A kernel of its own, because within the pooling kernels Philox would want registers that are all
taken, and be computed again by every kernel and column chunk that needs the probabilities. There a
tile costs one word a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import launch, philox_keep

STREAM = 0
BLOCK = 32  # words of one program


def keep_words(like: Tensor, seed: Tensor, p: float, batch: int, rows: int, length: int) -> Tensor:
    """(B, N / 64, R) int64: bit n % 64 of word n // 64 says whether row r of sample b keeps token
    n.
    """
    words = seed.new_empty(batch, triton.cdiv(length, 64), rows, device=like.device)
    launch(
        keep_words_kernel,
        (triton.cdiv(batch * rows, BLOCK), words.shape[1]),
        seed,
        words,
        batch * rows,
        rows,
        p,
        STREAM=STREAM,
        BR=BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return words


@triton.jit
def keep_words_kernel(seed_ptr, words_ptr, total, R, p, STREAM: tl.constexpr, BR: tl.constexpr):
    """grid (B R / BR, N / 64). One word each for BR rows of the whole mask."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    kept = philox_keep(tl.load(seed_ptr), row, tl.program_id(1) * 64, p, STREAM, 64)
    word = tl.sum(kept.to(tl.int64) << tl.arange(0, 64).to(tl.int64)[None, :], 1)
    tl.store(
        words_ptr + (row // R * tl.num_programs(1) + tl.program_id(1)) * R + row % R,
        word,
        mask=row < total,
    )


@triton.jit
def rows_keep(words_ptr, b, start, BN: tl.constexpr, rows, N, R):
    """(BN tokens, rows) bool of one sample: which probabilities are kept; the tokens begin at
    ``start`` and lie in one word.
    """
    word = tl.load(
        words_ptr + (b * tl.cdiv(N, 64) + start // 64) * R + rows, mask=rows < R, other=0
    ) >> (start % 64)
    if BN <= 32:
        word = word.to(tl.int32)
    return ((word[None, :] >> tl.arange(0, BN).to(word.dtype)[:, None]) & 1) != 0
