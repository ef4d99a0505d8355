"""A plugin of pytest that runs a part of the tests: ``-p pytest_part --part 2/6``.

gpu_tests.py divides test files with it. Tests of one case share kernels, and so share a part.
"""

from __future__ import annotations

import zlib
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--part", metavar="I/N", help="run only the I-th of N parts of the tests")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of one part."""
    part = config.getoption("--part")
    if part is None:
        return
    index, count = map(int, part.split("/"))
    kept = [item for item in items if part_of(item) % count == index - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def part_of(item: Any) -> int:
    """Return a number that is the same for all tests of a case."""
    parameters = getattr(item, "callspec", None)
    case = parameters and parameters.params.get("name")
    return zlib.crc32(str(case or item.nodeid).encode())
