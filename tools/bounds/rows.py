"""The launches of the library's own step in each row of the targets, and the time they need.

A step is the benchmark's case at its full size, in bfloat16, with the fused backend. Triton kernels
are traced (tracing.py) and predicted (predict.py); torch's operators take the time of their FLOPs
or bytes, as those of the baselines do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from mmfused.tools.bounds.baselines import DTYPE, find_case, floor, graph_gap
from mmfused.tools.bounds.cards import CARDS, Card
from mmfused.tools.bounds.launches import Launch, recorded
from mmfused.tools.bounds.predict import Prediction, predict
from mmfused.tools.bounds.tracing import Traced, traced
from mmfused.tools.bounds.work import Work, seconds
from mmfused.tools.ptx import driver
from mmfused.tools.targets import ROWS as TARGETS

# (op, case) of each target on a GPU.
ROWS = list(dict.fromkeys((row.op, row.case) for row in TARGETS if row.device == "cuda"))
# torch's operators with more elements are not computed; smaller ones hold what kernels branch on,
# such as the order of rows by expert.
SKIP_ABOVE = 16_000_000
# Rows whose blocks are too long to trace: a smaller case, and how many times its work they are.
SCALED = {("masked_info_nce", "clip-262144"): ("clip-65536", 16)}


class Step(NamedTuple):
    """What one step launches, in order."""

    forward: list[Traced | Work]
    backward: list[Traced | Work]


class Bound(NamedTuple):
    """What limits a pass of a step on a card; times are in seconds.

    Attributes:
        launches: kernels and torch's operators.
        low: predicted with the higher rate of L2.
        high: predicted with the lower rate of L2.
        floor: of the best known algorithm.
        slowest: the launch that takes most time.
        limiter: of this launch.
    """

    launches: int
    low: float
    high: float
    floor: float
    slowest: str
    limiter: str

    @property
    def share(self) -> float:
        """The floor's share of the predicted time, at the lower rate of L2."""
        return self.floor / self.high


class _OnCpu(torch.Generator):
    """A generator on the CPU that says it is on a GPU."""

    device = torch.device("cuda")

    def __new__(cls, device: object = None) -> _OnCpu:
        return super().__new__(cls, "cpu")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Draw random numbers and run autocast on the CPU where a GPU is asked for."""
    fork, enabled = torch.random.fork_rng, torch.is_autocast_enabled
    autocast, dtype = torch.autocast, torch.get_autocast_dtype
    replacements = {
        "Generator": _OnCpu,
        "autocast": lambda device_type, **options: autocast("cpu", **options),
        "is_autocast_enabled": lambda device_type: enabled("cpu"),
        "get_autocast_dtype": lambda device_type: dtype("cpu"),
    }
    with (
        mock.patch.multiple(torch, **replacements),
        mock.patch.object(torch.random, "fork_rng", lambda devices: fork([])),
    ):
        yield


@functools.cache
def session(arch: int) -> driver.Session:
    """Send this process's launches to the PTX machine; all steps share one architecture."""
    return driver.install(arch, "plain")


@functools.cache
def step(op: str, case: str, arch: int) -> Step:
    """Trace one step, forward and backward.

    Args:
        op: an op, or "models".
        case: of the op's benchmark.
        arch: 80 or 90; the same in all calls of a process.
    """
    session(arch)
    bench, sizes = find_case(op, case)
    device = torch.device("cuda")
    with (
        on_cpu(),
        # The benchmark of routing draws inputs again until their logits are far apart.
        mock.patch.object(bench, "MARGIN", 0.0, create=True),
        recorded(arch=arch, skip_above=SKIP_ABOVE, run_kernels=True) as launches,
        traced() as kernels,
    ):
        problem = bench.make(sizes, device, DTYPE)
        provider = bench.PROVIDERS["fused"](sizes, device, DTYPE).load(problem.parameters)
        leaves = [*problem.inputs.values(), *map(provider.module.get_parameter, provider.layout)]
        launches.clear()
        kernels.clear()
        with provider.setting():
            out = provider.module(*problem.inputs.values())
            ahead = sum(0 not in launch.grid for launch in launches)
            torch.autograd.grad(out, leaves, problem.upstream, allow_unused=True)
    found = iter(kernels)
    launches = [x for x in launches if 0 not in x.grid]
    both = [next(found) if launch.kind == "triton" else _work(launch) for launch in launches]
    return Step(both[:ahead], both[ahead:])


def _work(launch: Launch) -> Work:
    rate = "matrix" if launch.dtype in (torch.bfloat16, torch.float16) else "float32"
    return Work(launch.name, launch.flops, launch.bytes, rate)


@functools.cache
def _predicted(launch: Traced, card: str) -> Prediction:
    return predict(launch, CARDS[card])


def prediction(launch: Traced, card: Card) -> Prediction:
    """Return what a traced launch needs on a card."""
    return _predicted(launch, card.name)


def times(launch: Traced | Work, card: Card) -> tuple[float, float]:
    """Return the low and the high predicted time of a launch."""
    if isinstance(launch, Work):
        return (seconds(launch, card),) * 2
    found = prediction(launch, card)
    return found.low, found.high


def bounds(op: str, case: str, card: Card) -> tuple[Bound, Bound]:
    """Return what limits the forward and the backward of a row."""
    if (op, case) in SCALED:
        smaller, factor = SCALED[op, case]
        passes = zip(bounds(op, smaller, card), floor(op, case, card), strict=True)
        forward, backward = (_scaled(bound, least, factor) for bound, least in passes)
        return forward, backward
    gap = graph_gap(op, case, card)
    found = []
    for launches, least in zip(step(op, case, card.arch), floor(op, case, card), strict=True):
        low, high = (
            sum(column) for column in zip(*(times(x, card) for x in launches), strict=True)
        )
        slowest = max(launches, key=lambda launch: times(launch, card)[1])
        found.append(
            Bound(
                len(launches),
                low + gap * len(launches),
                high + gap * len(launches),
                least,
                slowest.name.removesuffix("_kernel"),
                limiter(slowest, card),
            )
        )
    return found[0], found[1]


def _scaled(bound: Bound, least: float, factor: int) -> Bound:
    return bound._replace(low=factor * bound.low, high=factor * bound.high, floor=least)


def limiter(launch: Traced | Work, card: Card) -> str:
    """Return the unit that limits a launch."""
    if isinstance(launch, Traced):
        return prediction(launch, card).limiter
    return "matrix" if seconds(launch, card) > launch.bytes / card.dram else "dram"
