"""From items to model inputs: collation, augmentation of the whole batch at once, and an in-memory
batch iterator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ._common import check_int, torch_generator
from .augment import augment

# Of ImageNet's training set, the usual input scaling of vision transformers.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Collate:
    """Turns a list of items into a batch.

    ``{"pixel_values": float32 (B, 3, S, S), "image_present": bool (B,), "input_ids": int64 (B, T),
    "attention_mask": int64 (B, T), "labels": int64 (B,)}``, T the longest text of the batch, at
    most ``max_length``. Pixels are scaled to 0..1, then ``(pixel - mean) / std``; a missing image
    is all zeros. A missing text is ``[CLS] [SEP]``. Without augmentation the short side is resized
    to ``image_size`` and the centre kept; with it, see :mod:`.augment`.

    Augmentation draws from a generator of its own, seeded from ``(seed, epoch)``: ``set_epoch``
    rewinds it, and nothing else that draws random numbers changes it."""

    def __init__(
        self,
        tokenizer,
        image_size: int,
        max_length: int,
        *,
        augment: bool = False,
        seed: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ):
        self.image_size = check_int("image_size", image_size, 1)
        self.max_length = check_int("max_length", max_length, 2)
        self.seed = check_int("seed", seed, 0)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std take 3 numbers each, std above 0, got {tuple(mean)} and {tuple(std)}"
            )
        if tokenizer.pad_token_id is None or not tokenizer("")["input_ids"]:
            raise ValueError(
                "tokenizer takes one with a padding token that marks an empty text, [CLS] [SEP], got neither"
            )
        self.tokenizer = tokenizer
        self.augment = augment
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch_generator(self.seed, check_int("epoch", epoch, 0))

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        images = torch.stack(same_size([item["image"] for item in items], self.image_size))
        present = torch.tensor([bool(item["image_present"]) for item in items])
        ids, mask = self.tokenize([item["text"] for item in items])
        return {
            "pixel_values": self.pixel_values(images, present),
            "image_present": present,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        }

    def tokenize(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask), both int64 (B, T), padded to the longest."""
        out = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return out["input_ids"], out["attention_mask"]

    def pixel_values(
        self,
        images: torch.Tensor,
        present: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """uint8 (B, 3, H, W) and bool (B,) -> normalised float32 (B, 3, S, S)."""
        if self.augment:
            pixels = augment(
                images, self.image_size, self.generator if generator is None else generator
            )
        else:
            pixels = centre(images, self.image_size).float() / 255
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return pixels.sub_(mean).div_(std).mul_(present[:, None, None, None])


class Items:
    """A dataset's images and token ids in memory as tensors, and batches of any of its rows."""

    def __init__(self, dataset, collate: Collate):
        self.collate = collate
        items = [dataset[row] for row in range(len(dataset))]
        images = getattr(
            dataset, "images", None
        )  # no second copy, where they are one tensor of the right size
        side = collate.image_size
        if not isinstance(images, torch.Tensor) or images.shape != (len(items), 3, side, side):
            images = torch.stack(same_size([item["image"] for item in items], collate.image_size))
        self.images = images if collate.augment else centre(images, collate.image_size)
        self.present = torch.tensor([bool(item["image_present"]) for item in items])
        self.ids, self.mask = collate.tokenize([item["text"] for item in items])
        self.labels = torch.tensor([item["label"] for item in items], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self,
        rows: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """As :class:`Collate` makes it; ``generator`` draws the augmentation."""
        present, mask = self.present[rows], self.mask[rows]
        # Padding may be on the left, so columns that no row uses are dropped wherever they are.
        used = mask.any(dim=0)
        return {
            "pixel_values": self.collate.pixel_values(self.images[rows], present, generator),
            "image_present": present,
            "input_ids": self.ids[rows][:, used],
            "attention_mask": mask[:, used],
            "labels": self.labels[rows],
        }


class Batches:
    """Iterates over ``dataset`` in batches, images and token ids cached in memory as tensors.

    Can be iterated again and again; an epoch's order follows from ``seed`` and the epoch alone, the
    augmentation of its batch i from ``collate.seed``, the epoch and i alone: the same epoch gives
    the same batches, and any of them can be made without those before it. ``set_epoch`` changes the
    epoch. ``len`` is the number of batches. Over ``world`` ranks, each makes its own rows of every
    batch."""

    def __init__(
        self,
        dataset,
        collate: Collate,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
    ):
        self.rank, self.world = rank, world
        if batch_size % world:
            raise ValueError(f"batch_size takes a multiple of the {world} ranks, got {batch_size}")
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.seed = check_int("seed", seed, 0)
        rows = len(dataset)
        if rows < (batch_size if drop_last else 1):
            raise ValueError(
                f"dataset takes at least one whole batch, got {rows} rows for a batch_size of {batch_size}"
            )
        self.collate = collate
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.items = Items(dataset, collate)

    def __len__(self) -> int:
        rows = len(self.items)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = check_int("epoch", epoch, 0)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._from(self.epoch, 0)

    def stream(self, position: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Epoch 0 and all that follow, without end, from batch ``position`` of them on; no batch
        before it is made.
        """
        epoch, start = divmod(check_int("position", position, 0), len(self))
        while True:
            yield from self._from(epoch, start)
            epoch, start = epoch + 1, 0

    def _from(self, epoch: int, start: int) -> Iterator[dict[str, torch.Tensor]]:
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


def same_size(images: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """The images as they are where they share one shape not far above ``size``, else each fitted to
    ``size``.

    Up to twice the size is kept because a random crop then still has its own pixels to show; above,
    bilinear sampling would skip pixels and the cache would only grow."""
    if len({image.shape for image in images}) == 1 and max(images[0].shape[1:]) <= 2 * size:
        return images
    return [centre(image[None], size)[0] for image in images]


def centre(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, size, size): short side resized, anti-aliased, and the centre
    kept.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
