"""Wrong texts on purpose: the noisy-modality setting."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from torch.utils.data import Dataset

from ._common import check_fraction, check_int


class SwappedTexts(Dataset):
    """A dataset seen with other texts; images, labels and everything else are the wrapped dataset's
    own.

    ``.swapped`` lists the rows whose text was replaced and ``.donors`` the rows the replacements
    come from."""

    def __init__(self, dataset, swapped: list[int], donors: list[int]):
        self.dataset = dataset
        self.swapped = swapped
        self.donors = donors
        self.texts = list(dataset.texts)
        for row, donor in zip(swapped, donors, strict=True):
            self.texts[row] = dataset.texts[donor]
        self.labels = dataset.labels
        self.num_classes = dataset.num_classes
        self.class_names = dataset.class_names
        self.coarse_labels = getattr(dataset, "coarse_labels", None)
        self.skipped = dataset.skipped
        self.images = dataset.images

    @property
    def digest(self) -> str:
        """SHA-256 of the wrapped dataset's and of the texts; another where one of them is."""
        return hashlib.sha256(json.dumps([self.dataset.digest, self.texts]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], "text": self.texts[index]}


def swap_texts(dataset, fraction: float, seed: int) -> SwappedTexts:
    """Replaces the text of exactly ``round(fraction * len(dataset))`` rows by a text of another
    label.

    Rows are drawn without replacement, donors uniformly from the rows that have a text and another
    label, both from ``seed`` alone. Raises ValueError where a row to be swapped has no possible
    donor."""
    fraction = check_fraction("fraction", fraction)
    rng = np.random.default_rng(check_int("seed", seed, 0))
    rows = np.sort(rng.permutation(len(dataset))[: round(fraction * len(dataset))])
    labels = np.asarray(dataset.labels, dtype=np.int64)
    with_text = np.flatnonzero([text != "" for text in dataset.texts])
    donors = with_text[np.argsort(labels[with_text], kind="stable")]
    # Donors sorted by label: those of the row's own label are one block, and a draw from the others
    # jumps over it.
    start = np.searchsorted(labels[donors], labels[rows], side="left")
    stop = np.searchsorted(labels[donors], labels[rows], side="right")
    others = len(donors) - (stop - start)
    if len(rows) and others.min() == 0:
        row = int(rows[others.argmin()])
        raise ValueError(
            f"dataset takes texts of at least two labels to swap, got none but label {labels[row]}'s"
        )
    draw = rng.integers(0, np.maximum(others, 1))
    chosen = donors[np.where(draw < start, draw, draw + stop - start)]
    return SwappedTexts(dataset, rows.tolist(), chosen.tolist())
