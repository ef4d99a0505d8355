"""The order of tokens by expert, for any router.

Choice j of token t is called assignment t * k + j. The rows of the grouped products are the
assignments, sorted by expert and then by number. Assignments of masked tokens come last and do not
belong to an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flops import no_products
from ...library import active_exporter, check_tensors, choose, launching, operator
from .checks import check_indices, check_mask


class Routing(NamedTuple):
    """The k of E experts chosen for each of T tokens, which belong to S segments.

    This is the result of :func:`topk_routing`, and an argument of the grouped products.

    Examples:
        >>> import torch, mmfused
        >>> logits = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])  # 3 tokens, 2 experts
        >>> routing = mmfused.topk_routing(logits, 1)
        >>> routing.indices.flatten()
        tensor([1, 0, 1])
        >>> routing.order.tolist()  # with k = 1, the tokens sorted by expert
        [1, 0, 2]
        >>> routing.offsets.tolist()  # expert 0 has sorted row 0, expert 1 rows 1 and 2
        [0, 1, 3]
    """

    # (T, k) int64, the chosen experts, best first unless the caller gave the indices; in [0, E)
    # for masked tokens too
    indices: Tensor
    # (T, k) float32 or float64, 0 for masked tokens; carries the router's gradient
    weights: Tensor
    # (S, E) int64, the number of assignments of unmasked tokens to each expert in each segment
    counts: Tensor
    # () in the dtype of weights; not multiplied by a coefficient
    balance_loss: Tensor
    # () in the dtype of weights; not multiplied by a coefficient
    z_loss: Tensor
    # () in the dtype of weights; not multiplied by a coefficient
    entropy: Tensor
    # (T*k,) int32, the assignment in each sorted row; assignment t * k + j is choice j of token t
    order: Tensor
    # (T*k,) int32, the sorted row of each assignment, which is the inverse of order
    position: Tensor
    # (E+1,) int32, the first sorted row of each expert, then the number of rows of unmasked tokens
    offsets: Tensor
    # (T*k // 16 + E, 2) int32, expert and first sorted row of each tile of the grouped products;
    # (0, 2) if routing ran without kernels
    tiles: Tensor


def sort_by_expert(
    indices: Tensor,
    mask: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return order, position, offsets and empty tiles (0, 2), in plain PyTorch."""
    expert = indices.flatten().clamp(0, num_experts - 1)
    if mask is not None:
        expert = expert.masked_fill(mask.repeat_interleave(indices.shape[1]), num_experts)
    rows = torch.arange(expert.shape[0], device=expert.device)
    experts = torch.arange(num_experts + 1, device=expert.device)
    if active_exporter() == "onnx":  # ONNX has no stable sort and no searchsorted
        order = (expert * rows.shape[0] + rows).argsort()
        offsets = (expert < experts[:, None]).sum(1, dtype=torch.int32)
    else:
        expert, order = expert.sort(stable=True)
        offsets = torch.searchsorted(expert, experts, out_int32=True)
    position = order.scatter(0, order, rows)
    return order.int(), position.int(), offsets, offsets.new_empty(0, 2)


def _order_shapes(indices: Tensor, mask: Tensor | None, num_experts: int) -> tuple[Tensor, ...]:
    rows = indices.shape[0] * indices.shape[1]
    shapes = (rows,), (rows,), (num_experts + 1,), (rows // 16 + num_experts, 2)
    return tuple(indices.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _sort_shapes(indices: Tensor, mask: Tensor | None, num_experts: int) -> tuple[Tensor, ...]:
    order, position, offsets, _ = _order_shapes(indices, mask, num_experts)
    return order, position, offsets, indices.new_empty((0, 2), dtype=torch.int32)


_SCHEMA = (
    "(Tensor indices, Tensor? mask, int num_experts)"
    " -> (Tensor order, Tensor position, Tensor offsets, Tensor tiles)"
)


@operator(_SCHEMA, _order_shapes, no_products)
def expert_order(*args: Any) -> tuple[Tensor, ...]:
    """Launch the kernels that sort the assignments by expert."""
    from ...kernels.topk_routing.order import order

    with launching(args):
        return order(*args)


@operator(_SCHEMA, _sort_shapes, no_products, devices="all")
def expert_order_composed(*args: Any) -> tuple[Tensor, ...]:
    """Call :func:`sort_by_expert`."""
    return sort_by_expert(*args)


def routing_from_indices(
    indices: Tensor,
    weights: Tensor,
    num_experts: int,
    *,
    token_padding_mask: Tensor | None = None,
) -> Routing:
    """Make a :class:`Routing` from the choices of another router.

    Args:
        indices: (T, k) int64 in [0, E). A row may contain the same expert twice.
        weights: (T, k) floats; weights of masked tokens are replaced by 0.
        num_experts: number of experts E.
        token_padding_mask: (T,) bool, True = ignore.

    Returns:
        The routing, with counts (1, E) and losses 0.

    Raises:
        TypeError: bad input.
        ValueError: bad input. An index out of range raises only on a CPU in eager mode. Elsewhere
            the weight of such an index becomes NaN.
        RuntimeError: ``backend("fused")`` cannot run.

    Examples:
        >>> import torch, mmfused
        >>> probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # a router of your own
        >>> weights, indices = probabilities.topk(2)
        >>> routing = mmfused.routing_from_indices(indices, weights, num_experts=3)
        >>> routing.counts
        tensor([[1, 2, 1]])
        >>> torch.equal(routing.weights, weights)
        True
    """
    op = "routing_from_indices"
    check_tensors(op, indices=indices, weights=weights, token_padding_mask=token_padding_mask)
    if indices.dim() != 2:
        raise ValueError(f"{op}: indices: got shape {tuple(indices.shape)}, expected (tokens, k)")
    if weights.shape != indices.shape:
        raise ValueError(
            f"{op}: weights: got shape {tuple(weights.shape)}, "
            f"expected {tuple(indices.shape)}, as indices has"
        )
    if not weights.is_floating_point():
        raise TypeError(f"{op}: weights: got dtype {weights.dtype}, expected a floating dtype")
    check_indices(op, indices, num_experts)
    check_mask(op, token_padding_mask, indices.shape[0])
    inside = indices.clamp(0, num_experts - 1)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    weights = weights.masked_fill(inside != indices, float("nan"))
    if token_padding_mask is not None:
        weights = weights.masked_fill(token_padding_mask[:, None], 0.0)
    sort = {
        "reference": sort_by_expert,
        "composed": expert_order_composed,
        "fused": expert_order,
    }
    backend = choose(op, indices.device, weights.dtype, None, ("export", "onnx"))
    order, position, offsets, tiles = sort[backend](inside, token_padding_mask, num_experts)
    counts, zero = offsets.diff().long()[None], weights.new_zeros(())
    return Routing(inside, weights, counts, zero, zero, zero, order, position, offsets, tiles)
