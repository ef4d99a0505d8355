"""The Triton kernels of masked InfoNCE and their launchers."""

from .forward import sweep
from .gradients import sweep_backward
from .plans import plan

__all__ = ["plan", "sweep", "sweep_backward"]
