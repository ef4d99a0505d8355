"""The folders of the packages, and the optional CUDA extension.

All other metadata is in pyproject.toml.
"""

import contextlib
import importlib.util
import os
from pathlib import Path

from setuptools import setup


def folders(root: str) -> list[Path]:
    """Return the folders below `root` that hold Python sources, `root` included."""
    return sorted({source.parent for source in Path(root).rglob("*.py")})


@contextlib.contextmanager
def extension():
    """Yield the arguments of setup() for csrc/ as mmfused._C, with MMFUSED_CUDA=1.

    Where it cannot be built, print why; without the variable the wheel is pure Python.
    """
    if os.environ.get("MMFUSED_CUDA") != "1":
        yield {}
        return
    reasons = ["torch is not installed where the build runs (pip install --no-build-isolation)"]
    with contextlib.suppress(ImportError):
        # By its path: importing the package would need the package's dependencies.
        spec = importlib.util.spec_from_file_location("extension", "mmfused/extension.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        reasons = build.why_not_build()
    if reasons:
        print(f"mmfused: MMFUSED_CUDA=1, but the CUDA extension is skipped: {'; '.join(reasons)}.")
        yield {}
        return
    with build.toolchain(build.architectures(unseen="8.0;9.0+PTX")) as cpp_extension:
        sources = [f"csrc/{name}" for name in build.SOURCES]
        module = cpp_extension.CUDAExtension(
            "mmfused._C", sources, extra_compile_args=build.compile_flags()
        )
        yield {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


# These are installed as mmfused.kernels and so on (mmfused/__init__.py says why they lie outside).
# csrc goes along as it is: the first use of a C++ kernel compiles it.
outside = [*folders("kernels"), *folders("benchmarks"), Path("csrc")]
places = {".".join(("mmfused", *path.parts)): path.as_posix() for path in outside}

with extension() as compiled:
    setup(
        packages=[".".join(path.parts) for path in folders("mmfused")] + list(places),
        package_dir=places,
        **compiled,
    )
