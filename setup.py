"""Where the packages lie; all other metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import setup


def folders(root: str) -> list[Path]:
    """All folders below `root` that hold Python sources, `root` included."""
    return sorted({source.parent for source in Path(root).rglob("*.py")})


# These two are installed as mmfused.kernels and mmfused.benchmarks (mmfused/__init__.py says why they lie outside).
outside = folders("kernels") + folders("benchmarks")
places = {".".join(("mmfused", *path.parts)): path.as_posix() for path in outside}

setup(packages=[".".join(path.parts) for path in folders("mmfused")] + list(places), package_dir=places)
