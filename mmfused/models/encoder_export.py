"""Write the encoders of a FLUID, UniECS or UniCA as folders for transformers and timm."""

from __future__ import annotations

import inspect
import json
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmfused.extras import from_extra
from mmfused.models.config import ModelConfig
from mmfused.models.encoders import (
    import_timm,
    quiet_transformers,
    text_class,
)
from mmfused.models.fields import refusing
from mmfused.models.lora import merge_lora
from mmfused.models.qwen_export import ExportDtype
from mmfused.models.qwen_tokens import without_call
from mmfused.models.text_padding import longest_text_of
from mmfused.models.unica import UniCA
from mmfused.models.weights import on_meta

Part = Literal["image", "text"]


def check_part(config: ModelConfig, part: Part) -> None:
    """Require a config with an encoder that timm or transformers has.

    Args:
        config: the model's config.
        part: "image" or "text".
    """
    absent = getattr(config, part) is None
    if absent or getattr(config, "modalities", "both") not in ("both", part):
        raise ValueError(f"part: got {part!r}, expected a part that the model has")
    stem = getattr(config, "image_stem", "patch")
    if part == "image" and stem != "patch":
        raise ValueError(
            f"part: got 'image' of a model with image_stem {stem!r}, for which timm has no class, "
            "expected image_stem 'patch'"
        )


def save_text(
    model: Any,
    tokenizer: Any,
    folder: str | PathLike[str],
    dtype: ExportDtype = "float32",
    max_length: int | None = None,
) -> None:
    """Write the text encoder of a model and the tokenizer to a folder, for transformers.

    ``transformers.AutoModel`` loads the encoder. A class with a pooler needs the argument
    ``add_pooling_layer=False``, because the encoder has none. Of a UniCA, sentence-transformers
    loads the folder too, and ``encode`` computes the view "text" of ``UniCA.embed``.

    Args:
        model: a FLUID, UniECS or UniCA. Its adapters are merged, and its text encoder is converted
            to ``dtype``, in place.
        tokenizer: the model's tokenizer.
        folder: the folder, which is created if it does not exist.
        dtype: "float32" or "bfloat16", the type of the weights.
        max_length: number of tokens to which the tokenizer truncates if it is asked to, at most
            those that the encoder reads; None keeps the tokenizer's own.

    Raises:
        ValueError: the model has no text encoder, or the folder cannot be written.

    Examples:
        >>> import tempfile, transformers
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UniCA, UniCAConfig
        >>> from mmfused.models.encoder_export import save_text
        >>> tokenizer = train_tokenizer(["Red mug", "Blue plate"])
        >>> model = UniCA(UniCAConfig.preset("tiny", **UniCAConfig.of_tokenizer(tokenizer)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_text(model, tokenizer, folder, max_length=64)
        ...     loaded = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        >>> type(loaded).__name__
        'BertModel'
    """
    check_part(model.config, "text")
    merge_lora(model)
    encoder = model.text_encoder.to(getattr(torch, dtype))
    tokenizer = without_call(tokenizer)
    accepted = inspect.signature(encoder.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in accepted]
    tokenizer.model_input_names = names
    if max_length is not None:
        tokenizer.model_max_length = min(max_length, longest_text_of(encoder))
    with quiet_transformers(), refusing(f"out: {folder} cannot be written"):
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if isinstance(model, UniCA):
            _save_sentence_modules(Path(folder), encoder, tokenizer.model_max_length)


def _save_sentence_modules(folder: Path, encoder: Any, max_length: float) -> None:
    """Write what sentence-transformers needs to compute the unit vectors of [CLS].

    The names are those of its versions 2 to 6.
    """
    modules = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    # RoBERTa's first position follows that of the padding.
    padding = getattr(encoder.embeddings.position_embeddings, "padding_idx", None)
    most = encoder.config.max_position_embeddings - (0 if padding is None else padding + 1)
    _, no_pooler = text_class(encoder.config)
    files: dict[str, Any] = {
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.models.{name}",
            }
            for index, (name, path) in enumerate(modules)
        ],
        "sentence_bert_config.json": {
            "max_seq_length": int(min(max_length, most)),
            "do_lower_case": False,
            **({"model_args": no_pooler} if no_pooler else {}),
        },
        "config_sentence_transformers.json": {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.config.hidden_size,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "2_Normalize/config.json": {},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        _write_json(folder / name, value)


def save_image(
    model: Any,
    folder: str | PathLike[str],
    dtype: ExportDtype = "float32",
) -> None:
    """Write the image encoder of a model to a folder in timm's format.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, and so does
    ``transformers.AutoModel``. The settings of pictures in it are those of training.

    Args:
        model: a FLUID, UniECS or UniCA with the image_stem "patch". Its adapters are merged, and
            its image encoder is converted to ``dtype``, in place.
        folder: the folder, which is created if it does not exist.
        dtype: "float32" or "bfloat16", the type of the weights.

    Raises:
        ValueError: the model has no image encoder, or one that timm does not have; or the folder
            cannot be written.

    Examples:
        >>> import tempfile, timm
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.models.encoder_export import save_image
        >>> model = UniECS(UniECSConfig.preset("tiny", image_stem="patch", vocab_size=100))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image(model, folder)
        ...     loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
        >>> loaded.embed_dim, loaded.patch_embed.img_size
        (128, (64, 64))
    """
    check_part(model.config, "image")
    merge_lora(model)
    with from_extra("models"):
        import safetensors.torch
    encoder, config = model.image_encoder.to(getattr(torch, dtype)), model.config
    settings = timm_settings(encoder, config.image)
    settings["pretrained_cfg"] |= picture_settings(config)
    weights = {name: x.detach().cpu().contiguous() for name, x in encoder.state_dict().items()}
    with refusing(f"out: {folder} cannot be written"):
        Path(folder).mkdir(exist_ok=True)
        _write_json(Path(folder, "config.json"), settings)
        target = Path(folder, "model.safetensors")
        safetensors.torch.save_file(weights, target, metadata={"format": "pt"})


def timm_settings(encoder: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of timm's config.json for an encoder.

    Args:
        encoder: the encoder that :func:`mmfused.models.encoders.build_vit` built.
        options: the options of `build_vit`.

    Raises:
        ValueError: timm would build another model from them.
    """
    timm = import_timm()
    options = {name: value for name, value in options.items() if name != "num_classes"}
    # Without a name, build_vit has the defaults of this model.
    name = options.pop("name", "vit_base_patch16_224").split(".")[0]
    arguments = {"embed_dim": encoder.embed_dim, **options}
    if isinstance(encoder, timm.models.Eva) and not arguments.pop("final_norm", True):
        arguments["use_post_transformer_norm"] = False  # timm's name of it
    with refusing("export: timm cannot build the image encoder"), on_meta():
        rebuilt = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    _check_same(name, _shapes(encoder), _shapes(rebuilt))
    embed = encoder.patch_embed
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [embed.proj.in_channels, *embed.img_size],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def picture_settings(config: Any) -> dict[str, Any]:
    """Return how pictures are prepared, as fields of timm's pretrained_cfg.

    Args:
        config: the config of the model.
    """
    return {
        "mean": config.pixel_mean,
        "std": config.pixel_std,
        "interpolation": config.resample,
        "crop_pct": 1.0,
        "crop_mode": "squash" if config.resize == "stretch" else "center",
    }


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def _check_same(
    name: str,
    got: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
) -> None:
    for key in [*expected, *got]:
        if got.get(key) != expected.get(key):
            raise ValueError(
                f"export: got an image encoder with {key} of shape {got.get(key)}, expected "
                f"{expected.get(key)}, as in timm's {name}"
            )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
