"""Backward of top-k routing: the gradient of the logits.

Probabilities are recomputed from the logits. The forward saves the choice, the weights and the
coefficients (see Statistics in order.py). router_gradients.py computes the gradients of x and of
the router's weight.
"""

from __future__ import annotations

from dataclasses import asdict

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, dense, rounded_product
from .plans import plan, width
from .scores import (
    as_bytes,
    choices_outside,
    jitter_factor,
    load_allowed,
    load_choice,
    load_logits,
    load_segment,
    scores,
    tokens_kept,
)


def backward(
    d_weights: Tensor | None,  # (T, k)
    d_balance: Tensor | None,  # ()
    d_z: Tensor | None,  # ()
    d_entropy: Tensor | None,  # ()
    logits: Tensor,  # (T, E)
    indices: Tensor,  # (T, k)
    weights: Tensor,  # (T, k)
    coefficients: Tensor,  # (S * E + 1,)
    sigmoid: bool,
    renormalize: bool,
    mask: Tensor | None,  # (T,) bool
    segments: Tensor | None,  # (T,) int64
    num_segments: int,
    available: Tensor | None,  # (S, E) bool
    balance: str,
    jitter: float,
    jitter_seed: Tensor | None,  # () int64
) -> Tensor:
    """Compute d_logits (T, E), contiguous. One launch."""
    tokens, experts = logits.shape
    rows = plan(experts, logits.dtype, arch_of(logits), False).rows
    d_logits = logits.new_empty(logits.shape)
    logits_kernel[(triton.cdiv(tokens, rows.BR),)](
        d_weights_ptr=dense(d_weights),
        d_balance_ptr=d_balance,
        d_z_ptr=d_z,
        d_entropy_ptr=d_entropy,
        logits_ptr=logits,
        indices_ptr=indices.contiguous(),
        weights_ptr=weights,
        coefficients_ptr=coefficients,
        mask_ptr=as_bytes(mask),
        segments_ptr=dense(segments),
        available_ptr=as_bytes(available),
        seed_ptr=jitter_seed if jitter else None,
        d_logits_ptr=d_logits,
        T=tokens,
        stride_n=logits.stride(0),
        stride_e=logits.stride(1),
        jitter=jitter,
        E=experts,
        K=indices.shape[1],
        S=num_segments,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        BALANCE=balance,
        BE=width(experts),
        **asdict(rows),
        num_stages=1,
        **OPTIONS,
    )
    return d_logits


@triton.jit
def logits_kernel(
    d_weights_ptr,  # (T, K) or None
    d_balance_ptr,  # () or None
    d_z_ptr,  # () or None
    d_entropy_ptr,  # () or None
    logits_ptr,  # (T, E)
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    coefficients_ptr,  # (S * E + 1,)
    mask_ptr,  # (T,) or None
    segments_ptr,  # (T,) or None
    available_ptr,  # (S, E) or None
    seed_ptr,  # () or None
    d_logits_ptr,  # (T, E)
    T,
    stride_n,
    stride_e,
    jitter,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BALANCE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """Compute d_logits from the gradients of weights, balance, z and entropy (None: no gradient).

    grid (T / BR,). The gradient through a softmax sums to 0 over the experts. P times the computed
    sum is subtracted, because rounding errors make this sum nonzero, most of all if a P is near 1.
    """
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    experts = tl.arange(0, BE)
    keep = tokens_kept(n, mask_ptr, T)
    logits = load_logits(logits_ptr, n, experts, keep, stride_n, stride_e, E)
    if seed_ptr is not None:
        factor = jitter_factor(seed_ptr, jitter, n, experts)
        logits *= factor
    segment, broken = load_segment(segments_ptr, n, T, S)
    allowed, broken = load_allowed(available_ptr, segment, broken, experts, E, K)
    broken = broken | choices_outside(indices_ptr, n, keep, E, K)
    logits = tl.where((broken & keep)[:, None], float("nan"), logits)
    _, p, log_p, p_logits, lse = scores(logits, allowed, SIGMOID)
    per_token = tl.load(coefficients_ptr + S * E)
    gp = tl.zeros([BR, BE], tl.float32)
    du = tl.zeros([BR, BE], tl.float32)
    if d_balance_ptr is not None and BALANCE != "mse":
        c = tl.load(
            coefficients_ptr + segment[:, None] * E + experts[None, :],
            mask=experts[None, :] < E,
            other=0.0,
        )
        gp += tl.load(d_balance_ptr) * c
    if d_entropy_ptr is not None:
        gp -= tl.where(p > 0, tl.load(d_entropy_ptr) * per_token * (log_p + 1.0), 0.0)
    if d_weights_ptr is not None or (d_balance_ptr is not None and BALANCE == "mse"):
        mean = tl.zeros([BR], tl.float32)
        rest = tl.zeros([BR], tl.float32)
        if RENORMALIZE:
            for j in range(K):
                at, w, g = _upstream(
                    d_weights_ptr,
                    d_balance_ptr,
                    indices_ptr,
                    weights_ptr,
                    coefficients_ptr,
                    n,
                    j,
                    keep,
                    segment,
                    E,
                    K,
                    BALANCE,
                )
                mean += w * g
            for j in range(K):
                at, w, g = _upstream(
                    d_weights_ptr,
                    d_balance_ptr,
                    indices_ptr,
                    weights_ptr,
                    coefficients_ptr,
                    n,
                    j,
                    keep,
                    segment,
                    E,
                    K,
                    BALANCE,
                )
                rest += w * (g - mean)
        for j in range(K):
            at, w, g = _upstream(
                d_weights_ptr,
                d_balance_ptr,
                indices_ptr,
                weights_ptr,
                coefficients_ptr,
                n,
                j,
                keep,
                segment,
                E,
                K,
                BALANCE,
            )
            here = experts[None, :] == at[:, None]
            if RENORMALIZE or SIGMOID:
                du += tl.where(here, (w * (g - mean - rest))[:, None], 0.0)
            else:
                gp += tl.where(here, g[:, None], 0.0)
    d = rounded_product(p, gp - tl.sum(rounded_product(p, gp), 1)[:, None])
    d += du - p * tl.sum(d, 1)[:, None]
    if SIGMOID:
        d *= tl.sigmoid(-logits)
    if d_z_ptr is not None:
        d += (tl.load(d_z_ptr) * per_token * 2.0) * lse[:, None] * p_logits
    if seed_ptr is not None:
        d *= factor
    d = tl.where(keep[:, None] & allowed, d, 0.0)
    at = n[:, None].to(tl.int64) * E + experts[None, :]
    tl.store(d_logits_ptr + at, d, mask=(n[:, None] < T) & (experts[None, :] < E))


@triton.jit
def _upstream(
    d_weights_ptr,  # (T, K) or None
    d_balance_ptr,  # () or None
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    coefficients_ptr,  # (S * E + 1,)
    n,
    j,
    keep,
    segment,
    E: tl.constexpr,
    K: tl.constexpr,
    BALANCE: tl.constexpr,
):
    """Return the expert in slot j, its weight, and the weight's upstream gradient.

    With "mse", this gradient includes the contribution of the balance loss.
    """
    at, _ = load_choice(indices_ptr, n, j, keep, E, K)
    w = tl.load(weights_ptr + n.to(tl.int64) * K + j, mask=keep, other=0.0)
    g = tl.zeros_like(w)
    if d_weights_ptr is not None:
        g += tl.load(d_weights_ptr + n.to(tl.int64) * K + j, mask=keep, other=0.0)
    if d_balance_ptr is not None and BALANCE == "mse":
        g += tl.load(d_balance_ptr) * tl.load(coefficients_ptr + segment * E + at)
    return at, w, g
