"""The Triton kernels of query pooling and their launchers.

Shapes: B samples, N tokens per sample, D columns, R rows of queries per sample, W 64-bit words of a
padding mask per sample.
"""

from .backward import backward
from .forward import forward
from .plans import plan

__all__ = ["backward", "forward", "plan"]
