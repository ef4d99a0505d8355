"""Forward kernels of top-k routing: from logits, or from x W^T in one pass over x, to choice,
weights and partial statistics.

A block of BR tokens writes one row of integers and one of floats, which order.py adds up in a fixed
order (no atomics):

    integers (W)   E assignments to each expert, 1 masked tokens, S valid tokens of each segment,
                   then, with several segments, S x E assignments, then, for "gshard", S x E first
                   choices
    floats (V)     S x E sums of P (of w for "mse"), 1 sum of lse^2, 1 sum of the tokens' entropies

Float32 weights beside x of 16 bits lose no digit: they are split into parts of 16 bits that add up
to them, one product each."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, load_tokens
from .scores import (
    choices_outside,
    jitter_factor,
    load_allowed,
    load_choice,
    load_logits,
    load_segment,
    scores,
    softmax,
    tokens_kept,
)

LEAST = tl.constexpr(-3.4028234663852886e38)  # of the finite float32
LOW_GAIN = tl.constexpr(2048.0)  # what float16 rounds off is brought back into its range


@triton.jit
def _key(logits, score, bias_ptr, experts, allowed, E: tl.constexpr):
    """What the choice goes by. NaN and -inf are the least, but before experts that are not allowed."""
    key = logits
    if bias_ptr is not None:
        key = (
            score + tl.load(bias_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
        )
    key = tl.where(key == key, key, LEAST)
    return tl.where(allowed, tl.maximum(key, LEAST), float("-inf"))


@triton.jit
def _choose(
    key,
    value,
    n,
    T,
    given_ptr,
    indices_ptr,
    experts,
    slots,
    E: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
):
    """The k largest keys, or the choice given: by slot the expert and its value, and by expert how
    often chosen.
    """
    choice = tl.zeros([BR, BS], tl.int32)
    chosen = tl.full([BR, BS], float("-inf"), tl.float32)
    times = tl.zeros([BR, BE], tl.int32)
    for j in range(K):
        if given_ptr is not None:
            at, _ = load_choice(given_ptr, n, j, n < T, E, K)
        else:
            _, at = tl.max(key, 1, return_indices=True, return_indices_tie_break_left=True)
        here = experts[None, :] == at[:, None]
        if given_ptr is None:
            key = tl.where(here, float("-inf"), key)
        times += here.to(tl.int32)
        mine = slots[None, :] == j
        choice = tl.where(mine, at[:, None], choice)
        chosen = tl.where(mine, tl.sum(tl.where(here, value, 0.0), 1)[:, None], chosen)
    if given_ptr is None:
        at = n[:, None].to(tl.int64) * K + slots[None, :]
        tl.store(
            indices_ptr + at, choice.to(tl.int64), mask=(n[:, None] < T) & (slots[None, :] < K)
        )
    return choice, chosen, times


@triton.jit
def _spread(choice, weights, experts, slots, K: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """Weights by expert instead of by slot."""
    dense = tl.zeros([BR, BE], tl.float32)
    for j in range(K):
        mine = slots[None, :] == j
        at = tl.sum(tl.where(mine, choice, 0), 1)
        dense += tl.where(
            experts[None, :] == at[:, None], tl.sum(tl.where(mine, weights, 0.0), 1)[:, None], 0.0
        )
    return dense


@triton.jit
def _statistics(
    ints_ptr,
    floats_ptr,
    keep,
    n,
    T,
    segment,
    times,
    first,
    mass,
    lse,
    entropy,
    experts,
    E: tl.constexpr,
    S: tl.constexpr,
    BALANCE: tl.constexpr,
    BE: tl.constexpr,
):
    SEGMENTS_AT: tl.constexpr = E + 1 + S
    FIRST_AT: tl.constexpr = SEGMENTS_AT + (S * E if S > 1 else 0)
    exists = experts < E
    total = tl.zeros([BE], tl.int32)
    for s in range(S):
        here = keep & (segment == s)
        count = tl.sum(tl.where(here[:, None], times, 0), 0)
        total += count
        tl.store(ints_ptr + E + 1 + s, tl.sum(here.to(tl.int32), 0))
        if S > 1:
            tl.store(ints_ptr + SEGMENTS_AT + s * E + experts, count, mask=exists)
        if BALANCE == "gshard":
            led = tl.sum((here[:, None] & (experts[None, :] == first[:, None])).to(tl.int32), 0)
            tl.store(ints_ptr + FIRST_AT + s * E + experts, led, mask=exists)
        tl.store(
            floats_ptr + s * E + experts, tl.sum(tl.where(here[:, None], mass, 0.0), 0), mask=exists
        )
    tl.store(ints_ptr + experts, total, mask=exists)
    tl.store(ints_ptr + E, tl.sum(((n < T) & (keep == 0)).to(tl.int32), 0))
    tl.store(floats_ptr + S * E, tl.sum(tl.where(keep, lse * lse, 0.0), 0))
    tl.store(floats_ptr + S * E + 1, tl.sum(tl.where(keep, entropy, 0.0), 0))


@triton.jit
def _route(
    logits_ptr,
    selection_bias_ptr,
    mask_ptr,
    segments_ptr,
    available_ptr,
    given_ptr,
    seed_ptr,
    indices_ptr,
    weights_ptr,
    ints_ptr,
    floats_ptr,
    block,
    T,
    W,
    V,
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
    BS: tl.constexpr,
):
    """A block of BR tokens, from logits to all that is returned of them."""
    n = block * BR + tl.arange(0, BR)
    experts = tl.arange(0, BE)
    slots = tl.arange(0, BS)
    keep = tokens_kept(n, mask_ptr, T)
    logits = load_logits(logits_ptr, n, experts, keep, stride_n, stride_e, E)
    if seed_ptr is not None:
        logits *= jitter_factor(seed_ptr, jitter, n, experts)
    segment, void = load_segment(segments_ptr, n, T, S)
    allowed, void = load_allowed(available_ptr, segment, void, experts, E, K)
    if given_ptr is not None:
        void = void | choices_outside(given_ptr, n, keep, E, K)
    logits = tl.where((void & keep)[:, None], float("nan"), logits)
    u, p, log_p, _, lse = scores(logits, allowed, SIGMOID)
    entropy = tl.sum(p * tl.where(p > 0, -log_p, 0.0), 1)  # 0 log 0 = 0, and NaN where P is
    score = p
    if SIGMOID:
        score = tl.where(allowed, tl.sigmoid(logits), 0.0)
    key = _key(logits, score, selection_bias_ptr, experts, allowed, E)
    value = u if RENORMALIZE else score
    choice, weights, times = _choose(
        key, value, n, T, given_ptr, indices_ptr, experts, slots, E, K, BR, BE, BS
    )
    if RENORMALIZE:
        weights, _, _ = softmax(weights)
    weights = tl.where((lse != lse)[:, None], float("nan"), weights)
    weights = tl.where(keep[:, None] & (slots[None, :] < K), weights, 0.0)
    at = n[:, None].to(tl.int64) * K + slots[None, :]
    tl.store(weights_ptr + at, weights, mask=(n[:, None] < T) & (slots[None, :] < K))
    mass = p
    if BALANCE == "mse":
        mass = _spread(choice, weights, experts, slots, K, BR, BE)
    first = tl.sum(tl.where(slots[None, :] == 0, choice, 0), 1)
    row = block.to(tl.int64)
    _statistics(
        ints_ptr + row * W,
        floats_ptr + row * V,
        keep,
        n,
        T,
        segment,
        times,
        first,
        mass,
        lse,
        entropy,
        experts,
        E,
        S,
        BALANCE,
        BE,
    )


@triton.jit
def route_kernel(
    logits_ptr,
    selection_bias_ptr,
    mask_ptr,
    segments_ptr,
    available_ptr,
    given_ptr,
    seed_ptr,
    indices_ptr,
    weights_ptr,
    ints_ptr,
    floats_ptr,
    T,
    W,
    V,
    jitter,
    stride_n,
    stride_e,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BALANCE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
):
    """grid (T / BR,). From logits of any dtype and strides."""
    _route(
        logits_ptr,
        selection_bias_ptr,
        mask_ptr,
        segments_ptr,
        available_ptr,
        given_ptr,
        seed_ptr,
        indices_ptr,
        weights_ptr,
        ints_ptr,
        floats_ptr,
        tl.program_id(0),
        T,
        W,
        V,
        stride_n,
        stride_e,
        jitter,
        E,
        K,
        S,
        SIGMOID,
        RENORMALIZE,
        BALANCE,
        BR,
        BE,
        BS,
    )


@triton.jit
def route_x_kernel(
    logits_ptr,
    selection_bias_ptr,
    mask_ptr,
    segments_ptr,
    available_ptr,
    given_ptr,
    seed_ptr,
    indices_ptr,
    weights_ptr,
    ints_ptr,
    floats_ptr,
    T,
    W,
    V,
    jitter,
    x_ptr,
    w_ptr,
    b_ptr,
    stride_n,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BALANCE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grid (T / BN,). From x (T, D) and w (E, D): logits in float32, written before jitter and
    masks, then BR tokens at a time.

    They are read back, from a cache, because the choice has more to hold in registers than the
    product, which wants more tokens. PARTS of 16 bits stand for a weight: 1 where it has no more
    digits, 3 of bfloat16, 2 of float16, the second times LOW_GAIN."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    experts = tl.arange(0, BE)
    keep = tokens_kept(n, mask_ptr, T)
    acc = tl.zeros([BN, BE], tl.float32)
    low = tl.zeros([BN, BE], tl.float32)
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        x = load_tokens(x_ptr, n, cols, keep, stride_n, D)
        w = load_tokens(w_ptr, experts, cols, experts < E, D, D)
        part = w.to(x.dtype)
        acc = dot(x, tl.trans(part), acc, UPCAST)
        if PARTS == 2:
            part = ((w - part.to(tl.float32)) * LOW_GAIN).to(x.dtype)
            low = dot(x, tl.trans(part), low, UPCAST)
        if PARTS == 3:
            w -= part.to(tl.float32)
            part = w.to(x.dtype)
            acc = dot(x, tl.trans(part), acc, UPCAST)
            part = (w - part.to(tl.float32)).to(x.dtype)
            acc = dot(x, tl.trans(part), acc, UPCAST)
    if PARTS == 2:
        acc += low / LOW_GAIN
    if b_ptr is not None:
        acc += tl.load(b_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    at = n[:, None].to(tl.int64) * E + experts[None, :]
    tl.store(logits_ptr + at, acc, mask=(n[:, None] < T) & (experts[None, :] < E))
    tl.debug_barrier()  # other threads of this program read them
    for r in tl.range(0, BN // BR, num_stages=1):
        _route(
            logits_ptr,
            selection_bias_ptr,
            mask_ptr,
            segments_ptr,
            available_ptr,
            given_ptr,
            seed_ptr,
            indices_ptr,
            weights_ptr,
            ints_ptr,
            floats_ptr,
            tl.program_id(0) * (BN // BR) + r,
            T,
            W,
            V,
            E,
            1,
            jitter,
            E,
            K,
            S,
            SIGMOID,
            RENORMALIZE,
            BALANCE,
            BR,
            BE,
            BS,
        )
