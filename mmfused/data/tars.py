"""Read the rows of WebDataset tars by an index of their members."""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfused.json_files import one_line

from .jsonl import ObjectRows, parse_object
from .lines import MAX_LINE
from .picture_files import SUFFIXES, TarPictures
from .rows import BrokenRow, Names, Table

# First bytes of files compressed by gzip, bzip2, xz and zstd.
COMPRESSED = re.compile(rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ|\x28\xb5\x2f\xfd")
# WebDataset's rule: a member's key ends before the first dot of its base name.
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
# Members that hold the default columns.
MEMBERS = {"text": "txt", "label": "cls"}


class CutTar(ValueError):
    """A tar cannot be read on; the message gives the reason."""


@dataclass
class Sample:
    """The members of a tar with the same key: (start, size) in bytes by suffix."""

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    fault: str | None = None


@dataclass
class Where:
    """Names rows by their tars and keys."""

    tars: list[str]
    tar: array[int]
    keys: list[str]

    def __call__(self, row: int) -> str:
        """Return the name of a row."""
        tar, key = os.path.basename(self.tars[self.tar[row]]), self.keys[row]
        return f"{tar} sample {key!a:.200}" if key else tar


def read_tars(root: Path, tars: list[Path], names: Names) -> Table:
    """Return the rows of WebDataset tars, in the order of ``tars``.

    A row is a run of members with the same key, their name up to the first dot of the base name. A
    member with a suffix of ``SUFFIXES`` is the picture; a column called "image" other than the
    default is the suffix of its member. Other columns are a member with that suffix (.txt for
    "text", .cls for "label"), or else a field of the object in the .json member. A row may have no
    picture and no text.

    Of a tar that is cut or damaged, the rows before the fault are read, and one broken row that is
    named after the tar stands for all others.

    Raises:
        ValueError: a tar is compressed, or no row has a column of ``names.needed``.
    """
    reader = _Reader(names)
    for index, path in enumerate(tars):
        reader.read(index, path)
    columns = reader.rows.finish(root)
    paths = [str(path) for path in tars]
    return Table(
        root.name,
        columns,
        TarPictures(paths, reader.tar, reader.start, reader.size),
        Where(paths, reader.tar, reader.keys),
        reader.rows.builder.broken,
    )


class _Reader:
    def __init__(self, names: Names) -> None:
        self.names = names
        self.rows = ObjectRows(names, sparse=True)
        self.tar, self.start, self.size = array("q"), array("q"), array("q")
        self.keys: list[str] = []

    def read(self, index: int, path: Path) -> None:
        """Add the rows of a tar."""
        try:
            # Texts are read at their places while the members are listed from the other file.
            file, texts = open(path, "rb"), open(path, "rb", buffering=0)
        except OSError as error:
            self._add_cut(index, f"the tar cannot be read: {error.strerror}")
            return
        with file, texts:
            if COMPRESSED.match(file.read(10)):
                raise ValueError(f"{path}: got a compressed tar, expected one without compression")
            sample = None
            try:
                for key, suffix, span, fault in members(file):
                    if sample is None or key != sample.key:
                        self._add(index, texts.fileno(), sample)
                        sample = Sample(key)
                    if suffix in sample.spans:
                        sample.fault = sample.fault or f"it has two members .{suffix}"
                    sample.fault = sample.fault or fault
                    sample.spans[suffix] = span
                self._add(index, texts.fileno(), sample)
            except CutTar as error:
                # Other members of the last row may be lost.
                if sample is not None and self._is_whole(texts.fileno(), sample):
                    self._add(index, texts.fileno(), sample)
                self._add_cut(index, str(error))

    def _add_cut(self, index: int, reason: str) -> None:
        self.rows.builder.add_broken("", reason)
        self._place(index, "", None)

    def _add(self, index: int, file: int, sample: Sample | None) -> None:
        if sample is None:
            return
        if not self.keys:
            self.rows.note(sample.spans)
        span = None
        try:
            span = sample.spans.get(self._picture_of(sample) or "")
            self.rows.add(self._fields_of(file, sample))
        except BrokenRow as error:
            self.rows.builder.add_broken(sample.key, str(error))
        self._place(index, sample.key, span)

    def _place(self, index: int, key: str, span: tuple[int, int] | None) -> None:
        start, size = span or (0, -1)
        self.tar.append(index)
        self.start.append(start)
        self.size.append(size)
        self.keys.append(key)

    def _picture_of(self, sample: Sample) -> str | None:
        """Return the suffix of the picture's member."""
        if not self.names.image:
            return None
        if self.names.image != "image":
            return self.names.image if self.names.image in sample.spans else None
        found = [suffix for suffix in sample.spans if f".{suffix}" in SUFFIXES]
        if len(found) > 1:
            raise BrokenRow(f"it has two pictures, .{found[0]} and .{found[1]}")
        return found[0] if found else None

    def _fields_of(self, file: int, sample: Sample) -> dict[str, Any]:
        """Return the columns by name, those that the row has."""
        if sample.fault is not None:
            raise BrokenRow(sample.fault)
        spans, names = sample.spans, self.names
        fields = parse_object(_text_at(file, spans["json"])) if "json" in spans else {}
        fields.pop(names.image, None)
        for name in (*names.text, names.label, names.coarse_label):
            suffix = name if name in spans else MEMBERS.get(name, name)
            if suffix in spans and suffix != "json":
                fields[name] = _text_at(file, spans[suffix])
        suffix = self._picture_of(sample)
        if suffix is not None:
            fields[names.image] = f"{sample.key}.{suffix}"
        return fields

    def _is_whole(self, file: int, sample: Sample) -> bool:
        """Return whether a row has all that it can have."""
        try:
            fields, names = self._fields_of(file, sample), self.names
        except BrokenRow:
            return True
        return all(name in fields for name in (names.image, *names.text, names.label) if name)


def members(file: Any) -> Iterator[tuple[str, str, tuple[int, int], str | None]]:
    """Yield key, suffix, (start, size) in bytes and a fault of each member of a tar.

    Raises:
        CutTar: the tar is cut or damaged.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        tar: Any = tarfile.open(fileobj=file, mode="r:")
        with tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep all of them
                start, size = member.offset_data, member.size
                if member.isreg() and start + size > end:
                    raise CutTar(_cut_at(end))
                found = KEY.fullmatch(member.name)
                if found is None or member.isdir():
                    continue
                is_file = member.isreg() and not member.issparse()
                fault = None if is_file else "a member is not a regular file"
                yield found[1], found[2].lower(), (start, size), fault
            at = tar.offset
    except CutTar:
        raise
    # For damaged headers, tarfile raises many types: TarError, ValueError and others.
    except Exception as error:
        raise CutTar(f"the tar is cut or damaged: {one_line(error)}") from error
    # tarfile ends in silence at a damaged header; a whole tar ends with zeros.
    file.seek(at)
    block = file.read(512)
    if block != bytes(512):
        raise CutTar(_cut_at(end) if len(block) < 512 else f"the tar is damaged at byte {at}")


def _cut_at(end: int) -> str:
    return f"the tar is cut at byte {end}: its other rows are lost"


def _text_at(file: int, span: tuple[int, int]) -> str:
    start, size = span
    if size > MAX_LINE:
        raise BrokenRow(f"it has a text of more than {MAX_LINE} bytes")
    try:
        os.lseek(file, start, os.SEEK_SET)  # not pread, which Windows lacks
        return os.read(file, size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenRow("it holds bytes that are not UTF-8") from error
    except OSError as error:
        raise BrokenRow(f"it cannot be read: {error.strerror}") from error
