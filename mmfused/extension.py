"""Finds or builds the compiled module of the CUDA C++ kernels in csrc/.

``mmfused._C`` exists if the package was installed with ``MMFUSED_CUDA=1``. Otherwise :func:`load`
compiles it at first use, with ninja and nvcc, in torch's folder for extensions, where later
processes find it. :mod:`mmfused.library` decides which router runs.

setup.py runs this file on its own: it must not import mmfused at module level.
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
    """Return ``mmfused._C``, whose import registers the C++ operators.

    It is installed, was built before, or is built now, which takes half a minute. Later calls cost
    nothing. Raises ``RuntimeError`` with every reason where it can be neither found nor built.
    """
    global _module
    if _module is None:
        _module = sys.modules["mmfused._C"] = _load()
    return _module


# What torch.compiler.assume_constant_result does, without importing the compiler: torch.compile
# runs this function while tracing and traces nothing of it.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> ModuleType:
    if importlib.util.find_spec("mmfused._C") is not None:
        try:
            return importlib.import_module("mmfused._C")
        except ImportError as error:
            raise RuntimeError(
                "mmfused._C was compiled for another torch or CUDA: install mmfused again "
                f"({error})"
            ) from error
    folder = build_folder()
    with _only_builder(folder):
        if not _finished(folder):
            reasons = why_not_build()
            if reasons:
                raise RuntimeError(
                    "mmfused's CUDA C++ kernels are not built and cannot be built here: "
                    f"{'; '.join(reasons)}"
                )
            _build(folder)
        # Load it by its path, under the name it would have if it were installed: torch.ops must see
        # it once.
        loader = importlib.machinery.ExtensionFileLoader("mmfused._C", str(_library(folder)))
        spec = importlib.util.spec_from_loader("mmfused._C", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module


def built() -> bool:
    """Return whether :func:`load` would find the module compiled."""
    return (
        _module is not None
        or importlib.util.find_spec("mmfused._C") is not None
        or _finished(build_folder())
    )


def why_not() -> list[str]:
    """Return every reason why the C++ kernels cannot run here, if any; builds nothing."""
    reasons = [] if built() else why_not_build()
    if torch.version.cuda is not None and not torch.cuda.is_available():
        reasons.append("no CUDA GPU is visible")
    elif torch.version.cuda is not None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        reasons.append(f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer")
    return reasons


def why_not_build() -> list[str]:
    """Return every reason why the module cannot be compiled here, if any."""
    reasons = []
    if torch.version.cuda is None:
        reasons.append("this build of torch has no CUDA")
    if _cuda_home() is None:
        asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        missing = f"CUDA_HOME is {asked!r} and holds no bin/nvcc" if asked else "nvcc not found"
        reasons.append(missing)
    if _tool("ninja") is None:
        reasons.append("ninja not found")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        reasons.append(f"no C++ compiler found under the name {os.environ.get('CXX', 'c++')}")
    if not all((source_folder() / name).is_file() for name in SOURCES):
        reasons.append(f"the sources are not in {source_folder()}")
    return reasons


# ---- how it is compiled --------------------------------------------------------------------------


def source_folder() -> Path:
    """Return csrc/: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def build_folder() -> Path:
    """Return the folder of this build.

    Its name is a hash of everything that decides the compiler's output, so a stale module is never
    loaded.
    """
    versions = (torch.__version__, torch.version.cuda, sys.version_info[:2])
    recipe = hashlib.sha256(repr((*versions, CXX_FLAGS, NVCC_FLAGS)).encode())
    for source in sorted(source_folder().glob("*")):
        if source.suffix in (".cpp", ".cu", ".cuh", ".h"):
            recipe.update(source.read_bytes())
    recipe.update(architectures().encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return root / f"mmfused_C_{recipe.hexdigest()[:16]}"


def architectures(unseen: str = "9.0") -> str:
    """Return the architectures to compile for, in the form of TORCH_CUDA_ARCH_LIST.

    That variable decides, else the visible card, else ``unseen``. torch's own default is every
    architecture.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    if not torch.cuda.is_available():
        return unseen
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def include_folders() -> list[str]:
    """Return the folder of CUDA headers that the toolkit lacks and torch includes, if any.

    pip's CUDA packages have them.
    """
    home = _cuda_home()
    if home is not None and (home / "include" / "cusparse.h").is_file():
        return []
    sites = [Path(torch.__file__).resolve().parents[1], *map(Path, sys.path)]
    version = f"cu{(torch.version.cuda or '').split('.')[0]}"
    folders = [site / "nvidia" / version / "include" for site in sites]
    return [str(folder) for folder in folders if folder.is_dir()][:1]


def compile_flags() -> dict[str, list[str]]:
    """Return the flags of g++ and nvcc.

    pip's headers come last: the toolkit's own, which match nvcc, must take precedence.
    """
    late = [flag for folder in include_folders() for flag in ("-idirafter", folder)]
    return {"cxx": CXX_FLAGS + late, "nvcc": NVCC_FLAGS + [f"-Xcompiler={flag}" for flag in late]}


@contextlib.contextmanager
def toolchain(arch_list: str) -> Iterator[ModuleType]:
    """Set up ``torch.utils.cpp_extension`` for this toolkit and architecture, and undo it after."""
    home = _cuda_home()
    ninja = _tool("ninja")
    folders = (os.environ.get("PATH"), ninja and str(Path(ninja).parent))
    path = os.pathsep.join(filter(None, folders))
    settings = {"TORCH_CUDA_ARCH_LIST": arch_list, "PATH": path}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    from torch.utils import cpp_extension

    home_before = cpp_extension.CUDA_HOME  # set when torch was imported
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
    """Let one process build while the others wait.

    The operating system releases this lock when its holder dies. torch's lock file would block
    everyone after a process was killed.
    """
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
            "mmfused's CUDA C++ kernels need a folder to build in, see TORCH_EXTENSIONS_DIR: "
            f"{error}"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _tool(name: str) -> str | None:
    """Find a program on PATH or beside this interpreter, as in a venv that is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit.

    Prefer one with headers: some bin/nvcc only forward to the real one elsewhere.
    """
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if asked:
        candidates = [Path(asked)]
    else:
        found = shutil.which("nvcc")
        compilers = [os.path.realpath(found), found] if found else []
        candidates = [*(Path(path).parents[1] for path in compilers), USUAL_CUDA]
    homes = [home for home in candidates if (home / "bin" / "nvcc").is_file()]
    complete = [home for home in homes if (home / "include" / "cuda_runtime_api.h").is_file()]
    return next(iter(complete + homes), None)
