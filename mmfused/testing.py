"""Error budgets, saved memory and timing, shared by tests and benchmarks.

The float64 reference counts as the exact result. An implementation in a lower precision may have
twice the error of the same formula in plain PyTorch at that precision, plus one rounding. A fixed
tolerance would be too loose for some shapes and too tight for others.
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
    """Return ``||actual - exact|| / ||exact||`` in float64, with the Euclidean norm.

    If ``exact`` is all zeros, return ``||actual||``. If the error is NaN, return infinity.

    Args:
        actual: the computed values, of any shape.
        exact: the exact values, of the same shape.

    Examples:
        >>> import torch
        >>> from mmfused.testing import relative_error
        >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))  # 1 / 5
        0.2
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

    The budget is ``factor`` times the relative error of plain PyTorch, plus one rounding.

    Args:
        actual: results of the tested implementation, by name.
        exact: results of the float64 reference, by name.
        plain: results of plain PyTorch in the dtype of ``actual``, by name.
        factor: allowed multiple of the error of plain PyTorch.

    Returns:
        The sentences; an empty list if all tensors are within their budgets.

    Examples:
        >>> import torch
        >>> from mmfused.testing import over_budget
        >>> x = torch.randn(100)
        >>> exact, plain = {"out": x.double().softmax(0)}, {"out": x.softmax(0)}
        >>> over_budget({"out": x.exp() / x.exp().sum()}, exact, plain, factor=10)
        []
        >>> over_budget({"out": plain["out"] * 1.01}, exact, plain)
        ['out: relative error 1.000e-02, allowed ...']
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
            faults.append(f"{name}: plain PyTorch has no finite error, so there is no budget.")
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
    """Run ``fn(**inputs)`` forward and backward, and return the output and the gradients.

    Args:
        fn: the function.
        inputs: arguments of the function, by name.
        upstream: gradient of the output; None takes ones.

    Returns:
        A dict with the output, "out", and the gradient "d<name>" of each input that requires grad.

    Examples:
        >>> import torch
        >>> from mmfused.testing import value_and_gradients
        >>> inputs = {"input": torch.randn(3, 4, requires_grad=True), "weight": torch.randn(2, 4)}
        >>> results = value_and_gradients(torch.nn.functional.linear, inputs)
        >>> list(results)
        ['out', 'dinput']
        >>> torch.allclose(results["dinput"], inputs["weight"].sum(0).expand(3, 4))
        True
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
    """Return the number of bytes that ``fn()`` saves for its backward pass.

    Each storage counts once, with its whole size.

    Args:
        fn: the function; its inputs must require grad.
        ignore: tensors whose storages do not count, such as inputs and parameters.

    Examples:
        >>> import torch
        >>> from mmfused.testing import saved_bytes
        >>> x = torch.randn(100, 64, requires_grad=True)
        >>> saved_bytes(lambda: x.exp())  # the output, 100 * 64 * 4 bytes
        25600
        >>> saved_bytes(lambda: x.sin(), ignore=(x,))  # only the input
        0
    """
    ignored = {t.untyped_storage().data_ptr() for t in ignore}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fn()
    del out
    return sum(saved.values())


def interleaved_seconds(
    fns: dict[str, Callable[[], object]],
    repeats: int = 21,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Return the wall-clock seconds of each call, by the name of the function.

    The functions are called in turn, so that changes in the machine's speed affect all functions
    equally. With CUDA, each call waits for the GPU before and after.

    Args:
        fns: the functions, by name.
        repeats: number of measured calls of each function.
        warmup: number of calls of each function before these, which are not measured.

    Examples:
        >>> import torch
        >>> from mmfused.testing import interleaved_seconds
        >>> a = torch.randn(64, 64)
        >>> samples = interleaved_seconds({"product": lambda: a @ a, "sum": a.sum}, repeats=5)
        >>> {name: len(seconds) for name, seconds in samples.items()}
        {'product': 5, 'sum': 5}
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
    """Return the median of :func:`interleaved_seconds` for each function, in seconds.

    Args:
        fns: the functions, by name.
        repeats: number of measured calls of each function.
        warmup: number of calls of each function before these, which are not measured.

    Examples:
        >>> import torch
        >>> from mmfused.testing import interleaved_medians
        >>> small, large = torch.randn(16, 16), torch.randn(512, 512)
        >>> medians = interleaved_medians(
        ...     {"small": lambda: small @ small, "large": lambda: large @ large}
        ... )
        >>> medians["small"] < medians["large"]
        True
    """
    return {
        name: statistics.median(values)
        for name, values in interleaved_seconds(fns, repeats, warmup).items()
    }


def dropout_mask(
    seed: Tensor,
    shape: tuple[int, ...],
    p: float,
    stream: int = 0,
) -> Tensor:
    """Return the dropout mask that the operators use with ``dropout_seed=seed``; True means keep.

    The mask is the same on every backend.

    Args:
        seed: the seed, a () int64 tensor.
        shape: (B, num_heads, L, N) for the probabilities of query pooling; for gated
            cross-attention, (B, num_heads, N, M) for the probabilities and (B, N, D) for the
            output of the attention.
        p: probability of dropout.
        stream: 0 for query pooling. For gated cross-attention, 0 for the probabilities and 1 for
            the output of the attention; in the second direction of
            :func:`mmfused.bidirectional_gated_cross_attention`, 2 and 3.

    Returns:
        A bool tensor of this shape, on the device of the seed.

    Examples:
        >>> import torch, mmfused
        >>> from mmfused.testing import dropout_mask
        >>> x, w, seed = torch.eye(10)[None], torch.eye(10), torch.tensor(7)
        >>> keep = dropout_mask(seed, (1, 1, 3, 10), p=0.5)
        >>> # Queries of zeros give each token the same probability, and token i has value 1 in i.
        >>> pooled = mmfused.query_pooling(
        ...     x, torch.zeros(3, 10), w, w, dropout_p=0.5, dropout_seed=seed
        ... )
        >>> torch.equal(pooled != 0, keep[:, 0])
        True
    """
    return _keep_mask(seed, shape, p, stream)
