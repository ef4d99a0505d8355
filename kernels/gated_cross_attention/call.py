"""The arguments that the launchers of gated cross-attention share, and helpers for launches."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..tiles import OPTIONS, arch_of, cdiv, multiprocessors, upcasts
from .plans import Plan, Tile, plan, power
from .results import Norm, Saved, Weights, index_sizes, is_packed, widths
from .tokens import Rows


def given(tensor: Tensor) -> Tensor | None:
    """Return the tensor, or None if it has no elements."""
    return tensor if tensor.numel() else None


@functools.cache
def tile_options(kernel: Any, tile: Tile) -> dict[str, Any]:
    """Return the sizes of the tile that the kernel takes, and the options of its launch."""
    sizes = {name: size for name, size in asdict(tile).items() if name in kernel.arg_names}
    # A multiprocessor has 65536 registers.
    registers = min(tile.maxnreg, 65536 // (32 * tile.num_warps))
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=registers)
    return sizes | options | OPTIONS


@dataclass
class Call:
    """The arguments of the operator, and values computed from the arguments.

    Masks, biases and norms that are not given are tensors without elements.
    """

    tokens: list[Tensor]  # of side 0 and side 1
    norms: list[Norm]  # of side 0 and side 1
    ignores: list[Tensor]  # (B, N) bool of side 0 and side 1
    lengths: list[Tensor]  # (B,) int of side 0 and side 1
    presents: list[Tensor]  # (B,) bool of side 0 and side 1
    weights: list[Weights]  # of each direction
    heads: int
    gate: str
    indicator: str  # "none", "sample" or "batch"
    missing: str
    pre_norm: bool
    eps: float
    p: float
    seed: Tensor | None

    def __post_init__(self) -> None:
        x = self.tokens[0]
        self.directions: int = len(self.weights)
        self.batch: int = x.shape[0]
        self.dim: int = x.shape[2]
        self.sizes: list[int] = [x.shape[1] for x in self.tokens]  # tokens of a sample
        self.capacities: list[int] = [self.batch * n for n in self.sizes]  # rows at most
        self.inputs: list[int] = [x.shape[2] for x in self.tokens]  # width of each side
        self.head_dim: int = self.dim // self.heads
        self.widths: tuple[int, int] = widths(self.directions, self.dim)
        self.masks: list[Tensor] = [*self.ignores, *self.lengths, *self.presents]
        self.is_packed: bool = is_packed(self.tokens, self.masks)
        self.has_holes: bool = any(x.numel() for x in self.ignores)
        self.plan: Plan = plan(
            self.dim,
            self.inputs[1],
            self.head_dim,
            x.dtype,
            arch_of(x),
            self.p > 0,
            self.directions == 2,
        )
        self.multiprocessors: int = multiprocessors(x)
        self.upcast: bool = upcasts(x.dtype)

    def weights_of(self, side: int) -> tuple[Weights | None, Weights | None]:
        """Return the weights of the direction that has the side's queries, and of the other one.

        A side is projected by its own w_q, and by w_k and w_v of the other direction.
        """
        own, other = (self.weights[i] if i < self.directions else None for i in (side, 1 - side))
        return own, other

    def rows(self, saved: Saved, side: int) -> Rows:
        """Return the rows of one side."""
        if not self.is_packed:
            return Rows(self.batch, self.sizes[side], None, None, None, None)
        start, keys, token, _ = self.index(saved, side)
        return Rows(self.batch, self.sizes[side], start, token, keys, saved.present[side])

    def index(self, saved: Saved, side: int) -> list[Tensor]:
        """Return the parts of an index: start, keys and token of Rows, and the row of each token.

        The row is -1 for tokens that are not rows.
        """
        sizes = index_sizes(self.batch, self.capacities[side])
        return list(saved.index[side].split(sizes))

    def place(self, saved: Saved, side: int) -> Tensor | None:
        """Return the row of each token, or None if row r is token r."""
        return self.index(saved, side)[3] if self.is_packed else None

    def packed_tokens(self, saved: Saved, side: int) -> Tensor:
        """Return the tokens of the rows."""
        packed = saved.packed[side]
        return packed if packed.numel() else self.tokens[side]

    def attention_constants(self) -> dict[str, Any]:
        """Return the constants of the kernels that compute attention."""
        two_way = self.directions == 2
        return dict(
            H=self.heads,
            DH=self.head_dim,
            WQ=self.widths[0],
            WK=self.widths[1],
            FIRST_KEY=self.dim if two_way else 0,
            BH=power(self.head_dim),
            DROPOUT=self.seed is not None,
            HOLES=self.has_holes,
            UPCAST=self.upcast,
        )

    def all_keys(self, side: int) -> int:
        """Return the size of a tile that holds all tokens of a sample; 0 if that is too large."""
        size = power(self.sizes[side])
        return size if size <= self.plan.most_keys else 0

    def programs(self, tile: Tile, blocks: list[int], depth: int) -> int:
        """Return the number of programs of a product, which walk over the tiles of both sides.

        ``blocks`` are the blocks of columns of each side or direction, ``depth`` is the number of
        terms of each sum. If the tile holds all terms, a program keeps its part of the weight.
        """
        tiles = sum(
            cdiv(rows, tile.BM) * n
            for rows, n in zip(self.capacities, blocks, strict=False)  # one or two directions
        )
        programs = min(tiles, self.multiprocessors * tile.residents)
        return programs if tile.BK < depth else max(programs, *blocks)

    def row_programs(self, rows: int, BM: int) -> int:
        """Return the number of programs that compute BM whole rows each.

        It is not a multiple of 16, for which Triton would recompile: one program more does nothing.
        """
        programs = cdiv(rows, BM)
        return programs + 1 if programs % 16 == 0 else programs


def padded(values: list[Any], absent: Any) -> list[Any]:
    """Return a list of two; a second direction that does not exist is ``absent``."""
    return values if len(values) == 2 else [*values, absent]


def bytes_of(mask: Tensor) -> Tensor | None:
    """Return a bool mask as bytes, or None if it is not given."""
    return mask.view(torch.uint8) if mask.numel() else None
