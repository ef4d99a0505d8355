"""Experts of a mixture (FLUID eq. 9, Mixtral, MOON2.0): out_t = sum over j of w_tj f_e(x_t), e =
the j-th choice of token t.

    f_e(x) = W_down,e a + b_down,e       a = gelu(h), relu(h), or silu(W_gate,e x) h        h =
    W_up,e x + b_up,e

The T k rows are sorted by expert (Routing), so an expert's are one matrix and nothing is padded but
the last tile of each. Forward: the gather of x is in the first product's loads, bias and activation
in its epilogue, and a third kernel gathers the k rows of each token and adds them up: no scatter,
no atomics. Saved: x and the pre-activations. Backward, dO gathered in the loads:

    dA = dO W_down    dw = <dA, a> + <dO, b_down>    dH = w dA a'(h)    dW_down = (w dO)^T A
    dW_up = dH^T X    dX = dH W_up

so the gradient of the routing weights needs no output of an expert. FLOPs: 2 n T k D I forward,
twice that backward, n = 2 or 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import choose, no_autocast, once_differentiable, register, to_autocast
from ..topk_routing import Routing
from .checks import check_linear, check_mlp
from .composed import Gather, combine


def grouped_linear_reference(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gather: bool = True,
    combine: bool = False,
) -> Tensor:
    """The specification of :func:`grouped_linear`: every expert on every row, and of each row its
    own expert's result.
    """
    tokens, k = routing.indices.shape
    live = torch.arange(tokens * k, device=x.device) < routing.offsets[-1]
    rows = x.index_select(0, routing.order // k) if gather else x
    rows = rows.masked_fill(~live[:, None], 0.0)  # a masked token may hold NaN
    expert = routing.indices.flatten().index_select(0, routing.order)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e in range(len(weight)):
        mine = (live & (expert == e))[
            :, None
        ]  # others' rows may be NaN, and a product's gradient has 0 times NaN
        result = F.linear(
            rows.masked_fill(~mine, 0.0), weight[e], None if bias is None else bias[e]
        )
        out = torch.where(mine, result, out)
    if not combine:
        return out
    chosen = out.index_select(0, routing.position).unflatten(0, (tokens, k))
    return (chosen.to(routing.weights.dtype) * routing.weights[:, :, None]).sum(1).to(x.dtype)


def grouped_mlp_reference(
    x: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up=None,
    b_down=None,
    w_gate=None,
    activation="gelu",
) -> Tensor:
    """The specification of :func:`grouped_mlp`, any floating dtype, any device."""
    hidden = grouped_linear_reference(x, routing, w_up, b_up)
    gate = None if w_gate is None else grouped_linear_reference(x, routing, w_gate)
    hidden = _activate(hidden, gate, activation)
    return grouped_linear_reference(hidden, routing, w_down, b_down, gather=False, combine=True)


def _activate(hidden: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    if activation == "swiglu":
        return F.silu(gate) * hidden
    return F.gelu(hidden) if activation == "gelu" else F.relu(hidden)


def _linear_composed(x, routing, weight, bias, gather, combines):
    tokens, k = routing.indices.shape
    if gather:
        x = _gather(x, routing)
    out = torch.ops.mmfused.segment_linear(x, weight, bias, routing.offsets)
    return combine(out, routing.weights, routing.position) if combines else out


def _gather(x: Tensor, routing: Routing) -> Tensor:
    live = (torch.arange(routing.order.shape[0], device=x.device) < routing.offsets[-1])[:, None]
    return Gather.apply(x, routing.order, routing.position, live, routing.indices.shape[1])


def _mlp_composed(x, routing, w_up, w_gate, w_down, b_up, b_down, activation):
    rows = _gather(x, routing)
    packed = activation == "swiglu" and w_gate is None
    if packed and b_up is not None:
        b_up = F.pad(b_up, (b_up.shape[1], 0))  # the gate has none
    hidden = torch.ops.mmfused.segment_linear(rows, w_up, b_up, routing.offsets)
    gate = (
        None
        if w_gate is None
        else torch.ops.mmfused.segment_linear(rows, w_gate, None, routing.offsets)
    )
    if packed:
        gate, hidden = hidden.chunk(2, -1)
    out = torch.ops.mmfused.segment_linear(
        _activate(hidden, gate, activation), w_down, b_down, routing.offsets
    )
    return combine(out, routing.weights, routing.position)


# ---- the kernels under autograd ------------------------------------------------------------------

_ROUTING = "Tensor order, Tensor position, Tensor offsets, Tensor tiles"


def _fake_linear(x, weight, bias, combine_weights, order, position, offsets, tiles, k, gather):
    rows = order.shape[0] if combine_weights is None else combine_weights.shape[0]
    return x.new_empty(rows, weight.shape[1])


def _fake_linear_backward(
    d_out,
    x,
    weight,
    bias,
    combine_weights,
    order,
    position,
    offsets,
    tiles,
    k,
    gather,
    need_dx,
    need_dw,
    need_db,
):
    dx, dw = (
        x.new_empty(x.shape if need_dx else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,)),
    )
    db = weight.new_empty(weight.shape[:2] if need_db else (0,))
    return (
        dx,
        dw,
        db,
        x.new_empty(
            (0,) if combine_weights is None else combine_weights.shape, dtype=torch.float32
        ),
    )


def _fake_mlp(
    x,
    w_up,
    w_gate,
    w_down,
    b_up,
    b_down,
    combine_weights,
    order,
    position,
    offsets,
    tiles,
    activation,
    packed,
):
    hidden = x.new_empty(2 if activation == "swiglu" else 1, order.shape[0], w_down.shape[2])
    return x.new_empty(x.shape[0], w_down.shape[1]), hidden


def _fake_mlp_backward(
    d_out,
    x,
    hidden,
    w_up,
    w_gate,
    w_down,
    b_down,
    combine_weights,
    order,
    position,
    offsets,
    tiles,
    activation,
    packed,
    need_dx,
    need_dw,
    need_db_up,
):
    def like(tensor, needed):
        return x.new_empty(tensor.shape if needed and tensor is not None else (0,))

    db_up = x.new_empty((len(w_down), w_down.shape[2]) if need_db_up else (0,))
    return (
        like(x, need_dx),
        like(w_up, need_dw),
        like(w_gate, need_dw),
        like(w_down, need_dw),
        db_up,
        like(b_down, need_dw),
        torch.empty_like(combine_weights),
    )


def _linear_flops(x, weight, bias, combine_weights, order, *rest, out_shape):
    return 2 * order[0] * weight[1] * weight[2]


def _linear_backward_flops(
    d_out,
    x,
    weight,
    bias,
    combine_weights,
    order,
    position,
    offsets,
    tiles,
    k,
    gather,
    need_dx,
    need_dw,
    need_db,
    *,
    out_shape,
):
    """dO W is also what the gradient of the routing weights comes from."""
    products = (need_dx or combine_weights is not None) + need_dw
    return _linear_flops(x, weight, bias, combine_weights, order, out_shape=None) * products


def _mlp_products(x, w_down, order, activation) -> tuple[int, int]:
    """FLOPs forward of the first layer (with its gate) and of the second."""
    _, out, width = w_down
    return 2 * (2 if activation == "swiglu" else 1) * order[0] * x[1] * width, 2 * order[
        0
    ] * width * out


def _mlp_flops(
    x,
    w_up,
    w_gate,
    w_down,
    b_up,
    b_down,
    combine_weights,
    order,
    position,
    offsets,
    tiles,
    activation,
    packed,
    *,
    out_shape,
):
    return sum(_mlp_products(x, w_down, order, activation))


def _mlp_backward_flops(
    d_out,
    x,
    hidden,
    w_up,
    w_gate,
    w_down,
    b_down,
    combine_weights,
    order,
    position,
    offsets,
    tiles,
    activation,
    packed,
    need_dx,
    need_dw,
    need_db_up,
    *,
    out_shape,
):
    """dA is always there: the gradient of the routing weights comes from it."""
    up, down = _mlp_products(x, w_down, order, activation)
    return up * (need_dx + need_dw) + down * (1 + need_dw)


def _launch_linear_forward(*args):
    from ...kernels import grouped_mlp as kernels

    return kernels.linear_forward(*args)


def _launch_linear_backward(*args):
    from ...kernels import grouped_mlp as kernels

    return kernels.linear_backward(*args)


def _launch_mlp_forward(*args):
    from ...kernels import grouped_mlp as kernels

    return kernels.mlp_forward(*args)


def _launch_mlp_backward(*args):
    from ...kernels import grouped_mlp as kernels

    return kernels.mlp_backward(*args)


register(
    "grouped_linear_fwd",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? combine_weights, {_ROUTING}, int k, bool gather) -> Tensor out",
    _launch_linear_forward,
    _fake_linear,
    _linear_flops,
)
register(
    "grouped_linear_bwd",
    f"(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor? combine_weights, {_ROUTING}, int k, bool gather,"
    " bool need_dx, bool need_dw, bool need_db) -> (Tensor dx, Tensor dw, Tensor db, Tensor d_combine)",
    _launch_linear_backward,
    _fake_linear_backward,
    _linear_backward_flops,
)
register(
    "grouped_mlp_fwd",
    f"(Tensor x, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor? b_up, Tensor? b_down, Tensor combine_weights, {_ROUTING},"
    " str activation, bool packed) -> (Tensor out, Tensor hidden)",
    _launch_mlp_forward,
    _fake_mlp,
    _mlp_flops,
)
register(
    "grouped_mlp_bwd",
    "(Tensor d_out, Tensor x, Tensor hidden, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor? b_down, Tensor combine_weights,"
    f" {_ROUTING}, str activation, bool packed, bool need_dx, bool need_dw, bool need_db_up)"
    " -> (Tensor dx, Tensor dw_up, Tensor dw_gate, Tensor dw_down, Tensor db_up, Tensor db_down, Tensor d_combine)",
    _launch_mlp_backward,
    _fake_mlp_backward,
    _mlp_backward_flops,
)


class _LinearFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, combine_weights, order, position, offsets, tiles, k, gather):
        ctx.k, ctx.gather = k, gather
        ctx.save_for_backward(x, weight, bias, combine_weights, order, position, offsets, tiles)
        return torch.ops.mmfused.grouped_linear_fwd(
            x, weight, bias, combine_weights, order, position, offsets, tiles, k, gather
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        needs = ctx.needs_input_grad[:4]
        gradients = torch.ops.mmfused.grouped_linear_bwd(
            d_out.contiguous(), *ctx.saved_tensors, ctx.k, ctx.gather, *needs[:3]
        )
        return *_needed(gradients, needs), *[None] * 6


class _MLPFused(torch.autograd.Function):
    """Saves x and the pre-activations: no gathered rows, no activations, no expert's output."""

    @staticmethod
    def forward(
        ctx,
        x,
        w_up,
        w_gate,
        w_down,
        b_up,
        b_down,
        combine_weights,
        order,
        position,
        offsets,
        tiles,
        activation,
        packed,
    ):
        out, hidden = torch.ops.mmfused.grouped_mlp_fwd(
            x,
            w_up,
            w_gate,
            w_down,
            b_up,
            b_down,
            combine_weights,
            order,
            position,
            offsets,
            tiles,
            activation,
            packed,
        )
        ctx.activation, ctx.packed = activation, packed
        ctx.save_for_backward(
            x,
            hidden,
            w_up,
            w_gate,
            w_down,
            b_down,
            combine_weights,
            order,
            position,
            offsets,
            tiles,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        needs = ctx.needs_input_grad[:7]
        need_dw = any(needs[1:4]) or needs[5]
        dx, dw_up, dw_gate, dw_down, db_up, db_down, d_combine = torch.ops.mmfused.grouped_mlp_bwd(
            d_out.contiguous(),
            *ctx.saved_tensors,
            ctx.activation,
            ctx.packed,
            needs[0],
            need_dw,
            needs[4],
        )
        return *_needed((dx, dw_up, dw_gate, dw_down, db_up, db_down, d_combine), needs), *[
            None
        ] * 6


def _needed(gradients, needs):
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


# ---- the functions -------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gather: bool = True,
    combine: bool = False,
) -> Tensor:
    """A linear layer of each expert on its own tokens: the building block of experts that
    :func:`grouped_mlp` does not know.

    Args: x: (T, I), the tokens; with ``gather=False`` (T*k, I), rows sorted by expert as an earlier
        grouped_linear gave them. routing: of :func:`topk_routing` or :func:`routing_from_indices`.
        weight, bias: (E, O, I) and (E, O), in the dtype of ``x`` or float32. combine: add up each
        token's k rows with the routing's weights.

    Returns: (T*k, O) rows sorted by expert, zeros for masked tokens; with ``combine`` (T, O). In
    the dtype of ``x`` (of autocast where it is on). The expert of row r is
    ``routing.indices.flatten()[routing.order[r]]``.

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")``
    cannot run, before any launch."""
    x, weight, bias = to_autocast(x, weight, bias)
    check_linear(x, routing, weight, bias, gather)
    weight, bias = _cast(x.dtype, weight, bias)
    with no_autocast(x.device.type):
        chosen = choose("grouped_linear", x.device, x.dtype, None, ("onnx",))
        if chosen == "reference":
            return grouped_linear_reference(
                x, routing, weight, bias, gather=gather, combine=combine
            )
        if chosen == "composed":
            return _linear_composed(x, routing, weight, bias, gather, combine)
        weights = routing.weights.float() if combine else None
        return _LinearFused.apply(
            *_rows(x, weight), bias, weights, *routing[6:], routing.indices.shape[1], gather
        )


def grouped_mlp(
    x: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    w_gate: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Two-layer experts, weighted and added up: ``out_t = sum_j w_tj (W_down act(W_up x_t + b_up) +
    b_down)`` over t's choices.

    Args: x: (T, D) float32, float16, bfloat16 or float64; tokens the routing masked give 0 and may
        hold NaN. routing: of :func:`topk_routing` or :func:`routing_from_indices`; its weights get
        their gradient. w_up, w_gate: (E, I, D); w_down: (E, Dout, I), in the dtype of ``x`` or
        float32. Any strides in E: the halves of a packed
            (E, 2I, D) do. For ``activation="swiglu"``, ``silu(W_gate x) * (W_up x + b_up)``, w_gate
            may also be None with a packed w_up (E, 2I, D), gate rows first; then the gradient comes
            in one piece.
        b_up: (E, I); b_down: (E, Dout).
        activation: "gelu" (the erf form), "relu" or "swiglu".

    Returns: (T, Dout) in the dtype of ``x`` (of autocast where it is on). Experts without tokens
    get gradients of exact zeros.

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")``
    cannot run, before any launch."""
    parameters = w_up, w_gate, w_down, b_up, b_down
    x, *parameters = to_autocast(x, *parameters)
    packed = check_mlp(x, routing, *parameters, activation)
    w_up, w_gate, w_down, b_up, b_down = _cast(x.dtype, *parameters)
    with no_autocast(x.device.type):
        chosen = choose("grouped_mlp", x.device, x.dtype, None, ("onnx",))
        if chosen == "reference":
            if packed:
                w_gate, w_up = w_up.chunk(2, 1)
            biases = dict(b_up=b_up, b_down=b_down)
            return grouped_mlp_reference(
                x, routing, w_up, w_down, **biases, w_gate=w_gate, activation=activation
            )
        if chosen == "composed":
            return _mlp_composed(x, routing, w_up, w_gate, w_down, b_up, b_down, activation)
        x, w_up, w_gate, w_down = _rows(x, w_up, w_gate, w_down)
        return _MLPFused.apply(
            x,
            w_up,
            w_gate,
            w_down,
            b_up,
            b_down,
            routing.weights.float(),
            *routing[6:],
            activation,
            packed,
        )


def _cast(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in parameters]


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """What kernels read along rows lies densely there."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]
