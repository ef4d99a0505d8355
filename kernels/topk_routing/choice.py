"""Device functions of forward.py: the choice of experts, and the statistics of a block of tokens.

For each block of BR tokens, one row of W integers and one row of V floats are stored. order.py adds
up the rows in a fixed order, without atomics. The columns, with E experts and S segments:

    integers   E: number of assignments to each expert
               1: number of masked tokens
               S: number of valid tokens in each segment
               S x E: number of assignments by segment and expert, only if S > 1
               S x E: number of first choices by segment and expert, only for "gshard"
    floats     S x E: sums of P (of w for "mse") by segment and expert
               1: sum of lse^2
               1: sum of the tokens' entropies

For P, w and lse see mmfused/ops/topk_routing/reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import rounded_product
from .scores import load_choice

LEAST = tl.constexpr(-3.4028234663852886e38)  # the least finite float32


@triton.jit
def choice_key(
    logits,
    score,
    bias_ptr,
    experts,
    allowed,
    E: tl.constexpr,
):
    """Return the keys by which experts are chosen.

    The key of an expert that is not allowed is -inf. For an allowed expert, NaN and -inf are
    replaced by LEAST.
    """
    key = logits
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + experts, mask=experts < E, other=0.0)
        key = score + bias.to(tl.float32)[None, :]
    key = tl.where(key == key, key, LEAST)
    return tl.where(allowed, tl.maximum(key, LEAST), float("-inf"))


@triton.jit
def choose_experts(
    key,
    value,
    n,
    T,
    given_ptr,  # (T, K) or None
    indices_ptr,  # (T, K)
    experts,
    slots,
    E: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
):
    """Choose and store the K experts with the largest keys, or load the given choice.

    For each token, return the expert in each slot, the value of this expert, and how often each
    expert was chosen.
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
        in_slot = slots[None, :] == j
        choice = tl.where(in_slot, at[:, None], choice)
        chosen = tl.where(in_slot, tl.sum(tl.where(here, value, 0.0), 1)[:, None], chosen)
    if given_ptr is None:
        at = n[:, None].to(tl.int64) * K + slots[None, :]
        inside = (n[:, None] < T) & (slots[None, :] < K)
        tl.store(indices_ptr + at, choice.to(tl.int64), mask=inside)
    return choice, chosen, times


@triton.jit
def by_expert(
    choice,
    weights,
    experts,
    slots,
    K: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """Return the weights as (tokens, experts) instead of (tokens, slots)."""
    dense = tl.zeros([BR, BE], tl.float32)
    for j in range(K):
        in_slot = slots[None, :] == j
        at = tl.sum(tl.where(in_slot, choice, 0), 1)
        weight = tl.sum(tl.where(in_slot, weights, 0.0), 1)
        dense += tl.where(experts[None, :] == at[:, None], weight[:, None], 0.0)
    return dense


@triton.jit
def store_statistics(
    ints_ptr,  # (W,)
    floats_ptr,  # (V,)
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
    """Store the statistics of a block: its row of integers and its row of floats."""
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
            first_choices = tl.sum(
                (here[:, None] & (experts[None, :] == first[:, None])).to(tl.int32), 0
            )
            tl.store(ints_ptr + FIRST_AT + s * E + experts, first_choices, mask=exists)
        masses = tl.sum(tl.where(here[:, None], mass, 0.0), 0)
        tl.store(floats_ptr + s * E + experts, masses, mask=exists)
    tl.store(ints_ptr + experts, total, mask=exists)
    tl.store(ints_ptr + E, tl.sum(((n < T) & (keep == 0)).to(tl.int32), 0))
    tl.store(floats_ptr + S * E, tl.sum(tl.where(keep, rounded_product(lse, lse), 0.0), 0))
    tl.store(floats_ptr + S * E + 1, tl.sum(tl.where(keep, entropy, 0.0), 0))
