"""The Triton kernels of gated cross-attention.

forward.py and backward.py launch the kernels of the other files.
"""

from .backward import backward
from .forward import forward
from .plans import plan

__all__ = ["backward", "forward", "plan"]
