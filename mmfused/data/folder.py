"""Any folder of product images with a metadata.csv."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ._common import check_int

# What Pillow raises for a file that is missing, is no image, is cut short, or is implausibly large.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class BrokenRow(ValueError):
    """One row of metadata.csv that cannot be used; its message is the sentence for the user."""


class ProductFolder(Dataset):
    """Images, texts and labels of ``root``, read from ``root/metadata.csv`` (UTF-8).

    Columns ``file_name`` (relative to root), ``text`` and ``label`` (integer >= 0), and ``coarse_label`` (the same) where labels
    have families: ``.coarse_labels``, None without that column; others are ignored. An empty file_name or text is a missing
    modality: a zero image with ``image_present`` False, or the text ``""``. A row with neither, with a bad label, or whose
    image cannot be decoded is left out, one sentence about it in ``.skipped``.

    Item: ``{"image": uint8 (3, H, W), "image_present": bool, "text": str, "label": int}``; images are decoded once
    and kept in memory.

    Args:
        image_size: short side resized to this, then centre crop; None keeps each image's own size.
        text_column: the column that texts are read from in place of ``text``.
        num_classes: labels must be below it; None takes the largest label + 1.
        strict: the first broken row raises ValueError with its sentence.

    Raises:
        FileNotFoundError: no folder, or no metadata.csv in it.
        ValueError: metadata.csv unreadable, a column missing, no usable row, or (strict) a broken row.
    """

    class_names = None

    def __init__(self, root, *, image_size: int | None = None, num_classes: int | None = None, strict: bool = False,
                 text_column: str = "text"):  # fmt: skip
        if image_size is not None:
            check_int("image_size", image_size, 1)
        # 2**31 keeps a label inside every integer type used downstream, and a typing slip out of the class count.
        label_limit = 2**31 if num_classes is None else check_int("num_classes", num_classes, 1)
        self.root = Path(root)
        self.image_size = image_size
        self.text_column = text_column
        self.file_names: list[str] = []
        self.texts: list[str] = []
        self.labels: list[int] = []
        self.coarse_labels: list[int] | None = []
        self.skipped: list[str] = []
        self._images: list[torch.Tensor | None] = []
        rows = read_metadata(self.root, text_column)
        for line, row in rows:
            try:
                self._add(row, label_limit)
            except BrokenRow as error:
                sentence = f"metadata.csv line {line} ({row.get('file_name') or 'no file_name'}): {error}"
                if strict:
                    raise ValueError(sentence) from error
                self.skipped.append(sentence)
        if not self.labels:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"root has no usable row in {self.root / 'metadata.csv'}{first}")
        if "coarse_label" not in rows[0][1]:
            self.coarse_labels = None
        self.num_classes = max(self.labels) + 1 if num_classes is None else num_classes
        self._blank = self._blank_image()

    def _add(self, row: dict, label_limit: int) -> None:
        if None in row or None in row.values():
            raise BrokenRow("the row's number of fields differs from the header's, an unquoted comma perhaps")
        label = parse_label("label", row["label"], label_limit)
        coarse = parse_label("coarse_label", row.get("coarse_label", "0"), 2**31)
        name, text = row["file_name"].strip(), row[self.text_column].strip()
        if not name and not text:
            raise BrokenRow(f"file_name and {self.text_column} are both empty, at least one must be given")
        image = self._decode(name) if name else None
        self._images.append(image)
        self.file_names.append(name)
        self.texts.append(text)
        self.labels.append(label)
        self.coarse_labels.append(coarse)

    def _decode(self, name: str) -> torch.Tensor:
        try:
            with Image.open(self.root / name) as image:
                return load_rgb(image, self.image_size)
        except IMAGE_ERRORS as error:
            reason = "the file does not exist" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
            raise BrokenRow(f"the image cannot be read: {reason}") from error

    def _blank_image(self) -> torch.Tensor:
        """The zero image of rows without one, of the first image's shape so that equal sizes stay equal."""
        for image in self._images:
            if image is not None:
                return torch.zeros_like(image)
        side = self.image_size or 1
        return torch.zeros(3, side, side, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image = self._images[index]
        present = image is not None
        return {
            "image": image if present else self._blank,
            "image_present": present,
            "text": self.texts[index],
            "label": self.labels[index],
        }


def read_metadata(root: Path, text_column: str = "text") -> list[tuple[int, dict]]:
    """(line number, row) of every row of ``root/metadata.csv``; the line is the one the row ends on."""
    path = root / "metadata.csv"
    if not root.is_dir():
        raise FileNotFoundError(f"root takes a folder with a metadata.csv, got {root}, which is not a folder")
    if not path.is_file():
        raise FileNotFoundError(f"root takes a folder with a metadata.csv, got {root}, which has none")
    try:
        # utf-8-sig: spreadsheet programs write a byte order mark, which would become part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            columns = ("file_name", text_column, "label")
            missing = [column for column in columns if column not in header]
            if missing:
                expected = f"file_name, {text_column} and label"
                raise ValueError(f"{path} takes a header line with {expected}, got a first line without {missing}")
            return [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} takes UTF-8 text, got a byte that is not at position {error.start}") from error
    except csv.Error as error:
        raise ValueError(f"{path} takes comma-separated values, got a file that cannot be read as such: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def parse_label(column: str, value: str, limit: int) -> int:
    digits = value.strip()
    # isdigit alone lets through digits of other scripts, and int() alone "1_0"; 18 digits always fit an int64.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18 and int(digits) < limit):
        raise BrokenRow(f"{column} takes an integer from 0 to {limit - 1}, got {value!r}")
    return int(digits)


def load_rgb(image: Image.Image, size: int | None) -> torch.Tensor:
    """uint8 (3, H, W); with ``size``, the short side is scaled to it and the centre (size, size) kept."""
    image = image.convert("RGB")
    if size is not None:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
