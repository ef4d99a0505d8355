"""Where the picture files of a table are: in a folder, in Arrow columns, or in tars."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import pictures
from .pictures import BrokenPicture, picture_path, read_picture

# Bytes at either end of a file that its fingerprint is made of.
ENDS = 4096
# Suffixes of the names of picture files, in lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Folders whose real path is remembered.
MOST_FOLDERS = 2**16


class FilePictures:
    """Pictures in files below a folder, also through links that stay in the folder.

    Args:
        root: the folder.
        names: pyarrow ChunkedArray with the path of each row's picture relative to ``root``, or "".
    """

    def __init__(self, root: Path, names: Any) -> None:
        self.root = root
        self._names = names
        self._real_root = os.path.realpath(root)
        self._folders: dict[str, str | None] = {}

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's picture file."""
        return self.read_file(self._names[row].as_py())

    def fingerprint(self, row: int) -> bytes:
        """Return bytes that change with the size and the ends of a row's picture file."""
        return self.fingerprint_file(self._names[row].as_py())

    def read_file(self, name: str) -> bytes:
        """Return the bytes of the file called ``name``."""
        with _Opened(self._path(name)) as file:
            # Not `read_picture`, which asks for memory for the largest picture.
            return _read_at(file, 0, _size_of(file))

    def fingerprint_file(self, name: str) -> bytes:
        """Return the fingerprint of the file called ``name``."""
        with _Opened(self._path(name)) as file:
            return fingerprint_of(_size_of(file), lambda start, count: _read_at(file, start, count))

    def _path(self, name: str) -> str:
        """Return the path of a file, like `picture_path`, which looks up all its folders."""
        if not name:
            raise BrokenPicture("the row has no picture")
        folder, last = os.path.split(name)
        real = None if last in ("", ".", "..") or "\0" in name else self._real_folder(folder)
        path = None if real is None else os.path.join(real, last)
        # `islink` is False for a file that does not exist, which opening it tells.
        if path is None or os.path.islink(path):
            return str(picture_path(self.root, name))
        return path

    def _real_folder(self, folder: str) -> str | None:
        """Return the real path of a folder below the root, or None if it leads outside."""
        if folder not in self._folders:
            if len(self._folders) >= MOST_FOLDERS:
                self._folders.clear()
            real = os.path.realpath(os.path.join(self._real_root, folder))
            inside = Path(real).is_relative_to(self._real_root)
            self._folders[folder] = real if inside else None
            return real if inside else None
        return self._folders[folder]


class ArrowPictures:
    """Pictures in a pyarrow ChunkedArray of bytes, of names, or of structs of both.

    Args:
        column: strings, binaries, or structs with the fields "bytes" and "path".
        files: the pictures in files, for rows that have a name and no bytes.
    """

    def __init__(self, column: Any, files: FilePictures) -> None:
        self._column = column
        self._files = files

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's picture file."""
        data, name = self._find(row)
        return self._files.read_file(name) if data is None else read_picture(data)

    def fingerprint(self, row: int) -> bytes:
        """Return bytes that change with the size and the ends of a row's picture file."""
        data, name = self._find(row)
        if data is None:
            return self._files.fingerprint_file(name)
        return fingerprint_of(len(data), lambda start, count: data[start : start + count])

    def _find(self, row: int) -> tuple[bytes | None, str]:
        value = self._column[row].as_py()
        if isinstance(value, dict):
            data = value.get("bytes")
            value = (value.get("path") or "") if data is None else data
        return (value, "") if isinstance(value, bytes) else (None, value or "")


class TarPictures:
    """Pictures at known places in uncompressed tars.

    Args:
        tars: paths of the tars.
        tar: for each row, the index of its tar.
        start: for each row, the place of its picture in bytes.
        size: for each row, the size of its picture in bytes; -1 if it has none.
    """

    def __init__(
        self, tars: list[str], tar: Sequence[int], start: Sequence[int], size: Sequence[int]
    ) -> None:
        self._tars = tars
        self._tar, self._start, self._size = tar, start, size

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's picture file."""
        size = self._size[row]
        if size > pictures.MAX_BYTES:
            raise BrokenPicture(f"it has more than {pictures.MAX_BYTES} bytes")
        with _Opened(self._path(row)) as file:
            return _read_at(file, self._start[row], size)

    def fingerprint(self, row: int) -> bytes:
        """Return bytes that change with the size and the ends of a row's picture file."""
        with _Opened(self._path(row)) as file:
            begin = self._start[row]
            return fingerprint_of(
                self._size[row], lambda start, count: _read_at(file, begin + start, count)
            )

    def _path(self, row: int) -> str:
        if self._size[row] < 0:
            raise BrokenPicture("the row has no picture")
        return self._tars[self._tar[row]]


class _Opened:
    """A file descriptor; opening and reading raise BrokenPicture.

    A tar is opened for each picture: threads share no state, and many tars need few descriptors.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> int:
        # It may be a pipe, so do not block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._file = os.open(self._path, flags)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BrokenPicture("the file does not exist") from error
        except (OSError, ValueError) as error:
            raise BrokenPicture(_reason(error)) from error
        return self._file

    def __exit__(self, *error: object) -> None:
        os.close(self._file)


def _read_at(file: int, start: int, count: int) -> bytes:
    try:
        os.lseek(file, start, os.SEEK_SET)  # not pread, which Windows lacks
        data = os.read(file, count)
    except OSError as error:
        raise BrokenPicture(_reason(error)) from error
    if len(data) < count:
        raise BrokenPicture("image file is truncated")
    return data


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or "it is not a valid file name"


def _size_of(file: int) -> int:
    """Return the size of an open file; raise BrokenPicture if it is not regular, or too large."""
    status = os.fstat(file)
    pictures._check_regular(status)
    if status.st_size > pictures.MAX_BYTES:
        raise BrokenPicture(f"it has more than {pictures.MAX_BYTES} bytes")
    return status.st_size


def fingerprint_of(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """Return 16 bytes made of the size and the ends of a picture file.

    Args:
        size: size of the file in bytes.
        read: returns the bytes at a place: (start, count) -> bytes.

    Raises:
        BrokenPicture: the file is too large, or does not begin like a picture.
    """
    if size > pictures.MAX_BYTES:
        raise BrokenPicture(f"it has more than {pictures.MAX_BYTES} bytes")
    head = read(0, min(size, ENDS))
    if pictures._plugin_of(head[:16]) is None:
        pictures._opened(head)  # raises BrokenPicture, which lists the formats
    last = min(max(size - ENDS, 0), ENDS)
    tail = read(size - last, last) if last else b""
    return hashlib.blake2b(size.to_bytes(8, "big") + head + tail, digest_size=16).digest()
