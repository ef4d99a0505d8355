"""The kernels of routing as registered operators, and the autograd function around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...extension import load
from ...flops import no_products
from ...library import Router, define, launching, once_differentiable, operator
from .arguments import Options

# ---- operators -----------------------------------------------------------------------------------


class _Forward(NamedTuple):
    """The arguments of a forward operator, in the order of its schema."""

    source: Tensor  # logits (T, E), or x (T, D) if there is a router_weight
    router_weight: Tensor | None  # (E, D)
    router_bias: Tensor | None  # (E,)
    k: int
    sigmoid: bool
    renormalize: bool
    selection_bias: Tensor | None  # (E,)
    mask: Tensor | None  # (T,)
    segments: Tensor | None  # (T,)
    num_segments: int
    available: Tensor | None  # (S, E)
    balance: str
    indices: Tensor | None  # (T, k)
    jitter: float
    jitter_seed: Tensor | None  # ()


class _Outputs(NamedTuple):
    """The outputs of a forward operator."""

    logits: Tensor  # (T, E) float32; (0,) if the source is the logits
    indices: Tensor  # (T, k) int64; (0,) if the indices were given
    weights: Tensor  # (T, k)
    counts: Tensor  # (S, E) int64
    losses: Tensor  # (3,): balance, z, entropy
    order: Tensor  # (T*k,) int32
    position: Tensor  # (T*k,) int32
    offsets: Tensor  # (E+1,) int32
    tiles: Tensor  # (T*k // 16 + E, 2) int32
    coefficients: (
        Tensor  # (S*E + 1,): derivatives of the balance loss; 1 / number of unmasked tokens
    )


class _Backward(NamedTuple):
    """The arguments of a backward operator, in the order of its schema."""

    d_weights: Tensor | None  # (T, k)
    d_balance: Tensor | None  # ()
    d_z: Tensor | None  # ()
    d_entropy: Tensor | None  # ()
    logits: Tensor
    indices: Tensor
    weights: Tensor
    coefficients: Tensor
    sigmoid: bool
    renormalize: bool
    mask: Tensor | None
    segments: Tensor | None
    num_segments: int
    available: Tensor | None
    balance: str
    jitter: float
    jitter_seed: Tensor | None


_FORWARD = (
    "(Tensor source, Tensor? router_weight, Tensor? router_bias, int k, bool sigmoid,"
    " bool renormalize, Tensor? selection_bias, Tensor? mask, Tensor? segments, int num_segments,"
    " Tensor? available, str balance, Tensor? indices, float jitter, Tensor? jitter_seed)"
    " -> (Tensor logits, Tensor indices, Tensor weights, Tensor counts, Tensor losses,"
    " Tensor order, Tensor position, Tensor offsets, Tensor tiles, Tensor coefficients)"
)
_BACKWARD = (
    "(Tensor? d_weights, Tensor? d_balance, Tensor? d_z, Tensor? d_entropy, Tensor logits,"
    " Tensor indices, Tensor weights, Tensor coefficients, bool sigmoid, bool renormalize,"
    " Tensor? mask, Tensor? segments, int num_segments, Tensor? available, str balance,"
    " float jitter, Tensor? jitter_seed) -> Tensor d_logits"
)
_INPUT_BACKWARD = (
    "(Tensor d_logits, Tensor x, Tensor router_weight, Tensor? mask, bool need_dx, bool need_dw)"
    " -> (Tensor dx, Tensor dw)"
)


def _forward_shapes(*args: Any) -> tuple[Tensor, ...]:
    call = _Forward(*args)
    source, weight = call.source, call.router_weight
    tokens = source.shape[0]
    experts = source.shape[-1] if weight is None else weight.shape[0]
    rows = tokens * call.k

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return source.new_empty(shape, dtype=dtype)

    logits_shape = (0,) if weight is None else (tokens, experts)
    indices_shape = (tokens, call.k) if call.indices is None else (0,)
    return _Outputs(
        logits=empty(*logits_shape),
        indices=empty(*indices_shape, dtype=torch.int64),
        weights=empty(tokens, call.k),
        counts=empty(call.num_segments, experts, dtype=torch.int64),
        losses=empty(3),
        order=empty(rows, dtype=torch.int32),
        position=empty(rows, dtype=torch.int32),
        offsets=empty(experts + 1, dtype=torch.int32),
        tiles=empty(rows // 16 + experts, 2, dtype=torch.int32),
        coefficients=empty(call.num_segments * experts + 1),
    )


def _backward_shape(*args: Any) -> Tensor:
    return torch.empty_like(_Backward(*args).logits, memory_format=torch.contiguous_format)


def _input_backward_shapes(
    d_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, router_weight.new_empty(router_weight.shape if need_dw else (0,))


def _forward_flops(
    source: Any,
    router_weight: Any,
    *rest: Any,
    out_shape: object,
) -> int:
    return 0 if router_weight is None else 2 * source[0] * source[1] * router_weight[0]


def _input_backward_flops(
    d_logits: Any,
    x: Any,
    router_weight: Any,
    mask: Any,
    need_dx: bool,
    need_dw: bool,
    *,
    out_shape: object,
) -> int:
    return 2 * x[0] * x[1] * router_weight[0] * (need_dx + need_dw)


@operator(_FORWARD, _forward_shapes, _forward_flops)
def topk_routing_fwd(*args: Any) -> tuple[Tensor, ...]:
    """Launch the kernels of the forward pass."""
    from ...kernels.topk_routing.forward import forward

    with launching(args):
        return forward(*args)


@operator(_BACKWARD, _backward_shape, no_products)
def topk_routing_bwd(*args: Any) -> Tensor:
    """Launch the kernel for the gradient of the logits."""
    from ...kernels.topk_routing.backward import backward

    with launching(args):
        return backward(*args)


@operator(_INPUT_BACKWARD, _input_backward_shapes, _input_backward_flops)
def topk_routing_input_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    """Launch the kernels for the gradients of x and of the router's weight."""
    from ...kernels.topk_routing.router_gradients import input_backward

    with launching(args):
        return input_backward(*args)


# Implemented in csrc/. These operators accept logits only, not x and a router_weight.
define("topk_routing_cuda_fwd", _FORWARD, _forward_shapes, no_products)
define("topk_routing_cuda_bwd", _BACKWARD, _backward_shape, no_products)


# ---- autograd ------------------------------------------------------------------------------------


class RoutingFused(torch.autograd.Function):
    """Compute the fields of a Routing with the kernels, from logits or from x and a router_weight.

    If ``indices`` are given, the returned indices have shape (0,). Saves all inputs except
    the two biases, and the logits, indices, weights and coefficients. The probabilities are not
    saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        router_weight: Tensor | None,
        router_bias: Tensor | None,
        selection_bias: Tensor | None,
        mask: Tensor | None,
        segments: Tensor | None,
        available: Tensor | None,
        indices: Tensor | None,
        jitter_seed: Tensor | None,
        options: Options,
        router: Router,
    ) -> tuple[Tensor, ...]:
        """Launch the forward operator of ``router``."""
        ctx.set_materialize_grads(False)
        ctx.options, ctx.operators = options, _operators(router)
        ctx.bias_dtype = None if router_bias is None else router_bias.dtype
        call = _Forward(
            source=source,
            router_weight=router_weight,
            router_bias=router_bias,
            k=options.k,
            sigmoid=options.score == "sigmoid",
            renormalize=options.renormalizes,
            selection_bias=selection_bias,
            mask=mask,
            segments=segments,
            num_segments=options.num_segments,
            available=available,
            balance=options.balance,
            indices=indices,
            jitter=options.jitter,
            jitter_seed=jitter_seed,
        )
        out = _Outputs(*ctx.operators[0](*call))
        ctx.save_for_backward(
            None if router_weight is None else source,
            router_weight,
            source if router_weight is None else out.logits,
            out.indices if indices is None else indices,
            out.weights,
            out.coefficients,
            mask,
            segments,
            available,
            jitter_seed,
        )
        order = (out.order, out.position, out.offsets, out.tiles)
        ctx.mark_non_differentiable(out.indices, out.counts, *order)
        return out.indices, out.weights, out.counts, *out.losses.unbind(0), *order

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_indices: None,
        d_weights: Tensor | None,
        d_counts: None,
        d_balance: Tensor | None,
        d_z: Tensor | None,
        d_entropy: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        """Launch the kernel for d_logits and, if x was given, the kernels for dx and dw."""
        x, router_weight, logits, indices, weights, coefficients, *rest = ctx.saved_tensors
        mask, segments, available, jitter_seed = rest
        options = ctx.options
        call = _Backward(
            d_weights=None if d_weights is None else d_weights.contiguous(),
            d_balance=d_balance,
            d_z=d_z,
            d_entropy=d_entropy,
            logits=logits,
            indices=indices,
            weights=weights,
            coefficients=coefficients,
            sigmoid=options.score == "sigmoid",
            renormalize=options.renormalizes,
            mask=mask,
            segments=segments,
            num_segments=options.num_segments,
            available=available,
            balance=options.balance,
            jitter=options.jitter,
            jitter_seed=jitter_seed,
        )
        d_logits = ctx.operators[1](*call)
        if x is None:
            return d_logits, *[None] * 10
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        dx, dw = topk_routing_input_bwd(d_logits, x, router_weight, mask, need_dx, need_dw)
        db = d_logits.sum(0).to(ctx.bias_dtype) if need_db else None
        return dx if need_dx else None, dw if need_dw else None, db, *[None] * 8


def _operators(router: Router) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """Return the forward and backward operators of a router."""
    if router == "cuda":
        load()
        return torch.ops.mmfused.topk_routing_cuda_fwd, torch.ops.mmfused.topk_routing_cuda_bwd
    return topk_routing_fwd, topk_routing_bwd
