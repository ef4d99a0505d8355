"""Query pooling in plain PyTorch: the absorbed and the projected form, and the choice of form.

The equations and symbols are in reference.py.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tuned_file
from ...library import active_exporter
from ...random import keep_mask
from ...switch import constant_when_traced
from .._common import masked_logsumexp, masked_softmax
from .._sdpa import attention
from .autograd import HeadProduct
from .reference import PoolingOptions, PoolingWeights, attend_reference, merge_heads, split_heads

Form = Literal["absorbed", "projected"]

# form="auto" picks the absorbed form if the projected form needs at least this many times the FLOPs
# of the absorbed form. The measured break-even on a CPU is 1.2; the value for CUDA is not measured,
# and `mmfused tune` replaces it.
# For dropout and the log-sum-exp, the projected form cannot use torch's attention: the factor is 1.
ABSORBED_MUST_SAVE = {"cpu": 1.25, "cuda": 2.0}


@constant_when_traced
def absorbed_must_save(device_type: str) -> float:
    """Return the factor of ABSORBED_MUST_SAVE for a device, or that of the GPU's tuned file."""
    if device_type == "cpu":
        return ABSORBED_MUST_SAVE["cpu"]
    found = tuned_file.current()
    factor = None if found is None else found.absorbed_must_save
    return ABSORBED_MUST_SAVE["cuda"] if factor is None else factor


def form_flops(
    batch: int,
    length: int,
    dim: int,
    queries: int,
    k_dim: int,
    v_dim: int,
    num_heads: int,
    shared: bool = True,
) -> dict[Form, int]:
    """Return the FLOPs of each form, forward and backward with all gradients.

    ``shared``: whether all samples have the same queries.
    """
    absorb = 6 * queries * k_dim * dim * (1 if shared else batch)
    per_sample = 14 * num_heads * queries * length * dim + 6 * queries * v_dim * dim
    projections = 6 * length * dim * (k_dim + v_dim)
    attend = 7 * queries * length * (k_dim + v_dim)
    return {"absorbed": batch * per_sample + absorb, "projected": batch * (projections + attend)}


def cheaper_form(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    num_heads: int,
    explicit: bool = False,
) -> Form:
    """Return the form that form="auto" picks for these shapes.

    ``explicit``: whether the projected form has to compute the logits without torch's attention.
    """
    batch, length, dim = x.shape
    if active_exporter():  # an exported graph serves any size, so assume large sizes
        batch, length = 2**20, 2**20
    shared = queries.dim() == 2
    sizes = (queries.shape[-2], w_k.shape[0], w_v.shape[0], num_heads)
    flops = form_flops(batch, length, dim, *sizes, shared)
    margin = 1.0 if explicit else absorbed_must_save(x.device.type)
    return "absorbed" if flops["absorbed"] * margin <= flops["projected"] else "projected"


def absorb(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the absorbed queries q' (R, D) or (B, R, D), the weight w_v and the bias b_v.

    The LayerNorm's weight and bias are folded into the results. ``fused``: whether the kernels pool
    the tokens.
    """
    w_k, w_v, b_v = _folded_norm(x, weights, options)
    return _absorbed_queries(x, queries, w_k, options, fused), w_v, b_v


def project_values(
    x: Tensor,
    z: Tensor,
    ksum: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    options: PoolingOptions,
    fused: bool,
) -> Tensor:
    """Project the pooled tokens z (B, R, D) to the output (B, L, Dv).

    ``ksum`` (B, R) is None without dropout. ``fused``: see :func:`absorb`.
    """
    num_heads = options.num_heads
    w_v = w_v.to(x.dtype)
    empty = None
    if b_v is not None and ksum is None:
        empty = empty_samples(x, options.key_padding_mask, options.lengths)
    # The product adds the bias, unless it differs between rows.
    bias = b_v if ksum is None and empty is None else None
    if num_heads == 1:
        out = F.linear(z, w_v, None if bias is None else bias.to(x.dtype))
    else:
        z = split_rows(z, options)  # (B, L, h, D)
        w_v = w_v.unflatten(0, (num_heads, -1)).mT  # (h, D, dv)
        if active_exporter() == "onnx":
            # If B = num_heads, ONNX's optimizer confuses these two sizes in the other branch.
            out = merge_heads(z.transpose(1, 2) @ w_v)
            out = out if bias is None else out + bias.to(x.dtype)
        else:
            bias = None if bias is None else bias.unflatten(0, (num_heads, -1))
            out = _head_product(z.flatten(0, 1), w_v, bias, 1.0, fused)
            out = out.unflatten(0, z.shape[:2]).flatten(2)

    if ksum is not None:
        if b_v is not None:
            per_head = split_rows(ksum, options)[..., None]  # (B, L, h, 1)
            bias = b_v.to(ksum.dtype).unflatten(0, (num_heads, -1))
            out = out + (per_head * bias).flatten(2)
        return (out / (1 - options.dropout_p)).to(x.dtype)
    if b_v is None or empty is None:
        return out
    return out + b_v.to(x.dtype) * ~empty[:, None, None]


def split_rows(rows: Tensor, options: PoolingOptions) -> Tensor:
    """View (B, R, ...) as (B, L, num_heads, ...).

    The rows of a query's heads are adjacent, so the rows of one head over the whole batch are
    evenly spaced, and a product reads them without a copy. With dropout the order is
    (num_heads, L), that of its mask.
    """
    if options.dropout_p:
        return rows.unflatten(1, (options.num_heads, -1)).transpose(1, 2)
    return rows.unflatten(1, (-1, options.num_heads))


def _head_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    fused: bool,
) -> Tensor:
    """Multiply each head's part of a (M, h, K) by b (h, K, N), and by ``scale``; add the bias.

    ``fused``: use HeadProduct, which takes fewer launches, but which exporters and forward-mode
    derivatives cannot trace.
    """
    if fused and not active_exporter():
        return HeadProduct.apply(a, b, bias, scale)
    a = a.transpose(0, 1)
    out = ((a if scale == 1.0 else a * scale) @ b).transpose(0, 1)
    return out if bias is None else out + bias.to(out.dtype)


def whole_lse(
    lse: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> Tensor:
    """Return the log-sum-exp (B, h, L) of the logits, from that of the absorbed logits (B, R).

    Adds the terms of b_k and of the norm's bias, which are equal for all tokens.
    """
    num_heads = options.num_heads
    lse = split_rows(lse, options).transpose(1, 2).contiguous()  # (B, h, L)
    shift = None if weights.b_k is None else weights.b_k.to(lse.dtype)
    if options.norm_bias is not None:
        moved = weights.w_k.to(lse.dtype) @ options.norm_bias.to(lse.dtype)
        shift = moved if shift is None else shift + moved
    if shift is None:
        return lse
    q = queries.to(lse.dtype).unflatten(-1, (num_heads, -1))  # (..., L, h, dk)
    terms = (q * shift.unflatten(0, (num_heads, -1))).sum(-1) * _scale(weights.w_k, options)
    empty = lse.isneginf()
    return (lse + terms.transpose(-1, -2)).masked_fill(empty, -math.inf)


def _folded_norm(
    x: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fold the LayerNorm's weight and bias into w_k, w_v and b_v, in float32 or float64."""
    w_k, w_v, b_v, _ = weights
    if options.norm_weight is None:
        return w_k, w_v, b_v
    wide = torch.promote_types(x.dtype, torch.float32)
    if options.norm_bias is not None:
        shift = w_v.to(wide) @ options.norm_bias.to(wide)
        b_v = shift if b_v is None else shift + b_v.to(wide)
    norm_weight = options.norm_weight.to(wide)  # this promotes w_k and w_v
    return centred(w_k * norm_weight), centred(w_v * norm_weight), b_v


def centred(w: Tensor) -> Tensor:
    """Subtract from each row of w its mean.

    A normalised token sums to zero, so its projection does not change. The gradient of a normalised
    token then sums to zero too, which the kernels assume.
    """
    return w - w.mean(1, keepdim=True)


def _absorbed_queries(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    options: PoolingOptions,
    fused: bool,
) -> Tensor:
    """Return the absorbed queries q' (R, D) or (B, R, D)."""
    # The product of shared queries is small, so it is computed in float32 or float64.
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = wide if queries.dim() == 2 else x.dtype
    heads = (options.num_heads, -1)
    q = queries.to(dtype).unflatten(-1, heads)  # (..., L, h, dk)
    w_k = w_k.to(dtype).unflatten(0, heads)
    out = _head_product(q.flatten(0, -3), w_k, None, _scale(w_k.flatten(0, 1), options), fused)
    out = out.unflatten(0, queries.shape[:-1])  # (..., L, h, D)
    return (out.transpose(-3, -2) if options.dropout_p else out).flatten(-3, -2)


def _scale(w_k: Tensor, options: PoolingOptions) -> float:
    if options.scale is not None:
        return options.scale
    return (w_k.shape[0] // options.num_heads) ** -0.5


def pool_composed(
    x: Tensor,
    q: Tensor,
    options: PoolingOptions,
    eps: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Pool tokens x (B, N, D) with absorbed queries q (R, D) or (B, R, D): z = softmax(q x^T) x.

    If ``eps`` is given, the tokens are first normalised to mean 0 and variance 1.

    Returns:
        z (B, R, D), ksum (B, R), which is None without dropout, and the log-sum-exp of the logits
        (B, R) or None. Both are float32 or float64. z and ksum are not divided by 1 - dropout_p.
    """
    q = q.to(x.dtype)
    ignore = options.ignored(x)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)
    if eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
    on_cpu = x.device.type == "cpu"
    if on_cpu:  # one product per sample has up to 5 times less error in dq
        q = q.expand(x.shape[0], *q.shape[-2:])
    if on_cpu and q.shape[-2] <= 8:  # backward up to 1.8 times faster than with x q^T
        logits = (q @ x.transpose(1, 2)).transpose(1, 2)  # (B, N, R)
    else:
        logits = x @ q.transpose(-1, -2)
    masked = None if ignore is None else ignore[:, :, None]
    probs = masked_softmax(logits, masked, 1)
    lse = masked_logsumexp(logits, masked, 1) if options.return_lse else None
    if options.dropout_p:
        shape = (x.shape[0], q.shape[-2], x.shape[1])
        seed = options.dropout_seed
        assert seed is not None
        probs = probs * keep_mask(seed, shape, options.dropout_p).transpose(1, 2)
    z = probs.to(x.dtype).transpose(1, 2) @ x
    return z, probs.sum(1) if options.dropout_p else None, lse


def empty_samples(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Return a bool (B,), True for samples without tokens, or None if no sample can be empty.

    Masked tokens do not count. x is (B, N, D), or packed with its lengths.
    """
    if x.dim() == 3 and not x.shape[1]:
        return x.new_ones(x.shape[0], dtype=torch.bool)
    if mask is not None:
        return mask.all(1)
    return None if lengths is None else lengths == 0


def projected(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor | None]:
    """Pool in the projected form. Return what :func:`attend` returns."""
    ignore = options.ignored(x)
    if ignore is not None:
        x = x.masked_fill(ignore[:, :, None], 0.0)
    if options.norm_weight is not None:
        bias = None if options.norm_bias is None else options.norm_bias.to(x.dtype)
        x = F.layer_norm(
            x,
            x.shape[-1:],
            options.norm_weight.to(x.dtype),
            bias,
            options.norm_eps,
        )
    w_k, w_v, b_v, b_k = weights.to(x.dtype)
    k = F.linear(x, w_k, b_k)
    v = F.linear(x, w_v, b_v)
    return attend(queries.to(x.dtype), k, v, ignore, options)


def attend(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    ignore: Tensor | None,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor | None]:
    """Attend to keys k (B, N, Dk) and values v (B, N, Dv).

    Return the output (B, L, Dv), and the log-sum-exp (B, h, L) or None.
    """
    # torch's attention would draw its own dropout mask, and does not return the log-sum-exp.
    if options.dropout_p or options.return_lse:
        return attend_reference(queries, k, v, ignore, options)
    q, k, v = split_heads(queries, k, v, options.num_heads)
    if ignore is None:
        return merge_heads(attention(q, k, v, scale=options.scale)), None
    # Some backends of torch's attention do not give output 0 and gradient 0 for a sample without
    # tokens. Here such a sample attends to all its tokens, and its output is set to 0 afterwards.
    empty = ignore.all(1)
    allowed = ~(ignore & ~empty[:, None])[:, None, None, :]
    out = merge_heads(attention(q, k, v, allowed, options.scale))
    return out.masked_fill(empty[:, None, None], 0.0), None
