"""Top-k routing of a mixture of experts: scores, choice, weights, balance and the order the experts
work in, from one pass.

    l = x W_r^T + b_r                      P = softmax(l)                    s = P, or sigmoid(l)
    with P = s / sum s S_t = the k largest l (or s + bias)    w_te = s_te / sum over S_t of s   (or
    s_te as it is)

    balance  "switch"  E sum_e f_e P_e     f_e the share of all assignments, P_e the mean of P
             (Switch Transformer, eq. 4) "gshard"  the same, f_e the share of first choices
             (GShard, algorithm 1) "mse"     sum_e (mean_t w_te - 1/E)^2
             (FLUID's public code)
    z = mean_t (log sum_e exp l_te)^2      entropy = mean_t -sum_e P_te log P_te
    (ST-MoE, eq. 5; LIMoE)

With u = l or log sigmoid(l), P = softmax(u) and the renormalised weights are softmax(u) over S_t
for both scores: neither needs an epsilon. Counts are constants, so every term of the balance has
one gradient per expert and segment, c_se, the same for all tokens:

    du = P (g_P - <g_P, P>) + w (g_w - <g_w, w>) on S_t,   dl = du (or du sigmoid(-l)) + 2 g_z / n
    lse P_l

which one kernel writes from the logits. Forward: route, scan over blocks of tokens, write the
order; three launches, no host sync."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...extension import load
from ...flops import no_products
from ...library import (
    autocast_dtype,
    choose,
    current_router,
    define,
    no_autocast,
    once_differentiable,
    register,
    to_autocast,
    wide_unless,
)
from ...random import draw_seed, uniform
from .checks import check, check_router
from .composed import routing_composed
from .order import Routing, sort_by_expert
from .values import largest, spoil, take


def topk_routing_reference(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    token_padding_mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int = 1,
    available: Tensor | None = None,
    balance: str = "switch",
    indices: Tensor | None = None,
    jitter: float = 0.0,
    jitter_seed: Tensor | None = None,
) -> Routing:
    """The specification of :func:`topk_routing`: one line per equation, any floating dtype, any
    device.
    """
    tokens, experts = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = (
        torch.ones(tokens, dtype=torch.bool, device=logits.device)
        if token_padding_mask is None
        else ~token_padding_mask
    )
    segments, indices, usable, void = take(k, experts, segments, num_segments, available, indices)
    segment = (
        torch.zeros(tokens, dtype=torch.int64, device=logits.device)
        if segments is None
        else segments
    )
    if available is None:
        available = torch.ones(num_segments, experts, dtype=torch.bool, device=logits.device)
    usable = (available[0] if usable is None else usable).expand(tokens, experts)
    if jitter:
        logits = logits * (1 + jitter * (2 * uniform(jitter_seed, tokens, experts) - 1))
    logits = logits.masked_fill(~valid[:, None], 0.0)  # a masked token may hold NaN
    logits = spoil(logits.masked_fill(~usable, float("-inf")), void, token_padding_mask)

    log_score = logits.log_softmax(-1) if score == "softmax" else F.logsigmoid(logits)
    probs = log_score.softmax(-1)
    if indices is None:
        indices = largest(
            logits if selection_bias is None else log_score.exp() + selection_bias, usable, k
        )
    chosen = log_score.gather(1, indices)
    weights = chosen.softmax(-1) if renormalize and (k > 1 or score == "sigmoid") else chosen.exp()
    weights = weights.masked_fill(logits.isnan().any(1, keepdim=True), float("nan")).masked_fill(
        ~valid[:, None], 0.0
    )

    def spread(choice, value):  # (T, any) -> (T, E)
        return value.new_zeros(tokens, experts).scatter_add(1, choice, value)

    dense, times = spread(indices, weights), spread(indices, torch.ones_like(indices))
    first = spread(indices[:, :1], torch.ones_like(indices[:, :1]))
    counts, losses = [], []
    for s in range(num_segments):
        member = (valid & (segment == s))[:, None]
        counts.append((times * member).sum(0))
        number, size = (x.sum().clamp(min=1).to(logits.dtype) for x in (member, available[s]))

        def mean(of, member=member, number=number):  # NaN stays in its segment
            return of.masked_fill(~member, 0.0).sum(0) / number

        if balance == "mse":
            loss = (mean(dense) - available[s] / size).square().sum()
        else:
            share = counts[s] / (k * number) if balance == "switch" else mean(first)
            loss = size * (share * mean(probs)).sum()
        losses.append(torch.where(member.any(), loss, 0.0))
    nonempty = (torch.stack(counts).sum(1) > 0).sum().clamp(min=1)

    def mean_of_all(per_token):
        return per_token.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)

    log_probs = log_score.log_softmax(-1).masked_fill(probs == 0, 0.0)  # 0 log 0 = 0
    return Routing(
        indices,
        weights,
        torch.stack(counts),
        torch.stack(losses).sum() / nonempty,
        mean_of_all(logits.logsumexp(-1).square()),
        mean_of_all(-(probs * log_probs).sum(-1)),
        *sort_by_expert(indices, token_padding_mask, experts),
    )


def _logits(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """x W^T + b, at least in float32: rounded to 16 bits, logits choose other experts for up to 3 %
    of the tokens.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is not None:
        x = x.masked_fill(mask[:, None], 0.0)
    return F.linear(
        x.to(dtype), router_weight.to(dtype), None if router_bias is None else router_bias.to(dtype)
    )


# ---- the kernels under autograd ------------------------------------------------------------------


def _fake_forward(
    source,
    router_weight,
    router_bias,
    k,
    sigmoid,
    renormalize,
    selection_bias,
    mask,
    segments,
    num_segments,
    available,
    balance,
    indices,
    jitter,
    jitter_seed,
):
    tokens, experts = (
        source.shape[0],
        (source if router_weight is None else router_weight).shape[
            -1 if router_weight is None else 0
        ],
    )
    rows = tokens * k

    def empty(*shape, dtype=torch.float32):
        return source.new_empty(shape, dtype=dtype)

    ints = dict(dtype=torch.int32)
    return (
        empty(*((0,) if router_weight is None else (tokens, experts))),
        empty(*((tokens, k) if indices is None else (0,)), dtype=torch.int64),
        empty(tokens, k),
        empty(num_segments, experts, dtype=torch.int64),
        empty(3),
        empty(rows, **ints),
        empty(rows, **ints),
        empty(experts + 1, **ints),
        empty(rows // 16 + experts, 2, **ints),
        empty(num_segments * experts + 1),
    )


def _fake_backward(d_weights, d_balance, d_z, d_entropy, logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_input_backward(d_logits, x, router_weight, mask, need_dx, need_dw):
    return x.new_empty(x.shape if need_dx else (0,)), router_weight.new_empty(
        router_weight.shape if need_dw else (0,)
    )


_FORWARD = (
    "(Tensor source, Tensor? router_weight, Tensor? router_bias, int k, bool sigmoid, bool renormalize, Tensor? selection_bias,"
    " Tensor? mask, Tensor? segments, int num_segments, Tensor? available, str balance, Tensor? indices, float jitter,"
    " Tensor? jitter_seed) -> (Tensor logits, Tensor indices, Tensor weights, Tensor counts, Tensor losses, Tensor order,"
    " Tensor position, Tensor offsets, Tensor tiles, Tensor coefficients)"
)
_BACKWARD = (
    "(Tensor? d_weights, Tensor? d_balance, Tensor? d_z, Tensor? d_entropy, Tensor logits, Tensor indices, Tensor weights,"
    " Tensor coefficients, bool sigmoid, bool renormalize, Tensor? mask, Tensor? segments, int num_segments, Tensor? available,"
    " str balance, float jitter, Tensor? jitter_seed) -> Tensor d_logits"
)
_INPUT_BACKWARD = "(Tensor d_logits, Tensor x, Tensor router_weight, Tensor? mask, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)"


def _forward_flops(source, router_weight, *rest, out_shape):
    return 0 if router_weight is None else 2 * source[0] * source[1] * router_weight[0]


def _input_backward_flops(d_logits, x, router_weight, mask, need_dx, need_dw, *, out_shape):
    return 2 * x[0] * x[1] * router_weight[0] * (need_dx + need_dw)


def _launch_forward(*args):
    from ...kernels import topk_routing as kernels

    return kernels.forward(*args)


def _launch_backward(*args):
    from ...kernels import topk_routing as kernels

    return kernels.backward(*args)


def _launch_input_backward(*args):
    from ...kernels import topk_routing as kernels

    return kernels.input_backward(*args)


register("topk_routing_fwd", _FORWARD, _launch_forward, _fake_forward, _forward_flops)
register("topk_routing_bwd", _BACKWARD, _launch_backward, _fake_backward, no_products)
register(
    "topk_routing_input_bwd",
    _INPUT_BACKWARD,
    _launch_input_backward,
    _fake_input_backward,
    _input_backward_flops,
)
# In csrc/; of logits alone.
define("topk_routing_cuda_fwd", _FORWARD, _fake_forward, no_products)
define("topk_routing_cuda_bwd", _BACKWARD, _fake_backward, no_products)


class _RoutingFused(torch.autograd.Function):
    """Source (logits, or x beside router_weight and router_bias) to the parts of a Routing. Saves
    logits, no probabilities.
    """

    @staticmethod
    def forward(
        ctx,
        source,
        router_weight,
        router_bias,
        k,
        sigmoid,
        renormalize,
        selection_bias,
        mask,
        segments,
        num_segments,
        available,
        balance,
        indices,
        jitter,
        jitter_seed,
        router,
    ):
        ctx.set_materialize_grads(False)
        ctx.operators = _operators(router)
        options = (
            selection_bias,
            mask,
            segments,
            num_segments,
            available,
            balance,
            indices,
            jitter,
            jitter_seed,
        )
        logits, chosen, weights, counts, losses, order, position, offsets, tiles, coefficients = (
            ctx.operators[0](source, router_weight, router_bias, k, sigmoid, renormalize, *options)
        )
        ctx.options = (sigmoid, renormalize, num_segments, balance, jitter)
        ctx.bias_dtype = None if router_bias is None else router_bias.dtype
        x = None if router_weight is None else source
        logits = source if router_weight is None else logits
        indices = chosen if indices is None else indices
        ctx.save_for_backward(
            x,
            router_weight,
            logits,
            indices,
            weights,
            coefficients,
            mask,
            segments,
            available,
            jitter_seed,
        )
        ctx.mark_non_differentiable(chosen, counts, order, position, offsets, tiles)
        return chosen, weights, counts, *losses.unbind(0), order, position, offsets, tiles

    @staticmethod
    @once_differentiable
    def backward(ctx, d_indices, d_weights, d_counts, d_balance, d_z, d_entropy, *_):
        (
            x,
            router_weight,
            logits,
            indices,
            weights,
            coefficients,
            mask,
            segments,
            available,
            jitter_seed,
        ) = ctx.saved_tensors
        sigmoid, renormalize, num_segments, balance, jitter = ctx.options
        d_weights = None if d_weights is None else d_weights.contiguous()
        d_logits = ctx.operators[1](
            d_weights,
            d_balance,
            d_z,
            d_entropy,
            logits,
            indices,
            weights,
            coefficients,
            sigmoid,
            renormalize,
            mask,
            segments,
            num_segments,
            available,
            balance,
            jitter,
            jitter_seed,
        )
        if x is None:
            return d_logits, *[None] * 15
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        dx, dw = torch.ops.mmfused.topk_routing_input_bwd(
            d_logits, x, router_weight, mask, need_dx, need_dw
        )
        db = d_logits.sum(0).to(ctx.bias_dtype) if need_db else None
        return dx if need_dx else None, dw if need_dw else None, db, *[None] * 13


def _operators(router: str):
    ops = torch.ops.mmfused
    if router == "cuda":
        load()
        return ops.topk_routing_cuda_fwd, ops.topk_routing_cuda_bwd
    return ops.topk_routing_fwd, ops.topk_routing_bwd


# ---- the functions -------------------------------------------------------------------------------


def topk_routing(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    token_padding_mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int = 1,
    available: Tensor | None = None,
    balance: str = "switch",
    indices: Tensor | None = None,
    jitter: float = 0.0,
    jitter_seed: Tensor | None = None,
) -> Routing:
    """Route T tokens to k of E experts each: choice, weights, losses, and the order
    :func:`grouped_linear` works in.

    Args: logits: (T, E), float32 (best), float16, bfloat16 or float64. NaN logits make their
        token's weights and the losses NaN, its
            choice stays valid; -inf is a probability of 0.
        k: experts of a token, 1 to E.
        score: "softmax" or "sigmoid".
        renormalize: the chosen scores sum to 1, except for k = 1 with softmax, where the router
        would get no gradient.
        selection_bias: (E,) float32, added to the scores for the choice alone: balance without a
            loss (:func:`update_selection_bias`).
        token_padding_mask: (T,) bool, True = ignore: weight 0, no work by experts, in no statistic;
        may hold NaN.
        segments: (T,) int64 in [0, num_segments), such as modalities: the balance is the mean of
        theirs.
        available: (num_segments, E) bool, the experts a segment may use, at least k. The
        probabilities are over these.
        balance: "switch", "gshard" or "mse". Of n experts available, n takes the place of E:
        balanced is 1, for "mse" 0.
        indices: (T, k) int64, replay this choice (of :attr:`Routing.indices`); all else is computed
            from the logits. It may name an expert twice.
        jitter: each logit is multiplied by a number from 1 - jitter to 1 + jitter, as Switch
        Transformer's input is.
        jitter_seed: () int64 tensor; None draws one from the device's generator. A seed gives the
        same noise on every backend.

    Returns: a :class:`Routing`. ``balance_loss``, ``z_loss`` and ``entropy`` have gradients and no
    coefficients. transformers' ``load_balancing_loss_func`` is k times "switch".

    Raises: ``TypeError``, ``ValueError`` on bad input, before any launch. Values are checked on a
    CPU only: on CUDA, where nothing may wait, a segment or a replayed index out of range, or a
    segment with fewer than k experts, makes its tokens' weights and gradients and the losses NaN.
    Ties go to the lower expert; two runs agree bit for bit.

    Source: Switch Transformer (arXiv 2101.03961), GShard (2006.16668), ST-MoE (2202.08906),
    DeepSeek-V3 (2412.19437) for the bias, FLUID (2508.07264) eq. 9, MOON2.0 (2511.12449)."""
    options = dict(
        score=score,
        renormalize=renormalize,
        selection_bias=selection_bias,
        token_padding_mask=token_padding_mask,
        segments=segments,
        num_segments=num_segments,
        available=available,
        balance=balance,
        indices=indices,
        jitter=jitter,
        jitter_seed=jitter_seed,
    )
    check("topk_routing", "logits", logits, logits, k, **options)
    return _route("topk_routing", logits, None, None, k, logits.dtype, **options)


def topk_routing_from_input(
    x: Tensor,
    router_weight: Tensor,
    k: int,
    router_bias: Tensor | None = None,
    **options,
) -> Routing:
    """:func:`topk_routing` of ``x router_weight^T + router_bias``, in one pass over x; the logits
    are float32 whatever x is.

    x (T, D), router_weight (E, D) as ``nn.Linear.weight``, router_bias (E,); options and errors as
    there. Beside an x of 16 bits the router may stay in float32, and loses no digit. Under autocast
    x is cast, the router is not."""
    op = "topk_routing_from_input"
    if isinstance(x, Tensor) and autocast_dtype(x.device.type) is not None:
        (x,) = to_autocast(x)
        router_weight, router_bias = wide_unless(x.dtype, router_weight, router_bias)
    check_router(op, x, router_weight, router_bias)
    check(op, "x", x, router_weight.T, k, **options)
    dtype = router_weight.dtype if x.dtype != torch.float64 else x.dtype
    return _route(op, x, router_weight, router_bias, k, dtype, **options)


def _route(
    op,
    source,
    router_weight,
    router_bias,
    k,
    dtype,
    *,
    score="softmax",
    renormalize=True,
    selection_bias=None,
    token_padding_mask=None,
    segments=None,
    num_segments=1,
    available=None,
    balance="switch",
    indices=None,
    jitter=0.0,
    jitter_seed=None,
) -> Routing:
    mask = token_padding_mask
    if jitter and jitter_seed is None:
        jitter_seed = draw_seed(source.device)
    with no_autocast(source.device.type):
        chosen = choose(op, source.device, dtype, None, ("export", "onnx"))
        if chosen != "fused":
            logits = (
                source
                if router_weight is None
                else _logits(source, router_weight, router_bias, mask)
            )
            route = topk_routing_reference if chosen == "reference" else routing_composed
            return route(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                k,
                score=score,
                renormalize=renormalize,
                selection_bias=selection_bias,
                token_padding_mask=mask,
                segments=segments,
                num_segments=num_segments,
                available=available,
                balance=balance,
                indices=indices,
                jitter=jitter,
                jitter_seed=jitter_seed,
            )
        router = current_router()
        if (
            router == "cuda" and router_weight is not None
        ):  # a product of its own, then the C++ kernels
            source, router_weight, router_bias = (
                _logits(source, router_weight, router_bias, mask),
                None,
                None,
            )
        renormalize = renormalize and (k > 1 or score == "sigmoid")
        if router_weight is not None and source.stride(-1) != 1:
            source = source.contiguous()
        routing = Routing(
            *_RoutingFused.apply(
                source,
                router_weight,
                router_bias,
                k,
                score == "sigmoid",
                renormalize,
                selection_bias,
                mask,
                segments,
                num_segments,
                available,
                balance,
                indices,
                jitter,
                jitter_seed,
                router,
            )
        )
        return (
            routing
            if indices is None
            else routing._replace(indices=indices.clamp(0, routing.counts.shape[1] - 1))
        )


@torch.no_grad()
def update_selection_bias(
    bias: Tensor,
    counts: Tensor,
    rate: float = 1e-3,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """After an optimizer step, in place: ``bias += rate * sign(mean(c) - c)``, c (E,) what each
    expert got, counts (S, E) or (E,).

    An expert that got too little is chosen more easily from now on; the loss is not touched
    (DeepSeek-V3, arXiv 2412.19437).

    Over ranks, where a process group is initialised, c is the sum over the ranks of ``group``
    (None: all), each of which calls this; ``counts`` stays as it is. So all biases stay equal. With
    the counts of each rank alone, DDP would overwrite them by rank 0's at its next forward, and
    under FSDP the ranks would come to route differently. Where ranks hold other layers (pipeline or
    expert parallelism), ``group`` is the data-parallel group, of the ranks that hold this bias.

    With gradient accumulation give the sum of the micro-batches' counts. Gradient checkpointing
    runs a forward twice: take the counts of the Routing that is returned, and add none up inside of
    what is checkpointed."""
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"update_selection_bias: bias: got dtype {bias.dtype}, expected float32: 16 bits lose steps of {rate}"
        )
    load = counts.reshape(-1, counts.shape[-1]).sum(0)
    if load.shape != bias.shape:
        raise ValueError(
            f"update_selection_bias: counts: got shape {tuple(counts.shape)}, expected {len(bias)} experts, as bias has"
        )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(load, group=group)
    load = load.to(bias.dtype)
    bias.add_(rate * (load.mean() - load).sign())
