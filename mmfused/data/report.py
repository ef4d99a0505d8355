"""Describe what a data set holds: rows, classes, lost rows, texts and pictures."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .folder import IN_MEMORY, ProductFolder
from .pictures import BrokenPicture, decode, picture_path, read_header, read_picture
from .reading import in_threads

if TYPE_CHECKING:
    from .pair_sets import PairSet

# Largest number of pictures of which only the header is read.
HEADERS = 10_000
# Number of classes that are named.
NAMED = 10
# Names of the modalities of an item by their code.
MODALITIES = ("nothing", "text", "image", "image and text")
# The parts of a reason that differ between rows with the same fault: what is quoted, names of
# files, and numbers.
_OWN_PARTS = re.compile(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\S+\.\w{2,5}(?=: )|\d+")
# Where a row is, as in "metadata.csv line 6 (mug.jpg): " and "train.json entry 6: ".
_PLACE = re.compile(r"^[^:]*? \(.*?\): |^[^:]* \d+: ")


class Look(NamedTuple):
    """What is known of a picture file."""

    format: str
    width: int  # of the upright picture, in pixels
    height: int
    bytes: int
    digest: bytes


# A picture's name for messages, and what is known of it or why it is broken.
Looked = tuple[str, Look | BrokenPicture]


def describe_products(
    products: ProductFolder,
    image_size: int,
    decoded: bool = False,
    watched: Callable[[Iterable[Looked], int], Iterable[Looked]] = lambda looks, count: looks,
) -> dict[str, Any]:
    """Return what a product set holds, for JSON.

    Args:
        products: the set, with pictures that are read on demand.
        image_size: side of the model's input, for the memory.
        decoded: decode all pictures. Otherwise, only headers are read, of `HEADERS` pictures at
            most.
        watched: wraps the pictures, whose number is its second argument, in a progress bar.
    """
    rows, names = np.flatnonzero(products.present), products.file_names
    files = _describe_files(rows, products.read_picture, names, decoded, watched)
    pictures = {"present": len(rows), "without": len(products) - len(rows)}
    size = len(products) * 3 * image_size**2
    return {
        "kind": "products",
        "rows": len(products) + len(products.skipped),
        "usable_rows": len(products),
        "lost": describe_lost(products.skipped),
        "classes": describe_classes(products.labels, products.class_names),
        "texts": describe_texts(products.texts),
        "pictures": pictures | files,
        "memory": {"image_size": image_size, "bytes": size, "streamed": size > IN_MEMORY},
    }


def describe_pairs(
    pairs: PairSet,
    decoded: bool = False,
    watched: Callable[[Iterable[Looked], int], Iterable[Looked]] = lambda looks, count: looks,
) -> dict[str, Any]:
    """Return what a set of pairs holds, for JSON; the arguments are as in `describe_products`."""
    items, names = pairs.items, pairs.items.files.names

    def read(file: int) -> bytes:
        root = items.files.roots[items.files.root_of[file]]
        return read_picture(picture_path(root, names[file]))

    files = _describe_files(np.arange(len(names)), read, names, decoded, watched)
    pictures = {"present": int(items.present.sum()), "without": int((~items.present).sum())}
    return {
        "kind": "pairs",
        "queries": len(pairs),
        "candidates": len(pairs.candidates),
        "items": len(items),
        "lost": describe_lost(pairs.skipped),
        "positives": _three(pairs.positives.sizes),
        "negatives": _three(pairs.negatives.sizes),
        "tasks": _named_counts(pairs.tasks, pairs.task_names),
        "corpora": _named_counts(pairs.corpora, pairs.corpus_names),
        "modalities": _describe_modalities(pairs),
        "texts": describe_texts(items.texts),
        "pictures": pictures | files,
    }


def _describe_modalities(pairs: PairSet) -> list[dict[str, Any]]:
    """Return how many pairs of a query and a positive have which modalities."""
    items = pairs.items
    has_text = np.fromiter(map(bool, items.texts), dtype=bool, count=len(items))
    codes = has_text + 2 * items.present
    queries = codes[pairs.queries[pairs.positives.owners]]
    counts = Counter(zip(queries.tolist(), codes[pairs.positives.values].tolist(), strict=True))
    return [
        {"query": MODALITIES[query], "candidate": MODALITIES[candidate], "pairs": count}
        for (query, candidate), count in counts.most_common()
    ]


def _named_counts(numbers: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return [{"name": name, "rows": count} for name, count in zip(names, counts, strict=True)]


def describe_lost(sentences: Sequence[str]) -> list[dict[str, Any]]:
    """Return the reasons in sentences about lost rows, the most frequent first.

    Each is ``{"reason", "rows", "example"}``. In a reason, an ellipsis replaces names and numbers.

    Examples:
        >>> from mmfused.data.report import describe_lost
        >>> lost = [f"a.csv line {row} (m.jpg): label: got '{row}'" for row in (3, 9)]
        >>> describe_lost(lost)
        [{'reason': 'label: got …', 'rows': 2, 'example': "a.csv line 3 (m.jpg): label: got '3'"}]
    """
    found: dict[str, list[str]] = {}
    for sentence in sentences:
        reason = _OWN_PARTS.sub("…", _PLACE.sub("", sentence, count=1))
        found.setdefault(reason, []).append(sentence)
    groups = sorted(found.items(), key=lambda group: -len(group[1]))
    return [{"reason": reason, "rows": len(rows), "example": rows[0]} for reason, rows in groups]


def describe_classes(labels: Sequence[int], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the number of classes that have rows, and the rows of the largest and the smallest.

    Args:
        labels: the label of each row; -1 if it has none.
        names: the names of the classes; None takes the labels.
    """
    values = np.asarray(labels, dtype=np.int64)
    found, counts = np.unique(values[values >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    order = np.concatenate([order[:NAMED], order[-1:]])
    classes = [
        {"name": str(label) if names is None else names[label], "rows": count}
        for label, count in zip(found[order].tolist(), counts[order].tolist(), strict=True)
    ]
    return {
        "count": len(found),
        "without_label": int((values < 0).sum()),
        "most_frequent": classes[:-1],
        "smallest": classes[-1] if classes else None,
    }


def describe_texts(texts: Iterable[str]) -> dict[str, int]:
    """Return the number of empty texts, and the median and the largest length of the others."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64)
    _, median, longest = _three(lengths[lengths > 0])
    return {"empty": int((lengths == 0).sum()), "median_length": median, "longest": longest}


def _describe_files(
    rows: np.ndarray,
    read: Callable[[int], bytes],
    names: Sequence[str],
    decoded: bool,
    watched: Callable[[Iterable[Looked], int], Iterable[Looked]],
) -> dict[str, Any]:
    """Return what is known of picture files; sizes are ``[smallest, median, largest]``.

    Args:
        rows: rows with a picture.
        read: returns the bytes of a row's picture file; several threads call it.
        names: names of the pictures by row, for messages.
        decoded: decode all pictures, instead of reading the headers of some.
        watched: as for `describe_products`.
    """
    seen = rows if decoded else rows[spread(len(rows), HEADERS)]
    contents: set[bytes] = set()
    formats: Counter[str] = Counter()
    sizes = {"width": array("q"), "height": array("q"), "bytes": array("q")}
    broken: list[str] = []
    for name, look in watched(_look_at_all(read, seen.tolist(), names, decoded), len(seen)):
        if isinstance(look, BrokenPicture):
            broken.append(f"{name[:200]}: {look}")
            continue
        contents.add(look.digest)
        formats[look.format] += 1
        for key, values in sizes.items():
            values.append(getattr(look, key))
    return {
        "files": len(rows),
        "read": len(seen),
        "decoded": decoded,
        "distinct": len(contents),
        "formats": dict(formats.most_common()),
        **{key: _three(np.array(values)) for key, values in sizes.items()},
        "broken": describe_lost(broken),
    }


def _look_at_all(
    read: Callable[[int], bytes],
    rows: Iterable[int],
    names: Sequence[str],
    decoded: bool,
) -> Iterator[Looked]:
    """Yield the name of each row's picture, and what is known of it or why it is broken."""

    def look(row: int) -> Looked:
        try:
            data = read(row)
            if decoded:
                decode(data, None)
            digest = hashlib.blake2b(data, digest_size=16).digest()
            return names[row], Look(*read_header(data), len(data), digest)
        except BrokenPicture as error:
            return names[row], error

    return in_threads(look, rows)


def spread(count: int, most: int) -> np.ndarray:
    """Return at most ``most`` of ``count`` rows, evenly spaced, the first and the last included."""
    return np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(np.int64)


def _three(values: np.ndarray) -> list[int]:
    """Return the smallest, the median and the largest value; zeros if there is none."""
    return [int(of(values)) for of in (np.min, np.median, np.max)] if len(values) else [0, 0, 0]
