"""Open sets of pairs in the formats in which they are published, and mixtures of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mmfused.json_files import read_object

from ._common import check_choice
from .pair_readers import (
    MBEER_KEYS,
    MMEB_KEYS,
    UNITE_KEYS,
    has_rows,
    read_mbeer,
    read_mmeb,
    read_unite,
    row_files,
    shown,
)
from .pair_sets import PairBuilder, PairSet
from .webqa import is_webqa, read_webqa

PairFormat: TypeAlias = Literal["webqa", "mmeb", "unite", "mbeer", "mixture"]
PAIR_FORMATS: tuple[PairFormat, ...] = ("webqa", "mmeb", "unite", "mbeer", "mixture")
Split: TypeAlias = Literal["train", "test"]

_READERS: dict[str, Callable[[PairBuilder, Path, str, Path | None], None]] = {
    "webqa": read_webqa,
    "mmeb": read_mmeb,
    "unite": read_unite,
    "mbeer": read_mbeer,
}
_KEYS = {"mmeb": MMEB_KEYS, "unite": UNITE_KEYS, "mbeer": MBEER_KEYS}


def open_pairs(
    path: str | os.PathLike[str],
    format: str | None = None,
    split: Split = "train",
    root: str | os.PathLike[str] | None = None,
) -> PairSet:
    r"""Read a set of pairs.

    ==========  ===================================================================================
    "webqa"     a folder with train_query.jsonl or val_query.jsonl (q_text, q_image, positive,
                negative, type), text_corpus.jsonl (content) and mm_it_corpus.jsonl (content, image,
                caption), with the pictures in its folder "images"
    "mmeb"      rows of qry, qry_image_path, pos_text, pos_image_path, neg_text and neg_image_path,
                each a string, or a list for several
    "unite"     rows of query, candidate and perhaps negative, each an object with text and image,
                and perhaps instruction and target_modal
    "mbeer"     rows of item_id_1, item_title_1, item_image_1, and the same of item 2
    "mixture"   a JSON file ``{"sources": [{"data": path, "format": name, "weight": 1.0}, ...]}``;
                the weight is how often a query is visited in an epoch on average
    ==========  ===================================================================================

    Rows are in JSON lists, JSON lines or Parquet files. Of a folder, each file or sub-folder with
    such rows is a task.

    A row without a usable query or positive is skipped, as are single negatives and positives, for
    instance because a picture file is missing. ``.skipped`` of the set has a sentence about each.
    Picture files are not opened.

    Args:
        path: a file or a folder.
        format: name of the format; None detects it.
        split: "train" or "test", the queries to read if the folder has both.
        root: the folder that the names of picture files are relative to, and that they must not
            lead out of; None takes that of the rows.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: an argument is invalid, the format is not known, a file cannot be read, or no
            row is usable.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from mmfused.data.pair_formats import open_pairs
        >>> rows = [{"qry": "red mug", "pos_text": "Mug, red", "neg_text": "Mug, blue"}]
        >>> rows += [{"qry": "plate", "pos_text": "", "pos_image_path": "lost.jpg"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.json")
        ...     size = path.write_text(json.dumps(rows))
        ...     pairs = open_pairs(path)
        >>> len(pairs), pairs.items.texts[pairs.negatives[0][0]]
        (1, 'Mug, blue')
        >>> pairs.skipped
        ['train.json entry 2: pos: the image cannot be read: lost.jpg: the file does not exist']
    """
    path = Path(path)
    check_choice("split", split, Split)
    folder = None if root is None else Path(root)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"root: got {str(root)!r}, expected a folder")
    builder = PairBuilder(path)
    if _format_of(path, format) == "mixture":
        _read_mixture(builder, path, split, folder)
    else:
        _READERS[_format_of(path, format)](builder, path, split, folder)
    return builder.finish()


def detect_pair_format(path: str | os.PathLike[str]) -> PairFormat | None:
    """Return the format of a set of pairs, from its contents; None if it is not known.

    Raises:
        FileNotFoundError: ``path`` does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir() and is_webqa(path):
        return "webqa"
    files = row_files(path)
    for name in PAIR_FORMATS:
        if name in _KEYS and any(_has_rows(file, name) for file in files):
            return name
    if path.suffix == ".json" and path.is_file() and _sources(path) is not None:
        return "mixture"
    return None


def _has_rows(file: Path, name: str) -> bool:
    try:
        return has_rows(file, _KEYS[name])
    except ValueError:
        return False  # reading the set tells why


def _format_of(path: Path, format: str | None) -> PairFormat:
    found = detect_pair_format(path) if format is None else format
    if format is not None and not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if format is None and found is None:
        raise ValueError(f"{path} holds no pairs in a known format ({', '.join(PAIR_FORMATS)})")
    check_choice("format", found, PairFormat)
    return found  # type: ignore[return-value]


def _sources(path: Path) -> list[Any] | None:
    """Return the sources of a mixture; None if the file is none."""
    try:
        sources = read_object(path).get("sources")
    except (OSError, ValueError):
        return None
    return sources if isinstance(sources, list) and sources else None


def _read_mixture(
    builder: PairBuilder,
    path: Path,
    split: str,
    root: Path | None,
) -> None:
    """Read the sources of a mixture, with a prefix before the names of their tasks."""
    sources = _sources(path)
    if sources is None:
        raise ValueError(f'{path}: expected an object {{"sources": [...]}} with a source')
    prefixes: set[str] = set()
    for number, source in enumerate(sources):
        name = f"{path.name} sources[{number}]"
        inner, format, weight = _checked_source(name, path.parent, source)
        prefix = f"{inner.stem}/"
        if prefix in prefixes:
            prefix = f"{inner.stem}.{number}/"
        prefixes.add(prefix)
        builder.prefix, builder.weight = prefix, weight
        before = builder.count
        _READERS[format](builder, inner, split, root)
        if builder.count == before:
            raise ValueError(f"{name}: {inner} has no usable pair")
    builder.prefix = ""


def _checked_source(
    name: str,
    folder: Path,
    source: Any,
) -> tuple[Path, str, float]:
    """Return the path, format and weight of a source."""
    keys = ("data", "format", "weight")
    if not isinstance(source, dict) or not isinstance(source.get("data"), str):
        raise ValueError(f"{name}: got {shown(source)}, expected an object with data")
    unknown = [key for key in source if key not in keys]
    if unknown:
        raise ValueError(f"{name}: got {shown(unknown[0])}, expected {', '.join(keys)}")
    weight = source.get("weight", 1.0)
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < math.inf:
        raise ValueError(f"{name}.weight: got {shown(weight)}, expected a number above 0")
    path = folder / source["data"]
    try:
        format = _format_of(path, source.get("format"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if format == "mixture":
        raise ValueError(f"{name}: got another mixture, expected a set of pairs")
    return path, format, float(weight)
