"""``fuse(model)``: known modules of other libraries run on the ops of this one, in place."""

from . import attention, experts, losses, pooling  # each registers the classes that it can swap
from .api import FuseReport, fuse, unfuse
from .experts import register_experts

__all__ = [
    "FuseReport",
    "attention",
    "experts",
    "fuse",
    "losses",
    "pooling",
    "register_experts",
    "unfuse",
]
