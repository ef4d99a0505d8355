"""Tokens by expert: the permutation that :func:`mmfused.grouped_linear` works through, and routings
that were made elsewhere.

An assignment is one choice of one token, numbered t * k + j. Sorted by expert, then by number, the
assignments are the rows of the grouped products; those of masked tokens come last and belong to
nobody."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...flops import no_products
from ...library import check_tensors, check_value, choose, graph_made, register, register_composed


class Routing(NamedTuple):
    """Where T tokens go: what :func:`topk_routing` returns and the grouped products take. S
    segments, E experts, k choices.
    """

    indices: Tensor  # (T, k) int64, the chosen experts, best first; of a masked token valid too, but without effect
    weights: Tensor  # (T, k) float32 or float64, 0 for masked tokens; carries the router's gradient
    counts: Tensor  # (S, E) int64, how many assignments of a segment went to an expert
    balance_loss: Tensor  # () of the weights' dtype; no coefficient inside
    z_loss: Tensor  # ()
    entropy: Tensor  # ()
    order: Tensor  # (T*k,) int32, the assignment in each sorted row
    position: Tensor  # (T*k,) int32, the sorted row of each assignment: the inverse of order
    offsets: Tensor  # (E+1,) int32, the first sorted row of each expert; the last: how many rows there are without masked ones
    tiles: Tensor  # (T*k // 16 + E, 2) int32, expert and first row of each tile of the kernels; (0, 2) where no kernel made it


def sort_by_expert(
    indices: Tensor,
    mask: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, position, offsets and no tiles, in plain PyTorch: no shape depends on what the indices
    are.
    """
    expert = indices.flatten().clamp(0, num_experts - 1)
    if mask is not None:
        expert = expert.masked_fill(mask.repeat_interleave(indices.shape[1]), num_experts)
    rows, experts = (
        torch.arange(n, device=expert.device) for n in (expert.shape[0], num_experts + 1)
    )
    if graph_made() == "onnx":  # it knows no stable sort and no searchsorted
        order = (expert * rows.shape[0] + rows).argsort()
        offsets = (expert < experts[:, None]).sum(1, dtype=torch.int32)
    else:
        expert, order = expert.sort(stable=True)
        offsets = torch.searchsorted(expert, experts, out_int32=True)
    position = order.scatter(0, order, rows)
    return order.int(), position.int(), offsets, offsets.new_empty(0, 2)


def _fake_order(indices, mask, num_experts):
    rows = indices.shape[0] * indices.shape[1]
    shapes = (rows,), (rows,), (num_experts + 1,), (rows // 16 + num_experts, 2)
    return tuple(indices.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _fake_sort(indices, mask, num_experts):
    return *_fake_order(indices, mask, num_experts)[:3], indices.new_empty(
        (0, 2), dtype=torch.int32
    )


_SCHEMA = "(Tensor indices, Tensor? mask, int num_experts) -> (Tensor order, Tensor position, Tensor offsets, Tensor tiles)"


def _launch_order(*args):
    from ...kernels import topk_routing as kernels

    return kernels.order(*args)


register("expert_order", _SCHEMA, _launch_order, _fake_order, no_products)
register_composed("expert_order_composed", _SCHEMA, sort_by_expert, _fake_sort, no_products)


def routing_from_indices(
    indices: Tensor,
    weights: Tensor,
    num_experts: int,
    *,
    token_padding_mask: Tensor | None = None,
) -> Routing:
    """The :class:`Routing` of choices that another router made: indices (T, k) int64 in [0, E),
    weights (T, k) floats.

    Weights of padded tokens (token_padding_mask (T,) bool, True = ignore) count as 0. ``counts``
    has one segment; the losses are 0. An index may stand in a row twice. One out of range raises on
    a CPU; on CUDA, where nothing may wait, its weight becomes NaN, and so does what its token gets.
    """
    op = "routing_from_indices"
    check_tensors(op, indices=indices, weights=weights, token_padding_mask=token_padding_mask)
    if indices.dim() != 2 or weights.shape != indices.shape:
        raise ValueError(
            f"{op}: indices and weights have shapes {tuple(indices.shape)} and {tuple(weights.shape)}; they take (T, k)."
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
    indices = inside
    ops = torch.ops.mmfused
    sort = dict(
        reference=sort_by_expert, composed=ops.expert_order_composed, fused=ops.expert_order
    )
    chosen = choose(op, indices.device, weights.dtype, None, ("export", "onnx"))
    order, position, offsets, tiles = sort[chosen](indices, token_padding_mask, num_experts)
    counts, zero = offsets.diff().long()[None], weights.new_zeros(())
    return Routing(indices, weights, counts, zero, zero, zero, order, position, offsets, tiles)


def check_indices(op: str, indices: Tensor, num_experts: int) -> None:
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices: got dtype {indices.dtype}, expected torch.int64")
    check_value(
        lambda: ((indices >= 0) & (indices < num_experts)).all(),
        f"{op}: indices holds a value outside [0, {num_experts}); it takes numbers of experts.",
    )


def check_mask(op: str, mask: Tensor | None, tokens: int) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: token_padding_mask: got dtype {mask.dtype}, expected torch.bool, True = ignore the token"
        )
    if mask is not None and mask.shape != (tokens,):
        raise ValueError(
            f"{op}: token_padding_mask: got shape {tuple(mask.shape)}, expected ({tokens},)"
        )
