"""Write the host of a UNITE or MOON2 as a folder that transformers loads without this library."""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any, Literal

import torch

from mmfused.models.encoders import import_transformers, quiet_transformers
from mmfused.models.fields import refusing
from mmfused.models.lora import merge_lora
from mmfused.models.qwen_host import keep_known_ids, token_side
from mmfused.models.qwen_tokens import plain_tokenizer
from mmfused.models.unite_inputs import UNITEProcessor
from mmfused.models.weights import on_meta

ExportDtype = Literal["float32", "bfloat16"]
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}


def check_exportable(name: str, without: object = ()) -> None:
    """Require a model whose weights are those of a Qwen2-VL.

    Args:
        name: name of the model, a key of ``MODELS``.
        without: the components that the model's config leaves out.
    """
    if name not in ("unite", "moon2"):
        raise ValueError(f"export: got model {name!r}, expected unite or moon2, which have a host")
    if name == "moon2" and (not isinstance(without, (list, tuple)) or "moe" not in without):
        raise ValueError(
            "export: got a moon2 with mixtures of experts, for which transformers has no class, "
            "expected one without 'moe'"
        )


def save_host(
    model: Any,
    tokenizer: Any,
    folder: str | PathLike[str],
    dtype: ExportDtype = "float32",
) -> None:
    """Write the host of a model, the tokenizer and a processor to a folder, for transformers.

    ``transformers.AutoModel`` loads the host, and ``AutoModelForImageTextToText`` the host with a
    head, which is the matrix of the word embeddings: training has no head. AutoTokenizer and
    AutoProcessor load the rest; they pad on the left, and add no special tokens to a text that is
    already a whole sequence. The processor keeps the shape of a picture and gives it 256 to 1280
    tokens (UNITE), or about as many as a square picture of the config's image_size has (MOON2).

    Args:
        model: a UNITE, or a MOON2 without "moe". Its adapters are merged, and its host is converted
            to ``dtype``, in place.
        tokenizer: the model's tokenizer.
        folder: the folder, which is created if it does not exist.
        dtype: "float32" or "bfloat16", the type of the weights.

    Raises:
        ValueError: transformers has no class for the model.

    Examples:
        >>> import tempfile, transformers
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UNITE, UNITEConfig
        >>> from mmfused.models.qwen_export import save_host
        >>> tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> model = UNITE(UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_host(model, tokenizer, folder)
        ...     type(transformers.AutoModel.from_pretrained(folder)).__name__
        'Qwen2VLModel'
    """
    check_exportable(type(model).__name__.lower(), model.config.without)
    merge_lora(model)
    transformers = import_transformers()
    host, config = model.host.to(getattr(torch, dtype)), copy.deepcopy(model.host.config)
    config.tie_word_embeddings = True
    for part in ("image", "video", "vision_start", "vision_end"):
        if part in model.config.tokens:
            setattr(config, f"{part}_token_id", model.config.tokens[part])
    keep_known_ids(config.text_config)
    with quiet_transformers():
        with on_meta():
            whole = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
        whole.model = host
        whole.tie_weights()
        with refusing(f"out: {folder} cannot be written"):  # a full disk is a SafetensorError
            whole.save_pretrained(folder)
        make_processor(model, plain_tokenizer(tokenizer)).save_pretrained(folder)


def make_processor(model: Any, tokenizer: Any) -> Any:
    """Return transformers' processor for the pictures and texts of a model; see `save_host`."""
    transformers, kind = import_transformers(), model.host.config.model_type
    options: dict[str, Any] = {}
    if type(model).__name__ == "MOON2":
        side = token_side(model.config.host["vision_config"])
        options["picture_tokens"] = ((model.config.image_size // side) ** 2,) * 2
    inner = UNITEProcessor(tokenizer, model.config, **options)
    return getattr(transformers, PROCESSORS[kind])(
        image_processor=inner.image_processor,
        video_processor=inner.video_processor,
        tokenizer=tokenizer,
    )
