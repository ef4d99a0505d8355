"""Argument checks, seeding and types shared by the data modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch


class Rows(Protocol):
    """Any dataset of items, as :class:`mmfused.data.ProductFolder` describes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class LabelledRows(Rows, Protocol):
    """Items with their labels; pairs also use ``coarse_labels`` if there are any."""

    @property
    def labels(self) -> Sequence[int]:
        """The label of each item."""
        ...


class Products(LabelledRows, Protocol):
    """What the product sets of this package have in common."""

    @property
    def texts(self) -> Sequence[str]:
        """The text of each item; "" if it is missing."""
        ...

    @property
    def num_classes(self) -> int:
        """All labels are below it."""
        ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names by label, if there are any."""
        ...

    @property
    def skipped(self) -> list[str]:
        """One sentence about each row that was skipped."""
        ...

    @property
    def images(self) -> Any:
        """All images, as one tensor or a list."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        ...


def check_int(name: str, value: object, low: int) -> int:
    """Return ``value`` as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below ``low``.
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
        TypeError: it is no number.
        ValueError: it is not from 0 to 1.
    """
    message = f"{name}: got {value!r}, expected a number from 0 to 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    if not 0.0 <= value <= 1.0:
        raise ValueError(message)
    return float(value)


def check_ranks(batch_size: int, world: int) -> None:
    """Raise ValueError unless ``world`` ranks can share a batch equally."""
    if batch_size % world:
        raise ValueError(
            f"batch_size: got {batch_size}, expected a multiple of {world}, the number of ranks"
        )


def torch_generator(*entropy: int) -> torch.Generator:
    """Return a generator seeded from several integers; other integers give another seed.

    Sums of seeds would collide.
    """
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
