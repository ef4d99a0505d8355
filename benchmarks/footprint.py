"""Measure the memory of a provider, and count its kernels."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mmfused.testing import saved_bytes

from .measure import Problem, Provider


def footprint(provider: Provider, problem: Problem) -> dict[str, int | None]:
    """Measure the memory of one forward and backward, and count their kernels.

    "peak_bytes": peak memory above what was allocated before the call.
    "saved_bytes": memory saved for the backward.
    "kernels": number of CUDA kernels of both passes.
    "forward_kernels": number of CUDA kernels of the forward.

    Without CUDA, only "saved_bytes" is measured; the other values are None.
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
    return {
        "peak_bytes": peak,
        "saved_bytes": saved,
        "kernels": kernel_count(lambda: provider.both(inputs, problem.upstream)),
        "forward_kernels": kernel_count(lambda: provider(*inputs)),
    }


def kernel_count(call: Callable) -> int | None:
    """Return the number of CUDA kernels of one call, or None if the profiler records no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events) or None
