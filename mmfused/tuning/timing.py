"""Time a case with several plans in turn, as the benchmarks time their providers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mmfused.benchmarks import measure  # pyright: ignore[reportMissingImports]

from ..testing import interleaved_seconds
from .calls import Plans, Problem, kernels_allowed

if TYPE_CHECKING:
    from mmfused.kernels.tuned import Entry

SECONDS = 60.0  # of the samples of a batch of plans; if they take longer, there are fewer
LEAST = 5  # samples of a plan


class Timer:
    """Times forward and backward of one case; ``repeats`` samples of each plan, if that is quick.

    A sample is a replay of a CUDA graph with a call for each copy of the inputs. If the library's
    own plans cannot be captured, all plans are timed without graphs. ``note_running`` is called
    with plans before they run for the first time, and with None afterwards.
    """

    def __init__(
        self,
        module: ModuleType,
        case: Any,
        device: torch.device,
        dtype: torch.dtype,
        problem: Problem,
        repeats: int,
        note_running: Callable[[Plans | None], None] = lambda plans: None,
    ) -> None:
        self.module, self.case, self.device, self.dtype = module, case, device, dtype
        self.problem, self.repeats, self.note_running = problem, repeats, note_running
        self._tensors: Any = None
        self.eager: bool = device.type != "cuda"

    def __call__(self, plans: Mapping[str, Plans]) -> dict[str, list[float]]:
        """Return the seconds per call of each sample; plans that fail are left out."""
        if self._tensors is None:
            self._tensors = self.module.make(self.case, self.device, self.dtype)
        with kernels_allowed(self.module, self.device):
            providers = {label: self._provider(plans[label]) for label in plans}
            runs = {
                label: provider
                for label, provider in providers.items()
                if self._runs(provider, plans[label])
            }
            return self._times(runs)

    def _provider(self, plans: Plans) -> Any:
        provider = self.module.PROVIDERS["fused"](self.case, self.device, self.dtype)
        within, entries = provider.within, self.problem.entries(plans)
        provider.within = lambda: _forced(within, entries)
        return provider.load(self._tensors.parameters)

    def _runs(self, provider: Any, plans: Plans) -> bool:
        self.note_running(plans)
        try:
            provider.both(tuple(self._tensors.inputs.values()), self._tensors.upstream)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:  # such as out of memory, or a launch that the driver refuses
            if is_broken(self.device):
                raise RuntimeError(
                    f"the GPU stopped working for this process ({measure.first_line(error)}); "
                    "run the command again, which leaves out this plan"
                ) from error
            self.note_running(None)
            return False
        self.note_running(None)
        return True

    def _times(self, providers: dict[str, Any]) -> dict[str, list[float]]:
        copies = measure.rotation(self._tensors)
        bursts: dict[str, Callable[[], object]] = {}
        if not self.eager:
            bursts = self._graphs(providers, copies)
        if "" in providers and "" not in bursts:
            self.eager = True
        if self.eager:
            bursts = {label: self._burst(provider, copies) for label, provider in providers.items()}
        times = interleaved_seconds(bursts, self._affordable(bursts)) if bursts else {}
        return {label: [s / len(copies) for s in samples] for label, samples in times.items()}

    def _affordable(self, bursts: dict[str, Callable[[], object]]) -> int:
        """Return ``repeats``, or fewer if one sample of each plan takes long."""
        once = sum(samples[0] for samples in interleaved_seconds(bursts, 1, warmup=1).values())
        return min(self.repeats, max(LEAST, int(SECONDS / max(once, 1e-9))))

    def _graphs(
        self, providers: dict[str, Any], copies: list[Any]
    ) -> dict[str, Callable[[], object]]:
        """Return the replays of the providers that can be captured in a CUDA graph."""
        found, pool = {}, torch.cuda.graph_pool_handle()
        for label, provider in providers.items():
            with contextlib.suppress(RuntimeError):
                found[label] = measure.capture(self._step(provider), copies, pool).replay
        return found

    def _burst(self, provider: Any, copies: list[Any]) -> Callable[[], object]:
        step = self._step(provider)

        def burst() -> None:
            for inputs in copies:
                step(inputs)

        return burst

    def _step(self, provider: Any) -> Callable[[Any], Any]:
        return lambda inputs: provider.both(inputs, self._tensors.upstream)


@contextlib.contextmanager
def _forced(
    within: Callable[[], contextlib.AbstractContextManager[Any]], entries: list[Entry]
) -> Iterator[None]:
    from mmfused.kernels import tuned

    with within(), tuned.forced(entries):
        yield


def is_broken(device: torch.device) -> bool:
    """Return whether an error of a kernel has ended this process's work on the GPU."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False
