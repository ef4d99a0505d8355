"""Detect what a hostile file must not do: run code, open other files or connect to a server."""

import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch

CODE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
# (folder, events) of each active watcher. The audit hook stays installed and uses the last entry.
_watched = []


def _hook(event, arguments):
    if not _watched:
        return
    if event in CODE or event.startswith("socket."):
        _watched[-1][1].append((event, arguments[-1] if arguments else None))
    elif event == "open":
        _note_open(arguments[0])


def _note_open(path):
    outside, seen = _watched[-1]
    if isinstance(path, (str, bytes, os.PathLike)) and str(outside) in os.path.realpath(
        os.fsdecode(path)
    ):
        seen.append(("open", os.fsdecode(path)))


sys.addaudithook(_hook)


@contextmanager
def watched(outside: Path):
    """Yield a list of events: files opened below ``outside``, connections, and code that ran."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        # These functions open files without raising a Python audit event.
        for owner, name in ((safetensors, "safe_open"), (safetensors.torch, "load_file")):
            patch.setattr(owner, name, _noting(getattr(owner, name)))
        _watched.append((outside, seen))
        try:
            yield seen
        finally:
            _watched.pop()


def _noting(call):
    def noting(path, *args, **options):
        if _watched:
            _note_open(path)
        return call(path, *args, **options)

    return noting


class Payload:
    """An object whose unpickling creates the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


class Outside:
    """A folder that hostile files refer to, and that must not be opened.

    Loading the pickle or running the module creates the file ``marker``.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.marker = folder, folder / "marker"
        self.pickle, self.module, self.file = (
            folder / "weights.pt",
            folder / "module.py",
            folder / "canary.safetensors",
        )
        self.pickle.write_bytes(pickle.dumps(Payload(self.marker)))
        self.module.write_text(f"open({str(self.marker)!r}, 'w')\n")
        self.file.write_bytes(b"secret")

    @contextmanager
    def untouched(self):
        with watched(self.folder) as seen:
            yield
        assert not seen and not self.marker.exists()

    def refuses(self, call, match: str):
        """Check that ``call`` raises a one-line error and opens nothing in this folder."""
        with (
            self.untouched(),
            pytest.raises((ValueError, FileNotFoundError), match=match) as caught,
        ):
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2500
