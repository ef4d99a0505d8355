"""What a hostile file must not bring about: its own code, a look outside its folder, a connection."""

import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

_watched = []  # of the one who watches now: a folder, and what was seen; a hook stays for good


def _hook(event, arguments):
    if not _watched:
        return
    outside, seen = _watched[-1]
    if event in (
        "socket.connect",
        "socket.getaddrinfo",
        "subprocess.Popen",
        "os.system",
        "pickle.find_class",
    ):
        seen.append((event, arguments[-1]))
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        if str(outside) in os.path.abspath(os.fsdecode(arguments[0])):
            seen.append((event, arguments[0]))


sys.addaudithook(_hook)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


class Outside:
    """A folder beside the hostile one, which holds a pickle, a module and a file, and gets a marker where one of them ran."""

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
        seen = []
        _watched.append((self.folder, seen))
        try:
            yield
        finally:
            _watched.pop()
        assert not seen and not self.marker.exists()

    def refuses(self, call, match: str):
        """One sentence, and nothing done."""
        with (
            self.untouched(),
            pytest.raises((ValueError, FileNotFoundError), match=match) as caught,
        ):
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2500
