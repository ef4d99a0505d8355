"""Turn items of a dataset into batches of model inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    Batch,
    Resample,
    Resize,
    Rows,
    check_choice,
    check_int,
    check_ranks,
    torch_generator,
)
from .augment import Strength
from .augment import augment as augment_batch
from .items import Items as Items
from .items import make_items
from .sequence_items import Processor, SequenceItems

P = TypeVar("P")
S = TypeVar("S")
B = TypeVar("B")
Augment: TypeAlias = Literal["none"] | Strength

# Means and standard deviations of the colour channels in ImageNet's training set.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Collate:
    """Turn a list of items into a batch.

    A batch is a dict: ``{"pixel_values": float32 (B, 3, S, S), "image_present": bool (B,),
    "input_ids": int64 (B, T), "attention_mask": int64 (B, T), "labels": int64 (B,)}``. T is the
    number of tokens of the longest text in the batch.

    Pixels are scaled to values from 0 to 1, then normalised to ``(pixel - mean) / std``. Without
    augmentation, an image is resized as ``resize`` says. A missing image becomes
    zeros, and a missing text becomes the tokens of an empty text, such as ``[CLS] [SEP]``.

    A call draws random numbers for augmentation from this object's own generator, which
    ``set_epoch`` seeds from ``(seed, epoch)``.

    Args:
        tokenizer: a tokenizer that has a padding token, and that encodes an empty text as at least
            one token.
        image_size: side S of the model's input images, in pixels.
        max_length: largest number of tokens of a text; longer texts are truncated.
        augment: "none", or how strongly ``mmfused.data.augment`` changes the images: "light" or
            "strong". False is "none", and True is "strong".
        seed: seed of the augmentation.
        mean: mean of each colour channel.
        std: standard deviation of each colour channel, above 0.
        format_text: turns a text into what the tokenizer gets; None leaves it as it is.
        truncation_side: the side on which longer texts are truncated, "left" or "right"; None takes
            the tokenizer's.
        resize: "crop", "stretch" or "shortest", how an image becomes a square, see `load_picture`.
        resample: the interpolation, "bilinear" or "bicubic".

    Raises:
        ValueError: an argument is out of range, or the tokenizer has no padding token or no tokens
            for an empty text.

    Examples:
        >>> import torch
        >>> from mmfused.data import Collate, GeneratedProducts, train_tokenizer
        >>> products = GeneratedProducts(size=64, image_size=32)
        >>> collate = Collate(train_tokenizer(products.texts), image_size=24, max_length=16)
        >>> loader = torch.utils.data.DataLoader(products, batch_size=8, collate_fn=collate)
        >>> batch = next(iter(loader))
        >>> list(batch)
        ['pixel_values', 'image_present', 'input_ids', 'attention_mask', 'labels']
        >>> batch["pixel_values"].shape
        torch.Size([8, 3, 24, 24])
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int,
        max_length: int,
        *,
        augment: Augment | bool = "none",
        seed: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        format_text: Callable[[str], str] | None = None,
        truncation_side: Literal["left", "right"] | None = None,
        resize: Resize = "crop",
        resample: Resample = "bilinear",
    ) -> None:
        self.image_size: int = check_int("image_size", image_size, 1)
        self.max_length: int = check_int("max_length", max_length, 2)
        self.seed: int = check_int("seed", seed, 0)
        if isinstance(augment, bool):
            augment = "strong" if augment else "none"
        check_choice("augment", augment, Literal["none", "light", "strong"])
        check_choice("resize", resize, Resize)
        check_choice("resample", resample, Resample)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std: got {tuple(mean)} and {tuple(std)}, "
                "expected 3 numbers each, std above 0"
            )
        if tokenizer.pad_token_id is None or not tokenizer("")["input_ids"]:
            raise ValueError(
                "tokenizer: got a tokenizer without a padding token or without tokens for an empty "
                "text, expected a tokenizer with both"
            )
        self.tokenizer: Any = tokenizer
        self.format_text = format_text
        self.truncation_side = truncation_side
        self.augment: Augment = augment
        self.resize: Resize = resize
        self.resample: Resample = resample
        self.mean: Tensor = torch.tensor(mean, dtype=torch.float32)
        self.std: Tensor = torch.tensor(std, dtype=torch.float32)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Seed the random generator of the augmentation for ``epoch``."""
        entropy = (self.seed, check_int("epoch", epoch, 0))
        self.generator: torch.Generator = torch_generator(*entropy)

    def __call__(self, items: list[dict[str, Any]]) -> Batch:
        """Return the batch of ``items``."""
        images = torch.stack(self.same_size([item["image"] for item in items]))
        present = torch.tensor([bool(item["image_present"]) for item in items])
        ids, mask = self.tokenize([item["text"] for item in items])
        return {
            "pixel_values": self.pixel_values(images, present),
            "image_present": present,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        }

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, (B, T) int64, padded to the longest text."""
        if self.format_text is not None:
            texts = [self.format_text(text) for text in texts]
        tokenizer, side = self.tokenizer, self.tokenizer.truncation_side
        tokenizer.truncation_side = self.truncation_side or side
        try:
            out = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        finally:
            tokenizer.truncation_side = side
        return out["input_ids"], out["attention_mask"]

    def pixel_values(
        self,
        images: Tensor,
        present: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the normalised images, (B, 3, S, S) float32.

        Args:
            images: (B, 3, H, W) uint8.
            present: (B,) bool; absent images become zeros.
            generator: random generator of the augmentation; None takes the generator that
                ``set_epoch`` seeds.
        """
        is_square = images.shape[-2] == images.shape[-1]
        if self.augment == "none" or (self.resize == "stretch" and not is_square):
            images = self.squares(images)
        if self.augment == "none":
            pixels = images.float() / 255
        else:
            generator = self.generator if generator is None else generator
            pixels = augment_batch(images, self.image_size, generator, self.augment)
        mean = self.mean[:, None, None]
        std = self.std[:, None, None]
        return pixels.sub_(mean).div_(std).mul_(present[:, None, None, None])

    def same_size(self, images: list[Tensor]) -> list[Tensor]:
        """Return images of equal shape.

        Images that already have equal shapes are returned unchanged if no side exceeds ``2 * S``.
        For larger images, random crops would skip pixels. All other images are resized to S x S.
        """
        shapes = {image.shape for image in images}
        if len(shapes) == 1 and max(images[0].shape[1:]) <= 2 * self.image_size:
            return images
        return [self.squares(image[None])[0] for image in images]

    def squares(self, images: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W) images, resized to (B, 3, S, S)."""
        height, width = images.shape[-2:]
        if self.resize == "crop":
            side = min(height, width)
            top = (height - side) // 2
            left = (width - side) // 2
            images = images[:, :, top : top + side, left : left + side]
        side = self.image_size
        size = [side, side]
        if self.resize == "shortest":
            size = [int(side * long / min(height, width)) for long in (height, width)]
        if images.shape[-2:] != tuple(size):
            images = F.interpolate(images, size, mode=self.resample, antialias=True)
        top, left = (round((long - side) / 2) for long in size)
        return images[:, :, top : top + side, left : left + side]


def read_ahead(
    plans: Iterable[P],
    start: Callable[[P], S],
    finish: Callable[[P, S], B],
    ahead: int,
) -> Iterator[B]:
    """Yield a batch for each plan, after starting to read the next ``ahead`` batches."""
    waiting: deque[tuple[P, S]] = deque()
    for plan in plans:
        waiting.append((plan, start(plan)))
        if len(waiting) > ahead:
            yield finish(*waiting.popleft())
    while waiting:
        yield finish(*waiting.popleft())


class Batches:
    """Iterate over ``dataset`` in batches, with images in memory or decoded in advance.

    Every iteration over an epoch gives the same batches: the order depends only on ``seed`` and the
    epoch. The augmentation of batch i depends only on ``collate.seed``, the epoch, i and the rank.
    ``len`` is the number of batches per epoch.

    Args:
        dataset: the dataset. If it is streamed, the pictures of the next batches are decoded while
            a batch is used.
        collate: makes the batches; of a :class:`PairSet`'s items, it may also be a processor such
            as `mmfused.models.UNITEProcessor`.
        batch_size: number of items per batch, before the batch is split over ranks.
        shuffle: whether each epoch has another random order.
        seed: seed of the order.
        drop_last: leave out the last batch of an epoch if it is smaller than ``batch_size``.
        rank: rank of this process; each rank gets its own share of every batch.
        world: number of ranks.
        spread: instead of a smaller last batch, make all batches about equally large: their sizes
            differ by at most ``world``, and each rank gets equally many items. With several ranks,
            up to ``world - 1`` items are left out, in each epoch other ones. Needs ``shuffle``.
        workers: number of threads that decode the pictures of a streamed dataset; None takes one
            per CPU core, at most 8.

    Raises:
        ValueError: the dataset is empty, smaller than ``world`` or, with ``drop_last``, smaller
            than a batch; ``batch_size`` is not a multiple of ``world``; or ``spread`` is given with
            ``drop_last`` or without ``shuffle``.

    Examples:
        >>> import torch
        >>> from mmfused.data import Batches, Collate, GeneratedProducts, train_tokenizer
        >>> products = GeneratedProducts(size=64, image_size=32)
        >>> collate = Collate(train_tokenizer(products.texts), image_size=32, max_length=16)
        >>> batches = Batches(products, collate, batch_size=24, shuffle=True, drop_last=False)
        >>> [len(batch["labels"]) for batch in batches]
        [24, 24, 16]
        >>> batches.set_epoch(1)  # another order, the same one in every run
        >>> even = Batches(products, collate, 24, shuffle=True, drop_last=False, spread=True)
        >>> [len(batch["labels"]) for batch in even]
        [21, 21, 22]
    """

    def __init__(
        self,
        dataset: Rows,
        collate: Collate | Processor,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
        spread: bool = False,
        workers: int | None = None,
    ) -> None:
        self.rank = rank
        self.world = world
        check_ranks(batch_size, world)
        self.batch_size: int = check_int("batch_size", batch_size, 1)
        self.seed: int = check_int("seed", seed, 0)
        if spread and (drop_last or not shuffle):
            raise ValueError(
                f"spread: got True with drop_last={drop_last} and shuffle={shuffle}, "
                "expected drop_last=False and shuffle=True"
            )
        rows = len(dataset)
        least = batch_size if drop_last else world if spread else 1
        if rows < least:
            raise ValueError(
                f"dataset: got {rows} rows for a batch_size of {batch_size}, "
                f"expected at least {least}"
            )
        self.collate = collate
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.spread = spread
        self.epoch: int = 0
        self.items: Items | SequenceItems = make_items(
            dataset, collate, workers, batch_size // world
        )

    def __len__(self) -> int:
        rows = len(self.items)
        if self.spread:
            rows -= rows % self.world
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = check_int("epoch", epoch, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self._read(self._plans(self.epoch, 0))

    def stream(self, position: int = 0) -> Iterator[Batch]:
        """Yield batches of one epoch after another, without end.

        Args:
            position: index of the first batch to yield, counted from the start of epoch 0.
        """
        epoch, start = divmod(check_int("position", position, 0), len(self))
        later = (plan for number in count(epoch + 1) for plan in self._plans(number, 0))
        return self._read(chain(self._plans(epoch, start), later))

    def _read(self, plans: Iterable[Plan]) -> Iterator[Batch]:
        """Yield the batch of each plan."""
        return read_ahead(
            plans,
            lambda plan: self.items.start(plan.rows),
            lambda plan, started: self.items.finish(started, plan.generator),
            self.items.ahead,
        )

    def _plans(self, epoch: int, start: int) -> Iterator[Plan]:
        """Yield the plans of an epoch's batches from batch ``start`` on."""
        order = torch.arange(len(self.items))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch_generator(self.seed, epoch))
        for batch in range(start, len(self)):
            # `batch + 1`, because a generator ignores trailing zeros, and batch 0 must not get the
            # generator of (seed, epoch), which draws the order.
            entropy = (epoch, batch + 1) if self.rank == 0 else (epoch, batch + 1, self.rank)
            first, last = self._bounds(batch)
            rows = order[first:last]
            share = -(-len(rows) // self.world)
            rows = rows[self.rank * share : (self.rank + 1) * share]
            yield Plan(rows, torch_generator(getattr(self.collate, "seed", 0), *entropy))

    def _bounds(self, batch: int) -> tuple[int, int]:
        """Return where a batch begins and ends in the order of its epoch."""
        if not self.spread:
            return batch * self.batch_size, (batch + 1) * self.batch_size
        each = len(self.items) // self.world  # rows of each rank
        first, last = (each * index // len(self) for index in (batch, batch + 1))
        return self.world * first, self.world * last


class Plan(NamedTuple):
    """What a batch of `Batches` is made of."""

    rows: Tensor
    generator: torch.Generator  # of the augmentation
