"""Query pooling: a few learned queries summarise many tokens (FLUID's Q-Transform, eqs 3-6;
SigLIP's MAP head; Perceiver).

    K = X W_K^T + b_K,   V = X W_V^T + b_V,   O_h = softmax(scale Q_h K_h^T) V_h
    (the usual, "projected" form)

With few queries and many tokens, K and V cost far more than the pooling itself. Both projections
can be moved to the other side:

    Q'_h = scale Q_h W_K,h      S = Q' X^T      Z = softmax(S) X      O_h = Z_h W_V,h^T + b_V
    (the "absorbed" form)

which is exact: b_K adds the same number to a whole row of logits and drops out of the softmax (its
gradient is exactly zero), and the rows of softmax(S) sum to one, so b_V is added once. K and V
never exist; W_K's gradient costs nothing per sample. A LayerNorm in front of the projections folds
away but for (x - mean) rstd: its weight into W_K and W_V, its bias into b_V. FLOPs per sample,
forward and backward: 14 h L N D + 6 L D^2 against 12 N D^2 + 14 L N D.

Dropout keeps the probabilities where M is 1 and divides them by 1 - p, so that a row no longer sums
to one, and then

    Z = (M softmax(S)) X      ksum = rowsum(M softmax(S))      O_h = (Z_h W_V,h^T + ksum_h b_V) / (1
    - p)

where b_V holds the folded LayerNorm's bias too. Rows of S are (head, query), head-major: R =
num_heads * L of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import (
    autocast_dtype,
    choose,
    current_backend,
    graph_made,
    nan_unless,
    no_autocast,
    once_differentiable,
    register,
    wide_unless,
)
from ...random import draw_seed, keep_mask
from .._common import masked_softmax, padding_mask
from .._sdpa import attention
from .checks import check


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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`query_pooling`: the projected form, one line per equation, any
    floating dtype, any device.
    """
    batch, length, dim = x.shape
    ignore = padding_mask(batch, length, key_padding_mask, lengths, x.device)
    if ignore is not None:
        x = x.masked_fill(
            ignore[:, :, None], 0.0
        )  # a masked token may hold NaN, and NaN * 0 is NaN
    if norm_weight is not None:
        x = F.layer_norm(x, (dim,), norm_weight, norm_bias, norm_eps)
    k, v = F.linear(x, w_k, b_k), F.linear(x, w_v, b_v)
    return _attend_reference(queries, k, v, ignore, num_heads, scale, dropout_p, dropout_seed)


def _attend_reference(queries, k, v, ignore, num_heads, scale, dropout_p, dropout_seed) -> Tensor:
    """Keys (B, N, Dk) and values (B, N, Dv), projected, to the output (B, L, Dv)."""
    q = queries.expand(k.shape[0], *queries.shape[-2:])
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, h, ., d)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    probs = masked_softmax(logits, None if ignore is None else ignore[:, None, None, :], -1)
    if dropout_p:
        seed = draw_seed(k.device) if dropout_seed is None else dropout_seed
        probs = probs * keep_mask(seed, probs.shape, dropout_p) / (1 - dropout_p)
    return (probs.to(v.dtype) @ v).transpose(1, 2).flatten(2)


# ---- the pooling itself: z = softmax(q x^T) x, q already scaled and absorbed ---------------------


def _pool_composed(
    x,
    q,
    mask,
    lengths,
    eps,
    dropout_p,
    dropout_seed,
) -> Tensor | tuple[Tensor, Tensor]:
    """x (B, N, D), q (R, D) or (B, R, D) -> z (B, R, D), and under dropout ksum (B, R), at least
    float32.

    Under dropout neither is divided by 1 - p. With ``eps`` x stands for its rows normalised to mean
    0, variance 1."""
    q = q.to(x.dtype)
    ignore = padding_mask(*x.shape[:2], mask, lengths, x.device)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)
    if eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
    if (
        x.device.type == "cpu"
    ):  # sample by sample: one product over B*N rows is no faster, and its dq errs up to five times as much
        q = q.expand(x.shape[0], *q.shape[-2:])
    few = (
        x.device.type == "cpu" and q.shape[-2] <= 8
    )  # as a product of few rows the backward runs up to 1.8 times as fast
    logits = (
        (q @ x.transpose(1, 2)).transpose(1, 2) if few else x @ q.transpose(-1, -2)
    )  # (B, N, R)
    probs = masked_softmax(logits, None if ignore is None else ignore[:, :, None], 1)
    if dropout_p:
        kept = keep_mask(dropout_seed, (x.shape[0], q.shape[-2], x.shape[1]), dropout_p).transpose(
            1, 2
        )
        probs = probs * kept
    z = probs.to(x.dtype).transpose(1, 2) @ x
    return (z, probs.sum(1)) if dropout_p else z


def _fake_forward(x, q, mask, lengths, eps, dropout_p, dropout_seed):
    (batch, length, dim), rows = x.shape, q.shape[-2]
    shapes = (
        (batch, rows, 2),
        *[(batch, length) if eps is not None else (0,)] * 2,
        (batch, rows) if dropout_p else (0,),
    )
    return x.new_empty(batch, rows, dim), *(
        x.new_empty(shape, dtype=torch.float32) for shape in shapes
    )


def _fake_backward(
    dz,
    dksum,
    x,
    q,
    z,
    sums,
    mean,
    rstd,
    ksum,
    mask,
    lengths,
    need_dx,
    dropout_p,
    dropout_seed,
):
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, q.new_empty(q.shape, dtype=torch.float32 if q.dim() == 2 else q.dtype)


def _forward_flops(x, q, *rest, out_shape):
    batch, length, dim = x
    return 4 * batch * q[-2] * length * dim


def _backward_flops(
    dz,
    dksum,
    x,
    q,
    z,
    sums,
    mean,
    rstd,
    ksum,
    mask,
    lengths,
    need_dx,
    *rest,
    out_shape,
):
    """S again, dP and dq, for dx two more."""
    return _forward_flops(x, q, out_shape=None) // 2 * (5 if need_dx else 3)


def _launch_forward(*args):
    from ...kernels import query_pooling as kernels

    return kernels.forward(*args)


def _launch_backward(*args):
    from ...kernels import query_pooling as kernels

    return kernels.backward(*args)


register(
    "query_pooling_fwd",
    "(Tensor x, Tensor q, Tensor? mask, Tensor? lengths, float? eps, float dropout_p, Tensor? dropout_seed)"
    " -> (Tensor z, Tensor sums, Tensor mean, Tensor rstd, Tensor ksum)",
    _launch_forward,
    _fake_forward,
    _forward_flops,
)
register(
    "query_pooling_bwd",
    "(Tensor dz, Tensor? dksum, Tensor x, Tensor q, Tensor z, Tensor sums, Tensor mean, Tensor rstd, Tensor ksum, Tensor? mask,"
    " Tensor? lengths, bool need_dx, float dropout_p, Tensor? dropout_seed) -> (Tensor dx, Tensor dq)",
    _launch_backward,
    _fake_backward,
    _backward_flops,
)


class _PoolFused(torch.autograd.Function):
    """The kernels under autograd: saves x, q, z and a number or two a row, never K, V, logits,
    probabilities or their mask.
    """

    @staticmethod
    def forward(ctx, x, q, mask, lengths, eps, dropout_p, seed):
        ctx.q_dtype, ctx.dropout_p = q.dtype, dropout_p
        x = x if x.stride(-1) == 1 else x.contiguous()
        q = q.to(x.dtype).contiguous()
        lengths = None if lengths is None else lengths.contiguous()
        z, sums, mean, rstd, ksum = torch.ops.mmfused.query_pooling_fwd(
            x, q, mask, lengths, eps, dropout_p, seed
        )
        ctx.save_for_backward(x, q, z, sums, mean, rstd, ksum, mask, lengths, seed)
        return (z, ksum) if dropout_p else z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, dksum=None):
        *saved, seed = ctx.saved_tensors
        need_dx, need_dq = ctx.needs_input_grad[:2]
        dksum = None if dksum is None else dksum.contiguous()
        dx, dq = torch.ops.mmfused.query_pooling_bwd(
            dz.contiguous(), dksum, *saved, need_dx, ctx.dropout_p, seed
        )
        return dx if need_dx else None, dq.to(ctx.q_dtype) if need_dq else None, *[None] * 5


class _ZeroGradient(torch.autograd.Function):
    """Carry ``b`` through the graph with an exactly zero gradient (DDP and FSDP want one for every
    parameter).
    """

    @staticmethod
    def forward(ctx, out, b):
        ctx.save_for_backward(b)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _with_zero_gradient(out: Tensor, b: Tensor) -> Tensor:
    if graph_made():  # which keeps of a Function its forward alone
        return out + (b * 0.0).sum().to(out.dtype)
    return _ZeroGradient.apply(out, b)


# ---- the two forms -------------------------------------------------------------------------------

# The absorbed form is taken where its FLOPs are this many times fewer: bmm reaches the same rate as
# the projections on a CPU (measured break-even: ratio 1.2); on a GPU the small row count keeps it
# from the GEMM's rate until a measurement says otherwise. Dropout takes the projected form off
# torch's attention, which makes masks of its own; then fewer FLOPs are enough.
ABSORBED_MUST_SAVE = {"cpu": 1.25, "cuda": 2.0}


def flops(
    batch: int,
    length: int,
    dim: int,
    queries: int,
    k_dim: int,
    v_dim: int,
    num_heads: int,
    shared: bool = True,
) -> dict:
    """Forward + backward FLOPs of either form, all gradients: {"absorbed": ..., "projected": ...}."""
    absorb = 6 * queries * k_dim * dim * (1 if shared else batch)
    absorbed = (
        batch * (14 * num_heads * queries * length * dim + 6 * queries * v_dim * dim) + absorb
    )
    projected = batch * (
        6 * length * dim * (k_dim + v_dim) + 7 * queries * length * (k_dim + v_dim)
    )
    return {"absorbed": absorbed, "projected": projected}


def cheaper_form(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    num_heads: int,
    dropout_p: float = 0.0,
) -> str:
    batch, length, dim = x.shape
    if graph_made():  # for any number of samples and tokens: as for many, without a guard on either
        batch, length = 2**20, 2**20
    cost = flops(
        batch,
        length,
        dim,
        queries.shape[-2],
        w_k.shape[0],
        w_v.shape[0],
        num_heads,
        queries.dim() == 2,
    )
    margin = 1.0 if dropout_p else ABSORBED_MUST_SAVE["cpu" if x.device.type == "cpu" else "cuda"]
    return "absorbed" if cost["absorbed"] * margin <= cost["projected"] else "projected"


def _absorbed(
    pool,
    x,
    queries,
    w_k,
    w_v,
    b_v,
    *,
    num_heads,
    scale,
    key_padding_mask,
    lengths,
    norm_weight,
    norm_bias,
    norm_eps,
    dropout_p,
    dropout_seed,
):
    wide = torch.promote_types(
        x.dtype, torch.float32
    )  # weights are folded in float32 and rounded once
    # W_K goes into the queries. One set of queries: a small product, so in float32; per-sample
    # queries: in the compute dtype.
    fold = wide if queries.dim() == 2 else x.dtype
    if norm_weight is not None:
        b_v = (
            b_v
            if norm_bias is None
            else w_v.to(wide) @ norm_bias.to(wide) + (0.0 if b_v is None else b_v.to(wide))
        )
        w_k, w_v = (_normed_weight(w.to(wide), norm_weight.to(wide)) for w in (w_k, w_v))
    w_k = w_k.to(fold)
    q = queries.to(fold).unflatten(-1, (num_heads, -1)).transpose(-2, -3)  # (..., h, L, dk)
    q = ((q * scale) @ w_k.unflatten(0, (num_heads, -1))).flatten(-3, -2)  # (..., R, D)

    eps = None if norm_weight is None else norm_eps
    z = pool(x, q, key_padding_mask, lengths, eps, dropout_p, dropout_seed)  # (B, R, D)
    z, ksum = z if dropout_p else (z, None)  # (B, R)

    w_v = w_v.to(x.dtype).unflatten(0, (num_heads, -1))  # (h, dv, D)
    z = z.unflatten(1, (num_heads, queries.shape[-2]))  # (B, h, L, D)
    if graph_made() == "onnx":  # whose optimizer takes samples for heads where there are as many
        out = (z @ w_v.transpose(1, 2)).transpose(1, 2).flatten(2)
    else:
        out = z.transpose(0, 1).flatten(1, 2) @ w_v.transpose(1, 2)  # (h, B*L, dv)
        out = (
            out.unflatten(1, (x.shape[0], queries.shape[-2])).permute(1, 2, 0, 3).flatten(2)
        )  # (B, L, Dv)
    if ksum is not None:
        if b_v is not None:
            heads = ksum.unflatten(1, (num_heads, -1)).transpose(1, 2)[..., None]  # (B, L, h, 1)
            out = out + (heads * b_v.to(ksum.dtype).unflatten(0, (num_heads, -1))).flatten(2)
        return (out / (1 - dropout_p)).to(x.dtype)
    if b_v is None:
        return out
    dead = dead_samples(x, key_padding_mask, lengths)
    return out + b_v.to(x.dtype) * (1 if dead is None else ~dead[:, None, None])


def _normed_weight(w: Tensor, norm_weight: Tensor) -> Tensor:
    """W (O, D) with LayerNorm's weight, each row less its mean: normalised tokens sum to 0 over D,
    so it adds nothing, and without it the gradient of a normalised token sums to 0 as well, which
    the kernels count on."""
    w = w * norm_weight
    return w - w.mean(1, keepdim=True)


def dead_samples(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """(B,) bool: samples with nothing to attend to; None where that cannot happen."""
    if not x.shape[1]:
        return x.new_ones(x.shape[0], dtype=torch.bool)
    if mask is not None:
        return mask.all(1)
    return None if lengths is None else lengths == 0


def _projected(
    x,
    queries,
    w_k,
    w_v,
    b_v,
    b_k,
    *,
    num_heads,
    scale,
    key_padding_mask,
    lengths,
    norm_weight,
    norm_bias,
    norm_eps,
    dropout_p,
    dropout_seed,
):
    batch, length, dim = x.shape
    ignore = padding_mask(batch, length, key_padding_mask, lengths, x.device)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)
    if norm_weight is not None:
        x = F.layer_norm(
            x,
            (dim,),
            norm_weight.to(x.dtype),
            None if norm_bias is None else norm_bias.to(x.dtype),
            norm_eps,
        )
    cast = [None if t is None else t.to(x.dtype) for t in (w_k, b_k, w_v, b_v)]
    k, v = F.linear(x, *cast[:2]), F.linear(x, *cast[2:])
    return _attend(queries.to(x.dtype), k, v, ignore, num_heads, scale, dropout_p, dropout_seed)


def _attend(queries, k, v, ignore, num_heads, scale, dropout_p, dropout_seed) -> Tensor:
    """As :func:`_attend_reference`, on torch's attention."""
    q = queries.expand(k.shape[0], *queries.shape[-2:])
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    if dropout_p:  # torch's attention would draw a mask of its own
        probs = masked_softmax(
            q @ k.transpose(-1, -2) * scale,
            None if ignore is None else ignore[:, None, None, :],
            -1,
        )
        probs = probs * keep_mask(dropout_seed, probs.shape, dropout_p) / (1 - dropout_p)
        return (probs.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    if ignore is None:
        return attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    # A dead row attends to everything and is zeroed after: not every SDPA backend returns 0 and
    # zero gradients for it.
    dead = ignore.all(1)
    attend = ~(ignore & ~dead[:, None])[:, None, None, :]
    out = attention(q, k, v, attend, scale).transpose(1, 2).flatten(2)
    return out.masked_fill(dead[:, None, None], 0.0)


# ---- the function and the modules ----------------------------------------------------------------


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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    form: str = "auto",
) -> Tensor:
    """Pool tokens with learned queries: ``softmax(scale * Q K^T) V`` with ``K = x w_k^T + b_k`` and
    ``V = x w_v^T + b_v``.

    Args: x: tokens (B, N, D), float32, float16, bfloat16 or float64. queries: (L, Dk), one set for
        the batch, or (B, L, Dk); already projected. Dk divides by ``num_heads``. w_k, w_v: (Dk, D)
        and (Dv, D), laid out as ``nn.Linear.weight``. Dv divides by ``num_heads``. b_v, b_k: (Dv,),
        (Dk,). ``b_k`` drops out of the softmax: in the absorbed form its gradient is exactly zero.
        scale: factor of the logits, default ``(Dk / num_heads) ** -0.5``. key_padding_mask: (B, N)
        bool, True = ignore the token. ``lengths``: (B,) int in [0, N], keep the first tokens. Not
        both.
            A sample without tokens gives 0 (not the value bias) with gradient 0; ignored tokens may
            hold NaN.
        norm_weight, norm_bias, norm_eps: a LayerNorm (D,) over ``x`` before both projections.
            Weight and bias are folded into them; tokens are normalised in float32 where they are
            read, so that no mean, however large, costs accuracy. D = 2 has no kernel.
        dropout_p: of the probabilities, those kept are divided by 1 - dropout_p. dropout_seed: ()
            int64 tensor, None draws one from the device's generator; a seed drops the same on every
            backend (``mmfused.testing.dropout_mask``).
        form: "absorbed" never materialises K or V; "projected" is the usual way, on torch's
        attention; "auto" compares FLOPs.

    Returns: (B, L, Dv) in the dtype of ``x`` (of autocast where it is on).

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")``
    cannot run, before any launch.

    Source: FLUID (arXiv 2508.07264) eqs 3-8; the absorbed form is this library's.
    """
    args = (queries, w_k, w_v, b_v, b_k)
    options = dict(
        num_heads=num_heads, scale=scale, key_padding_mask=key_padding_mask, lengths=lengths
    )
    norm = dict(norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps)
    dropout = dict(dropout_p=dropout_p, dropout_seed=dropout_seed)
    cast = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if cast is not None and x.dtype != torch.float64:
        args = wide_unless(cast, *args)
        norm["norm_weight"], norm["norm_bias"] = wide_unless(cast, norm_weight, norm_bias)
        with no_autocast(
            x.device.type
        ):  # weights are folded before they are rounded: this op casts for itself
            return query_pooling(x.to(cast), *args, **options, **norm, **dropout, form=form)
    check(x, *args, **options, **norm, **dropout, form=form)
    no_kernel = ["form='projected' has no kernel of its own"] if form == "projected" else []
    if (
        norm_weight is not None and x.shape[-1] == 2
    ):  # normalised, both are +-1, and the gradient what is left of their difference
        no_kernel.append(
            "a LayerNorm of two features has no kernel: its gradient would be rounding"
        )
    chosen = choose("query_pooling", x.device, x.dtype, no_kernel)
    if dropout_p and dropout_seed is None:
        dropout["dropout_seed"] = draw_seed(x.device)
    if chosen == "reference":
        args = [None if t is None else t.to(x.dtype) for t in args]
        norm = {k: v.to(x.dtype) if isinstance(v, Tensor) else v for k, v in norm.items()}
        out = query_pooling_reference(x, *args, **options, **norm, **dropout)
        return out if lengths is None else nan_unless(lengths, x.shape[1], out)
    options["scale"] = (w_k.shape[0] // num_heads) ** -0.5 if scale is None else scale
    if form == "auto":
        form = (
            "absorbed"
            if current_backend() == "fused"
            else cheaper_form(x, queries, w_k, w_v, num_heads, dropout_p)
        )
    if form == "projected":
        out = _projected(x, *args, **options, **norm, **dropout)
    else:
        pool = _PoolFused.apply if chosen == "fused" else _pool_composed
        out = _absorbed(pool, x, *args[:4], **options, **norm, **dropout)
        out = out if b_k is None else _with_zero_gradient(out, b_k)
    return out if lengths is None else nan_unless(lengths, x.shape[1], out)


def pool_projected(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    reasons: list[str],
) -> Tensor:
    """:func:`query_pooling` of keys (B, N, Dk) and values (B, N, Dv) that others have projected.

    ``reasons``: why, which are reasons against the kernels. Only ``backend("fused")`` takes them
    here: tokens [k v] are pooled, of which the keys' half makes the logits and the values' the
    sums."""
    op, (batch, length, k_dim), v_dim = "query_pooling", k.shape, v.shape[-1]
    cast = autocast_dtype(k.device.type)
    dtype = k.dtype if cast is None or k.dtype == torch.float64 else cast
    queries, k, v = (y.to(dtype) for y in (queries, k, v))
    if current_backend() == "fused":
        eye = torch.eye(k_dim + v_dim, dtype=k.dtype, device=k.device)
        return query_pooling(
            torch.cat([k, v], -1),
            queries,
            eye[:k_dim],
            eye[k_dim:],
            num_heads=num_heads,
            key_padding_mask=key_padding_mask,
            lengths=lengths,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
        )
    with no_autocast(k.device.type):
        reference = choose(op, k.device, k.dtype, reasons) == "reference"
        if dropout_p and dropout_seed is None:
            dropout_seed = draw_seed(k.device)
        ignore = padding_mask(batch, length, key_padding_mask, lengths, k.device)
        attend = _attend_reference if reference else _attend
        scale = (k_dim // num_heads) ** -0.5
        out = attend(queries, k, v, ignore, num_heads, scale, dropout_p, dropout_seed)
    return out if lengths is None else nan_unless(lengths, length, out)
