"""Packages that come with an extra of mmfused, and what is said where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = {  # by the name they are imported under
    "models": {
        **{
            name: name
            for name in "timm transformers tokenizers torchvision numpy safetensors tqdm matplotlib".split()
        },
        "PIL": "pillow",
    },
}


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Imports within raise ModuleNotFoundError with the pip command where a package of the
    ``extra`` is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES[extra].get((error.name or "").partition(".")[0])
        if package is None or "pip install" in str(error):
            raise
        message = f"{package} is not installed: pip install 'mmfused[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from error
