"""Launchers of the experts. For the equations see mmfused/ops/grouped_mlp/reference.py."""

from .backward import linear_backward, mlp_backward
from .forward import linear_forward, mlp_forward

__all__ = ["linear_backward", "linear_forward", "mlp_backward", "mlp_forward"]
