"""Model architectures built on the library's ops.

    fluid.py     FLUID: classification
    uniecs.py    UniECS: retrieval; its losses in uniecs_losses.py
    unica.py     UniCA: retrieval
    moon2.py     MOON2.0: retrieval; its objectives in moon2_losses.py
    unite.py     UNITE: retrieval

Each file contains the configuration, the modules and the model, in this order. The models share:

    config.py, fields.py        base of the configurations; validation of field values
    presets.py                  sizes of the presets
    inputs.py                   input validation; encoding of pixels and ids
    encoders.py, pretrained.py  ViT and text encoders, from a config or from pretrained weights
    retrieval.py                base of the retrieval models
    qwen*.py                    Qwen2-VL, the backbone ("host") of UNITE and MOON2.0
    weights.py                  reading of pretrained safetensors
    lora.py, adapters.py        LoRA in the transformers of a model; adapter folders
    checkpointing.py            gradient checkpointing

docs/models.md gives the source of each equation: the paper, public code, or this library.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .config import ModelConfig
from .fluid import FLUID, FLUIDConfig, FLUIDOutput
from .moon2 import MOON2, MOON2Config
from .retrieval import RetrievalModel, RetrievalOutput
from .unica import UniCA, UniCAConfig
from .uniecs import UniECS, UniECSConfig
from .unite import UNITE, UNITEConfig
from .unite_inputs import UNITEProcessor


class Kind(NamedTuple):
    """A model that `mmfused train --model NAME` can train, its configuration and its task.

    Examples:
        >>> from mmfused.models import MODELS
        >>> list(MODELS)
        ['fluid', 'uniecs', 'unica', 'moon2', 'unite']
        >>> kind = MODELS["fluid"]
        >>> model = kind.model(kind.config.preset("tiny", num_classes=5, image=None, text=None))
        >>> type(model).__name__, kind.task
        ('FLUID', 'classification')
    """

    model: Any  # the class, whose constructor takes a config
    config: type[ModelConfig]
    task: Literal["classification", "retrieval"]


MODELS: dict[str, Kind] = {
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
    "Kind",
    "MODELS",
    "MOON2",
    "MOON2Config",
    "ModelConfig",
    "RetrievalModel",
    "RetrievalOutput",
    "UNITE",
    "UNITEConfig",
    "UNITEProcessor",
    "UniCA",
    "UniCAConfig",
    "UniECS",
    "UniECSConfig",
]
