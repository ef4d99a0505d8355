"""The encoders that models are built on: timm's ViT and transformers' BERT, from a config, with random weights."""

from __future__ import annotations

from torch import nn


class ConvStem(nn.Sequential):
    """Takes the place of ``projection``, the convolution that turns each patch into a token, with the same shapes in and out.

    3 x 3 convolutions of stride 2 with BatchNorm and ReLU, the width doubling up to the token's, then a 1 x 1 convolution:
    Xiao et al. 2021, "Early Convolutions Help Transformers See Better". Raises ValueError unless the patch's side is a
    power of two.
    """

    def __init__(self, projection: nn.Conv2d):
        side, width = projection.kernel_size[0], projection.out_channels
        if side < 2 or side & (side - 1):
            raise ValueError(f"patch_size must be a power of two for the convolutional stem, got {side}")
        count = side.bit_length() - 1
        widths = [projection.in_channels, *(max(8, width >> (count - 1 - layer)) for layer in range(count))]
        layers = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(width, width, 1))
        self.in_channels = projection.in_channels


def build_vit(dim: int, stem: str, options: dict) -> nn.Module:
    """timm's VisionTransformer of width ``dim`` without a head; ``stem``: "conv" or "patch"."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError("the image encoder needs timm: pip install mmfused[models]") from error
    vit = VisionTransformer(embed_dim=dim, num_classes=0, **options)
    if stem == "conv":
        vit.patch_embed.proj = ConvStem(vit.patch_embed.proj)
    return vit


def build_bert(dim: int, options: dict) -> nn.Module:
    """transformers' BertModel of width ``dim`` without a pooler."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise ImportError("the text encoder needs transformers: pip install mmfused[models]") from error
    return BertModel(BertConfig(hidden_size=dim, **options), add_pooling_layer=False)
