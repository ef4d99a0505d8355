"""Small calls that launch every kernel of topk_routing, for ``tools/sanitize.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import mmfused
from mmfused import extension, library
from mmfused.tools.sanitize_launches import (
    DEVICE,
    FLOAT,
    HALF,
    backward,
    choose,
    integers,
    randn,
    seed,
)


def launches() -> Iterator[Callable[[], None]]:
    routers = ["triton"]
    if DEVICE == "cuda" and not extension.why_not():
        routers.append("cuda")
    for name in routers:
        yield lambda name=name: route(70, 5, 2, router=name, ties=True)
        yield lambda name=name: route(
            70, 5, 2, router=name, everything=True, balance="gshard", score="sigmoid"
        )
        yield lambda name=name: route(
            37, 130, 8, router=name, everything=True, balance="mse", dtype=HALF
        )
        yield lambda name=name: route(37, 5, 2, router=name, replay=True)
    yield lambda: route(70, 5, 2, dim=36, dtype=HALF, router_dtype=FLOAT, everything=True)
    yield lambda: route(70, 16, 2, dim=128, dtype=HALF, router_dtype=HALF)
    yield lambda: route(37, 130, 8, dim=70, dtype=HALF, router_dtype=FLOAT, score="sigmoid")
    yield lambda: route(37, 5, 2, dim=36, dtype=FLOAT, router_dtype=FLOAT)
    yield lambda: mmfused.routing_from_indices(
        integers(5, 70, 2), randn(70, 2, dtype=FLOAT), 5, token_padding_mask=choose(0.3, 70)
    )


def route(
    tokens,
    experts,
    k,
    *,
    dim=None,
    dtype=FLOAT,
    router_dtype=None,
    router="triton",
    everything=False,
    replay=False,
    ties=False,
    **options,
) -> None:
    """Run a routing forward and backward.

    ``everything``: use padding, segments with their own experts, a selection bias and jitter.
    """
    if everything:
        segments, usable = 3, torch.rand(3, experts, device=DEVICE) < 0.7
        usable[:, -k:] = True
        options |= dict(
            token_padding_mask=choose(0.3, tokens),
            segments=integers(segments, tokens),
            num_segments=segments,
            available=usable,
            selection_bias=torch.randn(experts, device=DEVICE),
            jitter=0.1,
            jitter_seed=seed(),
        )
    if replay:
        options["indices"] = integers(experts, tokens, k)
    if dim is None:
        leaves = [randn(tokens, experts, dtype=dtype)]
        if ties:
            leaves = [leaves[0].detach().round().requires_grad_()]
        with library.router(router):
            routing = mmfused.topk_routing(leaves[0], k, **options)
            backward(
                (routing.weights, routing.balance_loss, routing.z_loss, routing.entropy), *leaves
            )
        return
    leaves = [
        randn(tokens, dim, dtype=dtype),
        randn(experts, dim, dtype=router_dtype, std=dim**-0.5),
    ]
    leaves.append(randn(experts, dtype=router_dtype))
    routing = mmfused.topk_routing_from_input(leaves[0], leaves[1], k, leaves[2], **options)
    backward((routing.weights, routing.balance_loss, routing.z_loss, routing.entropy), *leaves)
