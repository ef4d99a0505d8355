"""Model architectures built on the library's ops, one self-contained file each."""

from .fluid import FLUID, FLUIDConfig, FLUIDOutput

__all__ = ["FLUID", "FLUIDConfig", "FLUIDOutput"]
