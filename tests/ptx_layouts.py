"""How matrices of 16-bit elements lie in registers and in shared memory, by the PTX ISA.

Fragments are arrays [lane, register]; neighbours along the last axis of a matrix share a register.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # lanes 4 i to 4 i + 3 hold row i
CHUNK = 8  # elements of 16 bytes, T in the ISA
CORE = 8 * CHUNK  # elements of a core matrix: 8 rows of 16 bytes


def pairs(bits: np.ndarray) -> np.ndarray:
    """Return neighbours along the last axis as one number, the first in the lower half."""
    return bits[..., ::2].astype(np.uint32) | bits[..., 1::2].astype(np.uint32) << 16


def small_fragment(matrix: np.ndarray) -> np.ndarray:
    """Return the register of each lane for an 8 x 8 matrix."""
    return pairs(matrix)[GROUP, MEMBER]


def a_fragment(a: np.ndarray) -> np.ndarray:
    """Return the 4 registers of each lane for A of 16 x 16."""
    quarters = [a[:8, :8], a[8:, :8], a[:8, 8:], a[8:, 8:]]
    return np.stack([small_fragment(quarter) for quarter in quarters], axis=1)


def b_fragment(b: np.ndarray) -> np.ndarray:
    """Return the 2 registers of each lane for B of 16 x 8."""
    return np.stack([small_fragment(half.T) for half in (b[:8], b[8:])], axis=1)


def accumulator(c: np.ndarray) -> np.ndarray:
    """Return the registers of each lane for an accumulator of 16 rows."""
    registers = np.arange(c.shape[1] // 2)
    rows = GROUP[:, None] + 8 * (registers // 2 % 2)
    return c[rows, 8 * (registers // 4) + 2 * MEMBER[:, None] + registers % 2]


# ---- shared memory, "Strides" and "Canonical layouts" of wgmma -----------------------------------


def _mode(index: np.ndarray, sizes: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Return what a mode (sizes):(strides) of a layout maps an index to; the last size is open."""
    offset = np.zeros_like(index)
    for size, stride in zip(sizes, strides, strict=False):
        offset += index % size * stride
        index = index // size
    return offset + index * strides[-1]


class Layout(NamedTuple):
    """A canonical layout: bytes of the swizzle (0: none), and which index has neighbours."""

    swizzle: int
    k_major: bool

    @property
    def chunks(self) -> int:
        """16-byte pieces in a row of the swizzle's pattern."""
        return max(1, self.swizzle // 16)

    @property
    def leading_is_k(self) -> bool:
        """Whether the leading byte offset belongs to k, otherwise to m or n."""
        return self.k_major or not self.swizzle

    def offsets(self, mn: int, k: int, leading: int, stride: int) -> np.ndarray:
        """Return the place of each element of an mn x k matrix, before the swizzle."""
        width = self.chunks * CHUNK
        rows, columns = np.arange(mn)[:, None], np.arange(k)[None]
        if self.k_major:
            along_k = leading if not self.swizzle else CHUNK
            return _mode(rows, (8,), (width, stride)) + _mode(columns, (CHUNK,), (1, along_k))
        along_mn, along_k = (leading, stride) if self.swizzle else (stride, leading)
        sizes = (CHUNK, self.chunks)
        return _mode(rows, sizes, (1, CHUNK, along_mn)) + _mode(columns, (8,), (width, along_k))

    def strides(self, mn: int, k: int, k_first: bool) -> tuple[int, int]:
        """Return leading and stride offset of a dense matrix, in elements."""
        atom = CORE * self.chunks
        if self.k_major and self.swizzle:
            return CHUNK, atom * (2 if k_first else 1)  # the leading offset is not used
        parts_mn = -(-mn // (CHUNK if self.leading_is_k else CHUNK * self.chunks))
        along_k, along_mn = (atom, atom * (k // 8)) if k_first else (atom * parts_mn, atom)
        return (along_k, along_mn) if self.leading_is_k else (along_mn, along_k)

    def swizzled(self, offsets: np.ndarray) -> np.ndarray:
        """Return places after the swizzle: bits 7.. of an address flip its bits 4.. ."""
        return offsets ^ (offsets >> 6 & self.chunks - 1) << 3

    def descriptor(self, start: int, leading: int, stride: int) -> int:
        """Return a matrix descriptor; the address is added to it. Arguments count elements."""
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        return start // 8 | leading // 8 << 16 | stride // 8 << 32 | mode << 62


LAYOUTS = [Layout(swizzle, k_major) for swizzle in (0, 32, 64, 128) for k_major in (True, False)]


class Stored(NamedTuple):
    """A matrix in shared memory, and how its parts of 64 rows and 16 columns are described."""

    image: np.ndarray
    places: np.ndarray
    layout: Layout
    strides: tuple[int, int]

    def descriptor(self, row: int, k: int, start: int) -> int:
        """Return the descriptor of the part at a row and column."""
        return self.layout.descriptor(start + int(self.places[row, k]), *self.strides)


def store(bits: np.ndarray, layout: Layout, k_first: bool) -> Stored:
    """Lay out a matrix [m or n, k] in a multiple of 2048 bytes."""
    strides = layout.strides(*bits.shape, k_first)
    places = layout.offsets(*bits.shape, *strides)
    image = np.zeros(-(-int(places.max() + layout.chunks * CORE) // 1024) * 1024, np.uint16)
    image[layout.swizzled(places)] = bits
    return Stored(image, places, layout, strides)
