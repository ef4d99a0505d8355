"""The kernels of experts as registered operators, and the autograd functions around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...library import launching, once_differentiable, operator
from .checks import Activation

# ---- operators -----------------------------------------------------------------------------------
#
# combine_weights is Routing.weights (T, k) in float32. order, position, offsets and tiles are the
# fields of the Routing with these names. FLOP formulas get shapes instead of tensors.


class _Linear(NamedTuple):
    """The arguments of grouped_linear_fwd, in the order of its schema."""

    x: Any  # (T, I), or (T*k, I) without gather
    weight: Any  # (E, O, I)
    bias: Any  # (E, O) or None
    combine_weights: Any  # None without combine
    order: Any
    position: Any
    offsets: Any
    tiles: Any
    k: int
    gather: bool


class _LinearNeeds(NamedTuple):
    """The last arguments of grouped_linear_bwd: which gradients are needed."""

    dx: bool
    dw: bool
    db: bool


class _MLP(NamedTuple):
    """The arguments of grouped_mlp_fwd, in the order of its schema."""

    x: Any  # (T, D)
    w_up: Any  # (E, I, D); packed (E, 2I, D)
    w_gate: Any  # (E, I, D) or None
    w_down: Any  # (E, Dout, I)
    b_up: Any  # (E, I) or None
    b_down: Any  # (E, Dout) or None
    combine_weights: Any
    order: Any
    position: Any
    offsets: Any
    tiles: Any
    activation: str
    packed: bool


class _MLPBackward(NamedTuple):
    """The arguments of grouped_mlp_bwd, in the order of its schema."""

    d_out: Any  # (T, Dout)
    x: Any
    hidden: Any  # (1 or 2, T*k, I), the pre-activations, the gate's first
    w_up: Any
    w_gate: Any
    w_down: Any
    b_down: Any
    combine_weights: Any
    order: Any
    position: Any
    offsets: Any
    tiles: Any
    activation: str
    packed: bool
    need_dx: bool
    need_dw: bool
    need_db_up: bool


_ROUTING = "Tensor combine_weights, Tensor order, Tensor position, Tensor offsets, Tensor tiles"
_LINEAR = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? combine_weights, Tensor order,"
    " Tensor position, Tensor offsets, Tensor tiles, int k, bool gather"
)


def _linear_arguments(args: tuple[Any, ...]) -> tuple[_Linear, _LinearNeeds]:
    """Split the arguments of grouped_linear_bwd that follow d_out."""
    size = len(_Linear._fields)
    return _Linear(*args[:size]), _LinearNeeds(*args[size:])


def _linear_shape(*args: Any) -> Tensor:
    call = _Linear(*args)
    combines = call.combine_weights is not None
    rows = call.combine_weights.shape[0] if combines else call.order.shape[0]
    return call.x.new_empty(rows, call.weight.shape[1])


def _linear_backward_shapes(d_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, need = _linear_arguments(args)
    x, weight, combine_weights = call.x, call.weight, call.combine_weights
    d_combine = (0,) if combine_weights is None else combine_weights.shape
    return (
        x.new_empty(x.shape if need.dx else (0,)),
        weight.new_empty(weight.shape if need.dw else (0,)),
        weight.new_empty(weight.shape[:2] if need.db else (0,)),
        x.new_empty(d_combine, dtype=torch.float32),
    )


def _mlp_shapes(*args: Any) -> tuple[Tensor, Tensor]:
    call = _MLP(*args)
    x, w_down, rows = call.x, call.w_down, call.order.shape[0]
    hidden = x.new_empty(2 if call.activation == "swiglu" else 1, rows, w_down.shape[2])
    return x.new_empty(x.shape[0], w_down.shape[1]), hidden


def _mlp_backward_shapes(*args: Any) -> tuple[Tensor, ...]:
    call = _MLPBackward(*args)
    x, w_down = call.x, call.w_down

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(tensor.shape if needed and tensor is not None else (0,))

    db_up_shape = (len(w_down), w_down.shape[2]) if call.need_db_up else (0,)
    return (
        like(x, call.need_dx),
        like(call.w_up, call.need_dw),
        like(call.w_gate, call.need_dw),
        like(w_down, call.need_dw),
        x.new_empty(db_up_shape),
        like(call.b_down, call.need_dw),
        torch.empty_like(call.combine_weights),
    )


def _linear_flops(*args: Any, out_shape: object) -> int:
    call = _Linear(*args)
    return 2 * call.order[0] * call.weight[1] * call.weight[2]


def _linear_backward_flops(d_out: Any, *args: Any, out_shape: object) -> int:
    """Count one product that serves dx and the gradient of combine_weights, and one for dw."""
    call, need = _linear_arguments(args)
    products = (need.dx or call.combine_weights is not None) + need.dw
    return _linear_flops(*call, out_shape=None) * products


def _mlp_products(call: _MLP | _MLPBackward) -> tuple[int, int]:
    """Return the forward FLOPs of the first layer, including the gate, and of the second layer."""
    _, out, width = call.w_down
    matrices = 2 if call.activation == "swiglu" else 1
    rows = call.order[0]
    return 2 * matrices * rows * call.x[1] * width, 2 * rows * width * out


def _mlp_flops(*args: Any, out_shape: object) -> int:
    return sum(_mlp_products(_MLP(*args)))


def _mlp_backward_flops(*args: Any, out_shape: object) -> int:
    """Count the products; dA is always computed, for the gradient of combine_weights."""
    call = _MLPBackward(*args)
    up, down = _mlp_products(call)
    return up * (call.need_dx + call.need_dw) + down * (1 + call.need_dw)


@operator(
    f"({_LINEAR}) -> Tensor out",
    _linear_shape,
    _linear_flops,
)
def grouped_linear_fwd(*args: Any) -> Tensor:
    """Launch the kernel of a linear layer and, with combine_weights, the kernel that sums rows."""
    from ...kernels.grouped_mlp.forward import linear_forward

    with launching(args):
        return linear_forward(*args)


@operator(
    f"(Tensor d_out, {_LINEAR}, bool need_dx, bool need_dw, bool need_db)"
    " -> (Tensor dx, Tensor dw, Tensor db, Tensor d_combine)",
    _linear_backward_shapes,
    _linear_backward_flops,
)
def grouped_linear_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Launch the kernels of a linear layer's backward pass."""
    from ...kernels.grouped_mlp.backward import linear_backward

    with launching(args):
        return linear_backward(*args)


@operator(
    "(Tensor x, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor? b_up, Tensor? b_down,"
    f" {_ROUTING}, str activation, bool packed) -> (Tensor out, Tensor hidden)",
    _mlp_shapes,
    _mlp_flops,
)
def grouped_mlp_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """Launch the kernels of the experts' forward pass."""
    from ...kernels.grouped_mlp.forward import mlp_forward

    with launching(args):
        return mlp_forward(*args)


@operator(
    "(Tensor d_out, Tensor x, Tensor hidden, Tensor w_up, Tensor? w_gate, Tensor w_down,"
    f" Tensor? b_down, {_ROUTING}, str activation, bool packed, bool need_dx, bool need_dw,"
    " bool need_db_up) -> (Tensor dx, Tensor dw_up, Tensor dw_gate, Tensor dw_down,"
    " Tensor db_up, Tensor db_down, Tensor d_combine)",
    _mlp_backward_shapes,
    _mlp_backward_flops,
)
def grouped_mlp_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Launch the kernels of the experts' backward pass."""
    from ...kernels.grouped_mlp.backward import mlp_backward

    with launching(args):
        return mlp_backward(*args)


# ---- autograd ------------------------------------------------------------------------------------


class LinearFused(torch.autograd.Function):
    """Compute :func:`grouped_linear` with the kernels. All arguments are saved for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        combine_weights: Tensor | None,
        order: Tensor,
        position: Tensor,
        offsets: Tensor,
        tiles: Tensor,
        k: int,
        gather: bool,
    ) -> Tensor:
        """Launch the forward operator."""
        ctx.k, ctx.gather = k, gather
        tensors = (x, weight, bias, combine_weights, order, position, offsets, tiles)
        ctx.save_for_backward(*tensors)
        return grouped_linear_fwd(*tensors, k, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Launch the backward operator for the gradients that are needed."""
        needs = ctx.needs_input_grad[:4]
        gradients = grouped_linear_bwd(
            d_out.contiguous(), *ctx.saved_tensors, ctx.k, ctx.gather, *needs[:3]
        )
        return *_needed(gradients, needs), *[None] * 6


class MLPFused(torch.autograd.Function):
    """Compute :func:`grouped_mlp` with the kernels.

    Of the intermediate results, only the pre-activations are saved for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_up: Tensor,
        w_gate: Tensor | None,
        w_down: Tensor,
        b_up: Tensor | None,
        b_down: Tensor | None,
        combine_weights: Tensor,
        order: Tensor,
        position: Tensor,
        offsets: Tensor,
        tiles: Tensor,
        activation: Activation,
        packed: bool,
    ) -> Tensor:
        """Launch the forward operator."""
        weights = (w_up, w_gate, w_down)
        routing = (combine_weights, order, position, offsets, tiles)
        out, hidden = grouped_mlp_fwd(x, *weights, b_up, b_down, *routing, activation, packed)
        ctx.activation, ctx.packed = activation, packed
        ctx.save_for_backward(x, hidden, *weights, b_down, *routing)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Launch the backward operator for the gradients that are needed."""
        needs = ctx.needs_input_grad[:7]
        need_dx, need_dw_up, need_dw_gate, need_dw_down, need_db_up, need_db_down, _ = needs
        # The saved tensors are the fields x to tiles of _MLPBackward, in order.
        call = _MLPBackward(
            d_out.contiguous(),
            *ctx.saved_tensors,
            activation=ctx.activation,
            packed=ctx.packed,
            need_dx=need_dx,
            need_dw=need_dw_up or need_dw_gate or need_dw_down or need_db_down,
            need_db_up=need_db_up,
        )
        dx, dw_up, dw_gate, dw_down, db_up, db_down, d_combine = grouped_mlp_bwd(*call)
        gradients = (dx, dw_up, dw_gate, dw_down, db_up, db_down, d_combine)
        return *_needed(gradients, needs), *[None] * 6


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
