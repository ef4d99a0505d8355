"""Query pooling: a few learned queries attend to many tokens.

FLUID's Q-Transform and Q-bottleneck (arXiv 2508.07264, equations 3-8), SigLIP's attention-pooling
head and the Perceiver use query pooling. Notation for one sample:

    X (N, D)       tokens
    Q (L, Dk)      queries
    W_K (Dk, D)    weight of the key projection, with bias b_K (Dk,)
    W_V (Dv, D)    weight of the value projection, with bias b_V (Dv,)
    O (L, Dv)      output
    index h        the part of head h: columns of Q, K, V, O; rows of W_K, W_V, Q', Z

The usual form, called "projected" here, is

    K = X W_K^T + b_K
    V = X W_V^T + b_V
    O_h = softmax(scale Q_h K_h^T) V_h

With few queries and many tokens, K and V cost far more than the pooling itself. The "absorbed" form
multiplies the queries by W_K, and the pooled tokens Z by W_V:

    Q'_h = scale Q_h W_K,h
    S    = Q' X^T                        the logits
    Z    = softmax(S) X
    O_h  = Z_h W_V,h^T + b_V,h

Q', S and Z have R = num_heads * L rows: the rows of query 0, one for each head, then those of query
1, and so on. With dropout they are sorted by heads first, like the mask M below.

The two forms are mathematically equivalent. b_K adds the same number to all logits of a row. This
does not change the softmax, so the gradient of b_K is exactly zero. The rows of softmax(S) sum to
one, so b_V is added once. If the samples share the queries, the gradient of W_K takes one small
product for the whole batch.

In the absorbed form, a LayerNorm of the tokens is folded into the projections: the norm's weight
into W_K and W_V, the norm's bias into b_V. Only (x - mean) / sqrt(variance + eps) is left to
compute for each token x.

Dropout with rate p multiplies the probabilities by a mask M of zeros and ones, and divides the
products by 1 - p. The rows then no longer sum to one:

    Z = (M * softmax(S)) X
    ksum = row sums of M * softmax(S)
    O_h = (Z_h W_V,h^T + ksum_h b_V,h) / (1 - p)

where * is elementwise, ksum_h has the L entries of head h, and b_V,h is the part of b_V for head h.

The log-sum-exp of a row, log sum_n exp(scale Q_h K_h^T), covers all probabilities, before dropout.
The logits of the absorbed form lack the terms of b_K and of the norm's bias b_N, so in that form
scale Q_h (W_K,h b_N + b_K,h) is added to the log-sum-exp.

FLOPs per sample, forward and backward, with Dk = Dv = D and shared queries: 14 R N D + 6 L D^2
(absorbed), 12 N D^2 + 14 L N D (projected). The absorbed form adds 6 L D^2 per batch for Q'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ...random import draw_seed, keep_mask
from .._common import masked_logsumexp, masked_softmax, padding_mask


class PoolingWeights(NamedTuple):
    """Weights and biases of the projections: w_k (Dk, D), w_v (Dv, D), b_v (Dv,), b_k (Dk,)."""

    w_k: Tensor
    w_v: Tensor
    b_v: Tensor | None
    b_k: Tensor | None

    def to(self, dtype: torch.dtype) -> PoolingWeights:
        """Return the weights and biases in ``dtype``."""
        return PoolingWeights(*(None if t is None else t.to(dtype) for t in self))  # type: ignore


@dataclass(frozen=True)
class PoolingOptions:
    """Keyword arguments of :func:`query_pooling`, without ``form``; see there."""

    num_heads: int
    scale: float | None
    key_padding_mask: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    dropout_p: float
    dropout_seed: Tensor | None
    return_lse: bool

    def ignored(self, x: Tensor) -> Tensor | None:
        """Return the padding mask (B, N) of the tokens, True = ignore, or None."""
        return padding_mask(x, self.key_padding_mask, self.lengths)


@overload
def query_pooling_reference(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def query_pooling_reference(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def query_pooling_reference(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`query_pooling` in the projected form.

    This is the specification: plain PyTorch for any floating dtype on any device.

    Examples:
        >>> import torch, mmfused
        >>> x, queries = torch.randn(4, 50, 32), torch.randn(2, 16)
        >>> weights = torch.randn(16, 32) / 6, torch.randn(24, 32) / 6
        >>> pooled = mmfused.query_pooling(x, queries, *weights)
        >>> exact = mmfused.query_pooling_reference(
        ...     x.double(), queries.double(), *(w.double() for w in weights)
        ... )
        >>> torch.allclose(pooled.double(), exact, atol=1e-5)
        True
    """
    options = PoolingOptions(
        num_heads=num_heads,
        scale=scale,
        key_padding_mask=key_padding_mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    out, lse = pool_reference(x, queries, PoolingWeights(w_k, w_v, b_v, b_k), options)
    return out if lse is None else (out, lse)


def pool_reference(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`query_pooling_reference`; without ``return_lse`` the second result is None."""
    if options.cu_seqlens is not None:
        x, options = unpacked(x, options)
    ignore = options.ignored(x)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)  # a masked token may be NaN, and NaN * 0 is NaN
    if options.norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], options.norm_weight, options.norm_bias, options.norm_eps)
    k = F.linear(x, weights.w_k, weights.b_k)
    v = F.linear(x, weights.w_v, weights.b_v)
    return attend_reference(queries, k, v, ignore, options)


def packed_lengths(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the length of each sample of packed tokens; -1 if its offsets leave x."""
    first, last = cu_seqlens[:-1], cu_seqlens[1:]
    outside = (first < 0) | (last > x.shape[0])
    return (last - first).masked_fill(outside, -1)


def unpack(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Return packed tokens (total, D) as (B, max_seqlen, D), and the lengths (B,).

    The tokens beyond the length of a sample are any tokens of x.
    """
    lengths = packed_lengths(x, cu_seqlens)
    if not x.shape[0]:
        x = F.pad(x, (0, 0, 0, 1))
    n = torch.arange(max_seqlen, device=x.device)
    return x[(cu_seqlens[:-1, None] + n).clamp(0, x.shape[0] - 1)], lengths


def unpacked(x: Tensor, options: PoolingOptions) -> tuple[Tensor, PoolingOptions]:
    """Unpack packed tokens, and replace the offsets in the options by the lengths."""
    assert options.cu_seqlens is not None and options.max_seqlen is not None
    x, lengths = unpack(x, options.cu_seqlens, options.max_seqlen)
    return x, replace(options, lengths=lengths, cu_seqlens=None, max_seqlen=None)


def attend_reference(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    ignore: Tensor | None,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor | None]:
    """Attend to keys k (B, N, Dk) and values v (B, N, Dv).

    Return the output (B, L, Dv), and the log-sum-exp (B, h, L) or None.
    """
    q, k, v = split_heads(queries, k, v, options.num_heads)
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    logits = q @ k.transpose(-1, -2) * scale
    masked = None if ignore is None else ignore[:, None, None, :]
    probs = masked_softmax(logits, masked, -1)
    if options.dropout_p:
        seed = draw_seed(k.device) if options.dropout_seed is None else options.dropout_seed
        probs = probs * keep_mask(seed, probs.shape, options.dropout_p) / (1 - options.dropout_p)
    lse = masked_logsumexp(logits, masked, -1) if options.return_lse else None
    return merge_heads(probs.to(v.dtype) @ v), lse


def split_heads(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split queries, keys and values into heads, each (B, num_heads, length, width per head)."""
    queries = queries.expand(k.shape[0], *queries.shape[-2:])
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (queries, k, v))
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """Reshape (B, h, L, d) to (B, L, h * d)."""
    return x.transpose(1, 2).flatten(2)
