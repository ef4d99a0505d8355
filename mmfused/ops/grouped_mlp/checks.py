"""Input validation for grouped_linear and grouped_mlp."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...library import check_tensors
from ..topk_routing import Routing

Activation = Literal["gelu", "relu", "swiglu"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Parameters(NamedTuple):
    """The parameters of E two-layer experts."""

    w_up: Tensor  # (E, I, D), or packed (E, 2I, D) with the rows of the gate first
    w_gate: Tensor | None  # (E, I, D)
    w_down: Tensor  # (E, Dout, I)
    b_up: Tensor | None  # (E, I)
    b_down: Tensor | None  # (E, Dout)

    def packed(self, activation: str) -> bool:
        """Return whether ``w_up`` contains the gate's weight too."""
        return activation == "swiglu" and self.w_gate is None

    def to(self, dtype: torch.dtype) -> Parameters:
        """Cast the parameters, differentiably."""
        w_up, w_gate, w_down, b_up, b_down = self
        return Parameters(
            w_up=w_up.to(dtype),
            w_gate=None if w_gate is None else w_gate.to(dtype),
            w_down=w_down.to(dtype),
            b_up=None if b_up is None else b_up.to(dtype),
            b_down=None if b_down is None else b_down.to(dtype),
        )


def check_linear(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None,
    gather: bool,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on bad input of grouped_linear."""
    op = "grouped_linear"
    _check_floats(op, x, routing, weight=weight, bias=bias)
    if gather:
        _check_rows(op, x, routing.indices.shape[0], "tokens")
    else:
        _check_rows(op, x, routing.order.shape[0], "sorted rows")
    experts = routing.offsets.shape[0] - 1
    if weight.dim() != 3 or (weight.shape[0], weight.shape[2]) != (experts, x.shape[1]):
        raise ValueError(
            f"{op}: weight: got shape {tuple(weight.shape)}, "
            f"expected ({experts}, out, {x.shape[1]})"
        )
    _check_shapes(op, bias=(bias, weight.shape[:2]))


def check_mlp(
    x: Tensor,
    routing: Routing,
    parameters: Parameters,
    activation: Activation,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on bad input of grouped_mlp."""
    op = "grouped_mlp"
    check_activation(op, activation)
    _check_floats(op, x, routing, **parameters._asdict())
    _check_rows(op, x, routing.indices.shape[0], "tokens")
    w_up, w_gate, w_down, b_up, b_down = parameters
    experts, dim = routing.offsets.shape[0] - 1, x.shape[1]
    if w_gate is not None and activation != "swiglu":
        raise ValueError(
            f"{op}: w_gate: got a tensor with activation {activation!r}, expected 'swiglu'"
        )
    if w_down.dim() != 3 or w_down.shape[0] != experts:
        raise ValueError(
            f"{op}: w_down: got shape {tuple(w_down.shape)}, expected ({experts}, out, hidden)"
        )
    width = w_down.shape[2]
    up = (experts, 2 * width if parameters.packed(activation) else width, dim)
    _check_shapes(
        op,
        w_up=(w_up, up),
        w_gate=(w_gate, up),
        b_up=(b_up, (experts, width)),
        b_down=(b_down, w_down.shape[:2]),
    )


def check_activation(op: str, activation: str) -> None:
    """Raise ``ValueError`` unless ``activation`` is the name of an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )


def _check_floats(
    op: str,
    x: Tensor,
    routing: Routing,
    **parameters: Tensor | None,
) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(
            f"{op}: routing: got a {type(routing).__name__}, "
            "expected the Routing of topk_routing or routing_from_indices"
        )
    check_tensors(op, x=x, **parameters, routing=routing.order)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: x: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    # With x in 16 bits, the parameters may be float32.
    dtypes = {x.dtype, torch.promote_types(x.dtype, torch.float32)}
    expected = " or ".join(sorted(map(str, dtypes)))
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype not in dtypes:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {expected}, as x has {x.dtype}"
            )


def _check_rows(
    op: str,
    x: Tensor,
    rows: int,
    what: str,
) -> None:
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)}, "
            f"expected ({rows}, dim): the {what} of the routing"
        )


def _check_shapes(op: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
