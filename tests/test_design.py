"""Tests that docs/design.md names the calls from each module to its first kernel."""

import traceback
from pathlib import Path

import pytest
import torch
from triton import KernelInterface

import mmfused
from mmfused.benchmarks.sources import ROOT
from mmfused.library import KERNELS_ON_CPU

DESIGN = (ROOT / "docs" / "design.md").read_text()
CALLS = {
    "GatedCrossAttention": lambda x: mmfused.GatedCrossAttention(16, num_heads=2)(x, x),
    "QueryPooling": lambda x: mmfused.QueryPooling(16, 3)(x),
    "TopKMoE": lambda x: mmfused.TopKMoE(16, 32, 4, 2)(x),
    "MaskedInfoNCE": lambda x: mmfused.MaskedInfoNCE()(x[0], x[1]),
}


class Launched(Exception):
    """Raised instead of launching a kernel."""


def stack_of(call, monkeypatch):
    """Return (function, file) of each frame of this library at a module's first kernel launch."""
    stack = []

    def record(kernel, grid):
        for frame in traceback.extract_stack():
            path = Path(frame.filename).resolve()
            if path.is_relative_to(ROOT / "mmfused") or path.is_relative_to(ROOT / "kernels"):
                stack.append((frame.name, path.relative_to(ROOT).as_posix()))
        raise Launched

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    with pytest.raises(Launched), mmfused.backend("fused"):
        call(torch.randn(2, 7, 16))
    return stack


@pytest.mark.skipif(not KERNELS_ON_CPU, reason="needs kernels that run on a CPU")
@pytest.mark.parametrize("module", CALLS)
def test_module_reaches_its_first_kernel_in_at_most_six_calls_and_four_files(module, monkeypatch):
    stack = stack_of(CALLS[module], monkeypatch)
    functions = [name for name, _ in stack]
    assert functions[0] == "forward"
    assert len(functions) <= 6, stack  # forward and five calls; the launch is the sixth call
    assert len({path for _, path in stack}) <= 4, stack
    section = DESIGN[DESIGN.index("## From a module") : DESIGN.index("## From `mmfused train`")]
    for name, path in stack:
        assert name in section, name
        if path.startswith("kernels/"):
            assert path in section, path
