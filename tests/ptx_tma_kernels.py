"""Triton kernels with tensor descriptors, for tests of the PTX machine."""

import triton
import triton.language as tl


@triton.jit
def project_kernel(
    x_desc,
    w_ptr,
    bias_ptr,
    rstd_ptr,
    out_desc,
    rows,
    D: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out = rstd * (x @ w.T) + bias.

    Each program keeps C of the weight's rows, and goes through all tiles of x that are its share.
    x (rows, D), w (PARTS * C, D), bias (PARTS * C), rstd (rows), out (rows, PARTS * C).
    """
    part = tl.program_id(0) % PARTS
    cols, k = part * C + tl.arange(0, C), tl.arange(0, D)
    w = tl.load(w_ptr + cols[None, :] * D + k[:, None])
    bias = tl.load(bias_ptr + cols)
    BLOCK: tl.constexpr = x_desc.block_shape[0]
    tiles = tl.cdiv(rows, BLOCK)
    for tile in tl.range(tl.program_id(0) // PARTS, tiles, tl.num_programs(0) // PARTS):
        x = x_desc.load([tile * BLOCK, 0])
        row = tile * BLOCK + tl.arange(0, BLOCK)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        out = tl.dot(x, w) * rstd[:, None] + bias
        out_desc.store([tile * BLOCK, part * C], out.to(out_desc.dtype))


@triton.jit
def matmul_kernel(a_desc, b_desc, out_desc, K):
    """out = a @ b, a tile of out in each program; b is stored transposed."""
    BM: tl.constexpr = a_desc.block_shape[0]
    BK: tl.constexpr = a_desc.block_shape[1]
    BN: tl.constexpr = b_desc.block_shape[0]
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK):
        acc = tl.dot(a_desc.load([row, k]), b_desc.load([col, k]).T, acc)
    out_desc.store([row, col], acc.to(out_desc.dtype))


@triton.jit
def sum_kernel(x_desc, out_desc, KIND: tl.constexpr):
    """Reduce the tiles of x (tiles, rows, cols) into out (rows, cols), a tile in each program."""
    tile = x_desc.load([tl.program_id(0), 0, 0]).reshape(out_desc.block_shape)
    if KIND == "add":
        out_desc.atomic_add([0, 0], tile)
    elif KIND == "min":
        out_desc.atomic_min([0, 0], tile)
    else:
        out_desc.atomic_max([0, 0], tile)


@triton.jit
def shift_kernel(x_desc, out_ptr, y, x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Copy the tile that starts at (y, x)."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)
    tl.store(out_ptr + at, x_desc.load([y, x]))


@triton.jit
def transpose_kernel(x_ptr, out_ptr, rows, cols, BLOCK: tl.constexpr):
    """out = x.T, with tensor descriptors that the kernel makes."""
    x_desc = tl.make_tensor_descriptor(x_ptr, [rows, cols], [cols, 1], [BLOCK, BLOCK])
    out_desc = tl.make_tensor_descriptor(out_ptr, [cols, rows], [rows, 1], [BLOCK, BLOCK])
    row, col = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    out_desc.store([col, row], x_desc.load([row, col]).T)
