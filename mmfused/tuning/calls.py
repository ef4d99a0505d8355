"""The operator calls of a case, and the launches that they make with given plans.

The calls are recorded while the benchmark's provider runs. Its operators then return zeros, so that
no kernel runs and nothing is compiled. Replayed on meta tensors, the calls launch what they would
launch on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import library

if TYPE_CHECKING:
    from mmfused.kernels.recording import Launch
    from mmfused.kernels.tuned import Entry, Reached

_CUDA = torch._C.DispatchKey.CUDA  # type: ignore[attr-defined]
# Sizes that change no plan. Without a GPU these are reduced, because all tensors are on the CPU.
_SMALL = {
    "query_pooling": {"B": 8},
    "gated_cross_attention": {"B": 256},  # programs walk over many tiles
    "masked_info_nce": {"B": 65536},  # chunks of dS
    "grouped_mlp": {},
    "topk_routing": {"T": 512},
}


class Call(NamedTuple):
    """A call of one of this library's operators, with meta tensors."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Launches(NamedTuple):
    """Launches, and a text with all that they depend on, grids included."""

    made: list[Launch]
    text: str


class Plans:
    """A plan for each reached call of ``plan()``, in order; equal if their texts are."""

    def __init__(self, plans: Iterable[Any]) -> None:
        self.plans: tuple[Any, ...] = tuple(plans)
        self._text: str = repr(self.plans)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plans) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def with_plan(self, index: int, plan: Any) -> Plans:
        """Return the plans with another one at ``index``."""
        return Plans((*self.plans[:index], plan, *self.plans[index + 1 :]))


@dataclass(frozen=True)
class Problem:
    """What one case calls: its operator calls, and the plans that they reach."""

    op: str
    arch: int
    calls: tuple[Call, ...]
    reached: tuple[Reached, ...]

    def entries(self, plans: Plans) -> list[Entry]:
        """Return the entries that force ``plans``, without those that are the library's."""
        from mmfused.kernels.tuned import Entry

        return [
            Entry(call.op, call.arguments, call.default, plan)
            for call, plan in zip(self.reached, plans.plans, strict=True)
            if plan != call.default
        ]

    def default(self) -> Plans:
        """Return the library's own plans."""
        return Plans(call.default for call in self.reached)

    def launches(self, plans: Plans) -> Launches:
        """Return what the calls launch with these plans; no kernel runs."""
        return replayed(self.calls, self.entries(plans), self.arch)[0]


def problem_of(
    op: str,
    module: ModuleType,
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
    arch: int,
) -> Problem:
    """Return the calls and plans of a case; on a CPU, of a case with few samples."""
    if device.type == "cpu":
        case = smaller(op, case)
    calls = calls_of(module, case, device, dtype)
    _, reached = replayed(calls, [], arch)
    return Problem(op, arch, tuple(calls), tuple(call for call in reached if call.op == op))


def smaller(op: str, case: Any) -> Any:
    """Return the case with fewer samples, which reaches the same plans."""
    sizes = {name: min(most, getattr(case, name)) for name, most in _SMALL[op].items()}
    return replace(case, **sizes)


def calls_of(
    module: ModuleType,
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Call]:
    """Return the operator calls of forward and backward of the benchmark's fused provider."""
    problem = module.make(case, device, dtype)
    with kernels_allowed(module, device), _Recorder() as recorder:
        provider = module.PROVIDERS["fused"](case, device, dtype).load(problem.parameters)
        provider.both(tuple(problem.inputs.values()), problem.upstream)
    return recorder.calls


@contextlib.contextmanager
def kernels_allowed(module: ModuleType, device: torch.device) -> Iterator[None]:
    """Let a benchmark run the fused provider on a CPU, where no kernel is timed."""
    if device.type != "cpu":
        yield
        return
    with (
        mock.patch.object(library, "KERNELS_ON_CPU", True),
        mock.patch.object(module, "need_kernels", lambda *_: None),
    ):
        yield


def replayed(
    calls: Iterable[Call],
    entries: Iterable[Entry],
    arch: int,
) -> tuple[Launches, list[Reached]]:
    """Return the launches of the calls with tuned plans, and the plans that they reach."""
    from mmfused.kernels import tuned
    from mmfused.kernels.recording import launches_for

    with (
        torch.no_grad(),
        tuned.forced(entries),
        tuned.observed() as reached,
        launches_for(arch) as launches,
        _grids() as grids,
    ):
        for call in calls:
            call.function._op_dk(_CUDA, *call.args, **call.kwargs)
    texts = (
        f"{launch.name} {grid} {tree_map_only(torch.Tensor, _shape, tuple(launch[1:]))}"
        for launch, grid in zip(launches, grids, strict=True)
    )
    return Launches(launches, "\n".join(texts)), reached


@contextlib.contextmanager
def _grids() -> Iterator[list[Any]]:
    """Collect the grids of launches."""
    from triton import KernelInterface

    grids: list[Any] = []
    original = KernelInterface.__getitem__

    def noting(kernel: Any, grid: Any) -> Any:
        grids.append(grid)
        return original(kernel, grid)

    with mock.patch.object(KernelInterface, "__getitem__", noting):
        yield grids


def _shape(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, tuple(x.shape), x.stride()


class _Recorder(TorchDispatchMode):
    """Notes calls of this library's operators with kernels; they return zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace != "mmfused" or not function.has_kernel_for_dispatch_key(_CUDA):
            return function(*args, **kwargs)
        call = Call(function, *tree_map_only(torch.Tensor, _on_meta, (args, kwargs)))
        self.calls.append(call)
        device = next(x.device for x in library._tensors(args))
        out = function(*call.args, **call.kwargs)  # shapes only
        return tree_map_only(torch.Tensor, lambda x: _zeros(x, device), out)


def _on_meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _zeros(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).zero_()
