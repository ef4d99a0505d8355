"""Argument checks and seeding shared by the data modules."""

from __future__ import annotations

import numpy as np
import torch


def check_int(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} takes an integer >= {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} takes an integer >= {low}, got {value}")
    return int(value)


def check_fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} takes a number from 0 to 1, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} takes a number from 0 to 1, got {value}")
    return float(value)


def torch_generator(*entropy: int) -> torch.Generator:
    """A generator seeded from a tuple of integers; unlike sums of seeds, different tuples do not
    collide.
    """
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
