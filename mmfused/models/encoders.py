"""The encoders that models are built on: timm's ViT and a transformers text model, from a config or
pretrained.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mmfused.extras import from_extra
from mmfused.json_files import read_object
from mmfused.models.fields import check_field, check_fields, plain, refusing, shown
from mmfused.models.weights import check_size, find_folder, on_meta, read_weights

# Arguments of timm's VisionTransformer that say what it computes. Others of timm's name files, hubs
# and classes.
VIT_FIELDS = {
    "name": str,
    "img_size": int | tuple[int, int],
    "patch_size": int | tuple[int, int],
    **dict.fromkeys(("in_chans", "depth", "num_heads", "reg_tokens"), int),
    "num_classes": Literal[0],
    "embed_dim": int,  # with a name
    "mlp_ratio": float,
    "init_values": float | None,
    "fc_norm": bool | None,
    **dict.fromkeys(
        ("qkv_bias", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm"), bool
    ),
    **dict.fromkeys(
        ("class_token", "no_embed_class", "pre_norm", "final_norm", "pool_include_prefix"), bool
    ),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "fix_init"), bool),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), float),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), float),
    "global_pool": Literal["", "avg", "avgmax", "max", "token", "map"],
    "pos_embed": Literal["", "none", "learn"],
    "weight_init": Literal["", "skip", "reset", "jax", "jax_nlhb", "moco"],
    **dict.fromkeys(("embed_norm_layer", "norm_layer", "act_layer"), str | None),
}
# Encoders that give a text's last hidden states from its ids and mask.
TEXT_TYPES = (
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
# What their models read and their configs do not declare.
UNDECLARED = {
    "deberta": {"embedding_size": int, "talking_head": bool},
    "deberta-v2": {
        **dict.fromkeys(
            (
                "embedding_size",
                "attention_head_size",
                "position_buckets",
                "conv_kernel_size",
                "conv_groups",
            ),
            int,
        ),
        **dict.fromkeys(("norm_rel_ebd", "conv_act"), str),
        "share_att_key": bool,
    },
}
ROPE = {
    **dict.fromkeys(("rope_type", "type"), str),
    **dict.fromkeys(
        (
            "rope_theta",
            "factor",
            "partial_rotary_factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
        ),
        float,
    ),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"), float),
    **dict.fromkeys(("short_factor", "long_factor"), list[float]),
    **dict.fromkeys(("truncate", "mrope_interleaved"), bool),
    "original_max_position_embeddings": int,
    "mrope_section": list[int],
}
# How earlier versions of transformers wrote rope_parameters; only in its folders.
LEGACY_ROPE = {
    **dict.fromkeys(("rope_theta", "global_rope_theta", "local_rope_theta"), float),
    "rope_scaling": ROPE,
}


class ConvStem(nn.Sequential):
    """Takes the place of ``projection``, the convolution that turns each patch into a token, with
    the same shapes in and out.

    3 x 3 convolutions of stride 2 with BatchNorm and ReLU, the width doubling up to the token's,
    then a 1 x 1 convolution: Xiao et al. 2021, "Early Convolutions Help Transformers See Better".
    ``group``: GroupNorm in BatchNorm's place, so that a picture's tokens do not depend on its
    batch. Raises ValueError unless the patch's side is a power of two."""

    def __init__(self, projection: nn.Conv2d, group: bool = False):
        side, width = projection.kernel_size[0], projection.out_channels
        if side < 2 or side & (side - 1):
            raise ValueError(
                f"patch_size: got {side}, expected a power of two for the convolutional stem"
            )
        count = side.bit_length() - 1
        widths = [
            projection.in_channels,
            *(max(8, width >> (count - 1 - layer)) for layer in range(count)),
        ]
        layers = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            norm = nn.GroupNorm(1, outputs) if group else nn.BatchNorm2d(outputs)
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                norm,
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.Conv2d(width, width, 1))
        self.in_channels = projection.in_channels


def check_image(options: dict) -> None:
    """ValueError unless these are options of :func:`build_vit`."""
    fields = (
        VIT_FIELDS
        if isinstance(options, dict) and "name" in options
        else without(VIT_FIELDS, "name", "embed_dim")
    )
    check_fields("image", options, fields)
    if "name" in options:
        check_architecture("image.name", options["name"])


def check_architecture(field: str, name: object) -> None:
    """ValueError unless timm has such a model: it would look for any other name on a hub or in a
    folder.
    """
    if (
        not isinstance(name, str)
        or not set(name).isdisjoint("/:\\")
        or not import_timm().is_model(name)
    ):
        raise ValueError(f"{field}: got {shown(name)}, expected the name of a model that timm has")


def build_vit(dim: int, stem: str, options: dict) -> nn.Module:
    """timm's VisionTransformer of width ``dim`` without a head; ``stem``: "conv", "conv_group" or
    "patch".

    ``options``: its arguments (`VIT_FIELDS`), or with a ``name`` the arguments of that timm model.
    """
    timm = import_timm()
    check_image(options)
    options = {"num_classes": 0, **options}
    if "name" in options:
        with on_meta():  # first without its weights, which may be those of anything
            vit = create_vit(**options)
        if not isinstance(vit, timm.models.VisionTransformer) or vit.embed_dim != dim:
            found = f"a {type(vit).__name__} of width {getattr(vit, 'embed_dim', 'unknown')}"
            raise ValueError(
                f"image.name: got {options['name']!r}, {found}, expected a VisionTransformer of width {dim} in timm"
            )
        vit = create_vit(**options)
    else:
        with refusing("image: takes arguments that make a VisionTransformer"):
            vit = timm.models.VisionTransformer(embed_dim=dim, **options)
    if stem != "patch":
        vit.patch_embed.proj = ConvStem(vit.patch_embed.proj, group=stem == "conv_group")
    return vit


def create_vit(name: str, **options) -> nn.Module:
    with refusing(f"image: takes arguments of timm's {name}"):
        return import_timm().create_model(name, pretrained=False, **options)


def picture_size(dim: int, options: dict) -> int:
    """Side of the pictures that the encoder of :func:`build_vit` takes."""
    if "name" in options and "img_size" not in options:
        with on_meta():
            return build_vit(dim, "patch", options).patch_embed.img_size[0]
    size = options.get("img_size", 224)  # VisionTransformer's own
    return size if isinstance(size, int) else size[0]


def declared(config: type) -> dict[str, object]:
    """Fields of a config of transformers and their types: its own, of which none names a file, a
    hub or a class.

    Those of all configs are left out, and all that transformers takes besides: it would load code
    or kernels for some."""
    common = {field.name for field in dataclasses.fields(import_transformers().PreTrainedConfig)}
    kinds = {
        field.name: field.type for field in dataclasses.fields(config) if field.name not in common
    }
    kinds = {name: kind for name, kind in kinds.items() if plain(kind)}
    if any(field.name == "rope_parameters" for field in dataclasses.fields(config)):
        kinds["rope_parameters"] = {**ROPE, "full_attention": ROPE, "sliding_attention": ROPE}
    return kinds | {
        alias: kinds[name] for alias, name in config.attribute_map.items() if name in kinds
    }


def text_fields(model_type: object) -> tuple[type, dict[str, object]]:
    """The config of a text encoder and its fields but for the width, which is the model's to say."""
    if model_type not in TEXT_TYPES:
        raise ValueError(
            f"text.model_type: got {shown(model_type)}, expected one of {', '.join(TEXT_TYPES)}"
        )
    with refusing(f"text.model_type: got {model_type!r}, which this version of transformers lacks"):
        config = import_transformers().CONFIG_MAPPING[model_type]
    kinds = {"model_type": str, **declared(config), **UNDECLARED.get(model_type, {})}
    return config, without(
        kinds, "hidden_size", config.attribute_map.get("hidden_size", "hidden_size")
    )


def check_text(options: dict) -> None:
    """ValueError unless these are options of :func:`build_text`."""
    check_field("text", options, dict)
    _, kinds = text_fields(options.get("model_type", "bert"))
    check_fields("text", options, kinds)


def build_text(dim: int, options: dict) -> nn.Module:
    """transformers' encoder of width ``dim`` without a pooler.

    ``options``: arguments of its config; ``model_type`` among them chooses the architecture of
    `TEXT_TYPES`, "bert" unless given."""
    transformers = import_transformers()
    check_text(options)
    options = dict(options)
    model_type = options.pop("model_type", "bert")
    with refusing(f"text: takes options of a {model_type!r} of width {dim}"):
        config = transformers.AutoConfig.for_model(model_type, hidden_size=dim, **options)
        kind, pooler = text_class(config)
        return kind(config, **pooler)


def text_class(config) -> tuple[type, dict]:
    """The model of a config, and what it takes to have no pooler."""
    if (
        getattr(config, "sinusoidal_pos_embds", False)
        and config.max_position_embeddings * config.dim > 1 << 22
    ):
        raise ValueError(
            f"got {config.max_position_embeddings} sinusoidal positions, expected fewer"
        )  # made one by one
    kind = import_transformers().MODEL_MAPPING[type(config)]
    return kind, {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(
        kind
    ).parameters else {}


def pretrained_vit(source: str, image_size: int | None = None) -> tuple[dict, nn.Module]:
    """A pretrained VisionTransformer: a folder in timm's format (config.json, model.safetensors),
    or a name timm can download from the hub, of which only model.safetensors is taken.

    Returns the config fields that rebuild it without ``source`` (image, image_dim, image_stem,
    pixel_mean, pixel_std), and the encoder. ``image_size`` resamples its position embedding."""
    timm, folder = import_timm(), Path(source)
    size = {} if image_size is None else {"img_size": image_size}
    if folder.is_dir():
        return vit_of_folder(folder, size)
    if not timm.is_model(source) or not getattr(
        timm.models.get_pretrained_cfg(source), "hf_hub_id", None
    ):
        raise ValueError(
            f"image encoder: got {source!r}, expected a folder, or a name of timm's with weights on the hub"
        )
    with on_meta():  # before it is downloaded
        check_vit(source, create_vit(name=source, num_classes=0))
    where = {
        "model_name": source,
        "pretrained_cfg_overlay": {"hf_hub_filename": "model.safetensors"},
    }
    vit = timm.create_model(**where, pretrained=True, num_classes=0, **size)
    pixels = {f"pixel_{name}": tuple(vit.pretrained_cfg[name]) for name in ("mean", "std")}
    image = {"name": source.split(".")[0], **size}
    return {"image": image, "image_dim": vit.embed_dim, "image_stem": "patch", **pixels}, vit


def vit_of_folder(folder: Path, size: dict) -> tuple[dict, nn.Module]:
    """Of timm's loader only the resampling: it would also follow the paths, addresses and pickles
    that config.json names.
    """
    timm = import_timm()
    described = read_encoder_folder("image encoder", folder, "model.safetensors")
    check_architecture(
        f"image encoder: {folder / 'config.json'}: architecture", described.get("architecture")
    )
    arguments, pretrained = (
        described.get("model_args", {}),
        described.get("pretrained_cfg", described),
    )
    for name, value in (("model_args", arguments), ("pretrained_cfg", pretrained)):
        check_field(f"image encoder: {folder / 'config.json'}: {name}", value, dict)
    saved = {"name": described["architecture"], **without(arguments, "num_classes")}
    image = {**saved, **size}
    check_image(saved)
    check_image(image)
    pixels = {}
    for name, usual in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):  # timm's
        check_field(
            f"image encoder: {folder / 'config.json'}: {name}",
            pretrained.get(name, usual),
            tuple[float, float, float],
        )
        pixels[f"pixel_{name}"] = tuple(pretrained.get(name, usual))
    with on_meta():
        expected = create_vit(**saved, num_classes=0)
    check_vit(folder, expected)
    weights = read_weights("image encoder", folder)
    check_size(f"image encoder: {folder}", weights, expected)
    vit = create_vit(num_classes=0, **image)
    with refusing(f"image encoder: {folder} holds the weights of another model"):
        weights = timm.models.vision_transformer.checkpoint_filter_fn(weights, vit)
        missing = vit.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"image encoder: {folder} lacks {len(missing)} weights, {missing[0]} among them"
        )
    return {"image": image, "image_dim": vit.embed_dim, "image_stem": "patch", **pixels}, vit


def check_vit(source: object, encoder: nn.Module) -> None:
    if not isinstance(encoder, import_timm().models.VisionTransformer):
        raise ValueError(
            f"image encoder: got {str(source)!r}, a {type(encoder).__name__}, expected a VisionTransformer"
        )


def pretrained_text(source: str) -> tuple[dict, nn.Module]:
    """A pretrained text encoder: a folder in transformers' format (config.json, model.safetensors),
    or a hub name.

    Returns the config fields that rebuild it without ``source`` (text, text_dim), and the encoder.
    """
    folder = find_folder("text encoder", source)
    described = read_encoder_folder("text encoder", folder, "*.safetensors")
    config_class, kinds = text_fields(described.get("model_type"))
    kept = keep_fields(described, {**declared(config_class), **kinds})
    with refusing(f"text encoder: {folder / 'config.json'} makes no {described['model_type']!r}"):
        config = config_class(**without(kept, "model_type"))
        kind, pooler = text_class(config)
        with on_meta():
            expected = kind(config, **pooler)
    options = {name: value for name, value in config.to_diff_dict().items() if name in kinds}
    options["model_type"] = described["model_type"]
    check_text(options)
    weights = read_weights("text encoder", folder)
    check_size(f"text encoder: {folder}", weights, expected)
    encoder = fill("text encoder", source, kind, config, weights, **pooler)
    return {"text": options, "text_dim": config.hidden_size}, encoder


def keep_fields(described: dict, kinds: dict[str, object]) -> dict:
    """Of a config.json the fields that say what the model computes; what else is in it is nobody's
    to follow.
    """
    kinds = {**kinds, **LEGACY_ROPE} if "rope_parameters" in kinds else kinds
    kept = {
        name: value
        for name, value in described.items()
        if name in kinds and (value is not None or name not in LEGACY_ROPE)
    }
    check_fields("config.json", kept, kinds)
    return kept


def fill(name: str, source: str, kind: type, config, weights: dict, **options) -> nn.Module:
    """A model of transformers with these weights in float32, whatever their prefix; all that it has
    must be among them.

    Given weights, transformers opens no file: from a folder it would also follow adapters and
    quantisers named there."""
    with refusing(f"{name}: {source!r} holds the weights of another model"):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("lm_head"))
    if missing:
        raise ValueError(
            f"{name}: {source!r} lacks {len(missing)} weights of {config.model_type}, {missing[0]} among them"
        )
    return model


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def freeze(encoder: nn.Module) -> nn.Module:
    """No gradients, and no dropout in training either: :meth:`train` leaves it in evaluation mode."""
    encoder.requires_grad_(False).eval()
    encoder.train = lambda mode=True: encoder
    return encoder


def read_encoder_folder(name: str, folder: Path, weights: str) -> dict:
    """The folder's config.json; FileNotFoundError unless that and the ``weights`` are there: a
    pickle is never loaded.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob(weights)):
        raise FileNotFoundError(
            f"{name}: {folder} takes config.json and {weights}, and lacks one of them"
        )
    return read_object(folder / "config.json")


def import_timm():
    with from_extra("models"):
        import timm.models
    return timm


def import_transformers():
    with from_extra("models"):
        import transformers
    return transformers
