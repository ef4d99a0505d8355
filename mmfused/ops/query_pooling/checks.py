"""Input validation for query_pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import check_fractions, check_numbers, check_tensors, check_value
from .._common import check_dropout_seed, check_padding
from .reference import PoolingOptions, PoolingWeights

OP = "query_pooling"
FORMS = ("auto", "absorbed", "projected")


def check(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
    form: str,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` for arguments that no backend accepts."""
    norm = dict(norm_weight=options.norm_weight, norm_bias=options.norm_bias)
    floats = dict(x=x, queries=queries) | weights._asdict() | norm
    check_tensors(
        OP,
        **floats,
        key_padding_mask=options.key_padding_mask,
        lengths=options.lengths,
        cu_seqlens=options.cu_seqlens,
        dropout_seed=options.dropout_seed,
    )
    batch = _check_x(OP, x, options.cu_seqlens)
    _check_dtypes(OP, x, floats)
    _check_shapes(OP, batch, x.shape[-1], queries, weights, floats)
    check_numbers(OP, scale=options.scale, norm_eps=options.norm_eps)
    _check_heads(OP, options.num_heads, queries.shape[-1], weights.w_v.shape[0])
    if options.norm_bias is not None and options.norm_weight is None:
        raise ValueError(
            f"{OP}: norm_bias: got a tensor without norm_weight, expected norm_weight too"
        )
    if form not in FORMS:
        raise ValueError(f"{OP}: form: got {form!r}, expected one of {', '.join(FORMS)}")
    check_fractions(OP, dropout_p=options.dropout_p)
    check_dropout_seed(OP, options.dropout_seed)
    masks = (options.key_padding_mask, options.lengths)
    _check_lengths(OP, x, *masks, options.cu_seqlens, options.max_seqlen)


def check_tokens(
    x: Tensor,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Check the tokens and their padding. Modules call this before they use the tokens."""
    masks = dict(key_padding_mask=key_padding_mask, lengths=lengths)
    check_tensors(OP, x=x, **masks, cu_seqlens=cu_seqlens)
    _check_x(OP, x, cu_seqlens)
    _check_lengths(OP, x, key_padding_mask, lengths, cu_seqlens, max_seqlen)


def check_weights(
    *,
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    num_heads: int,
    scale: float | None,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    chunk: int,
) -> int:
    """Check the arguments of ``pooling_weights``, and return the number of samples."""
    op = "pooling_weights"
    masks = dict(key_padding_mask=key_padding_mask, lengths=lengths)
    floats = dict(x=x, queries=queries, w_k=w_k, norm_weight=norm_weight)
    check_tensors(op, **floats, **masks, cu_seqlens=cu_seqlens)
    batch = _check_x(op, x, cu_seqlens)
    _check_dtypes(op, x, floats)
    _check_queries(op, batch, queries)
    dim = x.shape[-1]
    _check_expected(op, floats, dict(w_k=(queries.shape[-1], dim), norm_weight=(dim,)))
    check_numbers(op, scale=scale, norm_eps=norm_eps)
    if num_heads < 1 or w_k.shape[0] % num_heads:
        raise ValueError(
            f"{op}: num_heads: got {num_heads}, expected a divisor of Dk = {w_k.shape[0]}"
        )
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"{op}: chunk: got {chunk!r}, expected an int of 1 or more")
    _check_lengths(op, x, key_padding_mask, lengths, cu_seqlens, max_seqlen)
    return batch


def _check_lengths(
    op: str,
    x: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(
                f"{op}: max_seqlen: got {max_seqlen} without cu_seqlens, expected cu_seqlens too"
            )
        check_padding(op, x.shape[0], x.shape[1], mask, lengths)
        return
    if mask is not None or lengths is not None:
        other = "lengths" if mask is None else "key_padding_mask"
        raise ValueError(
            f"{op}: cu_seqlens: got offsets and {other}, expected at most one of the two"
        )
    if not isinstance(max_seqlen, int | torch.SymInt) or isinstance(max_seqlen, bool):
        raise TypeError(
            f"{op}: max_seqlen: got a {type(max_seqlen).__name__}, expected an int, as cu_seqlens "
            "is given"
        )
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen}, expected 0 or more")
    check_value(
        cu_seqlens,
        lambda cu: (
            (cu[0] >= 0)
            & (cu[-1] <= x.shape[0])
            & ((cu.diff() >= 0) & (cu.diff() <= max_seqlen)).all()
        ),
        lambda: (
            f"{op}: cu_seqlens: got offsets that are not valid, expected sorted ones from 0 to "
            f"{x.shape[0]}, at most max_seqlen = {max_seqlen} apart"
        ),
    )


def _check_x(op: str, x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Check the tokens, and return the number of samples."""
    if not x.is_floating_point():
        raise TypeError(
            f"{op}: x: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if cu_seqlens is None:
        if x.dim() != 3:
            raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, expected (batch, tokens, dim)")
        return x.shape[0]
    if x.dim() != 2:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)}, expected (tokens, dim), as cu_seqlens is given"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: cu_seqlens: got dtype {cu_seqlens.dtype}, expected torch.int32 or torch.int64"
        )
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(
            f"{op}: cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (batch + 1,)"
        )
    return cu_seqlens.shape[0] - 1


def _check_dtypes(op: str, x: Tensor, floats: dict[str, Any]) -> None:
    # With x in 16 bits, the weights may be float32.
    allowed = {x.dtype, torch.promote_types(x.dtype, torch.float32)}
    names = " or ".join(sorted(map(str, allowed)))
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {names}, as x has {x.dtype}"
            )


def _check_queries(op: str, batch: int, queries: Tensor) -> None:
    if queries.dim() not in (2, 3) or (queries.dim() == 3 and queries.shape[0] != batch):
        shape = tuple(queries.shape)
        raise ValueError(f"{op}: queries: got shape {shape}, expected (L, Dk) or ({batch}, L, Dk)")


def _check_shapes(
    op: str,
    batch: int,
    dim: int,
    queries: Tensor,
    weights: PoolingWeights,
    floats: dict[str, Any],
) -> None:
    _check_queries(op, batch, queries)
    if weights.w_v.dim() != 2:
        raise ValueError(f"{op}: w_v: got shape {tuple(weights.w_v.shape)}, expected (Dv, {dim})")
    k_dim, v_dim = queries.shape[-1], weights.w_v.shape[0]
    expected = dict(
        w_k=(k_dim, dim),
        w_v=(v_dim, dim),
        b_v=(v_dim,),
        b_k=(k_dim,),
        norm_weight=(dim,),
        norm_bias=(dim,),
    )
    _check_expected(op, floats, expected)


def _check_expected(op: str, floats: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        tensor = floats[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {shape}")


def _check_heads(op: str, num_heads: int, k_dim: int, v_dim: int) -> None:
    if num_heads < 1 or k_dim % num_heads or v_dim % num_heads:
        raise ValueError(
            f"{op}: num_heads: got {num_heads}, expected a divisor of Dk = {k_dim} and Dv = {v_dim}"
        )
