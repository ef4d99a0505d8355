"""What :func:`mmfused.fuse` knows: a class for each kind of module, registered by the full name of the class it stands in for."""

from . import experts, losses, pooling
from .base import KINDS

__all__ = ["KINDS", "experts", "losses", "pooling"]
