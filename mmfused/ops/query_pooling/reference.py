"""Query pooling: a few learned queries attend to many tokens.

FLUID's Q-Transform (arXiv 2508.07264, equations 3-6), SigLIP's attention-pooling head and the
Perceiver pool in this way. The usual, "projected" form is

    K = X W_K^T + b_K
    V = X W_V^T + b_V
    O_h = softmax(scale Q_h K_h^T) V_h

With few queries and many tokens, computing K and V costs far more than the pooling itself. Both
projections can be moved to the side of the queries, the "absorbed" form:

    Q'_h = scale Q_h W_K,h
    S = Q' X^T
    Z = softmax(S) X
    O_h = Z_h W_V,h^T + b_V

This is exact. b_K adds one number to all logits of a row, which the softmax ignores, so its
gradient is exactly zero. The rows of softmax(S) sum to one, so b_V is added once. K and V are never
computed, and the gradient of W_K costs nothing per sample.

A LayerNorm before the projections is folded into them: its weight into W_K and W_V, its bias into
b_V. What remains for each token is (x - mean) rstd.

Dropout keeps the probabilities where the mask M is 1 and divides them by 1 - p. A row then no
longer sums to one:

    Z = (M softmax(S)) X
    ksum = rowsum(M softmax(S))
    O_h = (Z_h W_V,h^T + ksum_h b_V) / (1 - p)

where b_V includes the folded bias of the LayerNorm.

FLOPs per sample, forward and backward: 14 h L N D + 6 L D^2 (absorbed), 12 N D^2 + 14 L N D
(projected). S has R = num_heads * L rows, ordered by head, then query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...random import draw_seed, keep_mask
from .._common import masked_softmax, padding_mask


class PoolingWeights(NamedTuple):
    """The projections: w_k (Dk, D), w_v (Dv, D), b_v (Dv,), b_k (Dk,)."""

    w_k: Tensor
    w_v: Tensor
    b_v: Tensor | None
    b_k: Tensor | None

    def to(self, dtype: torch.dtype) -> PoolingWeights:
        """Return the weights in another dtype."""
        return PoolingWeights(*(None if t is None else t.to(dtype) for t in self))  # type: ignore


@dataclass(frozen=True)
class PoolingOptions:
    """The keyword arguments of :func:`query_pooling`, which documents them."""

    num_heads: int
    scale: float | None
    key_padding_mask: Tensor | None
    lengths: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    dropout_p: float
    dropout_seed: Tensor | None

    def ignored(self, x: Tensor) -> Tensor | None:
        """Return the padding mask (B, N) of the tokens, or None."""
        return padding_mask(x, self.key_padding_mask, self.lengths)


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
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Compute :func:`query_pooling` in the projected form, one line per equation.

    This is the specification: plain PyTorch for any floating dtype on any device.
    """
    ignore = padding_mask(x, key_padding_mask, lengths)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)  # a masked token may be NaN, and NaN * 0 is NaN
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    k = F.linear(x, w_k, b_k)
    v = F.linear(x, w_v, b_v)
    return attend_reference(queries, k, v, ignore, num_heads, scale, dropout_p, dropout_seed)


def attend_reference(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    ignore: Tensor | None,
    num_heads: int,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Attend to keys k (B, N, Dk) and values v (B, N, Dv); returns (B, L, Dv)."""
    q, k, v = split_heads(queries, k, v, num_heads)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    probs = masked_softmax(logits, None if ignore is None else ignore[:, None, None, :], -1)
    if dropout_p:
        seed = draw_seed(k.device) if dropout_seed is None else dropout_seed
        probs = probs * keep_mask(seed, probs.shape, dropout_p) / (1 - dropout_p)
    return merge_heads(probs.to(v.dtype) @ v)


def split_heads(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as (B, h, ., d)."""
    queries = queries.expand(k.shape[0], *queries.shape[-2:])
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (queries, k, v))
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, L, d) -> (B, L, h * d)."""
    return x.transpose(1, 2).flatten(2)
