"""Replace texts of a dataset by texts of other labels, to train and evaluate with noisy texts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ._common import Products, check_fraction, check_int
from .splits import Splits, checked_rows

# Attributes of product folders that do not depend on texts.
SHARED = (
    "file_names",
    "image_size",
    "load_image",
    "lost",
    "present",
    "resample",
    "resize",
)


class SwappedTexts(Splits, Dataset[dict[str, Any]]):
    """A dataset with some of its texts replaced; everything else is that of the dataset.

    Args:
        dataset: the original dataset.
        swapped: rows whose text is replaced.
        donors: for each row in ``swapped``, another row, whose text replaces the row's text.

    Examples:
        >>> from mmfused.data import GeneratedProducts, SwappedTexts
        >>> products = GeneratedProducts(size=64, image_size=8, missing_text=0.0)
        >>> noisy = SwappedTexts(products, swapped=[0], donors=[5])
        >>> noisy[0]["text"] == products[5]["text"]
        True
        >>> noisy[0]["label"] == products[0]["label"]  # only the text changes
        True
    """

    def __init__(
        self,
        dataset: Products,
        swapped: list[int],
        donors: list[int],
    ) -> None:
        self.dataset: Any = dataset
        self.swapped = swapped
        self.donors = donors
        self.texts: list[str] = list(dataset.texts)
        for row, donor in zip(swapped, donors, strict=True):
            self.texts[row] = dataset.texts[donor]
        self.labels: Sequence[int] = dataset.labels
        self.num_classes: int = dataset.num_classes
        self.class_names: Sequence[str] | None = dataset.class_names
        self.coarse_labels: Sequence[int] | None = getattr(dataset, "coarse_labels", None)
        self.skipped: list[str] = dataset.skipped
        self.streamed: bool = getattr(dataset, "streamed", False)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the dataset, such as ``load_image`` of a product folder."""
        if name in SHARED:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def images(self) -> Any:
        """All images, those of the dataset."""
        return self.dataset.images

    @property
    def digest(self) -> str:
        """SHA-256 of the original dataset's digest and of the new texts."""
        return hashlib.sha256(json.dumps([self.dataset.digest, self.texts]).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the original dataset's fingerprint and of the new texts."""
        content = [getattr(self.dataset, "fingerprint", self.dataset.digest), self.texts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def select(self, rows: Sequence[int] | np.ndarray) -> SwappedTexts:
        """Return a data set of only some items, with the texts that they have here.

        Args:
            rows: indices of the items, at least one. The result's ``donors`` are still indices of
                this data set, because a donor need not be selected.

        Raises:
            ValueError: ``rows`` is empty or has an index that is out of range.
        """
        found = checked_rows(rows, len(self))
        donors = dict(zip(self.swapped, self.donors, strict=True))
        part = copy.copy(self)
        part.dataset = self.dataset.select(found)
        part.texts = [self.texts[row] for row in found.tolist()]
        part.labels, part.skipped = part.dataset.labels, part.dataset.skipped
        part.coarse_labels = part.dataset.coarse_labels
        part.swapped = [place for place, row in enumerate(found.tolist()) if row in donors]
        part.donors = [donors[row] for row in found.tolist() if row in donors]
        return part

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "text": self.texts[index]}


def swap_texts(dataset: Products, fraction: float, seed: int) -> SwappedTexts:
    """Return ``dataset`` with a fraction of its texts replaced by texts of other labels.

    Exactly ``round(fraction * len(dataset))`` rows are drawn without replacement. The new text of
    each row is drawn uniformly from the non-empty texts of all other labels.

    Args:
        dataset: the dataset.
        fraction: fraction of the rows whose text is replaced.
        seed: seed of the random draws.

    Raises:
        ValueError: there is no text of another label for a row, ``fraction`` is not in [0, 1], or
            ``seed`` is negative.

    Examples:
        >>> from mmfused.data import GeneratedProducts, swap_texts
        >>> products = GeneratedProducts(size=64, image_size=8)
        >>> noisy = swap_texts(products, fraction=0.25, seed=0)
        >>> len(noisy.swapped)  # rows with a text of another label
        16
        >>> row, donor = noisy.swapped[0], noisy.donors[0]
        >>> noisy[row]["text"] == products[donor]["text"]
        True
        >>> products[row]["label"] == products[donor]["label"]
        False
    """
    fraction = check_fraction("fraction", fraction)
    rng = np.random.default_rng(check_int("seed", seed, 0))
    rows = np.sort(rng.permutation(len(dataset))[: round(fraction * len(dataset))])
    labels = np.asarray(dataset.labels, dtype=np.int64)
    with_text = np.flatnonzero([text != "" for text in dataset.texts])
    donors = with_text[np.argsort(labels[with_text], kind="stable")]
    # For each row, donors[start:stop] have the label of the row, and are excluded.
    start = np.searchsorted(labels[donors], labels[rows], side="left")
    stop = np.searchsorted(labels[donors], labels[rows], side="right")
    others = len(donors) - (stop - start)
    if len(rows) and others.min() == 0:
        row = int(rows[others.argmin()])
        raise ValueError(
            f"dataset: got only texts of label {labels[row]}, "
            "expected texts of at least two labels to swap"
        )
    draw = rng.integers(0, np.maximum(others, 1))
    chosen = donors[np.where(draw < start, draw, draw + stop - start)]
    return SwappedTexts(dataset, rows.tolist(), chosen.tolist())
