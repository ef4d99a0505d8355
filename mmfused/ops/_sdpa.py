"""torch's scaled dot-product attention, with second derivatives."""

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
    """Compute ``F.scaled_dot_product_attention``, with support for ``create_graph=True``.

    torch's fused attention has no second derivative. Under ``create_graph=True``, the backward pass
    recomputes the gradients with torch's unfused attention.

    Args:
        q, k, v: queries (B, h, L, dk), keys (B, h, N, dk) and values (B, h, N, dv).
        attend: bool mask that broadcasts to (B, h, L, N), True = attend; no row may be all False.
        scale: factor of the logits, default dk ** -0.5.
    """
    if k.shape[-2] == 1:
        # With one key the output is v. This expression makes the gradients of q and k exactly 0.
        return v + (q * 0.0).sum(-1, keepdim=True) + (k * 0.0).sum(-1, keepdim=True)
    # torch.compile has no second derivatives, and torch.func rejects _Inputs and _Output.
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or not torch.is_grad_enabled() or not any(y.requires_grad for y in (q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, scale=scale)
    upstream: list[Tensor] = []
    q, k, v = _Inputs.apply(q, k, v, attend, scale, upstream)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, scale=scale)
    return _Output.apply(out, upstream)


class _Output(torch.autograd.Function):
    """Identity; under create_graph=True its backward stores the upstream gradient for _Inputs."""

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
    """Identity; under create_graph=True its backward recomputes the gradients, differentiably."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        attend,
        scale,
        upstream,
    ):
        ctx.scale, ctx.upstream = scale, upstream
        ctx.save_for_backward(q, k, v, attend)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            *inputs, attend = ctx.saved_tensors
            # Backward may run under autocast.
            with no_autocast(inputs[0].device.type), sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(*inputs, attn_mask=attend, scale=ctx.scale)
                needed = [y for y in inputs if y.requires_grad]
                d_out = ctx.upstream.pop()
                found = iter(torch.autograd.grad(out, needed, d_out, create_graph=True))
            gradients = [next(found) if y.requires_grad else None for y in inputs]
        return *gradients, None, None, None
