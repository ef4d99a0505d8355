"""Batches of any rows of a data set, whose pictures are in memory or decoded on demand."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ._common import Batch, Rows, check_int
from .folder import ProductFolder
from .pictures import BrokenPicture
from .quiet import quiet
from .reading import SelectedImages
from .sequence_items import Processor, SequenceItems
from .swap import SwappedTexts

if TYPE_CHECKING:
    from .batches import Collate

# Most texts whose tokens are made at the start. Those of more texts are made for each batch: this
# costs some CPU time, but neither a minute at the start nor gigabytes.
TOKENISED = 100_000
# Number of texts that are tokenised at once.
BLOCK = 4096
# Most batches that are read in advance, and most bytes of their pictures.
AHEAD = 4
AHEAD_BYTES = 2**28


class Items:
    """The images and token ids of a dataset in memory, to make batches of any rows.

    Args:
        dataset: the dataset.
        collate: makes the batches.
    """

    ahead: int = 0  # number of batches whose reading starts in advance

    def __init__(self, dataset: Rows, collate: Collate) -> None:
        self.collate = collate
        images, *columns = _columns(dataset)
        is_part = isinstance(images, SelectedImages)
        # A single tensor with images of the right size is used without a copy.
        source: Any = images.source if is_part else images
        self.rows: Tensor | None = None  # of the images, for each item; None if they are the same
        if not _has_size(source, collate.image_size):
            source = torch.stack(collate.same_size(list(images)))
        elif is_part:
            self.rows = torch.from_numpy(images.rows)
        self.images: Tensor = collate.squares(source) if collate.augment == "none" else source
        self._keep(*columns)

    def _keep(self, present: Sequence[bool], texts: Sequence[str], labels: Sequence[int]) -> None:
        self.present: Tensor = torch.tensor(present, dtype=torch.bool)
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64)
        self.tokens: Tokens = Tokens(texts, self.collate)

    def __len__(self) -> int:
        return len(self.labels)

    def start(self, rows: Tensor) -> Any:
        """Start reading the items of a batch; `finish` takes the result."""
        return rows

    def finish(self, started: Any, generator: torch.Generator | None = None) -> Batch:
        """Return the batch whose reading was started."""
        images = self.images[started if self.rows is None else self.rows[started]]
        return self._assemble(started, images, generator)

    def batch(self, rows: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the batch of ``rows``, as :class:`Collate` makes it.

        Only augmentation may differ: of a dataset with several image sizes, it augments the images
        that are already resized.

        Args:
            rows: indices of the items.
            generator: random generator of the augmentation, as for `Collate.pixel_values`.
        """
        return self.finish(self.start(rows), generator)

    def _assemble(self, rows: Tensor, images: Tensor, generator: torch.Generator | None) -> Batch:
        present = self.present[rows]
        ids, mask = self.tokens.batch(rows)
        return {
            "pixel_values": self.collate.pixel_values(images, present, generator),
            "image_present": present,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": self.labels[rows],
        }


class StreamedItems(Items):
    """Like `Items`, but the pictures of a batch are decoded in threads when its reading starts.

    The batches are those of `Items` of the same dataset in memory, whatever the number of threads.
    A picture that can no longer be decoded becomes zeros, and ``present`` is then False. The
    threads end when no batch is being read.

    Args:
        dataset: a streamed dataset, such as :class:`ProductFolder`.
        collate: makes the batches. If the dataset has no ``image_size``, pictures are decoded at
            the size of ``collate``, and with its ``resize`` and ``resample``.
        workers: number of threads; None takes one per CPU core, at most 8.
        batch_size: usual number of rows of a batch, which limits how many are read in advance.

    Raises:
        ValueError: ``workers`` or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        workers: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if workers is not None:
            check_int("workers", workers, 1)
        check_int("batch_size", batch_size, 1)
        self.collate = collate
        self.dataset = dataset
        self.workers: int = workers or min(8, os.cpu_count() or 1)
        source = collate if dataset.image_size is None else dataset
        # Arguments of `load_image`: side, resize and resample.
        self.size: tuple[int, Any, Any] = (source.image_size, source.resize, source.resample)
        self.ahead: int = max(1, min(AHEAD, AHEAD_BYTES // (batch_size * 3 * self.size[0] ** 2)))
        self._pool: weakref.ref[ThreadPoolExecutor] | None = None
        self._keep(dataset.present, dataset.texts, dataset.labels)

    def start(self, rows: Tensor) -> _Reading:
        """Start decoding the pictures of a batch; `finish` takes the result."""
        pool = self._pool() if self._pool is not None else None
        if pool is None:
            pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmfused-pictures")
            self._pool = weakref.ref(pool)
        return _Reading(self, rows, pool)

    def finish(self, started: _Reading, generator: torch.Generator | None = None) -> Batch:
        """Return the batch whose reading was started, after waiting for its pictures.

        An exception in a thread is raised here, unless it is a BrokenPicture.
        """
        images = started.wait()
        if self.size[0] > 2 * self.collate.image_size and len(images):
            images = torch.stack(self.collate.same_size(list(images)))
        if self.collate.augment == "none":
            images = self.collate.squares(images)
        return self._assemble(started.rows, images, generator)


class _Reading:
    """The pictures of a batch that are being decoded.

    It keeps the pool alive: after the last `_Reading` is dropped, the threads of the pool end.

    Args:
        items: the items.
        rows: indices of the items of the batch.
        pool: runs the tasks.
    """

    def __init__(self, items: StreamedItems, rows: Tensor, pool: ThreadPoolExecutor) -> None:
        self.rows = rows
        self._pool = pool
        self._tasks: list[Future[None]] = []
        # From the first batch to the last, not once more for each picture.
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet())
        side = items.size[0]
        self._images = torch.zeros(len(rows), 3, side, side, dtype=torch.uint8)
        present = items.present[rows].tolist()
        for row, image, is_present in zip(rows.tolist(), self._images, present, strict=True):
            if is_present:
                self._tasks.append(pool.submit(_decode, items, row, image))

    def wait(self) -> Tensor:
        """Return the images, (B, 3, H, W) uint8, as soon as all are decoded."""
        try:
            for task in self._tasks:
                task.result()
        finally:
            self._end()
        return self._images

    def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._quiet.close()

    def __del__(self) -> None:
        self._end()


def _decode(items: StreamedItems, row: int, image: Tensor) -> None:
    """Decode the picture of an item into ``image``."""
    try:
        image.copy_(items.dataset.load_image(row, *items.size))
    except BrokenPicture:
        items.present[row] = False


class Tokens:
    """The tokens of texts, made at the start or, of many texts, for each batch.

    Args:
        texts: the texts.
        collate: makes the tokens.
    """

    def __init__(self, texts: Sequence[str], collate: Collate) -> None:
        self.texts = texts
        self.collate = collate
        self._ids: Tensor | None = None  # of all texts, one after the other, int32
        if len(texts) <= TOKENISED:
            blocks = range(0, len(texts), BLOCK)
            found = [collate.tokenize(list(texts[start : start + BLOCK])) for start in blocks]
            self._ids = torch.cat([ids[mask.bool()].int() for ids, mask in found])
            self._lengths: Tensor = torch.cat([mask.sum(1) for _, mask in found])
            self._starts: Tensor = self._lengths.cumsum(0) - self._lengths

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and the mask of some texts, (B, T) int64, padded to the longest text."""
        if not len(rows):
            return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)
        if self._ids is None:
            return self.collate.tokenize([str(self.texts[row]) for row in rows.tolist()])
        lengths = self._lengths[rows, None]
        width = int(lengths.max())
        place = torch.arange(width).expand(len(rows), width)
        if self.collate.tokenizer.padding_side == "left":
            place = place - (width - lengths)
        is_token = (place >= 0) & (place < lengths)
        ids = torch.full(is_token.shape, self.collate.tokenizer.pad_token_id)
        ids[is_token] = self._ids[(self._starts[rows, None] + place)[is_token]].long()
        return ids, is_token.long()


@overload
def make_items(
    dataset: Any,
    collate: Collate,
    workers: int | None = None,
    batch_size: int = 64,
) -> Items: ...


@overload
def make_items(
    dataset: Any,
    collate: Collate | Processor,
    workers: int | None = None,
    batch_size: int = 64,
) -> Items | SequenceItems: ...


def make_items(
    dataset: Any,
    collate: Any,
    workers: int | None = None,
    batch_size: int = 64,
) -> Items | SequenceItems:
    """Return the `Items` of a dataset: `StreamedItems` if it is streamed.

    Args:
        dataset: the dataset.
        collate: makes the batches; a processor makes those of `SequenceItems`.
        workers: number of threads that decode the pictures of a streamed dataset.
        batch_size: usual number of rows of a batch.
    """
    if not hasattr(collate, "pixel_values"):
        return SequenceItems(dataset, collate, workers)
    if getattr(dataset, "streamed", False):
        return StreamedItems(dataset, collate, workers, batch_size)
    return Items(dataset, collate)


def _has_size(images: Any, side: int) -> bool:
    return isinstance(images, Tensor) and images.shape[1:] == (3, side, side)


def _columns(dataset: Any) -> tuple[Any, ...]:
    """Return images, presence, texts and labels of all items of a dataset."""
    # Not of a class that is derived from these and makes other items.
    if type(dataset).__getitem__ in (ProductFolder.__getitem__, SwappedTexts.__getitem__):
        present = getattr(dataset, "present", None)
        if present is not None:
            return dataset.images, present, dataset.texts, dataset.labels
    items = [dataset[row] for row in range(len(dataset))]
    images = getattr(dataset, "images", None)
    if not isinstance(images, Tensor) or len(images) != len(items):
        images = [item["image"] for item in items]
    present = [bool(item["image_present"]) for item in items]
    return images, present, [item["text"] for item in items], [item["label"] for item in items]
