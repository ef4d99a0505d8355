"""The Triton kernels of query pooling and their launchers."""

from .backward import backward
from .forward import forward
from .plans import plan

__all__ = ["backward", "forward", "plan"]
