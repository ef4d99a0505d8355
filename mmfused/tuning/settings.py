"""Two choices that are no plans: the form of query pooling, and the router's kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import geometric_mean, median
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from mmfused.benchmarks import measure  # pyright: ignore[reportMissingImports]
from mmfused.benchmarks.report import summary  # pyright: ignore[reportMissingImports]

from .search import KEEP, is_faster

# (queries, heads) of the cases of pooling; the rest is FLUID's, with 256 samples.
POOLED = ((8, 1), (32, 1), (64, 1), (128, 1), (256, 1), (1, 12), (8, 12), (32, 8), (64, 8))
SAMPLES = 256


class Pair(NamedTuple):
    """The times of the two forms of query pooling for one shape.

    ``saving``: FLOPs of the projected form over those of the absorbed one.
    """

    saving: float
    absorbed: float  # seconds
    projected: float


def best_factor(pairs: Sequence[Pair], usual: float) -> float | None:
    """Return the factor for ``ABSORBED_MUST_SAVE`` that loses the least time.

    ``form="auto"`` picks the absorbed form if ``saving >= factor``. A choice loses the logarithm of
    its time over that of the faster form; losses of all shapes are added.

    Args:
        pairs: the times of both forms, one pair for each shape.
        usual: the library's factor.

    Returns:
        A factor, half way (geometrically) between two savings; None if no factor gains more than
        3 % of the time over ``usual``, in the mean over the shapes.

    Examples:
        >>> from mmfused.tuning.settings import Pair, best_factor
        >>> best_factor([Pair(4.0, 2e-3, 1e-3), Pair(9.0, 1e-3, 2e-3)], usual=2.0)
        6.0
    """
    if not pairs:
        return None
    savings = sorted({pair.saving for pair in pairs})
    between = [math.sqrt(a * b) for a, b in zip(savings, savings[1:], strict=False)]
    factors = [savings[0] / 2, *between, 2 * savings[-1]]
    # Among equally good factors, the one closest to the library's.
    best = min(factors, key=lambda f: (round(_loss(pairs, f), 9), abs(math.log(f / usual))))
    gain = (_loss(pairs, usual) - _loss(pairs, best)) / len(pairs)
    return best if gain > -math.log(1 - KEEP) else None


def _loss(pairs: Sequence[Pair], factor: float) -> float:
    return sum(
        math.log((absorbed if saving >= factor else projected) / min(absorbed, projected))
        for saving, absorbed, projected in pairs
    )


def faster_router(samples: Sequence[tuple[list[float], list[float]]]) -> str | None:
    """Return "cuda" if the C++ kernels are faster than Triton's, or None.

    Args:
        samples: for each case the seconds of Triton's kernels, and of those in C++.

    Returns:
        "cuda" if it saves more than 3 % in the geometric mean over the cases, outside the noise
        where it is faster by that much (see ``search.is_faster``), and is slower in none.
    """
    if not samples:
        return None
    ratios = [median(cuda) / median(triton) for triton, cuda in samples]
    clear = all(
        ratio <= 1 and (ratio > 1 - KEEP or is_faster(cuda, triton, KEEP))
        for ratio, (triton, cuda) in zip(ratios, samples, strict=True)
    )
    return "cuda" if clear and geometric_mean(ratios) < 1 - KEEP else None


# ---- measuring -----------------------------------------------------------------------------------


def pooling_cases(module: ModuleType) -> list[Any]:
    """Return the cases whose forms are timed."""
    return [module.custom({"B": SAMPLES, "L": queries, "H": heads}) for queries, heads in POOLED]


def saving(case: Any) -> float:
    """Return the FLOPs of the projected form over those of the absorbed form."""
    from mmfused.ops.query_pooling.composed import form_flops

    flops = form_flops(case.B, case.N, case.D, case.L, case.D, case.D, case.H)
    return flops["projected"] / flops["absorbed"]


def form_seconds(
    module: ModuleType,
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, list[float]]:
    """Return the seconds of the forms "absorbed" and "projected" that pass the accuracy check."""
    composed = module.PROVIDERS["composed"]
    builders = {form: functools.partial(_with_form, composed, form) for form in Pair._fields[1:]}
    return _seconds(module, builders, case, device, dtype, repeats)


def _with_form(composed: Any, form: str, case: Any, device: Any, dtype: Any) -> Any:
    from mmfused.ops.query_pooling import functional

    provider = composed(case, device, dtype)
    provider.backend = "auto"
    provider.within = lambda: mock.patch.object(functional, "cheaper_form", lambda *_: form)
    return provider


def router_seconds(
    module: ModuleType,
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, list[float]]:
    """Return the seconds of the routers "triton" and "cuda" that pass the accuracy check."""
    builders = {"triton": module.PROVIDERS["fused"], "cuda": module.PROVIDERS["fused C++"]}
    return _seconds(module, builders, case, device, dtype, repeats)


def _seconds(
    module: ModuleType,
    builders: dict[str, Any],
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, list[float]]:
    problem = module.make(case, device, dtype)
    with mock.patch.object(module, "PROVIDERS", builders):
        check = measure.AccuracyCheck(module, case, problem)
        admitted = {name: check.admit(name, None)[0] for name in builders}
    providers = {name: provider for name, provider in admitted.items() if provider is not None}
    if device.type == "cuda":
        times, _ = measure.graph_seconds(providers, problem, repeats, True)
    else:
        times = measure.eager_seconds(providers, problem, repeats, True)
    return {name: passes["both"] for name, passes in times.items()}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each list of samples."""
    return {name: summary(samples)["median"] for name, samples in seconds.items()}
