"""What query pooling refuses, in one sentence each, before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import check_fractions, check_numbers, check_tensors
from .._common import check_dropout_seed, check_padding

FORMS = ("auto", "absorbed", "projected")


def check(
    x,
    queries,
    w_k,
    w_v,
    b_v,
    b_k,
    *,
    num_heads,
    scale,
    key_padding_mask,
    lengths,
    norm_weight,
    norm_bias,
    norm_eps,
    dropout_p,
    dropout_seed,
    form,
) -> None:
    op = "query_pooling"
    floats = dict(
        x=x,
        queries=queries,
        w_k=w_k,
        w_v=w_v,
        b_v=b_v,
        b_k=b_k,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    check_tensors(
        op, **floats, key_padding_mask=key_padding_mask, lengths=lengths, dropout_seed=dropout_seed
    )
    if not x.is_floating_point():
        raise TypeError(
            f"{op}: x: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    takes = {
        x.dtype,
        torch.promote_types(x.dtype, torch.float32),
    }  # master weights may stay in float32
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in takes:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {' or '.join(sorted(map(str, takes)))}, as x has {x.dtype}"
            )
    if x.dim() != 3:
        raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, expected (batch, tokens, dim)")
    if queries.dim() not in (2, 3) or (queries.dim() == 3 and queries.shape[0] != x.shape[0]):
        raise ValueError(
            f"{op}: queries: got shape {tuple(queries.shape)}, expected (L, Dk) or ({x.shape[0]}, L, Dk)"
        )
    if w_v.dim() != 2:
        raise ValueError(f"{op}: w_v: got shape {tuple(w_v.shape)}, expected (Dv, {x.shape[-1]})")
    k_dim, v_dim, dim = queries.shape[-1], w_v.shape[0], x.shape[-1]
    expected = dict(
        w_k=(k_dim, dim),
        w_v=(v_dim, dim),
        b_v=(v_dim,),
        b_k=(k_dim,),
        norm_weight=(dim,),
        norm_bias=(dim,),
    )
    for name, shape in expected.items():
        if floats[name] is not None and floats[name].shape != shape:
            raise ValueError(
                f"{op}: {name}: got shape {tuple(floats[name].shape)}, expected {shape}"
            )
    check_numbers(op, scale=scale, norm_eps=norm_eps)
    if num_heads < 1 or k_dim % num_heads or v_dim % num_heads:
        raise ValueError(
            f"{op}: num_heads is {num_heads}; it must be positive and divide Dk = {k_dim} and Dv = {v_dim}."
        )
    if norm_bias is not None and norm_weight is None:
        raise ValueError(
            f"{op}: norm_bias is given without norm_weight; a folded LayerNorm takes norm_weight, or both."
        )
    if form not in FORMS:
        raise ValueError(f"{op}: form: got {form!r}, expected one of {', '.join(FORMS)}")
    check_fractions(op, dropout_p=dropout_p)
    check_dropout_seed(op, dropout_seed)
    check_padding(op, x.shape[0], x.shape[1], key_padding_mask, lengths)


def check_tokens(x: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None) -> None:
    """What can be told before anything is projected."""
    op = "query_pooling"
    check_tensors(op, x=x, key_padding_mask=key_padding_mask, lengths=lengths)
    if not x.is_floating_point():
        raise TypeError(
            f"{op}: x: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if x.dim() != 3:
        raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, expected (batch, tokens, dim)")
    check_padding(op, x.shape[0], x.shape[1], key_padding_mask, lengths)
