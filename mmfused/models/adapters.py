"""Folders of LoRA adapters in peft's layout: adapter_config.json and adapter_model.safetensors.

Names of layers in a folder refer to transformers' Qwen2VLModel, or to the whole of a model with
encoders. The names of Qwen2VLForConditionalGeneration, in both the old and the new layout of
transformers, are read too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mmfused.extras import from_extra
from mmfused.json_files import one_line, read_object
from mmfused.models.fields import check_field, refusing, shown
from mmfused.models.lora import ADAPTER, adapted_layers, inject, linear_names, merge_lora, root_of

Model = TypeVar("Model", bound=nn.Module)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The fields of adapter_config.json that change which weights are merged, and their kinds.
READ: dict[str, object] = {
    "r": int,
    "lora_alpha": float,
    "use_rslora": bool,
    "target_modules": list[str] | str,
    "exclude_modules": list[str] | str | None,
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": list[str] | str | None,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# Fields that have no effect on the merged weights.
IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
# The fields with one value that is read, and this value.
FIXED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
# The names in a folder for the names in Qwen2VLModel.
LAYOUTS: tuple[Callable[[str], str], ...] = (
    str,
    lambda name: f"model.{name}",  # in Qwen2VLForConditionalGeneration
    lambda name: re.sub(r"^language_model\.", "model.", name),  # in transformers up to 4.51
)
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight")


class Adapter(NamedTuple):
    """An adapter folder."""

    folder: Path
    settings: Any  # peft.LoraConfig
    weights: dict[str, Tensor]  # as in adapter_model.safetensors


def save_adapter(folder: str | Path, model: nn.Module) -> None:
    """Write the adapters of a model to a new folder.

    If the model has a host, ``peft.PeftModel.from_pretrained(host, folder)`` reads the folder, with
    the host as ``transformers.AutoModel`` loads it.

    Args:
        folder: the folder, which must not exist yet.
        model: one of the five models, with adapters.

    Raises:
        ValueError: the model has no adapters.

    Examples:
        >>> import os, tempfile
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.models.adapters import save_adapter
        >>> from mmfused.models.lora import add_lora
        >>> model = add_lora(UniECS(UniECSConfig.preset("tiny", vocab_size=100)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(f"{folder}/adapter", model)
        ...     print(sorted(os.listdir(f"{folder}/adapter")))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    with from_extra("models"):
        import safetensors.torch
    folder, root = Path(folder), root_of(model)
    layers = adapted_layers(root)
    if not layers:
        raise ValueError("model: got a model without adapters, expected the result of add_lora")
    settings = copy.copy(root.peft_config[ADAPTER])
    settings.inference_mode = True
    settings.target_modules = sorted(settings.target_modules)
    weights = {
        f"{PREFIX}{name}.lora_{part}.weight": pair[ADAPTER].weight.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part, pair in (("A", layer.lora_A), ("B", layer.lora_B))
    }
    folder.mkdir()
    settings.save_pretrained(folder)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights, {"format": "pt"}))


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder, ours or peft's, with plain LoRA (also rank-stabilised).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or adapter_config.json asks for more than plain LoRA.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file() and name == WEIGHTS
            hint = "; adapter_model.bin is a pickle, which is not read" if pickled else ""
            raise FileNotFoundError(f"adapter: {folder / name} is missing{hint}")
    settings = _read_settings(folder / CONFIG)
    with from_extra("models"):
        import safetensors.torch
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"adapter: {folder / WEIGHTS} is truncated, corrupt or not a safetensors file: "
            f"{one_line(error)}"
        ) from error
    return Adapter(folder, settings, weights)


def merge_adapter(model: Model, folder: str | Path | Adapter) -> Model:
    """Merge an adapter folder into the weights of a host or model, in place, as peft does.

    Args:
        model: a Qwen2-VL without head, a model with a host, or, for a folder that `mmfused train`
            has written, a model with encoders.
        folder: the folder, from `mmfused train` or from peft, or what `read_adapter` returned.

    Returns:
        The model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a key is missing, superfluous or of a wrong shape; nothing
            has then changed.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.models.adapters import merge_adapter, save_adapter
        >>> from mmfused.models.lora import add_lora
        >>> config = UniECSConfig.preset("tiny", vocab_size=100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(pathlib.Path(folder, "adapter"), add_lora(UniECS(config)))
        ...     model = merge_adapter(UniECS(config), f"{folder}/adapter")
    """
    adapter = folder if isinstance(folder, Adapter) else read_adapter(Path(folder))
    root = root_of(model)
    if adapted_layers(root):
        raise ValueError("adapter: got a model with adapters, expected one without")
    layers = _layers(root, adapter)
    with from_extra("lora"):
        import peft
    settings = peft.LoraConfig(
        target_modules=list(layers),
        rank_pattern={re.escape(name): len(layer.a) for name, layer in layers.items()},
        alpha_pattern={re.escape(name): layer.alpha for name, layer in layers.items()},
        use_rslora=adapter.settings.use_rslora,
    )
    inject(root, settings)
    with torch.no_grad():
        for name, layer in adapted_layers(root).items():
            layer.lora_A[ADAPTER].weight.copy_(layers[name].a)
            layer.lora_B[ADAPTER].weight.copy_(layers[name].b)
    return merge_lora(model)


class Layer(NamedTuple):
    """The adapter of one Linear layer."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    alpha: float


def _layers(root: Any, adapter: Adapter) -> dict[str, Layer]:
    """Return the adapters by the names of their layers in ``root``, after a check of all keys."""
    settings, weights = adapter.settings, adapter.weights
    keys = {match.groups(): key for key in weights if (match := KEY.fullmatch(key))}
    expected: dict[str, tuple[int, ...]] = {}
    parts: dict[str, tuple[str, str]] = {}
    with refusing(f"adapter: {adapter.folder / CONFIG} holds a pattern that peft cannot read"):
        selected = _selected(root, settings, {layer for layer, _ in keys})
        ranks = _by_pattern(selected, settings.rank_pattern, settings.r)
        alphas = _by_pattern(selected, settings.alpha_pattern, settings.lora_alpha)
    for name, stored in selected.items():
        rank = ranks[name]
        out_features, in_features = root.get_submodule(name).weight.shape
        a = keys.get((stored, "A"), f"{PREFIX}{stored}.lora_A.weight")
        b = keys.get((stored, "B"), f"{PREFIX}{stored}.lora_B.weight")
        parts[name] = (a, b)
        expected[a], expected[b] = (rank, in_features), (out_features, rank)
    _check_shapes(adapter.folder / WEIGHTS, weights, expected)
    return {name: Layer(weights[a], weights[b], alphas[name]) for name, (a, b) in parts.items()}


def _selected(root: nn.Module, settings: Any, stored: set[str]) -> dict[str, str]:
    """Return the Linear layers of ``root`` that peft selects by the settings.

    Args:
        root: a host or model.
        settings: peft's LoraConfig.
        stored: names of layers in the folder, which show its layout.

    Returns:
        The names of the layers in the folder, by their names in ``root``.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    names = linear_names(root)
    layout = max(LAYOUTS, key=lambda rename: len(stored.intersection(map(rename, names))))
    named = {name: layout(name) for name in names}
    return {name: at for name, at in named.items() if check_target_module_exists(settings, at)}


def _by_pattern(selected: dict[str, str], patterns: Any, default: Any) -> dict[str, Any]:
    """Return the rank or alpha of each selected layer, from peft's patterns or the default."""
    from peft.utils.other import get_pattern_key

    return {
        name: patterns.get(get_pattern_key(patterns, stored), default)
        for name, stored in selected.items()
    }


def _check_shapes(
    path: Path,
    weights: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Require the expected keys and shapes, no other keys, and finite numbers."""
    for key in [*expected, *weights]:
        found = f"shape {tuple(weights[key].shape)}" if key in weights else "no tensor"
        wanted = f"shape {expected[key]}" if key in expected else "no tensor"
        if found != wanted:
            why = f": {CONFIG} selects no such Linear layer of the model"
            message = f"adapter: {path}: {key}: got {found}, expected {wanted}"
            raise ValueError(message if key in expected else message + why)
    for key, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            got = f"{tensor.dtype}, not all finite" if tensor.is_floating_point() else tensor.dtype
            raise ValueError(f"adapter: {path}: {key}: got {got}, expected finite numbers")
    if not expected:
        raise ValueError(f"adapter: {path}: got no tensors, expected adapters of Linear layers")


def _read_settings(path: Path) -> Any:
    """Return peft's LoraConfig with the fields in adapter_config.json that are read."""
    with from_extra("lora"):
        import peft
    saved = read_object(path)
    for name, value in saved.items():
        got = f"adapter: {path}: {name}: got {shown(value)}"
        if name in READ:
            _check_at(path, name, value, READ[name])
        elif name in FIXED:
            if value not in FIXED[name]:
                raise ValueError(f"{got}, expected {' or '.join(map(repr, FIXED[name]))}")
        elif name not in IGNORED and value:  # such as use_dora or modules_to_save
            raise ValueError(f"{got}, expected none: only plain LoRA is read")
    for name in REQUIRED:
        if name not in saved:
            raise ValueError(f"adapter: {path}: {name}: got nothing, expected a value")
    for name, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for value in saved.get(name, {}).values():
            _check_at(path, name, value, READ[field])
    return peft.LoraConfig(**{name: saved[name] for name in READ if name in saved})


def _check_at(path: Path, name: str, value: object, kind: object) -> None:
    try:
        check_field(name, value, kind)
    except ValueError as error:
        raise ValueError(f"adapter: {path}: {error}") from None
