"""Compile the machine's C++ once, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# Contraction would fuse a multiplication and an addition that PTX rounds separately.
FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC"]


def cache_folder() -> Path:
    """Return the folder of the machine and of compiled kernels: MMFUSED_PTX_CACHE or a default."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("MMFUSED_PTX_CACHE") or root / "mmfused" / "ptx")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> str | None:
    """Return the C++ compiler: CXX, g++ or clang++, or None if there is none."""
    return next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Return the machine, compiled for this CPU if necessary (about 5 s)."""
    found = compiler()
    if found is None:
        raise RuntimeError("CXX: got no C++ compiler, expected g++ 12 or clang++ 15 or newer")
    sources = sorted(HERE.glob("*.cpp"))
    key = hashlib.sha256(repr((found, FLAGS, _cpu())).encode())
    for path in sorted(HERE.glob("*.h")) + sources:
        key.update(path.read_bytes())
    built = cache_folder() / f"machine-{key.hexdigest()[:16]}.so"
    if not built.is_file():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            _compile(found, sources, Path(folder)).replace(built)
    return _declare(ctypes.CDLL(str(built)))


def _cpu() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _compile(found: str, sources: list[Path], folder: Path) -> Path:
    objects = [folder / f"{source.stem}.o" for source in sources]

    def run(*words: object) -> None:
        done = subprocess.run([found, *FLAGS, *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{found} cannot build the PTX machine:\n{done.stderr}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, "-c", s, "-o", o) for s, o in zip(sources, objects, strict=True)]
        for job in jobs:
            job.result()
    run("-shared", *objects, "-o", folder / "machine.so")
    return folder / "machine.so"


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.ptx_opcodes.restype = ctypes.c_char_p
    lib.ptx_program.restype = pointer
    arrays = [pointer] * 4
    lib.ptx_program.argtypes = [ctypes.c_char_p, integer, *arrays, integer, integer]
    lib.ptx_free.argtypes = [pointer]
    lib.ptx_run.argtypes = [pointer, pointer, pointer, integer]
    lib.ptx_trace.restype = pointer
    lib.ptx_trace.argtypes = [pointer, pointer, ctypes.c_char_p, ctypes.c_uint64, *[pointer] * 2]
    lib.ptx_reorder.argtypes = [pointer] * 3
    lib.ptx_play.argtypes = [pointer, pointer, integer, integer]
    lib.ptx_traced_blocks.argtypes = lib.ptx_free_trace.argtypes = [pointer]
    lib.ptx_trace_counts.argtypes = lib.ptx_trace_sectors.argtypes = [pointer, pointer]
    return lib
