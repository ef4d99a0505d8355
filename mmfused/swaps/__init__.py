"""What :func:`mmfused.fuse` knows: a class for each kind of module, registered by the full name of the class it stands in for."""

from . import attention, experts, losses, pooling
from .base import KINDS, LEFT

__all__ = ["KINDS", "LEFT", "attention", "experts", "losses", "pooling"]
