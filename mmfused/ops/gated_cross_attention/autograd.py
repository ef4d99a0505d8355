"""Gated cross-attention: registered operators, and the autograd function around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...children import Called
from ...library import distinct, launching, once_differentiable, operator
from .reference import CrossAttentionOptions, CrossAttentionWeights, SideInput

FIELDS = len(CrossAttentionWeights._fields)
MASKS = 6  # of both sides: padding masks, lengths, presence


def kernel_arguments(
    sides: list[SideInput],
    directions: list[CrossAttentionWeights],
    options: CrossAttentionOptions,
) -> tuple[Any, ...]:
    """Return the arguments of :class:`CrossAttention` for one or two directions."""
    tokens = [_rows_contiguous(side.tokens) for side in sides]
    empty = tokens[0].new_empty(0)
    no_mask = empty.bool()
    norms = []
    for side in sides:
        assert not isinstance(side.norm, Called)
        norms += [part.contiguous() for part in side.norm or (empty, empty)]
    masks = [
        *(_or_empty(side.key_padding_mask, no_mask) for side in sides),
        *(_or_empty(side.lengths, no_mask) for side in sides),
        *(_or_empty(side.present, no_mask) for side in sides),
    ]
    weights = [_or_empty(p, empty) for w in directions for p in w]  # type: ignore[arg-type]
    indicator = "none"
    if options.indicator:
        indicator = "batch" if options.indicator == "batch" else "sample"
    constants = (
        options.num_heads,
        options.gate,
        indicator,
        options.missing,
        options.pre_norm,
        options.norm_eps,
        options.dropout_p,
    )
    flat = (*tokens, *norms, *masks, *weights, options.dropout_seed)
    if torch.compiler.is_compiling():  # `empty` is repeated, and directions may share weights
        flat = distinct(*flat)
    return constants, len(directions), *flat


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or_empty(x: Tensor | None, empty: Tensor) -> Tensor:
    return empty if x is None else x.contiguous()


class CrossAttention(torch.autograd.Function):
    """Compute the outputs of one or two directions with the kernels.

    Saves the inputs and what :class:`mmfused.kernels.gated_cross_attention.results.Saved` lists.
    Backward recomputes the probabilities of the attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: Any,
        directions: int,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        """Run the forward kernels."""
        ctx.options = options
        ctx.directions = directions
        lists = _split(flat, directions)
        seed = flat[-1]
        results = gated_cross_attention_fwd(*lists, *options, seed)
        ctx.save_for_backward(*flat, *results[directions:])
        ctx.inputs = len(flat)
        return tuple(results[:directions])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        """Run the backward kernels."""
        tensors = ctx.saved_tensors  # read only once, as checkpointing requires
        flat, saved = tensors[: ctx.inputs], tensors[ctx.inputs :]
        lists, seed = _split(flat, ctx.directions), flat[-1]
        gradients = gated_cross_attention_bwd(
            [_rows_contiguous(d) for d in d_outs], *lists, list(saved), *ctx.options, seed
        )
        tokens, rest = gradients[:2], gradients[2:]
        norms, weights = rest[:4], rest[4:]
        full = [*tokens, *norms, *[None] * MASKS, *weights, None]
        needed = zip(full, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(g if need else None for g, need in needed)


def _split(flat, directions):
    """Split ``flat`` into tokens (2), norms (4), masks (2 of each kind) and weights."""
    ends = [2, 6, 8, 10, 12, 12 + FIELDS * directions]
    return [list(flat[first:end]) for first, end in zip([0, *ends], ends, strict=False)]


# ---- operators -----------------------------------------------------------------------------------

# In these lists an empty tensor stands for None. Direction i has the queries of side i. `weights`
# holds FIELDS tensors per direction.
_LISTS = (
    "Tensor[] tokens, Tensor[] norms, Tensor[] ignores, Tensor[] lengths, Tensor[] presents,"
    " Tensor[] weights"
)
_OPTIONS = (
    "int num_heads, str gate, str indicator, str missing, bool pre_norm, float norm_eps,"
    " float dropout_p, Tensor? dropout_seed"
)


def _fake_forward(
    tokens,
    norms,
    ignores,
    lengths,
    presents,
    weights,
    num_heads,
    gate,
    indicator,
    missing,
    pre_norm,
    *rest,
):
    from ...kernels.gated_cross_attention.results import empty_results

    masks, directions = [*ignores, *lengths, *presents], len(weights) // FIELDS
    outs, saved = empty_results(tokens, masks, directions, num_heads, gate, pre_norm)
    return [*outs, *saved.flat()]


def _fake_backward(
    d_outs,
    tokens,
    norms,
    ignores,
    lengths,
    presents,
    weights,
    *rest,
):
    inputs = (*tokens, *norms, *weights)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _products(tokens, weights, gate) -> tuple[int, int, int, int]:
    """Return the forward FLOPs of input projections, attention, output projections and gates."""
    directions, (batch, _, dim) = len(weights) // FIELDS, tokens[0]
    rows = batch * sum(x[1] for x in tokens[:directions])
    widths = (3 * dim, 3 * dim) if directions == 2 else (dim, 2 * dim)
    project = sum(2 * batch * x[1] * x[2] * width for x, width in zip(tokens, widths, strict=True))
    attend = 4 * directions * batch * tokens[0][1] * tokens[1][1] * dim
    gates = 0 if gate == "none" else weights[CrossAttentionWeights._fields.index("w_g")][0]
    return project, attend, 2 * rows * dim * dim, 4 * rows * dim * gates


def _forward_flops(
    tokens,
    norms,
    ignores,
    lengths,
    presents,
    weights,
    num_heads,
    gate,
    *rest,
    out_shape,
):
    return sum(_products(tokens, weights, gate))


def _backward_flops(
    d_outs,
    tokens,
    norms,
    ignores,
    lengths,
    presents,
    weights,
    saved,
    num_heads,
    gate,
    *rest,
    out_shape,
):
    """Count each product twice, and what is recomputed again: attention logits, a token's gate."""
    project, attend, output, gates = _products(tokens, weights, gate)
    return 2 * project + attend // 2 * 5 + 2 * output + (3 if gate == "token" else 2) * gates


@operator(f"({_LISTS}, {_OPTIONS}) -> Tensor[]", _fake_forward, _forward_flops)
def gated_cross_attention_fwd(*args: Any) -> list[Tensor]:
    """Launch the kernels of the forward pass."""
    from ...kernels.gated_cross_attention.forward import forward

    with launching(args):
        return forward(*args)


@operator(
    f"(Tensor[] d_outs, {_LISTS}, Tensor[] saved, {_OPTIONS}) -> Tensor[]",
    _fake_backward,
    _backward_flops,
)
def gated_cross_attention_bwd(*args: Any) -> list[Tensor]:
    """Launch the kernels of the backward pass."""
    from ...kernels.gated_cross_attention.backward import backward

    with launching(args):
        return backward(*args)
