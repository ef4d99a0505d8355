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
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .library import autocast_dtype, no_autocast

# Forward pre-hooks of torch that do nothing but set the weight from other parameters.
_WEIGHT_SETTERS = (BasePruningMethod, SpectralNorm, WeightNorm)
_LORA = "peft.tuners.lora.layer.Linear"


class Called:
    """A child to be called, in place of its weight; ``why`` says what requires the call."""

    def __init__(
        self,
        child: nn.Module,
        name: str,
        why: str,
        width: int | None,
        autocast: torch.dtype | None,
    ):
        self.child, self.name, self.why = child, name, why
        self.width, self.autocast = width, autocast

    def __call__(self, x: Tensor) -> Tensor:
        """As it is called in place of a weight: under the autocast of the module's own call."""
        weight = self.child._parameters.get("weight")
        if (
            type(self.child).forward in (nn.Linear.forward, nn.LayerNorm.forward)
            and weight is not None
        ):
            if weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
                x = x.float()  # served as where the weight is read
        context = (
            nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)
        )
        with context:
            out = self.child(x)
        shape = out.shape if isinstance(out, Tensor) else None
        if shape is None or shape[:-1] != x.shape[:-1] or self.width not in (None, shape[-1]):
            got = type(out).__name__ if shape is None else tuple(shape)
            takes = (*x.shape[:-1], "any" if self.width is None else self.width)
            raise ValueError(f"{self.name} gave {got}; it takes {takes}.")
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
    width: int | None,
    device_type: str,
    kind: type = nn.Linear,
) -> tuple[Tensor | Called, Tensor | None]:
    """Weight and bias of a child that gives ``width`` features, or (:class:`Called`, None).

    ``name``, with its module, is for errors. Raises ``TypeError`` where the child is None, and
    where its parameters are shards that no call of it gathers."""
    if child is None:
        raise TypeError(f"{name}: got None, expected a module")
    why = why_called(child, kind)
    if why is None:
        return weights_of(child)
    if _holds_shards(child):
        raise TypeError(
            f"{name} holds a shard, its weight a DTensor; it takes a whole one: use fully_shard on it "
            "or on the module, and leave both out of a tensor-parallel plan."
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
    weight, bias = read(child, name, width, device_type, nn.LayerNorm)
    if isinstance(weight, Called):
        return weight
    if child.eps != eps:
        why = f"has eps {child.eps}, not {eps},"
        return Called(child, name, why, width, autocast_dtype(device_type))
    return weight, torch.zeros_like(weight) if bias is None else bias


def why_called(child: nn.Module, kind: type = nn.Linear) -> str | None:
    """Why a child in the place of a Linear (or LayerNorm) must be called; None: its weights are
    all.

    Only looks, so that it may be repeated: spectral norms change state whenever a weight is formed.
    """
    why = attached(child, _WEIGHT_SETTERS)
    if why is not None:
        return why
    cls = type(child)
    path = f"{cls.__module__}.{cls.__qualname__}"
    if path == _LORA:
        return _why_lora_called(child)
    if cls.forward is not kind.forward or cls.__call__ is not nn.Module.__call__:
        return f"is a {path}"
    if kind is nn.LayerNorm:
        none = not child.elementwise_affine or child._parameters.get("weight", child) is None
        if none or len(child.normalized_shape) != 1:
            return "is no LayerNorm over features with a weight"
    # Parametrizations are modules inside; without them the walk of parameters() is spared.
    for parameter in child.parameters() if child._modules else child._parameters.values():
        if not dense(parameter):
            return f"has a {type(parameter).__name__} as parameter"
        if parameter is not None and not parameter.is_floating_point():
            return f"has {parameter.dtype} weights"
    return None


def attached(module: nn.Module, setters: tuple[type, ...] = ()) -> str | None:
    """What is on a module that acts only when it is called; pre-hooks of the types ``setters``
    aside.
    """
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
    if (
        not known
        or layer.fan_in_fan_out
        or any(n in layer.lora_variant or layer.lora_bias[n] for n in active)
    ):
        return "has an adapter of another kind than plain LoRA"
    if not all(_does_nothing(layer.lora_dropout[name]) for name in active):
        return "has a LoRA adapter with dropout"
    parts = (
        layer.base_layer,
        *(part[name] for part in (layer.lora_A, layer.lora_B) for name in active),
    )
    inside = next((why for why in map(why_called, parts) if why is not None), None)
    return inside and f"has an adapter, inside which something {inside}"


def _does_nothing(dropout: nn.Module) -> bool:
    idle = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
    return idle and attached(dropout) is None


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
    return all(
        t is None or (type(t).__name__ in plain and t.layout is torch.strided and not t.is_nested)
        for t in tensors
    )


def _holds_shards(module: nn.Module) -> bool:
    """DTensors that stay so in a call: fully_shard, and some parametrizations, make theirs whole."""
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__) or is_parametrized(module):
        return False
    own = any(type(parameter).__name__ == "DTensor" for parameter in module._parameters.values())
    return own or any(_holds_shards(child) for child in module.children())
