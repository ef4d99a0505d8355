"""Launchers of the experts. For the equations see mmfused/ops/grouped_mlp/reference.py.

Shapes: T tokens, R = T k rows sorted by expert, E experts. In rows_kernel and hidden_kernel, N is
the number of columns of the result, and K the number of terms of each sum. k is always the number
of experts per token.
"""

from .backward import linear_backward, mlp_backward
from .forward import linear_forward, mlp_forward

__all__ = ["linear_backward", "linear_forward", "mlp_backward", "mlp_forward"]
