"""Describe what a data set holds: rows, classes, lost rows, texts and pictures."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .pictures import BrokenPicture, decode, read_header
from .quiet import quiet

# Largest number of pictures whose headers are read.
HEADERS = 10_000
# Number of classes that are named.
NAMED = 10
# The parts of a reason that differ between rows with the same fault: what is quoted, names of
# files, and numbers.
_OWN_PARTS = re.compile(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\S+\.\w{2,5}(?=: )|\d+")
# Where a row is, as in "metadata.csv line 6 (mug.jpg): ".
_PLACE = re.compile(r"^.*? \d+(?: \(.*?\))?: ")


class Look(NamedTuple):
    """What is known of a picture file."""

    format: str
    width: int  # of the upright picture, in pixels
    height: int
    bytes: int
    sha256: bytes


def look_at(data: bytes, decoded: bool = False) -> Look:
    """Return what is known of the bytes of a picture file; call within ``quiet()``.

    Args:
        data: the bytes.
        decoded: decode the picture too, to find out whether that is possible.

    Raises:
        BrokenPicture: the header is not readable or, if ``decoded``, the picture.
    """
    if decoded:
        decode(data, None)
    kind, width, height = read_header(data)
    return Look(kind, width, height, len(data), hashlib.sha256(data).digest())


def look_at_all(
    read: Callable[[int], bytes],
    rows: Iterable[int],
    decoded: bool = False,
) -> Iterator[Look | BrokenPicture]:
    """Yield, for the picture of each row in order, what is known of it, or why it is broken.

    Args:
        read: returns the bytes of a row's picture file; several threads call it.
        rows: rows with a picture.
        decoded: decode the pictures.
    """

    def look(row: int) -> Look | BrokenPicture:
        try:
            return look_at(read(row), decoded)
        except BrokenPicture as error:
            return error

    threads = min(8, os.cpu_count() or 1)
    remaining = iter(rows)
    with ThreadPoolExecutor(threads) as pool, quiet():
        waiting = [pool.submit(look, row) for row in islice(remaining, 4 * threads)]
        while waiting:
            done = waiting.pop(0)
            waiting.extend(pool.submit(look, row) for row in islice(remaining, 1))
            yield done.result()


def spread(count: int, most: int) -> np.ndarray:
    """Return at most ``most`` of ``count`` rows, evenly spaced, the first and the last included."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(np.int64))


def describe_lost(sentences: Sequence[str]) -> list[dict[str, Any]]:
    """Return the reasons in sentences about lost rows, the most frequent first.

    Each is ``{"reason", "rows", "example"}``. In a reason, an ellipsis replaces names and numbers.

    Examples:
        >>> from mmfused.data.report import describe_lost
        >>> lost = ["a.csv line 3: label: got 'x', expected 0", "a.csv line 9: label: got 'y', ..."]
        >>> describe_lost(lost[:1])
        [{'reason': 'label: got …, expected …', 'rows': 1, 'example': "a.csv line 3: label: ...
    """
    found: dict[str, list[str]] = {}
    for sentence in sentences:
        reason = _OWN_PARTS.sub("…", _PLACE.sub("", sentence))
        found.setdefault(reason, []).append(sentence)
    groups = sorted(found.items(), key=lambda group: -len(group[1]))
    return [
        {"reason": reason, "rows": len(rows), "example": rows[0]} for reason, rows in groups
    ]


def describe_classes(labels: Sequence[int], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the number of classes with rows, and the rows of the largest and smallest of them.

    Args:
        labels: the label of each row; -1 if it has none.
        names: the names of the classes; None takes the labels.
    """
    values = np.asarray(labels, dtype=np.int64)
    found, counts = np.unique(values[values >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    classes = [
        {"name": names[found[i]] if names is not None else str(found[i]), "rows": int(counts[i])}
        for i in (*order[:NAMED], *order[-1:])
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
    used = lengths[lengths > 0]
    return {
        "empty": int((lengths == 0).sum()),
        "median_length": int(np.median(used)) if len(used) else 0,
        "longest": int(used.max()) if len(used) else 0,
    }


def describe_pictures(looks: Iterable[Look | BrokenPicture]) -> dict[str, Any]:
    """Return what is known of pictures, all of which were looked at.

    The sizes are ``[smallest, median, largest]``, in pixels and bytes.
    """
    good, broken = [], 0
    for look in looks:
        if isinstance(look, BrokenPicture):
            broken += 1
        else:
            good.append(look)
    formats = Counter(look.format for look in good)
    sizes = {
        name: _three(np.array([getattr(look, name) for look in good], dtype=np.int64))
        for name in ("width", "height", "bytes")
    }
    return {
        "read": len(good) + broken,
        "broken": broken,
        "distinct": len({look.sha256 for look in good}),
        "formats": dict(formats.most_common()),
        **sizes,
    }


def _three(values: np.ndarray) -> list[int]:
    return [int(of(values)) for of in (np.min, np.median, np.max)] if len(values) else [0, 0, 0]


def memory(rows: int, side: int) -> int:
    """Return the bytes that ``rows`` pictures of ``side`` pixels take in memory."""
    return rows * 3 * side**2


Description = Mapping[str, Any]
