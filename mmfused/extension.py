"""Find or build the extension module with the CUDA C++ kernels in csrc/.

An installation with ``MMFUSED_CUDA=1`` contains the module ``mmfused._C``. Otherwise :func:`load`
compiles the module at first use, with ninja and nvcc, in torch's folder for extensions, where later
processes find it. The kernels compute :func:`mmfused.topk_routing` if the router
(:class:`mmfused.library.router`) is "cuda".

setup.py runs this file without the package, so it must not import mmfused at module level.
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
CXX_FLAGS = ["-O3"]  # torch adds the C++ standard that its headers need
NVCC_FLAGS = ["-O3", "-Xptxas=-warn-spills"]
USUAL_CUDA = Path("/usr/local/cuda")
_module: ModuleType | None = None


# ---- the compiled module -------------------------------------------------------------------------


def load() -> ModuleType:
    """Return the module ``mmfused._C``, whose import registers the C++ operators.

    If the module is neither installed nor built yet, it is built now, which takes half a minute.

    Raises:
        RuntimeError: the module can be neither found nor built, or the installed one does not load.
    """
    global _module
    if _module is None:
        _module = sys.modules["mmfused._C"] = _load()
    return _module


# Like torch.compiler.assume_constant_result, but without importing the compiler: while tracing,
# torch.compile calls this function instead of tracing it.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> ModuleType:
    if importlib.util.find_spec("mmfused._C") is not None:
        try:
            return importlib.import_module("mmfused._C")
        except ImportError as error:
            raise RuntimeError(
                "mmfused._C was compiled for another version of torch or CUDA; install mmfused "
                f"again ({error})"
            ) from error
    folder = build_folder()
    with _build_lock(folder):
        if not _is_built(folder):
            reasons = why_not_build()
            if reasons:
                raise RuntimeError(
                    "mmfused's CUDA C++ kernels are not built and cannot be built here: "
                    f"{'; '.join(reasons)}"
                )
            _build(folder)
        # The name is that of the installed module, so that importing it later does not register
        # the operators again.
        loader = importlib.machinery.ExtensionFileLoader("mmfused._C", str(_library(folder)))
        spec = importlib.util.spec_from_loader("mmfused._C", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module


def built() -> bool:
    """Return whether the module is installed or has been built."""
    return (
        _module is not None
        or importlib.util.find_spec("mmfused._C") is not None
        or _is_built(build_folder())
    )


def why_not() -> list[str]:
    """Return every reason why the C++ kernels cannot run on this machine. Nothing is built."""
    reasons = [] if built() else why_not_build()
    if torch.version.cuda is not None and not torch.cuda.is_available():
        reasons.append("no CUDA GPU is visible")
    elif torch.version.cuda is not None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        reasons.append(f"the GPU is sm_{major}{minor}, but the kernels need sm_80 or newer")
    return reasons


def why_not_build() -> list[str]:
    """Return every reason why the module cannot be built on this machine."""
    reasons = []
    if torch.version.cuda is None:
        reasons.append("this build of torch has no CUDA")
    if _cuda_home() is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        missing = f"CUDA_HOME is {home!r}, which has no bin/nvcc" if home else "nvcc not found"
        reasons.append(missing)
    if _tool("ninja") is None:
        reasons.append("ninja not found")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        reasons.append(f"C++ compiler {os.environ.get('CXX', 'c++')} not found")
    if not all((source_folder() / name).is_file() for name in SOURCES):
        reasons.append(f"the sources are not in {source_folder()}")
    return reasons


# ---- compilation ---------------------------------------------------------------------------------


def source_folder() -> Path:
    """Return the folder csrc/, which is in an installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def build_folder() -> Path:
    """Return the folder of this build.

    The name of the folder contains a hash of the sources, the flags, the GPU architectures, and the
    versions of torch, CUDA and Python. A change of one of these therefore causes a new build.
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
    """Return the GPU architectures to compile for, in the format of TORCH_CUDA_ARCH_LIST.

    Return the value of TORCH_CUDA_ARCH_LIST if it is set, otherwise the architecture of the current
    GPU, or ``unseen`` if no GPU is visible.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    if not torch.cuda.is_available():
        return unseen
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def include_folders() -> list[str]:
    """Return the folder of the CUDA headers in pip's packages, if it is needed and exists.

    The folder is needed if the toolkit lacks headers that torch includes.
    """
    home = _cuda_home()
    if home is not None and (home / "include" / "cusparse.h").is_file():
        return []
    sites = [Path(torch.__file__).resolve().parents[1], *map(Path, sys.path)]
    version = f"cu{(torch.version.cuda or '').split('.')[0]}"
    folders = [site / "nvidia" / version / "include" for site in sites]
    return [str(folder) for folder in folders if folder.is_dir()][:1]


def compile_flags() -> dict[str, list[str]]:
    """Return the flags of the C++ compiler and of nvcc.

    pip's headers are searched last, because the toolkit's own headers match nvcc.
    """
    headers = [flag for folder in include_folders() for flag in ("-idirafter", folder)]
    nvcc_headers = [f"-Xcompiler={flag}" for flag in headers]
    return {"cxx": CXX_FLAGS + headers, "nvcc": NVCC_FLAGS + nvcc_headers}


@contextlib.contextmanager
def toolchain(arch_list: str) -> Iterator[ModuleType]:
    """Configure torch's ``cpp_extension`` for the toolkit and ``arch_list``, then restore it."""
    home = _cuda_home()
    ninja = _tool("ninja")
    folders = (os.environ.get("PATH"), ninja and str(Path(ninja).parent))
    path = os.pathsep.join(filter(None, folders))
    settings = {"TORCH_CUDA_ARCH_LIST": arch_list, "PATH": path}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    from torch.utils import cpp_extension

    home_before = cpp_extension.CUDA_HOME  # set when cpp_extension was imported
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


def _is_built(folder: Path) -> bool:
    return (folder / "finished").is_file() and _library(folder).is_file()


@contextlib.contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Lock ``folder``, so that one process builds while other processes wait.

    The operating system releases this lock when a process is killed. torch's own lock file would
    remain, and block all later builds.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "builder", "w")
    except OSError as error:
        raise RuntimeError(
            "mmfused's CUDA C++ kernels need a writable build folder (see TORCH_EXTENSIONS_DIR): "
            f"{error}"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # torch's lock file, left by a killed process
        yield


def _tool(name: str) -> str | None:
    """Return the path of a program on PATH, or else in the folder of the running Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit, or None.

    A folder with headers is preferred, because some bin/nvcc only call an nvcc in another folder.
    """
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if chosen:
        candidates = [Path(chosen)]
    else:
        found = shutil.which("nvcc")
        compilers = [os.path.realpath(found), found] if found else []
        candidates = [*(Path(path).parents[1] for path in compilers), USUAL_CUDA]
    homes = [home for home in candidates if (home / "bin" / "nvcc").is_file()]
    complete = [home for home in homes if (home / "include" / "cuda_runtime_api.h").is_file()]
    return next(iter(complete + homes), None)
