"""The arguments that the launchers of gated cross-attention share, and helpers for launches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..tiles import OPTIONS, arch_of, upcasts
from .plans import Plan, Tile, plan

FIELDS = 10  # w_q, w_k, w_v, w_o, w_g, b_q, b_k, b_v, b_o, b_g of each direction
W_Q, W_K, W_V, W_O, W_G, B_Q, B_K, B_V, B_O, B_G = range(FIELDS)


def both(tensors: list[Tensor]) -> list[Tensor]:
    """Return a list of two tensors; a single tensor is repeated."""
    return tensors if len(tensors) == 2 else tensors * 2


def bits(tensors: list[Tensor]) -> int:
    """Return a number whose bit i is set if tensor i has elements."""
    return sum((tensor.numel() > 0) << i for i, tensor in enumerate(tensors))


def tile_options(kernel: Any, tile: Tile) -> dict[str, Any]:
    """Return the sizes of the tile that the kernel takes, and the options of its launch."""
    sizes = {name: size for name, size in asdict(tile).items() if name in kernel.arg_names}
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg)
    return sizes | options | OPTIONS


@dataclass
class Call:
    """The arguments of the operator, and values computed from the arguments."""

    tokens: list[Tensor]  # of side 0 and side 1
    norms: list[Tensor]  # weight and bias of side 0, then of side 1
    ignores: list[Tensor]  # of side 0 and side 1; without elements if not given
    absents: list[Tensor]  # of side 0 and side 1; without elements if not given
    weights: list[Tensor]  # FIELDS weights and biases of each direction
    flags: list[Tensor]  # the gate's indicator of each direction
    heads: int
    gate: str
    missing: str
    pre_norm: bool
    eps: float
    p: float
    seed: Tensor | None

    def __post_init__(self) -> None:
        self.directions: int = len(self.weights) // FIELDS
        self.batch: int = self.tokens[0].shape[0]
        self.dim: int = self.tokens[0].shape[2]
        self.lengths: list[int] = [x.shape[1] for x in self.tokens]
        self.rows: list[int] = [self.batch * n for n in self.lengths]
        self.head_dim: int = self.dim // self.heads
        self.widths: tuple[int, int] = (
            (3 * self.dim, 3 * self.dim) if self.directions == 2 else (self.dim, 2 * self.dim)
        )
        self.first_key: int = self.dim if self.directions == 2 else 0
        self.mask_bytes: list[Tensor] = [
            x.view(torch.uint8) for x in (*self.ignores, *self.absents)
        ]
        self.strides: list[int] = [x.stride(i) for i in (0, 1) for x in self.tokens]
        x = self.tokens[0]
        self.plan: Plan = plan(
            self.dim, self.tokens[1].shape[-1], self.head_dim, x.dtype, arch_of(x)
        )
        absent = bits(self.absents)
        self.masks: dict[str, Any] = dict(
            IGNORE=bits(self.ignores), ABSENT=absent, MISSING=self.missing
        )
        self.given: dict[str, Any] = dict(**self.masks, UPCAST=upcasts(x.dtype))
        self.collapse: bool = self.missing == "constant" and self.p == 0 and absent != 0
        self.indicator: bool = self.gate != "none" and self.weights[W_G].shape[1] > 2 * self.dim

    def of(self, field: int) -> list[Tensor]:
        """Return one weight or bias of both directions."""
        return both(self.weights[field::FIELDS])

    def norm(self, part: int) -> list[Tensor]:
        """Return the norms' weights (0) or biases (1) of both sides."""
        return self.norms[part::2]

    def parts(self, side: int) -> list[tuple[int, int]]:
        """Return (direction, W_Q, W_K or W_V) of each projection of a side.

        A side is projected to the queries of its own direction, then to keys and values of the
        other direction.
        """
        queries = [(side, W_Q)] if side < self.directions else []
        return queries + ([(1 - side, W_K), (1 - side, W_V)] if 1 - side < self.directions else [])

    def parameter(self, direction: int, field: int) -> Tensor:
        """Return one weight or bias of a direction."""
        return self.weights[FIELDS * direction + field]

    def partials(self, rows: int) -> int:
        """Return the number of programs that share the rows, at least 1 even without rows."""
        return max(1, min(self.plan.partials, triton.cdiv(rows, self.plan.rows.BM)))

    def row_blocks(self, height: int) -> int:
        """Return the number of blocks of ``height`` rows on the query side with the most rows."""
        return triton.cdiv(max(self.rows[: self.directions]), height)
