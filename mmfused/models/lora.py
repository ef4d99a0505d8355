"""LoRA (arXiv 2106.09685) in the transformers of a model, through the package peft.

    y = W x + alpha / rank * B A dropout(x)

W is frozen; A (rank, in) is random and B (out, rank) starts at 0. The adapters' folders are in
adapters.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mmfused.extras import from_extra
from mmfused.models.encoders import freeze, transformers_of
from mmfused.models.fields import Options, check_fields, shown
from mmfused.ops.grouped_mlp import TopKMoE

Model = TypeVar("Model", bound=nn.Module)

FIELDS: dict[str, object] = {
    "rank": int,
    "alpha": float | None,
    "dropout": float,
    "targets": list[str] | None,
}
ADAPTER = "default"  # peft's name of the only adapter


def check_lora(options: Options) -> None:
    """Check the options of :func:`add_lora`, of which any may be missing."""
    check_fields("lora", options, FIELDS)
    alpha, dropout = options.get("alpha"), options.get("dropout", 0.0)
    if alpha is not None and not alpha > 0:
        raise ValueError(f"lora.alpha: got {alpha}, expected a number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora.dropout: got {dropout}, expected a number from 0 to below 1")
    if options.get("targets") == []:
        raise ValueError("lora.targets: got no names, expected names of Linear layers")


def resolve_lora(options: Options, config: Any) -> dict[str, Any]:
    """Return all options of :func:`add_lora` for a model with this config, for its settings."""
    check_lora(options)
    in_stage_2 = getattr(config, "stage", 1) == 2  # UNITE's
    defaults = {"rank": 8, "alpha": 64 if in_stage_2 else 16, "dropout": 0.05, "targets": None}
    given = {name: value for name, value in options.items() if value is not None}
    return {**defaults, **given}


def lora_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the options of the model's adapters, or None if it has none."""
    return model.__dict__.get("lora")


def add_lora(
    model: Model,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
) -> Model:
    """Add LoRA to Linear layers of the model's transformers, in place, and freeze all else in them.

    The transformers are the host, with its vision tower, or the encoders. Trained are the adapters
    and what was trained outside the transformers: heads, fusion, and MOON2.0's mixtures, although
    they lie in the host. ``model.train()`` also reaches the adapters in a part that the config
    freezes. This function needs the package peft.

    Args:
        model: one of the five models.
        rank: rank of the adapters.
        alpha: scale of the adapters, times ``rank``; None takes 16, or 64 for UNITE in stage 2.
        dropout: dropout rate of the adapters' inputs, from 0 to below 1.
        targets: last parts of the names of the Linear layers, such as "q_proj", in any of the
            transformers. None takes all of the host's language model, or of the encoders that the
            config does not freeze.

    Returns:
        The model.

    Raises:
        ImportError: peft is not installed.
        ValueError: an option is invalid, no layer has one of the names, or the model has adapters.

    Examples:
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.models.lora import add_lora
        >>> model = UniECS(UniECSConfig.preset("tiny", vocab_size=100, freeze=("image",)))
        >>> model = add_lora(model, rank=4, targets=["query", "value"])
        >>> encoder = model.text_encoder.named_parameters()
        >>> all("lora" in name for name, parameter in encoder if parameter.requires_grad)
        True
    """
    given = {"rank": rank, "alpha": alpha, "dropout": dropout}
    given["targets"] = None if targets is None else list(targets)
    options = resolve_lora(given, getattr(model, "config", None))
    root = root_of(model)
    if adapted_layers(root):
        raise ValueError("model: got a model with adapters, expected one without")
    names = _target_names(model, options["targets"])
    mixtures = [part for part in root.modules() if isinstance(part, TopKMoE)]
    kept = {id(parameter) for mixture in mixtures for parameter in mixture.parameters()}
    with from_extra("lora"):
        import peft
    settings = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=_shortest(root, names),
        bias="none",
    )
    for transformer in transformers_of(model).values():
        for parameter in transformer.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
        for part in transformer.modules():
            if isinstance(part, nn.BatchNorm2d):  # of a ConvStem; its statistics stay too
                freeze(part)
            elif hasattr(part, "qkv_bias_separate"):  # or timm's Eva would read qkv.weight itself
                part.qkv_bias_separate = True
    inject(root, settings)
    for layer in adapted_layers(root).values():
        layer.training = layer.get_base_layer().training
        for name, part in layer.named_children():
            if name != "base_layer":
                part.train(model.training)
    model.__dict__["lora"] = options  # for `lora_of`
    return model


def merge_lora(model: Model) -> Model:
    """Add each adapter to the weight of its layer with peft's merge, and remove the adapters.

    The state dict then has the names of a model without LoRA. What is frozen stays frozen.

    Args:
        model: one of the five models, in place; without adapters, nothing changes.

    Returns:
        The model.

    Examples:
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.models.lora import add_lora, merge_lora
        >>> model = UniECS(UniECSConfig.preset("tiny", vocab_size=100))
        >>> names = list(model.state_dict())
        >>> list(merge_lora(add_lora(model)).state_dict()) == names
        True
    """
    root = root_of(model)
    for name, layer in adapted_layers(root).items():
        with torch.no_grad():
            layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(root.get_submodule(parent), last, layer.get_base_layer())
    root.__dict__.pop("peft_config", None)
    model.__dict__.pop("lora", None)
    return model


def root_of(model: nn.Module) -> Any:
    """Return the module to whose names an adapter folder refers: the host, or the model itself."""
    return getattr(model, "host", model)


def adapted_layers(root: nn.Module) -> dict[str, Any]:
    """Return peft's layers in ``root`` by name."""
    return {
        name: layer
        for name, layer in root.named_modules()
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    }


def inject(root: nn.Module, settings: Any) -> None:
    """Let peft add adapters to ``root``, but leave all else as trainable as it was."""
    with from_extra("lora"):
        import peft
    before = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    peft.inject_adapter_in_model(settings, root)
    for parameter, trained in before:
        parameter.requires_grad_(trained)


def linear_names(root: nn.Module) -> list[str]:
    """Return the names of the Linear layers of ``root``, without the routers of mixtures."""
    modules = dict(root.named_modules())
    mixtures = tuple(f"{name}." for name, part in modules.items() if isinstance(part, TopKMoE))
    return [
        name
        for name, part in modules.items()
        if isinstance(part, nn.Linear) and not name.startswith(mixtures)
    ]


def _target_names(model: Any, targets: list[str] | None) -> list[str]:
    """Return the names, in the model's root, of the layers that get an adapter."""
    hosted = hasattr(model, "host")
    parts = () if hosted else tuple(f"{name}." for name in transformers_of(model))
    names = [name for name in linear_names(root_of(model)) if hosted or name.startswith(parts)]
    if targets is not None:
        known = sorted({_last(name) for name in names})
        for target in targets:
            if target not in known:
                expected = f"some of {', '.join(known) or '(no Linear layers)'}"
                raise ValueError(f"lora.targets: got {shown(target)}, expected {expected}")
        return [name for name in names if _last(name) in targets]
    if hosted:
        return [name for name in names if name.startswith("language_model.")]
    frozen = tuple(f"{part}_encoder." for part in getattr(model.config, "freeze", ()))
    found = [name for name in names if not name.startswith(frozen)]
    if not found:
        expected = "targets, or a model with an encoder that is not frozen"
        raise ValueError(f"lora.targets: got None, expected {expected}")
    return found


def _shortest(root: nn.Module, names: list[str]) -> list[str]:
    """Return the last parts of ``names`` if peft finds the same modules by them, else ``names``."""
    last_parts = {_last(name) for name in names}
    found = {name for name, _ in root.named_modules() if _last(name) in last_parts}
    return sorted(last_parts) if found == set(names) else names


def _last(name: str) -> str:
    return name.rpartition(".")[2]
