"""Launchers for the gradients of weights, biases and norms."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiles import OPTIONS, arch_of, cdiv, upcasts
from .call import given
from .plans import TRITON, power
from .results import Norm, Weights
from .tokens import Rows
from .weights import Product, weights_kernel
from .weights_finish import (
    Layer,
    NormSums,
    Projections,
    finish_kernel,
    finish_programs,
    norm_kernel,
)

# The number of programs that the splits aim at does not depend on the GPU's multiprocessors, so
# that all GPUs of one architecture add the same partial sums.
PROGRAMS = 132
# A program's work besides its product, as a number of rows; fewer rows are not worth a split.
OVERHEAD = 1000


class ProductTile(NamedTuple):
    """The sizes of weights_kernel's tiles and the options of its launch."""

    BM: int
    BX: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class Operands(NamedTuple):
    """The operands of one product d^T [a | b]."""

    d: Tensor  # (R, C)
    a: Tensor  # (R, K)
    b: Tensor | None = None  # (R, K)


def product_tile(
    all_columns: tuple[int, ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    arch: int,
) -> ProductTile:
    """Return the tile of products of d with these numbers of columns and ``a`` of these widths."""
    columns, width = max(all_columns), max(widths)
    if columns == 1:  # a gate per token; tl.dot needs 16 columns
        if dtype == torch.float32:
            return ProductTile(16, 0, min(128, power(width)), 32, 4, 3)
        # All warps would compute the same 16 rows, so there is one.
        return ProductTile(16, 0, min(64, power(width)), 64, 1, 4)
    if dtype == torch.float32:
        side = 128 if min(columns, width) >= 128 else 64
        return ProductTile(side, 0, side, 16, 8, 2)
    if any(
        size % 8 for size in (*all_columns, *widths)
    ):  # rows are loaded one element at a time, which takes registers
        return ProductTile(64, 0, 64, 32, 4, 2)
    if min(columns, width) <= 64:
        return ProductTile(64, 0, 64, 64, 4, 3)
    if arch not in (90, 100, 103):
        return ProductTile(128, 0, 128, 32, 8, 4)
    # With tcgen05, 256 columns spill.
    BN = 256 if arch == 90 and (width - 1) % 256 >= 128 else 128
    even = all(c % 192 == 0 for c in all_columns) and all(k % BN == 0 for k in widths)
    if arch == 90 and even and TRITON == (3, 8):
        # A larger tile reads less from the L2 cache. It spills if columns need masks, and
        # with other versions of Triton.
        return ProductTile(128, 64, BN, 32, 8, 4)
    return ProductTile(128, 0, BN, 64, 8, 3)


@functools.lru_cache(maxsize=256)
def splits_of(
    rows: tuple[int, int],
    tiles: tuple[int, int],
) -> tuple[int, int]:
    """Return the number of splits of each side's rows, for so many tiles of each side.

    The splits are those with the lowest estimated time: rounds of PROGRAMS programs, times the rows
    of the longest split. A side without tiles gets no splits.
    """
    best, best_cost = (min(1, tiles[0]), min(1, tiles[1])), float("inf")
    limits = [max(1, r // OVERHEAD) if t else 0 for r, t in zip(rows, tiles, strict=True)]
    for rounds in (1, 2, 3, 4):
        for first in range(min(1, limits[0]), limits[0] + 1):
            left = rounds * PROGRAMS - first * tiles[0]
            second = min(left // tiles[1], limits[1]) if tiles[1] else 0
            if left < 0 or (tiles[1] and second < 1):
                break
            longest = max(r / s for r, s in zip(rows, (first, second), strict=True) if s)
            if rounds * (longest + OVERHEAD) < best_cost:
                best, best_cost = (first, second), rounds * (longest + OVERHEAD)
    return best


def sum_products(
    operands: list[Operands | None],
    rows: tuple[Rows, Rows],
    sums: bool,
    indicator: bool,
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[Product]:
    """Launch the product of each side, and return them with their partial sums.

    ``sums``: whether the sums of d are wanted; they are computed with ``indicator`` too.
    """
    given = [x for x in operands if x is not None]
    columns = [x.d.shape[1] if x else 0 for x in operands]
    widths = [x.a.shape[1] if x else 0 for x in operands]
    like = given[0].a
    tile = product_tile(
        tuple(x.d.shape[1] for x in given),
        tuple(x.a.shape[1] for x in given),
        like.dtype,
        arch_of(like),
    )
    tiles = tuple(
        cdiv(c, tile.BM + tile.BX) * cdiv(k, tile.BN) * (2 if x and x.b is not None else 1)
        for c, k, x in zip(columns, widths, operands, strict=True)
    )
    capacities = tuple(len(x.d) if x else 0 for x in operands)
    splits = splits_of(capacities, tiles)
    products = []
    for x, c, k, n, factor in zip(operands, columns, widths, splits, factors, strict=True):
        if x is None:
            products.append(Product())
            continue
        width = k if x.b is None else 2 * k
        products.append(
            Product(
                x.d,
                x.a,
                x.b,
                x.a.new_empty(n, c, width, dtype=torch.float32),
                x.a.new_empty(n, 2, c, dtype=torch.float32) if sums or indicator else None,
                factor if indicator else None,
                n,
            )
        )
    weights_kernel[(sum(n * t for n, t in zip(splits, tiles, strict=True)),)](
        products[0],
        rows[0],
        products[1],
        rows[1],
        C0=max(1, columns[0]),
        K0=max(1, widths[0]),
        C1=max(1, columns[1]),
        K1=max(1, widths[1]),
        INDICATOR=indicator,
        UPCAST=upcasts(like.dtype),
        maxnreg=255,
        **tile._asdict(),
        **OPTIONS,
    )
    return products


class Parameters(NamedTuple):
    """The parameters of one side, and their gradients, which are written.

    What does not exist is None. ``own`` has the side's queries, output projection and gate, and
    ``other`` has the projections of the side to keys and values.
    """

    norm: Norm | None  # before the projections
    d_norm: Norm | None  # before the projections, or after the blend
    own: Weights | None
    other: Weights | None
    d_own: Weights | None
    d_other: Weights | None
    norm_sums: Tensor | None  # (2, partials, D): sums for the norm after the blend
    factors: Tensor | None  # (R, FACTORS) of the gate; None if every context is present


def weight_gradients(
    rows: tuple[Rows, Rows],
    projections: list[Operands],
    outputs: list[Operands | None],
    gates: list[Operands | None],
    parameters: list[Parameters],
    indicator: bool,
) -> None:
    """Compute the gradients of all parameters.

    ``projections``: (d_projected, normed or tokens) of each side. ``outputs``: (dy, attended) and
    ``gates``: (dz, x, attn_out) of each direction, None for a side without one.
    """
    dim = next(x.a.shape[1] for x in outputs if x is not None)
    gradients = [p.d_own for p in parameters if p.d_own]
    biased = any(b.numel() for w in gradients for b in (w.b_q, w.b_k, w.b_v))
    projected = sum_products(
        list(projections), rows, biased or any(p.norm for p in parameters), False
    )
    output = sum_products(outputs, rows, any(w.b_o.numel() for w in gradients), False)
    gate, gate_width = [Product(), Product()], 0
    if any(x is not None for x in gates):
        gate_width = next(x.d.shape[1] for x in gates if x is not None)
        factors = parameters[0].factors, parameters[1].factors
        sums = any(w.b_g.numel() for w in gradients)
        gate = sum_products(gates, rows, sums, indicator, factors)
    BM, BN = 4, min(256, power(dim))
    sides, norms, programs = [], [], 0
    for product, p, x in zip(projected, parameters, projections, strict=True):
        parts, width = x.d.shape[1] // dim, x.a.shape[1]
        norm_sums = p.norm_sums
        if p.norm is not None:
            norm_sums = x.a.new_empty(2, parts * cdiv(dim, BM), width, dtype=torch.float32)
        sides.append(_projections(product, p, norm_sums))
        norms.append(NormSums())
        if norm_sums is not None and p.d_norm is not None:
            norms[-1] = NormSums(norm_sums, norm_sums.shape[1], *p.d_norm)
        programs += finish_programs(parts, dim, width, p.own is not None, gate_width, BM, BN)
    finish_kernel[(programs,)](
        *sides,
        *(
            _layer(x, p.d_own.w_o, p.d_own.b_o) if p.d_own else Layer()
            for x, p in zip(output, parameters, strict=True)
        ),
        *(
            _layer(x, p.d_own.w_g, p.d_own.b_g) if p.d_own and gate_width else Layer()
            for x, p in zip(gate, parameters, strict=True)
        ),
        D=dim,
        K0=projections[0].a.shape[1],
        K1=projections[1].a.shape[1],
        GATE=gate_width,
        INDICATOR=indicator,
        BM=BM,
        BN=BN,
        num_warps=8,
        num_stages=1,
        **OPTIONS,
    )
    if all(norm.partial_ptr is None for norm in norms):
        return
    widths = [1 if x.partial_ptr is None else x.partial_ptr.shape[2] for x in norms]
    norm_kernel[(sum(cdiv(width, 16) for width in widths),)](
        *norms,
        K0=widths[0],
        K1=widths[1],
        BM=64,
        BN=16,
        num_warps=4,
        num_stages=1,
        **OPTIONS,
    )


def _projections(product: Product, p: Parameters, norm_sums: Tensor | None) -> Projections:
    """Return the argument of finish_kernel for the projections of one side."""
    has_norm, q, kv = p.norm is not None, p.d_own, p.d_other
    return Projections(
        partial_ptr=product.partial_ptr,
        sums_ptr=product.sums_ptr,
        splits=product.splits,
        gamma_ptr=p.norm.gamma if p.norm else None,
        beta_ptr=p.norm.beta if p.norm else None,
        norm_ptr=norm_sums if has_norm else None,
        w_q_ptr=p.own.w_q if p.own and has_norm else None,
        w_k_ptr=p.other.w_k if p.other and has_norm else None,
        w_v_ptr=p.other.w_v if p.other and has_norm else None,
        d_w_q_ptr=q.w_q if q else None,
        d_w_k_ptr=kv.w_k if kv else None,
        d_w_v_ptr=kv.w_v if kv else None,
        d_b_q_ptr=given(q.b_q) if q else None,
        d_b_k_ptr=given(kv.b_k) if kv else None,
        d_b_v_ptr=given(kv.b_v) if kv else None,
    )


def _layer(product: Product, d_weight: Tensor, d_bias: Tensor) -> Layer:
    return Layer(product.partial_ptr, product.sums_ptr, product.splits, d_weight, given(d_bias))
