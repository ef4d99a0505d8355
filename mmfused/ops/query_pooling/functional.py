"""The public function of query pooling; the equations are in reference.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from ...library import (
    autocast_dtype,
    choose,
    current_backend,
    nan_unless,
    no_autocast,
    wide_unless,
)
from ...random import draw_seed
from .autograd import Pool, pool_arguments, pool_results, with_zero_gradient
from .checks import check
from .composed import (
    Form,
    absorb,
    attend,
    cheaper_form,
    pool_composed,
    project_values,
    projected,
    whole_lse,
)
from .reference import (
    PoolingOptions,
    PoolingWeights,
    attend_reference,
    packed_lengths,
    pool_reference,
    unpacked,
)


@overload
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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: Literal[False] = False,
    form: Literal["auto", "absorbed", "projected"] = "auto",
) -> Tensor: ...


@overload
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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: Literal[True],
    form: Literal["auto", "absorbed", "projected"] = "auto",
) -> tuple[Tensor, Tensor]: ...


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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    form: Literal["auto", "absorbed", "projected"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool tokens with learned queries.

    Computes ``softmax(scale * Q K^T) V`` with ``K = x w_k^T + b_k`` and ``V = x w_v^T + b_v``.

    Args:
        x: tokens (B, N, D), or packed tokens (total, D); float32, float16, bfloat16 or float64.
        queries: projected queries, (B, L, Dk), or (L, Dk) for all samples.
        w_k: (Dk, D), weight of the key projection, as ``nn.Linear.weight``.
        w_v: (Dv, D), weight of the value projection.
        b_v: (Dv,), bias of the value projection.
        b_k: (Dk,), bias of the key projection. It has no effect on the output, only on the
            log-sum-exp; in the absorbed form its gradient through the output is exactly zero.
        num_heads: number of heads, a divisor of Dk and Dv.
        scale: factor of the logits, default ``(Dk / num_heads) ** -0.5``.
        key_padding_mask: (B, N) bool, True = ignore. Ignored tokens may be NaN. A sample in which
            all tokens are ignored gives output 0 (not the value bias) and gradient 0.
        lengths: (B,) int; only the first ``lengths[b]`` tokens of sample b count. An alternative to
            the mask.
        cu_seqlens: (B + 1,) int32 or int64, for packed tokens: those of sample b are the rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1`` of ``x``. The values are sorted, and at
            most the number of rows. They stay on the device. Rows outside of all samples may be NaN
            and have gradient 0. Instead of the mask and ``lengths``; the names are those of
            flash-attention.
        max_seqlen: the maximum number of tokens of a sample, or a bound on it. Needed with
            ``cu_seqlens``; it bounds the work of the kernels, which skip what is not there. Without
            kernels the tokens are padded to (B, max_seqlen, D).
        norm_weight: (D,), weight of a LayerNorm over ``x`` before both projections; None for no
            LayerNorm. The kernels do not support a LayerNorm with D = 2.
        norm_bias: (D,), bias of the LayerNorm.
        norm_eps: epsilon of the LayerNorm.
        dropout_p: dropout rate of the attention probabilities, in [0, 1).
        dropout_seed: int64 scalar tensor, default drawn from the device's generator. A seed gives
            the same dropout mask on every backend (``mmfused.testing.dropout_mask``).
        return_lse: whether to return the log-sum-exp of the logits too.
        form: "absorbed" never computes K or V. "projected" computes K and V, and has no kernel.
            "auto" compares the FLOPs of both forms; under ``backend("fused")`` it is "absorbed".
            ``backend("reference")`` ignores ``form``.

    Returns:
        (B, L, Dv) in the dtype of ``x``, or in the autocast dtype under autocast. With
        ``return_lse``, a tuple of it and the natural logarithm of the sum of the exponentials of
        each row's logits: (B, num_heads, L) in float32, or in float64 for float64 ``x``. The sum
        is over all tokens that count, whether or not dropout drops them; a sample without tokens
        has -inf. It has gradients, so poolings of parts of the tokens can be merged.

    Raises:
        TypeError, ValueError: bad input; raised before any kernel is launched.
        RuntimeError: ``backend("fused")`` cannot run; raised before any kernel is launched.

    Source: FLUID (arXiv 2508.07264), equations 3-8. The absorbed form is specific to this library.

    Examples:
        >>> import torch, mmfused
        >>> x, queries = torch.randn(4, 50, 32), torch.randn(2, 16)
        >>> w_k, w_v = torch.randn(16, 32) / 6, torch.randn(24, 32) / 6
        >>> pooled = mmfused.query_pooling(x, queries, w_k, w_v)
        >>> pooled.shape
        torch.Size([4, 2, 24])
        >>> probabilities = torch.softmax(queries @ (x @ w_k.T).mT / 16**0.5, dim=-1)
        >>> torch.allclose(pooled, probabilities @ (x @ w_v.T), atol=1e-5)
        True

        The poolings of two parts of the tokens merge to that of all tokens:

        >>> parts = [
        ...     mmfused.query_pooling(part, queries, w_k, w_v, return_lse=True)
        ...     for part in (x[:, :20], x[:, 20:])
        ... ]
        >>> outs, lses = (torch.stack(each) for each in zip(*parts))
        >>> shares = torch.softmax(lses, 0)  # (2, 4, 1, 2): parts, samples, heads, queries
        >>> merged = (shares.mT * outs).sum(0)  # for one head
        >>> torch.allclose(merged, pooled, atol=1e-5)
        True
    """
    weights = PoolingWeights(w_k, w_v, b_v, b_k)
    options = PoolingOptions(
        num_heads=num_heads,
        scale=scale,
        key_padding_mask=key_padding_mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    x, queries, weights, options = _autocast(x, queries, weights, options)
    check(x, queries, weights, options, form)
    backend = choose("query_pooling", x.device, x.dtype, _why_no_kernel(x, options, form))
    if dropout_p and dropout_seed is None:
        options = replace(options, dropout_seed=draw_seed(x.device))
    if form == "auto":
        form = _auto_form(x, queries, weights, options)
    length = x.shape[1]
    if cu_seqlens is not None:
        assert max_seqlen is not None
        lengths, length = packed_lengths(x, cu_seqlens), max_seqlen
        if backend == "fused" and form == "absorbed":
            options = replace(options, lengths=lengths)
        elif backend != "reference":
            x, options = unpacked(x, options)
    with no_autocast(x.device.type):  # weights are folded before they are rounded
        if backend == "reference":
            out, lse = _pool_reference(x, queries, weights, options)
        elif form == "projected":
            out, lse = projected(x, queries, weights, options)
        else:
            fused = backend == "fused"
            q, w_v, b_v = absorb(x, queries, weights, options, fused)
            eps = None if norm_weight is None else norm_eps
            if fused:
                pooled = Pool.apply(*pool_arguments(x, q, options, eps))
                z, ksum, lse = pool_results(pooled, options)
            else:
                z, ksum, lse = pool_composed(x, q, options, eps)
            out = project_values(x, z, ksum, w_v, b_v, options, fused)
            out = out if b_k is None else with_zero_gradient(out, b_k)
            lse = None if lse is None else whole_lse(lse, queries, weights, options)
    if lengths is not None:
        out = nan_unless(lengths, length, out)
        lse = None if lse is None else nan_unless(lengths, length, lse)
    return out if lse is None else (out, lse)


def _autocast(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor, PoolingWeights, PoolingOptions]:
    """Cast x to the autocast dtype, and parameters in the other 16-bit dtype to float32.

    Without autocast, or if ``x`` is float64 or not a tensor, nothing changes.
    """
    cast = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if cast is None or x.dtype == torch.float64:
        return x, queries, weights, options
    queries, *parts = wide_unless(cast, queries, *weights)
    norm_weight, norm_bias = wide_unless(cast, options.norm_weight, options.norm_bias)
    options = replace(options, norm_weight=norm_weight, norm_bias=norm_bias)
    return x.to(cast), queries, PoolingWeights(*parts), options


def _why_no_kernel(x: Tensor, options: PoolingOptions, form: str) -> list[str]:
    reasons = ["form='projected' has no kernel"] if form == "projected" else []
    if options.norm_weight is not None and x.shape[-1] == 2:
        # Two normalised features are close to 1 and -1, so dx would be mostly rounding error.
        reasons.append("a LayerNorm of two features has no kernel")
    return reasons


def _auto_form(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> Form:
    if current_backend() == "fused":  # only the absorbed form has kernels
        return "absorbed"
    explicit = bool(options.dropout_p) or options.return_lse
    if options.cu_seqlens is not None:
        assert options.max_seqlen is not None
        padded = (options.cu_seqlens.shape[0] - 1, options.max_seqlen, x.shape[1])
        x = x.new_empty(()).expand(padded)  # only its shape counts
    return cheaper_form(x, queries, weights.w_k, weights.w_v, options.num_heads, explicit)


def _pool_reference(
    x: Tensor,
    queries: Tensor,
    weights: PoolingWeights,
    options: PoolingOptions,
) -> tuple[Tensor, Tensor | None]:
    norm = (options.norm_weight, options.norm_bias)
    norm_weight, norm_bias = (None if t is None else t.to(x.dtype) for t in norm)
    options = replace(options, norm_weight=norm_weight, norm_bias=norm_bias)
    return pool_reference(x, queries.to(x.dtype), weights.to(x.dtype), options)


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
    """Pool projected keys k (B, N, Dk) and values v (B, N, Dv).

    ``reasons``: why the kernels cannot compute the projections. ``backend("fused")`` pools the
    concatenated tokens [k v] instead, with weights that select k and v.
    """
    length, k_dim = k.shape[1:]
    v_dim = v.shape[-1]
    scale = (k_dim // num_heads) ** -0.5
    options = PoolingOptions(
        num_heads=num_heads,
        scale=scale,
        key_padding_mask=key_padding_mask,
        lengths=lengths,
        cu_seqlens=None,
        max_seqlen=None,
        norm_weight=None,
        norm_bias=None,
        norm_eps=0.0,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=False,
    )
    cast = autocast_dtype(k.device.type)
    dtype = k.dtype if cast is None or k.dtype == torch.float64 else cast
    queries, k, v = (y.to(dtype) for y in (queries, k, v))
    with no_autocast(k.device.type):
        if current_backend() == "fused":
            eye = torch.eye(k_dim + v_dim, dtype=k.dtype, device=k.device)
            return query_pooling(
                torch.cat([k, v], -1),
                queries,
                eye[:k_dim],
                eye[k_dim:],
                num_heads=num_heads,
                scale=scale,
                key_padding_mask=key_padding_mask,
                lengths=lengths,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
            )
        backend = choose("query_pooling", k.device, k.dtype, reasons)
        if dropout_p and dropout_seed is None:
            options = replace(options, dropout_seed=draw_seed(k.device))
        ignore = options.ignored(k)
        pool = attend_reference if backend == "reference" else attend
        out, _ = pool(queries, k, v, ignore, options)
    return out if lengths is None else nan_unless(lengths, length, out)
