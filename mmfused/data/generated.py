"""A generated set of products, with pictures and titles made from random attributes."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ._common import check_fraction, check_int

SHAPES = ("round", "square", "triangular", "star")
MATERIALS = ("cotton", "wool", "leather", "metal")
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 6),
    "yellow": (245, 215, 20),
    "green": (45, 150, 60),
    "turquoise": (30, 190, 190),
    "blue": (30, 80, 210),
    "purple": (130, 50, 170),
    "pink": (240, 120, 180),
}
SHAPE_WORDS = (
    ("round", "circular"),
    ("square", "boxy"),
    ("triangular", "wedge"),
    ("star", "starry"),
)
MATERIAL_WORDS = (
    ("cotton", "canvas", "jersey"),
    ("wool", "felt", "merino"),
    ("leather", "suede", "nappa"),
    ("metal", "steel", "brass"),
)
BRANDS = ("nordvik", "lumo", "halden", "casa", "oakly", "mira", "tivoli", "brix")
NOUNS = ("tray", "mat", "tag", "case", "cushion", "box")
NOISE = ("new", "sale", "bestseller", "gift", "2 pack", "free shipping", "limited edition", "eco")
TEMPLATES = (
    "{brand} {size} {pattern} {colour} {shape} {material} {noun} {noise}",
    "{noise} {brand} {noun} {shape} {material} {size} {colour} {pattern}",
    "{colour} {material} {noun} {size} {noise} {shape} {pattern} {brand}",
    "{shape} {noun} {brand} {pattern} {material} {colour} {noise} {size}",
)
# RANKS[k] is the frequency rank of class k, whose shape and material are divmod(k, 4). The most
# frequent class is about 9 times as frequent as the rarest, and every shape and every material has
# a frequent class.
RANKS = np.array([0, 9, 13, 6, 11, 1, 7, 14, 15, 4, 2, 10, 5, 12, 8, 3])
CLASS_PROBABILITIES = (1.0 + RANKS) ** -0.8 / ((1.0 + RANKS) ** -0.8).sum()


class GeneratedProducts(Dataset[dict[str, Any]]):
    """Generated products of 16 classes, each a pair of a shape and a material.

    The picture shows the shape, and the title names the material. Many titles also name the shape,
    and the colour in the picture correlates with the material. So each modality tells something
    about both shape and material. Some titles or images are missing. Some titles contradict the
    shape and the colour in the picture; the label then follows the picture. Class frequencies have
    a long tail. The products depend only on the arguments; titles and attributes do not depend on
    ``image_size``.

    An item is ``{"image": uint8 (3, S, S), "image_present": bool, "text": str, "label": int}``.

    ``.attributes`` holds (N,) arrays by name. The integer arrays label, shape, material, colour,
    pattern and size are the drawn attributes. The integer arrays said_shape and said_colour are
    what the title names, or -1. The arrays text_missing, image_missing and contradicts are boolean.

    Args:
        split: "train" or "val"; both are drawn independently from the same distribution.
        size: number of products; None takes 4096 for "train" and 1024 for "val".
        image_size: side S of the pictures, at least 8.
        seed: seed of the random generator.
        missing_text: fraction of the products without a text.
        missing_image: fraction of the products without an image.
        contradicting: fraction of the products whose title contradicts the picture. The products
            of the three fractions do not overlap.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> from mmfused.data import GeneratedProducts
        >>> products = GeneratedProducts("train", size=100, image_size=32, missing_image=0.1)
        >>> product = products[0]
        >>> product["image"].shape, product["image"].dtype
        (torch.Size([3, 32, 32]), torch.uint8)
        >>> sum(not product["image_present"] for product in products)
        10
        >>> products.class_names[:3]
        ['round cotton', 'round wool', 'round leather']
    """

    class_names: list[str] = [f"{shape} {material}" for shape in SHAPES for material in MATERIALS]
    num_classes: int = len(class_names)

    def __init__(
        self,
        split: Literal["train", "val"] = "train",
        size: int | None = None,
        image_size: int = 32,
        seed: int = 0,
        *,
        missing_text: float = 0.08,
        missing_image: float = 0.08,
        contradicting: float = 0.12,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split: got {split!r}, expected 'train' or 'val'")
        size = check_int("size", {"train": 4096, "val": 1024}[split] if size is None else size, 1)
        check_int("image_size", image_size, 8)
        check_int("seed", seed, 0)
        fractions = [
            check_fraction("missing_text", missing_text),
            check_fraction("missing_image", missing_image),
            check_fraction("contradicting", contradicting),
        ]
        total = round(sum(fractions), 9)
        if total > 1:
            raise ValueError(
                f"missing_text, missing_image and contradicting: got a sum of {total}, "
                "expected at most 1"
            )
        rng = np.random.default_rng([seed, int(split == "val")])
        attributes_rng, titles_rng, pixels_rng = rng.spawn(3)
        self.attributes: dict[str, np.ndarray] = _draw_attributes(attributes_rng, size, fractions)
        self.texts: list[str] = _compose_titles(titles_rng, self.attributes)
        self.labels: list[int] = self.attributes["label"].tolist()
        # The coarse label is the shape.
        self.coarse_labels: list[int] = [label // len(MATERIALS) for label in self.labels]
        self.skipped: list[str] = []
        self.images: torch.Tensor = _draw_pictures(pixels_rng, self.attributes, image_size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of texts, labels and images."""
        total = hashlib.sha256(json.dumps([self.texts, self.labels]).encode())
        total.update(self.images.numpy().data)
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index],
            "image_present": not bool(self.attributes["image_missing"][index]),
            "text": self.texts[index],
            "label": self.labels[index],
        }


def _draw_attributes(
    rng: np.random.Generator,
    count: int,
    fractions: list[float],
) -> dict[str, np.ndarray]:
    label = rng.choice(len(CLASS_PROBABILITIES), size=count, p=CLASS_PROBABILITIES)
    shape, material = np.divmod(label, len(MATERIALS))
    # With probability 0.5, the colour is one of the two colours of the material.
    use_material_colour = rng.random(count) < 0.5
    material_colour = 2 * material + rng.integers(0, 2, count)
    colour = np.where(use_material_colour, material_colour, rng.integers(0, 8, count))
    out = {"label": label, "shape": shape, "material": material, "colour": colour}
    out["pattern"] = rng.integers(0, len(PATTERNS), count)
    out["size"] = rng.integers(0, len(SIZES), count)
    flags = np.zeros((3, count), dtype=bool)
    order, start = rng.permutation(count), 0
    for flag, fraction in zip(flags, fractions, strict=True):
        stop = min(count, start + round(fraction * count))
        flag[order[start:stop]] = True
        start = stop
    out["text_missing"], out["image_missing"], out["contradicts"] = flags
    wrong_shape = (shape + rng.integers(1, len(SHAPES), count)) % len(SHAPES)
    wrong_colour = (colour + rng.integers(1, len(COLOURS), count)) % len(COLOURS)
    said_shape = np.where(rng.random(count) < 0.4, shape, -1)
    said_colour = np.where(rng.random(count) < 0.5, colour, -1)
    out["said_shape"] = np.where(out["contradicts"], wrong_shape, said_shape)
    out["said_colour"] = np.where(out["contradicts"], wrong_colour, said_colour)
    for name in ("said_shape", "said_colour"):
        out[name][out["text_missing"]] = -1
    return out


def _compose_titles(
    rng: np.random.Generator,
    attributes: dict[str, np.ndarray],
) -> list[str]:
    colours = tuple(COLOURS)
    titles = []
    for row in range(len(attributes["label"])):
        pick = rng.integers(0, 1 << 30, 8)
        say = rng.random(3)
        shape, colour = attributes["said_shape"][row], attributes["said_colour"][row]
        words = {
            "brand": BRANDS[pick[0] % len(BRANDS)],
            "noun": NOUNS[pick[1] % len(NOUNS)],
            "noise": NOISE[pick[2] % len(NOISE)] if say[0] < 0.5 else "",
            "material": MATERIAL_WORDS[attributes["material"][row]][pick[3] % 3],
            "shape": SHAPE_WORDS[shape][pick[4] % 2] if shape >= 0 else "",
            "colour": colours[colour] if colour >= 0 else "",
            "pattern": PATTERNS[attributes["pattern"][row]] if say[1] < 0.3 else "",
            "size": SIZES[attributes["size"][row]] if say[2] < 0.4 else "",
        }
        title = " ".join(TEMPLATES[pick[5] % len(TEMPLATES)].format(**words).split())
        titles.append("" if attributes["text_missing"][row] else title.capitalize())
    return titles


def _draw_pictures(
    rng: np.random.Generator,
    attributes: dict[str, np.ndarray],
    side: int,
) -> torch.Tensor:
    """Return (N, 3, side, side) uint8 pictures, each with a patterned shape on a pale background.

    The shape is rotated and shifted a little, and noise is added.
    """
    count = len(attributes["label"])
    images = np.zeros((count, 3, side, side), dtype=np.uint8)
    palette = np.array(list(COLOURS.values()), dtype=np.float32) / 255
    # In blocks, because a block is drawn in float32, with four bytes per value.
    for start in range(0, count, 256):
        rows = slice(start, min(start + 256, count))
        block = {name: attributes[name][rows] for name in ("shape", "colour", "pattern", "size")}
        images[rows] = _draw_block(rng, block, palette, side)
    images[attributes["image_missing"]] = 0
    return torch.from_numpy(images)


def _draw_block(
    rng: np.random.Generator,
    attributes: dict[str, np.ndarray],
    palette: np.ndarray,
    side: int,
) -> np.ndarray:
    count = len(attributes["shape"])
    x, y = _coordinates(rng, attributes["size"], side)
    coverage = _coverage(x, y, attributes["shape"], attributes["size"], side)[:, None]
    darkened = _pattern(x, y, attributes["pattern"])[:, None]
    colour = palette[attributes["colour"]] * rng.uniform(0.85, 1.1, (count, 1)).astype(np.float32)
    ink = colour[:, :, None, None] * (1 - 0.4 * darkened)
    ground = rng.uniform(0.75, 0.95, (count, 3)).astype(np.float32)[:, :, None, None]
    noise = rng.standard_normal((count, 3, side, side), dtype=np.float32) * 0.04
    picture = ground + (ink - ground) * coverage + noise
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _coordinates(
    rng: np.random.Generator,
    size: np.ndarray,
    side: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the x and y coordinates of the pixels, relative to the shifted and rotated shape.

    Both are (count, side, side). A picture spans coordinates from -1 to 1.
    """
    count = len(size)
    line = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    shift = rng.uniform(-0.1, 0.1, (2, count, 1, 1)).astype(np.float32)
    angle = rng.uniform(-0.15, 0.15, (count, 1, 1)).astype(np.float32)
    x, y = line[None, None, :] - shift[0], line[None, :, None] - shift[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _coverage(
    x: np.ndarray,
    y: np.ndarray,
    shape: np.ndarray,
    size: np.ndarray,
    side: int,
) -> np.ndarray:
    """Return the fraction of each pixel that the shape covers.

    The fraction goes from 1 to 0 over a pixel's width at the outline of the shape.
    """
    radius = np.array([0.55, 0.65, 0.75], dtype=np.float32)[size][:, None, None]
    distance = np.empty_like(x)
    for kind, outline in enumerate((_circle, _square, _triangle, _star)):
        rows = shape == kind
        distance[rows] = outline(x[rows], y[rows]) - radius[rows]
    return np.clip(0.5 - distance * side / 2, 0, 1)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) * 1.1


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 1.55 - y * 0.78, y * 1.55)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1.2 * np.hypot(x, y) * (1.0 + 0.45 * np.cos(5 * np.arctan2(x, -y) + np.pi))


def _pattern(x: np.ndarray, y: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Return 1 at the pixels that the pattern darkens, and 0 at the others."""
    striped = np.sin(y * 14) > 0.2
    dotted = np.sin(x * 12) * np.sin(y * 12) > 0.45
    checked = (np.sin(x * 9) > 0) ^ (np.sin(y * 9) > 0)
    kind = pattern[:, None, None]
    return np.select([kind == 1, kind == 2, kind == 3], [striped, dotted, checked], False).astype(
        np.float32
    )
