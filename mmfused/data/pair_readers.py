"""Read pairs from rows of JSON: MMEB, the data of UNITE, and M-BEER."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmfused.json_files import one_line

from .json_rows import json_rows, parquet_columns
from .pair_sets import MODALITIES, PairBuilder, RawItem, read_items
from .rows import BrokenRow

SUFFIXES = (".json", ".jsonl", ".parquet")
FIRST_ROWS = 8  # number of rows that are looked at to find out what a file has
# The keys by which a row of a format is known.
MMEB_KEYS = ("qry", "pos_text")
UNITE_KEYS = ("query", "candidate")
MBEER_KEYS = ("item_id_1", "item_title_1", "item_image_1", "item_id_2", "item_title_2")
MBEER_KEYS += ("item_image_2",)
Row = dict[str, Any]
AddRow = Callable[[PairBuilder, str, Row, int, str], None]

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def has_rows(path: Path, keys: Sequence[str]) -> bool:
    """Return whether one of the first rows of a file has ``keys``.

    Raises:
        ValueError: the file cannot be read.
    """
    if path.suffix == ".parquet":
        return set(keys) <= set(parquet_columns(path))
    first = (row for _, row in islice(json_rows(path), FIRST_ROWS))
    return any(isinstance(row, dict) and all(key in row for key in keys) for row in first)


def row_files(path: Path) -> list[Path]:
    """Return a file, or the files of a folder and its sub-folders that may have rows, in order."""
    files = [path]
    if path.is_dir():
        folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        files = [file for folder in folders for file in sorted(folder.iterdir())]
    return [file for file in files if file.suffix in SUFFIXES and file.is_file()]


def of_split(files: list[Path], split: str) -> list[Path]:
    """Return the files of a split, or all files if they are not named by splits.

    Files named test*, val* or dev* are for "test", and the others for "train". MMEB publishes its
    training rows twice, with the original instructions and with diverse ones; the original ones
    are taken.
    """
    is_test = [file.stem.startswith(("test", "val", "dev")) for file in files]
    chosen = [file for file, test in zip(files, is_test, strict=True) if test == (split == "test")]
    chosen = chosen or files
    original = {file.parent for file in chosen if file.stem.startswith("original")}
    return [
        file for file in chosen if file.parent not in original or file.stem.startswith("original")
    ]


def read_rows(
    builder: PairBuilder,
    path: Path,
    split: str,
    root: Path | None,
    keys: Sequence[str],
    add: AddRow,
) -> None:
    """Read a file, or the files of a folder, each of which is a task.

    Args:
        builder: gets the pairs.
        path: a folder or a file.
        split: "train" or "test".
        root: the folder of the pictures; None: the folder, or that of the file.
        keys: the keys that all rows have.
        add: adds a row; the last arguments are its task, and the folder of its file, relative to
            the pictures' folder.
    """
    folder = path if path.is_dir() else path.parent
    files = of_split(_files_with(builder, path, keys), split) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no file whose rows have {', '.join(keys)}")
    builder.items.enter(root or folder)
    tasks: dict[str, int] = {}
    for file in files:
        place = os.path.relpath(file.parent, folder)
        inner = "" if place == "." else place
        name = inner or _SHARD.sub("", file.stem)
        task = tasks[name] if name in tasks else tasks.setdefault(name, builder.task(name))
        source = os.path.join(inner, file.name)
        for where, row in json_rows(file):
            where = f"{source} {where}"
            try:
                if isinstance(row, BrokenRow):
                    raise row
                if not isinstance(row, dict):
                    raise BrokenRow(f"got {shown(row)}, expected an object")
                missing = [key for key in keys if key not in row]
                if missing:
                    raise BrokenRow(f"it has no {', '.join(missing)}")
                add(builder, where, row, task, inner)
            except BrokenRow as error:
                builder.skip(where, error)


def _files_with(
    builder: PairBuilder,
    folder: Path,
    keys: Sequence[str],
) -> list[Path]:
    """Return the files of a folder whose rows have ``keys``, and skip the others."""
    found, root = [], folder.resolve()
    for file in row_files(folder):
        name = os.path.relpath(file, folder)
        try:
            if not file.resolve().is_relative_to(root):
                builder.skip(name, "it leads outside the folder")
            elif has_rows(file, keys):
                found.append(file)
            else:
                builder.skip(name, f"its rows are of another format, without {', '.join(keys)}")
        except ValueError as error:
            builder.skip(name, error)
    return found


def read_mmeb(
    builder: PairBuilder,
    path: Path,
    split: str,
    root: Path | None,
) -> None:
    """Read the rows of MMEB: qry, pos_text, neg_text and the paths of their pictures."""
    read_rows(builder, path, split, root, MMEB_KEYS, _add_mmeb)


def _add_mmeb(
    builder: PairBuilder,
    where: str,
    row: Row,
    task: int,
    inner: str,
) -> None:
    found = {}
    for field, text, image in (
        ("qry", "qry", "qry_image_path"),
        ("pos", "pos_text", "pos_image_path"),
        ("neg", "neg_text", "neg_image_path"),
    ):
        raw = _mmeb_items(row, text, image, field != "qry")
        if inner:
            raw = [(words, _find(builder, names, inner), "") for words, names, _ in raw]
        found[field] = read_items(builder, where, field, raw, field != "neg")
    (query,) = found["qry"]
    positives, negatives = (map(builder.items.row, found[field]) for field in ("pos", "neg"))
    builder.pair(query, positives, negatives, task)


def _mmeb_items(
    row: Row,
    text_key: str,
    image_key: str,
    several: bool,
) -> list[RawItem]:
    """Return the text and the pictures of each item of a field.

    A list of texts, or of pictures without a text, holds several items. A text with a list of
    pictures, or a query, is one item.
    """
    text, image = row.get(text_key) or "", row.get(image_key) or ""
    if isinstance(text, str) and isinstance(image, str):  # by far the most frequent case
        return [(text, [image] if image else [], "")] if text or image or not several else []
    texts = strings(text_key, text) if isinstance(text, list) and several else None
    if texts is not None:
        images = image if isinstance(image, list) else [image] * len(texts)
        if len(images) != len(texts):
            raise BrokenRow(
                f"{image_key}: got {len(images)} pictures, expected {len(texts)}, as in {text_key}"
            )
    elif isinstance(image, list) and several and not text:
        images, texts = image, [""] * len(image)
    else:
        images, texts = [image], [string(text_key, text)]
    items: list[RawItem] = [
        (words, strings(image_key, names or []), "")
        for words, names in zip(texts, images, strict=True)
    ]
    return [item for item in items if item[0] or item[1]] if several else items


def read_unite(
    builder: PairBuilder,
    path: Path,
    split: str,
    root: Path | None,
) -> None:
    """Read rows of UNITE's data: query, candidate, and perhaps negative and target_modal."""
    read_rows(builder, path, split, root, UNITE_KEYS, _add_unite)


def _add_unite(
    builder: PairBuilder,
    where: str,
    row: Row,
    task: int,
    inner: str,
) -> None:
    found = {}
    for field in ("query", "candidate", "negative"):
        values = row.get(field)
        values = values if isinstance(values, list) else [values]
        values = [value for value in values if value]
        if field == "query" and len(values) != 1:
            raise BrokenRow(f"query: got {shown(row['query'])}, expected one object")
        instruction = row.get("instruction") if field == "query" else None
        raw = [_unite_item(builder, field, value, instruction, inner) for value in values]
        found[field] = read_items(builder, where, field, raw, field != "negative")
    target = _target(row.get("target_modal"))
    (query,) = found["query"]
    positives = map(builder.items.row, found["candidate"])
    negatives = map(builder.items.row, found["negative"])
    builder.pair(query, positives, negatives, task, target)


def _unite_item(
    builder: PairBuilder,
    field: str,
    value: Any,
    instruction: Any,
    inner: str,
) -> RawItem | BrokenRow:
    try:
        if not isinstance(value, dict):
            raise BrokenRow(f"got {shown(value)}, expected an object")
        if value.get("video"):
            raise BrokenRow("it has a video, which cannot be read")
        image = value.get("image") or []
        image = image.get("image") or [] if isinstance(image, dict) else image
        text = string("text", value.get("text") or "")
        given = string("instruction", value.get("instruction") or instruction or "")
        return text, _find(builder, strings("image", image), inner), given
    except BrokenRow as error:
        if field == "query":
            raise BrokenRow(f"{field}: {error}") from error
        return error


def _target(value: Any) -> int:
    """Return the sum of the modalities in a text such as "image, text"; 0 for None or ""."""
    if not value:
        return 0
    names = [name.strip() for name in string("target_modal", value).split(",")]
    if any(name not in MODALITIES for name in names):
        expected = ", ".join(MODALITIES)
        raise BrokenRow(f"target_modal: got {shown(value)}, expected some of {expected}")
    return sum({MODALITIES[name] for name in names})


def read_mbeer(
    builder: PairBuilder,
    path: Path,
    split: str,
    root: Path | None,
) -> None:
    """Read rows of M-BEER: two items that are the same product."""
    read_rows(builder, path, split, root, MBEER_KEYS, _add_mbeer)


def _add_mbeer(
    builder: PairBuilder,
    where: str,
    row: Row,
    task: int,
    inner: str,
) -> None:
    specs, names = [], []
    for number in ("1", "2"):
        key = f"item_image_{number}"
        image = string(key, row[key] or "")
        files = [image] if image else []
        if image:
            # The paths that are published are those of the authors' machine.
            base = os.path.join("images", os.path.basename(image.replace("\\", "/")))
            files = [image if builder.items.has_file(image) else base]
            files = files if builder.items.has_file(files[0]) else [image]
        text = string(f"item_title_{number}", row[f"item_title_{number}"] or "")
        specs += read_items(builder, where, f"item {number}", [(text, files, "")], True)
        name = row[f"item_id_{number}"]
        if isinstance(name, bool) or not isinstance(name, (int, str)) or name == "":
            raise BrokenRow(f"item_id_{number}: got {shown(name)}, expected a number or a string")
        names.append(str(name))
    rows = [builder.items.row(spec) for spec in specs]
    for item, name in zip(rows, names, strict=True):
        builder.product(item, name)
    builder.pair(specs[0], rows[1:], (), task)


def _find(
    builder: PairBuilder,
    names: Sequence[str],
    inner: str,
) -> list[str]:
    """Return names of files, with the folder ``inner`` if that is where they are."""
    if not inner:
        return list(names)
    found = []
    for name in names:
        there = os.path.join(inner, name)
        here = builder.items.has_file(name) or not builder.items.has_file(there)
        found.append(name if here else there)
    return found


def string(key: str, value: Any) -> str:
    """Return a string; raise BrokenRow if it is none."""
    if not isinstance(value, str):
        raise BrokenRow(f"{key}: got {shown(value)}, expected a string")
    return value


def strings(key: str, value: Any) -> list[str]:
    """Return a list of strings, from a string or a list; raise BrokenRow if it is neither."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise BrokenRow(f"{key}: got {shown(value)}, expected a string or a list of strings")
    return value


def shown(value: Any) -> str:
    """Return the start of a value for a sentence."""
    return one_line(repr(value)[:200].encode("utf-8", "replace").decode(), 80)
