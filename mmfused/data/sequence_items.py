"""Read the items of a set of pairs as complete sequences, in threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from ._common import Batch, check_int
from .pair_items import PairItems
from .pictures import BrokenPicture

AHEAD = 1  # number of batches whose reading starts in advance
# In place of the lost picture of an item without text.
BLANK = (3, 56, 56)


class Processor(Protocol):
    """Turns items of `PairItems.sequence_item` into the inputs of a model."""

    def __call__(self, items: Sequence[Any], /) -> Batch:
        """Return the batch of ``items``, one or more."""
        ...


class SequenceItems:
    """The items of a set of pairs, to make batches of sequences of any rows.

    A batch has what the processor returns, and "labels", which are zeros. If a picture's file can
    not be read, the item is used without its pictures, or with a black one if it has no text. If
    the processor has a method ``resize_picture``, the threads call it for each picture.

    Args:
        items: the items.
        processor: makes the batches, such as `mmfused.models.UNITEProcessor`.
        workers: number of threads that read pictures; None takes one for each core, at most 8.
    """

    ahead = AHEAD

    def __init__(
        self,
        items: PairItems,
        processor: Processor,
        workers: int | None = None,
    ) -> None:
        if workers is None:
            workers = min(8, os.cpu_count() or 1)
        self.items = items
        self.processor = processor
        self.workers: int = check_int("workers", workers, 1)
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.items)

    def start(self, rows: Tensor) -> list[Future[dict[str, Any]]]:
        """Start reading the pictures of a batch; `finish` takes the result."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmfused-pictures")
        return [self._pool.submit(self._read, row) for row in rows.tolist()]

    def finish(
        self,
        started: list[Future[dict[str, Any]]],
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Return the batch whose reading was started; nothing in it is random."""
        found = [future.result() for future in started]
        # A processor does not accept 0 items.
        batch = self.processor(found or [{"text": "-"}])
        if not found:
            batch = {name: value[:0] for name, value in batch.items()}
        return {**batch, "labels": torch.zeros(len(found), dtype=torch.int64)}

    def batch(self, rows: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the batch of ``rows``."""
        return self.finish(self.start(rows), generator)

    def _read(self, row: int) -> dict[str, Any]:
        try:
            item = self.items.sequence_item(row)
            # Photos at full size would take gigabytes.
            resize = getattr(self.processor, "resize_picture", None)
            if resize is not None and "image" in item:
                item["image"] = [resize(picture) for picture in item["image"]]
            return item
        except ValueError as error:
            if not isinstance(error, BrokenPicture):  # sides that the processor does not take
                self.items.lose(row, str(error))
            text = self.items.texts[row]
            return {"text": text} if text else {"image": [torch.zeros(BLANK, dtype=torch.uint8)]}
