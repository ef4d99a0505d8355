"""A baseline: the end of a gate, sigmoid(z) read + sigmoid(-z) x, as one elementwise Triton kernel
each way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _forward(x_ptr, read_ptr, z_ptr, out_ptr, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    read = tl.load(read_ptr + at, mask=inside).to(tl.float32)
    z = tl.load(z_ptr + at, mask=inside).to(tl.float32)
    tl.store(out_ptr + at, tl.sigmoid(z) * read + tl.sigmoid(-z) * x, mask=inside)


@triton.jit
def _backward(
    d_ptr,
    x_ptr,
    read_ptr,
    z_ptr,
    dx_ptr,
    d_read_ptr,
    dz_ptr,
    total,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    d = tl.load(d_ptr + at, mask=inside).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    read = tl.load(read_ptr + at, mask=inside).to(tl.float32)
    z = tl.load(z_ptr + at, mask=inside).to(tl.float32)
    g, rest = tl.sigmoid(z), tl.sigmoid(-z)
    tl.store(dx_ptr + at, d * rest, mask=inside)
    tl.store(d_read_ptr + at, d * g, mask=inside)
    tl.store(dz_ptr + at, d * (read - x) * g * rest, mask=inside)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, read, z):
        x, read, z = (y.contiguous() for y in (x, read, z))
        ctx.save_for_backward(x, read, z)
        out = torch.empty_like(x)
        _forward[(triton.cdiv(x.numel(), BLOCK),)](x, read, z, out, x.numel(), BLOCK)
        return out

    @staticmethod
    def backward(ctx, d):
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(y) for y in saved]
        _backward[(triton.cdiv(d.numel(), BLOCK),)](
            d.contiguous(), *saved, *gradients, d.numel(), BLOCK
        )
        return tuple(gradients)


def blend(x: Tensor, read: Tensor, logits: Tensor) -> Tensor:
    """All of one shape and dtype; float32 within."""
    return _Blend.apply(x, read, logits)
