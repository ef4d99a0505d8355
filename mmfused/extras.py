"""Error messages for missing optional packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# For each extra: name of a module -> package to install.
PACKAGES: dict[str, dict[str, str]] = {
    "models": {
        "PIL": "pillow",
        "datasets": "datasets",
        "matplotlib": "matplotlib",
        "numpy": "numpy",
        "pyarrow": "datasets",
        "safetensors": "safetensors",
        "timm": "timm",
        "tokenizers": "tokenizers",
        "torchvision": "torchvision",
        "tqdm": "tqdm",
        "transformers": "transformers",
    },
    "lora": {"peft": "peft"},
}


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Add the pip command to the ``ModuleNotFoundError`` of a missing package of ``extra``."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES[extra].get((error.name or "").partition(".")[0])
        if package is None or "pip install" in str(error):
            raise
        message = f"{package} is not installed: pip install 'mmfused[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from error
