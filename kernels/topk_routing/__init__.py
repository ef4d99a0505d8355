"""Launchers of top-k routing. For the equations see mmfused/ops/topk_routing/reference.py.

Shapes: T tokens, D columns of x, E experts, K (or k) slots per token, S segments, G blocks of BR
tokens.
"""

from .backward import backward
from .forward import forward
from .order import order
from .router_gradients import input_backward

__all__ = ["backward", "forward", "input_backward", "order"]
