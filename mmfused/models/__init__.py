"""Model architectures built on the library's ops, one self-contained file each."""

from typing import NamedTuple

from .fluid import FLUID, FLUIDConfig, FLUIDOutput
from .moon2 import MOON2, MOON2Config
from .retrieval import RetrievalModel, RetrievalOutput
from .unica import UniCA, UniCAConfig
from .uniecs import UniECS, UniECSConfig
from .unite import UNITE, UNITEConfig


class Kind(NamedTuple):
    """What `mmfused train --model NAME` builds, and the task it is trained for."""

    model: type
    config: type
    task: str  # "classification" | "retrieval"


MODELS = {
    "fluid": Kind(FLUID, FLUIDConfig, "classification"),
    "uniecs": Kind(UniECS, UniECSConfig, "retrieval"),
    "unica": Kind(UniCA, UniCAConfig, "retrieval"),
    "moon2": Kind(MOON2, MOON2Config, "retrieval"),
    "unite": Kind(UNITE, UNITEConfig, "retrieval"),
}

__all__ = [
    "FLUID",
    "FLUIDConfig",
    "FLUIDOutput",
    "MODELS",
    "MOON2",
    "MOON2Config",
    "RetrievalModel",
    "RetrievalOutput",
    "UNITE",
    "UNITEConfig",
    "UniCA",
    "UniCAConfig",
    "UniECS",
    "UniECSConfig",
]
