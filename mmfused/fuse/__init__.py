"""``fuse(model)`` makes known modules of other libraries run on this library's ops, in place."""

# Each of these modules registers the classes that it can swap.
from . import attention, experts, losses, pooling, q_former
from .api import fuse, unfuse
from .experts import register_experts
from .report import FuseReport

__all__ = [
    "FuseReport",
    "attention",
    "experts",
    "fuse",
    "losses",
    "pooling",
    "q_former",
    "register_experts",
    "unfuse",
]
