"""Children of fused modules: their weights where these give what a call would give, else the call.

The ops compute with the weights of ``nn.Linear`` and ``nn.LayerNorm`` children; whatever else users
attach to a child acts only when it is called. Pruning and the weight and spectral norms of
``torch.nn.utils`` change the weight and nothing else, and so does LoRA of peft (without dropout):
their effective weight is formed, with its gradients, and every backend computes with it. Any other
child is called: it has hooks or a forward of its own (other adapters, offloading, sharding on
demand), is of another class (quantised), or its weight is a tensor subclass.

Hooks on all modules (``register_module_forward_hook``) run for the module itself, and for the
children that it calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .library import autocast_dtype, no_autocast

# Forward pre-hooks of torch that do nothing but set the weight from other parameters.
_WEIGHT_SETTERS = (BasePruningMethod, SpectralNorm, WeightNorm)
_LORA = "peft.tuners.lora.layer.Linear"


class Called:
    """A child to be called, in place of its weight; ``why`` says what requires the call."""

    def __init__(self, child: nn.Module, name: str, why: str, width: int, autocast: torch.dtype | None):
        self.child, self.name, self.why = child, name, why
        self.width, self.autocast = width, autocast

    def __call__(self, x: Tensor) -> Tensor:
        """In the dtype of its weight, under the autocast that the module itself was called under."""
        weight = getattr(self.child, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x = x.to(weight.dtype)  # weights in float32 serve 16-bit tokens; autocast leaves norms alone
        context = nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)
        with context:
            out = self.child(x)
        if not isinstance(out, Tensor) or out.shape != (*x.shape[:-1], self.width):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name} gave {got}; it takes {(*x.shape[:-1], self.width)}.")
        return out


def no_weights(parts: Iterable[object]) -> list[str]:
    """The reason against a kernel that takes weights, of those of ``parts`` that must be called."""
    first, *others = [part for part in parts if isinstance(part, Called)] or [None]
    if first is None:
        return []
    more = f", like {len(others)} more" if others else ""
    way_out = "undo that (merge an adapter), or use backend 'auto' or 'composed'"
    return [f"{first.name} {first.why} and must be called{more}: {way_out}"]


def linear(x: Tensor, weight: Tensor | Called, bias: Tensor | None) -> Tensor:
    """``F.linear``, or the call that stands in place of the weight; in the dtype of ``x``."""
    if isinstance(weight, Called):
        return weight(x).to(x.dtype)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def layer_norm(x: Tensor, norm: tuple[Tensor, Tensor] | Called, eps: float) -> Tensor:
    """``F.layer_norm`` over the features, or the call that stands in place of its weights."""
    if isinstance(norm, Called):
        return norm(x).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], *(part.to(x.dtype) for part in norm), eps)


def read(
    child: nn.Module,
    name: str,
    width: int,
    device_type: str,
) -> tuple[Tensor | Called, Tensor | None]:
    """Weight and bias of a child that gives ``width`` features, or (:class:`Called`, None).

    ``name``, with its module, is for errors. Raises ``TypeError`` where a tensor-parallel plan has
    sharded the child: it gives a part of the features, or takes one.
    """
    why = why_called(child)
    if why is None:
        return weights_of(child)
    if _tensor_parallel(child):
        raise TypeError(
            f"{name} is sharded over ranks, its weight a DTensor; it takes a whole one: leave it out "
            "of the tensor-parallel plan, or shard the module with fully_shard."
        )
    return Called(child, name, why, width, autocast_dtype(device_type)), None


def read_norm(
    child: nn.Module | None,
    name: str,
    width: int,
    device_type: str,
    eps: float,
) -> tuple[Tensor, Tensor] | Called | None:
    """Weight and bias of a LayerNorm of this ``eps``, zeros where it has none, or what to call."""
    if child is None:
        return None
    weight, bias = read(child, name, width, device_type)
    if isinstance(weight, Called):
        return weight
    if child.eps != eps:
        why = f"has eps {child.eps}, not {eps},"
        return Called(child, name, why, width, autocast_dtype(device_type))
    return weight, torch.zeros_like(weight) if bias is None else bias


def why_called(child: nn.Module) -> str | None:
    """What is on a Linear or LayerNorm so that it must be called; None: its weights are all of it.

    Only looks, so that it may be repeated: spectral norms change state whenever a weight is formed.
    """
    why = attached(child, _WEIGHT_SETTERS)
    if why is not None:
        return why
    cls = type(child)
    if cls.forward is nn.LayerNorm.forward:
        none = not child.elementwise_affine or child._parameters.get("weight", child) is None
        if none or len(child.normalized_shape) != 1:
            return "is no LayerNorm over features with a weight"
    elif cls.forward is not nn.Linear.forward:
        path = f"{cls.__module__}.{cls.__qualname__}"
        return _why_lora_called(child) if path == _LORA else f"is a {path}"
    # Parametrizations are modules inside; without them the walk of parameters() is spared.
    for parameter in child.parameters() if child._modules else child._parameters.values():
        if not dense(parameter):
            return f"has a {type(parameter).__name__} as parameter"
        if parameter is not None and not parameter.is_floating_point():
            return f"has {parameter.dtype} weights"
    return None


def attached(module: nn.Module, setters: tuple[type, ...] = ()) -> str | None:
    """What is on a module that acts only when it is called; pre-hooks of the types ``setters`` aside."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    before = module._forward_pre_hooks
    if before:
        before = [hook for hook in before.values() if not isinstance(hook, setters)]
    if before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return None


def weights_of(child: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Effective weight and bias of a child that need not be called."""
    if type(child).forward is not nn.Linear.forward and hasattr(child, "lora_A"):
        weight, bias = weights_of(child.base_layer)
        with no_autocast(weight.device.type):
            for name in _active(child):
                a, b = (weights_of(part[name])[0] for part in (child.lora_A, child.lora_B))
                weight = weight + child.scaling[name] * (b @ a)
        return weight, bias
    for hook in child._forward_pre_hooks.values():
        hook(child, None)
    return child.weight, child.bias


def _why_lora_called(layer: nn.Module) -> str | None:
    if layer.disable_adapters and layer.merged:
        return "has a merged adapter that is disabled"
    active = _active(layer)
    known = all(hasattr(layer, part) for part in ("lora_variant", "lora_bias", "fan_in_fan_out"))
    if not known or layer.fan_in_fan_out or any(n in layer.lora_variant or layer.lora_bias[n] for n in active):
        return "has an adapter of another kind than plain LoRA"
    if layer.training and any(type(layer.lora_dropout[name]) is not nn.Identity for name in active):
        return "has a LoRA adapter with dropout"
    parts = (layer.base_layer, *(part[name] for part in (layer.lora_A, layer.lora_B) for name in active))
    inside = next((why for why in map(why_called, parts) if why is not None), None)
    return inside and f"has an adapter, inside which something {inside}"


def _active(layer: nn.Module) -> list[str]:
    """The adapters that a peft layer adds in its forward."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def reset_children(module: nn.Module) -> None:
    """``reset_parameters`` of all modules inside that have it."""
    for child in module.children():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
        else:
            reset_children(child)


def dense(*tensors: Tensor | None) -> bool:
    """Whether all are plain: neither nested nor sparse nor a subclass (DTensor, quantised) that
    computes in its own way."""
    plain = ("Tensor", "Parameter", "FakeTensor")
    return all(t is None or (type(t).__name__ in plain and t.layout is torch.strided and not t.is_nested) for t in tensors)


def _tensor_parallel(child: nn.Module) -> bool:
    """fully_shard's parameters are DTensors too, but whole while the child runs."""
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in child.parameters())
    return sharded and not any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__)
