"""Read a folder of product images, their texts and labels."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ._common import Resample, Resize, check_choice, check_int
from .folder_rows import FolderRows, shared_ints, source_columns
from .labels import LabelKind
from .picture_files import FilePictures
from .pictures import BrokenPicture, decode, read_header

# Kept importable from this module for existing callers.
from .pictures import load_rgb as load_rgb
from .quiet import quiet
from .reading import Lost, Read, SelectedImages, StreamedImages, checked, decoded
from .splits import Splits, checked_rows
from .strings import Strings, release_memory
from .tables import Pictures, open_table

F = TypeVar("F", bound="ProductFolder")

# Pictures that take more memory are decoded on demand, unless `stream` says otherwise.
IN_MEMORY = 2**30


class ProductFolder(Splits, Dataset[dict[str, Any]]):
    r"""A dataset of images, texts and labels, such as those that ``root/metadata.csv`` lists.

    A metadata.csv (UTF-8) has the columns ``file_name`` (path below ``root``), ``text`` and
    ``label``. The optional column ``coarse_label`` is the index of the group that the label belongs
    to. Other columns are ignored. If ``file_name`` is empty, the item has no image: its image is
    zero and ``image_present`` is False. If ``text`` is empty, the item has no text.

    A row is skipped if it is not well-formed, has neither an image nor a text, has an invalid label
    or coarse label, or has an image that :func:`load_picture` cannot load.
    ``.skipped`` has one sentence about each skipped row.

    An item is ``{"image": uint8 (3, H, W), "image_present": bool, "text": str, "label": int}``.
    ``.coarse_labels`` is None without the column ``coarse_label``. ``.select`` and ``.split`` give
    sets of some of the items.

    Images are decoded once and kept in memory, or, if the set is streamed, each time an item is
    read. A streamed set (``.streamed``) keeps tens of bytes per row besides its texts and names. At
    the start it only checks that each file exists and begins like a picture. If a picture cannot be
    decoded later, its item counts as one without an image, and ``.lost`` has a sentence about it.

    ``.digest`` is the SHA-256 of texts, labels, coarse labels and picture files. ``.fingerprint``
    is a SHA-256 of the same, but only of the size and the ends of each file. It is equal for a set
    in memory and a streamed set, whose ``.digest`` is its ``.fingerprint``.

    Args:
        root: the folder, or a file, in a format that ``mmfused.data.tables.open_table`` reads.
        image_size: side of the square to which images are resized; None keeps the size of each
            image.
        num_classes: number of classes; labels must be smaller. None takes the largest label + 1, or
            the number of names.
        strict: raise ValueError for the first invalid row instead of skipping it.
        text_column: name of the column with the texts.
        resize: "crop", "stretch" or "shortest", how an image becomes a square, see `load_picture`.
        resample: the interpolation, "bicubic" or "bilinear".
        format: name of the format; None detects it.
        columns: names of the source's columns by "image", "text", "label" and "coarse_label".
        split: the part to read of a format that publishes several in one folder.
        labels: "index" if labels are integers of at least 0, "name" if each distinct label is the
            name of a class. "auto" leaves it to the format; if that has no rule, labels are names
            if most of them are no numbers. ``.class_names`` has the names in the order of the
            classes: that of the source if it has one, else by number if all are integers, else
            alphabetically. It is None if labels are indices.
        class_names: the names of the classes of the training data, among which labels must be.
        stream: whether to stream the images; None streams if ``image_size`` is given and all images
            would take more than 1 GiB.
        needs_label: whether a row without a label is skipped; if not, its label is -1.

    Raises:
        FileNotFoundError: ``root`` does not exist, or lacks a file of ``format``.
        ValueError: an argument is invalid, the format is unknown, the rows are unreadable, a column
            is missing or occurs twice, no row is usable, there are more names than ``num_classes``,
            or images that are not streamed do not fit into this machine's memory. With ``strict``,
            also if a row is invalid.

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
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        split: str = "train",
        labels: LabelKind = "auto",
        class_names: Sequence[str] | None = None,
        stream: bool | None = None,
        needs_label: bool = True,
    ) -> None:
        if image_size is not None:
            check_int("image_size", image_size, 1)
        check_choice("resize", resize, Resize)
        check_choice("resample", resample, Resample)
        check_choice("labels", labels, LabelKind)
        if num_classes is not None:
            check_int("num_classes", num_classes, 1)
        self.root: Path = Path(root)
        self.image_size = image_size
        self.resize: Resize = resize
        self.resample: Resample = resample
        columns = source_columns(columns, text_column)
        self.text_column: str = columns.get("text", "text")
        table = open_table(
            self.root, format=format, columns=columns, split=split, needs_label=needs_label
        )
        self.streamed: bool = self._is_streamed(table.columns.num_rows, stream)
        rows = FolderRows(table, labels, class_names, num_classes, needs_label)
        rows.find_empty(self.text_column)
        self._pictures: Pictures = table.pictures
        self._where: Any = table.where
        kept = self._read(rows, strict)
        self.skipped: list[str] = [rows.sentence(row) for row in sorted(rows.faults)]
        if strict and self.skipped:
            raise ValueError(self.skipped[0])
        if not len(kept):
            first = f"; the first row: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"{self.root} has no usable row in {table.source}{first}")
        self._rows: np.ndarray = kept  # of the table, for each item
        self._order: np.ndarray | None = None  # of the images in memory, for each item
        self._lost = Lost()
        self.file_names: Strings = rows.images.take(kept)
        self.texts: Strings = rows.texts.take(kept)
        self.labels: list[int] = shared_ints(rows.labels[kept])
        self.present: list[bool] = rows.has_image[kept].tolist()
        self.coarse_labels: list[int] | None = None
        if rows.has_coarse_labels:
            self.coarse_labels = shared_ints(rows.coarse_labels[kept])
        self.class_names: list[str] | None = rows.class_names
        self.num_classes: int = num_classes or len(rows.class_names or ()) or max(self.labels) + 1
        del table, rows
        release_memory()

    def _is_streamed(self, rows: int, stream: bool | None) -> bool:
        """Return whether pictures are streamed; raise if they do not fit into memory."""
        size = 0 if self.image_size is None else rows * 3 * self.image_size**2
        is_streamed = size > IN_MEMORY if stream is None else stream
        memory = physical_memory()
        if not is_streamed and memory is not None and size > memory:
            raise ValueError(
                f"{self.root}: got {rows} rows, which need {size / 2**30:.1f} GiB at image_size "
                f"{self.image_size}, expected at most the {memory / 2**30:.1f} GiB of this machine"
            )
        return is_streamed

    def _read(self, rows: FolderRows, strict: bool) -> np.ndarray:
        """Read the pictures; return the usable rows, and add the other rows to ``rows.faults``.

        With ``strict``, reading ends at the first fault.
        """
        usable = rows.usable(before_faults=strict)
        images = self._allocate(len(usable))
        digest, fingerprint = hashlib.sha256(), hashlib.sha256()
        if rows.class_names is not None:
            digest.update(json.dumps(rows.class_names).encode())
            fingerprint = digest.copy()
        kept: list[int] = []
        reads = self._read_pictures(rows, usable)
        for row, text in zip(usable.tolist(), rows.texts.take(usable), strict=True):
            read = next(reads) if rows.has_image[row] else None
            if isinstance(read, BrokenPicture):
                rows.faults[row] = f"the image cannot be read: {read}"
                if strict:
                    break
                continue
            if not self.streamed:
                _put(images, len(kept), None if read is None else read.image)
            kept.append(row)
            content = [text, int(rows.labels[row]), int(rows.coarse_labels[row])]
            ends = None if read is None else read.fingerprint.hex()
            fingerprint.update(json.dumps([*content, ends]).encode())
            if not self.streamed:
                file = None if read is None else read.digest
                digest.update(json.dumps([*content, file]).encode())
        self.fingerprint: str = fingerprint.hexdigest()
        self.digest: str = self.fingerprint if self.streamed else digest.hexdigest()
        # Skipped rows leave the end of a tensor unwritten, so that it takes no physical memory.
        self._images: Any = (
            _with_blanks(images) if isinstance(images, list) else images[: len(kept)]
        )
        return np.array(kept, dtype=np.int64)

    def _allocate(self, rows: int) -> torch.Tensor | list[torch.Tensor | None]:
        """Return an uninitialized tensor for all images, or a list if sizes differ."""
        if self.image_size is None or self.streamed:
            return []
        return torch.empty(rows, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def _read_pictures(
        self, rows: FolderRows, usable: np.ndarray
    ) -> Iterator[Read | BrokenPicture]:
        """Yield what is read of each usable row with a picture, in order."""
        found = usable[rows.has_image[usable]]
        if not self.streamed:
            size, resize, resample = self.image_size, self.resize, self.resample
            return decoded(self._pictures, found.tolist(), size, resize, resample)
        # Only the names of files tell whether two rows have one picture.
        names = rows.images.take(found) if isinstance(self._pictures, FilePictures) else None
        return checked(self._pictures, found, names)

    @property
    def images(self) -> Any:
        """All images; missing images are zero.

        With ``image_size`` and without streaming, it is one tensor, (N, 3, S, S) uint8; else a
        sequence of (3, H, W) tensors, which a streamed set decodes at each access.
        """
        if self.streamed:
            return StreamedImages(self._image, len(self))
        return self._images if self._order is None else SelectedImages(self._images, self._order)

    @property
    def lost(self) -> list[str]:
        """A sentence about each picture of a streamed set that could not be decoded later."""
        return self._lost.sentences()

    def load_image(
        self,
        row: int,
        size: int | None,
        resize: Resize = "crop",
        resample: Resample = "bicubic",
    ) -> torch.Tensor:
        """Decode the picture of an item; several threads may call it at once.

        Args:
            row: index of the item.
            size: side of the square, as for :func:`load_picture`.
            resize: how the picture becomes a square.
            resample: the interpolation.

        Returns:
            (3, size, size) uint8; (3, H, W) if ``size`` is None.

        Raises:
            BrokenPicture: the item has no picture, or it can no longer be decoded; ``.lost`` then
                has a sentence about it.
        """
        if not self.present[row]:
            raise BrokenPicture("the row has no picture")
        source = int(self._rows[row])
        try:
            with quiet():
                return decode(self._pictures.read(source), size, resize, resample)
        except BrokenPicture as error:
            name = f"{self._where(source)} ({self.file_names[row]:.200})"
            self._lost.add(source, f"{name}: the image cannot be read: {error}")
            raise

    def read_picture(self, row: int) -> bytes:
        """Return the bytes of the picture file of an item that has one; thread-safe.

        Raises:
            BrokenPicture: the file can no longer be read.
        """
        return self._pictures.read(int(self._rows[row]))

    def select(self: F, rows: Sequence[int] | np.ndarray) -> F:
        """Return the data set of only some items, which shares the pictures with this one.

        Args:
            rows: indices of the items, at least one.

        Raises:
            ValueError: ``rows`` is empty or has an index that is out of range.
        """
        found = checked_rows(rows, len(self))
        part = copy.copy(self)
        part.file_names, part.texts = self.file_names.take(found), self.texts.take(found)
        for name in ("labels", "coarse_labels", "present"):
            values = getattr(self, name)
            if values is not None:
                setattr(part, name, [values[row] for row in found.tolist()])
        part.skipped = []
        part._rows = self._rows[found]
        part._order = found if self._order is None else self._order[found]
        for name in ("digest", "fingerprint"):
            content = getattr(self, name).encode() + found.astype("<i8").tobytes()
            setattr(part, name, hashlib.sha256(content).hexdigest())
        return part

    def relabel(self, numbers: np.ndarray, class_names: list[str]) -> None:
        """Replace the labels, and the names of their classes.

        Args:
            numbers: (C,) int64, the new label of each old one.
            class_names: the names in the order of the new labels.
        """
        self.labels = numbers[self.labels].tolist()
        self.class_names = class_names
        self.num_classes = len(class_names)

    def _image(self, row: int) -> torch.Tensor:
        """Return the image of an item of a streamed set, zeros if it has none."""
        return self._find_image(row)[0]

    def _find_image(self, row: int) -> tuple[torch.Tensor, bool]:
        if not self.streamed:
            return self._images[row if self._order is None else self._order[row]], self.present[row]
        try:
            return self.load_image(row, self.image_size, self.resize, self.resample), True
        except BrokenPicture:
            side = self.image_size or 1
            return torch.zeros(3, side, side, dtype=torch.uint8), False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, is_present = self._find_image(index)
        return {
            "image": image,
            "image_present": is_present,
            "text": self.texts[index],
            "label": self.labels[index],
        }


def _put(images: torch.Tensor | list[torch.Tensor | None], row: int, image: Any) -> None:
    if isinstance(images, list):
        images.append(image)
    elif image is None:
        images[row] = 0
    else:
        images[row] = image


def _with_blanks(images: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Replace missing images by zero images of the first image's shape."""
    smallest = torch.empty(3, 1, 1, dtype=torch.uint8)
    blank = torch.zeros_like(next((image for image in images if image is not None), smallest))
    return [blank if image is None else image for image in images]


def physical_memory() -> int | None:
    """Return the size of this machine's memory in bytes, or None if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def first_side(
    root: str | os.PathLike[str],
    text_column: str = "text",
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
) -> int | None:
    r"""Return the short side of a folder's first picture with a readable header, or None.

    Args:
        root: the folder, which :class:`ProductFolder` reads with the same arguments.
        text_column: name of the column with the texts.
        format: name of the format; None detects it.
        columns: names of the source's columns by "image", "text", "label" and "coarse_label".
        split: the part to read of a format that publishes several in one folder.

    Returns:
        The short side in pixels; None if no picture has a readable header.

    Raises:
        FileNotFoundError: ``root`` does not exist, or lacks a file of ``format``.
        ValueError: the rows are unreadable, or a column is missing or occurs twice.

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
    columns = source_columns(columns, text_column)
    table = open_table(root, format=format, columns=columns, split=split, needs_label=False)
    for row, name in enumerate(Strings(table.columns["image"])):
        if name and row not in table.broken:
            try:
                with quiet():
                    return min(read_header(table.pictures.read(row))[1:])
            except BrokenPicture:
                continue
    return None
