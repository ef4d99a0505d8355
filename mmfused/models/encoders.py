"""The encoders that models are built on: timm's ViT and a transformers text model, from a config or pretrained."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from torch import nn


class ConvStem(nn.Sequential):
    """Takes the place of ``projection``, the convolution that turns each patch into a token, with the same shapes in and out.

    3 x 3 convolutions of stride 2 with BatchNorm and ReLU, the width doubling up to the token's, then a 1 x 1 convolution:
    Xiao et al. 2021, "Early Convolutions Help Transformers See Better". ``group``: GroupNorm in BatchNorm's place, so that a
    picture's tokens do not depend on its batch. Raises ValueError unless the patch's side is a power of two.
    """

    def __init__(self, projection: nn.Conv2d, group: bool = False):
        side, width = projection.kernel_size[0], projection.out_channels
        if side < 2 or side & (side - 1):
            raise ValueError(f"patch_size must be a power of two for the convolutional stem, got {side}")
        count = side.bit_length() - 1
        widths = [projection.in_channels, *(max(8, width >> (count - 1 - layer)) for layer in range(count))]
        layers = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            norm = nn.GroupNorm(1, outputs) if group else nn.BatchNorm2d(outputs)
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), norm, nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(width, width, 1))
        self.in_channels = projection.in_channels


def build_vit(dim: int, stem: str, options: dict) -> nn.Module:
    """timm's VisionTransformer of width ``dim`` without a head; ``stem``: "conv", "conv_group" or "patch".

    ``options``: its arguments (depth, num_heads, img_size, ...), or with a ``name`` the arguments of that timm model.
    """
    timm = import_timm()
    options = {"num_classes": 0, **options}
    if "name" in options:
        name = options.pop("name")
        vit = timm.create_model(name, pretrained=False, **options)
        if not isinstance(vit, timm.models.VisionTransformer) or vit.embed_dim != dim:
            found = f"{type(vit).__name__} of width {getattr(vit, 'embed_dim', 'unknown')}"
            raise ValueError(f"image takes the name of a VisionTransformer of width {dim} in timm, got {name!r}, a {found}")
    else:
        vit = timm.models.VisionTransformer(embed_dim=dim, **options)
    if stem != "patch":
        vit.patch_embed.proj = ConvStem(vit.patch_embed.proj, group=stem == "conv_group")
    return vit


def build_text(dim: int, options: dict) -> nn.Module:
    """transformers' encoder of width ``dim`` without a pooler.

    ``options``: arguments of its config; ``model_type`` among them chooses the architecture, "bert" unless given.
    """
    transformers = import_transformers()
    options = dict(options)
    config = transformers.AutoConfig.for_model(options.pop("model_type", "bert"), hidden_size=dim, **options)
    kind = transformers.MODEL_MAPPING[type(config)]
    pooler = "add_pooling_layer" in inspect.signature(kind).parameters
    return kind(config, **({"add_pooling_layer": False} if pooler else {}))


def pretrained_vit(source: str, image_size: int | None = None) -> tuple[dict, nn.Module]:
    """A pretrained VisionTransformer: a folder in timm's format (config.json, model.safetensors), or a name timm can download
    from the hub, of which only model.safetensors is taken.

    Returns the config fields that rebuild it without ``source`` (image, image_dim, image_stem, pixel_mean, pixel_std), and the
    encoder. ``image_size`` resamples its position embedding.
    """
    timm, folder = import_timm(), Path(source)
    size = {} if image_size is None else {"img_size": image_size}
    if folder.is_dir():
        described = read_encoder_folder("image encoder", folder, "model.safetensors")  # timm takes a pickle before another name
        if not timm.is_model(described.get("architecture", "")):
            raise ValueError(f"image encoder: {folder / 'config.json'} names no architecture of timm's")
        image = {"name": described["architecture"], **described.get("model_args", {}), **size, "num_classes": 0}
        where = {"model_name": f"local-dir:{folder}"}
    elif timm.is_model(source) and getattr(timm.models.get_pretrained_cfg(source), "hf_hub_id", None):
        image = {"name": source.split(".")[0], **size}
        where = {"model_name": source, "pretrained_cfg_overlay": {"hf_hub_filename": "model.safetensors"}}
    else:
        raise ValueError(f"image encoder: got {source!r}, takes a folder, or a name of timm's with weights on the hub")
    vit = timm.create_model(**where, pretrained=True, num_classes=0, **size)
    pixels = {f"pixel_{name}": tuple(vit.pretrained_cfg[name]) for name in ("mean", "std")}
    return {"image": image, "image_dim": vit.embed_dim, "image_stem": "patch", **pixels}, vit


def pretrained_text(source: str) -> tuple[dict, nn.Module]:
    """A pretrained text encoder: a folder in transformers' format (config.json, model.safetensors), or a hub name.

    Returns the config fields that rebuild it without ``source`` (text, text_dim), and the encoder.
    """
    transformers, folder = import_transformers(), Path(source)
    if folder.is_dir():
        read_encoder_folder("text encoder", folder, "*.safetensors")
    config = transformers.AutoConfig.from_pretrained(source)
    options = {"model_type": config.model_type, **config.to_diff_dict()}
    for name in ("transformers_version", "architectures", "dtype", "hidden_size", "_name_or_path"):
        options.pop(name, None)
    encoder = build_text(config.hidden_size, options)
    loaded = transformers.AutoModel.from_pretrained(source, use_safetensors=True)
    encoder.load_state_dict({name: loaded.state_dict()[name] for name in encoder.state_dict()})
    return {"text": options, "text_dim": config.hidden_size}, encoder


def freeze(encoder: nn.Module) -> nn.Module:
    """No gradients, and no dropout in training either: :meth:`train` leaves it in evaluation mode."""
    encoder.requires_grad_(False).eval()
    encoder.train = lambda mode=True: encoder
    return encoder


def read_encoder_folder(name: str, folder: Path, weights: str) -> dict:
    """The folder's config.json; FileNotFoundError unless that and the ``weights`` are there: a pickle is never loaded."""
    if not (folder / "config.json").is_file() or not any(folder.glob(weights)):
        raise FileNotFoundError(f"{name}: {folder} takes config.json and {weights}, and lacks one of them")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def import_timm():
    try:
        import timm.models
    except ImportError as error:
        raise ImportError("the image encoder needs timm: pip install mmfused[models]") from error
    return timm


def import_transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the text encoder needs transformers: pip install mmfused[models]") from error
    return transformers
