"""The tokens: their arguments, and device functions that load x or, with NORM, (x - mean) rstd.

The normalised tokens are computed in float32 and rounded once, to the dtype of x.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_tokens, load_tokens_t, pack_padding


def sizes(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, int]:
    """Return the number of samples and the length of each, or the maximum length if packed."""
    if cu_seqlens is None:
        return x.shape[0], x.shape[1]
    assert max_seqlen is not None
    return cu_seqlens.shape[0] - 1, max_seqlen


def token_arguments(
    x: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> dict[str, Any]:
    """Return the kernel arguments that describe the tokens, for forward and backward."""
    words, span, num_words, kind = pack_padding(mask, lengths)
    if cu_seqlens is not None:
        span, kind = cu_seqlens, "packed"
    return dict(
        x_ptr=x,
        words_ptr=words,
        span_ptr=span,
        N=sizes(x, cu_seqlens, max_seqlen)[1],
        W=num_words,
        stride_xb=x.stride(0) if x.dim() == 3 else 0,
        stride_xn=x.stride(-2),
        D=x.shape[-1],
        MASK=kind,
    )


@triton.jit
def sample_start(
    b,
    span_ptr,
    N,
    stride_b,
    stride_n,
    hi,
    MASK: tl.constexpr,
):
    """Return where sample b starts, and how many rows it has.

    The start is given as a row of contiguous tensors with one row for each token, (B, N, ...) or
    packed (total, ...), and as an offset in x. ``hi`` is the end of the sample's span.
    """
    row = b * N
    offset = b * stride_b
    count = N
    if MASK == "packed":
        row = tl.load(span_ptr + b).to(tl.int64)
        offset = row * stride_n
        count = hi
    return row, offset, count


@triton.jit
def load_moments(
    mean_ptr,
    rstd_ptr,
    row,
    n,
    keep,
    NORM: tl.constexpr,
):
    """Load mean and rstd of each token; 0 for ignored tokens, and without NORM.

    ``row``: the first row of the sample, see sample_start.
    """
    mean = tl.zeros(n.shape, tl.float32)
    rstd = mean
    if NORM:
        mean = tl.load(mean_ptr + row + n, mask=keep, other=0.0)
        rstd = tl.load(rstd_ptr + row + n, mask=keep, other=0.0)
    return mean, rstd


@triton.jit
def load_normed(
    x_ptr,
    n,
    cols,
    keep,
    stride_n,
    D: tl.constexpr,
    mean,
    rstd,
    NORM: tl.constexpr,
):
    """Load a (tokens, columns) tile of one sample, normalised if NORM."""
    x = load_tokens(x_ptr, n, cols, keep, stride_n, D)
    return normed(x, mean[:, None], rstd[:, None], cols[None, :], D, cols.shape[0], NORM)


@triton.jit
def load_normed_t(
    x_ptr,
    n,
    cols,
    keep,
    stride_n,
    D: tl.constexpr,
    mean,
    rstd,
    NORM: tl.constexpr,
):
    """Load a (columns, tokens) tile of one sample, normalised if NORM."""
    x = load_tokens_t(x_ptr, n, cols, keep, stride_n, D)
    return normed(x, mean[None, :], rstd[None, :], cols[:, None], D, cols.shape[0], NORM)


@triton.jit
def normed(
    x,
    mean,
    rstd,
    cols,
    D: tl.constexpr,
    BD: tl.constexpr,
    NORM: tl.constexpr,
):
    """Normalise a tile whose columns are ``cols``; without NORM return x."""
    if NORM:
        y = (x.to(tl.float32) - mean) * rstd
        # If D is not a multiple of BD, the columns from D on are padding and must stay 0. In these
        # columns y is -mean rstd, which may overflow in 16 bits, and inf * 0 is NaN.
        if (BD - 1) & D:
            y = tl.where(cols < D, y, 0.0)
        x = y.to(x.dtype)
    return x
