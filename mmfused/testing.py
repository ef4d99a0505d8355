"""What the tests and the benchmarks share: the error budget, saved bytes, interleaved timing.

The oracle is the reference in float64. An implementation in a lower precision may err twice as much
as plain PyTorch does with the same formula in that precision, plus one rounding: no fixed
tolerances, which are too loose for one shape and too tight for another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .random import keep_mask as _keep_mask


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64 (the absolute norm where exact is all zero); NaN
    counts as infinite.
    """
    actual, exact = actual.detach().double(), exact.detach().double()
    error, norm = (
        torch.linalg.vector_norm(actual - exact).item(),
        torch.linalg.vector_norm(exact).item(),
    )
    return math.inf if math.isnan(error) else error / norm if norm > 0 else error


def over_budget(actual: dict, exact: dict, plain: dict, *, factor: float = 2.0) -> list[str]:
    """One sentence for each tensor whose error exceeds ``factor`` times plain PyTorch's plus one
    rounding; empty when all fit.

    ``exact`` holds float64 tensors by name, ``actual`` and ``plain`` the same names from the tested
    and the plain implementation."""
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
    inputs: dict[str, Tensor],
    upstream: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run ``fn(**inputs)``; return {"out": ..., "d<name>": ...} for every floating input that
    requires grad.
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
    """Bytes that ``fn()`` keeps for its backward: distinct storages, without those of ``ignore``
    (inputs, parameters).
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
    """Wall seconds of each call, all functions in turn, ``repeats`` times: drift of the machine
    falls on all of them alike.
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
    """Median wall seconds of each function, see :func:`interleaved_seconds`."""
    return {
        name: statistics.median(values)
        for name, values in interleaved_seconds(fns, repeats, warmup).items()
    }


def dropout_mask(seed: Tensor, shape: tuple[int, ...], p: float, stream: int = 0) -> Tensor:
    """What the ops of this library keep under dropout with ``dropout_seed=seed``, ``shape`` bool,
    on every backend.

    Streams: query pooling 0 (probabilities (B, num_heads, L, N)); gated cross-attention 0
    (probabilities (B, num_heads, N, M)) and 1 (output (B, N, D)), in the other direction 2 and 3.
    """
    return _keep_mask(seed, shape, p, stream)
