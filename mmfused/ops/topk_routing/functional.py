"""The public functions of routing; the equations are in reference.py."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ... import extension, tuned_file
from ...library import (
    KERNELS_ON_CPU,
    autocast_dtype,
    choose,
    current_router,
    no_autocast,
    to_autocast,
    wide_unless,
)
from ...random import draw_seed
from ...switch import constant_when_traced
from .arguments import Balance, Inputs, Options, RoutingArguments, Score, grouped
from .autograd import RoutingFused
from .checks import check_arguments, check_router
from .composed import routing_composed
from .order import Routing
from .reference import routing_by_equations


def topk_routing(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    token_padding_mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int = 1,
    available: Tensor | None = None,
    balance: Balance = "switch",
    indices: Tensor | None = None,
    jitter: float = 0.0,
    jitter_seed: Tensor | None = None,
) -> Routing:
    """Route each of T tokens to k of E experts.

    The result includes the order of the tokens by expert, which :func:`grouped_linear` and
    :func:`grouped_mlp` need.

    Args:
        logits: (T, E), float32 (recommended), float16, bfloat16 or float64. If a token has a NaN
            logit, the weights of the token and all losses are NaN, but the indices of the token are
            in [0, E). A logit of -inf means probability 0.
        k: number of experts per token, from 1 to E.
        score: "softmax" or "sigmoid".
        renormalize: whether to divide the chosen scores of a token by their sum. It has no effect
            with softmax and k = 1, where the weight would always be 1.
        selection_bias: (E,) float32, added to the scores for the choice of experts, but not for the
            weights. It balances the experts without a loss, see :func:`update_selection_bias`.
        token_padding_mask: (T,) bool, True = ignore. The logits of an ignored token may be NaN. The
            token has weight 0, is not processed by experts, and is left out of counts and losses.
        segments: (T,) int64 in [0, num_segments), such as the modality of each token. The balance
            loss is the mean of the balance losses of the segments that have tokens.
        num_segments: number of segments S.
        available: (S, E) bool, True for the experts that a segment may use, at least k per segment.
            The other experts have probability 0.
        balance: "switch", "gshard" or "mse". If a segment has only n available experts, n replaces
            E in the loss. If all experts are used equally, the loss is 1, or 0 with "mse" and
            renormalised weights.
        indices: (T, k) int64, the experts to use, such as :attr:`Routing.indices` of an earlier
            call. The weights and losses are computed from the logits. A row may contain the same
            expert twice.
        jitter: in [0, 1). Each logit is multiplied by a random number from 1 - jitter to
            1 + jitter. Switch Transformer multiplies the router's input instead.
        jitter_seed: int64 scalar tensor, default drawn from the device's generator. A seed gives
            the same random numbers on every backend.

    Returns:
        A :class:`Routing`. ``balance_loss``, ``z_loss`` and ``entropy`` are differentiable and not
        multiplied by coefficients. ``load_balancing_loss_func`` of transformers equals k times
        "switch". Ties go to the expert with the lower index. Results are deterministic.

    Raises:
        TypeError: bad input.
        ValueError: bad input; raised before any kernel is launched. Values in tensors are checked
            only on a CPU in eager mode. Elsewhere a token with an invalid segment, an invalid
            index, or fewer than k available experts gets NaN weights and gradients, and makes all
            losses NaN.
        RuntimeError: ``backend("fused")`` cannot run.

    Source: Switch Transformer (arXiv 2101.03961), GShard (2006.16668), ST-MoE (2202.08906),
    DeepSeek-V3 (2412.19437) for the bias, FLUID (2508.07264) eq. 9, MOON2.0 (2511.12449).

    Examples:
        >>> import torch, mmfused
        >>> logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])  # 2 tokens, 3 experts
        >>> routing = mmfused.topk_routing(logits, 2)
        >>> routing.indices
        tensor([[0, 1],
                [2, 1]])
        >>> torch.allclose(routing.weights, logits.topk(2).values.softmax(-1))
        True
        >>> loss = 0.01 * routing.balance_loss + 0.001 * routing.z_loss  # add it to the task's loss
    """
    op = "topk_routing"
    inputs = Inputs(
        selection_bias=selection_bias,
        token_padding_mask=token_padding_mask,
        segments=segments,
        available=available,
        indices=indices,
        jitter_seed=jitter_seed,
    )
    options = Options(
        k,
        score=score,
        renormalize=renormalize,
        num_segments=num_segments,
        balance=balance,
        jitter=jitter,
    )
    check_arguments(op, "logits", logits, logits, inputs, options)
    return _routing(op, logits, None, None, logits.dtype, inputs, options)


def topk_routing_from_input(
    x: Tensor,
    router_weight: Tensor,
    k: int,
    router_bias: Tensor | None = None,
    **options: Unpack[RoutingArguments],
) -> Routing:
    """Compute :func:`topk_routing` of the logits ``x router_weight^T + router_bias``.

    The logits are float64 if x is float64, and float32 otherwise. If x has 16 bits, router_weight
    and router_bias may be float32 and are not rounded. Under autocast, x is rounded to the autocast
    dtype, and the router is not.

    Args:
        x: (T, D).
        router_weight: (E, D) as ``nn.Linear.weight``.
        k: number of experts per token.
        router_bias: (E,).
        options: keyword arguments of :func:`topk_routing`.

    Returns:
        A :class:`Routing`, as :func:`topk_routing`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`topk_routing`.

    Examples:
        >>> import torch, mmfused
        >>> tokens, router = torch.randn(10, 16), torch.nn.Linear(16, 4)
        >>> routing = mmfused.topk_routing_from_input(tokens, router.weight, 2, router.bias)
        >>> of_logits = mmfused.topk_routing(router(tokens), 2)
        >>> torch.allclose(routing.weights, of_logits.weights, atol=1e-5)
        True
        >>> routing.counts.sum().item()  # each of 10 tokens has 2 experts
        20
    """
    op = "topk_routing_from_input"
    if isinstance(x, Tensor) and autocast_dtype(x.device.type) is not None:
        (x,) = to_autocast(x)
        router_weight, router_bias = wide_unless(x.dtype, router_weight, router_bias)
    check_router(op, x, router_weight, router_bias)
    inputs, settings = grouped(k, **options)
    check_arguments(op, "x", x, router_weight.T, inputs, settings)
    dtype = router_weight.dtype if x.dtype != torch.float64 else x.dtype
    return _routing(op, x, router_weight, router_bias, dtype, inputs, settings)


def _routing(
    op: str,
    source: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    dtype: torch.dtype,
    inputs: Inputs,
    options: Options,
) -> Routing:
    """Choose a backend and compute the routing.

    ``source`` is x if there is a router weight, else the logits.
    """
    mask = inputs.token_padding_mask
    if options.jitter and inputs.jitter_seed is None:
        inputs = inputs._replace(jitter_seed=draw_seed(source.device))
    with no_autocast(source.device.type):
        backend = choose(op, source.device, dtype, None, ("export", "onnx"))
        router = current_router()
        if router == "auto":  # only the Triton kernels accept x
            router = "triton" if router_weight is not None else _faster_router()
        if router_weight is not None and (backend != "fused" or router == "cuda"):
            source = _logits(source, router_weight, router_bias, mask)
            router_weight = router_bias = None
        if backend != "fused":
            logits = source.to(torch.promote_types(source.dtype, torch.float32))
            if backend == "reference":
                return routing_by_equations(logits, inputs, options)
            return routing_composed(logits, inputs, options)
        if router_weight is not None and source.stride(-1) != 1:
            source = source.contiguous()
        parts = RoutingFused.apply(source, router_weight, router_bias, *inputs, options, router)
        routing = Routing(*parts)
        if inputs.indices is None:
            return routing
        inside = inputs.indices.clamp(0, routing.counts.shape[1] - 1)
        return routing._replace(indices=inside)


@constant_when_traced
def _faster_router() -> Literal["triton", "cuda"]:
    """Return the router that ``mmfused tune`` has found faster from logits, if it can run."""
    found = None if KERNELS_ON_CPU else tuned_file.current()
    is_cuda = found is not None and found.router == "cuda" and _cpp_can_run()
    return "cuda" if is_cuda else "triton"


@functools.cache
def _cpp_can_run() -> bool:
    return not extension.why_not()


def _logits(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Return the logits x router_weight^T + router_bias in float32 or float64.

    Logits in 16 bits would change the choice of experts for up to 3 % of the tokens.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is not None:
        x = x.masked_fill(mask[:, None], 0.0)
    bias = None if router_bias is None else router_bias.to(dtype)
    return F.linear(x.to(dtype), router_weight.to(dtype), bias)


@torch.no_grad()
def update_selection_bias(
    bias: Tensor,
    counts: Tensor,
    rate: float = 1e-3,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Update a selection bias in place after an optimizer step, to balance the experts.

    ``bias += rate * sign(mean(c) - c)``, where c (E,) is the number of assignments to each expert.
    Experts with fewer assignments than average become more likely to be chosen. The loss function
    does not change (DeepSeek-V3, arXiv 2412.19437).

    If a process group is initialised, c is summed over the ranks of ``group``. All these ranks must
    call this function, so that their biases stay equal.

    Args:
        bias: (E,) float32 or float64.
        counts: (S, E) or (E,), as in :class:`Routing`; not modified. With gradient accumulation,
            pass the sum over the micro-batches. With gradient checkpointing, take the counts from
            the returned Routing, since code inside the checkpointed function runs twice.
        rate: size of the step.
        group: the ranks that hold this bias, default all ranks. With pipeline or expert
            parallelism, pass the data-parallel group.

    Raises:
        TypeError: the bias is neither float32 nor float64.
        ValueError: counts and bias have different numbers of experts.

    Examples:
        >>> import torch, mmfused
        >>> bias = torch.zeros(3)
        >>> routing = mmfused.topk_routing(
        ...     torch.tensor([[3.0, 1.0, 0.0], [3.0, 0.0, 1.0]]), 2, selection_bias=bias
        ... )
        >>> routing.counts  # the first expert is chosen by both tokens
        tensor([[2, 1, 1]])
        >>> mmfused.update_selection_bias(bias, routing.counts, rate=0.1)
        >>> bias
        tensor([-0.1000,  0.1000,  0.1000])
    """
    op = "update_selection_bias"
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: bias: got dtype {bias.dtype}, expected float32: 16 bits lose steps of {rate}"
        )
    load = counts.reshape(-1, counts.shape[-1]).sum(0)
    if load.shape != bias.shape:
        raise ValueError(
            f"{op}: counts: got shape {tuple(counts.shape)}, expected {len(bias)} experts, "
            "as bias has"
        )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(load, group=group)
    load = load.to(bias.dtype)
    bias.add_(rate * (load.mean() - load).sign())
