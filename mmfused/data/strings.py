"""A sequence of strings that takes little more memory than their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, overload

import numpy as np

# Number of strings that exist as Python objects while all of them are read one after another.
BLOCK = 4096
SHOWN = 20  # a representation shows at most so many strings


class Strings(Sequence[str]):
    """The strings of an Arrow column, each of which becomes a Python object only when it is read.

    It is equal to any list or other ``Strings`` with the same strings.

    Args:
        column: a pyarrow Array or ChunkedArray of strings, or a list; null becomes "".

    Examples:
        >>> import pyarrow
        >>> from mmfused.data.strings import Strings
        >>> texts = Strings(pyarrow.array(["Red mug", "Blue plate", ""]))
        >>> texts[1], texts[-1], len(texts)
        ('Blue plate', '', 3)
        >>> texts.take([2, 0])
        ['', 'Red mug']
    """

    def __init__(self, column: Any) -> None:
        import pyarrow
        import pyarrow.compute

        if isinstance(column, list):
            column = pyarrow.array(column, pyarrow.large_string())
        if isinstance(column, pyarrow.ChunkedArray):
            # The offsets of `string` have 32 bits, too few for more than 2 GiB in one array.
            column = column.cast(pyarrow.large_string()).combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):  # pyarrow before 15, without a chunk
            column = pyarrow.concat_arrays(column.chunks or [pyarrow.array([], column.type)])
        self._array: Any = pyarrow.compute.fill_null(column, "")

    def take(self, rows: Sequence[int] | np.ndarray) -> Strings:
        """Return the strings of ``rows``, in the order of ``rows``; no copy if these are all."""
        import pyarrow

        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        return Strings(self._array.take(pyarrow.array(np.asarray(rows, dtype=np.int64))))

    def empty(self) -> np.ndarray:
        """Return for each string whether it is empty, (N,) bool."""
        import pyarrow
        import pyarrow.compute

        blank = pyarrow.scalar("", self._array.type)
        is_empty: Any = pyarrow.compute.call_function("equal", [self._array, blank])
        return is_empty.to_numpy(zero_copy_only=False)

    def groups(self) -> tuple[list[str], np.ndarray]:
        """Return the distinct strings, and for each string its position there, (N,) int64."""
        encoded = self._array.dictionary_encode()
        positions = encoded.indices.to_numpy(zero_copy_only=False)
        return encoded.dictionary.to_pylist(), np.asarray(positions, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self._array[index].to_pylist()
        return self._array[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return bool(self._array.equals(other._array))
        if not isinstance(other, Sequence) or isinstance(other, str) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if len(self) <= SHOWN:
            return repr(list(self))
        return f"<{len(self)} strings, the first {self[0]!r:.80}>"


def release_memory() -> None:
    """Give the memory of dropped Arrow columns back to the system, which Arrow would keep."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
