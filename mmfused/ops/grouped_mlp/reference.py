"""Experts of a mixture (FLUID eq. 9, Mixtral, MOON2.0).

    out_t  = sum over j of w_tj f_e(x_t)          e: the j-th choice of token t
    f_e(x) = W_down,e a + b_down,e
    a      = gelu(h), relu(h), or silu(W_gate,e x) h
    h      = W_up,e x + b_up,e

The T k rows are sorted by expert (Routing), so those of an expert are one matrix, and nothing is
padded but its last tile. Forward: the first product gathers x in its loads, and has bias and
activation in its epilogue; a third kernel gathers the k rows of each token and adds them up,
without a scatter or atomics. Saved: x and the pre-activations. Backward, with dO gathered in the
loads:

    dA      = dO W_down
    dw      = <dA, a> + <dO, b_down>
    dH      = w dA a'(h)
    dW_down = (w dO)^T A
    dW_up   = dH^T X
    dX      = dH W_up

so the gradient of the routing weights needs no output of an expert. FLOPs: 2 n T k D I forward and
twice that backward, where n = 2, or 3 with a gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..topk_routing import Routing
from .checks import Activation


def grouped_linear_reference(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gather: bool = True,
    combine: bool = False,
) -> Tensor:
    """Compute :func:`grouped_linear` with every expert on every row, and keep the right result.

    This is the specification: any floating dtype, any device, differentiable any number of times.
    """
    tokens, k = routing.indices.shape
    valid = torch.arange(tokens * k, device=x.device) < routing.offsets[-1]
    rows = x.index_select(0, routing.order // k) if gather else x
    rows = rows.masked_fill(~valid[:, None], 0.0)  # a masked token may hold NaN
    expert = routing.indices.flatten().index_select(0, routing.order)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e in range(len(weight)):
        # Rows of other experts may be NaN, and the gradient of a product has 0 times NaN.
        own = (valid & (expert == e))[:, None]
        own_rows = rows.masked_fill(~own, 0.0)
        result = F.linear(own_rows, weight[e], None if bias is None else bias[e])
        out = torch.where(own, result, out)
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
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    w_gate: Tensor | None = None,
    activation: Activation = "gelu",
) -> Tensor:
    """Compute :func:`grouped_mlp` from three :func:`grouped_linear_reference`.

    This is the specification: any floating dtype, any device, differentiable any number of times.
    """
    hidden = grouped_linear_reference(x, routing, w_up, b_up)
    gate = None if w_gate is None else grouped_linear_reference(x, routing, w_gate)
    hidden = activated(hidden, gate, activation)
    return grouped_linear_reference(hidden, routing, w_down, b_down, gather=False, combine=True)


def activated(hidden: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """Apply the activation to the pre-activations."""
    if activation == "swiglu":
        assert gate is not None
        return F.silu(gate) * hidden
    return F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
