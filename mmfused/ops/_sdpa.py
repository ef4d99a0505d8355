"""torch's attention, differentiable twice: its fused backwards are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..library import no_autocast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention``; under ``create_graph=True`` its gradients are computed
    anew, by the plain formula.

    q (B, h, L, dk), k (B, h, N, dk), v (B, h, N, dv); ``attend``: bool, broadcast to (B, h, L, N),
    True = attend, no row empty."""
    if (
        k.shape[-2] == 1
    ):  # v, whatever q and k are: their gradients are 0, not what rounding leaves of dP - rowsum(dO O)
        return v + (q * 0.0).sum(-1, keepdim=True) + (k * 0.0).sum(-1, keepdim=True)
    # The compiler refuses second derivatives by itself; torch.func takes no Function of this kind.
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or not torch.is_grad_enabled() or not any(y.requires_grad for y in (q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, scale=scale)
    upstream: list[Tensor] = []
    q, k, v = _Inputs.apply(q, k, v, attend, scale, upstream)
    return _Output.apply(
        F.scaled_dot_product_attention(q, k, v, attn_mask=attend, scale=scale), upstream
    )


class _Output(torch.autograd.Function):
    """The identity. Its backward hands the upstream gradient to that of _Inputs, if a graph of the
    gradients is wanted.
    """

    @staticmethod
    def forward(ctx, out, upstream):
        ctx.upstream = upstream
        return out.view_as(out)

    @staticmethod
    def backward(ctx, d_out):
        if torch.is_grad_enabled():
            ctx.upstream.append(d_out)
        return d_out, None


class _Inputs(torch.autograd.Function):
    """The identity. Its backward passes the gradients of torch's attention on, or makes
    differentiable ones.
    """

    @staticmethod
    def forward(ctx, q, k, v, attend, scale, upstream):
        ctx.scale, ctx.upstream = scale, upstream
        ctx.save_for_backward(q, k, v, attend)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            *inputs, attend = ctx.saved_tensors
            with (
                no_autocast(inputs[0].device.type),
                sdpa_kernel(SDPBackend.MATH),
            ):  # some call backward under autocast
                out = F.scaled_dot_product_attention(*inputs, attn_mask=attend, scale=ctx.scale)
                wanted = [y for y in inputs if y.requires_grad]
                made = iter(torch.autograd.grad(out, wanted, ctx.upstream.pop(), create_graph=True))
            gradients = [next(made) if y.requires_grad else None for y in inputs]
        return *gradients, None, None, None
