"""Query pooling: a few learned queries summarise many tokens (FLUID's Q-Transform, eqs 3-6; SigLIP's MAP head; Perceiver).

    K = X W_K^T + b_K,   V = X W_V^T + b_V,   O_h = softmax(scale Q_h K_h^T) V_h                  (the usual, "projected" form)

With few queries and many tokens, K and V cost far more than the pooling itself. Both projections can be moved to the other side:

    Q'_h = scale Q_h W_K,h      S = Q' X^T      Z = softmax(S) X      O_h = Z_h W_V,h^T + b_V     (the "absorbed" form)

which is exact: b_K adds the same number to a whole row of logits and drops out of the softmax (its gradient is exactly zero), and
the rows of softmax(S) sum to one, so b_V is added once. K and V never exist; W_K's gradient costs nothing per sample. A LayerNorm
in front of the projections folds away too: its weight into W_K and W_V, its bias into b_V, and mean and rstd of each token enter
the logits and the probabilities. FLOPs per sample, forward and backward: 14 h L N D + 6 L D^2 against 12 N D^2 + 14 L N D.

Rows of S are (head, query), head-major: R = num_heads * L of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import (
    autocast_dtype,
    check_tensors,
    check_value,
    choose,
    current_backend,
    no_autocast,
    once_differentiable,
    register,
)

FORMS = ("auto", "absorbed", "projected")


def query_pooling_reference(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """The specification of :func:`query_pooling`: the projected form, one line per equation, any floating dtype, any device."""
    batch, length, dim = x.shape
    ignore = _ignored(batch, length, key_padding_mask, lengths, x.device)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)  # a masked token may hold NaN, and NaN * 0 is NaN
    if norm_weight is not None:
        x = F.layer_norm(x, (dim,), norm_weight, norm_bias, norm_eps)
    q = queries.expand(batch, *queries.shape[-2:]).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, h, L, dk)
    k = F.linear(x, w_k, b_k).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, h, N, dk)
    v = F.linear(x, w_v, b_v).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, h, N, dv)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    probs = _masked_softmax(logits, None if ignore is None else ignore[:, None, None, :], -1).to(v.dtype)
    return (probs @ v).transpose(1, 2).flatten(2)


def _masked_softmax(logits: Tensor, ignore: Tensor | None, dim: int) -> Tensor:
    """Softmax over ``dim``, at least in float32; a row with nothing left is all zeros, and so is its gradient."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if ignore is None:
        return logits.softmax(dim, dtype=dtype)
    floor = torch.finfo(dtype).min  # not -inf: a dead row would be NaN before it is zeroed, and NaN stays in the gradient
    return logits.to(dtype).masked_fill(ignore, floor).softmax(dim).masked_fill(ignore, 0.0)


def _ignored(batch: int, length: int, mask: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor | None:
    if lengths is not None:
        return torch.arange(length, device=device) >= lengths[:, None]
    return mask


# ---- the pooling itself: z = softmax(q x^T) x, q already scaled and absorbed ----------------------------------------------------


def _pool_composed(x: Tensor, q: Tensor, mask: Tensor | None, lengths: Tensor | None, eps: float | None) -> Tensor:
    """x (B, N, D), q (R, D) or (B, R, D) -> z (B, R, D). With ``eps`` x stands for its rows normalised to mean 0, variance 1."""
    q = q.to(x.dtype)
    ignore = _ignored(*x.shape[:2], mask, lengths, x.device)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)
    if x.device.type == "cpu":  # sample by sample: one product over B*N rows is no faster, and its dq errs up to five times as much
        q = q.expand(x.shape[0], *q.shape[-2:])
    few = x.device.type == "cpu" and q.shape[-2] <= 8  # as a product of few rows the backward runs up to 1.8 times as fast
    logits = (q @ x.transpose(1, 2)).transpose(1, 2) if few else x @ q.transpose(-1, -2)  # (B, N, R)
    if eps is not None:
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), -1, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + eps)  # (B, N, 1)
        logits = (logits - mean * q.sum(-1)[..., None, :]) * rstd
    probs = _masked_softmax(logits, None if ignore is None else ignore[:, :, None], 1)
    if eps is None:
        return probs.to(x.dtype).transpose(1, 2) @ x
    weights = probs * rstd
    shift = (weights * mean).sum(1)[:, :, None]
    return (weights.to(x.dtype).transpose(1, 2) @ x - shift).to(x.dtype)


def _fake_forward(x, q, mask, lengths, eps):
    batch, length, dim = x.shape
    stats = (batch, length) if eps is not None else (0,)
    z = x.new_empty(batch, q.shape[-2], dim)
    lse = x.new_empty(batch, q.shape[-2], dtype=torch.float32)
    return z, lse, x.new_empty(stats, dtype=torch.float32), x.new_empty(stats, dtype=torch.float32)


def _fake_backward(dz, x, q, z, lse, mean, rstd, mask, lengths, need_dx):
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, q.new_empty(q.shape, dtype=torch.float32 if q.dim() == 2 else q.dtype)


register(
    "query_pooling_fwd",
    "(Tensor x, Tensor q, Tensor? mask, Tensor? lengths, float? eps) -> (Tensor z, Tensor lse, Tensor mean, Tensor rstd)",
    "query_pooling:forward",
    _fake_forward,
)
register(
    "query_pooling_bwd",
    "(Tensor dz, Tensor x, Tensor q, Tensor z, Tensor lse, Tensor mean, Tensor rstd, Tensor? mask, Tensor? lengths, bool need_dx)"
    " -> (Tensor dx, Tensor dq)",
    "query_pooling:backward",
    _fake_backward,
)


class _PoolFused(torch.autograd.Function):
    """The kernels under autograd: saves x, q, z and one number a row, never K, V, the logits or the probabilities."""

    @staticmethod
    def forward(ctx, x, q, mask, lengths, eps):
        ctx.q_dtype = q.dtype
        x = x if x.stride(-1) == 1 else x.contiguous()
        q = q.to(x.dtype).contiguous()
        z, lse, mean, rstd = torch.ops.mmfused.query_pooling_fwd(x, q, mask, lengths, eps)
        ctx.save_for_backward(x, q, z, lse, mean, rstd, mask, lengths)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, q, z, lse, mean, rstd, mask, lengths = ctx.saved_tensors
        need_dx, need_dq = ctx.needs_input_grad[:2]
        dx, dq = torch.ops.mmfused.query_pooling_bwd(dz.contiguous(), x, q, z, lse, mean, rstd, mask, lengths, need_dx)
        return dx if need_dx else None, dq.to(ctx.q_dtype) if need_dq else None, None, None, None


class _ZeroGradient(torch.autograd.Function):
    """Carry ``b`` through the graph with an exactly zero gradient (DDP and FSDP want one for every parameter)."""

    @staticmethod
    def forward(ctx, out, b):
        ctx.save_for_backward(b)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[0])


# ---- the two forms --------------------------------------------------------------------------------------------------------------

# The absorbed form is taken where its FLOPs are this many times fewer: bmm reaches the same rate as the projections on a CPU
# (measured break-even: ratio 1.2); on a GPU the small row count keeps it from the GEMM's rate until a measurement says otherwise.
_ABSORBED_MUST_SAVE = {"cpu": 1.25, "cuda": 2.0}


def flops(batch: int, length: int, dim: int, queries: int, k_dim: int, v_dim: int, num_heads: int, shared: bool = True) -> dict:
    """Forward + backward FLOPs of either form, all gradients: {"absorbed": ..., "projected": ...}."""
    absorb = 6 * queries * k_dim * dim * (1 if shared else batch)
    absorbed = batch * (14 * num_heads * queries * length * dim + 6 * queries * v_dim * dim) + absorb
    projected = batch * (6 * length * dim * (k_dim + v_dim) + 7 * queries * length * (k_dim + v_dim))
    return {"absorbed": absorbed, "projected": projected}


def _cheaper_form(x: Tensor, queries: Tensor, w_k: Tensor, w_v: Tensor, num_heads: int) -> str:
    cost = flops(*x.shape, queries.shape[-2], w_k.shape[0], w_v.shape[0], num_heads, queries.dim() == 2)
    margin = _ABSORBED_MUST_SAVE["cpu" if x.device.type == "cpu" else "cuda"]
    return "absorbed" if cost["absorbed"] * margin <= cost["projected"] else "projected"


def _absorbed(
    pool, x, queries, w_k, w_v, b_v, *, num_heads, scale, key_padding_mask, lengths, norm_weight, norm_bias, norm_eps
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)  # weights are folded in float32 and rounded once
    # W_K goes into the queries. One set of queries: a small product, so in float32; per-sample queries: in the compute dtype.
    fold = wide if queries.dim() == 2 else x.dtype
    w_k = w_k.to(fold) if norm_weight is None else (w_k.to(wide) * norm_weight.to(wide)).to(fold)
    q = queries.to(fold).unflatten(-1, (num_heads, -1)).transpose(-2, -3)  # (..., h, L, dk)
    q = ((q * scale) @ w_k.unflatten(0, (num_heads, -1))).flatten(-3, -2)  # (..., R, D)

    z = pool(x, q, key_padding_mask, lengths, None if norm_weight is None else norm_eps)  # (B, R, D)

    if norm_weight is not None:
        if norm_bias is not None:
            shift = w_v.to(wide) @ norm_bias.to(wide)
            b_v = shift if b_v is None else b_v.to(wide) + shift
        w_v = w_v.to(wide) * norm_weight.to(wide)
    w_v = w_v.to(x.dtype).unflatten(0, (num_heads, -1))  # (h, dv, D)
    z = z.unflatten(1, (num_heads, queries.shape[-2])).transpose(0, 1)  # (h, B, L, D)
    out = z.flatten(1, 2) @ w_v.transpose(1, 2)  # (h, B*L, dv)
    out = out.unflatten(1, (x.shape[0], queries.shape[-2])).permute(1, 2, 0, 3).flatten(2)  # (B, L, Dv)
    if b_v is None:
        return out
    dead = dead_samples(key_padding_mask, lengths)
    return out + b_v.to(x.dtype) * (1 if dead is None else ~dead[:, None, None])


def dead_samples(mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """(B,) bool: samples with nothing to attend to; None where that cannot happen."""
    if mask is not None:
        return mask.all(1)
    return None if lengths is None else lengths <= 0


def _projected(
    x, queries, w_k, w_v, b_v, b_k, *, num_heads, scale, key_padding_mask, lengths, norm_weight, norm_bias, norm_eps
):  # fmt: skip
    batch, length, dim = x.shape
    ignore = _ignored(batch, length, key_padding_mask, lengths, x.device)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)
    if norm_weight is not None:
        x = F.layer_norm(x, (dim,), norm_weight.to(x.dtype), None if norm_bias is None else norm_bias.to(x.dtype), norm_eps)
    cast = [None if t is None else t.to(x.dtype) for t in (queries, w_k, b_k, w_v, b_v)]
    q = cast[0].expand(batch, *queries.shape[-2:]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = F.linear(x, cast[1], cast[2]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = F.linear(x, cast[3], cast[4]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if ignore is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    # A dead row attends to everything and is zeroed after: not every SDPA backend returns 0 and zero gradients for it.
    dead = ignore.all(1)
    attend = ~(ignore & ~dead[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, scale=scale).transpose(1, 2).flatten(2)
    return out.masked_fill(dead[:, None, None], 0.0)


# ---- the function and the modules -----------------------------------------------------------------------------------------------


def query_pooling(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    form: str = "auto",
) -> Tensor:
    """Pool tokens with learned queries: ``softmax(scale * Q K^T) V`` with ``K = x w_k^T + b_k`` and ``V = x w_v^T + b_v``.

    Args:
        x: tokens (B, N, D), float32, float16, bfloat16 or float64.
        queries: (L, Dk), one set for the batch, or (B, L, Dk); already projected. Dk divides by ``num_heads``.
        w_k, w_v: (Dk, D) and (Dv, D), laid out as ``nn.Linear.weight``. Dv divides by ``num_heads``.
        b_v, b_k: (Dv,), (Dk,). ``b_k`` drops out of the softmax: in the absorbed form its gradient is exactly zero.
        scale: factor of the logits, default ``(Dk / num_heads) ** -0.5``.
        key_padding_mask: (B, N) bool, True = ignore the token. ``lengths``: (B,) int in [0, N], keep the first tokens. Not both.
            A sample without tokens gives 0 (not the value bias) with gradient 0; ignored tokens may hold NaN.
        norm_weight, norm_bias, norm_eps: a LayerNorm (D,) over ``x`` before both projections, folded into them. Folded, a token's
            mean cancels after the products: with a mean m times its spread, logits err about m times as much as without folding.
        form: "absorbed" never materialises K or V; "projected" is the usual way, on torch's attention; "auto" compares FLOPs.

    Returns: (B, L, Dv) in the dtype of ``x`` (of autocast where it is on).

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")`` cannot run, before any launch.

    Source: FLUID (arXiv 2508.07264) eqs 3-8; the absorbed form is this library's.
    """
    args = (queries, w_k, w_v, b_v, b_k)
    options = dict(num_heads=num_heads, scale=scale, key_padding_mask=key_padding_mask, lengths=lengths)
    norm = dict(norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps)
    cast = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if cast is not None and x.dtype != torch.float64:
        with no_autocast(x.device.type):  # weights are folded before they are rounded: this op casts for itself
            return query_pooling(x.to(cast), *args, **options, **norm, form=form)
    _check(x, *args, **options, norm_weight=norm_weight, norm_bias=norm_bias, form=form)
    no_kernel = ["form='projected' has no kernel of its own"] if form == "projected" else []
    chosen = choose("query_pooling", x.device, x.dtype, no_kernel)
    if chosen == "reference":
        args = [None if t is None else t.to(x.dtype) for t in args]
        norm = {k: v.to(x.dtype) if isinstance(v, Tensor) else v for k, v in norm.items()}
        return query_pooling_reference(x, *args, **options, **norm)
    options["scale"] = (w_k.shape[0] // num_heads) ** -0.5 if scale is None else scale
    if form == "auto":
        form = "absorbed" if current_backend() == "fused" else _cheaper_form(x, queries, w_k, w_v, num_heads)
    if form == "projected":
        return _projected(x, *args, **options, **norm)
    pool = _PoolFused.apply if chosen == "fused" else _pool_composed
    out = _absorbed(pool, x, *args[:4], **options, **norm)
    return out if b_k is None else _ZeroGradient.apply(out, b_k)


def _check(x, queries, w_k, w_v, b_v, b_k, *, num_heads, scale, key_padding_mask, lengths, norm_weight, norm_bias, form):
    op = "query_pooling"
    floats = dict(x=x, queries=queries, w_k=w_k, w_v=w_v, b_v=b_v, b_k=b_k, norm_weight=norm_weight, norm_bias=norm_bias)
    check_tensors(op, **floats, key_padding_mask=key_padding_mask, lengths=lengths)
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}; it takes float32, float16, bfloat16 or float64.")
    takes = {x.dtype, torch.promote_types(x.dtype, torch.float32)}  # master weights may stay in float32
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in takes:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; it takes {' or '.join(sorted(map(str, takes)))}, as x has {x.dtype}."
            )
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it takes (batch, tokens, dim).")
    if queries.dim() not in (2, 3) or (queries.dim() == 3 and queries.shape[0] != x.shape[0]):
        raise ValueError(f"{op}: queries has shape {tuple(queries.shape)}; it takes (L, Dk) or ({x.shape[0]}, L, Dk).")
    if w_v.dim() != 2:
        raise ValueError(f"{op}: w_v has shape {tuple(w_v.shape)}; it takes (Dv, {x.shape[-1]}).")
    k_dim, v_dim, dim = queries.shape[-1], w_v.shape[0], x.shape[-1]
    expected = dict(w_k=(k_dim, dim), w_v=(v_dim, dim), b_v=(v_dim,), b_k=(k_dim,), norm_weight=(dim,), norm_bias=(dim,))
    for name, shape in expected.items():
        if floats[name] is not None and floats[name].shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(floats[name].shape)}; it takes {shape}.")
    if num_heads < 1 or k_dim % num_heads or v_dim % num_heads:
        raise ValueError(f"{op}: num_heads is {num_heads}; it must be positive and divide Dk = {k_dim} and Dv = {v_dim}.")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias is given without norm_weight; a folded LayerNorm takes norm_weight, or both.")
    if form not in FORMS:
        raise ValueError(f"{op}: form is {form!r}; it takes one of {', '.join(FORMS)}.")
    _check_padding(op, x.shape[0], x.shape[1], key_padding_mask, lengths)


def _check_padding(op: str, batch: int, length: int, mask: Tensor | None, lengths: Tensor | None) -> None:
    if mask is not None and lengths is not None:
        raise ValueError(f"{op}: key_padding_mask and lengths are both given; it takes one of them.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: key_padding_mask has dtype {mask.dtype}; it takes torch.bool, True = ignore the token.")
        if mask.shape != (batch, length):
            raise ValueError(f"{op}: key_padding_mask has shape {tuple(mask.shape)}; it takes {(batch, length)}.")
    if lengths is not None:
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: lengths has dtype {lengths.dtype}; it takes torch.int32 or torch.int64.")
        if lengths.shape != (batch,):
            raise ValueError(f"{op}: lengths has shape {tuple(lengths.shape)}; it takes {(batch,)}.")
        check_value(
            lambda: ((lengths >= 0) & (lengths <= length)).all(),
            f"{op}: lengths holds a value outside [0, N]; it takes the number of tokens to keep, N = x.shape[1] at most.",
        )
