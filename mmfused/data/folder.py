"""Any folder of product images with a metadata.csv."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from ._common import check_int
from .metadata import BrokenRow, Row, parse_label, read_rows
from .pictures import BrokenPicture, decode, inside, quiet, read_picture, short_side
from .pictures import load_rgb as load_rgb  # under the name that it had here before


class Item(NamedTuple):
    """A usable row of metadata.csv."""

    file_name: str
    text: str
    label: int
    coarse_label: int
    image: torch.Tensor | None
    digest: str | None  # of the picture's file


class ProductFolder(Dataset):
    """Images, texts and labels of ``root``, read from ``root/metadata.csv`` (UTF-8).

    Columns ``file_name`` (below root), ``text`` and ``label`` (integer >= 0), and ``coarse_label``
    (the same) where labels have families: ``.coarse_labels``, None without that column; others are
    ignored. An empty file_name or text is a missing modality: a zero image with ``image_present``
    False, or the text ``""``. A row with neither, with a bad label, that is not well-formed or
    whose image :func:`~mmfused.data.pictures.load_picture` refuses is left out, one sentence about
    it in ``.skipped``.

    Item: ``{"image": uint8 (3, H, W), "image_present": bool, "text": str, "label": int}``; images
    are decoded once and kept in memory, with ``image_size`` as one tensor ``.images`` (N, 3,
    image_size, image_size). ``.digest`` is the SHA-256 of texts, labels and picture files: of other
    content it is another.

    Args:
        image_size: short side resized to this, then centre crop; None keeps each image's own size.
        text_column: the column that texts are read from in place of ``text``.
        num_classes: labels must be below it; None takes the largest label + 1.
        strict: the first broken row raises ValueError with its sentence.

    Raises: FileNotFoundError: no folder, or no metadata.csv in it. ValueError: metadata.csv
        unreadable, a column missing or there twice, no usable row, images that do not fit into
            this machine's memory, or (strict) a broken row.
    """

    class_names = None

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        image_size: int | None = None,
        num_classes: int | None = None,
        strict: bool = False,
        text_column: str = "text",
    ):
        if image_size is not None:
            check_int("image_size", image_size, 1)
        # 2**31 keeps a label inside every integer type used downstream, and a typing slip out of
        # the class count.
        label_limit = 2**31 if num_classes is None else check_int("num_classes", num_classes, 1)
        self.root = Path(root)
        self.image_size = image_size
        self.text_column = text_column
        rows = list(read_rows(self.root, text_column, ("coarse_label",)))
        self.file_names: list[str] = []
        self.texts: list[str] = []
        self.labels: list[int] = []
        self.coarse_labels: list[int] | None = []
        self.present: list[bool] = []
        self.skipped: list[str] = []
        self._images: torch.Tensor | list[torch.Tensor | None] = self._room(len(rows))
        self.digest = self._fill(self._read(rows, label_limit, strict))
        if not self.labels:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"{self.root} has no usable row in metadata.csv{first}")
        if not any("coarse_label" in row.fields for row in rows):
            self.coarse_labels = None
        self.num_classes = max(self.labels) + 1 if num_classes is None else num_classes
        if image_size is None:
            self._fill_blanks()
        else:
            self._images = self._images[: len(self.labels)]

    def _room(self, rows: int) -> torch.Tensor | list:
        """For the images of as many rows; the system gives pages of it only to those that are
        written.
        """
        if self.image_size is None:
            return []
        size, memory = rows * 3 * self.image_size**2, physical_memory()
        if memory is not None and size > memory:
            got = f"{rows} images of {self.image_size} x {self.image_size} pixels, {size / 2**30:.1f} GiB"
            raise ValueError(
                f"{self.root} holds {got}, more than this machine's memory of {memory / 2**30:.1f} GiB"
            )
        return torch.empty(rows, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def _read(self, rows: list[Row], label_limit: int, strict: bool) -> Iterator[Item]:
        """The usable ones of the rows, in their order; images are decoded in several threads."""
        for row, found in zip(
            rows, in_threads(lambda row: self._load(row, label_limit), rows), strict=True
        ):
            if isinstance(found, Item):
                yield found
                continue
            name = row.fields.get("file_name", "").encode("utf-8", "replace").decode()[:200]
            sentence = f"metadata.csv line {row.line} ({name or 'no file_name'}): {found}"
            if strict:
                raise ValueError(sentence) from found
            self.skipped.append(sentence)

    def _load(self, row: Row, label_limit: int) -> Item | BrokenRow:
        try:
            if row.broken is not None:
                raise BrokenRow(row.broken)
            label = parse_label("label", row.fields["label"], label_limit)
            coarse = parse_label("coarse_label", row.fields.get("coarse_label", "0"), 2**31)
            name, text = row.fields["file_name"].strip(), row.fields[self.text_column].strip()
            if not name and not text:
                raise BrokenRow(
                    f"file_name and {self.text_column} are both empty, at least one must be given"
                )
            image, digest = self._load_image(name) if name else (None, None)
            return Item(name, text, label, coarse, image, digest)
        except BrokenRow as error:
            return error

    def _load_image(self, name: str) -> tuple[torch.Tensor, str]:
        try:
            data = read_picture(inside(self.root, name))
            return decode(data, self.image_size), hashlib.sha256(data).hexdigest()
        except BrokenPicture as error:
            raise BrokenRow(f"the image cannot be read: {error}") from error

    def _fill(self, items: Iterable[Item]) -> str:
        """Keeps the items, and returns their digest."""
        total = hashlib.sha256()
        for row, item in enumerate(items):
            self.file_names.append(item.file_name)
            self.texts.append(item.text)
            self.labels.append(item.label)
            self.coarse_labels.append(item.coarse_label)
            self.present.append(item.image is not None)
            if self.image_size is None:
                self._images.append(item.image)
            elif item.image is None:
                self._images[row] = 0
            else:
                self._images[row] = item.image
            total.update(
                json.dumps([item.text, item.label, item.coarse_label, item.digest]).encode()
            )
        return total.hexdigest()

    def _fill_blanks(self) -> None:
        """The zero image of rows without one is of the first image's shape, so that equal sizes
        stay equal.
        """
        shown = next(
            (image for image in self._images if image is not None),
            torch.empty(3, 1, 1, dtype=torch.uint8),
        )
        blank = torch.zeros_like(shown)
        self._images = [blank if image is None else image for image in self._images]

    @property
    def images(self) -> torch.Tensor | list[torch.Tensor]:
        """All images; those of rows without one are zero."""
        return self._images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {
            "image": self._images[index],
            "image_present": self.present[index],
            "text": self.texts[index],
            "label": self.labels[index],
        }


def in_threads(load, rows: list) -> Iterator:
    """``load`` of each, in order. Pillow decodes without Python's lock; only a few results wait for
    their turn.
    """
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, quiet():
        waiting = []
        for row in rows:
            waiting.append(pool.submit(load, row))
            if len(waiting) >= 4 * threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def physical_memory() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def first_side(root: str | os.PathLike, text_column: str = "text") -> int | None:
    """The short side of the first picture of the folder that has a readable header; None where
    there is none.
    """
    for row in read_rows(Path(root), text_column):
        name = row.fields.get("file_name", "").strip()
        if row.broken is None and name:
            try:
                return short_side(inside(Path(root), name))
            except BrokenPicture:
                continue
    return None
