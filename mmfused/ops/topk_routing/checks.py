"""What routing refuses, in one sentence each, before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import check_fractions, check_tensors, check_value
from .order import check_indices, check_mask

BALANCES = ("switch", "gshard", "mse")
SCORES = ("softmax", "sigmoid")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_router(op: str, x: Tensor, router_weight: Tensor, router_bias: Tensor | None) -> None:
    check_tensors(op, x=x, router_weight=router_weight, router_bias=router_bias)
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)} and dtype {x.dtype}, expected floats (tokens, dim)"
        )
    takes = {x.dtype, torch.promote_types(x.dtype, torch.float32)}  # the router may stay in float32
    for name, tensor in (("router_weight", router_weight), ("router_bias", router_bias)):
        if tensor is not None and tensor.dtype not in takes:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {' or '.join(sorted(map(str, takes)))}, as x has {x.dtype}"
            )
    if router_weight.dim() != 2 or router_weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: router_weight: got shape {tuple(router_weight.shape)}, expected (experts, {x.shape[1]})"
        )
    if router_bias is not None and router_bias.shape != router_weight.shape[:1]:
        raise ValueError(
            f"{op}: router_bias: got shape {tuple(router_bias.shape)}, expected ({len(router_weight)},)"
        )


def check(
    op: str,
    name: str,
    source: Tensor,
    columns: Tensor,
    k: int,
    *,
    score="softmax",
    renormalize=True,
    selection_bias=None,
    token_padding_mask=None,
    segments=None,
    num_segments=1,
    available=None,
    balance="switch",
    indices=None,
    jitter=0.0,
    jitter_seed=None,
) -> None:
    """``source`` has a row for each token, ``columns`` a column for each expert."""
    tensors = dict(
        selection_bias=selection_bias,
        token_padding_mask=token_padding_mask,
        segments=segments,
        available=available,
    )
    check_tensors(op, **{name: source}, **tensors, indices=indices, jitter_seed=jitter_seed)
    if source.dim() != 2 or source.dtype not in FLOATS:
        raise ValueError(
            f"{op}: {name}: got shape {tuple(source.shape)} and dtype {source.dtype}, expected floats (tokens, experts)"
        )
    tokens, experts = source.shape[0], columns.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"{op}: k: got {k}, expected 1 to {experts}, the number of experts")
    for option, value, choices in (("score", score, SCORES), ("balance", balance, BALANCES)):
        if value not in choices:
            raise ValueError(f"{op}: {option}: got {value!r}, expected one of {', '.join(choices)}")
    if selection_bias is not None and selection_bias.shape != (experts,):
        raise ValueError(
            f"{op}: selection_bias: got shape {tuple(selection_bias.shape)}, expected ({experts},)"
        )
    if selection_bias is not None and selection_bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: selection_bias: got dtype {selection_bias.dtype}, expected torch.float32"
        )
    check_mask(op, token_padding_mask, tokens)
    _check_segments(op, tokens, experts, k, segments, num_segments, available)
    if indices is not None:
        if indices.shape != (tokens, k):
            raise ValueError(
                f"{op}: indices: got shape {tuple(indices.shape)}, expected {(tokens, k)}"
            )
        check_indices(op, indices, experts)
    check_fractions(op, jitter=jitter)
    if jitter_seed is not None and (jitter_seed.dtype != torch.int64 or jitter_seed.dim()):
        raise TypeError(
            f"{op}: jitter_seed: got dtype {jitter_seed.dtype} and shape {tuple(jitter_seed.shape)}, expected a torch.int64 scalar"
        )


def _check_segments(op, tokens, experts, k, segments, num_segments, available) -> None:
    if num_segments < 1:
        raise ValueError(f"{op}: num_segments: got {num_segments}, expected at least 1")
    if segments is None and num_segments > 1:
        raise ValueError(
            f"{op}: num_segments is {num_segments} and segments: got None, expected the segment of each token"
        )
    if segments is not None:
        if segments.dtype != torch.int64:
            raise TypeError(f"{op}: segments: got dtype {segments.dtype}, expected torch.int64")
        if segments.shape != (tokens,):
            raise ValueError(
                f"{op}: segments: got shape {tuple(segments.shape)}, expected ({tokens},)"
            )
        check_value(
            lambda: ((segments >= 0) & (segments < num_segments)).all(),
            f"{op}: segments holds a value outside [0, {num_segments}), the number of segments.",
        )
    if available is not None:
        if available.dtype != torch.bool:
            raise TypeError(
                f"{op}: available: got dtype {available.dtype}, expected torch.bool, True = may be used"
            )
        if available.shape != (num_segments, experts):
            raise ValueError(
                f"{op}: available: got shape {tuple(available.shape)}, expected {(num_segments, experts)}"
            )
        check_value(
            lambda: (available.sum(1) >= k).all(),
            f"{op}: available has a segment with fewer than k = {k} experts.",
        )
