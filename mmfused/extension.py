"""The CUDA C++ kernels of csrc/: where the compiled module comes from. Which router runs is decided
in :mod:`.library`.

``mmfused._C`` is there if the package was installed with ``MMFUSED_CUDA=1``. Else :func:`load`
compiles it at its first use, with ninja and nvcc, into torch's folder for extensions, where later
processes find it. setup.py runs this file by itself: it must not import mmfused at module level.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

SOURCES = ("bindings.cpp", "topk_routing.cu", "topk_routing_host.cpp")
CXX_FLAGS = ["-O3"]  # torch adds the standard its own headers need
NVCC_FLAGS = ["-O3", "-Xptxas=-warn-spills"]
USUAL_CUDA = Path("/usr/local/cuda")
_module: ModuleType | None = None


# ---- the compiled module -------------------------------------------------------------------------


def load() -> ModuleType:
    """``mmfused._C``, whose import implements the C++ ops: as installed, as built before, or built
    now (half a minute).

    Raises ``RuntimeError`` with every reason where it can be neither found nor built. Calling it
    again costs nothing."""
    global _module
    if _module is None:
        _module = sys.modules["mmfused._C"] = _load()
    return _module


# As torch.compiler.assume_constant_result does it, which would import the compiler with mmfused:
# torch.compile runs this where it meets it, and traces nothing of it.
load._dynamo_marked_constant = True


def _load() -> ModuleType:
    if importlib.util.find_spec("mmfused._C") is not None:
        try:
            return importlib.import_module("mmfused._C")
        except ImportError as error:
            raise RuntimeError(
                f"mmfused._C was compiled for another torch or CUDA: install mmfused again ({error})."
            ) from error
    folder = build_folder()
    with _only_builder(folder):
        if not _finished(folder):
            reasons = why_not_build()
            if reasons:
                raise RuntimeError(
                    f"mmfused's CUDA C++ kernels are not built, and cannot be here: {'; '.join(reasons)}."
                )
            _build(folder)
        # Loaded by its path under the name it would have if it were installed; torch.ops must see
        # it once.
        loader = importlib.machinery.ExtensionFileLoader("mmfused._C", str(_library(folder)))
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_loader("mmfused._C", loader)
        )
        loader.exec_module(module)
        return module


def built() -> bool:
    """Whether :func:`load` would find the module compiled."""
    return (
        _module is not None
        or importlib.util.find_spec("mmfused._C") is not None
        or _finished(build_folder())
    )


def why_not() -> list[str]:
    """Every reason why the C++ kernels cannot run here; empty where they can. Builds nothing."""
    reasons = [] if built() else why_not_build()
    if torch.version.cuda is not None and not torch.cuda.is_available():
        reasons.append("no CUDA GPU is visible")
    elif torch.version.cuda is not None and torch.cuda.get_device_capability() < (8, 0):
        reasons.append(
            "the GPU is sm_{}{}, the kernels need sm_80 or newer".format(
                *torch.cuda.get_device_capability()
            )
        )
    return reasons


def why_not_build() -> list[str]:
    """Every reason why the module cannot be compiled here; empty where it can."""
    reasons = []
    if torch.version.cuda is None:
        reasons.append("this build of torch has no CUDA")
    if _cuda_home() is None:
        asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        reasons.append(
            f"CUDA_HOME is {asked!r} and holds no bin/nvcc" if asked else "nvcc not found"
        )
    if _tool("ninja") is None:
        reasons.append("ninja not found")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        reasons.append(f"no C++ compiler found under the name {os.environ.get('CXX', 'c++')}")
    if not all((source_folder() / name).is_file() for name in SOURCES):
        reasons.append(f"the sources are not in {source_folder()}")
    return reasons


# ---- how it is compiled --------------------------------------------------------------------------


def source_folder() -> Path:
    """A wheel carries the sources as mmfused/csrc, a checkout has them beside the package."""
    package = Path(__file__).resolve().parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def build_folder() -> Path:
    """Where this build lies: its name holds all that decides what the compiler makes, so a stale
    module is never loaded.
    """
    recipe = hashlib.sha256(
        repr(
            (torch.__version__, torch.version.cuda, sys.version_info[:2], CXX_FLAGS, NVCC_FLAGS)
        ).encode()
    )
    for source in sorted(
        path for path in source_folder().glob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")
    ):
        recipe.update(source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = (
        Path(root)
        if root
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    )
    recipe.update(architectures().encode())
    return root / f"mmfused_C_{recipe.hexdigest()[:16]}"


def architectures(unseen: str = "9.0") -> str:
    """As TORCH_CUDA_ARCH_LIST has it: what the user set, else the visible card's, else ``unseen``;
    torch would take all.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    return (
        "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else unseen
    )


def include_folders() -> list[str]:
    """Headers of CUDA that a bare toolkit lacks and torch may ask for; pip's packages have them."""
    home = _cuda_home()
    if home is not None and (home / "include" / "cusparse.h").is_file():
        return []
    sites = [Path(torch.__file__).resolve().parents[1], *map(Path, sys.path)]
    folders = [
        site / "nvidia" / f"cu{(torch.version.cuda or '').split('.')[0]}" / "include"
        for site in sites
    ]
    return [str(folder) for folder in folders if folder.is_dir()][:1]


def compile_flags() -> dict[str, list[str]]:
    """For g++ and nvcc. pip's headers come last: the toolkit's own must win, whose version nvcc
    has.
    """
    late = [flag for folder in include_folders() for flag in ("-idirafter", folder)]
    return {"cxx": CXX_FLAGS + late, "nvcc": NVCC_FLAGS + [f"-Xcompiler={flag}" for flag in late]}


@contextlib.contextmanager
def toolchain(arch_list: str) -> Iterator[ModuleType]:
    """``torch.utils.cpp_extension`` set up for this toolkit, architecture and PATH; nothing of that
    stays behind.
    """
    home = _cuda_home()
    ninja = _tool("ninja")
    path = os.pathsep.join(
        filter(None, (os.environ.get("PATH"), ninja and str(Path(ninja).parent)))
    )
    settings = {"TORCH_CUDA_ARCH_LIST": arch_list, "PATH": path}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    from torch.utils import cpp_extension

    home_before = cpp_extension.CUDA_HOME  # decided once, when the module was imported
    cpp_extension.CUDA_HOME = home and str(home)
    try:
        yield cpp_extension
    finally:
        cpp_extension.CUDA_HOME = home_before
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _build(folder: Path) -> None:
    flags = compile_flags()
    with toolchain(architectures()) as cpp_extension:
        try:
            cpp_extension.load(
                folder.name,
                [str(source_folder() / name) for name in SOURCES],
                extra_cflags=flags["cxx"],
                extra_cuda_cflags=flags["nvcc"],
                build_directory=str(folder),
                with_cuda=True,
                is_python_module=False,
            )
        except Exception as error:
            raise RuntimeError(
                f"mmfused's CUDA C++ kernels could not be built in {folder}: {error}"
            ) from error
    (folder / "finished").touch()


def _library(folder: Path) -> Path:
    return folder / f"{folder.name}.so"


def _finished(folder: Path) -> bool:
    return (folder / "finished").is_file() and _library(folder).is_file()


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """One process builds, the others wait. The system frees this lock when its holder dies; torch's
    own file, once left behind by a process that was killed, would be waited for without end."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "builder", "w")
    except OSError as error:
        raise RuntimeError(
            f"mmfused's CUDA C++ kernels need a folder to build in, see TORCH_EXTENSIONS_DIR: {error}."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _tool(name: str) -> str | None:
    """A program on PATH, or beside this interpreter: a venv that is not activated has its ninja
    there.
    """
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _cuda_home() -> Path | None:
    """The folder of the CUDA toolkit. A bin/nvcc that only forwards to the real one has no headers
    beside it, so headers decide.
    """
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc")
    homes = (
        [Path(asked)]
        if asked
        else [Path(path).parents[1] for path in (found and os.path.realpath(found), found) if path]
    )
    homes = [
        home
        for home in (*homes, *([] if asked else [USUAL_CUDA]))
        if (home / "bin" / "nvcc").is_file()
    ]
    return next(
        (home for home in homes if (home / "include" / "cuda_runtime_api.h").is_file()),
        homes[0] if homes else None,
    )
