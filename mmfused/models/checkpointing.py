"""Gradient checkpointing: the backward pass computes the transformers' activations again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from mmfused.models.encoders import import_timm, transformers_of

Model = TypeVar("Model", bound=nn.Module)


def checkpoint_layers(model: Model) -> Model:
    """Checkpoint every layer of the model's transformers, in place.

    In training, a layer of the host or of an encoder then keeps only its input, and the backward
    pass runs the layer again, with the same dropout. The gradients do not change.

    Args:
        model: one of the five models.

    Returns:
        The model.

    Raises:
        ValueError: an encoder is of a type that transformers cannot checkpoint.

    Examples:
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.models.checkpointing import checkpoint_layers
        >>> model = checkpoint_layers(UniECS(UniECSConfig.preset("tiny", vocab_size=100)))
        >>> model.image_encoder.grad_checkpointing
        True
    """
    for name, transformer in transformers_of(model).items():
        if hasattr(transformer, "set_grad_checkpointing"):
            # Reentrant checkpoints would lose the gradients of adapters in frozen blocks.
            import_timm().layers.set_reentrant_ckpt(False)
            transformer.set_grad_checkpointing()
        else:
            _checkpoint_of_transformers(name, transformer)
        # In evaluation mode, transformers does not checkpoint a layer. A frozen encoder gives the
        # mode to its checkpointed layers.
        for module in transformer.modules():
            if "train" in module.__dict__:
                module.train(model.training)
    return model


def _checkpoint_of_transformers(name: str, transformer: Any) -> None:
    if not transformer.supports_gradient_checkpointing:
        model_type = transformer.config.model_type
        raise ValueError(
            f"grad_checkpointing: got a {name} of type {model_type!r}, "
            "expected a type that transformers can checkpoint"
        )
    # The name since transformers 5.24, and the name before.
    methods = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(method for method in methods if hasattr(transformer, method))
    getattr(transformer, enable)({"use_reentrant": False})
    # Only reentrant checkpoints need inputs with gradients; here they would cost a backward pass
    # through a frozen encoder.
    transformer.disable_input_require_grads()
