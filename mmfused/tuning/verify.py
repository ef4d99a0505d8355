"""Check a candidate's results: at the case's own shape, and at odd shapes that reach its plans.

A plan that is right only where sizes are multiples of its tiles must never be kept. So every
changed plan has to be reached by a checked call at the case's shape and by one at another shape,
with few samples and with sizes that are not multiples of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mmfused.benchmarks import measure  # pyright: ignore[reportMissingImports]

from .calls import kernels_allowed
from .timing import is_broken

if TYPE_CHECKING:
    from mmfused.kernels.tuned import Entry


def _fewer(size: int, most: int) -> int:
    """Return an odd number below ``size``, at most ``most``, and at least 1."""
    return max(1, min(most, (size - 2) | 1))


def _half(case: Any) -> str:
    """Return the distribution with experts without tokens, if enough experts are left."""
    return "half" if case.E - case.E // 2 >= case.k else case.routed


# Op -> functions from a case to sizes of an odd case. Some have masks, or experts without tokens,
# where the case has none: the arguments of ``plan()`` do not tell.
_ODD: dict[str, tuple[Callable[[Any], dict[str, Any]], ...]] = {
    "query_pooling": (
        lambda case: {"B": 3, "N": max(1, case.N - 1)},
        lambda case: {"B": 5, "N": (2 * case.N // 3) | 1},
        lambda case: {"B": 1, "N": case.N},
    ),
    "gated_cross_attention": (
        lambda case: {"B": 5, "N": max(1, case.N - 1), "M": max(1, case.M - 1)},
        lambda case: {"B": 4, "N": (2 * case.N // 3) | 1, "M": (case.M // 2) | 1},
        lambda case: {"B": 3, "N": 1, "M": case.M},
        lambda case: {"B": 6, "missing": not case.missing},
    ),
    "masked_info_nce": (
        lambda case: {"B": _fewer(case.B, 333)},
        lambda case: {"B": _fewer(case.B // 2, 37)},
        lambda case: {"B": 1},
        lambda case: {"B": _fewer(case.B, 301), "K": 3 if case.K == 1 else 1},
    ),
    "grouped_mlp": (
        lambda case: {"T": max(1, case.T - 1)},
        lambda case: {"T": (3 * case.T // 4) | 1, "routed": _half(case)},
        lambda case: {"T": (case.T // 2 + 1) | 1},
    ),
    "topk_routing": (
        lambda case: {"T": _fewer(case.T, 1001)},
        lambda case: {"T": _fewer(case.T // 2, 37)},
        lambda case: {"T": 1},
        lambda case: {"T": _fewer(case.T, 777), "S": 3 if case.S == 1 else 1},
    ),
}


def odd_cases(op: str, case: Any) -> list[Any]:
    """Return the case with few samples, and with sizes that are not multiples of tiles."""
    found = (replace(case, **sizes(case)) for sizes in _ODD[op])
    return [odd for odd in dict.fromkeys(found) if odd != case]


class Verifier:
    """Checks tuned plans of one case.

    Args:
        op: the name of the op.
        module: its benchmark.
        case: the case.
        device, dtype: where and in which type it runs.
    """

    def __init__(
        self,
        op: str,
        module: ModuleType,
        case: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.op, self.module, self.device, self.dtype = op, module, device, dtype
        self.case = case
        self.odd: list[Any] = odd_cases(op, case)
        self._checks: dict[Any, tuple[Any, Any]] = {}

    def drops(self) -> bool:
        """Return whether the provider drops values, as in training with dropout."""
        with kernels_allowed(self.module, self.device):
            return self.module.PROVIDERS["fused"](self.case, self.device, self.dtype).drops

    def why_refused(self, entries: list[Entry]) -> str | None:
        """Return why the plans must not be used, or None if all results are right."""
        try:
            return self._why_refused(entries)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if is_broken(self.device):
                raise
            return f"the accuracy check fails: {type(error).__name__}: {measure.first_line(error)}"

    def _why_refused(self, entries: list[Entry]) -> str | None:
        need = {(entry.op, entry.arguments) for entry in entries}
        found: set[Any] = set()
        for reason in self._faults(self.case, entries, found):
            return reason
        if need - found:
            return "the accuracy check at this shape does not reach the plan"
        found.clear()
        for odd in self.odd:
            for reason in self._faults(odd, entries, found):
                return reason
        return "no odd shape reaches the plan" if need - found else None

    def _faults(self, case: Any, entries: list[Entry], found: set[Any]) -> Iterator[str]:
        """Check one shape; add the changed plans that it reaches to ``found``."""
        from mmfused.kernels import tuned

        check, problem = self._check(case)
        with kernels_allowed(self.module, self.device), tuned.forced(entries):
            provider = check.build(self.module.PROVIDERS["fused"])
            with tuned.observed() as reached:
                results = provider.results(problem)
            found |= {(call.op, call.arguments) for call in reached if call.plan != call.default}
            at = f"at {_sizes(case)}"
            for fault in check.faults(provider):
                yield f"{at}: {fault}"
            again = provider.results(problem)
        if not all(torch.equal(again[name], results[name]) for name in results):
            yield f"{at}: two calls give different bits"

    def _check(self, case: Any) -> tuple[Any, Any]:
        if case not in self._checks:
            problem = self.module.make(case, self.device, self.dtype)
            self._checks[case] = measure.AccuracyCheck(self.module, case, problem), problem
        return self._checks[case]


def _sizes(case: Any) -> str:
    sizes = {name: value for name, value in vars(case).items() if len(name) == 1}
    return " ".join(f"{name}={value}" for name, value in sizes.items())
