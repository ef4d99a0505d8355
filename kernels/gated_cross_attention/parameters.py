"""Gradients of weights, biases and norms, as plain products and sums over all rows.

The kernels have written 0 in rows that the masks exclude.
"""

from __future__ import annotations

import torch
from torch import Tensor


def d_linear(
    d_out: Tensor,
    inputs: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    bias_matters: bool = True,
) -> None:
    """Write d_weight (O, I) and d_bias, (O,) or (0,), from d_out (R, O) and inputs (R, I).

    ``bias_matters`` is False for the keys, whose bias does not change the softmax. The gradient of
    this bias is then exactly 0, not a rounding error.
    """
    torch.mm(d_out.t(), inputs, out=d_weight)
    if d_bias.numel():
        torch.sum(d_out, 0, out=d_bias) if bias_matters else d_bias.zero_()


def d_gate_weight(
    dz: Tensor,
    x: Tensor,
    attn_out: Tensor,
    flag: Tensor,
    batch: int,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    """Write d_weight (G, 2 D), or (G, 2 D + 1) with the indicator, and d_bias (G,) or (0,).

    The inputs are dz (R, G), x and attn_out (R, D), and the indicator ``flag`` (B,).
    """
    dim = x.shape[1]
    torch.mm(dz.t(), x, out=d_weight[:, :dim])
    torch.mm(dz.t(), attn_out, out=d_weight[:, dim : 2 * dim])
    indicator = d_weight.shape[1] > 2 * dim
    if not (d_bias.numel() or indicator):
        return
    by_sample = dz.view(batch, len(dz) // max(batch, 1), dz.shape[1]).sum(1, dtype=torch.float32)
    if d_bias.numel():
        d_bias.copy_(by_sample.sum(0))
    if indicator:
        d_weight[:, 2 * dim].copy_((by_sample * flag[:, None]).sum(0))


def d_norm(partial: Tensor, d_gamma: Tensor, d_beta: Tensor) -> None:
    """Write d_gamma and d_beta, the sums over the partials of ``partial`` (2, partials, D)."""
    d_gamma.copy_(partial[0].sum(0))
    d_beta.copy_(partial[1].sum(0))
