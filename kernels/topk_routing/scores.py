"""Device functions that load logits and masks and compute scores, for forward and backward.

A tile has BR tokens and BE experts. BE is a power of two, and columns from E on are padding. A
token is ``broken`` if its segment or an expert index from the caller is out of range, or if fewer
than K experts are available to it. The weights of a broken token are NaN, unless it is masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Return bools as contiguous bytes; None stays None."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


@triton.jit
def tokens_kept(n, mask_ptr, T):
    """Return which of the tokens n exist and are not masked. In the mask, 1 means masked."""
    keep = n < T
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + n, mask=n < T, other=1) == 0)
    return keep


@triton.jit
def load_logits(
    ptr,
    n,
    experts,
    keep,
    stride_n,
    stride_e,
    E: tl.constexpr,
):
    """Load (tokens, experts) as float32; 0 for tokens that are not kept, which may hold NaN."""
    at = n[:, None].to(tl.int64) * stride_n + experts[None, :].to(tl.int64) * stride_e
    return tl.load(ptr + at, mask=keep[:, None] & (experts[None, :] < E), other=0.0).to(tl.float32)


@triton.jit
def load_choice(
    indices_ptr,
    n,
    slots,
    keep,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """Return a pair: the experts in these slots clamped to [0, E), and the experts as stored."""
    given = tl.load(indices_ptr + n.to(tl.int64) * K + slots, mask=keep, other=0)
    return tl.minimum(tl.maximum(given, 0), E - 1).to(tl.int32), given


@triton.jit
def load_segment(
    segments_ptr,
    n,
    T,
    S: tl.constexpr,
):
    """Return the segment of each token, clamped to [0, S), and which segments were out of range.

    Without segments, every token is in segment 0.
    """
    segment = tl.zeros_like(n)
    broken = n < 0
    if segments_ptr is not None:
        given = tl.load(segments_ptr + n, mask=n < T, other=0)
        segment = tl.minimum(tl.maximum(given, 0), S - 1).to(tl.int32)
        broken = given != segment
    return segment, broken


@triton.jit
def load_allowed(
    available_ptr,
    segment,
    broken,
    experts,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """Return which experts each token may use, and which tokens are broken.

    Tokens with fewer than K available experts are added to ``broken``. Broken tokens may use all
    experts, so that K different experts can be chosen.
    """
    exists = (experts < E)[None, :]
    allowed = exists
    if available_ptr is not None:
        allowed = (
            tl.load(available_ptr + segment[:, None] * E + experts[None, :], mask=exists, other=0)
            != 0
        )
        broken = broken | (tl.sum(allowed.to(tl.int32), 1) < K)
        allowed = allowed | (broken[:, None] & exists)
    return allowed, broken


@triton.jit
def choices_outside(
    indices_ptr,
    n,
    keep,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """Return which tokens have a choice outside [0, E)."""
    broken = n < 0
    for j in range(K):
        at, given = load_choice(indices_ptr, n, j, keep, E, K)
        broken = broken | (given != at)
    return broken


@triton.jit
def jitter_factor(
    seed_ptr,
    jitter,
    n,
    experts,
):
    """Return random factors from 1 - jitter to 1 + jitter.

    The random numbers equal those of mmfused.random.uniform, whatever the tile is.
    """
    zero = tl.zeros([n.shape[0], experts.shape[0]], tl.uint32)
    word, _, _, _ = tl.philox(
        tl.load(seed_ptr),
        zero + n[:, None].to(tl.uint32),
        zero + experts[None, :].to(tl.uint32),
        zero,
        zero,
    )
    return 1.0 + jitter * (2.0 * tl.uint_to_uniform_float(word) - 1.0)


@triton.jit
def softmax(x):
    """Return the softmax P over the second axis, log P and the log-sum-exp.

    As in PyTorch, P is NaN in a row that holds NaN or inf, or only -inf. The log-sum-exp of such a
    row is NaN, inf or -inf, respectively. log P is not computed from the log-sum-exp, which has too
    few digits at large logits.
    """
    top = tl.max(x, 1)
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    x -= top[:, None]
    p = tl.exp(x)
    total = tl.sum(p, 1)
    lse = top + tl.log(total)
    total = tl.where(total < float("inf"), total, float("nan"))
    return p / total[:, None], x - tl.log(total)[:, None], lse


@triton.jit
def scores(logits, allowed, SIGMOID: tl.constexpr):
    """Return u, P = softmax(u), log P, softmax(logits), and the log-sum-exp of the logits.

    u is the logits or, with SIGMOID, log(sigmoid(logits)). Both softmaxes and the log-sum-exp leave
    out experts that are not allowed, and u of such an expert is -inf.
    """
    u = logits
    if SIGMOID:
        u = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
    u = tl.where(allowed, u, float("-inf"))
    p, log_p, lse = softmax(u)
    p_logits = p
    if SIGMOID:
        p_logits, _, lse = softmax(tl.where(allowed, logits, float("-inf")))
    return u, p, log_p, p_logits, lse
