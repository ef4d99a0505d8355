"""Packages that come with an extra of mmfused, and what is said where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Imports within raise ModuleNotFoundError with the pip command where a package of the ``extra`` is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mmfused") or "pip install" in str(error):
            raise
        package = {"PIL": "pillow"}.get(package, package)
        message = f"{package} is not installed: pip install 'mmfused[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from error
