"""Read the labels of a table: indices of classes, or names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from .metadata import parse_label
from .rows import BrokenRow
from .strings import Strings

# What a label says, see :class:`mmfused.data.ProductFolder`.
LabelKind: TypeAlias = Literal["auto", "index", "name"]
LIMIT = 2**31
UNKNOWN = -1  # the label of a row without one, if labels are not needed


class Labels(NamedTuple):
    """The labels of all rows of a table."""

    values: np.ndarray  # (N,) int64; any number in a row with a fault
    faults: dict[int, str]  # rows whose label cannot be used, and why
    class_names: list[str] | None  # in the order of the labels; None if labels are indices


def read_labels(
    labels: Strings,
    broken: np.ndarray,
    kind: LabelKind = "auto",
    named: bool | None = None,
    known: Sequence[str] | None = None,
    training: Sequence[str] | None = None,
    num_classes: int | None = None,
    needed: bool = True,
) -> Labels:
    """Return the labels of a table as integers.

    Args:
        labels: the labels as they are written, without white space at their ends.
        broken: rows that are not read, (N,) bool.
        kind: "index", "name", or "auto": names if ``named`` says so or, if it is None, if most
            labels are no numbers.
        named: whether the format of the table has names of classes; None if that is not known.
        known: the names of the classes in their order, if the table has such a list.
        training: the names of the classes of the training data; labels must be among them.
        num_classes: number of classes; None takes as many as there are.
        needed: whether a row without a label is a fault; if not, its label is `UNKNOWN`.

    Raises:
        ValueError: ``training`` is given for indices, or there are more names than
            ``num_classes``.
    """
    texts, places = labels.groups()
    counts = np.bincount(places[~broken], minlength=len(texts))
    if kind == "auto":
        is_named = training is not None or (
            _most_are_names(texts, counts) if named is None else named
        )
        kind = "name" if is_named else "index"
    elif kind == "index" and training is not None:
        raise ValueError(
            "class_names: got names with labels 'index', expected None: indices have no names"
        )
    if kind == "index":
        class_names = None
        found = [_index_of("label", text, num_classes or LIMIT) for text in texts]
    else:
        class_names = _class_names(texts, counts, known, training)
        if num_classes is not None and len(class_names) > num_classes:
            raise ValueError(
                f"num_classes: got {num_classes}, but the data have {len(class_names)} classes"
            )
        positions = {name: position for position, name in enumerate(class_names)}
        whose = "the training data" if training is not None else "the data"
        found = [_position_of(text, positions, whose) for text in texts]
    if not needed:
        found = [UNKNOWN if text == "" else one for text, one in zip(texts, found, strict=True)]
    return _spread(found, places, broken, class_names)


def read_coarse_labels(labels: Strings, broken: np.ndarray) -> Labels:
    """Return the coarse labels of a table, which are always indices; see `read_labels`."""
    texts, places = labels.groups()
    return _spread([_index_of("coarse_label", text, LIMIT) for text in texts], places, broken, None)


def _spread(
    found: list[int | str],
    places: np.ndarray,
    broken: np.ndarray,
    class_names: list[str] | None,
) -> Labels:
    """Return the labels of all rows, given the label or the fault of each distinct text."""
    values = np.array([one if isinstance(one, int) else UNKNOWN for one in found], dtype=np.int64)
    is_fault = np.array([isinstance(one, str) for one in found], dtype=bool)
    rows = np.flatnonzero(is_fault[places] & ~broken).tolist()
    return Labels(values[places], {row: str(found[places[row]]) for row in rows}, class_names)


def sorted_names(names: Sequence[str]) -> list[str]:
    """Return names in the order of their numbers if all are integers, else of their letters."""
    if all(_is_integer(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _class_names(
    texts: list[str],
    counts: np.ndarray,
    known: Sequence[str] | None,
    training: Sequence[str] | None,
) -> list[str]:
    if training is not None:
        return list(training)
    if known is not None:
        return list(known)
    return sorted_names([text for text, n in zip(texts, counts, strict=True) if n and text])


def _most_are_names(texts: list[str], counts: np.ndarray) -> bool:
    numbers = names = 0
    for text, count in zip(texts, counts.tolist(), strict=True):
        if text and _is_number(text):
            numbers += count
        elif text:
            names += count
    return names > numbers


def _is_integer(text: str) -> bool:
    digits = text[1:] if text[:1] in ("-", "+") else text
    return digits.isascii() and digits.isdigit() and len(digits) <= 4000


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _index_of(column: str, text: str, limit: int) -> int | str:
    try:
        return parse_label(column, text, limit)
    except BrokenRow as error:
        return str(error)


def _position_of(text: str, positions: dict[str, int], whose: str) -> int | str:
    if text in positions:
        return positions[text]
    if not text:
        return "label: got '', expected the name of a class"
    return f"label: got {text!r:.40}, which is none of the {len(positions)} classes of {whose}"
