"""Small calls that launch every kernel of query_pooling, for ``tools/sanitize.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import mmfused
from mmfused.tools.sanitize_launches import DEVICE, FLOAT, HALF, backward, choose, randn, seed


def launches() -> Iterator[Callable[[], None]]:
    yield lambda: pool(3, 70, 36, 3, 2, padding="mask", norm=True, dropout=0.2)
    yield lambda: pool(3, 37, 64, 2, 1, need_dx=False)
    yield lambda: pool(5, 21, 36, 9, 2, padding="mask", norm=True, dropout=0.2)
    yield lambda: pool(2, 70, 100, 9, 2, padding="lengths", per_sample=True, dropout=0.2)
    yield lambda: pool(2, 21, 1100, 3, 1, padding="mask", norm=True, strided=True)
    yield lambda: pool(2, 21, 1100, 3, 1, dropout=0.2)
    yield lambda: pool(3, 33, 768, 2, 1, padding="mask", dropout=0.2)
    yield lambda: pool(1, 33, 832, 1, 12, norm=True)
    yield lambda: pool(3, 70, 36, 5, 1, padding="lengths", norm=True, dtype=FLOAT)
    yield lambda: pool(3, 20, 64, 3, 1, padding="mask", norm=True, dropout=0.2)
    yield lambda: pool(2, 32, 64, 5, 1, padding="lengths", need_dx=False, lse=True)
    yield lambda: pool(2, 37, 64, 18, 2, dropout=0.2, lse=True)
    yield lambda: pool(1, 300, 16, 33, 1, per_sample=True)
    yield lambda: pool(3, 70, 36, 3, 2, padding="packed", norm=True, dropout=0.2, lse=True)
    yield lambda: pool(3, 70, 100, 9, 2, padding="packed", norm=True, lse=True)
    yield lambda: pool(2, 21, 1100, 3, 1, padding="packed", norm=True, dropout=0.2)


def pool(
    batch,
    length,
    dim,
    queries,
    heads,
    *,
    padding=None,
    norm=False,
    per_sample=False,
    dropout=0.0,
    need_dx=True,
    strided=False,
    lse=False,
    dtype=HALF,
) -> None:
    """Call query pooling forward and backward. With padding, the first sample has no tokens.

    ``lse``: whether the log-sum-exp is returned and has a gradient.
    """
    x = (
        randn(length, batch, dim, dtype=dtype).transpose(0, 1)
        if strided
        else randn(batch, length, dim, dtype=dtype)
    )
    x = x.detach().requires_grad_(need_dx)
    q = randn(*([batch] if per_sample else []), queries, 8 * heads, dtype=dtype)
    w_k, w_v = (randn(8 * heads, dim, dtype=dtype, std=dim**-0.5) for _ in range(2))
    weight, bias = (randn(dim, dtype=dtype), randn(dim, dtype=dtype)) if norm else (None, None)
    masks = {}
    if padding == "mask":
        masks["key_padding_mask"] = choose(0.4, batch, length)
        masks["key_padding_mask"][0] = True
    if padding == "lengths":
        masks["lengths"] = torch.tensor([0, *[length - 5] * (batch - 1)], device=DEVICE)
    if padding == "packed":  # rows of x are left over
        x = x.detach().flatten(0, 1).requires_grad_(need_dx)
        offsets = torch.tensor([2, *[2 + i * (length - 5) for i in range(batch)]], device=DEVICE)
        masks = dict(cu_seqlens=offsets.int(), max_seqlen=length)
    out = mmfused.query_pooling(
        x,
        q,
        w_k,
        w_v,
        num_heads=heads,
        norm_weight=weight,
        norm_bias=bias,
        dropout_p=dropout,
        dropout_seed=seed(),
        return_lse=lse,
        **masks,
    )
    backward(out, x, q, w_k, w_v, weight, bias)
