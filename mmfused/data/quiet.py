"""Suppress what Pillow warns of and logs."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from PIL import TiffImagePlugin

# Ignores the warnings of Pillow; the group tells it from a filter that somebody else set.
FILTER = ("ignore", None, Warning, re.compile(r"(?:PIL)\."), 0)


class _Quiet:
    """A context manager that suppresses Pillow's warnings and TIFF log messages in all threads.

    Warning filters are global, so the first thread to enter sets one, and the last thread to leave
    removes it. All others stay as they are: `warnings.catch_warnings` would also undo what other
    threads have changed in the meantime.
    """

    def __init__(self) -> None:
        self.lock: Any = threading.Lock()
        self.entries: int = 0
        self.undo: Callable[[], None] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            self.entries += 1
            if self.entries == 1:
                self.undo = self._silence()
        try:
            yield
        finally:
            with self.lock:
                self.entries -= 1
                if self.entries == 0 and self.undo is not None:
                    self.undo()

    @staticmethod
    def _silence() -> Callable[[], None]:
        filters: Any = warnings.filters
        if FILTER not in filters:
            filters.insert(0, FILTER)
        logger, was_disabled = TiffImagePlugin.logger, TiffImagePlugin.logger.disabled
        logger.disabled = True

        def undo() -> None:
            logger.disabled = was_disabled
            # Another thread may have put another list in the place of the filters.
            with contextlib.suppress(ValueError):
                filters: Any = warnings.filters
                filters.remove(FILTER)

        return undo


quiet: _Quiet = _Quiet()
