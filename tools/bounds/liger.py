"""The launches of Liger's fused mixture of experts, whose Triton kernels torch cannot trace.

Source: github.com/linkedin/Liger-Kernel, ops/fused_moe.py and fused_moe_kernels.py (2026). Its
forward waits for the host once, which is not counted.
"""

from __future__ import annotations

from ...benchmarks.grouped_mlp import Case
from .work import Passes, Work

TOKENS_PER_TILE = 1024  # choices that one program of the routing kernels reads


def fused_moe(case: Case, itemsize: int = 2) -> Passes:
    """Return the launches for SwiGLU experts, where each operand of a product is read once."""
    rows, matrix = case.T * case.k, case.D * case.I
    x, wide, hidden = (n * itemsize for n in (case.T * case.D, rows * case.D, rows * case.I))
    w_down = case.E * matrix * itemsize
    index = 4 * rows  # an index or a weight for each row
    counts = 4 * case.E * max(1, rows // TOKENS_PER_TILE)
    forward = [
        Work("count choices by expert", 0, index + counts),
        Work("sum counts", 0, counts),
        Work("prefix sums", 0, 2 * counts),
        Work("sort rows", 0, index + counts + 3 * index),
        Work("up and SwiGLU", 4 * rows * matrix, x + index + 2 * w_down + 3 * hidden),
        Work("down", 2 * rows * matrix, hidden + w_down + wide),
        Work("weighted sum of rows", 0, wide + 2 * index + x),
    ]
    backward = [
        Work("zeros for gradients of weights", 0, index // 2),
        Work(
            "down and SwiGLU, gradients of hidden",
            2 * rows * matrix,
            x + 3 * index + w_down + 2 * hidden + 3 * hidden + index,
        ),
        Work("zeros for dW_down", 0, w_down),
        Work("dW_down", 2 * rows * matrix, hidden + x + index + w_down),
        Work("up, gradients of rows", 4 * rows * matrix, 2 * hidden + 2 * w_down + wide),
        Work("zeros for dx", 0, x),
        Work("sum of rows", 0, wide + index + x),
        Work("zeros for dW_up", 0, 2 * w_down),
        Work("dW_up", 4 * rows * matrix, x + index + 2 * hidden + 2 * w_down),
    ]
    return Passes(forward, backward)
