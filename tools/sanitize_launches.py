"""Launch every kernel of an op, or a kernel with a fault, for ``tools/sanitize.py``.

``launches()`` in tests/<op>_launches.py yields calls that together launch every kernel of the op,
forward and backward. The sizes are small and fill no tile, so that every mask is needed. The
options cover each kernel and the branches inside kernels. The dtype is bfloat16, and also float32
if there are kernels only for float32. On a CPU, which needs ``TRITON_INTERPRET=1``, float16
replaces bfloat16.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

import mmfused
from mmfused.benchmarks.sources import ROOT
from mmfused.kernels.recording import launches_made
from mmfused.library import KERNELS_ON_CPU
from mmfused.ops import OPS

CONTROL = "control"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
FLOAT = torch.float32


def file_of(op: str) -> Path:
    """Return the file with the launches of an op."""
    return Path(__file__) if op == CONTROL else ROOT / "tests" / f"{op}_launches.py"


def launches_of(op: str) -> Iterator[Callable[[], None]]:
    if op == CONTROL:
        return control()
    if op not in OPS:
        raise ValueError(f"launch: got {op!r}, expected one of {', '.join((*OPS, CONTROL))}")
    folder = str(file_of(op).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(file_of(op).stem).launches()


def launch(op: str) -> Counter:
    """Make all calls of ``op``; return the number of launches of each "module.kernel"."""
    if DEVICE == "cpu" and not KERNELS_ON_CPU:
        raise ValueError(
            "--launch needs a CUDA GPU, or TRITON_INTERPRET=1 to run the kernels on a CPU"
        )
    calls = launches_of(op)
    torch.manual_seed(0)
    with launches_made() as launches, mmfused.backend("fused"):
        for call in calls:
            call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return Counter(
        f"{launch.kernel.fn.__module__.removeprefix('mmfused.kernels.')}.{launch.name}"
        for launch in launches
    )


def randn(*shape: int, dtype: torch.dtype = HALF, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * std).to(dtype).requires_grad_()


def choose(chance: float, *shape: int) -> Tensor:
    return torch.rand(*shape, device=DEVICE) < chance


def integers(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, device=DEVICE)


def seed() -> Tensor:
    return torch.tensor(1234567890123, device=DEVICE)


def backward(outs: Tensor | tuple[Tensor, ...], *leaves: Tensor | None) -> None:
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    torch.autograd.grad(outs, wanted, [torch.randn_like(out) for out in outs])


# ---- a kernel with a fault -----------------------------------------------------------------------


@triton.jit
def control_kernel(ptr):
    tl.store(ptr + tl.arange(0, 32), 1.0)


def control() -> Iterator[Callable[[], None]]:
    """Yield a call that writes past the end of a buffer, which compute-sanitizer must report.

    Triton's interpreter would corrupt the memory of this process, so the call needs a GPU.
    """
    if DEVICE != "cuda":
        raise ValueError("--launch control needs a CUDA GPU: it writes past the end of a buffer")
    yield lambda: control_kernel[(1,)](torch.empty(1, device=DEVICE), num_warps=1)
