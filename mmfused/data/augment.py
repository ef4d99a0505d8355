"""Image augmentation of a whole batch with few tensor operations."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F

from ._common import check_choice

Strength: TypeAlias = Literal["light", "strong"]
T = TypeVar("T", float, torch.Tensor)

CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Of the light crop; its boxes have the areas that are drawn, for which it tries several times.
LIGHT_AREA = (0.9, 1.0)
LIGHT_TRIES = 10
BRIGHTNESS = 0.3
CONTRAST = 0.3
SATURATION = 0.2
# Largest rotation of the hue, small because colour often determines the class.
HUE = 0.015 * 2 * math.pi
ERASE_PROBABILITY = 0.1
ERASE_AREA = (0.02, 0.2)

# Conversion from RGB to YIQ (NTSC). Rotating the IQ plane changes the hue, and scaling it changes
# the saturation.
RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
YIQ_TO_RGB: torch.Tensor = torch.linalg.inv(RGB_TO_YIQ)


def augment(
    images: torch.Tensor,
    size: int,
    generator: torch.Generator,
    strength: Strength = "strong",
) -> torch.Tensor:
    """Return randomly augmented images, (B, 3, size, size) float32 with values from 0 to 1.

    "strong": each image gets a random resized crop (area 0.5 to 1, aspect ratio 3/4 to 4/3), a
    horizontal flip with probability 0.5, and random changes of brightness, contrast, saturation and
    hue. With probability 0.1, a random rectangle is erased to grey (Zhong et al. 2020).

    "light": each image gets a random resized crop (area 0.9 to 1, aspect ratio 3/4 to 4/3, bicubic)
    and nothing else, as in VISTA's training (EVA-CLIP's image_transform in FlagEmbedding). The
    boxes are drawn like those of torchvision's RandomResizedCrop. VISTA draws them in the whole
    picture; ``mmfused train`` has squares, so that the ends of a long picture are never seen.

    Args:
        images: (B, 3, H, W) uint8.
        size: side of the result, in pixels.
        generator: random generator for all augmentations.
        strength: "strong" or "light".

    Raises:
        ValueError: ``strength`` is neither.
    """
    check_choice("strength", strength, Strength)
    if strength == "light":
        return _light_crop(images, size, generator).float().div_(255)
    draw = torch.rand(len(images), 14, generator=generator)
    pixels = _crop(images.float().div_(255), size, draw[:, 0:5])
    pixels = _colour(pixels, draw[:, 5:9])
    return pixels.masked_fill_(_erased(size, draw[:, 9:14]), 0.5)


def _between(u: T, low: float, high: float) -> T:
    return low + u * (high - low)


def _box(area: torch.Tensor, log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the widths and heights of boxes, as fractions of the picture's sides, at most 1."""
    ratio = log_ratio.exp()
    return (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)


def _light_crop(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return random crops, (B, 3, size, size) uint8, as in torchvision's RandomResizedCrop."""
    rows, columns = images.shape[-2:]
    draws = torch.rand(len(images), 2 * LIGHT_TRIES + 2, generator=generator)
    boxes = [_light_box(rows, columns, draw) for draw in draws.tolist()]
    crops = [
        F.interpolate(
            image[None, :, top : top + height, left : left + width],
            (size, size),
            mode="bicubic",
            antialias=True,
        )
        for image, (top, left, height, width) in zip(images, boxes, strict=True)
    ]
    return torch.cat(crops)


def _light_box(rows: int, columns: int, draw: list[float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a box in pixels.

    The first of the drawn boxes that lies in the image is taken. If there is none, it is the
    largest central box with an allowed aspect ratio.
    """
    narrow, wide = CROP_RATIO
    for area, ratio in zip(draw[:LIGHT_TRIES], draw[LIGHT_TRIES:-2], strict=True):
        pixels = rows * columns * _between(area, *LIGHT_AREA)
        shape = math.exp(_between(ratio, math.log(narrow), math.log(wide)))
        width, height = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < width <= columns and 0 < height <= rows:
            x, y = draw[-2:]
            return int(y * (rows - height + 1)), int(x * (columns - width + 1)), height, width
    width = min(columns, round(rows * wide))
    height = min(rows, round(columns / narrow))
    return (rows - height) // 2, (columns - width) // 2, height, width


def _crop(pixels: torch.Tensor, size: int, draw: torch.Tensor) -> torch.Tensor:
    area, ratio, x, y, flip = draw.unbind(1)
    rows, columns = pixels.shape[-2:]
    log_ratio = _between(ratio, *map(math.log, CROP_RATIO)) + math.log(rows / columns)
    width, height = _box(_between(area, *CROP_AREA), log_ratio)
    theta = torch.zeros(len(draw), 2, 3)
    theta[:, 0, 0] = torch.where(flip < 0.5, width, -width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    grid = F.affine_grid(theta, [len(draw), 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour(pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue.

    All four changes together are one affine map of the pixels: a 3 x 3 matrix and an offset.
    """
    brightness = _between(draw[:, 0], 1 - BRIGHTNESS, 1 + BRIGHTNESS)[:, None, None]
    contrast = _between(draw[:, 1], 1 - CONTRAST, 1 + CONTRAST)[:, None, None]
    saturation = _between(draw[:, 2], 1 - SATURATION, 1 + SATURATION)
    angle = _between(draw[:, 3], -HUE, HUE)
    yiq_matrix = torch.zeros(len(draw), 3, 3)
    yiq_matrix[:, 0, 0] = 1
    yiq_matrix[:, 1, 1] = yiq_matrix[:, 2, 2] = saturation * angle.cos()
    yiq_matrix[:, 2, 1] = saturation * angle.sin()
    yiq_matrix[:, 1, 2] = -yiq_matrix[:, 2, 1]
    matrix = brightness * contrast * (YIQ_TO_RGB @ yiq_matrix @ RGB_TO_YIQ)
    flat = pixels.flatten(2)
    # Contrast scales the differences from the mean grey of the brightened picture.
    grey = torch.einsum("c,bc->b", RGB_TO_YIQ[0], flat.mean(dim=2))[:, None, None]
    offset = (1 - contrast) * brightness * grey
    return torch.baddbmm(offset, matrix, flat).clamp_(0, 1).view_as(pixels)


def _erased(size: int, draw: torch.Tensor) -> torch.Tensor:
    """Return a (B, 1, size, size) bool mask with one random rectangle in some of the images."""
    uniform, area, ratio, x, y = draw.unbind(1)
    width, height = _box(_between(area, *ERASE_AREA), _between(ratio, math.log(0.4), math.log(2.5)))
    width = torch.where(uniform < ERASE_PROBABILITY, width, 0.0)
    line = (torch.arange(size) + 0.5) / size
    left, top = (x * (1 - width))[:, None], (y * (1 - height))[:, None]
    across = (line >= left) & (line < left + width[:, None])
    down = (line >= top) & (line < top + height[:, None])
    return (down[:, :, None] & across[:, None, :])[:, None]
