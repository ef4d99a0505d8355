"""Batches of any rows of a data set."""

from __future__ import annotations

from typing import Any

from .batches import Collate, Items


def make_items(
    dataset: Any,
    collate: Collate,
    workers: int | None = None,
    batch_size: int = 64,
) -> Items:
    """Return the `Items` of a dataset; ``workers`` and ``batch_size`` are for streamed ones."""
    return Items(dataset, collate)
