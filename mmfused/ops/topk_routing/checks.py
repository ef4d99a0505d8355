"""Input validation for topk_routing."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ...library import check_fractions, check_tensors, check_value
from .arguments import Balance, Inputs, Options, Score

BALANCES: tuple[Balance, ...] = get_args(Balance)
SCORES: tuple[Score, ...] = get_args(Score)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_router(
    op: str,
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on a bad x, router weight or router bias."""
    check_tensors(op, x=x, router_weight=router_weight, router_bias=router_bias)
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)} and dtype {x.dtype}, "
            "expected floats (tokens, dim)"
        )
    # With x in 16 bits, the router may be float32.
    dtypes = {x.dtype, torch.promote_types(x.dtype, torch.float32)}
    expected = " or ".join(sorted(map(str, dtypes)))
    for name, tensor in (("router_weight", router_weight), ("router_bias", router_bias)):
        if tensor is not None and tensor.dtype not in dtypes:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {expected}, as x has {x.dtype}"
            )
    if router_weight.dim() != 2 or router_weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: router_weight: got shape {tuple(router_weight.shape)}, "
            f"expected (experts, {x.shape[1]})"
        )
    if router_bias is not None and router_bias.shape != router_weight.shape[:1]:
        raise ValueError(
            f"{op}: router_bias: got shape {tuple(router_bias.shape)}, "
            f"expected ({len(router_weight)},)"
        )


def check_arguments(
    op: str,
    name: str,
    source: Tensor,
    columns: Tensor,
    inputs: Inputs,
    options: Options,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on bad input.

    Args:
        op: name of the function in error messages.
        name: name of ``source`` in error messages.
        source: tensor with one row per token.
        columns: tensor with one column per expert.
        inputs, options: the other arguments of the function.
    """
    tensors = dict(zip(Inputs._fields, inputs, strict=True))
    check_tensors(op, **{name: source}, **tensors)
    if source.dim() != 2 or source.dtype not in FLOATS:
        raise ValueError(
            f"{op}: {name}: got shape {tuple(source.shape)} and dtype {source.dtype}, "
            "expected floats (tokens, experts)"
        )
    tokens, experts = source.shape[0], columns.shape[1]
    _check_options(op, experts, options)
    _check_selection_bias(op, experts, inputs.selection_bias)
    check_mask(op, inputs.token_padding_mask, tokens)
    _check_segments(op, tokens, inputs.segments, options.num_segments)
    _check_available(op, experts, inputs.available, options)
    indices = inputs.indices
    if indices is not None:
        if indices.shape != (tokens, options.k):
            raise ValueError(
                f"{op}: indices: got shape {tuple(indices.shape)}, expected {(tokens, options.k)}"
            )
        check_indices(op, indices, experts)
    check_fractions(op, jitter=options.jitter)
    seed = inputs.jitter_seed
    if seed is not None and (seed.dtype != torch.int64 or seed.dim()):
        raise TypeError(
            f"{op}: jitter_seed: got dtype {seed.dtype} and shape {tuple(seed.shape)}, "
            "expected a torch.int64 scalar"
        )


def _check_options(op: str, experts: int, options: Options) -> None:
    k = options.k
    if not 1 <= k <= experts:
        raise ValueError(f"{op}: k: got {k}, expected 1 to {experts}, the number of experts")
    for name, value, choices in (
        ("score", options.score, SCORES),
        ("balance", options.balance, BALANCES),
    ):
        if value not in choices:
            raise ValueError(f"{op}: {name}: got {value!r}, expected one of {', '.join(choices)}")


def _check_selection_bias(op: str, experts: int, bias: Tensor | None) -> None:
    if bias is None:
        return
    if bias.shape != (experts,):
        raise ValueError(
            f"{op}: selection_bias: got shape {tuple(bias.shape)}, expected ({experts},)"
        )
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: selection_bias: got dtype {bias.dtype}, expected torch.float32 or torch.float64"
        )


def _check_segments(
    op: str,
    tokens: int,
    segments: Tensor | None,
    num_segments: int,
) -> None:
    if num_segments < 1:
        raise ValueError(f"{op}: num_segments: got {num_segments}, expected at least 1")
    if segments is None:
        if num_segments > 1:
            raise ValueError(
                f"{op}: segments: got None with num_segments {num_segments}, "
                "expected the segment of each token"
            )
        return
    if segments.dtype != torch.int64:
        raise TypeError(f"{op}: segments: got dtype {segments.dtype}, expected torch.int64")
    if segments.shape != (tokens,):
        raise ValueError(f"{op}: segments: got shape {tuple(segments.shape)}, expected ({tokens},)")
    check_value(
        segments,
        lambda x: ((x >= 0) & (x < num_segments)).all(),
        f"{op}: segments: got a value outside [0, {num_segments}), expected segment numbers",
    )


def _check_available(
    op: str,
    experts: int,
    available: Tensor | None,
    options: Options,
) -> None:
    if available is None:
        return
    if available.dtype != torch.bool:
        raise TypeError(
            f"{op}: available: got dtype {available.dtype}, expected torch.bool, True = may be used"
        )
    shape = (options.num_segments, experts)
    if available.shape != shape:
        raise ValueError(f"{op}: available: got shape {tuple(available.shape)}, expected {shape}")
    check_value(
        available,
        lambda x: (x.sum(1) >= options.k).all(),
        f"{op}: available: got a segment with too few experts, expected at least k = {options.k}",
    )


def check_indices(op: str, indices: Tensor, num_experts: int) -> None:
    """Raise unless ``indices`` are int64 and from 0 to num_experts - 1."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices: got dtype {indices.dtype}, expected torch.int64")
    check_value(
        indices,
        lambda x: ((x >= 0) & (x < num_experts)).all(),
        f"{op}: indices: got a value outside [0, {num_experts}), expected expert numbers",
    )


def check_mask(op: str, mask: Tensor | None, tokens: int) -> None:
    """Raise unless ``mask`` is None or a bool tensor (tokens,)."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: token_padding_mask: got dtype {mask.dtype}, "
            "expected torch.bool, True = ignore the token"
        )
    if mask.shape != (tokens,):
        raise ValueError(
            f"{op}: token_padding_mask: got shape {tuple(mask.shape)}, expected ({tokens},)"
        )
