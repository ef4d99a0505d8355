"""Read a folder of product images with a metadata.csv."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset

from ._common import Resample, Resize, check_choice, check_int
from .metadata import BrokenRow, Row, parse_label, read_rows
from .pictures import BrokenPicture, decode, picture_path, read_picture, short_side

# Kept importable from this module for existing callers.
from .pictures import load_rgb as load_rgb
from .quiet import quiet

T = TypeVar("T")


class Item(NamedTuple):
    """A usable row of metadata.csv."""

    file_name: str
    text: str
    label: int
    coarse_label: int
    image: torch.Tensor | None
    digest: str | None  # SHA-256 of the picture's file


class ProductFolder(Dataset[dict[str, Any]]):
    r"""A dataset of the images, texts and labels that ``root/metadata.csv`` (UTF-8) lists.

    metadata.csv has the columns ``file_name`` (path below ``root``), ``text`` and ``label``
    (integer of at least 0). The optional column ``coarse_label`` is the index of the group that the
    label belongs to. Other columns are ignored. If ``file_name`` is empty, the item has no image:
    its image is zero and ``image_present`` is False. If ``text`` is empty, the item has no text.

    A row is skipped if it is not well-formed, has neither an image nor a text, has an invalid label
    or coarse label, or has an image that :func:`load_picture` cannot load.
    ``.skipped`` has one sentence about each skipped row.

    An item is ``{"image": uint8 (3, H, W), "image_present": bool, "text": str, "label": int}``.
    Images are decoded once and kept in memory. With ``image_size``, ``.images`` is one tensor, (N,
    3, image_size, image_size). ``.coarse_labels`` is None without the column ``coarse_label``.
    ``.digest`` is the SHA-256 of texts, labels, coarse labels and picture files.

    Args:
        root: the folder.
        image_size: side of the square to which images are resized; None keeps the size of each
            image.
        num_classes: number of classes; labels must be smaller. None takes the largest label + 1.
        strict: raise ValueError for the first invalid row instead of skipping it.
        text_column: name of the column with the texts.
        resize: "crop", "stretch" or "shortest", how an image becomes a square, see `load_picture`.
        resample: the interpolation, "bicubic" or "bilinear".

    Raises:
        FileNotFoundError: ``root`` does not exist or has no metadata.csv.
        ValueError: an argument is invalid, metadata.csv is unreadable, a column is missing or
            occurs twice, no row is usable, or the images do not fit into this machine's memory.
            With ``strict``, also if a row is invalid.

    Examples:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from mmfused.data import ProductFolder
        >>> rows = "file_name,text,label\nmug.png,Red mug,0\n,Blue plate,1\nlost.png,Mug,0\n"
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Image.new("RGB", (40, 30), "red").save(pathlib.Path(root, "mug.png"))
        ...     size = pathlib.Path(root, "metadata.csv").write_text(rows)
        ...     products = ProductFolder(root, image_size=16)
        >>> len(products), products[0]["text"], products[0]["image"].shape
        (2, 'Red mug', torch.Size([3, 16, 16]))
        >>> products.skipped
        ['metadata.csv line 4 (lost.png): the image cannot be read: the file does not exist']
    """

    class_names: list[str] | None = None

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        num_classes: int | None = None,
        strict: bool = False,
        text_column: str = "text",
        resize: Resize = "crop",
        resample: Resample = "bicubic",
    ) -> None:
        if image_size is not None:
            check_int("image_size", image_size, 1)
        check_choice("resize", resize, Resize)
        check_choice("resample", resample, Resample)
        label_limit = 2**31 if num_classes is None else check_int("num_classes", num_classes, 1)
        self.root: Path = Path(root)
        self.image_size = image_size
        self.resize: Resize = resize
        self.resample: Resample = resample
        self.text_column = text_column
        rows = list(read_rows(self.root, text_column, ("coarse_label",)))
        self.file_names: list[str] = []
        self.texts: list[str] = []
        self.labels: list[int] = []
        self.present: list[bool] = []
        self.skipped: list[str] = []
        self._images: Any = self._allocate(len(rows))
        coarse_labels: list[int] = []
        items = self._read(rows, label_limit, strict)
        self.digest: str = self._fill(items, coarse_labels)
        if not self.labels:
            first = f"; the first row: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"{self.root} has no usable row in metadata.csv{first}")
        has_coarse_labels = any("coarse_label" in row.fields for row in rows)
        self.coarse_labels: list[int] | None = coarse_labels if has_coarse_labels else None
        self.num_classes: int = max(self.labels) + 1 if num_classes is None else num_classes
        if image_size is None:
            self._fill_blanks()
        else:
            self._images = self._images[: len(self.labels)]

    def _allocate(self, rows: int) -> torch.Tensor | list[torch.Tensor | None]:
        """Return an uninitialized tensor for all images, or a list if ``image_size`` is None.

        Skipped rows leave the end of the tensor unwritten, so that it takes no physical memory.
        """
        if self.image_size is None:
            return []
        size = rows * 3 * self.image_size**2
        memory = physical_memory()
        if memory is not None and size > memory:
            raise ValueError(
                f"{self.root}: got {rows} rows, which need {size / 2**30:.1f} GiB at image_size "
                f"{self.image_size}, expected at most the {memory / 2**30:.1f} GiB of this machine"
            )
        return torch.empty(rows, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def _read(
        self,
        rows: list[Row],
        label_limit: int,
        strict: bool,
    ) -> Iterator[Item]:
        """Yield the usable rows in order, and add a sentence to ``skipped`` for each other row."""
        loaded = _in_threads(lambda row: self._load(row, label_limit), rows)
        for row, result in zip(rows, loaded, strict=True):
            if isinstance(result, Item):
                yield result
                continue
            name = row.fields.get("file_name", "").encode("utf-8", "replace").decode()[:200]
            sentence = f"metadata.csv line {row.line} ({name or 'no file_name'}): {result}"
            if strict:
                raise ValueError(sentence) from result
            self.skipped.append(sentence)

    def _load(self, row: Row, label_limit: int) -> Item | BrokenRow:
        try:
            if row.broken is not None:
                raise BrokenRow(row.broken)
            label = parse_label("label", row.fields["label"], label_limit)
            coarse = parse_label("coarse_label", row.fields.get("coarse_label", "0"), 2**31)
            name = row.fields["file_name"].strip()
            text = row.fields[self.text_column].strip()
            if not name and not text:
                raise BrokenRow(
                    f"file_name and {self.text_column} are both empty, expected at least one"
                )
            image, digest = self._load_image(name) if name else (None, None)
            return Item(name, text, label, coarse, image, digest)
        except BrokenRow as error:
            return error

    def _load_image(self, name: str) -> tuple[torch.Tensor, str]:
        try:
            data = read_picture(picture_path(self.root, name))
            image = decode(data, self.image_size, self.resize, self.resample)
            return image, hashlib.sha256(data).hexdigest()
        except BrokenPicture as error:
            raise BrokenRow(f"the image cannot be read: {error}") from error

    def _fill(self, items: Iterable[Item], coarse_labels: list[int]) -> str:
        """Store the items, append to ``coarse_labels``, and return the digest of the items."""
        total = hashlib.sha256()
        for row, item in enumerate(items):
            self.file_names.append(item.file_name)
            self.texts.append(item.text)
            self.labels.append(item.label)
            coarse_labels.append(item.coarse_label)
            self.present.append(item.image is not None)
            if self.image_size is None:
                self._images.append(item.image)
            elif item.image is None:
                self._images[row] = 0
            else:
                self._images[row] = item.image
            content = [item.text, item.label, item.coarse_label, item.digest]
            total.update(json.dumps(content).encode())
        return total.hexdigest()

    def _fill_blanks(self) -> None:
        """Give each row without an image a zero image of the first image's shape."""
        smallest = torch.empty(3, 1, 1, dtype=torch.uint8)
        first = next((image for image in self._images if image is not None), smallest)
        blank = torch.zeros_like(first)
        self._images = [blank if image is None else image for image in self._images]

    @property
    def images(self) -> torch.Tensor | list[torch.Tensor]:
        """All images, as one tensor if ``image_size`` is set; missing images are zero."""
        return self._images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self._images[index],
            "image_present": self.present[index],
            "text": self.texts[index],
            "label": self.labels[index],
        }


def _in_threads(load: Callable[[Row], T], rows: list[Row]) -> Iterator[T]:
    """Yield ``load(row)`` for each row in order, computed in several threads.

    Pillow releases the GIL while it decodes. At most four results per thread wait in memory.
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
    """Return the size of this machine's memory in bytes, or None if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def first_side(root: str | os.PathLike[str], text_column: str = "text") -> int | None:
    r"""Return the short side of a folder's first picture with a readable header, or None.

    Args:
        root: the folder, with a metadata.csv as :class:`ProductFolder` reads it.
        text_column: name of the column with the texts.

    Returns:
        The short side in pixels; None if no picture has a readable header.

    Raises:
        FileNotFoundError: ``root`` does not exist or has no metadata.csv.
        ValueError: metadata.csv is unreadable, or a column is missing or occurs twice.

    Examples:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from mmfused.data import first_side
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Image.new("RGB", (40, 30)).save(pathlib.Path(root, "mug.png"))
        ...     rows = "file_name,text,label\nmug.png,Red mug,0\n"
        ...     size = pathlib.Path(root, "metadata.csv").write_text(rows)
        ...     first_side(root)
        30
    """
    for row in read_rows(Path(root), text_column):
        name = row.fields.get("file_name", "").strip()
        if row.broken is None and name:
            try:
                return short_side(picture_path(Path(root), name))
            except BrokenPicture:
                continue
    return None
