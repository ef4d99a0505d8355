"""Experts of a mixture (FLUID eq. 9, Mixtral, MOON2.0).

Each expert is a two-layer MLP. Token x_t has k experts; w_tj is the routing weight of its j-th
expert:

    out_t  = sum over j of w_tj f_e(x_t)          e: the j-th expert of token t
    f_e(x) = W_down,e a + b_down,e
    a      = gelu(h), relu(h), or silu(W_gate,e x) h
    h      = W_up,e x + b_up,e

Each choice of an expert by a token is a row, so T tokens have T k rows. A Routing sorts the rows by
expert. The rows of one expert form a matrix, of which only the last tile is padded. The forward
pass launches three kernels. The first gathers x in its loads and applies bias and activation in its
epilogue. The second multiplies by W_down. The third sums the k rows of each token, without a
scatter or atomics. Of the intermediate results, only the pre-activations are saved for backward.

For the backward pass of one expert, let X, H and A be the matrices whose rows are x, h and a. The
rows of the matrix dO are the gradients of out, and the elements of the vector w are the routing
weights.

    dA      = dO W_down                           without the factor w
    dw      = rowsum(dA A) + dO b_down            elementwise product dA A
    dH      = w dA act'(H)                        elementwise, for gelu and relu
    dW_down = (w dO)^T A
    dW_up   = dH^T X
    dX      = dH W_up

So the gradient of the routing weights does not need the outputs of the experts. Let D be the width
of x and out, I the width of h, and n the number of weight matrices of an expert: 2, or 3 with a
gate. The forward pass needs 2 n T k D I FLOPs, and the backward pass twice as many.
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
    """Compute :func:`grouped_linear` in plain PyTorch, one expert after the other.

    This is the specification. It supports any floating dtype, any device and derivatives of any
    order.

    Examples:
        >>> import torch, mmfused
        >>> x, weight = torch.randn(10, 8), torch.randn(4, 16, 8)
        >>> routing = mmfused.topk_routing(torch.randn(10, 4), 2)
        >>> exact = mmfused.grouped_linear_reference(x, routing, weight)
        >>> torch.allclose(mmfused.grouped_linear(x, routing, weight), exact, atol=1e-5)
        True
    """
    tokens, k = routing.indices.shape
    valid = torch.arange(tokens * k, device=x.device) < routing.offsets[-1]
    rows = x.index_select(0, routing.order // k) if gather else x
    rows = rows.masked_fill(~valid[:, None], 0.0)  # a masked token may be NaN
    expert = routing.indices.flatten().index_select(0, routing.order)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e in range(len(weight)):
        # Rows of other experts may be NaN. In the gradient of the product, 0 * NaN would be NaN.
        of_expert = (valid & (expert == e))[:, None]
        expert_rows = rows.masked_fill(~of_expert, 0.0)
        result = F.linear(expert_rows, weight[e], None if bias is None else bias[e])
        out = torch.where(of_expert, result, out)
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
    """Compute :func:`grouped_mlp` with :func:`grouped_linear_reference`.

    This is the specification. It supports any floating dtype, any device and derivatives of any
    order. ``w_up`` is not packed; "swiglu" needs ``w_gate``.

    Examples:
        >>> import torch, mmfused
        >>> x, w_up, w_down = torch.randn(10, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
        >>> routing = mmfused.topk_routing(torch.randn(10, 4), 2)
        >>> exact = mmfused.grouped_mlp_reference(x, routing, w_up, w_down)
        >>> torch.allclose(mmfused.grouped_mlp(x, routing, w_up, w_down), exact, atol=1e-4)
        True
    """
    hidden = grouped_linear_reference(x, routing, w_up, b_up)
    gate = None if w_gate is None else grouped_linear_reference(x, routing, w_gate)
    hidden = activated(hidden, gate, activation)
    return grouped_linear_reference(hidden, routing, w_down, b_down, gather=False, combine=True)


def activated(hidden: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """Apply the activation to the pre-activations; ``gate`` is used by "swiglu" only."""
    if activation == "swiglu":
        assert gate is not None
        return F.silu(gate) * hidden
    return F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
