"""Read the picture files of many rows in threads, at the start of a data set or on demand."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch

from ._common import Resample, Resize
from .pictures import BrokenPicture, decode
from .quiet import quiet
from .strings import Strings
from .tables import Pictures

T = TypeVar("T")

# Number of files that one task of a thread checks, because a task takes longer than a check.
CHECKED = 256
# Number of lost pictures that are logged by name.
NAMED = 5

logger: logging.Logger = logging.getLogger(__name__)


class Read(NamedTuple):
    """A picture file that was decoded, or only checked if ``image`` is None."""

    fingerprint: bytes
    image: torch.Tensor | None = None  # (3, H, W) uint8
    digest: str | None = None  # SHA-256 of the file


def decoded(
    pictures: Pictures,
    rows: Sequence[int],
    size: int | None,
    resize: Resize,
    resample: Resample,
) -> Iterator[Read | BrokenPicture]:
    """Yield the decoded picture of each row in order, or why it cannot be decoded."""

    def load(row: int) -> Read | BrokenPicture:
        try:
            data = pictures.read(row)
            image = decode(data, size, resize, resample)
            return Read(pictures.fingerprint(row), image, hashlib.sha256(data).hexdigest())
        except BrokenPicture as error:
            return error

    return in_threads(load, rows)


def checked(
    pictures: Pictures,
    rows: np.ndarray,
    names: Strings | None,
) -> Iterator[Read | BrokenPicture]:
    """Yield a `Read` without an image for each row in order, or why its file cannot be used.

    Args:
        pictures: the picture files.
        rows: rows with a picture, in ascending order.
        names: for each of ``rows``, the name of its picture; rows of equal names have one file,
            which is checked once. None if each row has a file of its own.
    """

    def check(block: list[int]) -> list[bytes | BrokenPicture]:
        return [_fingerprint(pictures, row) for row in block]

    # Files are numbered in the order of their first rows.
    files = np.arange(len(rows)) if names is None else names.groups()[1]
    firsts = rows[np.unique(files, return_index=True)[1]].tolist()
    blocks = (firsts[start : start + CHECKED] for start in range(0, len(firsts), CHECKED))
    found = [one for block in in_threads(check, blocks) for one in block]
    for file in files.tolist():
        one = found[file]
        yield Read(one) if isinstance(one, bytes) else one


def _fingerprint(pictures: Pictures, row: int) -> bytes | BrokenPicture:
    try:
        return pictures.fingerprint(row)
    except BrokenPicture as error:
        return error


def in_threads(load: Callable[[Any], T], rows: Iterable[Any]) -> Iterator[T]:
    """Yield ``load(row)`` for each row in order, computed in several threads.

    Pillow releases the GIL while it decodes. At most four results per thread wait in memory.
    """
    threads = min(8, os.cpu_count() or 1)
    remaining = iter(rows)
    with ThreadPoolExecutor(threads) as pool, quiet():
        waiting = [pool.submit(load, row) for row in islice(remaining, 4 * threads)]
        while waiting:
            done = waiting.pop(0)
            waiting.extend(pool.submit(load, row) for row in islice(remaining, 1))
            yield done.result()


class Lost:
    """The pictures that were readable at the start and could not be decoded later.

    All methods may be called by several threads at once; no lock is held, so that a data set can
    be pickled.
    """

    def __init__(self) -> None:
        self._sentences: dict[int, str] = {}

    def add(self, row: int, sentence: str) -> None:
        """Record that the picture of a row is lost; log the first rows, each once."""
        sentence = f"{sentence}; the item is used without it"
        if self._sentences.setdefault(row, sentence) is sentence:
            count = len(self._sentences)
            if count <= NAMED:
                logger.warning("%s", sentence)
            if count == NAMED:
                logger.warning("further lost pictures are only counted")

    def sentences(self) -> list[str]:
        """Return a sentence about each lost picture."""
        return list(self._sentences.values())


class SelectedImages(Sequence[torch.Tensor]):
    """Some of the images of a data set in memory, which are not copied.

    Args:
        source: all images, (N, 3, H, W) uint8 or a list of tensors.
        rows: indices of the selected images.
    """

    def __init__(self, source: Any, rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> SelectedImages: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | SelectedImages:
        if isinstance(index, slice):
            return SelectedImages(self.source, self.rows[index])
        return self.source[int(self.rows[index])]


class StreamedImages(Sequence[torch.Tensor]):
    """The images of a streamed data set; each access decodes the picture.

    Args:
        load: decodes the image of a row.
        count: number of rows.
    """

    def __init__(self, load: Callable[[int], torch.Tensor], count: int) -> None:
        self._load = load
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self._load(row) for row in range(*index.indices(self._count))]
        return self._load(range(self._count)[index])
