"""Random changes of training images, by torchvision's transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from ._common import check_choice

Strength: TypeAlias = Literal["light", "strong"]

CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Of the light crop.
LIGHT_AREA = (0.9, 1.0)
BRIGHTNESS = 0.3
CONTRAST = 0.3
SATURATION = 0.2
# Largest turn of the hue, of one; small because colour often determines the class.
HUE = 0.015
ERASE_PROBABILITY = 0.1
ERASE_AREA = (0.02, 0.2)
ERASE_RATIO = (0.4, 2.5)

# The functions with which torchvision draws random numbers.
DRAWS = (torch.rand, torch.randint, torch.randperm, torch.Tensor.uniform_)


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
    and nothing else, as in VISTA's training (EVA-CLIP's image_transform in FlagEmbedding). VISTA
    draws the boxes in the whole picture; ``mmfused train`` has squares, so that the ends of a long
    picture are never seen.

    The transforms are those of ``torchvision.transforms.v2``, except the turn of the hue. All
    random numbers come from ``generator``, those of one image before those of the next, so that a
    batch gives the same images as its parts in turn. With another number of threads, torch may
    round the last bits of the colours differently.

    Args:
        images: (B, 3, H, W) uint8.
        size: side of the result, in pixels.
        generator: random generator for all augmentations.
        strength: "strong" or "light".

    Raises:
        ValueError: ``strength`` is neither.
    """
    check_choice("strength", strength, Strength)
    transforms = _light(size) if strength == "light" else _strong(size)
    out = torch.empty(len(images), 3, size, size)
    draws = _DrawsFrom(generator)
    for image, result in zip(images, out, strict=True):
        result.copy_(_transformed(image, transforms, draws))
    return out


def _light(size: int) -> list[v2.Transform]:
    bicubic = v2.InterpolationMode.BICUBIC
    return [v2.RandomResizedCrop(size, LIGHT_AREA, CROP_RATIO, bicubic), _to_floats()]


def _strong(size: int) -> list[v2.Transform]:
    return [
        v2.RandomResizedCrop(size, CROP_AREA, CROP_RATIO),
        v2.RandomHorizontalFlip(),
        _to_floats(),
        Colours(BRIGHTNESS, CONTRAST, SATURATION, HUE),
        v2.RandomErasing(ERASE_PROBABILITY, ERASE_AREA, ERASE_RATIO, value=0.5),
    ]


def _to_floats() -> v2.Transform:
    return v2.ToDtype(torch.float32, scale=True)


def _transformed(
    image: torch.Tensor,
    transforms: Sequence[v2.Transform],
    draws: _DrawsFrom,
) -> torch.Tensor:
    for transform in transforms:
        with draws:
            # As `forward` does it, which would also compute within `draws`, and that is slow.
            probability = getattr(transform, "p", None)
            if probability is not None and torch.rand(1) >= probability:
                continue
            params = transform.make_params([image])
        image = transform.transform(image, params)
    return image


class Colours(v2.ColorJitter):
    """ColorJitter with a faster turn of the hue.

    That of torchvision, which converts to HSV and back, takes three times as long as all other
    transforms together. Here, it comes after the other changes.
    """

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Return the image, (3, H, W) float32, with changed colours."""
        image = super().transform(inpt, {**params, "hue_factor": None})
        return image if params["hue_factor"] is None else turn_hue(image, params["hue_factor"])


def turn_hue(image: torch.Tensor, turn: float) -> torch.Tensor:
    """Return the image, (3, H, W) float, with all colours turned about the grey axis.

    Args:
        image: the image, with values from 0 to 1.
        turn: the angle, in turns; 1/3 makes red green, and green blue.
    """
    # Rodrigues' formula for the axis (1, 1, 1).
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    mean, across = (1 - cosine) / 3, sine / math.sqrt(3)
    turned = image * (mean + cosine)
    turned.add_(image.roll(1, -3), alpha=mean + across)
    turned.add_(image.roll(-1, -3), alpha=mean - across)
    return turned.clamp_(0, 1)


class _DrawsFrom(TorchFunctionMode):
    """A context in which torch's functions draw from ``generator``, not from the global one.

    It holds for this thread alone.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)
