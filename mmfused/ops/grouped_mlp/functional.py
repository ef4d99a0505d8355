"""The public functions of experts; the equations are in reference.py."""

from __future__ import annotations

from torch import Tensor

from ...library import choose, no_autocast, to_autocast
from ..topk_routing import Routing
from .autograd import LinearFused, MLPFused
from .checks import Activation, Parameters, check_linear, check_mlp
from .composed import linear_composed, mlp_composed
from .reference import grouped_linear_reference, grouped_mlp_reference


def grouped_linear(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gather: bool = True,
    combine: bool = False,
) -> Tensor:
    """Apply the linear layer of each expert to the rows of that expert.

    This is a building block for experts that :func:`grouped_mlp` does not support.

    Args:
        x: tokens (T, I). With ``gather=False``, rows (T*k, I) sorted by expert, such as the result
            of another grouped_linear.
        routing: from :func:`topk_routing` or :func:`routing_from_indices`.
        weight: (E, O, I), in the dtype of ``x``, or float32 if ``x`` has 16 bits.
        bias: (E, O), in the dtype of ``x``, or float32 if ``x`` has 16 bits.
        gather: True if ``x`` contains tokens, False if it contains sorted rows.
        combine: whether to sum the k rows of each token, weighted by ``routing.weights``.

    Returns:
        Without ``combine``, rows (T*k, O) sorted by expert; the rows of masked tokens are 0. Row r
        belongs to expert ``routing.indices.flatten()[routing.order[r]]``. With ``combine``, sums
        (T, O). The dtype is that of ``x``, or the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: bad input; raised before any kernel is launched.
        RuntimeError: ``backend("fused")`` cannot run; raised before any kernel is launched.

    Examples:
        >>> import torch, mmfused
        >>> x, up, down = torch.randn(10, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
        >>> routing = mmfused.topk_routing(torch.randn(10, 4), 2)
        >>> hidden = mmfused.grouped_linear(x, routing, up).tanh()  # an activation of your own
        >>> hidden.shape
        torch.Size([20, 16])
        >>> out = mmfused.grouped_linear(hidden, routing, down, gather=False, combine=True)
        >>> every = (x @ up.mT).tanh() @ down.mT  # (experts, tokens, 8), all experts for all tokens
        >>> chosen = every[routing.indices, torch.arange(10)[:, None]]
        >>> torch.allclose(out, (routing.weights[..., None] * chosen).sum(1), atol=1e-4)
        True
    """
    x, weight, bias = to_autocast(x, weight, bias)
    check_linear(x, routing, weight, bias, gather)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    with no_autocast(x.device.type):
        backend = choose("grouped_linear", x.device, x.dtype, None, ("onnx",))
        if backend == "reference":
            return grouped_linear_reference(
                x, routing, weight, bias, gather=gather, combine=combine
            )
        if backend == "composed":
            return linear_composed(x, routing, weight, bias, gather=gather, combine=combine)
        return LinearFused.apply(
            _dense_rows(x),
            _dense_rows(weight),
            bias,
            routing.weights.float() if combine else None,
            routing.order,
            routing.position,
            routing.offsets,
            routing.tiles,
            routing.indices.shape[1],
            gather,
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
    activation: Activation = "gelu",
) -> Tensor:
    """Apply k two-layer experts to each token, and sum the weighted outputs.

    ``out_t = sum_j w_tj (W_down act(W_up x_t + b_up) + b_down)``, where j counts the k experts of
    token t, ``w_tj`` is ``routing.weights[t, j]``, and W and b belong to the j-th of these experts.

    Args:
        x: tokens (T, D), float32, float16, bfloat16 or float64. Tokens that are masked in the
            routing may be NaN and give output 0.
        routing: from :func:`topk_routing` or :func:`routing_from_indices`. ``routing.weights`` gets
            a gradient.
        w_up: (E, I, D). With "swiglu" and without ``w_gate``, a packed tensor (E, 2I, D) with the
            rows of the gate first. All weights and biases have the dtype of ``x``, or float32 if
            ``x`` has 16 bits.
        w_down: (E, Dout, I).
        b_up: (E, I).
        b_down: (E, Dout).
        w_gate: (E, I, D), for "swiglu" only; None if ``w_up`` is packed.
        activation: "gelu" (the erf form), "relu", or "swiglu": ``silu(W_gate x) (W_up x + b_up)``.

    Returns:
        (T, Dout) in the dtype of ``x``, or in the autocast dtype under autocast. Experts without
        tokens get gradients of exactly 0.

    Raises:
        TypeError, ValueError: bad input; raised before any kernel is launched.
        RuntimeError: ``backend("fused")`` cannot run; raised before any kernel is launched.

    Examples:
        >>> import torch, mmfused
        >>> x, w_up, w_down = torch.randn(10, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
        >>> routing = mmfused.topk_routing(torch.randn(10, 4), 2)
        >>> out = mmfused.grouped_mlp(x, routing, w_up, w_down, activation="relu")
        >>> every = (x @ w_up.mT).relu() @ w_down.mT  # (experts, tokens, 8)
        >>> chosen = every[routing.indices, torch.arange(10)[:, None]]
        >>> torch.allclose(out, (routing.weights[..., None] * chosen).sum(1), atol=1e-4)
        True
    """
    x, *given = to_autocast(x, w_up, w_gate, w_down, b_up, b_down)
    parameters = Parameters(*given)
    check_mlp(x, routing, parameters, activation)
    parameters = parameters.to(x.dtype)
    with no_autocast(x.device.type):
        backend = choose("grouped_mlp", x.device, x.dtype, None, ("onnx",))
        if backend == "reference":
            return _reference(x, routing, parameters, activation)
        if backend == "composed":
            return mlp_composed(x, routing, parameters, activation)
        return MLPFused.apply(
            _dense_rows(x),
            _dense_rows(parameters.w_up),
            None if parameters.w_gate is None else _dense_rows(parameters.w_gate),
            _dense_rows(parameters.w_down),
            parameters.b_up,
            parameters.b_down,
            routing.weights.float(),
            routing.order,
            routing.position,
            routing.offsets,
            routing.tiles,
            activation,
            parameters.packed(activation),
        )


def _reference(
    x: Tensor,
    routing: Routing,
    parameters: Parameters,
    activation: Activation,
) -> Tensor:
    w_up, w_gate, w_down, b_up, b_down = parameters
    if parameters.packed(activation):
        w_gate, w_up = w_up.chunk(2, 1)
    return grouped_mlp_reference(
        x,
        routing,
        w_up,
        w_down,
        b_up=b_up,
        b_down=b_down,
        w_gate=w_gate,
        activation=activation,
    )


def _dense_rows(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a copy if the last stride is not 1; the kernels need last stride 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
