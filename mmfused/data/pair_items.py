"""The distinct items of a set of pairs: texts, instructions and pictures."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from ._common import Resample, Resize
from .pictures import MAX_BYTES, BrokenPicture, decode, picture_path, read_picture
from .quiet import quiet
from .ragged import PackedStrings, Ragged, offsets_of
from .reading import Lost
from .rows import BrokenRow

IMAGE_MARK = "<|IMAGE|>"
# The places of pictures in texts of UNITE, and in those of MMEB.
_MARKS = re.compile(r"\s*<\|(?:IMAGE|VIDEO|image_\d{1,9})\|>\s*")
_not_a_name = re.compile("[\0\ud800-\udfff]").search
_NUMBERED = re.compile(r"<\|image_\d{1,9}\|>")


def without_marks(text: str) -> str:
    r"""Return a text without the marks of its pictures.

    Examples:
        >>> from mmfused.data.pair_items import without_marks
        >>> without_marks("<|image_1|>\nWhat is it?"), without_marks("like <|IMAGE|> but red")
        ('What is it?', 'like but red')
    """
    if "<|" in text:
        text = _MARKS.sub(lambda mark: "\n" if "\n" in mark.group() else " ", text)
    return text.strip()


class Spec(NamedTuple):
    """An item that is checked, but not yet part of a set."""

    text: bytes  # UTF-8
    instruction: bytes
    files: tuple[int, ...]  # numbers of the picture files
    key: bytes  # equal for equal items


class PictureFiles:
    """The distinct picture files of a set, in one or more folders."""

    def __init__(self) -> None:
        self.roots: list[Path] = []
        self.names: PackedStrings = PackedStrings()  # relative to the root
        self.root_of: array[int] = array("i")  # index of the root of each file
        self.sizes: array[int] = array("q")  # in bytes


class PairItems(Dataset[dict[str, Any]]):
    r"""The distinct items of a :class:`PairSet`, which are read from files when they are needed.

    A text may have marks such as ``<|IMAGE|>`` or ``<|image_1|>`` in the places of its pictures.
    ``texts`` are for models that take a text and a picture: the instruction and the text on lines
    of their own, without marks. ``sequence_item`` is for `mmfused.models.UNITEProcessor`.

    An item of the dataset is ``{"image": uint8 (3, H, W), "image_present": bool, "text": str,
    "label": 0}``, where the image is the first picture in its full size.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from PIL import Image
        >>> from mmfused.data import open_pairs
        >>> row = {"qry": "<|image_1|>\nWhat?", "qry_image_path": "1.png", "pos_text": "A mug"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30)).save(pathlib.Path(folder, "1.png"))
        ...     size = pathlib.Path(folder, "train.json").write_text(json.dumps([row]))
        ...     items = open_pairs(folder).items
        ...     item = items.sequence_item(0)
        >>> list(items.texts), items.present.tolist(), items.files_of(0)
        (['What?', 'A mug'], [True, False], ['1.png'])
        >>> item["text"], [picture.shape for picture in item["image"]]
        ('<|IMAGE|>\nWhat?', [torch.Size([3, 30, 40])])
    """

    streamed = True
    class_names: list[str] | None = None
    num_classes = 1
    image_size: int | None = None  # pictures have the size of their files

    def __init__(
        self,
        raw_texts: PackedStrings,
        instructions: PackedStrings,
        files: PictureFiles,
        pictures: Ragged,
    ) -> None:
        self.raw_texts = raw_texts  # with marks, and without instructions
        self.instructions = instructions
        self.files = files
        self.pictures = pictures  # the numbers of the picture files of each item
        self.present: np.ndarray = pictures.sizes > 0  # whether each item has a picture, (N,) bool
        self.labels: np.ndarray = np.zeros(len(self), np.int64)  # items have no labels
        self._lost = Lost()

    def __len__(self) -> int:
        return len(self.raw_texts)

    @property
    def texts(self) -> Sequence[str]:
        """The instruction and the text of each item, without the marks of pictures."""
        return _PlainTexts(self)

    @property
    def lost(self) -> list[str]:
        """A sentence about each picture that could not be decoded when it was needed."""
        return self._lost.sentences()

    def lose(self, row: int, reason: str) -> None:
        """Record that the pictures of an item cannot be used."""
        names = ", ".join(self.files_of(row))
        self._lost.add(int(self.pictures[row][0]), f"{names}: the image cannot be used: {reason}")

    def files_of(self, row: int) -> list[str]:
        """Return the names of the picture files of an item."""
        return [self.files.names[file] for file in self.pictures[row]]

    def load_image(
        self,
        row: int,
        size: int | None,
        resize: Resize = "crop",
        resample: Resample = "bicubic",
    ) -> torch.Tensor:
        """Return the first picture of an item, uint8 (3, size, size); any thread may call it.

        Raises:
            BrokenPicture: the item has no picture, or its file cannot be read.
        """
        files = self.pictures[row]
        if not len(files):
            raise BrokenPicture("the item has no picture")
        return self._load(files[0], size, resize, resample)

    def _load(
        self,
        file: int,
        size: int | None = None,
        resize: Resize = "crop",
        resample: Resample = "bicubic",
    ) -> torch.Tensor:
        name = self.files.names[file]
        try:
            path = picture_path(self.files.roots[self.files.root_of[file]], name)
            with quiet():
                return decode(read_picture(path), size, resize, resample)
        except BrokenPicture as error:
            self._lost.add(file, f"{name}: the image cannot be read: {error}")
            raise BrokenPicture(f"{name}: {error}") from error

    def sequence_item(self, row: int) -> dict[str, Any]:
        """Return an item for `UNITEProcessor`: "text", "instruction" and "image", a list.

        Raises:
            BrokenPicture: a picture's file cannot be read.
        """
        files = self.pictures[row]
        text = _NUMBERED.sub(IMAGE_MARK, self.raw_texts[row])
        if text.count(IMAGE_MARK) != len(files) or "<|VIDEO|>" in text:
            text = without_marks(text)  # the pictures then precede the text
        item: dict[str, Any] = {"text": text, "instruction": self.instructions[row]}
        item = {key: value for key, value in item.items() if value}
        return item | ({"image": [self._load(file) for file in files]} if len(files) else {})

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        present = bool(self.present[index])
        blank = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return {
            "image": self.load_image(index, None) if present else blank,
            "image_present": present,
            "text": self.texts[index],
            "label": 0,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the texts, instructions, and names and sizes of the picture files."""
        total = hashlib.sha256()
        for strings in (self.raw_texts, self.instructions, self.files.names):
            for part in strings.buffers:
                total.update(part)
        for numbers in (self.files.root_of, self.files.sizes):
            total.update(numbers)
        for part in self.pictures.arrays:
            total.update(part.data)
        return total.hexdigest()


class _PlainTexts(Sequence[str]):
    def __init__(self, items: PairItems) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        parts = (self.items.instructions[index], self.items.raw_texts[index])
        return "\n".join(filter(None, map(without_marks, parts)))


class ItemBuilder:
    """Checks items and adds each distinct item once.

    Picture files are looked up once; they are opened only when a picture is needed.
    """

    def __init__(self) -> None:
        self.files: PictureFiles = PictureFiles()
        self._texts = PackedStrings()
        self._instructions = PackedStrings()
        self._pictures = array("i")  # the files of all items, one item after the other
        self._counts = array("i")  # number of files of each item
        self._rows: dict[bytes, int] = {}
        self._numbers: dict[str, int | str] = {}  # of the files below the root, or what is wrong
        self._folders: dict[str, str | None] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def enter(self, root: Path) -> None:
        """Look for the picture files of the following items below ``root``."""
        self.files.roots.append(root)
        self._numbers, self._folders = {}, {}

    def finish(self) -> PairItems:
        """Return the items; no more can be added."""
        pictures, counts = (np.array(x, np.int32) for x in (self._pictures, self._counts))
        pictures = Ragged(pictures, offsets_of(counts))
        return PairItems(self._texts, self._instructions, self.files, pictures)

    def spec(
        self,
        text: str,
        pictures: Sequence[str] = (),
        instruction: str = "",
    ) -> Spec:
        """Return a checked item.

        Raises:
            BrokenRow: the item has neither text nor picture, a text is not Unicode, or a picture
                file cannot be used.
        """
        if not pictures and not without_marks(text):
            raise BrokenRow("it has neither a text nor an image")
        words, order = _encoded(text), _encoded(instruction)
        files = tuple(map(self.file, pictures)) if pictures else ()
        head = b"%d %d %b" % (len(words), len(files), repr(files).encode() if files else b"")
        key = hashlib.blake2b(head + words + order, digest_size=16).digest()
        return Spec(words, order, files, key)

    def row(self, spec: Spec) -> int:
        """Return the row of an item, which is added if it is new."""
        row = self._rows.setdefault(spec.key, len(self._rows))
        if row == len(self):
            self._texts.add(spec.text)
            self._instructions.add(spec.instruction)
            self._pictures.extend(spec.files)
            self._counts.append(len(spec.files))
        return row

    def file(self, name: str) -> int:
        """Return the number of a picture file; raise BrokenRow if it cannot be used."""
        found = self._numbers.get(name)
        if found is None:
            try:
                found = self._checked_file(name)
            except BrokenPicture as error:
                shown = "".join(x if x.isprintable() else "?" for x in name[:200])
                found = f"the image cannot be read: {shown}: {error}"
            self._numbers[name] = found
        if isinstance(found, str):
            raise BrokenRow(found)
        return found

    def has_file(self, name: str) -> bool:
        """Return whether a picture file can be used."""
        try:
            return self.file(name) >= 0
        except BrokenRow:
            return False

    def _checked_file(self, name: str) -> int:
        root = self.files.roots[-1]
        status = _status(root, name, self._folders)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenPicture("it is not a regular file")
        if not 0 < status.st_size <= MAX_BYTES:
            raise BrokenPicture(f"it has {status.st_size} bytes, expected 1 to {MAX_BYTES}")
        self.files.names.add(name.encode())
        self.files.root_of.append(len(self.files.roots) - 1)
        self.files.sizes.append(status.st_size)
        return len(self.files.names) - 1


def _status(
    root: Path,
    name: str,
    folders: dict[str, str | None],
) -> os.stat_result:
    """Return the status of ``root / name``, which must not lead outside ``root``.

    Args:
        root: the folder.
        name: the name of the file.
        folders: the folders that were checked, with what is wrong or None; it is added to.
    """
    if _not_a_name(name):
        raise BrokenPicture("it is not a valid file name")
    # Resolving a path takes much longer than a look at a file, so it is done once per folder.
    folder = os.path.dirname(name)
    if folder not in folders:
        try:
            picture_path(root, folder)
            folders[folder] = None
        except BrokenPicture as error:
            folders[folder] = str(error)
    problem = folders[folder]
    if problem is not None or os.path.basename(name) in ("", "..", "."):
        raise BrokenPicture(problem or "it is not the name of a file")
    try:
        status = os.lstat(root / name)
        return os.stat(picture_path(root, name)) if stat.S_ISLNK(status.st_mode) else status
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenPicture("the file does not exist") from error
    except OSError as error:
        raise BrokenPicture(error.strerror or "it cannot be read") from error


def _encoded(text: str) -> bytes:
    text = text.strip()
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        is_byte = "\udc80" <= text[error.start] <= "\udcff"
        reason = "bytes that are not UTF-8" if is_byte else "a lone surrogate"
        raise BrokenRow(f"its text holds {reason}") from error
