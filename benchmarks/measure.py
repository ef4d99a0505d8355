"""Check the accuracy of a provider and measure its time.

An op's benchmark (query_pooling.py, for instance) defines

    cases(device_type, quick)       the cases; quick ones are small
    custom(shape)                   a case of the user's own sizes
    SIZES                           the names of these sizes, for the help text
    make(case, device, dtype)       -> Problem
    PROVIDERS                       name -> builder(case, device, dtype) -> Provider
    OURS                            names of the library's own providers, which must be accurate
    reference                       the builder of the reference
    exact(case, problem)            -> float64 results
    comparable(results)             -> the results that the accuracy check compares
    work(case, itemsize)            -> FLOPs and bytes of each stage of a pass

and, where it has more to record, ``extras(case, device, dtype)``: a dict merged into the record,
in which ``faults`` lists what is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import mmfused
from mmfused.library import Backend, why_not_fused
from mmfused.testing import interleaved_seconds, over_budget, relative_error

MAX_COPIES = 64


class Unavailable(RuntimeError):
    """A provider cannot compute a case on this machine; the message gives the reason."""


def need_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raise Unavailable where the library's kernels cannot be timed."""
    reasons = why_not_fused(device, dtype) or (
        ["interpreted kernels are not timed"] if device.type == "cpu" else []
    )
    if reasons:
        raise Unavailable("; ".join(reasons))


@dataclass
class Problem:
    """One case as tensors.

    ``inputs``: differentiable. ``parameters``: loaded by all providers. ``upstream``: the gradient
    of the output. ``evicts``: a call moves many times the size of the cache, so the next call finds
    none of its inputs there.
    """

    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    upstream: Tensor
    evicts: bool = False

    @property
    def device(self) -> torch.device:
        return self.upstream.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the first input, in which providers are built.

        The output, and hence ``upstream``, may be wider.
        """
        return next(iter(self.inputs.values())).dtype


@dataclass
class Provider:
    """One way to compute a case.

    ``layout``: for each parameter of ``module``, the problem's parameters stacked in it along the
    first axis.
    ``backend``: the library's backend that every call and its backward use.
    ``run``: the compiled module, where it is compiled.
    ``ceiling``: the reason why this computes only a part of the case; it is timed without an
    accuracy check.
    ``uncompiled``: the reason why it is not compiled.
    ``drops``: it is timed with dropout, which drops other elements than the reference; accuracy is
    checked without dropout.
    ``within``: makes a context for every call and its backward.
    """

    module: nn.Module
    layout: dict[str, tuple[str, ...]]
    backend: Backend | None = None
    run: Callable[..., Tensor] | None = None
    ceiling: str | None = None
    uncompiled: str | None = None
    drops: bool = False
    within: Callable[[], AbstractContextManager] = nullcontext

    def setting(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if self.backend is not None:
            stack.enter_context(mmfused.backend(self.backend))
        stack.enter_context(self.within())
        return stack

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self.setting():
            return (self.module if self.run is None else self.run)(*inputs)

    @torch.no_grad()
    def load(self, parameters: dict[str, Tensor]) -> Provider:
        names = dict(self.module.named_parameters()).keys()
        if names != self.layout.keys():
            raise ValueError(f"layout: got {sorted(self.layout)}, expected {sorted(names)}")
        for name, parts in self.layout.items():
            own = self.module.get_parameter(name)
            own.copy_(torch.cat([parameters[part].flatten() for part in parts]).view_as(own))
        return self

    def both(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        """Return the output, then the gradients of all inputs and all parameters."""
        leaves = [*inputs, *(self.module.get_parameter(name) for name in self.layout)]
        with self.setting():
            out = (self.module if self.run is None else self.run)(*inputs)
            return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    def results(self, problem: Problem) -> dict[str, Tensor]:
        """Return the output and all gradients by the names that all providers share."""
        if self.drops:
            self.module.eval()
        out, *gradients = self.both(tuple(problem.inputs.values()), problem.upstream)
        if self.drops:
            self.module.train()
        named = {"out": out} | {f"d{name}": gradients.pop(0) for name in problem.inputs}
        for parts, gradient in zip(self.layout.values(), gradients, strict=True):
            shapes = [problem.parameters[part].shape for part in parts]
            pieces = gradient.flatten().split([shape.numel() for shape in shapes])
            named |= {
                f"d{part}": piece.view(shape)
                for part, piece, shape in zip(parts, pieces, shapes, strict=True)
            }
        return named


# ---- the accuracy check --------------------------------------------------------------------------


class AccuracyCheck:
    """Check providers against the library's error budget.

    The budget compares a provider's error to the reference's in the same dtype (``plain``), both
    measured against float64 (``exact``). In a record, the key "gate" holds the result.
    """

    def __init__(self, op: ModuleType, case: Any, problem: Problem) -> None:
        self.op, self.case, self.problem = op, case, problem
        self.exact = op.comparable(op.exact(case, problem))
        self.plain = op.comparable(self.build(op.reference).results(problem))

    def build(self, builder: Callable[..., Provider]) -> Provider:
        return builder(self.case, self.problem.device, self.problem.dtype).load(
            self.problem.parameters
        )

    def admit(self, name: str, mode: str | None) -> tuple[Provider | None, dict[str, Any]]:
        """Build a provider, compile it in ``mode`` unless None, and check it.

        Returns the provider if it may be timed, else None, and its entry for the record.
        """
        entry = {"compiled": mode, "gate": "passed", "reasons": []}
        try:
            provider = self.build(self.op.PROVIDERS[name])
            if provider.ceiling is not None:
                return provider, entry | {"gate": "not checked", "reasons": [provider.ceiling]}
            if mode is not None and provider.uncompiled is not None:
                raise Unavailable(provider.uncompiled)
            if mode is not None:
                provider.run = torch.compile(provider.module, mode=mode, dynamic=False)
            faults = self.faults(provider)
        except Unavailable as why:
            return None, entry | {"gate": "unavailable", "reasons": [str(why)]}
        except Exception as error:
            # Out of memory, a shape that a kernel or the compiler refuses, another version's API.
            reason = f"{type(error).__name__}: {first_line(error)}"
            return None, entry | {"gate": "failed", "reasons": [reason]}
        if faults:
            return None, entry | {"gate": "failed", "reasons": faults}
        return provider, entry

    def faults(self, provider: Provider) -> list[str]:
        results = self.op.comparable(provider.results(self.problem))
        faults = over_budget(results, self.exact, self.plain)
        if provider.drops:
            tensors = provider.both(tuple(self.problem.inputs.values()), self.problem.upstream)
            if not all(tensor.isfinite().all() for tensor in tensors):
                faults.append("results with dropout are not finite")
        return faults


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---- the clock -----------------------------------------------------------------------------------


def rotation(problem: Problem) -> list[tuple[Tensor, ...]]:
    """Return the inputs; on CUDA as many copies as no call finds in the L2 cache.

    That is one copy more than twice the size of the cache.
    """
    inputs = tuple(problem.inputs.values())
    if problem.device.type != "cuda" or problem.evicts:
        return [inputs]
    cache = torch.cuda.get_device_properties(problem.device).L2_cache_size
    count = 1 + -(-2 * cache // sum(t.nbytes for t in inputs))
    copies = (
        [t.detach().clone().requires_grad_() for t in inputs]
        for _ in range(min(count, MAX_COPIES) - 1)
    )
    return [inputs, *map(tuple, copies)]


def steps(provider: Provider, upstream: Tensor, backward: bool) -> dict[str, Callable[..., Any]]:
    """Return what is timed, by pass.

    ``forward`` builds the autograd graph, ``both`` computes all gradients too, ``step`` is a whole
    training step of a model.
    """
    found: dict[str, Callable] = {"forward": lambda inputs: (provider(*inputs).detach(),)}
    if backward:
        found["both"] = lambda inputs: provider.both(inputs, upstream)
        step = getattr(provider, "step", None)
        if provider.layout and step is not None:  # there are parameters, and an optimiser
            found["step"] = lambda inputs: step(inputs, upstream)
    return found


def seconds(
    bursts: dict[tuple[str, str], Callable],
    calls: int,
    repeats: int,
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of a call by provider and pass, timed in turn.

    ``backward`` is ``both`` minus ``forward``, which are neighbours in a round.
    """
    samples: dict[str, dict[str, list[float]]] = {}
    for (name, which), values in interleaved_seconds(bursts, repeats).items():
        samples.setdefault(name, {})[which] = [value / calls for value in values]
    for passes in samples.values():
        if "both" in passes:
            pairs = zip(passes["both"], passes["forward"], strict=True)
            passes["backward"] = [both - forward for both, forward in pairs]
    return samples


def eager_seconds(
    providers: dict[str, Provider],
    problem: Problem,
    repeats: int,
    backward: bool,
) -> dict[str, Any]:
    """Time calls from Python, one for each copy of the inputs between two synchronisations."""
    copies = rotation(problem)

    def burst(step):
        for inputs in copies:
            step(inputs)

    bursts = {
        (name, which): lambda step=step: burst(step)
        for name, provider in providers.items()
        for which, step in steps(provider, problem.upstream, backward).items()
    }
    return seconds(bursts, len(copies), repeats)


def graph_seconds(
    providers: dict[str, Provider],
    problem: Problem,
    repeats: int,
    backward: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time replays of CUDA graphs, each with one call for each copy of the inputs.

    Returns the seconds and, by name, the reason why a provider has no graph.
    """
    copies, pool = rotation(problem), torch.cuda.graph_pool_handle()
    bursts, refused = {}, {}
    for name, provider in providers.items():
        try:
            graphs = {
                (name, which): capture(step, copies, pool, compared=not provider.drops).replay
                for which, step in steps(provider, problem.upstream, backward).items()
            }
        except RuntimeError as error:
            refused[name] = f"no CUDA graph: {first_line(error)}"
        else:
            bursts |= graphs
    return seconds(bursts, len(copies), repeats), refused


def capture(
    step: Callable,
    copies: list[tuple[Tensor, ...]],
    pool,
    compared: bool = True,
) -> torch.cuda.CUDAGraph:
    """Capture a graph of one step for each copy.

    Graphs share ``pool``: one runs at a time, and its results are not read.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            wanted = step(copies[-1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for inputs in copies:
            left = step(inputs)
    graph.replay()
    torch.cuda.synchronize()
    # A kernel on another stream escapes the capture: compare the output and the first gradient.
    if compared and not all(
        relative_error(got, want) < 1e-2 for got, want in zip(left[:2], wanted[:2], strict=True)
    ):
        raise RuntimeError("the replay does not compute what the eager call does")
    return graph


# ---- the roofline --------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the best rates of this device now.

    FLOP/s of a large random matmul, bytes/s read and written by a copy. On a CPU always in float32:
    many CPUs have no arithmetic in smaller dtypes.
    """
    on_cuda = device.type == "cuda"
    size, elements, dtype = (8192, 2**29, dtype) if on_cuda else (1024, 2**25, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    source = torch.ones(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    times = interleaved_seconds({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10)
    flops, moved = 2 * size**3, 2 * source.nbytes
    return {
        "flops_per_second": flops / min(times["matmul"]),
        "bytes_per_second": moved / min(times["copy"]),
    }


def floor_seconds(
    work: dict[str, list[dict[str, Any]]], rates: dict[str, float]
) -> dict[str, float]:
    """Return the least time of each pass.

    That is the sum over its stages of the time of their FLOPs or of their bytes at the ceilings,
    whichever is longer.
    """
    peak, bandwidth = rates["flops_per_second"], rates["bytes_per_second"]
    floors: dict[str, float] = {
        which: sum(max(s["flops"] / peak, s["bytes"] / bandwidth) for s in stages)
        for which, stages in work.items()
    }
    return floors | {"both": sum(floors.values())}


class Budget:
    """Limit the seconds from now in which anything is compiled; None: no limit."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.start = time.monotonic()

    def spent(self) -> bool:
        return self.limit is not None and time.monotonic() - self.start > self.limit
