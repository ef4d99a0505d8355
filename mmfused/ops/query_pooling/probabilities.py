"""The probabilities of query pooling, for heat maps; the equations are in reference.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import autocast_dtype, nan_unless, no_autocast, wide_unless
from .._common import masked_softmax, padding_mask
from .checks import check_weights
from .composed import centred
from .reference import unpack


def pooling_weights(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    chunk: int = 32,
) -> Tensor:
    """Return the probabilities with which :func:`query_pooling` pools the tokens, to look at them.

    Computes ``softmax(scale * Q K^T)`` with ``K = x w_k^T`` in the absorbed form, without dropout
    and without gradients, in plain PyTorch on every backend.

    Args:
        x: tokens (B, N, D), or packed tokens (total, D); float32, float16, bfloat16 or float64.
        queries: projected queries, (B, L, Dk), or (L, Dk) for all samples.
        w_k: (Dk, D), weight of the key projection. Its bias and that of the LayerNorm add the same
            number to all logits of a row, so they have no effect on the probabilities.
        num_heads, scale, key_padding_mask, lengths: as for :func:`query_pooling`.
        cu_seqlens, max_seqlen: as for :func:`query_pooling`; N is then ``max_seqlen``.
        norm_weight, norm_eps: as for :func:`query_pooling`.
        chunk: number of samples that are computed at a time. Beside the result, memory is needed
            for the tokens and logits of so many samples only.

    Returns:
        (B, num_heads, L, N) in float32, or in float64 for float64 ``x``. Ignored tokens have 0; a
        sample without tokens has only zeros. Each other row sums to 1.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> patches = torch.randn(2, 6 * 8, 32)  # the tokens of a picture of 6 x 8 patches
        >>> queries, w_k = torch.randn(4, 16), torch.randn(16, 32)
        >>> weights = mmfused.pooling_weights(patches, queries, w_k, num_heads=2)
        >>> weights.shape
        torch.Size([2, 2, 4, 48])
        >>> maps = weights.mean(1).unflatten(-1, (6, 8))  # a map for each query, mean of the heads
        >>> maps.shape
        torch.Size([2, 4, 6, 8])
    """
    if isinstance(x, Tensor) and autocast_dtype(x.device.type) is not None:
        queries, w_k, norm_weight = wide_unless(x.dtype, queries, w_k, norm_weight)
    batch = check_weights(
        x=x,
        queries=queries,
        w_k=w_k,
        num_heads=num_heads,
        scale=scale,
        key_padding_mask=key_padding_mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        chunk=chunk,
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = (w_k.shape[0] // num_heads) ** -0.5 if scale is None else scale

    def of_samples(part: slice) -> Tensor:
        tokens, mask, counts = samples(x, key_padding_mask, lengths, cu_seqlens, max_seqlen, part)
        ignore = padding_mask(tokens, mask, counts)
        tokens = tokens.to(wide)
        if ignore is not None:
            tokens = tokens.masked_fill(ignore[:, :, None], 0.0)
        if norm_weight is not None:
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=norm_eps)
        q = queries if queries.dim() == 2 else queries[part]
        q = q.to(wide).unflatten(-1, (num_heads, -1)).transpose(-2, -3) * factor
        q = (q @ keys).flatten(-3, -2)  # absorbed, (R, D) or (samples, R, D)
        ignore = None if ignore is None else ignore[:, None]
        weights = masked_softmax(q @ tokens.transpose(1, 2), ignore, -1)
        if counts is not None:
            weights = nan_unless(counts, tokens.shape[1], weights)
        return weights.unflatten(1, (num_heads, queries.shape[-2]))

    with torch.no_grad(), no_autocast(x.device.type):
        keys = w_k.to(wide)
        keys = keys if norm_weight is None else centred(keys * norm_weight.to(wide))
        keys = keys.unflatten(0, (num_heads, -1))
        return in_chunks(of_samples, batch, chunk)


def samples(
    x: Tensor,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    part: slice,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return tokens (samples, N, D), mask and lengths of some samples; packed ones are unpacked."""
    if cu_seqlens is not None and max_seqlen is not None:
        tokens, lengths = unpack(x, cu_seqlens[part.start : part.stop + 1], max_seqlen)
        return tokens, None, lengths
    mask = None if key_padding_mask is None else key_padding_mask[part]
    return x[part], mask, None if lengths is None else lengths[part]


def in_chunks(of_samples: Callable[[slice], Tensor], batch: int, chunk: int) -> Tensor:
    """Concatenate what ``of_samples`` returns for ``chunk`` samples at a time, with few copies."""
    first = of_samples(slice(0, chunk))
    if batch <= chunk:
        return first
    out = first.new_empty(batch, *first.shape[1:])
    out[:chunk] = first
    del first
    for start in range(chunk, batch, chunk):
        part = slice(start, start + chunk)
        out[part] = of_samples(part)
    return out
