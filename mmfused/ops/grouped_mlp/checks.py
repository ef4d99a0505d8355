"""What the grouped products refuse, in one sentence each, before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import check_tensors
from ..topk_routing import Routing

ACTIVATIONS = ("gelu", "relu", "swiglu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_linear(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None,
    gather: bool,
) -> None:
    op = "grouped_linear"
    _check_floats(op, x, routing, weight=weight, bias=bias)
    _check_rows(
        op,
        x,
        routing.indices.shape[0] if gather else routing.order.shape[0],
        "tokens" if gather else "sorted rows",
    )
    experts = routing.offsets.shape[0] - 1
    if weight.dim() != 3 or (weight.shape[0], weight.shape[2]) != (experts, x.shape[1]):
        raise ValueError(
            f"{op}: weight: got shape {tuple(weight.shape)}, expected ({experts}, out, {x.shape[1]})"
        )
    _check_shapes(op, bias=(bias, weight.shape[:2]))


def check_mlp(x, routing, w_up, w_gate, w_down, b_up, b_down, activation) -> bool:
    """Whether w_up holds the gate too."""
    op = "grouped_mlp"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    _check_floats(op, x, routing, w_up=w_up, w_gate=w_gate, w_down=w_down, b_up=b_up, b_down=b_down)
    _check_rows(op, x, routing.indices.shape[0], "tokens")
    experts, dim = routing.offsets.shape[0] - 1, x.shape[1]
    if w_gate is not None and activation != "swiglu":
        raise ValueError(
            f"{op}: w_gate: got given with activation {activation!r}, expected 'swiglu'"
        )
    if w_down.dim() != 3 or w_down.shape[0] != experts:
        raise ValueError(
            f"{op}: w_down: got shape {tuple(w_down.shape)}, expected ({experts}, out, hidden)"
        )
    width, packed = w_down.shape[2], activation == "swiglu" and w_gate is None
    up = (experts, 2 * width if packed else width, dim)
    _check_shapes(
        op,
        w_up=(w_up, up),
        w_gate=(w_gate, up),
        b_up=(b_up, (experts, width)),
        b_down=(b_down, w_down.shape[:2]),
    )
    return packed


def _check_floats(op: str, x: Tensor, routing: Routing, **parameters: Tensor | None) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(
            f"{op}: routing: got a {type(routing).__name__}, expected the Routing of topk_routing or routing_from_indices"
        )
    check_tensors(op, x=x, **parameters, routing=routing.order)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: x: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    takes = {
        x.dtype,
        torch.promote_types(x.dtype, torch.float32),
    }  # master weights may stay in float32
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype not in takes:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {' or '.join(sorted(map(str, takes)))}, as x has {x.dtype}"
            )


def _check_rows(op: str, x: Tensor, rows: int, what: str) -> None:
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)}, expected ({rows}, dim): the {what} of the routing"
        )


def _check_shapes(op: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
