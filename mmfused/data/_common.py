"""Argument checks, seeding and protocols shared by the data modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch

# How a picture becomes a square, see `load_picture`.
Resize: TypeAlias = Literal["crop", "stretch", "shortest"]
Resample: TypeAlias = Literal["bicubic", "bilinear"]


Batch: TypeAlias = dict[str, torch.Tensor]


class Rows(Protocol):
    """A dataset; :class:`mmfused.data.ProductFolder` documents the keys of its items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class LabelledRows(Rows, Protocol):
    """A dataset with labels; `PairBatches` also uses ``coarse_labels`` if the dataset has them."""

    @property
    def labels(self) -> Sequence[int]:
        """The label of each item."""
        ...


class Products(LabelledRows, Protocol):
    """The attributes that all product sets of this package have."""

    @property
    def texts(self) -> Sequence[str]:
        """The text of each item, "" if the item has no text."""
        ...

    @property
    def num_classes(self) -> int:
        """The number of classes; every label is smaller."""
        ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes in the order of the labels, or None."""
        ...

    @property
    def skipped(self) -> list[str]:
        """For each row that was skipped, a sentence that gives the reason."""
        ...

    @property
    def images(self) -> Any:
        """All images, as one tensor or a list of tensors."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the items."""
        ...


def check_int(name: str, value: object, low: int) -> int:
    """Return ``value`` as an int.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is below ``low``.
    """
    message = f"{name}: got {value!r}, expected an integer of at least {low}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(message)
    if value < low:
        raise ValueError(message)
    return int(value)


def check_fraction(name: str, value: object) -> float:
    """Return ``value`` as a float.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is not between 0 and 1.
    """
    message = f"{name}: got {value!r}, expected a number from 0 to 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    if not 0.0 <= value <= 1.0:
        raise ValueError(message)
    return float(value)


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless ``value`` is one of the strings of the Literal ``choices``."""
    options = get_args(choices)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: got {value!r:.80}, expected {' or '.join(map(repr, options))}")


def check_ranks(batch_size: int, world: int) -> None:
    """Raise ValueError unless ``batch_size`` is a multiple of ``world``, the number of ranks."""
    if batch_size % world:
        raise ValueError(
            f"batch_size: got {batch_size}, expected a multiple of {world}, the number of ranks"
        )


def torch_generator(*entropy: int) -> torch.Generator:
    """Return a generator whose seed is a hash of several integers.

    A sum of the integers would give equal seeds for different integers.
    """
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
