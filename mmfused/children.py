"""Decide whether to use the weights of a child module or to call it.

The operators compute with the weights of the ``nn.Linear`` and ``nn.LayerNorm`` children of the
fused modules. But hooks, adapters and offloading that users attach to a child take effect only when
the child is called.

* Some attachments only change the weight: pruning, the weight and spectral norms of
  ``torch.nn.utils``, and peft's LoRA without dropout. In that case the effective weight is
  computed, with its gradients, and every backend uses it.
* In all other cases the child is called, and kernels that need its weight cannot run. Examples are
  children with hooks or a replaced ``forward`` (other adapters, offloading, ``fully_shard``),
  children of another class (quantised layers), and children whose weight is a tensor subclass.
* A weight that is a DTensor raises ``TypeError``, unless a call of the child gathers the weight.

Global hooks (``register_module_forward_hook``) run for the fused module and for called children.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .library import autocast_dtype, no_autocast

# Classes of torch's forward pre-hooks that only compute the weight from other parameters.
_WEIGHT_SETTERS = (BasePruningMethod, SpectralNorm, WeightNorm)
_LORA = "peft.tuners.lora.layer.Linear"


class Called:
    """A stand-in for the weight of a child that must be called.

    Args:
        child: the module.
        name: name of the child in error messages.
        why: the reason, as the end of a sentence that starts with ``name``.
        width: number of output features, None for any number.
        autocast: the dtype of autocast when the fused module was called, None without autocast.
    """

    def __init__(
        self,
        child: nn.Module,
        name: str,
        why: str,
        width: int | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.child = child
        self.name = name
        self.why = why
        self.width = width
        self.autocast = autocast

    def __call__(self, x: Tensor) -> Tensor:
        """Call the child under the autocast that was active for the fused module."""
        weight = self.child._parameters.get("weight")
        plain = type(self.child).forward in (nn.Linear.forward, nn.LayerNorm.forward)
        half = x.dtype in (torch.float16, torch.bfloat16)
        if plain and half and weight is not None and weight.dtype == torch.float32:
            x = x.float()  # like the operators, accept half-precision inputs with float32 weights
        context = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(x.device.type, self.autocast)
        with context:
            out = self.child(x)
        shape = out.shape if isinstance(out, Tensor) else None
        if shape is None or shape[:-1] != x.shape[:-1] or self.width not in (None, shape[-1]):
            got = f"a {type(out).__name__}" if shape is None else f"shape {tuple(shape)}"
            expected = (*x.shape[:-1], "any" if self.width is None else self.width)
            raise ValueError(f"{self.name}: got {got} as output, expected {expected}")
        return out


def why_no_weights(parts: Iterable[object]) -> list[str]:
    """Return why the kernels cannot run; an empty list unless one of ``parts`` is `Called`."""
    first, *others = [part for part in parts if isinstance(part, Called)] or [None]
    if first is None:
        return []
    more = f", as must {len(others)} more" if others else ""
    advice = "remove what is attached (merge adapters), or use backend 'auto' or 'composed'"
    return [f"{first.name} {first.why} and must be called{more}: {advice}"]


def linear(x: Tensor, weight: Tensor | Called, bias: Tensor | None) -> Tensor:
    """Return ``F.linear`` in the dtype of ``x``, or call the child."""
    if isinstance(weight, Called):
        return weight(x).to(x.dtype)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def layer_norm(x: Tensor, norm: Sequence[Tensor] | Called, eps: float) -> Tensor:
    """Return ``F.layer_norm`` over the last dimension in the dtype of ``x``, or call the child."""
    if isinstance(norm, Called):
        return norm(x).to(x.dtype)
    weight, bias = norm
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def read(
    child: nn.Module | None,
    name: str,
    width: int | None,
    device_type: str,
    kind: type[nn.Linear] | type[nn.LayerNorm] = nn.Linear,
) -> tuple[Tensor | Called, Tensor | None]:
    """Return the weight and bias of a child, or (:class:`Called`, None) if it must be called.

    Args:
        child: the module.
        name: name of the child in error messages.
        width: number of output features, None for any number.
        device_type: device type of the input, which determines the autocast dtype.
        kind: class of the original child, which users may have replaced.

    Raises:
        TypeError: the child is None, or its weight is a shard (DTensor) that a call of the child
            would not gather.
    """
    if child is None:
        raise TypeError(f"{name}: got None, expected a module")
    why = why_called(child, kind)
    if why is None:
        return weights_of(child)
    if _holds_shards(child):
        raise TypeError(
            f"{name}: got a shard (its weight is a DTensor), expected a complete weight: use "
            "fully_shard on it or on the module, and leave both out of a tensor-parallel plan"
        )
    return Called(child, name, why, width, autocast_dtype(device_type)), None


def read_norm(
    child: Any,
    name: str,
    width: int,
    device_type: str,
    eps: float,
) -> tuple[Tensor, Tensor] | Called | None:
    """Return the weight and bias of a LayerNorm, :class:`Called` if it must be called, or None.

    A LayerNorm with another ``eps`` must be called. A missing bias is replaced by zeros. Return
    None if ``child`` is None.
    """
    if child is None:
        return None
    weight, bias = read(child, name, width, device_type, nn.LayerNorm)
    if isinstance(weight, Called):
        return weight
    if child.eps != eps:
        why = f"has eps {child.eps}, not {eps},"
        return Called(child, name, why, width, autocast_dtype(device_type))
    return weight, torch.zeros_like(weight) if bias is None else bias


def why_called(
    child: nn.Module,
    kind: type[nn.Linear] | type[nn.LayerNorm] = nn.Linear,
) -> str | None:
    """Return why ``child``, expected to be a ``kind``, must be called; None if its weights suffice.

    This function has no side effects. (:func:`weights_of` updates the state of spectral norms.)
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
    if isinstance(child, nn.LayerNorm):
        no_weight = not child.elementwise_affine or child._parameters.get("weight", child) is None
        if no_weight or len(child.normalized_shape) != 1:
            return "has no weight, or normalises several dimensions,"
    # Without child modules such as parametrizations, `_parameters` is complete, and faster.
    for parameter in child.parameters() if child._modules else child._parameters.values():
        if not dense(parameter):
            return f"has a {type(parameter).__name__} as parameter"
        if parameter is not None and not parameter.is_floating_point():
            return f"has {parameter.dtype} weights"
    return None


def attached(module: nn.Module, setters: tuple[type, ...] = ()) -> str | None:
    """Return what is attached to a module and takes effect only in calls of the module, or None.

    Args:
        module: the module.
        setters: types of forward pre-hooks to ignore.
    """
    if "forward" in module.__dict__:
        return "has a replaced forward"
    pre_hooks = [h for h in module._forward_pre_hooks.values() if not isinstance(h, setters)]
    if pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return None


def weights_of(child: Any) -> tuple[Tensor, Tensor | None]:
    """Return the effective weight and bias of a child that need not be called."""
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


def _why_lora_called(layer: Any) -> str | None:
    if layer.disable_adapters and layer.merged:
        return "has a merged adapter that is disabled"
    active = _active(layer)
    names = ("lora_variant", "lora_bias", "fan_in_fan_out")
    if not all(hasattr(layer, name) for name in names) or layer.fan_in_fan_out:
        return "has an adapter other than plain LoRA"
    if any(name in layer.lora_variant or layer.lora_bias[name] for name in active):
        return "has an adapter other than plain LoRA"
    if not all(_does_nothing(layer.lora_dropout[name]) for name in active):
        return "has a LoRA adapter with dropout"
    adapters = (part[name] for part in (layer.lora_A, layer.lora_B) for name in active)
    parts = (layer.base_layer, *adapters)
    part_why = next((why for why in map(why_called, parts) if why is not None), None)
    return part_why and f"has an adapter, a part of which {part_why}"


def _does_nothing(dropout: nn.Module) -> bool:
    idle = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
    return idle and attached(dropout) is None


def _active(layer: Any) -> list[str]:
    """Return the names of the adapters that a peft layer adds in its forward."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def reset_children(module: nn.Module) -> None:
    """Call ``reset_parameters`` of each child that has it, and recurse into other children."""
    for child in module.children():
        reset: Any = getattr(child, "reset_parameters", None)
        if reset is not None:
            reset()
        else:
            reset_children(child)


def dense(*tensors: Tensor | None) -> bool:
    """Return whether all ``tensors`` are None or ordinary dense tensors.

    Nested and sparse tensors are not ordinary dense tensors, and neither are subclasses that
    redefine operations (DTensor, quantised tensors).
    """
    plain = ("Tensor", "Parameter", "FakeTensor")
    return all(
        t is None or (type(t).__name__ in plain and t.layout is torch.strided and not t.is_nested)
        for t in tensors
    )


def _holds_shards(module: nn.Module) -> bool:
    """Return whether parameters are DTensors that a call of the module would not gather.

    ``fully_shard`` and some parametrizations gather the parameters in a call.
    """
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__) or is_parametrized(module):
        return False
    if any(type(parameter).__name__ == "DTensor" for parameter in module._parameters.values()):
        return True
    return any(_holds_shards(child) for child in module.children())
