"""Check the accuracy of a provider and measure its time.

A case is an op with given sizes and options. A provider is one way to compute a case: a baseline,
or a backend of the library. The benchmark of an op (query_pooling.py, for instance) defines

    cases(device_type, quick)       the list of cases; small ones if quick
    custom(shape)                   a case with the sizes in ``shape``
    SIZES                           description of these sizes, for the help text
    make(case, device, dtype)       -> Problem
    PROVIDERS                       dict: name -> builder(case, device, dtype) -> Provider
    OURS                            names of the library's providers; all must be accurate
    reference                       builder of the reference provider
    exact(case, problem)            -> float64 results
    comparable(results)             -> the results that the accuracy check compares
    work(case, itemsize)            -> FLOPs and bytes of each stage of each pass

and optionally ``extras(case, device, dtype)``, which returns further entries of the record. The
entry "faults" is a list of messages; the run fails if the list is not empty.
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

MAX_COPIES = 64  # maximum length of the list that rotation() returns
SAMPLING_SECONDS = 60.0  # of a case, on CUDA: longer cases have fewer samples, but LEAST_SAMPLES
LEAST_SAMPLES = 3


class Unavailable(RuntimeError):
    """A provider cannot compute a case on this machine; the message gives the reason."""


def need_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raise Unavailable if the library's kernels cannot be timed on this device in this dtype."""
    reasons = why_not_fused(device, dtype) or (
        ["interpreted kernels are not timed"] if device.type == "cpu" else []
    )
    if reasons:
        raise Unavailable("; ".join(reasons))


@dataclass
class Problem:
    """The tensors of a case.

    ``inputs``: differentiable inputs, by name.
    ``parameters``: values that every provider loads into its module.
    ``upstream``: gradient of the output.
    ``evicts``: whether a call moves so much data that its inputs are evicted from the cache.
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
        """Return the dtype of the first input; the output may have a wider dtype."""
        return next(iter(self.inputs.values())).dtype


@dataclass
class Provider:
    """One way to compute a case.

    ``layout``: name of each parameter of ``module`` -> names of the problem's parameters, whose
    elements are concatenated.
    ``backend``: backend of the library for all calls and their backwards.
    ``run``: the compiled module, or None to call ``module``.
    ``ceiling``: what the provider computes, if it computes only a part of the case. Such a provider
    is timed without an accuracy check.
    ``uncompiled``: the reason why the provider must not be compiled.
    ``drops``: whether the provider is timed with dropout. Its accuracy is checked without dropout,
    because providers have different dropout masks.
    ``within``: returns a context manager for a call and its backward.
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
        """Return the context for a call and its backward: ``backend`` and ``within``."""
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
        """Copy the problem's parameters into the module, and return the provider."""
        names = dict(self.module.named_parameters()).keys()
        if names != self.layout.keys():
            raise ValueError(f"layout: got {sorted(self.layout)}, expected {sorted(names)}")
        for name, parts in self.layout.items():
            parameter = self.module.get_parameter(name)
            values = torch.cat([parameters[part].flatten() for part in parts])
            parameter.copy_(values.view_as(parameter))
        return self

    def both(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        """Return the output, then the gradients of all inputs and all parameters."""
        leaves = [*inputs, *(self.module.get_parameter(name) for name in self.layout)]
        with self.setting():
            out = (self.module if self.run is None else self.run)(*inputs)
            return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    def results(self, problem: Problem) -> dict[str, Tensor]:
        """Return the output and all gradients, under names that are the same for all providers."""
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
    """Check providers against the error budget of mmfused.testing.over_budget.

    ``exact``: float64 results, against which errors are measured.
    ``plain``: results of the reference in the dtype of the problem. The error of a provider may be
    a small multiple of the error of ``plain``.

    The key "gate" of a provider's entry in the record is the result of the check.
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
        """Build a provider, compile it if ``mode`` is given, and check its accuracy.

        A provider with a ``ceiling`` is neither compiled nor checked. Returns a pair: the provider
        (None if it must not be timed), and the provider's entry for the record.
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
            # For example out of memory, an unsupported shape, or a changed API.
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


# ---- timing --------------------------------------------------------------------------------------


def rotation(problem: Problem) -> list[tuple[Tensor, ...]]:
    """Return the inputs and, on CUDA, copies of the inputs, for successive calls.

    The copies fill the L2 cache twice, so that inputs are evicted before they are used again.
    ``MAX_COPIES`` limits the length of the list. There are no copies if ``problem.evicts``.
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
    """Return pass -> function to time; the function takes the tuple of inputs.

    "forward" includes building the autograd graph, "both" is forward and backward, and "step" is a
    training step with the optimizer.
    """
    found: dict[str, Callable] = {"forward": lambda inputs: (provider(*inputs).detach(),)}
    if backward:
        found["both"] = lambda inputs: provider.both(inputs, upstream)
        step = getattr(provider, "step", None)
        if provider.layout and step is not None:  # there are parameters to train
            found["step"] = lambda inputs: step(inputs, upstream)
    return found


def seconds(
    bursts: dict[tuple[str, str], Callable],
    calls: int,
    repeats: int,
) -> dict[str, dict[str, list[float]]]:
    """Time the bursts in turn, ``repeats`` times; return the seconds per call by provider and pass.

    ``bursts``: (provider, pass) -> function that makes ``calls`` calls. The seconds of "backward"
    are those of "both" minus those of "forward" in the same round.
    """
    samples: dict[str, dict[str, list[float]]] = {}
    repeats = affordable(bursts, repeats)  # also the first of two rounds that are not measured
    for (name, which), values in interleaved_seconds(bursts, repeats, warmup=1).items():
        samples.setdefault(name, {})[which] = [value / calls for value in values]
    for passes in samples.values():
        if "both" in passes:
            pairs = zip(passes["both"], passes["forward"], strict=True)
            passes["backward"] = [both - forward for both, forward in pairs]
    return samples


def affordable(bursts: dict[tuple[str, str], Callable], repeats: int) -> int:
    """Call each burst once; return ``repeats``, or fewer on CUDA if that would take too long."""
    once = sum(seconds[0] for seconds in interleaved_seconds(bursts, 1, warmup=0).values())
    if not torch.cuda.is_available() or repeats * once <= SAMPLING_SECONDS:
        return repeats
    return min(repeats, max(LEAST_SAMPLES, int(SAMPLING_SECONDS / once)))


def eager_seconds(
    providers: dict[str, Provider],
    problem: Problem,
    repeats: int,
    backward: bool,
) -> dict[str, Any]:
    """Time eager calls; a sample is one call per copy of the inputs, then a synchronization."""
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
    """Time replays of CUDA graphs that contain a call for each copy of the inputs.

    Returns a pair: the seconds, and a dict with the reason for each provider without a graph.
    """
    copies, pool = rotation(problem), torch.cuda.graph_pool_handle()
    bursts, without_graph = {}, {}
    for name, provider in providers.items():
        try:
            graphs = {
                (name, which): capture(step, copies, pool, compared=not provider.drops).replay
                for which, step in steps(provider, problem.upstream, backward).items()
            }
        except RuntimeError as error:
            without_graph[name] = f"no CUDA graph: {first_line(error)}"
        else:
            bursts |= graphs
    return seconds(bursts, len(copies), repeats), without_graph


def capture(
    step: Callable,
    copies: list[tuple[Tensor, ...]],
    pool,
    compared: bool = True,
) -> torch.cuda.CUDAGraph:
    """Capture a CUDA graph that calls ``step`` for each copy of the inputs.

    ``compared``: raise RuntimeError if the first two results differ from those of an eager call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step(copies[-1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for inputs in copies:
            results = step(inputs)
    graph.replay()
    torch.cuda.synchronize()
    # A kernel launched on another stream is not captured, so the replay would lack its results.
    if compared and not all(
        relative_error(got, want) < 1e-2
        for got, want in zip(results[:2], expected[:2], strict=True)
    ):
        raise RuntimeError("the replay and the eager call give different results")
    return graph


# ---- the roofline --------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the FLOP/s of a large matmul, and the bytes/s that a copy reads and writes.

    On a CPU both are measured in float32, because many CPUs have no 16-bit arithmetic.
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
    """Return the least possible time of each pass at the rates that :func:`ceilings` measured.

    A stage takes the time of its FLOPs or of its bytes, whichever is longer. A pass takes the sum
    of its stages, and "both" the sum of the passes.
    """
    peak, bandwidth = rates["flops_per_second"], rates["bytes_per_second"]
    floors: dict[str, float] = {
        which: sum(max(s["flops"] / peak, s["bytes"] / bandwidth) for s in stages)
        for which, stages in work.items()
    }
    return floors | {"both": sum(floors.values())}


class Budget:
    """A time limit in seconds, counted from the creation of the object; None: no limit."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.start = time.monotonic()

    def spent(self) -> bool:
        return self.limit is not None and time.monotonic() - self.start > self.limit
