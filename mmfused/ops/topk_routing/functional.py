"""The public functions of routing. Equations: reference.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ...library import (
    autocast_dtype,
    choose,
    current_router,
    no_autocast,
    to_autocast,
    wide_unless,
)
from ...random import draw_seed
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
    """Route T tokens to k of E experts each: choice, weights, losses and the order by expert.

    :func:`grouped_linear` and :func:`grouped_mlp` work in that order.

    Args:
        logits: (T, E), float32 (best), float16, bfloat16 or float64. NaN logits make the weights of
            their token and the losses NaN; its choice stays valid. -inf is a probability of 0.
        k: experts of a token, 1 to E.
        score: "softmax" or "sigmoid".
        renormalize: divide the chosen scores by their sum, except for k = 1 with softmax, where the
            router would get no gradient.
        selection_bias: (E,) float32, added to the scores for the choice alone: balance without a
            loss (:func:`update_selection_bias`).
        token_padding_mask: (T,) bool, True = ignore: weight 0, no work by experts, no part in any
            statistic. Such a token may hold NaN.
        segments: (T,) int64 in [0, num_segments), such as modalities: the balance is the mean of
            the balances of the segments.
        num_segments: S.
        available: (S, E) bool, the experts that a segment may use, at least k. The probabilities
            are over these.
        balance: "switch", "gshard" or "mse". Where n experts are available, n takes the place of
            E: balanced is 1, for "mse" 0.
        indices: (T, k) int64, replay this choice (of :attr:`Routing.indices`); everything else is
            computed from the logits. It may name an expert twice.
        jitter: multiply each logit by a random number from 1 - jitter to 1 + jitter, as Switch
            Transformer does with its input.
        jitter_seed: () int64; None draws one from the device's generator. A seed gives the same
            noise on every backend.

    Returns:
        A :class:`Routing`. ``balance_loss``, ``z_loss`` and ``entropy`` have gradients and no
        coefficients. ``load_balancing_loss_func`` of transformers is k times "switch". Ties go to
        the lower expert; two runs agree bit for bit.

    Raises:
        TypeError: bad input.
        ValueError: bad input; raised before any launch. Values in tensors are checked on a CPU
            only. On CUDA, where nothing may wait for the host, a segment or a replayed index out of
            range, or a segment with fewer than k experts, makes the weights and gradients of its
            tokens and the losses NaN.
        RuntimeError: ``backend("fused")`` cannot run.

    Source: Switch Transformer (arXiv 2101.03961), GShard (2006.16668), ST-MoE (2202.08906),
    DeepSeek-V3 (2412.19437) for the bias, FLUID (2508.07264) eq. 9, MOON2.0 (2511.12449).
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
    """Compute :func:`topk_routing` of ``x router_weight^T + router_bias``, in one pass over x.

    The logits are float32 whatever the dtype of x. Beside an x of 16 bits the router may stay in
    float32, without loss of digits. Under autocast x is cast, the router is not.

    Args:
        x: (T, D).
        router_weight: (E, D) as ``nn.Linear.weight``.
        k: experts of a token.
        router_bias: (E,).
        options: the keywords of :func:`topk_routing`; errors as there.
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
    """Choose the backend, and compute the routing of logits, or of x beside a router weight."""
    mask = inputs.token_padding_mask
    if options.jitter and inputs.jitter_seed is None:
        inputs = inputs._replace(jitter_seed=draw_seed(source.device))
    with no_autocast(source.device.type):
        chosen = choose(op, source.device, dtype, None, ("export", "onnx"))
        router = current_router()
        # The C++ kernels take logits only: a product of its own comes before them.
        if router_weight is not None and (chosen != "fused" or router == "cuda"):
            source = _logits(source, router_weight, router_bias, mask)
            router_weight = router_bias = None
        if chosen != "fused":
            logits = source.to(torch.promote_types(source.dtype, torch.float32))
            if chosen == "reference":
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


def _logits(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Return x W^T + b, at least in float32.

    Rounded to 16 bits, logits would choose other experts for up to 3 % of the tokens.
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
    """Move a selection bias towards balance, in place, after an optimizer step.

    ``bias += rate * sign(mean(c) - c)``, where c (E,) is the number of assignments of each expert:
    an expert with too few is chosen more easily from now on, and the loss is not touched
    (DeepSeek-V3, arXiv 2412.19437).

    Where a process group is initialised, c is the sum over the ranks of ``group``, and each of them
    must call this. So all biases stay equal. With the counts of each rank alone, DDP would
    overwrite the biases by those of rank 0 at its next forward, and under FSDP the ranks would come
    to route differently.

    Args:
        bias: (E,) float32 or float64.
        counts: (S, E) or (E,), as in :class:`Routing`; it is not changed. With gradient
            accumulation, the sum over the micro-batches. Gradient checkpointing runs a forward
            twice: take the counts of the Routing that is returned, and sum none inside the
            checkpointed function.
        rate: size of the step.
        group: None: all ranks. Where ranks hold other layers (pipeline or expert parallelism), the
            data-parallel group: the ranks that hold this bias.

    Raises:
        TypeError: a bias of 16 bits.
        ValueError: counts of another number of experts.
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
