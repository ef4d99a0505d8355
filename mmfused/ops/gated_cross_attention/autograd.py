"""Gated cross-attention: registered operators, and the autograd function around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...children import Called
from ...library import distinct, launching, once_differentiable, operator
from .reference import CrossAttentionOptions, CrossAttentionWeights, Side, indicator_of

FIELDS = len(CrossAttentionWeights._fields)


def kernel_arguments(
    sides: list[Side],
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
    ignores = [no_mask if side.ignore is None else side.ignore.contiguous() for side in sides]
    absents = [no_mask if side.absent is None else side.absent for side in sides]
    weights = [empty if p is None else p.contiguous() for w in directions for p in w]  # type: ignore[union-attr]
    flags = _flags(sides, len(directions), options)
    constants = (
        options.num_heads,
        options.gate,
        options.missing,
        options.pre_norm,
        options.norm_eps,
        options.dropout_p,
    )
    flat = (*tokens, *norms, *ignores, *absents, *weights, *flags, options.dropout_seed)
    if torch.compiler.is_compiling():  # `empty` is repeated, and directions may share weights
        flat = distinct(*flat)
    return constants, len(directions), *flat


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _flags(sides: list[Side], directions: int, options: CrossAttentionOptions) -> list[Tensor]:
    """Return the indicator (B,) of each direction's context; without indicator, empty tensors."""
    like = sides[0].tokens.new_empty(0, dtype=torch.float32)
    if not options.indicator:
        return [like] * directions
    batch = sides[0].tokens.shape[0]
    contexts = (sides[1], sides[0])[:directions]
    return [indicator_of(context, batch, options.indicator, like) for context in contexts]


class CrossAttention(torch.autograd.Function):
    """Compute the outputs of one or two directions with the kernels.

    Saves the inputs, the projections, mean and 1 / standard deviation for the LayerNorms (moments),
    the logsumexp of each row of logits divided by the scale (lse), and the attention output before
    W_o (attended) and after W_o (attn_out). Backward recomputes the probabilities and the gates.
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
            [d.contiguous() for d in d_outs], *lists, list(saved), *ctx.options, seed
        )
        tokens, rest = gradients[:2], gradients[2:]
        norms, weights = rest[:4], rest[4:]
        full = [*tokens, *norms, *[None] * 4, *weights, *[None] * ctx.directions, None]
        needed = zip(full, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(g if need else None for g, need in needed)


def _split(flat, directions):
    """Split ``flat`` into tokens (2), norms (4), ignores (2), absents (2), weights and flags."""
    ends = [2, 6, 8, 10, 10 + FIELDS * directions, 10 + (FIELDS + 1) * directions]
    return [list(flat[first:end]) for first, end in zip([0, *ends], ends, strict=False)]


# ---- operators -----------------------------------------------------------------------------------

# In these lists an empty tensor stands for None. Direction i has the queries of side i. `weights`
# holds FIELDS tensors per direction.
_LISTS = (
    "Tensor[] tokens, Tensor[] norms, Tensor[] ignores, Tensor[] absents, Tensor[] weights,"
    " Tensor[] flags"
)
_OPTIONS = (
    "int num_heads, str gate, str missing, bool pre_norm, float norm_eps, float dropout_p,"
    " Tensor? dropout_seed"
)


def _widths(directions: int, dim: int) -> tuple[int, int]:
    """Return the width of the projections of each side.

    With one direction, side 0 has queries, and side 1 has keys and values. With two directions,
    each side has queries, keys and values.
    """
    return (3 * dim, 3 * dim) if directions == 2 else (dim, 2 * dim)


def _fake_forward(
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
    num_heads,
    gate,
    missing,
    pre_norm,
    norm_eps,
    dropout_p,
    seed,
):
    directions = len(weights) // FIELDS
    dim = tokens[0].shape[-1]
    queries_from = tokens[:directions]
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in queries_from]
    projected = [
        x.new_empty(*x.shape[:2], width)
        for x, width in zip(tokens, _widths(directions, dim), strict=True)
    ]
    moments = [x.new_empty(2, *x.shape[:2], dtype=torch.float32) for x in tokens]
    attended = [x.new_empty(x.shape) for x in queries_from]
    lse = [
        x.new_empty(x.shape[0], num_heads, x.shape[1], dtype=torch.float32) for x in queries_from
    ]
    attn_out = [x.new_empty(x.shape) for x in queries_from]
    return [*outs, *projected, *moments, *attended, *lse, *attn_out]


def _fake_backward(
    d_outs,
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
    saved,
    *options,
):
    inputs = (*tokens, *norms, *weights)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _products(tokens, weights, gate) -> tuple[int, int, int, int]:
    """Return the forward FLOPs of input projections, attention, output projections and gates."""
    directions, (batch, _, dim) = len(weights) // FIELDS, tokens[0]
    rows = batch * sum(x[1] for x in tokens[:directions])
    widths = _widths(directions, dim)
    project = sum(2 * batch * x[1] * x[2] * width for x, width in zip(tokens, widths, strict=True))
    attend = 4 * directions * batch * tokens[0][1] * tokens[1][1] * dim
    gates = 0 if gate == "none" else weights[CrossAttentionWeights._fields.index("w_g")][0]
    return project, attend, 2 * rows * dim * dim, 4 * rows * dim * gates


def _forward_flops(
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
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
    absents,
    weights,
    flags,
    saved,
    num_heads,
    gate,
    *rest,
    out_shape,
):
    """Count each product twice, and a third time if it is recomputed (attention logits, gates)."""
    project, attend, output, gates = _products(tokens, weights, gate)
    return 2 * project + attend // 2 * 5 + 2 * output + 3 * gates


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
