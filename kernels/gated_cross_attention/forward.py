"""Forward of gated cross-attention: its launchers, and the kernel of the projections.

For the equations see mmfused/ops/gated_cross_attention/reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot, rounded_product
from . import attend, blend, block
from .call import B_G, B_O, B_Q, FIELDS, W_G, W_O, W_Q, Call, bits, both, tile_options
from .plans import Tile, power, tile_of_block_form
from .tokens import any_of, attends, pick, tile_at, valid_keys


def forward(
    tokens: list[Tensor],
    norms: list[Tensor],
    ignores: list[Tensor],
    absents: list[Tensor],
    weights: list[Tensor],
    flags: list[Tensor],
    num_heads: int,
    gate: str,
    missing: str,
    pre_norm: bool,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """Return the tensors outs, projected, moments, attended, lse and attn_out in one list."""
    call = Call(
        tokens,
        norms,
        ignores,
        absents,
        weights,
        flags,
        num_heads,
        gate,
        missing,
        pre_norm,
        norm_eps,
        dropout_p,
        dropout_seed,
    )
    block_tile = tile_of_block_form(call.plan, call.dim, call.heads)
    queries = tokens[: call.directions]
    outs, attended, attn_out = ([x.new_empty(x.shape) for x in queries] for _ in range(3))
    projected = [
        x.new_empty(*x.shape[:2], width) for x, width in zip(tokens, call.widths, strict=True)
    ]
    moments = [x.new_empty(2, *x.shape[:2], dtype=torch.float32) for x in tokens]
    lse = [x.new_empty(x.shape[0], num_heads, x.shape[1], dtype=torch.float32) for x in queries]
    # Aligned copies of W_g for the kernels, see _pack_row.
    packs = gate == "channel" and call.indicator
    packed = (
        [x.new_empty(call.dim, 2 * call.dim) for x in queries]
        if packs
        else call.weights[W_G::FIELDS]
    )
    for side in (0, 1):
        _project(
            call,
            side,
            projected[side],
            moments[side],
            packed[side] if packs and side < call.directions else None,
        )
    if block_tile is None:
        _attend(call, projected, attended, lse)
        _blend(call, attended, lse, packed, attn_out, outs, moments)
    else:
        _block(call, block_tile, projected, attended, lse, packed, attn_out, outs, moments)
    return [*outs, *projected, *moments, *attended, *lse, *attn_out]


def _project(
    call: Call,
    side: int,
    out: Tensor,
    moments: Tensor,
    packed: Tensor | None,
) -> None:
    """Project one side; if ``packed`` is given, copy W_g without its last column to it."""
    x, tile = call.tokens[side], call.plan.project
    parts = call.parts(side)
    weights = [call.parameter(*part) for part in parts]
    biases = [call.parameter(direction, field - W_Q + B_Q) for direction, field in parts]
    fill = 3 - len(parts)
    blocks = triton.cdiv(call.rows[side], tile.BM) * len(parts)
    gate = weights[0] if packed is None else call.parameter(side, W_G)
    project_kernel[(blocks + (0 if packed is None else call.dim),)](
        x,
        *weights,
        *weights[:1] * fill,
        *biases,
        *biases[:1] * fill,
        *call.norms[2 * side : 2 * side + 2],
        out,
        moments,
        gate,
        out if packed is None else packed,
        *call.mask_bytes,
        call.rows[side],
        call.lengths[side],
        blocks,
        x.stride(0),
        x.stride(1),
        call.eps,
        SIDE=side,
        PARTS=len(parts),
        IS_QUERY_SIDE=side < call.directions,
        BIAS=bits(biases),
        NORM=call.pre_norm,
        C=call.dim,
        D=x.shape[-1],
        **call.given,
        **tile_options(project_kernel, tile),
    )


def _attend(
    call: Call,
    projected: list[Tensor],
    attended: list[Tensor],
    lse: list[Tensor],
) -> None:
    tile = call.plan.attend
    tiles = triton.cdiv(max(call.lengths[: call.directions]), tile.BM)
    attend.attend_kernel[(call.directions * call.batch * call.heads * tiles,)](
        *projected,
        *both(attended),
        *both(lse),
        *call.mask_bytes,
        call.seed,
        call.batch,
        *call.lengths,
        tiles,
        call.head_dim**-0.5,
        call.p,
        **_attention_constants(call),
        **call.given,
        **tile_options(attend.attend_kernel, tile),
    )


def _attention_constants(call: Call) -> dict:
    """Return the constants of the kernels that compute attention."""
    return dict(
        H=call.heads,
        DH=call.head_dim,
        WQ=call.widths[0],
        WK=call.widths[1],
        FIRST_KEY=call.first_key,
        BH=power(call.head_dim),
        COLLAPSE=call.collapse,
        DROPOUT=call.p > 0,
    )


def _gate_constants(call: Call) -> dict:
    """Return the constants of the kernels that compute the gate and the output."""
    biased = bits(call.weights[B_G::FIELDS])
    return dict(
        GATE=call.gate,
        INDICATOR=call.indicator,
        POSTNORM=not call.pre_norm,
        BIAS_G=biased,
        D=call.dim,
    )


def _block(
    call: Call,
    tile: Tile,
    projected,
    attended,
    lse,
    packed,
    attn_out,
    outs,
    moments,
) -> None:
    tiles = triton.cdiv(max(call.lengths[: call.directions]), tile.BM)
    block.block_kernel[(call.directions * call.batch * tiles,)](
        *projected,
        *call.tokens,
        *both(attended),
        *both(attn_out),
        *both(outs),
        *both(lse),
        *call.of(W_O),
        *call.of(B_O),
        *both(packed),
        *call.of(W_G),
        *call.of(B_G),
        *both(call.flags),
        *call.norm(0),
        *call.norm(1),
        *moments,
        *call.mask_bytes,
        call.seed,
        call.batch,
        *call.lengths,
        *call.strides,
        tiles,
        call.head_dim**-0.5,
        call.eps,
        call.p,
        BIAS_O=bits(call.weights[B_O::FIELDS]),
        BD=power(call.dim),
        **_attention_constants(call),
        **_gate_constants(call),
        **call.given,
        **tile_options(block.block_kernel, tile),
    )


def _blend(
    call: Call,
    attended,
    lse,
    packed,
    attn_out,
    outs,
    moments,
) -> None:
    norms = (*call.norm(0), *call.norm(1), *moments)
    sizes = (call.batch, *call.lengths, *call.strides, call.eps)

    def run(tile, read, blended):
        columns = 1 if read and blended else triton.cdiv(call.dim, tile.BN)
        blend.blend_kernel[(call.row_blocks(tile.BM) * columns, call.directions)](
            *call.tokens,
            *both(attended),
            *both(attn_out),
            *both(outs),
            *both(lse),
            *call.of(W_O),
            *call.of(B_O),
            *both(packed),
            *call.of(W_G),
            *call.of(B_G),
            *both(call.flags),
            *norms,
            *call.mask_bytes,
            call.seed,
            *sizes,
            call.p,
            READ=read,
            BLEND=blended,
            H=call.heads,
            BIAS_O=bits(call.weights[B_O::FIELDS]),
            DROPOUT=call.p > 0,
            **_gate_constants(call),
            **call.given,
            **tile_options(blend.blend_kernel, tile),
        )

    if call.plan.together is not None:
        return run(call.plan.together, True, True)
    run(call.plan.product, True, False)
    if call.gate == "channel":
        return run(call.plan.product, False, True)
    tile = call.plan.rows
    blend.blend_rows_kernel[(call.row_blocks(tile.BM), call.directions)](
        *call.tokens,
        *both(attn_out),
        *both(outs),
        *call.of(W_G),
        *call.of(B_G),
        *both(call.flags),
        *norms,
        *call.mask_bytes,
        *sizes,
        **_gate_constants(call),
        **call.masks,
        **tile_options(blend.blend_rows_kernel, tile),
    )


# ---- projections of one side: LN(x) W^T + b -----------------------------------------------------
#
# A side is projected to the queries of its own direction, and to keys and values of the other.


@triton.jit
def _moments(
    x_ptr,
    at,
    ok,
    eps,
    D: tl.constexpr,
    BK: tl.constexpr,
):
    """Return mean and 1 / standard deviation of each row.

    The row is read twice, the second time from the cache.
    """
    total = tl.zeros([at.shape[0]], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(
            x_ptr + at[:, None] + k[None, :], mask=ok[:, None] & (k[None, :] < D), other=0.0
        )
        total += tl.sum(x.to(tl.float32), 1)
    mean = total / D
    total = tl.zeros([at.shape[0]], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        inside = ok[:, None] & (k[None, :] < D)
        x = tl.load(x_ptr + at[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        total += tl.sum(rounded_product(centred, centred), 1)
    return mean, 1.0 / tl.sqrt(total / D + eps)


@triton.jit
def _load_normed(
    x_ptr,
    at,
    ok,
    k,
    mean,
    rstd,
    gamma_ptr,
    beta_ptr,
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """Load the columns k of x, or of LN(x) with NORM, in x's dtype; 0 in rows that are not ok."""
    inside = ok[:, None] & (k[None, :] < D)
    x = tl.load(x_ptr + at[:, None] + k[None, :], mask=inside, other=0.0)
    if NORM:
        gamma = tl.load(gamma_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        x = tl.where(ok[:, None], normed, 0.0).to(x.dtype)
    return x


@triton.jit
def _load_weight(
    w_ptr,
    cols,
    k,
    COLS: tl.constexpr,
    D: tl.constexpr,
):
    """Load (k, columns) of a weight (COLS, D), transposed."""
    return tl.load(
        w_ptr + cols[None, :] * D + k[:, None],
        mask=(cols[None, :] < COLS) & (k[:, None] < D),
        other=0.0,
    )


@triton.jit
def _pack_row(
    w_ptr,
    packed_ptr,
    row,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """Copy a row of W_g without its last column.

    Rows of 2 D + 1 numbers are unaligned, and could only be loaded one number at a time.
    """
    for start in range(0, 2 * D, BN):
        cols = start + tl.arange(0, BN)
        values = tl.load(w_ptr + row * (2 * D + 1) + cols, mask=cols < 2 * D, other=0.0)
        tl.store(packed_ptr + row * (2 * D) + cols, values, mask=cols < 2 * D)


@triton.jit
def project_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    moments_ptr,
    gate_ptr,
    packed_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    R,
    N,
    blocks,
    stride_b,
    stride_n,
    eps,
    SIDE: tl.constexpr,
    PARTS: tl.constexpr,
    IS_QUERY_SIDE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project BM rows of x by one of PARTS weights (C, D); grid (R / BM * PARTS [+ rows of W_g],).

    With IS_QUERY_SIDE, the first weight is that of the queries. Masked rows are not read, and their
    results are 0. Rows of samples that do not attend are not written. The last programs pack W_g.
    """
    pid = tl.program_id(0)
    if pid >= blocks:
        _pack_row(gate_ptr, packed_ptr, pid - blocks, C, BN)
    else:
        masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
        part = pid % PARTS
        queries = (part == 0) & IS_QUERY_SIDE
        r = pid // PARTS * BM + tl.arange(0, BM)
        b = r // N
        stored = attends(pick(queries, 1 - SIDE, SIDE), b, r < R, masks, ABSENT, MISSING)
        ok = valid_keys(SIDE, r, stored, masks, IGNORE)
        if any_of(stored):
            at = b.to(tl.int64) * stride_b + (r % N).to(tl.int64) * stride_n
            limit = D
            if IGNORE != 0:
                limit = tl.where(any_of(ok), D, 0)
            mean = tl.zeros([BM], tl.float32)
            rstd = tl.zeros([BM], tl.float32)
            if NORM:
                mean, rstd = _moments(x_ptr, at, ok, eps, D, BK)
                tl.store(moments_ptr + r, mean, mask=ok)
                tl.store(moments_ptr + R + r, rstd, mask=ok)
            w_ptr = pick(part == 1, pick(part == 2, w0_ptr, w2_ptr), w1_ptr)
            b_ptr = pick(part == 1, pick(part == 2, b0_ptr, b2_ptr), b1_ptr)
            biased = ((BIAS >> part) & 1) * C
            if BK >= D:
                normed = _load_normed(
                    x_ptr, at, ok, tl.arange(0, BK), mean, rstd, gamma_ptr, beta_ptr, D, NORM
                )
            for first in range(0, C, BN):
                cols = first + tl.arange(0, BN)
                acc = tl.zeros([BM, BN], tl.float32)
                if BK >= D:
                    acc = dot(
                        normed, _load_weight(w_ptr, cols, tl.arange(0, BK), C, D), acc, UPCAST
                    )
                else:
                    for start in range(0, limit, BK):
                        k = start + tl.arange(0, BK)
                        a = _load_normed(x_ptr, at, ok, k, mean, rstd, gamma_ptr, beta_ptr, D, NORM)
                        acc = dot(a, _load_weight(w_ptr, cols, k, C, D), acc, UPCAST)
                bias = tl.load(b_ptr + cols, mask=cols < biased, other=0.0).to(tl.float32)
                acc = tl.where(ok[:, None], acc + bias[None, :], 0.0)
                tl.store(
                    out_ptr + tile_at(r, part * C + cols, PARTS * C),
                    acc,
                    mask=stored[:, None] & (cols[None, :] < C),
                )
