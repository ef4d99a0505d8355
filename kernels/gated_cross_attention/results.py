"""The tensors that the launchers of gated cross-attention pass to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The weights and biases of one direction, or their gradients; empty if not given."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    w_g: Tensor
    b_q: Tensor
    b_k: Tensor
    b_v: Tensor
    b_o: Tensor
    b_g: Tensor

    @classmethod
    def of(cls, flat: list[Tensor]) -> list[Weights]:
        """Return the weights of each direction."""
        count = len(cls._fields)
        return [cls(*flat[i : i + count]) for i in range(0, len(flat), count)]


class Norm(NamedTuple):
    """Weight and bias of a side's LayerNorm, or their gradients; empty if not given."""

    gamma: Tensor
    beta: Tensor


class Saved(NamedTuple):
    """Saved tensors: two sides first, then as many directions as there are (one or two).

    R rows of a side have room for all of its B N tokens. What is not needed has no elements.
    """

    index: list[Tensor]  # int32: the pointers of tokens.Rows, and the row of each token
    present: list[Tensor]  # (B,) float32: see tokens.Rows
    packed: list[Tensor]  # (R, D): the tokens of the rows; empty if these are the tokens given
    moments: list[Tensor]  # (2, R) float32: mean and 1 / standard deviation, with pre-norm
    folded: list[Tensor]  # (W, D): the weights of all projections, with the LayerNorm's weight
    projected: list[Tensor]  # (R, W): queries, keys and values
    attended: list[Tensor]  # (R, D): the attention's result, before W_o
    lse: list[Tensor]  # (H, R) float32: log-sum-exp of each row of logits, divided by the scale
    attn_out: list[Tensor]  # (R, D): A
    logits: list[Tensor]  # (R, D): z of a gate per channel
    gate: list[Tensor]  # (D, 2 D): W_g of a gate per channel, without the indicator's column
    out_moments: list[Tensor]  # (2, R) float32: as moments, of the LayerNorm of the output

    def flat(self) -> list[Tensor]:
        """Return all tensors in one list."""
        return [tensor for tensors in self for tensor in tensors]

    @classmethod
    def of(cls, flat: list[Tensor], directions: int) -> Saved:
        """Return the inverse of :meth:`flat`."""
        fields, taken = [], 0
        for name in cls._fields:
            count = 2 if name in SIDES else directions
            fields.append(list(flat[taken : taken + count]))
            taken += count
        return cls(*fields)


@dataclass
class Gradients:
    """The gradients, and what leads to them; all but ``outs`` and ``tokens`` hold packed rows."""

    outs: list[Tensor]  # (B, N, D) of each direction
    tokens: list[Tensor]  # (B, N, D) of each side
    norms: list[Norm]
    weights: list[Weights]
    logits: list[Tensor]  # dz of each direction: (R, D), (R, 1), or empty without a gate
    output: list[Tensor]  # dy (R, D) of each direction, before dropout
    direct: list[Tensor]  # (R, D) of each direction: the tokens' without the projections' part
    norm_sums: list[Tensor]  # (2, partials, D) float32 of each direction, for post-norm
    factors: list[Tensor]  # (R, FACTORS) of each direction; empty if each indicator is 1


SIDES = Saved._fields[: Saved._fields.index("attended")]


def is_packed(tokens: list[Tensor], masks: list[Tensor]) -> bool:
    """Return whether some tokens may not be rows: masks are given, or a side has no tokens."""
    batch = tokens[0].shape[0]
    return batch > 0 and (any(x.numel() for x in masks) or not all(x.shape[1] for x in tokens))


def index_sizes(batch: int, rows: int) -> list[int]:
    """Return the sizes of the parts of an index: start, keys, token, and the row of each token.

    They are multiples of 4, so that all parts are aligned to 16 bytes. Otherwise Triton would
    compile the kernels once more for batches that are not.
    """
    return [(size + 3) // 4 * 4 for size in (batch + 1, batch, rows, rows)]


def widths(directions: int, dim: int) -> tuple[int, int]:
    """Return the width of the projections of each side.

    With one direction, side 0 has queries, and side 1 has keys and values. With two directions,
    each side has queries, keys and values.
    """
    return (3 * dim, 3 * dim) if directions == 2 else (dim, 2 * dim)


def empty_results(
    tokens: list[Tensor],
    masks: list[Tensor],
    directions: int,
    heads: int,
    gate: str,
    pre_norm: bool,
) -> tuple[list[Tensor], Saved]:
    """Return the outputs and what is saved, not yet computed."""
    like = tokens[0]
    batch, _, dim = like.shape
    capacities = [x.shape[0] * x.shape[1] for x in tokens]
    queries = list(zip(tokens, capacities, strict=True))[:directions]
    packs = is_packed(tokens, masks)

    def empty(*shape: int, dtype: torch.dtype = like.dtype, when: bool = True) -> Tensor:
        return like.new_empty(shape if when else (0,), dtype=dtype)

    float32, int32 = torch.float32, torch.int32
    sizes = list(zip(tokens, capacities, widths(directions, dim), strict=True))
    saved = Saved(
        index=[
            empty(sum(index_sizes(batch, rows)), dtype=int32, when=packs) for rows in capacities
        ],
        present=[empty(batch, dtype=float32, when=packs) for _ in tokens],
        packed=[
            empty(rows, x.shape[2], when=packs or not x.is_contiguous()) for x, rows, _ in sizes
        ],
        moments=[empty(2, rows, dtype=float32, when=pre_norm) for rows in capacities],
        folded=[empty(width, x.shape[2]) for x, _, width in sizes],
        projected=[empty(rows, width) for _, rows, width in sizes],
        attended=[empty(rows, dim) for _, rows in queries],
        lse=[empty(heads, rows, dtype=float32) for _, rows in queries],
        attn_out=[empty(rows, dim) for _, rows in queries],
        logits=[empty(rows, dim, when=gate == "channel") for _, rows in queries],
        gate=[empty(dim, 2 * dim, when=gate == "channel") for _ in queries],
        out_moments=[empty(2, rows, dtype=float32, when=not pre_norm) for _, rows in queries],
    )
    return [empty(*x.shape) for x, _ in queries], saved
