"""Which line of this library launched something."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch

import mmfused

_ROOT = f"{Path(mmfused.__file__).parent.parent}/"
_TRACED = re.compile(r'\s*File "(.*)", line (\d+)')
_OP = re.compile(r"mmfused/ops/(\w+)/")
_ENGINE = "torch/autograd/graph.py"

Line = tuple[str, int]  # a file, from the root of the checkout, and a line of it


def origin() -> dict[str, str]:
    """Return "op" and "source" of what is launched now, see :class:`.launches.Launch`.

    In a backward pass, an operator of torch has no line of its own. Its node of the graph was made
    by a line of the forward pass.
    """
    here, node = _stack(), torch._C._current_autograd_node()
    made = [] if node is None else _in_library(map(_traced, node.metadata.get("traceback_", [])))
    op = next((match[1] for path, _ in made or here if (match := _OP.match(path))), "")
    path, line = (here or made or [("", 0)])[-1]
    return {"op": op, "source": f"{path}:{line}" if path else ""}


def _stack() -> list[Line]:
    """Return the lines of this library that are running, outermost first.

    In a backward pass, only those that torch's engine has called.
    """
    lines: list[Line] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.endswith(_ENGINE):
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return _in_library(reversed(lines))


def _traced(text: str) -> Line:
    """Return file and line of an entry of a traceback, which torch keeps as text."""
    match = _TRACED.match(text)
    return (match[1], int(match[2])) if match else ("", 0)


def _in_library(lines: Iterable[Line]) -> list[Line]:
    """Return the lines in mmfused and kernels, with paths from the root of the checkout."""
    found = [(path.removeprefix(_ROOT), line) for path, line in lines if path.startswith(_ROOT)]
    return [
        (path.removeprefix("mmfused/") if path.startswith("mmfused/kernels/") else path, line)
        for path, line in found
        if path.startswith(("mmfused/", "kernels/", "benchmarks/"))
        and not path.startswith("mmfused/tools/")
    ]
