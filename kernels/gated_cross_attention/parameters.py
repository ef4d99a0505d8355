"""Gradients of weights, biases and norms: plain products and sums over all rows, whose unread ones
the kernels have made 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def d_linear(
    d_out: Tensor,
    given: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    shifts: bool = True,
) -> None:
    """d_out (R, O), given (R, I) -> d_weight (O, I), d_bias (O,) or (0,), written in place. A bias
    that ``shifts`` nothing, as that of the keys, which a softmax forgets, gets an exact 0 instead
    of what rounding has left of it.
    """
    torch.mm(d_out.t(), given, out=d_weight)
    if d_bias.numel():
        torch.sum(d_out, 0, out=d_bias) if shifts else d_bias.zero_()


def d_gate_weight(
    dz: Tensor,
    x: Tensor,
    kept: Tensor,
    flag: Tensor,
    batch: int,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    """dz (R, G), x and kept (R, D), flag (B,) -> d_weight (G, 2 D) or with the indicator (G, 2 D +
    1), d_bias (G,) or (0,).
    """
    dim = x.shape[1]
    torch.mm(dz.t(), x, out=d_weight[:, :dim])
    torch.mm(dz.t(), kept, out=d_weight[:, dim : 2 * dim])
    indicator = d_weight.shape[1] > 2 * dim
    if not (d_bias.numel() or indicator):
        return
    by_sample = dz.view(batch, len(dz) // max(batch, 1), dz.shape[1]).sum(1, dtype=torch.float32)
    if d_bias.numel():
        d_bias.copy_(by_sample.sum(0))
    if indicator:
        d_weight[:, 2 * dim].copy_((by_sample * flag[:, None]).sum(0))


def d_norm(partial: Tensor, d_gamma: Tensor, d_beta: Tensor) -> None:
    """partial (2, P, D) float32: the sums of each program, added up in order."""
    d_gamma.copy_(partial[0].sum(0))
    d_beta.copy_(partial[1].sum(0))
