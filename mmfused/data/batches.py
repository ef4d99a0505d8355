"""From items to model inputs: collation, augmentation of whole batches, and batches in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import Rows, check_int, check_ranks, torch_generator
from .augment import augment as augment_batch

Batch: TypeAlias = dict[str, Tensor]

# Of ImageNet's training set, the usual input scaling of vision transformers.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Collate:
    """Turn a list of items into a batch.

    ``{"pixel_values": float32 (B, 3, S, S), "image_present": bool (B,), "input_ids": int64 (B, T),
    "attention_mask": int64 (B, T), "labels": int64 (B,)}``. T is the length of the batch's longest
    text, at most ``max_length``. Pixels are scaled to 0..1, then ``(pixel - mean) / std``; a
    missing image is all zeros, a missing text is ``[CLS] [SEP]``. Without augmentation the short
    side is resized to ``image_size`` and the centre cropped; with it, see :mod:`.augment`.

    Augmentation draws from a generator of its own, seeded from ``(seed, epoch)``. ``set_epoch``
    resets it, and no other random draws change it.

    Args:
        tokenizer: needs a padding token, and tokens around an empty text.
        image_size: S.
        max_length: longer texts are truncated.
        augment: augment the images.
        seed: of the augmentation.
        mean: of each colour channel.
        std: of each colour channel, above 0.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int,
        max_length: int,
        *,
        augment: bool = False,
        seed: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.image_size: int = check_int("image_size", image_size, 1)
        self.max_length: int = check_int("max_length", max_length, 2)
        self.seed: int = check_int("seed", seed, 0)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std: got {tuple(mean)} and {tuple(std)}, "
                "expected 3 numbers each, std above 0"
            )
        if tokenizer.pad_token_id is None or not tokenizer("")["input_ids"]:
            raise ValueError(
                "tokenizer: got one without a padding token, or without tokens for an empty text, "
                "expected one with both"
            )
        self.tokenizer: Any = tokenizer
        self.augment = augment
        self.mean: Tensor = torch.tensor(mean, dtype=torch.float32)
        self.std: Tensor = torch.tensor(std, dtype=torch.float32)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Reset the generator of the augmentation for ``epoch``."""
        entropy = (self.seed, check_int("epoch", epoch, 0))
        self.generator: torch.Generator = torch_generator(*entropy)

    def __call__(self, items: list[dict[str, Any]]) -> Batch:
        """Return the batch of ``items``."""
        images = torch.stack(_same_size([item["image"] for item in items], self.image_size))
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
        """Return (input_ids, attention_mask), int64 (B, T) each, padded to the longest."""
        out = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return out["input_ids"], out["attention_mask"]

    def pixel_values(
        self,
        images: Tensor,
        present: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """uint8 (B, 3, H, W) and bool (B,) -> normalised float32 (B, 3, S, S).

        ``generator`` draws the augmentation; None takes the one of the epoch.
        """
        if self.augment:
            generator = self.generator if generator is None else generator
            pixels = augment_batch(images, self.image_size, generator)
        else:
            pixels = _centre(images, self.image_size).float() / 255
        mean = self.mean[:, None, None]
        std = self.std[:, None, None]
        return pixels.sub_(mean).div_(std).mul_(present[:, None, None, None])


class Items:
    """The images and token ids of a dataset in memory, and batches of any of its rows.

    Args:
        dataset: the items.
        collate: how batches are made.
    """

    def __init__(self, dataset: Rows, collate: Collate) -> None:
        self.collate = collate
        items = [dataset[row] for row in range(len(dataset))]
        side = collate.image_size
        images = getattr(dataset, "images", None)
        # One tensor of the right size is not copied.
        if not isinstance(images, Tensor) or images.shape != (len(items), 3, side, side):
            images = torch.stack(_same_size([item["image"] for item in items], side))
        self.images: Tensor = images if collate.augment else _centre(images, side)
        self.present: Tensor = torch.tensor([bool(item["image_present"]) for item in items])
        ids, mask = collate.tokenize([item["text"] for item in items])
        self.ids: Tensor = ids
        self.mask: Tensor = mask
        labels = [item["label"] for item in items]
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return a batch as :class:`Collate` makes it; ``generator`` draws the augmentation."""
        present = self.present[rows]
        mask = self.mask[rows]
        # Padding may be on the left, so unused columns are dropped wherever they are.
        used = mask.any(dim=0)
        return {
            "pixel_values": self.collate.pixel_values(self.images[rows], present, generator),
            "image_present": present,
            "input_ids": self.ids[rows][:, used],
            "attention_mask": mask[:, used],
            "labels": self.labels[rows],
        }


class Batches:
    """Iterate over ``dataset`` in batches, with images and token ids cached in memory as tensors.

    The order of an epoch depends only on ``seed`` and the epoch, and the augmentation of its batch
    i only on ``collate.seed``, the epoch and i. So an epoch always gives the same batches, and each
    can be made without those before it. ``len`` is the number of batches.

    Args:
        dataset: the items.
        collate: how batches are made.
        batch_size: of all ranks together.
        shuffle: draw a new order in each epoch.
        seed: of the order.
        drop_last: leave out the last batch of an epoch if it is smaller.
        rank: of this process, which gets its own rows of every batch.
        world: number of ranks.

    Raises:
        ValueError: there are fewer rows than one batch needs, or ``batch_size`` is no multiple of
            ``world``.
    """

    def __init__(
        self,
        dataset: Rows,
        collate: Collate,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank = rank
        self.world = world
        check_ranks(batch_size, world)
        self.batch_size: int = check_int("batch_size", batch_size, 1)
        self.seed: int = check_int("seed", seed, 0)
        rows = len(dataset)
        if rows < (batch_size if drop_last else 1):
            raise ValueError(
                f"dataset: got {rows} rows for a batch_size of {batch_size}, "
                "expected at least one whole batch"
            )
        self.collate = collate
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch: int = 0
        self.items: Items = Items(dataset, collate)

    def __len__(self) -> int:
        rows = len(self.items)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration gives."""
        self.epoch = check_int("epoch", epoch, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self._from(self.epoch, 0)

    def stream(self, position: int = 0) -> Iterator[Batch]:
        """Yield batches without end, from batch ``position`` on, counted from epoch 0.

        No batch before it is made.
        """
        epoch, start = divmod(check_int("position", position, 0), len(self))
        while True:
            yield from self._from(epoch, start)
            epoch, start = epoch + 1, 0

    def _from(self, epoch: int, start: int) -> Iterator[Batch]:
        order = torch.arange(len(self.items))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch_generator(self.seed, epoch))
        for batch in range(start, len(self)):
            # From 1: a trailing 0 adds nothing to a seed, and batch 0 would share its draws with
            # the order.
            entropy = (epoch, batch + 1) if self.rank == 0 else (epoch, batch + 1, self.rank)
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            share = -(-len(rows) // self.world)
            rows = rows[self.rank * share : (self.rank + 1) * share]
            yield self.items.batch(rows, torch_generator(self.collate.seed, *entropy))


def _same_size(images: list[Tensor], size: int) -> list[Tensor]:
    """Return images of one shape: unchanged if they have one near ``size``, else each resized.

    Up to twice the size is kept, because a random crop still has pixels of its own to show. Above,
    bilinear sampling would skip pixels and the cache would only grow.
    """
    if len({image.shape for image in images}) == 1 and max(images[0].shape[1:]) <= 2 * size:
        return images
    return [_centre(image[None], size)[0] for image in images]


def _centre(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, size, size): centre crop, short side resized, antialiased."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
