"""List the packages and the optional CUDA extension; all other metadata is in pyproject.toml."""

import contextlib
import importlib.util
import os
from pathlib import Path

from setuptools import setup


def folders(root: str) -> list[Path]:
    """Return the folders that contain Python files: ``root`` and folders below ``root``."""
    return sorted({source.parent for source in Path(root).rglob("*.py")})


@contextlib.contextmanager
def extension():
    """Yield the arguments of setup() that build csrc/ as mmfused._C.

    Unless MMFUSED_CUDA=1 is set, there are no arguments. If the extension cannot be built, print
    the reasons and yield no arguments.
    """
    if os.environ.get("MMFUSED_CUDA") != "1":
        yield {}
        return
    reasons = ["the build environment has no torch (use pip install --no-build-isolation)"]
    with contextlib.suppress(ImportError):
        # Load the file by its path, because importing mmfused needs the package's dependencies.
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


# Folders outside mmfused/ (see mmfused/__init__.py), installed as mmfused.kernels and so on.
# The sources in csrc are included, because they are compiled when a C++ kernel is first used.
outside = [*folders("kernels"), *folders("benchmarks"), Path("csrc")]
package_dir = {".".join(("mmfused", *path.parts)): path.as_posix() for path in outside}

with extension() as compiled:
    setup(
        packages=[".".join(path.parts) for path in folders("mmfused")] + list(package_dir),
        package_dir=package_dir,
        **compiled,
    )
