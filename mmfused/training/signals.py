"""Stop training on SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A signal stopped training after a checkpoint was saved; the message tells how to resume.

    Args:
        signum: number of the signal.
        step: step of the checkpoint.
        path: folder of the checkpoint.
    """

    def __init__(
        self,
        signum: int,
        step: int,
        path: str,
    ) -> None:
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
    """The signal that asked training to stop, if any.

    ``signum`` is None until the first SIGTERM or SIGINT.
    """

    signum: int | None = None

    def __call__(self) -> bool:
        """Return whether a signal has been received."""
        return self.signum is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record the first SIGTERM or SIGINT in a `StopRequest`, so that training can finish its step.

    Later signals are handled as outside this context. Signals that were ignored, as in background
    jobs of a shell, stay ignored. Outside the main thread, where Python allows no handlers, this
    context does nothing.
    """
    stop = StopRequest()
    handlers = {}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def record(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        restore()

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(signum)
            # A handler that Python did not set is None; `restore` could not set it again.
            if handler not in (None, signal.SIG_IGN):
                handlers[signum] = handler
        for signum in handlers:
            signal.signal(signum, record)
    try:
        yield stop
    finally:
        restore()
