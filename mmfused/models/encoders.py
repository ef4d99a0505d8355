"""Image and text encoders built from a config: timm's ViTs and transformers' text models."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from mmfused.extras import from_extra
from mmfused.models.fields import (
    Kinds,
    Options,
    check_field,
    check_fields,
    plain,
    refusing,
    shown,
)
from mmfused.models.weights import on_meta

# How a ViT turns pixels into tokens: "conv" is ConvStem with BatchNorm, "conv_group" ConvStem with
# GroupNorm, "patch" the ViT's linear projection of patches.
Stem = Literal["conv", "conv_group", "patch"]

# The accepted arguments of timm's VisionTransformer. Arguments that name files or hubs are not
# accepted.
VIT_FIELDS: dict[str, object] = {
    "name": str,
    "img_size": int | tuple[int, int],
    "patch_size": int | tuple[int, int],
    "in_chans": int,
    "depth": int,
    "num_heads": int,
    "reg_tokens": int,
    "num_classes": Literal[0],
    "embed_dim": int,  # only with a name
    "mlp_ratio": float,
    "init_values": float | None,
    "fc_norm": bool | None,
    "qkv_bias": bool,
    "proj_bias": bool,
    "qk_norm": bool,
    "scale_attn_norm": bool,
    "scale_mlp_norm": bool,
    "class_token": bool,
    "no_embed_class": bool,
    "pre_norm": bool,
    "final_norm": bool,
    "pool_include_prefix": bool,
    "dynamic_img_size": bool,
    "dynamic_img_pad": bool,
    "fix_init": bool,
    "drop_rate": float,
    "pos_drop_rate": float,
    "patch_drop_rate": float,
    "proj_drop_rate": float,
    "attn_drop_rate": float,
    "drop_path_rate": float,
    "global_pool": Literal["", "avg", "avgmax", "max", "token", "map"],
    "pos_embed": Literal["", "none", "learn"],
    "weight_init": Literal["", "skip", "reset", "jax", "jax_nlhb", "moco"],
    "embed_norm_layer": str | None,
    "norm_layer": str | None,
    "act_layer": str | None,
}
# Fields of a named timm model only. Without a name, the config's image_dim sets the width.
NAMED_FIELDS = ("name", "embed_dim")
# The accepted arguments of timm's Eva, the class of EVA02-CLIP, which always has a name.
EVA_FIELDS: dict[str, object] = {
    "name": str,
    "img_size": int | tuple[int, int],
    "patch_size": int | tuple[int, int],
    "in_chans": int,
    "depth": int,
    "num_heads": int,
    "num_classes": Literal[0],
    "embed_dim": int,
    "mlp_ratio": float,
    "init_values": float | None,
    "qkv_bias": bool,
    "qkv_fused": bool,
    "swiglu_mlp": bool,
    "scale_mlp": bool,
    "scale_attn_inner": bool,
    "use_abs_pos_emb": bool,
    "use_rot_pos_emb": bool,
    "ref_feat_shape": int
    | tuple[int, int]
    | None,  # tokens by side in pretraining, for the rotation
    "final_norm": bool,  # False: tokens before the last norm, as VISTA takes them
    "drop_rate": float,
    "pos_drop_rate": float,
    "patch_drop_rate": float,
    "proj_drop_rate": float,
    "attn_drop_rate": float,
    "drop_path_rate": float,
    "global_pool": Literal["", "avg", "avgmax", "max", "token"],
}
# The accepted model types: encoders that map ids and a mask to last hidden states.
TEXT_TYPES: tuple[str, ...] = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "megatron-bert",
    "modernbert",
    "mpnet",
    "rembert",
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
)
# Fields that a model type reads but its config does not declare.
UNDECLARED: dict[str, dict[str, object]] = {
    "deberta": {"embedding_size": int, "talking_head": bool},
    "deberta-v2": {
        "embedding_size": int,
        "attention_head_size": int,
        "position_buckets": int,
        "conv_kernel_size": int,
        "conv_groups": int,
        "norm_rel_ebd": str,
        "conv_act": str,
        "share_att_key": bool,
    },
}
# Fields of `rope_parameters`.
ROPE: dict[str, object] = {
    "rope_type": str,
    "type": str,
    "rope_theta": float,
    "factor": float,
    "partial_rotary_factor": float,
    "attention_factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "short_factor": list[float],
    "long_factor": list[float],
    "truncate": bool,
    "mrope_interleaved": bool,
    "original_max_position_embeddings": int,
    "mrope_section": list[int],
}


class ConvStem(nn.Sequential):
    """Convolutional patch embedding with the input and output shapes of ``projection``.

    It is a stack of 3 x 3 convolutions of stride 2 with BatchNorm and ReLU, then a 1 x 1
    convolution (Xiao et al. 2021, "Early Convolutions Help Transformers See Better"). The number of
    channels doubles up to the token width. ``group`` replaces BatchNorm by GroupNorm, so that a
    picture's tokens do not depend on the other pictures in the batch. Raises ValueError unless the
    side of a patch is a power of two, at least 2, and the token width at least 8.
    """

    def __init__(self, projection: nn.Conv2d, group: bool = False) -> None:
        side, width = projection.kernel_size[0], projection.out_channels
        if side < 2 or side & (side - 1):
            raise ValueError(
                f"patch_size: got {side}, expected a power of two for the convolutional stem"
            )
        if width < 8:
            raise ValueError(
                f"image_dim: got {width}, expected at least 8 for the convolutional stem"
            )
        count = side.bit_length() - 1
        inner = [max(8, width >> (count - 1 - layer)) for layer in range(count)]
        layers: list[nn.Module] = []
        for inputs, outputs in zip([projection.in_channels, *inner], inner, strict=False):
            conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            norm = nn.GroupNorm(1, outputs) if group else nn.BatchNorm2d(outputs)
            layers += [conv, norm, nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(width, width, 1))
        self.in_channels: int = projection.in_channels


def check_image(options: Options) -> None:
    """Check options of :func:`build_vit`."""
    if not isinstance(options, dict) or "name" not in options:
        check_fields("image", options, without(VIT_FIELDS, *NAMED_FIELDS))
        return
    check_architecture("image.name", options["name"])
    check_fields("image", options, EVA_FIELDS if is_eva(options["name"]) else VIT_FIELDS)


def check_architecture(field: str, name: object) -> None:
    """Require the name of a timm model; timm would look up other names on a hub or in a folder."""
    is_name = isinstance(name, str) and set(name).isdisjoint("/:\\")
    if not is_name or not import_timm().is_model(name):
        raise ValueError(f"{field}: got {shown(name)}, expected the name of a timm model")


def is_eva(name: str) -> bool:
    """Return whether timm's model ``name`` is one of its Eva models."""
    return import_timm().models.is_model_in_modules(name, ["eva"])


def build_vit(dim: int, stem: Stem, options: Options) -> nn.Module:
    """Build timm's VisionTransformer or Eva of width ``dim`` without a head, with random weights.

    ``options`` are arguments of VisionTransformer (`VIT_FIELDS`). With a ``name``, ``options`` are
    arguments of the timm model of that name; an Eva has others (`EVA_FIELDS`).
    """
    timm = import_timm()
    check_image(options)
    options = {"num_classes": 0, **options}
    if "name" in options:
        with on_meta():  # checked before weights are allocated
            vit = create_vit(**options)
        check_vit(f"image.name: got {options['name']!r}, ", vit)
        if vit.embed_dim != dim:
            found, expected = f"of width {vit.embed_dim}", f"the width {dim} of image_dim"
            raise ValueError(f"image.name: got {options['name']!r}, {found}, expected {expected}")
        vit = create_vit(**options)
    else:
        with refusing("image: got options that cannot build a VisionTransformer"):
            vit = timm.models.VisionTransformer(embed_dim=dim, **options)
    if stem != "patch":
        size, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
        if size % patch:
            expected = f"a multiple of patch_size={patch} for the convolutional stem"
            raise ValueError(f"image.img_size: got {size}, expected {expected}")
        vit.patch_embed.proj = ConvStem(vit.patch_embed.proj, group=stem == "conv_group")
    return vit


def create_vit(name: str, **options: Any) -> Any:
    """Create a timm model without pretrained weights."""
    final_norm = options.pop("final_norm", True) if is_eva(name) else True  # not timm's argument
    with refusing(f"image: got options that cannot build timm's {name}"):
        vit = import_timm().create_model(name, pretrained=False, **options)
    if not final_norm:
        vit.norm = nn.Identity()
    return vit


def check_vit(found: str, encoder: Any) -> None:
    """Require a VisionTransformer, or an Eva with one token more than patches, on meta.

    The message begins with ``found``.
    """
    timm = import_timm()
    if isinstance(encoder, timm.models.VisionTransformer):
        return
    expected = "expected timm's VisionTransformer, or an Eva with a class token"
    if not isinstance(encoder, timm.models.Eva):
        raise ValueError(f"{found}a {type(encoder).__name__}, {expected}")
    embed = encoder.patch_embed
    channels = embed.proj.in_channels
    # An Eva notices only here that its heads do not divide its width.
    with refusing(f"{found}an Eva that cannot run"), on_meta():
        tokens = encoder.eval().forward_features(torch.empty(1, channels, *embed.img_size))
    if tokens.shape != (1, 1 + embed.num_patches, encoder.embed_dim):
        raise ValueError(f"{found}an Eva with {encoder.num_prefix_tokens} other tokens, {expected}")


def picture_size(dim: int, options: Options) -> int:
    """Return the side in pixels of the pictures that the encoder of :func:`build_vit` reads."""
    if "name" in options and "img_size" not in options:
        with on_meta():
            vit: Any = build_vit(dim, "patch", options)
        return vit.patch_embed.img_size[0]
    size = options.get("img_size", 224)  # VisionTransformer's default
    return size if isinstance(size, int) else size[0]


def declared(config: Any) -> dict[str, object]:
    """Return the names and types of the fields that a config class of transformers declares.

    Fields that all config classes share are excluded. Arguments that transformers accepts without a
    declaration are excluded, too: some of these arguments make transformers load code or kernels.
    """
    common = {field.name for field in dataclasses.fields(import_transformers().PreTrainedConfig)}
    kinds: dict[str, object] = {
        field.name: field.type
        for field in dataclasses.fields(config)
        if field.name not in common and plain(field.type)
    }
    if any(field.name == "rope_parameters" for field in dataclasses.fields(config)):
        kinds["rope_parameters"] = {**ROPE, "full_attention": ROPE, "sliding_attention": ROPE}
    aliases = {alias: kinds[name] for alias, name in config.attribute_map.items() if name in kinds}
    return kinds | aliases


def text_fields(model_type: object) -> tuple[Any, dict[str, object]]:
    """Return the config class of a text encoder, and the types of its fields except the width."""
    if model_type not in TEXT_TYPES:
        expected = ", ".join(TEXT_TYPES)
        raise ValueError(f"text.model_type: got {shown(model_type)}, expected one of {expected}")
    with refusing(f"text.model_type: got {model_type!r}, which this version of transformers lacks"):
        config = import_transformers().CONFIG_MAPPING[model_type]
    kinds = {"model_type": str, **declared(config), **UNDECLARED.get(str(model_type), {})}
    width = config.attribute_map.get("hidden_size", "hidden_size")
    return config, without(kinds, "hidden_size", width)


def check_activation(field: str, name: object) -> None:
    """Require the name of an activation in transformers."""
    if name not in import_transformers().activations.ACT2FN:
        expected = "the name of an activation in transformers"
        raise ValueError(f"{field}: got {shown(name)}, expected {expected}")


def check_text(options: Options) -> None:
    """Check options of :func:`build_text`."""
    check_field("text", options, dict)
    model_type = options.get("model_type", "bert")
    _, kinds = text_fields(model_type)
    check_fields("text", options, kinds)
    # Without token types, only DeBERTa leaves their embedding out.
    if options.get("type_vocab_size") == 0 and "deberta" not in model_type:
        raise ValueError("text.type_vocab_size: got 0, expected at least 1")


def build_text(dim: int, options: Options) -> nn.Module:
    """Build a text encoder of width ``dim`` without a pooler, with random weights.

    ``options`` are arguments of the encoder's config in transformers, and a ``model_type`` from
    `TEXT_TYPES` (default "bert").
    """
    transformers = import_transformers()
    check_text(options)
    options = dict(options)
    model_type = options.pop("model_type", "bert")
    with refusing(f"text: got options that cannot build a {model_type!r} of width {dim}"):
        config = transformers.AutoConfig.for_model(model_type, hidden_size=dim, **options)
        model_class, no_pooler = text_class(config)
        return model_class(config, **no_pooler)


def text_class(config: Any) -> tuple[Any, dict[str, bool]]:
    """Return the model class of a config, and the arguments that leave out its pooler."""
    if getattr(config, "sinusoidal_pos_embds", False):
        count = config.max_position_embeddings
        if count * config.dim > 1 << 22:  # transformers computes the positions in a Python loop
            raise ValueError(f"got {count} sinusoidal positions, expected fewer")
    model_class = import_transformers().MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return model_class, {"add_pooling_layer": False} if has_pooler else {}


def without(values: Kinds, *names: str) -> dict[str, Any]:
    """Return a copy of the dict without the keys ``names``."""
    return {name: value for name, value in values.items() if name not in names}


def freeze(encoder: nn.Module) -> nn.Module:
    """Freeze an encoder's weights, and keep the encoder in evaluation mode after :meth:`train`.

    Adapters that are added to it later are trained (:func:`mmfused.models.lora.add_lora`).
    """
    encoder.requires_grad_(False).eval()
    encoder.train = partial(train_frozen, encoder)  # type: ignore[method-assign]
    return encoder


def train_frozen(encoder: Any, mode: bool = True) -> Any:
    """Set the mode of a frozen encoder's adapters, and of the layers that are checkpointed.

    Neither changes what the frozen weights compute: of a layer of transformers that is
    checkpointed, only its modules read their mode.
    """
    module: Any
    for module in encoder.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout.train(mode)
        elif getattr(module, "gradient_checkpointing", False) and is_layer(module):
            module.training = mode
    return encoder


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of transformers that can be checkpointed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def transformers_of(model: nn.Module) -> dict[str, Any]:
    """Return the transformers of a model by attribute: its host, or the encoders that it has."""
    names = ("host", "image_encoder", "text_encoder")
    found = {name: getattr(model, name, None) for name in names}
    return {name: module for name, module in found.items() if module is not None}


def import_timm() -> Any:
    """Return timm; if it is missing, raise an error that names the extra to install."""
    with from_extra("models"):
        import timm.models
    return timm


def import_transformers() -> Any:
    """Return transformers; if it is missing, raise an error that names the extra to install."""
    with from_extra("models"):
        import transformers
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the warnings, loading reports and progress bars of transformers."""
    logging = import_transformers().logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
