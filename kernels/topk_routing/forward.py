"""Forward of top-k routing, from given logits or from x W^T in one pass over x.

The kernels write the choice, the weights and the statistics of each block of tokens (see
choice.py). If x has 16 bits and the router's weight is float32, the weight is not rounded to 16
bits: it is split into 16-bit parts, and the products of x with each part are added up.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, dense, dot, load_tokens, rounded_product, upcasts
from .choice import by_expert, choice_key, choose_experts, store_statistics
from .order import Statistics, sort
from .plans import parts_of, plan, width
from .scores import (
    as_bytes,
    choices_outside,
    jitter_factor,
    load_allowed,
    load_logits,
    load_segment,
    scores,
    softmax,
    tokens_kept,
)

LOW_GAIN = tl.constexpr(2048.0)  # scales rounding errors of float16 up into float16's range


def forward(
    source: Tensor,  # logits (T, E); with router_weight, x (T, D) whose last stride is 1
    router_weight: Tensor | None,  # (E, D)
    router_bias: Tensor | None,  # (E,)
    k: int,
    sigmoid: bool,
    renormalize: bool,
    selection_bias: Tensor | None,  # (E,)
    mask: Tensor | None,  # (T,) bool
    segments: Tensor | None,  # (T,) int64
    num_segments: int,
    available: Tensor | None,  # (S, E) bool
    balance: str,
    indices: Tensor | None,  # (T, k) int64
    jitter: float,
    jitter_seed: Tensor | None,  # () int64
) -> tuple[Tensor, ...]:
    """Return the outputs of the operator topk_routing_fwd, in three launches."""
    tokens = len(source)
    from_input = router_weight is not None
    experts = len(router_weight) if from_input else source.shape[1]
    exact = from_input and router_weight.dtype != source.dtype
    tiles = plan(experts, source.dtype, arch_of(source), from_input, exact)
    block = tiles.rows.BR
    programs = triton.cdiv(tokens, tiles.route.BN if from_input else block)
    blocks = programs * (tiles.route.BN // block if from_input else 1)
    cells = num_segments * experts
    count_columns = experts + 1 + num_segments
    count_columns += cells if num_segments > 1 else 0
    count_columns += cells if balance == "gshard" else 0
    float_columns = cells + 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return source.new_empty(shape, dtype=dtype)

    mask, available = as_bytes(mask), as_bytes(available)
    given = dense(indices)
    chosen = empty(*((tokens, k) if given is None else (0,)), dtype=torch.int64)
    weights = empty(tokens, k)
    logits = empty(*((tokens, experts) if from_input else (0,)))
    partial_counts = empty(blocks, count_columns, dtype=torch.int32)
    partial_floats = empty(blocks, float_columns)
    common = {
        "logits_ptr": logits if from_input else source,
        "selection_bias_ptr": dense(selection_bias),
        "mask_ptr": mask,
        "segments_ptr": dense(segments),
        "available_ptr": available,
        "given_ptr": given,
        "seed_ptr": jitter_seed if jitter else None,
        "indices_ptr": chosen,
        "weights_ptr": weights,
        "ints_ptr": partial_counts,
        "floats_ptr": partial_floats,
        "T": tokens,
        "W": count_columns,
        "V": float_columns,
        "jitter": jitter,
        "E": experts,
        "K": k,
        "S": num_segments,
        "SIGMOID": sigmoid,
        "RENORMALIZE": renormalize,
        "BALANCE": balance,
        "BR": block,
        "BE": width(experts, from_input),
        "BS": triton.next_power_of_2(k),
    }
    if from_input:
        route_x_kernel[(programs,)](
            **common,
            x_ptr=source,
            w_ptr=router_weight.contiguous(),
            b_ptr=dense(router_bias),
            stride_n=source.stride(0),
            D=source.shape[1],
            PARTS=parts_of(source.dtype) if exact else 1,
            UPCAST=upcasts(source.dtype),
            **asdict(tiles.route),
            **OPTIONS,
        )
    else:
        route_kernel[(programs,)](
            **common,
            stride_n=source.stride(0),
            stride_e=source.stride(1),
            num_warps=tiles.rows.num_warps,
            num_stages=1,
            maxnreg=tiles.rows.maxnreg,
            **OPTIONS,
        )
    statistics = Statistics(
        available=available,
        floats=partial_floats,
        counts=empty(num_segments, experts, dtype=torch.int64),
        losses=empty(3),
        coefficients=empty(cells + 1),
    )
    choice = chosen if given is None else given
    order = sort(choice, mask, experts, num_segments, balance, block, partial_counts, statistics)
    counts, losses, coefficients = statistics[2:]
    return logits, chosen, weights, counts, losses, *order, coefficients


@triton.jit
def _route_block(
    logits_ptr,  # (T, E)
    selection_bias_ptr,  # (E,) or None
    mask_ptr,  # (T,) or None
    segments_ptr,  # (T,) or None
    available_ptr,  # (S, E) or None
    given_ptr,  # (T, K) or None
    seed_ptr,  # () or None
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    ints_ptr,  # (blocks, W)
    floats_ptr,  # (blocks, V)
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
    """Route one block of BR tokens from the logits."""
    n = block * BR + tl.arange(0, BR)
    experts = tl.arange(0, BE)
    slots = tl.arange(0, BS)
    keep = tokens_kept(n, mask_ptr, T)
    logits = load_logits(logits_ptr, n, experts, keep, stride_n, stride_e, E)
    if seed_ptr is not None:
        logits *= jitter_factor(seed_ptr, jitter, n, experts)
    segment, broken = load_segment(segments_ptr, n, T, S)
    allowed, broken = load_allowed(available_ptr, segment, broken, experts, E, K)
    if given_ptr is not None:
        broken = broken | choices_outside(given_ptr, n, keep, E, K)
    logits = tl.where((broken & keep)[:, None], float("nan"), logits)
    u, p, log_p, _, lse = scores(logits, allowed, SIGMOID)
    # 0 log 0 = 0; NaN stays NaN
    entropy = tl.sum(rounded_product(p, tl.where(p > 0, -log_p, 0.0)), 1)
    score = p
    if SIGMOID:
        score = tl.where(allowed, tl.sigmoid(logits), 0.0)
    key = choice_key(logits, score, selection_bias_ptr, experts, allowed, E)
    value = u if RENORMALIZE else score
    choice, weights, times = choose_experts(
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
        mass = by_expert(choice, weights, experts, slots, K, BR, BE)
    first = tl.sum(tl.where(slots[None, :] == 0, choice, 0), 1)
    row = block.to(tl.int64)
    store_statistics(
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
    logits_ptr,  # (T, E)
    selection_bias_ptr,  # (E,) or None
    mask_ptr,  # (T,) or None
    segments_ptr,  # (T,) or None
    available_ptr,  # (S, E) or None
    given_ptr,  # (T, K) or None
    seed_ptr,  # () or None
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    ints_ptr,  # (blocks, W)
    floats_ptr,  # (blocks, V)
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
    """Route from logits of any dtype and strides; grid (T / BR,)."""
    _route_block(
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
    logits_ptr,  # (T, E)
    selection_bias_ptr,  # (E,) or None
    mask_ptr,  # (T,) or None
    segments_ptr,  # (T,) or None
    available_ptr,  # (S, E) or None
    given_ptr,  # (T, K) or None
    seed_ptr,  # () or None
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    ints_ptr,  # (blocks, W)
    floats_ptr,  # (blocks, V)
    T,
    W,
    V,
    jitter,
    x_ptr,  # (T, D)
    w_ptr,  # (E, D)
    b_ptr,  # (E,) or None
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
    """Compute float32 logits of BN tokens from x and w, then route BR tokens at a time.

    grid (T / BN,). The logits are stored without jitter, and read back from the cache. Routing
    takes more registers per token than the product, so BR may be less than BN. PARTS is 1 if x and
    w have the same dtype. Otherwise w is float32 and split into PARTS numbers of x's dtype: 3 for
    bfloat16, 2 for float16. The second float16 number is multiplied by LOW_GAIN.
    """
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
    tl.debug_barrier()  # other threads of this program read the logits
    for r in tl.range(0, BN // BR, num_stages=1):
        _route_block(
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
