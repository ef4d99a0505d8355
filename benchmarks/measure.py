"""The gate and the clock all benchmarks share: accuracy, time, memory and kernels of a provider,
and the two ceilings.

An op's file (query_pooling.py) gives ``cases(device_type, quick)``, ``custom(shape)``, ``make(case,
device, dtype)`` ->
:class:`Problem`, ``PROVIDERS`` (name -> builder(case, device, dtype) -> :class:`Provider`),
``OURS`` (those that must pass), ``reference`` (one more builder), ``exact(case, problem)`` (float64
results), ``comparable(results)`` and ``work(case, itemsize)``; if it likes ``extras(case, device,
dtype)``, more for the record, of which ``faults`` are as the gate's."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mmfused
from mmfused.library import why_not_fused
from mmfused.testing import interleaved_seconds, over_budget, relative_error, saved_bytes

MAX_COPIES = 64


class Unavailable(RuntimeError):
    """A provider that cannot serve a case on this machine; the message says why."""


def need_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raises Unavailable where the library's kernels cannot be timed."""
    reasons = why_not_fused(device, dtype) or (
        ["interpreted kernels are not timed"] if device.type == "cpu" else []
    )
    if reasons:
        raise Unavailable("; ".join(reasons))


@dataclass
class Problem:
    """One case as tensors: differentiable inputs, the parameters all providers load, the gradient
    of the output.

    ``evicts``: a call moves many times what the cache holds, and so the next finds nothing there.
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
        """What providers are built in: that of the first input. The output, and with it
        ``upstream``, may be wider.
        """
        return next(iter(self.inputs.values())).dtype


@dataclass
class Provider:
    """One way to compute a case.

    ``layout``: for each parameter of ``module``, the problem's parameters that are stacked in it
    along the first axis.
    ``ceiling``: why this is no way to compute the case, only the work inside it: timed without
    passing the gate.
    ``uncompiled``: why it is not compiled.
    ``within``: what every call and its backward run in, beside the backend.
    ``drops``: dropout acts when it is timed, on elements of its own: what it computes is judged
    without."""

    module: nn.Module
    layout: dict[str, tuple[str, ...]]
    backend: str | None = None
    run: Callable[..., Tensor] | None = None  # the compiled module, where it is compiled
    ceiling: str | None = None
    uncompiled: str | None = None
    drops: bool = False
    within: Callable[[], AbstractContextManager] = nullcontext

    def setting(self) -> AbstractContextManager:
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
            raise ValueError(f"layout has {sorted(self.layout)}; the module has {sorted(names)}.")
        for name, parts in self.layout.items():
            own = self.module.get_parameter(name)
            own.copy_(torch.cat([parameters[part] for part in parts]).view_as(own))
        return self

    def both(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward: the output, then the gradients of all inputs and all parameters."""
        leaves = [*inputs, *(self.module.get_parameter(name) for name in self.layout)]
        with self.setting():
            out = (self.module if self.run is None else self.run)(*inputs)
            return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    def results(self, problem: Problem) -> dict[str, Tensor]:
        """The output and all gradients by the names that all providers share."""
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


# ---- the gate ------------------------------------------------------------------------------------


class Gate:
    """Judges providers by the library's error budget; plain is the reference in the problem's
    dtype, exact float64.
    """

    def __init__(self, op, case, problem: Problem):
        self.op, self.case, self.problem = op, case, problem
        self.exact = op.comparable(op.exact(case, problem))
        self.plain = op.comparable(self.build(op.reference).results(problem))

    def build(self, builder: Callable[..., Provider]) -> Provider:
        return builder(self.case, self.problem.device, self.problem.dtype).load(
            self.problem.parameters
        )

    def admit(self, name: str, mode: str | None) -> tuple[Provider | None, dict]:
        """Build, compile in ``mode`` if given, and judge: the provider if it may be timed, and what
        to report of it.
        """
        report = {"compiled": mode, "gate": "passed", "reasons": []}
        try:
            provider = self.build(self.op.PROVIDERS[name])
            if provider.ceiling is not None:
                return provider, report | {"gate": "no gate", "reasons": [provider.ceiling]}
            if mode is not None and provider.uncompiled is not None:
                raise Unavailable(provider.uncompiled)
            if mode is not None:
                provider.run = torch.compile(provider.module, mode=mode, dynamic=False)
            faults = over_budget(
                self.op.comparable(provider.results(self.problem)), self.exact, self.plain
            )
            if provider.drops:  # what is timed runs too, and its gradients are numbers
                tensors = provider.both(tuple(self.problem.inputs.values()), self.problem.upstream)
                faults += (
                    []
                    if all(tensor.isfinite().all() for tensor in tensors)
                    else ["Under dropout it is not finite."]
                )
        except Unavailable as why:
            return None, report | {"gate": "unavailable", "reasons": [str(why)]}
        except Exception as error:  # out of memory, a kernel or compiler that refuses the shape, another version's interface
            return None, report | {
                "gate": "failed",
                "reasons": [f"{type(error).__name__}: {first_line(error)}"],
            }
        if faults:
            return None, report | {"gate": "failed", "reasons": faults}
        return provider, report


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---- the clock -----------------------------------------------------------------------------------


def rotation(problem: Problem) -> list[tuple[Tensor, ...]]:
    """The inputs; on CUDA one copy more than twice the L2 cache holds, so that no call finds its
    inputs there.
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


def steps(provider: Provider, upstream: Tensor, backward: bool) -> dict[str, Callable]:
    """What is timed: the forward that builds the graph, forward + backward with all gradients, and
    of models a whole step.
    """
    forward = {"forward": lambda inputs: (provider(*inputs).detach(),)}
    if not backward:
        return forward
    both = forward | {"both": lambda inputs: provider.both(inputs, upstream)}
    trained = provider.layout and hasattr(
        provider, "step"
    )  # there are parameters, and an optimiser
    return both | ({"step": lambda inputs: provider.step(inputs, upstream)} if trained else {})


def seconds(
    bursts: dict[tuple[str, str], Callable],
    calls: int,
    repeats: int,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a call by provider and pass, all in turn. Backward is both minus forward,
    neighbours in a round.
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
) -> dict:
    """Launched from Python, one call for each copy of the inputs between two synchronisations."""
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
) -> tuple[dict, dict]:
    """Replays of CUDA graphs, each with one call for each copy of the inputs; and, by name, why a
    provider has none.
    """
    copies, pool, bursts, refused = rotation(problem), torch.cuda.graph_pool_handle(), {}, {}
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
    """A graph of one step for each copy. Graphs share ``pool``: one runs at a time, and nobody
    reads what it leaves.
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
    # A kernel on another stream escapes the capture: output and first gradient (of an input) tell.
    if compared and not all(
        relative_error(got, want) < 1e-2 for got, want in zip(left[:2], wanted[:2], strict=True)
    ):
        raise RuntimeError("the replay does not compute what the eager call does")
    return graph


# ---- memory and launches -------------------------------------------------------------------------


def footprint(provider: Provider, problem: Problem) -> dict[str, int | None]:
    """Of one forward + backward: peak bytes above inputs and parameters, bytes kept for the
    backward, kernels launched.

    ``forward_kernels``: those of the forward alone. Peak and kernels are None off CUDA.
    """
    inputs = tuple(problem.inputs.values())
    saved = saved_bytes(lambda: provider(*inputs), (*inputs, *provider.module.parameters()))
    if problem.device.type != "cuda":
        return {"peak_bytes": None, "saved_bytes": saved, "kernels": None, "forward_kernels": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.both(inputs, problem.upstream)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    kernels = kernel_count(lambda: provider.both(inputs, problem.upstream))
    forward_kernels = kernel_count(lambda: provider(*inputs))
    return {
        "peak_bytes": peak,
        "saved_bytes": saved,
        "kernels": kernels,
        "forward_kernels": forward_kernels,
    }


def kernel_count(call: Callable) -> int | None:
    """CUDA kernels of one call; None where the profiler sees none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events) or None


# ---- the roofline --------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best rates this device shows now: FLOP/s of a large random matmul, bytes/s read and
    written by a copy.

    A CPU's are float32's whatever the dtype: many have no arithmetic in the smaller ones.
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


def floor_seconds(work: dict[str, list[dict]], rates: dict[str, float]) -> dict[str, float]:
    """The least time of each pass: the sum over its stages of what their FLOPs or their bytes take
    at the ceilings.
    """
    peak, bandwidth = rates["flops_per_second"], rates["bytes_per_second"]
    floors = {
        which: sum(max(s["flops"] / peak, s["bytes"] / bandwidth) for s in stages)
        for which, stages in work.items()
    }
    return floors | {"both": sum(floors.values())}


class Budget:
    """Seconds from now after which nothing more is compiled; None: no limit."""

    def __init__(self, limit: float | None):
        self.limit, self.start = limit, time.monotonic()

    def spent(self) -> bool:
        return self.limit is not None and time.monotonic() - self.start > self.limit
