"""What forward and backward both make of logits, BR tokens by BE experts: a power of two, of which
columns beyond E are void.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_kept(n, mask_ptr, T):
    """Which of the tokens n exist and are not masked (1 = ignore)."""
    keep = n < T
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + n, mask=n < T, other=1) == 0)
    return keep


@triton.jit
def load_logits(ptr, n, experts, keep, stride_n, stride_e, E: tl.constexpr):
    """(tokens, experts) in float32, 0 for tokens that are not kept: they may hold NaN."""
    at = n[:, None].to(tl.int64) * stride_n + experts[None, :].to(tl.int64) * stride_e
    return tl.load(ptr + at, mask=keep[:, None] & (experts[None, :] < E), other=0.0).to(tl.float32)


@triton.jit
def load_choice(indices_ptr, n, slots, keep, E: tl.constexpr, K: tl.constexpr):
    """The expert chosen in these slots, forced into [0, E), and what was given."""
    given = tl.load(indices_ptr + n.to(tl.int64) * K + slots, mask=keep, other=0)
    return tl.minimum(tl.maximum(given, 0), E - 1).to(tl.int32), given


@triton.jit
def load_segment(segments_ptr, n, T, S: tl.constexpr):
    """The segment of each token, forced into [0, S), and whether it lay outside; all are of the
    first where none are given.
    """
    segment = tl.zeros_like(n)
    void = n < 0
    if segments_ptr is not None:
        given = tl.load(segments_ptr + n, mask=n < T, other=0)
        segment = tl.minimum(tl.maximum(given, 0), S - 1).to(tl.int32)
        void = given != segment
    return segment, void


@triton.jit
def load_allowed(available_ptr, segment, void, experts, E: tl.constexpr, K: tl.constexpr):
    """Which experts a token may use: (tokens, experts), or one row for all tokens; and the void
    tokens, with those whose segment has fewer than K. They may use all experts, so that their
    choice is of K different ones like any other."""
    exists = (experts < E)[None, :]
    allowed = exists
    if available_ptr is not None:
        allowed = (
            tl.load(available_ptr + segment[:, None] * E + experts[None, :], mask=exists, other=0)
            != 0
        )
        void = void | (tl.sum(allowed.to(tl.int32), 1) < K)
        allowed = allowed | (void[:, None] & exists)
    return allowed, void


@triton.jit
def choices_outside(indices_ptr, n, keep, E: tl.constexpr, K: tl.constexpr):
    """The tokens of which a choice is no expert."""
    void = n < 0
    for j in range(K):
        at, given = load_choice(indices_ptr, n, j, keep, E, K)
        void = void | (given != at)
    return void


@triton.jit
def jitter_factor(seed_ptr, jitter, n, experts):
    """1 - jitter .. 1 + jitter by token and expert: mmfused.random.uniform, whatever the tiles."""
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
    """P over the second axis, its logarithm, and the log-sum-exp. As in PyTorch P is NaN where a
    row holds NaN, inf or only -inf; the log-sum-exp is NaN, inf and -inf there.

    The logarithm does not come from the log-sum-exp, which large logits leave few digits.
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
    """u, P = softmax(u), log P, and softmax and log-sum-exp of the logits; u and P of an expert not
    allowed are -inf and 0.
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
