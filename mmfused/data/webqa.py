"""Read WebQA as it is published for the evaluation of VISTA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .json_rows import json_rows
from .pair_readers import shown, string, strings
from .pair_sets import PairBuilder, read_items
from .rows import BrokenRow

TEXT_CORPUS, PICTURE_CORPUS = "text_corpus.jsonl", "mm_it_corpus.jsonl"
# The corpora by the part of the name of their file.
CORPORA = {"text": TEXT_CORPUS, "mm_it": PICTURE_CORPUS}
# The files of queries of each split, the first one that exists is read.
QUERIES = {
    "train": ("train_query.jsonl", "val_query.jsonl", "test_query.jsonl"),
    "test": ("val_query.jsonl", "test_query.jsonl", "train_query.jsonl"),
}


def is_webqa(path: Path) -> bool:
    """Return whether a folder has a file of queries and a corpus."""
    has_queries = any((path / name).is_file() for name in QUERIES["train"])
    return has_queries and any((path / name).is_file() for name in CORPORA.values())


def has_both_splits(path: Path) -> bool:
    """Return whether a folder has queries for training and others for validation."""
    train, *others = QUERIES["train"]
    return (path / train).is_file() and any((path / name).is_file() for name in others)


def read_webqa(
    builder: PairBuilder,
    path: Path,
    split: str,
    root: Path | None,
) -> None:
    """Read queries whose positives are in a corpus of texts or of pictures with captions.

    A task is a type of queries, which is the name of the corpus that has their positives. Queries
    search both corpora.
    """
    if not is_webqa(path):
        expected = f"a file of {', '.join(QUERIES['train'])}, and {' or '.join(CORPORA.values())}"
        raise ValueError(f"{path}: expected a folder with {expected}")
    builder.items.enter(root or (path / "images" if (path / "images").is_dir() else path))
    contents: dict[str, int] = {}
    corpora = {
        file: builder.corpus(name) for name, file in CORPORA.items() if (path / file).is_file()
    }
    for file, corpus in corpora.items():
        _read_corpus(builder, path / file, corpus, contents)
    names = [name for name in QUERIES[split] if (path / name).is_file()]
    _read_queries(builder, path / names[0], contents, [*corpora.values()])


def _read_corpus(
    builder: PairBuilder,
    path: Path,
    corpus: int,
    contents: dict[str, int],
) -> None:
    """Add the items of a corpus, and to ``contents`` their rows.

    The content of a picture is its id, and that of a text is the text itself.
    """
    for where, row in _objects(builder, path, "content"):
        try:
            content, text, pictures = _content(row["content"]), row["content"], []
            if path.name == PICTURE_CORPUS:
                text = string("caption", row.get("caption") or "")
                pictures = [_file_name(builder, row)]
            (spec,) = read_items(builder, where, "item", [(text, pictures, "")], True)
            if content in contents:
                raise BrokenRow(f"content: got {shown(content)} again, expected different ones")
            contents[content] = builder.candidate(spec, corpus)
        except BrokenRow as error:
            builder.skip(where, error)


def _read_queries(
    builder: PairBuilder,
    path: Path,
    contents: dict[str, int],
    corpora: list[int],
) -> None:
    tasks: dict[str, int] = {}
    for where, row in _objects(builder, path, "positive"):
        try:
            text = string("q_text", row.get("q_text") or "")
            pictures = strings("q_image", row.get("q_image") or [])
            (query,) = read_items(builder, where, "query", [(text, pictures, "")], True)
            positives = _known(builder, where, "positive", row["positive"], contents)
            if not positives:
                raise BrokenRow("it has no positive in a corpus")
            given = row.get("negative") or []
            negatives = _known(builder, where, "negative", given, contents)
            task = string("type", row.get("type") or "all")
            if task not in tasks:
                tasks[task] = builder.task(task, corpora)
            builder.pair(query, positives, negatives, tasks[task])
        except BrokenRow as error:
            builder.skip(where, error)


def _known(
    builder: PairBuilder,
    where: str,
    key: str,
    values: Any,
    contents: dict[str, int],
) -> list[int]:
    """Return the rows of contents, and skip those that no corpus has."""
    values = values if isinstance(values, list) else [values]
    found = []
    for value in map(_content, values):
        if value in contents:
            found.append(contents[value])
        else:
            builder.skip(where, f"{key}: got {shown(value)}, which no corpus has")
    return found


def _content(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BrokenRow(f"content: got {shown(value)}, expected a string or a number")
    return str(value)


def _file_name(builder: PairBuilder, row: dict[str, Any]) -> str:
    """Return the name of the picture of an item, which may be a number without a suffix."""
    name = _content(row.get("image"))
    if Path(name).suffix or builder.items.has_file(name):
        return name
    return name + ".jpg"


def _objects(builder: PairBuilder, path: Path, key: str) -> Any:
    """Yield where each object of a file is, and the object, and skip what is not usable."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(f"{path} leads outside the folder")
    for place, row in json_rows(path):
        where = f"{path.name} {place}"
        if isinstance(row, BrokenRow):
            builder.skip(where, row)
        elif not isinstance(row, dict) or key not in row:
            builder.skip(where, f"got {shown(row)}, expected an object with {key}")
        else:
            yield where, row
