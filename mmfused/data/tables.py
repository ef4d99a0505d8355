"""The rows of a product set in any format, before a picture is decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from . import arrow_folders, class_folders, jsonl, metadata, tars
from .rows import Pictures as Pictures
from .rows import Table as Table
from .rows import choose_names, listed

Split: TypeAlias = Literal["train", "test"]

FORMATS = ("metadata", "arrow", "parquet", "webdataset", "classes", "glami")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
ARROW = ("dataset_dict.json", "state.json", "dataset_info.json")
ROWS = (".csv", ".tsv", ".jsonl")
TARS = (".tar", ".tar.gz", ".tgz")
COLUMNS = {"image": "image", "text": "text", "label": "label", "coarse_label": "coarse_label"}
GLAMI_COLUMNS = {"image": "image_id", "text": "name+description", "label": "category"}
EXPECTED = (
    "expected a folder with images and metadata.csv, metadata.tsv or metadata.jsonl, a folder of "
    "save_to_disk, of Parquet files, of WebDataset tars or with a sub-folder for each class, "
    "GLAMI-1M, or one such file"
)


def open_table(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    needs_label: bool = True,
) -> Table:
    r"""Return the rows of a product set; pictures are only read when they are asked for.

    The formats are:

    * "metadata": a folder with metadata.csv, metadata.tsv or metadata.jsonl (UTF-8), or such a file
      of any name. Columns "file_name", a path below the file's folder, "text", "label" and
      optionally "coarse_label". Each line that cannot be used is a broken row.
    * "arrow": a folder that ``save_to_disk`` of a datasets.Dataset or DatasetDict wrote. Columns
      "image" (or "file_name"), "text", "label" and optionally "coarse_label". Pictures are bytes,
      ``datasets.Image`` or paths below the folder. The folder is mapped into memory.
    * "parquet": a file, or a folder of \*.parquet, or with a folder "data" of them; columns like
      "arrow". The library datasets copies it to its cache. Files called "train-..." and "test-..."
      are splits.
    * "webdataset": an uncompressed .tar, or a folder of them, read in the order of their names. A
      row is a run of members with the same name up to the first dot: .jpg, .png or another picture,
      .txt (text), .cls (label), and .json (an object with any columns). Columns of other names
      are fields of that object or suffixes of members, such as "left.png" and "caption.txt". A tar
      that is cut is read up to there; one broken row stands for the rest.
    * "classes": a folder with a sub-folder of pictures for each class. Texts are empty.
    * "glami": GLAMI-1M as published. Columns "image_id", "name+description" and "category", in
      GLAMI-1M-train.csv or GLAMI-1M-test.csv by ``split``; pictures in images/.

    Args:
        path: a folder or a file.
        format: name of the format; None detects it.
        columns: names of the source's columns by "image", "text", "label" and "coarse_label", where
            they differ from those of the format. "title+description" as text joins the columns
            that are not empty by a space. "" reads no column: rows have no image, or no text.
        split: the part to read of a format that publishes several in one folder.
        needs_label: whether a source without labels is refused; False gives the label "".

    Returns:
        All rows, those that cannot be used included.

    Raises:
        FileNotFoundError: ``path`` does not exist, or lacks a file of the format.
        ModuleNotFoundError: "arrow" and "parquet" are read by datasets, which is not installed.
        ValueError: an argument is invalid, the format is unknown, or the source cannot be read.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.data.tables import open_table
        >>> rows = "sku\ttitle\tclass\n1.jpg\tRed mug\tmugs\n2.jpg\tBlue plate\tplates\n"
        >>> with tempfile.TemporaryDirectory() as root:
        ...     size = pathlib.Path(root, "products.tsv").write_text(rows)
        ...     columns = {"image": "sku", "text": "title", "label": "class"}
        ...     table = open_table(pathlib.Path(root, "products.tsv"), columns=columns)
        >>> table.columns["label"].to_pylist(), table.where(1)
        (['mugs', 'plates'], 'products.tsv line 3')
    """
    root = Path(path)
    if format is None:
        format = detect_format(root)
    elif format not in FORMATS:
        raise ValueError(f"format: got {format!r:.80}, expected {', '.join(FORMATS)}")
    if format == "metadata":
        return _open_metadata(root, columns, needs_label)
    if format == "glami":
        return _open_glami(root, columns, split, needs_label)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if format == "classes":
        if columns:
            raise ValueError("columns: got names, expected none for a folder of classes")
        _check_folder(root)
        return class_folders.read_classes(root)
    names = choose_names(columns, COLUMNS, needs_label)
    if format == "webdataset":
        return tars.read_tars(root, _files(root, TARS), names)
    if format == "arrow":
        _check_folder(root)
        return arrow_folders.read_saved(root, names, split)
    files = _files(root, (".parquet",))
    return arrow_folders.read_parquet(files[0].parent, files, names, split)


def splits_of(path: str | os.PathLike[str], format: str | None = None) -> list[str]:
    """Return the names of the splits of a product set; [] if it has none.

    Args:
        path: a folder or a file.
        format: name of the format; None detects it.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: the format is unknown.
    """
    root = Path(path)
    format = detect_format(root) if format is None else format
    if not root.is_dir():
        return []
    if format == "glami":
        return [split for split in ("train", "test") if (root / _glami_name(split)).is_file()]
    if format == "arrow":
        return arrow_folders.saved_splits(root)
    return arrow_folders.parquet_splits(_find(root, (".parquet",))) if format == "parquet" else []


def detect_format(path: str | os.PathLike[str]) -> str:
    """Return the name of the format of a folder or file, one of ``FORMATS``.

    A folder with a file called metadata is "metadata", whatever else it holds. One with pictures in
    a single sub-folder, or with a .csv, .tsv, .jsonl or .json file, is not taken for "classes".

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: it has none of the formats, or several.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist, {EXPECTED}")
    if not root.is_dir():
        return _format_of_file(root)
    if any((root / name).is_file() for name in METADATA):
        return "metadata"
    signs = {
        "glami": any((root / _glami_name(split)).is_file() for split in ("train", "test")),
        "arrow": any((root / name).is_file() for name in ARROW),
        "parquet": bool(_find(root, (".parquet",))),
        "webdataset": bool(_find(root, TARS)),
    }
    found = [format for format, is_there in signs.items() if is_there]
    if len(found) > 1:
        raise ValueError(f"{root}: got files of {listed(found)}, expected the format by name")
    if not found and _has_classes(root):
        return "classes"
    if not found:
        raise ValueError(f"{root}: got none of the known files, {EXPECTED}")
    return found[0]


def _has_classes(root: Path) -> bool:
    """Return whether a folder has pictures in several sub-folders, and no table of them."""
    if _find(root, (*ROWS, ".json")):
        return False
    classes = set()
    for name in class_folders.picture_names(root):
        parts = name.split("/")
        if len(parts) == 2:
            classes.add(parts[0])
        if len(classes) > 1:
            return True
    return False


def _format_of_file(path: Path) -> str:
    name = path.name.lower()
    if path.name in (_glami_name("train"), _glami_name("test")):
        return "glami"
    for suffixes, format in ((ROWS, "metadata"), ((".parquet",), "parquet"), (TARS, "webdataset")):
        if name.endswith(suffixes):
            return format
    raise ValueError(f"{path}: got a file of an unknown format, {EXPECTED}")


def _open_metadata(root: Path, columns: Mapping[str, str] | None, needs_label: bool) -> Table:
    names = choose_names(columns, {**COLUMNS, "image": "file_name"}, needs_label)
    path = root
    if not root.is_file():
        path = metadata.find_metadata(root, METADATA)
    elif not root.name.lower().endswith(ROWS):
        raise ValueError(f"{root}: got a file of an unknown format, expected {' or '.join(ROWS)}")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return jsonl.read_jsonl(path, names)
    return metadata.read_table(path, names, "\t" if suffix == ".tsv" else ",")


def _glami_name(split: str) -> str:
    return f"GLAMI-1M-{split}.csv"


def _open_glami(
    root: Path, columns: Mapping[str, str] | None, split: str, needs_label: bool
) -> Table:
    names = choose_names(columns, GLAMI_COLUMNS, needs_label)
    path = root
    if not root.is_file():
        if split not in ("train", "test"):
            raise ValueError(f"split: got {split!r:.80}, expected 'train' or 'test'")
        path = root / _glami_name(split)
    if not path.is_file():
        raise FileNotFoundError(f"{root} has no {path.name}")
    table = metadata.read_table(path, names, ",", "images/{}.jpg")
    # Categories are ids, not indices: 7, 1532, 20117.
    table.named_labels = True
    return table


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise ValueError(f"{root}: got a file, expected a folder")


def _find(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder by name; if it has none, those of its folder "data"."""
    for folder in (root, root / "data"):
        try:
            found = [path for path in folder.iterdir() if path.name.lower().endswith(suffixes)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
        files = [path for path in found if path.is_file() and not path.name.startswith(".")]
        if files:
            return sorted(files)
    return []


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = _find(root, suffixes) if root.is_dir() else [root]
    if not files:
        raise FileNotFoundError(f"{root} has no file {' or '.join(suffixes)}")
    return files
