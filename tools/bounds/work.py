"""The work of a launch of a baseline, and the time that it needs at a card's rates."""

from __future__ import annotations

from typing import NamedTuple

from .cards import Card

# Seconds from the end of a kernel of a CUDA graph to the start of the next one. Source: A. Gray,
# "Getting Started with CUDA Graphs", NVIDIA Developer Blog, 2019: kernels of 2.9 us take 3.4 us
# each in a graph (on a V100).
GRAPH_GAP = 0.5e-6


class Work(NamedTuple):
    """FLOPs of matrix products and bytes of device memory of one launch.

    ``rate``: what multiplies: "matrix" (16-bit tensor cores), "tf32" or "float32".
    """

    name: str
    flops: float
    bytes: float
    rate: str = "matrix"


class Passes(NamedTuple):
    """The launches of the forward and of the backward pass."""

    forward: list[Work]
    backward: list[Work]


def seconds(work: Work, card: Card) -> float:
    """Return the time of a launch: of its FLOPs or of its bytes, whichever is longer."""
    flops_per_second = {"matrix": card.matrix, "tf32": card.matrix / 2, "float32": card.float32}
    return max(work.flops / flops_per_second[work.rate], work.bytes / card.dram)


def total_seconds(launches: list[Work], card: Card, gap: float = 0.0) -> float:
    """Return the time of launches one after the other, with ``gap`` seconds for each."""
    return sum(seconds(work, card) + gap for work in launches)


def microseconds(seconds: float) -> str:
    """Return a time as text with three digits."""
    return f"{1e6 * seconds:.3g}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def time_range(low: float, high: float) -> str:
    """Return one time in microseconds, or two if they differ by more than 1 %."""
    one = high < 1.01 * low
    return microseconds(high) if one else f"{microseconds(low)} to {microseconds(high)}"
