"""The Triton kernels of masked InfoNCE and their launchers.

Shapes: B queries, C candidates, D elements of an embedding. S are the logits (B, C). Kernels that
run for both sides call the sides x and y; X and Y are their numbers of rows.
"""

from .forward import sweep
from .gradients import sweep_backward
from .plans import plan

__all__ = ["plan", "sweep", "sweep_backward"]
