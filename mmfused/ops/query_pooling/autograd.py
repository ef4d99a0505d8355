"""Query pooling: the registered operators, and the autograd function around the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...library import active_exporter, launching, once_differentiable, operator
from .reference import PoolingOptions


class Pool(torch.autograd.Function):
    """Compute :func:`.composed.pool_composed` with the kernels.

    Saves the inputs, z, two softmax statistics of each row (sums), the mean and 1 / standard
    deviation of each token (mean, rstd), and ksum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        eps: float | None,
        dropout_p: float,
        seed: Tensor | None,
        return_lse: bool,
    ) -> tuple[Tensor, ...]:
        """Run the forward kernels.

        Return z, with dropout ksum, and if asked the log-sum-exp of each row.
        """
        ctx.q_dtype = q.dtype
        ctx.dropout_p, ctx.return_lse, ctx.max_seqlen = dropout_p, return_lse, max_seqlen
        x = x if x.stride(-1) == 1 else x.contiguous()
        q = q.to(x.dtype).contiguous()
        lengths = None if lengths is None else lengths.contiguous()
        if cu_seqlens is not None:  # so that a wrong offset never makes a kernel leave x
            cu_seqlens = cu_seqlens.clamp(0, x.shape[0])
        tokens = (mask, lengths, cu_seqlens)
        z, *saved = query_pooling_fwd(x, q, *tokens, max_seqlen, eps, dropout_p, seed)
        ctx.save_for_backward(x, q, z, *saved, *tokens, seed)
        sums, _, _, ksum = saved
        out = (z, ksum) if dropout_p else (z,)
        return (*out, _log_sum_exp(sums)) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """Run the backward kernels."""
        *saved, seed = ctx.saved_tensors
        need_dx, need_dq = ctx.needs_input_grad[:2]
        dz, *rest = upstream
        rest = [gradient.contiguous() for gradient in rest]
        dx, dq = query_pooling_bwd(
            dz,
            rest[0] if ctx.dropout_p else None,
            rest[-1] if ctx.return_lse else None,
            *saved,
            ctx.max_seqlen,
            need_dx,
            ctx.dropout_p,
            seed,
        )
        return dx if need_dx else None, dq.to(ctx.q_dtype) if need_dq else None, *[None] * 8


def pool_arguments(
    x: Tensor,
    q: Tensor,
    options: PoolingOptions,
    eps: float | None,
) -> tuple[Any, ...]:
    """Return the arguments of :class:`Pool`."""
    return (
        x,
        q,
        options.key_padding_mask,
        None if options.cu_seqlens is not None else options.lengths,
        options.cu_seqlens,
        options.max_seqlen,
        eps,
        options.dropout_p,
        options.dropout_seed,
        options.return_lse,
    )


def pool_results(
    out: tuple[Tensor, ...],
    options: PoolingOptions,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return z, ksum and the log-sum-exp from what :class:`Pool` returns."""
    ksum = out[1] if options.dropout_p else None
    return out[0], ksum, out[-1] if options.return_lse else None


def _log_sum_exp(sums: Tensor) -> Tensor:
    """Return the log-sum-exp (B, R) of the logits from ``sums``; -inf for a row without tokens."""
    lse = sums[..., 0] + sums[..., 1]
    return lse.masked_fill(lse == math.inf, -math.inf)


class HeadProduct(torch.autograd.Function):
    """Multiply each head's part of a (M, h, K) by b (h, K, N), and by ``scale``; add the bias.

    Returns (M, h, N). Unlike torch's products of batches, the result and the gradient of ``a`` have
    this order in memory, so they need no copy to merge the heads. The gradient of ``b`` has the
    memory layout of ``b``, and ``scale`` needs no launch of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Return the product; bias is (h, N)."""
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        a = a.transpose(0, 1)
        if torch.compiler.is_compiling():  # it cannot trace an output with such strides
            out = _product(a, b, scale).transpose(0, 1)
            return out if bias is None else out + bias.to(out.dtype)
        out = a.new_empty(a.shape[1], a.shape[0], b.shape[2])
        heads = out.transpose(0, 1)
        if bias is None:
            _product(a, b, scale, heads)
        else:
            out.copy_(bias)
            torch.baddbmm(heads, a, b, alpha=scale, out=heads)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, which can be differentiated again."""
        a, b = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            da = HeadProduct.apply(grad, b.mT, None, ctx.scale)
        if ctx.needs_input_grad[1]:
            a, grad_t = a.transpose(0, 1), grad.permute(1, 2, 0)
            if b.stride(-1) == 1:
                db = _product(a.mT, grad_t.mT, ctx.scale)
            else:
                db = _product(grad_t, a, ctx.scale).mT
        return da, db, grad.sum(0) if ctx.needs_input_grad[2] else None, None


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return scale * (a @ b) of batches of matrices, in one launch."""
    if scale == 1.0:
        return torch.bmm(a, b, out=out)
    if torch.compiler.is_compiling():  # Inductor would write what beta=0 ignores
        return torch.bmm(a, b) * scale
    nothing = a.new_empty(())  # beta=0 ignores it
    return torch.baddbmm(nothing, a, b, beta=0, alpha=scale, out=out)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, b):
        ctx.save_for_backward(b)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def with_zero_gradient(out: Tensor, b: Tensor) -> Tensor:
    """Return ``out``, and give ``b`` a gradient of exactly zero in backward.

    DDP and FSDP need a gradient for every parameter.
    """
    if active_exporter():  # exporters drop the backward of an autograd function
        return out + (b * 0.0).sum().to(out.dtype)
    return _ZeroGradient.apply(out, b)


# ---- operators -----------------------------------------------------------------------------------


def _fake_forward(
    x,
    q,
    mask,
    lengths,
    cu_seqlens,
    max_seqlen,
    eps,
    dropout_p,
    dropout_seed,
):
    rows, dim = q.shape[-2:]
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    norm = x.shape[:-1] if eps is not None else (0,)
    ksum = (batch, rows) if dropout_p else (0,)
    shapes = ((batch, rows, 2), norm, norm, ksum)
    z = x.new_empty(batch, rows, dim)
    return z, *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_backward(
    dz,
    dksum,
    dlse,
    x,
    q,
    z,
    sums,
    mean,
    rstd,
    ksum,
    mask,
    lengths,
    cu_seqlens,
    max_seqlen,
    need_dx,
    dropout_p,
    dropout_seed,
):
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, q.new_empty(q.shape, dtype=torch.float32 if q.dim() == 2 else q.dtype)


def _forward_flops(
    x,
    q,
    *rest,
    out_shape,
):
    return 4 * math.prod(x) * q[-2]  # of packed tokens (total, dim), each is in one sample


def _backward_flops(
    dz,
    dksum,
    dlse,
    x,
    q,
    z,
    sums,
    mean,
    rstd,
    ksum,
    mask,
    lengths,
    cu_seqlens,
    max_seqlen,
    need_dx,
    *rest,
    out_shape,
):
    """Count three products (logits, gradient of the logits, dq), and two more for dx."""
    return _forward_flops(x, q, out_shape=None) // 2 * (5 if need_dx else 3)


@operator(
    "(Tensor x, Tensor q, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens, SymInt? max_seqlen,"
    " float? eps, float dropout_p, Tensor? dropout_seed)"
    " -> (Tensor z, Tensor sums, Tensor mean, Tensor rstd, Tensor ksum)",
    _fake_forward,
    _forward_flops,
)
def query_pooling_fwd(*args: Any) -> tuple[Tensor, ...]:
    """Launch the kernels of the forward pass."""
    from ...kernels.query_pooling.forward import forward

    with launching(args):
        return forward(*args)


@operator(
    "(Tensor dz, Tensor? dksum, Tensor? dlse, Tensor x, Tensor q, Tensor z, Tensor sums,"
    " Tensor mean, Tensor rstd, Tensor ksum, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens,"
    " SymInt? max_seqlen, bool need_dx, float dropout_p, Tensor? dropout_seed)"
    " -> (Tensor dx, Tensor dq)",
    _fake_backward,
    _backward_flops,
)
def query_pooling_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Launch the kernels of the backward pass."""
    from ...kernels.query_pooling.backward import backward

    with launching(args):
        return backward(*args)
