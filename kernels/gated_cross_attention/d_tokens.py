"""Backward of the projections and the norm: from d_projected to the gradient of the tokens.

The projections' weights W' are multiplied by the norm's weight (see prepare.py), so the gradient of
the normalised rows is dn = d_projected W', and

    dx = dx_part + rstd (dn - mean(dn) - xhat mean(dn xhat))

where xhat are the normalised rows. Up to 256 channels, d_tokens_kernel computes all of it, on tiles
of whole rows. With more channels, such tiles do not fit into registers. Then d_normed_kernel
(products.py) computes dn, and d_tokens_rows_kernel the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import rounded_product
from .tokens import add_product, count_rows, load_tile, store_tile, tokens_of


class TokenSide(NamedTuple):
    """One side of d_tokens_kernel, or of d_tokens_rows_kernel, which reads dn."""

    d_projected_ptr: Tensor | None  # (capacity, W)
    weight_ptr: Tensor | None  # (W, D): the projections' weights times the norm's weight
    dn_ptr: Tensor | None  # (capacity, D)
    x_ptr: Tensor | None
    moments_ptr: Tensor | None  # mean and rstd (2, capacity) float32; None without pre-norm
    dx_part_ptr: Tensor | None  # (capacity, D); None for a side without queries
    dx_ptr: Tensor | None  # (B, N, D), by token
    normed_ptr: Tensor | None  # (capacity, D): xhat, for the weights' gradients; with pre-norm
    programs: int


@triton.jit
def norm_backward(
    d,
    normed,
    rstd,
    D: tl.constexpr,
):
    """Return the gradient through a norm without weight.

    ``d`` is the gradient of the normalised rows ``normed``, and 0 in columns from D on.
    """
    mean = tl.sum(d, 1) / D
    slope = tl.sum(rounded_product(d, normed), 1) / D
    return (d - mean[:, None] - normed * slope[:, None]) * rstd[:, None]


@triton.jit
def _finish(
    side,
    rows,
    dn_ptr,
    at,
    r,
    ok,
    token,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dx and xhat of whole rows from dn, the rows ``at`` of dn_ptr."""
    cols = tl.arange(0, BN)
    dx = load_tile(dn_ptr, at, ok, cols, D).to(tl.float32)
    if side.dx_part_ptr is not None:
        part = load_tile(side.dx_part_ptr, r, ok, cols, D).to(tl.float32)
    if side.moments_ptr is not None:
        mean = tl.load(side.moments_ptr + r, mask=ok, other=0.0)
        rstd = tl.load(side.moments_ptr + rows.batch * rows.length + r, mask=ok, other=0.0)
        x = load_tile(side.x_ptr, r, ok, cols, D).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None]
        store_tile(side.normed_ptr, normed, r, ok, cols, D)
        dx = norm_backward(dx, normed, rstd, D)
    if side.dx_part_ptr is not None:
        dx += part
    store_tile(side.dx_ptr, dx, token, ok, cols, D)


@triton.jit
def _d_tokens(
    side,
    rows,
    program,
    W: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one side; see d_tokens_kernel."""
    cols = tl.arange(0, BN)
    R = count_rows(rows)
    for block in range(program, tl.cdiv(R, BM), side.programs):
        r = block * BM + tl.arange(0, BM)
        ok = r < R
        dn = tl.zeros([BM, BN], tl.float32)
        dn = add_product(
            dn, side.d_projected_ptr, r, ok, W, side.weight_ptr, cols, D, D, 1, W, BK, UPCAST
        )
        # Row sums of dn would take more registers than there are. So dn goes through dx, which
        # stays in L2, to a loop over fewer rows. No other program reads or writes these rows.
        store_tile(side.dx_ptr, dn, tokens_of(rows, r, ok), ok, cols, D)
        tl.debug_barrier()
        for first in range(block * BM, tl.minimum(block * BM + BM, R), BR):
            part = first + tl.arange(0, BR)
            token = tokens_of(rows, part, part < R)
            _finish(side, rows, side.dx_ptr, token, part, part < R, token, D, BN)


@triton.jit
def d_tokens_kernel(
    first,
    first_rows,
    second,
    second_rows,
    W0: tl.constexpr,
    W1: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dx and xhat from d_projected, BM whole rows at a time; BN is at least D0 and D1.

    Grid (programs of both sides,). Side i has Wi columns of projections and tokens of Di channels.
    The norm's part is computed for BR rows at a time; BR divides BM.
    """
    program = tl.program_id(0)
    if program < first.programs:
        _d_tokens(first, first_rows, program, W0, D0, BM, BN, BK, BR, UPCAST)
    else:
        program -= first.programs
        _d_tokens(second, second_rows, program, W1, D1, BM, BN, BK, BR, UPCAST)


@triton.jit
def _d_tokens_rows(
    side,
    rows,
    program,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute one side; see d_tokens_rows_kernel."""
    R = count_rows(rows)
    for block in range(program, tl.cdiv(R, BM), side.programs):
        r = block * BM + tl.arange(0, BM)
        _finish(side, rows, side.dn_ptr, r, r, r < R, tokens_of(rows, r, r < R), D, BN)


@triton.jit
def d_tokens_rows_kernel(
    first,
    first_rows,
    second,
    second_rows,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dx and xhat from dn, BM whole rows at a time; BN is at least D0 and D1.

    Grid (programs of both sides,). Side i has tokens of Di channels.
    """
    program = tl.program_id(0)
    if program < first.programs:
        _d_tokens_rows(first, first_rows, program, D0, BM, BN)
    else:
        program -= first.programs
        _d_tokens_rows(second, second_rows, program, D1, BM, BN)
