"""Error budgets, saved memory and timing, shared by tests and benchmarks.

The reference in float64 is the exact result. An implementation in a lower precision may have twice
the error of the same formula in plain PyTorch in that precision, plus one rounding. Fixed
tolerances would be too loose for one shape and too tight for another.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .random import keep_mask as _keep_mask


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return ||actual - exact|| / ||exact|| in float64.

    Where ``exact`` is all zero, return the absolute norm; NaN counts as infinite.
    """
    actual, exact = actual.detach().double(), exact.detach().double()
    error = torch.linalg.vector_norm(actual - exact).item()
    norm = torch.linalg.vector_norm(exact).item()
    return math.inf if math.isnan(error) else error / norm if norm > 0 else error


def over_budget(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    *,
    factor: float = 2.0,
) -> list[str]:
    """Return one sentence for each tensor that exceeds its error budget.

    The budget is ``factor`` times the error of plain PyTorch plus one rounding, relative to the
    norm.

    Args:
        actual: results of the tested implementation, by name.
        exact: the same in float64.
        plain: the same from plain PyTorch in the dtype of ``actual``.
    """
    faults = []
    if actual.keys() != exact.keys() or plain.keys() != exact.keys():
        return [f"names differ: {sorted(actual)}, {sorted(exact)}, {sorted(plain)}."]
    for name, want in exact.items():
        got = actual[name]
        if got.shape != want.shape:
            faults.append(f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}.")
            continue
        plain_error = relative_error(plain[name], want)
        if not math.isfinite(plain_error):
            faults.append(f"{name}: plain PyTorch's is not finite, which would allow anything.")
            continue
        allowed = factor * plain_error + torch.finfo(got.dtype).eps
        error = relative_error(got, want)
        if not error <= allowed:
            faults.append(f"{name}: relative error {error:.3e}, allowed {allowed:.3e}.")
    return faults


def value_and_gradients(
    fn: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    upstream: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run ``fn(**inputs)`` forward and backward.

    Returns {"out": ...} and {"d<name>": ...} for every tensor of ``inputs`` that requires grad.
    ``upstream`` is the gradient of the output, ones by default.
    """
    leaves = {
        k: v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    wanted = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    out = fn(**leaves)
    gradients = torch.autograd.grad(
        out,
        list(wanted.values()),
        torch.ones_like(out) if upstream is None else upstream.to(out.dtype),
    )
    return {"out": out.detach()} | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}


def saved_bytes(fn: Callable[[], Tensor], ignore: tuple[Tensor, ...] = ()) -> int:
    """Return the bytes that ``fn()`` saves for its backward pass.

    Each storage counts once; those of ``ignore`` (inputs, parameters) do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in ignore}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fn()
    del out
    return sum(kept.values())


def interleaved_seconds(
    fns: dict[str, Callable[[], object]],
    repeats: int = 21,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Return the wall-clock seconds of each call.

    The functions are called in turn, ``repeats`` times, so that drift of the machine affects all of
    them alike.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for step in range(warmup + repeats):
        for name, fn in fns.items():
            synchronize()
            start = time.perf_counter()
            fn()
            synchronize()
            if step >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


def interleaved_medians(
    fns: dict[str, Callable[[], object]],
    repeats: int = 21,
    warmup: int = 2,
) -> dict[str, float]:
    """Return the median of :func:`interleaved_seconds` for each function."""
    return {
        name: statistics.median(values)
        for name, values in interleaved_seconds(fns, repeats, warmup).items()
    }


def dropout_mask(seed: Tensor, shape: tuple[int, ...], p: float, stream: int = 0) -> Tensor:
    """Return the dropout mask of the operators for ``dropout_seed=seed``: True = keep.

    It is the same on every backend. ``stream`` is 0 for query pooling (probabilities (B, num_heads,
    L, N)). Gated cross-attention uses 0 for its probabilities (B, num_heads, N, M) and 1 for its
    output (B, N, D); the other direction uses 2 and 3.
    """
    return _keep_mask(seed, shape, p, stream)
