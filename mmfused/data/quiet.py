"""Suppress what Pillow warns of and logs."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from PIL import TiffImagePlugin


class _Quiet:
    """A context manager that suppresses Pillow's warnings and TIFF log messages in all threads.

    Warning filters are global, so the first thread to enter sets them, and the last thread to leave
    restores them.
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
        stack = contextlib.ExitStack()
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")
        stack.callback(setattr, TiffImagePlugin.logger, "disabled", TiffImagePlugin.logger.disabled)
        TiffImagePlugin.logger.disabled = True
        return stack.close


quiet: _Quiet = _Quiet()
