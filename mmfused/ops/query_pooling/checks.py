"""Input validation for query_pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import check_fractions, check_numbers, check_tensors
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
        dropout_seed=options.dropout_seed,
    )
    _check_x(x)
    _check_dtypes(x, floats)
    _check_shapes(x, queries, weights, floats)
    check_numbers(OP, scale=options.scale, norm_eps=options.norm_eps)
    _check_heads(options.num_heads, queries.shape[-1], weights.w_v.shape[0])
    if options.norm_bias is not None and options.norm_weight is None:
        raise ValueError(
            f"{OP}: norm_bias: got a tensor without norm_weight, expected norm_weight too"
        )
    if form not in FORMS:
        raise ValueError(f"{OP}: form: got {form!r}, expected one of {', '.join(FORMS)}")
    check_fractions(OP, dropout_p=options.dropout_p)
    check_dropout_seed(OP, options.dropout_seed)
    check_padding(OP, x.shape[0], x.shape[1], options.key_padding_mask, options.lengths)


def check_tokens(x: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None) -> None:
    """Check the tokens and their padding. Modules call this before they use the tokens."""
    check_tensors(OP, x=x, key_padding_mask=key_padding_mask, lengths=lengths)
    _check_x(x)
    check_padding(OP, x.shape[0], x.shape[1], key_padding_mask, lengths)


def _check_x(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"{OP}: x: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if x.dim() != 3:
        raise ValueError(f"{OP}: x: got shape {tuple(x.shape)}, expected (batch, tokens, dim)")


def _check_dtypes(x: Tensor, floats: dict[str, Any]) -> None:
    # With x in 16 bits, the weights may be float32.
    allowed = {x.dtype, torch.promote_types(x.dtype, torch.float32)}
    names = " or ".join(sorted(map(str, allowed)))
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(
                f"{OP}: {name}: got dtype {tensor.dtype}, expected {names}, as x has {x.dtype}"
            )


def _check_shapes(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    floats: dict[str, Any],
) -> None:
    batch, _, dim = x.shape
    if queries.dim() not in (2, 3) or (queries.dim() == 3 and queries.shape[0] != batch):
        shape = tuple(queries.shape)
        raise ValueError(f"{OP}: queries: got shape {shape}, expected (L, Dk) or ({batch}, L, Dk)")
    if weights.w_v.dim() != 2:
        raise ValueError(f"{OP}: w_v: got shape {tuple(weights.w_v.shape)}, expected (Dv, {dim})")
    k_dim, v_dim = queries.shape[-1], weights.w_v.shape[0]
    expected = dict(
        w_k=(k_dim, dim),
        w_v=(v_dim, dim),
        b_v=(v_dim,),
        b_k=(k_dim,),
        norm_weight=(dim,),
        norm_bias=(dim,),
    )
    for name, shape in expected.items():
        tensor = floats[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{OP}: {name}: got shape {tuple(tensor.shape)}, expected {shape}")


def _check_heads(num_heads: int, k_dim: int, v_dim: int) -> None:
    if num_heads < 1 or k_dim % num_heads or v_dim % num_heads:
        raise ValueError(
            f"{OP}: num_heads: got {num_heads}, expected a divisor of Dk = {k_dim} and Dv = {v_dim}"
        )
