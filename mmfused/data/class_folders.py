"""Read the rows of a folder that has a sub-folder of pictures for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .picture_files import SUFFIXES, FilePictures
from .rows import Builder, Numbered, Table


def read_classes(root: Path) -> Table:
    """Return a row without text for each picture file below a folder, in the order of the names.

    The label is the name of the sub-folder. Pictures elsewhere, in the folder itself or deeper, are
    broken rows. Names that begin with a dot, files that are not called like pictures, and what
    links to folders within a class lead to are no rows.

    Raises:
        ValueError: no sub-folder has pictures, or the folder cannot be read.
    """
    builder = Builder()
    classes: dict[str, None] = {}
    for name in picture_names(root):
        parts = name.split("/")
        if fault := _fault_of(name):
            builder.add_broken(name, fault)
        elif len(parts) == 2:
            classes[parts[0]] = None
            builder.add(name, "", parts[0], "")
        else:
            builder.add_broken(name, "it is not directly in the folder of a class")
    if not classes:
        raise ValueError(f"{root}: got no sub-folder with pictures, expected one for each class")
    columns = builder.columns(coarse_labels=False)
    return Table(
        root.name,
        columns,
        FilePictures(root, columns["image"]),
        Numbered(f"{root.name} picture"),
        builder.broken,
        named_labels=True,
        class_names=sorted(classes),
    )


def picture_names(root: Path) -> Iterator[str]:
    """Yield the paths of the picture files below a folder relative to it, in sorted order."""
    for name, is_folder in _entries(root):
        if is_folder:
            for inner in _below(os.path.join(root, name)):
                yield f"{name}/{inner}"
        elif name.lower().endswith(SUFFIXES):
            yield name


def _below(folder: str) -> Iterator[str]:
    """Yield the paths of picture files below a folder, but not below links, which may be cycles."""
    for name, is_folder in _entries(folder):
        path = os.path.join(folder, name)
        if is_folder and not os.path.islink(path):
            yield from (f"{name}/{inner}" for inner in _below(path))
        elif not is_folder and name.lower().endswith(SUFFIXES):
            yield name


def _entries(folder: str | Path) -> list[tuple[str, bool]]:
    """Return name, and whether it is a folder, of all that does not begin with a dot."""
    try:
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found if entry.name[0] != "."]
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(entries)


def _fault_of(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None
