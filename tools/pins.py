"""Print the oldest or newest tested versions as constraints for pip.

    python tools/pins.py oldest > pins.txt
    pip install --constraint pins.txt --editable ".[dev]"

The versions are those of mmfused/supported.py. The first line names their Python version.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

# By path, because importing mmfused would import torch.
SUPPORTED = Path(__file__).resolve().parents[1] / "mmfused" / "supported.py"


def pins(end: str) -> list[str]:
    """Return pip's lines for ``end``, which is "oldest" or "newest"."""
    versions = runpy.run_path(str(SUPPORTED))["TESTED"]
    column = ("oldest", "newest").index(end)
    chosen = {name: both[column] for name, both in versions.items()}
    python = chosen.pop("python")
    return [f"# Python {python}", *(f"{name}=={version}" for name, version in chosen.items())]


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"]):
        sys.exit(f"pins.py: got {' '.join(sys.argv[1:])!r}, expected oldest or newest")
    print("\n".join(pins(sys.argv[1])))
