"""The model that training starts with: from a preset, from pretrained parts, or from a run.

``init`` is the folder of a run or checkpoint, whose config and weights are used, or a pretrained
folder, whose parts are used as if each were named alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfused import data as product_data
from mmfused.models import MODELS, ModelConfig
from mmfused.models.adapters import merge_adapter, read_adapter
from mmfused.models.checkpointing import checkpoint_layers
from mmfused.models.config import meta_model
from mmfused.models.encoders import transformers_of
from mmfused.models.fields import refusing
from mmfused.models.lora import add_lora, merge_lora, resolve_lora
from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.models.published import parts_of, pretrained_projection
from mmfused.models.qwen import pretrained_qwen2_vl
from mmfused.models.weights import named
from mmfused.training.config import HOSTED, TrainConfig
from mmfused.training.datasets import stored_side
from mmfused.training.files import check_shapes, load_weights, path_inside, read_json, read_shapes
from mmfused.training.folder_lock import is_run_folder
from mmfused.training.optimizer import make_optimizer, own_rates
from mmfused.training.run_folder import build_saved, load_own_tokenizer, read_settings

# Most texts of a set that a new tokenizer is trained on.
TOKENIZER_TEXTS = 100_000

logger: logging.Logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a model is built from."""

    values: dict[str, Any]  # fields of the model's config, from the preset or the run in ``init``
    fields: dict[str, Any]  # fields of the model's config that describe the pretrained parts
    modules: dict[str, torch.nn.Module]  # the pretrained parts, by the name of the model's part
    sources: dict[str, str]  # the folder or hub name of each pretrained part
    image_size: int | None  # side of the pictures; None leaves it to ``values`` and ``fields``
    patch_size: int | None  # side of the patches, likewise
    run: Path | None  # the run or checkpoint in ``init``, if there is one
    lora: dict[str, Any] | None  # options of the adapters of this run


def is_pretrained(folder: Path) -> bool:
    """Return whether a folder holds a pretrained model, perhaps damaged, and not a run."""
    if not folder.is_dir() or (folder / "state.json").is_file() or is_run_folder(folder):
        return False
    with suppress(ValueError, FileNotFoundError):
        if not {"model_type", "architecture"}.isdisjoint(read_json(folder / "config.json")):
            return True
    return any(folder.glob("*.safetensors"))


def init_run(config: TrainConfig) -> Path | None:
    """Return the run or checkpoint in ``init``; None if there is none.

    A folder that is missing counts as a run. A run that is resumed does not need it.
    """
    return Path(config.init) if config.init and not is_pretrained(Path(config.init)) else None


def part_sources(config: TrainConfig) -> dict[str, str]:
    """Return the folder or hub name of each pretrained part that the settings name.

    The parts of a pretrained folder in ``init`` are those that the model takes.

    Raises:
        ValueError: the pretrained folder holds none of them.
    """
    takes = ("host",) if config.model in HOSTED else ("image_encoder", "text_encoder")
    held: tuple[str, ...] = ()
    if config.init and init_run(config) is None:
        held = parts_of(Path(config.init), "init")
        if set(held).isdisjoint(takes):
            raise ValueError(
                f"init: got {config.init!r}, which holds {' and '.join(held)}, "
                f"expected {' or '.join(takes)} for model {config.model!r}"
            )
    found = {name: getattr(config, name) for name in takes}
    found = {
        name: source or (config.init if name in held else None) for name, source in found.items()
    }
    if config.model == "unica" and "visual_proj" in held and set(found.values()) == {config.init}:
        found["visual_proj"] = config.init
    unused = {"text": "image_encoder", "image": "text_encoder"}.get(config.modalities)
    return {name: source for name, source in found.items() if source and name != unused}


def read_init(init: str, model: str) -> dict[str, Any]:
    """Return the settings of the run or checkpoint in the folder ``init``.

    Raises:
        ValueError: the folder holds neither, or those of another model than ``model``.
    """
    try:
        settings = read_settings(Path(init))
        path_inside(Path(init), "model.safetensors")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"init: got {init!r}, expected the folder of a run or checkpoint, or a pretrained one: "
            f"{error}"
        ) from error
    found = settings["training"].get("model", TrainConfig.model)
    if found != model:
        raise ValueError(f"init: got {init!r}, a run of {found!r}, expected a run of {model!r}")
    return settings


def load_start(config: TrainConfig) -> Start:
    """Load what the settings name as the start of training, except the weights of a run."""
    kind = MODELS[config.model].config
    values = {**kind.UNKNOWN, **kind.values_of(config.preset)}
    kind.check_options(config.model_options)  # before the weights of a part are read
    run, lora = init_run(config), None
    if run is not None:
        settings = read_init(str(config.init), config.model)
        lora = settings.get("lora")
        with named(f"init: {config.init}"):
            values = kind.from_dict(settings["model"]).to_dict()
    sources = part_sources(config)
    if lora is not None and sources and config.lora is None:
        raise ValueError(
            f"lora: got nothing with {', '.join(sources)} in place of a part of {config.init}, "
            "which has adapters, expected options of new adapters, or none"
        )
    fields, modules = load_parts(config, sources)
    sizes = image_sizes(config, values, sources)
    return Start(values, fields, modules, sources, *sizes, run, lora)


def load_parts(
    config: TrainConfig,
    sources: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, torch.nn.Module]]:
    """Load the pretrained parts; return ``fields`` and ``modules`` of `Start`."""
    fields: dict[str, Any] = {}
    modules: dict[str, torch.nn.Module] = {}
    if "image_encoder" in sources:
        source = sources["image_encoder"]
        part_fields, modules["image_encoder"] = pretrained_vit(source, config.image_size)
        fields |= part_fields
    if "text_encoder" in sources:
        part_fields, modules["text_encoder"] = pretrained_text(sources["text_encoder"])
        fields = {**part_fields, **fields}
    if "visual_proj" in sources:
        modules["visual_proj"] = pretrained_projection(Path(sources["visual_proj"]))
    if "host" in sources:
        adapter = None if config.adapter is None else read_adapter(Path(config.adapter))
        part_fields, modules["host"] = pretrained_qwen2_vl(sources["host"])
        if adapter is not None:
            merge_adapter(modules["host"], adapter)
        fields = {**part_fields, **fields}
    return fields, modules


def image_sizes(
    config: TrainConfig,
    values: Mapping[str, Any],
    sources: Mapping[str, str],
) -> tuple[int | None, int | None]:
    """Return the sides of pictures and of patches; None leaves a side to the model's config.

    With a run in ``init``, a host keeps the size of the run's pictures. With the preset "tiny" and
    neither a run nor a pretrained image encoder or host, sides that are not in the settings follow
    from the data. The side of pictures is `stored_side`, but at most 96, rounded down to a multiple
    of the side of patches. The side of patches is 8 for pictures with a side of up to 32 pixels,
    otherwise 16.
    """
    if init_run(config) is not None:
        return config.image_size or values.get("image_size"), None
    if config.preset != "tiny" or "image_encoder" in sources or "host" in sources:
        return config.image_size, config.patch_size
    side = config.image_size or min(96, stored_side(config))
    patch = config.patch_size or (8 if side <= 32 else 16)
    if side < patch or (config.image_size and side % patch):
        raise ValueError(f"image_size: got {side}, expected a multiple of patch_size = {patch}")
    return side - side % patch, patch


def load_tokenizer(config: TrainConfig) -> Any:
    """Return the tokenizer that the settings name, or None if they name none.

    The first of the settings ``tokenizer``, ``text_encoder``, ``host`` and ``init`` that is given
    determines the tokenizer. A pretrained folder in ``init`` has none if it holds no text encoder.
    """
    setting = _source_of_tokenizer(config)
    if setting is None:
        return None
    source = getattr(config, setting)
    if setting == "init" and init_run(config) is not None:
        tokenizer = load_own_tokenizer(Path(source))
    else:
        try:
            tokenizer = product_data.load_tokenizer(source, setting)
        except ValueError as error:
            hint = "" if setting == "tokenizer" else "; the setting tokenizer names another"
            raise ValueError(f"{error}{hint}") from error
    return MODELS[config.model].config.prepare_tokenizer(tokenizer)


def _source_of_tokenizer(config: TrainConfig) -> str | None:
    names = ["tokenizer", "text_encoder", "host"]
    if init_run(config) is not None or {"text_encoder", "host"} & part_sources(config).keys():
        names.append("init")
    return next((name for name in names if getattr(config, name)), None)


def train_tokenizer(config: TrainConfig, train_set: Any, products: Any = None) -> Any:
    """Return a new tokenizer, trained on texts of ``train_set`` and ``products``.

    Of more than `TOKENIZER_TEXTS` texts of a set, some are taken, at equal distances. If there are
    no texts, the tokenizer knows the names of the classes, or a single word.
    """
    found = chain(_some(train_set.texts), () if products is None else _some(products.texts))
    texts = [text for text in found if text] or getattr(train_set, "class_names", None) or ["none"]
    tokenizer = product_data.train_tokenizer(texts, vocab_size=config.vocab_size)
    return MODELS[config.model].config.prepare_tokenizer(tokenizer)


def _some(texts: Sequence[str]) -> Iterator[str]:
    step = -(-len(texts) // TOKENIZER_TEXTS) or 1
    return (texts[row] for row in range(0, len(texts), step))


def model_config(
    config: TrainConfig,
    start: Start,
    tokenizer: Any = None,
    num_classes: int | None = None,
) -> ModelConfig:
    """Return the config of the model.

    Fields of the task and the tokenizer override those of ``start.values``, fields of the
    pretrained parts override both, and ``config.model_options`` overrides all. A run in ``init``
    keeps its vocabulary and its classes, and the preset "code" its normalisation of pixels.

    Args:
        config: the settings.
        start: the result of `load_start`.
        tokenizer: the tokenizer; None leaves placeholders in its fields.
        num_classes: number of classes of a classifier; None leaves a placeholder.
    """
    kind = MODELS[config.model]
    changes: dict[str, Any] = {}
    if tokenizer is not None and not (start.run and _source_of_tokenizer(config) == "init"):
        changes |= kind.config.of_tokenizer(tokenizer)
    vocab_size = changes.pop("vocab_size", None)
    if kind.task == "classification":
        changes["modalities"] = config.modalities
        if num_classes is not None and start.run is None:
            changes["num_classes"] = num_classes
    changes |= start.fields
    if config.preset == "code" and start.run is None:
        # The public code normalises pictures in its own way, whatever encoder it starts with.
        pixels = ("pixel_mean", "pixel_std")
        changes |= {name: start.values[name] for name in pixels if name in start.values}
    values = kind.config.replaced(
        start.values,
        changes,
        vocab_size=None if start.run else vocab_size,
        image_size=start.image_size,
        patch_size=start.patch_size,
    )
    values = kind.config.replaced(values, config.model_options, image_size=start.image_size)
    return kind.config.from_dict(values)


def fixed_classes(config: TrainConfig, model_config: Mapping[str, Any]) -> int | None:
    """Return a classifier's number of classes if it does not follow from the data, else None."""
    if init_run(config) is not None or "num_classes" in config.model_options:
        return model_config.get("num_classes")
    return None


def check_start(config: TrainConfig, start: Start, tokenizer: Any) -> ModelConfig:
    """Require that weights, options and tokenizer fit together, before any data is read.

    Args:
        config: the settings.
        start: the result of `load_start`.
        tokenizer: the tokenizer, or None if it will be trained.

    Returns:
        The model's config, with placeholders for what depends on the data.
    """
    described = model_config(config, start, tokenizer)
    for part, other in (("image", "text"), ("text", "image")):
        if getattr(described, part, {}) is None and config.modalities != other:
            raise ValueError(f"{part}: got None, expected the options of an encoder to train with")
    kind, kept = MODELS[config.model], start.lora if config.lora is None else None
    model = meta_model(kind, described, kept)
    if tokenizer is not None:
        check_vocabulary(config, model, tokenizer)
    longest = model.longest_text
    if longest is not None and config.max_length > longest:
        raise ValueError(
            f"max_length: got {config.max_length}, expected at most {longest}, "
            "the number of tokens of the longest text that the model reads"
        )
    _load_modules(start, model, "meta")
    if start.run:
        path = path_inside(start.run, "model.safetensors")
        expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        found = read_shapes(path) if kept else _merged_shapes(read_shapes(path))
        with named("init"):
            check_shapes(path, found, expected, _replaced(start))
    lora = _new_lora(config, described) or kept
    if lora or config.grad_checkpointing or own_rates(config):
        model = meta_model(kind, described, lora)
        if config.grad_checkpointing:
            checkpoint_layers(model)
        if own_rates(config):
            make_optimizer(model, config)
    return described


def check_vocabulary(config: TrainConfig, model: Any, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has more tokens than the model's vocabulary."""
    parts = transformers_of(model)
    text = parts.get("host") or parts.get("text_encoder")
    most = None if text is None else text.get_input_embeddings().num_embeddings
    if most is not None and len(tokenizer) > most:
        source = config.host or config.text_encoder or config.init or "the model"
        raise ValueError(
            f"tokenizer: got {len(tokenizer)} tokens, expected at most {most}, "
            f"the vocabulary of {source}"
        )


def build_model(
    config: TrainConfig,
    num_classes: int,
    tokenizer: Any,
    start: Start | None = None,
) -> Any:
    """Return the model with the weights that training starts from.

    Args:
        config: the settings.
        num_classes: number of classes of a classifier.
        tokenizer: the model's tokenizer.
        start: the result of `load_start`; None loads it.
    """
    start = start or load_start(config)
    described = model_config(config, start, tokenizer, num_classes)
    model = MODELS[config.model].model(described)
    check_vocabulary(config, model, tokenizer)
    _load_modules(start, model)
    lora = _new_lora(config, described)
    if start.lora and config.lora is None:
        add_lora(model, **start.lora)
    if start.run:
        path = path_inside(start.run, "model.safetensors")
        weights = _merged_weights(start.run) if start.lora and config.lora else None
        load_weights(model, path, _replaced(start), weights)
    return model if lora is None else add_lora(model, **lora)


def warn_of_random(model: Any, start: Start, source: str, parts: Sequence[str]) -> None:
    """Log which of the ``parts`` of a model the pretrained ``source`` lacks."""
    names = [name for name, part in model.named_children() if name in parts and part.state_dict()]
    random = [name for name in names if name not in start.modules]
    if random:
        logger.warning("%s has no %s, which is random at first", source, ", ".join(random))


def _new_lora(config: TrainConfig, described: ModelConfig) -> dict[str, Any] | None:
    """Return all options of the adapters that training starts with B = 0, or None."""
    return resolve_lora(config.lora, described) if isinstance(config.lora, dict) else None


def _merged_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run or checkpoint, with its adapters merged."""
    model = build_saved(read_settings(folder), folder)
    load_weights(model, path_inside(folder, "model.safetensors"))
    return merge_lora(model).state_dict()


def _merged_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name after a merge of the adapters."""
    return {
        name.replace(".base_layer.", "."): shape
        for name, shape in shapes.items()
        if ".lora_" not in name
    }


def _load_modules(
    start: Start,
    model: Any,
    device: str = "cpu",
) -> None:
    """Load the pretrained parts into the model; on the device "meta", only check that they fit."""
    for name, module in start.modules.items():
        weights = {key: tensor.to(device) for key, tensor in module.state_dict().items()}
        part = getattr(model, name)
        # Names are not compared here: MOON2 replaces some weights when it loads them.
        kept = [key for key in part.state_dict() if key in weights]
        with named(f"{name}: the model's options change its weights"):
            check_shapes(
                Path(start.sources[name]),
                {key: tuple(weights[key].shape) for key in kept},
                {key: tuple(part.state_dict()[key].shape) for key in kept},
            )
        with refusing(f"{name}: {start.sources[name]!r} does not fit the model's options"):
            part.load_state_dict(weights)


def _replaced(start: Start) -> tuple[str, ...]:
    """Return the beginnings of the names of the weights that do not come from ``init``."""
    return tuple(f"{name}." for name in start.modules)
