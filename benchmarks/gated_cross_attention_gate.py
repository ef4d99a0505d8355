"""A baseline for the gate of cross-attention: sigmoid and blend in one elementwise Triton kernel.

The output is sigmoid(z) attn_out + sigmoid(-z) x, where z are the logits of the gate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _forward(
    x_ptr,  # (total,), like all tensors of this kernel
    attn_ptr,
    z_ptr,
    out_ptr,
    total,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    attn = tl.load(attn_ptr + at, mask=inside).to(tl.float32)
    z = tl.load(z_ptr + at, mask=inside).to(tl.float32)
    tl.store(out_ptr + at, tl.sigmoid(z) * attn + tl.sigmoid(-z) * x, mask=inside)


@triton.jit
def _backward(
    d_ptr,  # (total,), like all tensors of this kernel
    x_ptr,
    attn_ptr,
    z_ptr,
    dx_ptr,
    d_attn_ptr,
    dz_ptr,
    total,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    d = tl.load(d_ptr + at, mask=inside).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    attn = tl.load(attn_ptr + at, mask=inside).to(tl.float32)
    z = tl.load(z_ptr + at, mask=inside).to(tl.float32)
    g, rest = tl.sigmoid(z), tl.sigmoid(-z)
    tl.store(dx_ptr + at, d * rest, mask=inside)
    tl.store(d_attn_ptr + at, d * g, mask=inside)
    tl.store(dz_ptr + at, d * (attn - x) * g * rest, mask=inside)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attn_out: Tensor, logits: Tensor) -> Tensor:
        saved = [y.contiguous() for y in (x, attn_out, logits)]
        ctx.save_for_backward(*saved)
        out = torch.empty_like(saved[0])
        _forward[(triton.cdiv(x.numel(), BLOCK),)](*saved, out, x.numel(), BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(y) for y in saved]
        _backward[(triton.cdiv(d.numel(), BLOCK),)](
            d.contiguous(), *saved, *gradients, d.numel(), BLOCK
        )
        return tuple(gradients)


def blend(x: Tensor, attn_out: Tensor, logits: Tensor) -> Tensor:
    """Blend ``x`` and ``attn_out`` in float32; all three tensors have the same shape and dtype."""
    return _Blend.apply(x, attn_out, logits)
