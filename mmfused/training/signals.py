"""Stopping a training by SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A signal stopped a training, which is saved in ``path``; the message tells how to resume."""

    def __init__(self, signum: int, step: int, path: str) -> None:
        super().__init__(signum, step, path)
        self.signum = signum
        self.step = step
        self.path = path

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        return (
            f"stopped by {name} after step {self.step}, saved in {self.path}; "
            "run the same command with --resume to continue"
        )


class StopRequest:
    """``signum`` is None until the first SIGTERM or SIGINT; a call returns whether one came."""

    signum: int | None = None

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self.signum is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first SIGTERM or SIGINT instead of acting on it, so that a step can be finished.

    The second signal acts as it did before. Ignored signals stay ignored (a shell's background
    job). Outside the main thread, where Python allows no handlers, nothing changes.
    """
    stop = StopRequest()
    handlers = {}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        restore()

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(signum)
            # None: set by something other than Python, and could not be restored.
            if handler not in (None, signal.SIG_IGN):
                handlers[signum] = handler
        for signum in handlers:
            signal.signal(signum, note)
    try:
        yield stop
    finally:
        restore()
