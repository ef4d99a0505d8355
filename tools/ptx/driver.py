"""A Triton driver that runs compiled kernels on CPU tensors, in the PTX machine.

session = install(90, "adversarial")
kernel[grid](cpu_tensor, ...)  # Triton compiles the kernel for sm_90 and launches it here
assert not session.reports

Triton's own runtime is used without changes: it specialises arguments, compiles and caches.
"""

from __future__ import annotations

import functools
import struct
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from .arguments import pack_arguments
from .build import cache_folder
from .machine import Fault, Program, Schedule
from .schedules import MODES, Argument, run_all, schedules_of

# Shared memory that one block may use, in bytes.
SHARED_MEMORY = {80: 166_912, 90: 232_448}

_NULL = bytes(8)


@dataclass
class Session:
    """What the machine runs, and what it found."""

    arch: int
    mode: str
    schedules: tuple[Schedule, ...]
    reports: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of launches and kernels
    seconds: Counter[str] = field(default_factory=Counter)  # to compile, translate and run

    def take_reports(self) -> list[str]:
        """Return the reports since the last call."""
        taken, self.reports = self.reports, []
        return taken


class PtxBackend(CUDABackend):
    """Triton's compiler, which stops at PTX: the "cubin" holds the text."""

    def hash(self) -> str:
        """Return the compiler's part of the keys in Triton's cache."""
        return f"{super().hash()}-ptx"

    def make_cubin(self, src: str, *_: Any) -> bytes:
        """Return the PTX in place of ptxas's result."""
        return src.encode()


class Utils:
    """What Triton asks of a driver's utils."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the limit that Triton compares kernels with."""
        return {"max_shared_mem": SHARED_MEMORY[self.arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Return module, function, registers, spills and most threads of a block."""
        # Translated at the first launch: Triton would launch a kernel again whose loading failed.
        return name, binary.decode(), 0, 0, 1024

    def unload_module(self, module: str) -> None:
        """Do nothing: Python frees the program."""


class PtxDriver(DriverBase):
    """The driver of a GPU whose memory is the CPU's."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.utils = Utils(session.arch)
        self.launcher_cls = functools.partial(Launcher, session)

    @classmethod
    def is_active(cls) -> bool:
        """Return False: Triton must not choose this driver by itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Refuse: there is no launcher in C++."""
        raise NotImplementedError(f"the PTX machine has no C++ type for {ty}")

    def get_current_target(self) -> GPUTarget:
        """Return what Triton compiles for."""
        return GPUTarget("cuda", self.session.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Refuse: times of the machine say nothing about a GPU's."""
        raise NotImplementedError("the PTX machine takes no times")

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the only stream."""
        return 0


class Launcher:
    """Launches one compiled kernel."""

    def __init__(self, session: Session, source: Any, metadata: Any) -> None:
        self.session = session
        self.metadata = metadata
        self.signature = source.signature

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        """Run the kernel; the arguments are those of Triton's CudaLauncher."""
        _, _, _, _, *values = rest  # two kinds of metadata and two hooks
        if 0 in (x, y, z):
            return
        name, blocks = self.metadata.name, self.metadata.num_ctas
        if blocks != 1:
            raise ValueError(f"{name}: num_ctas: got {blocks}, expected 1: there are no clusters")
        parameters, arguments = self._parameters(values, x * y * z)
        program = _timed(self.session, "translate", program_of, function)
        if [len(each) for each in parameters] != program.parameters:
            raise TypeError(
                f"{name}: this Triton passes other parameters than the PTX machine does"
            )
        self.session.counts["launches"] += 1
        self.launch(program, (x, y, z), parameters, arguments)

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        arguments: list[Argument],
    ) -> None:
        """Run the kernel under each schedule."""
        session, shared = self.session, self.metadata.shared
        memory = [argument.memory for argument in arguments]
        threads = 32 * self.metadata.num_warps

        def run(schedule: Schedule) -> list[Fault]:
            faults = program.run(
                grid, parameters, memory, threads=threads, shared=shared, schedule=schedule
            )
            return [fault for fault in faults if not _is_known(fault)]

        session.reports += _timed(
            session, "run", run_all, program.name, run, arguments, session.schedules
        )

    def _parameters(self, values: list[Any], blocks: int) -> tuple[list[bytes], list[Argument]]:
        """Return the bytes of each parameter of the kernel, and the tensors among them."""
        metadata = self.metadata
        maps = getattr(metadata, "tensordesc_meta", None)
        packed, arguments = pack_arguments(metadata.name, self.signature, values, maps)
        scratch_bytes = blocks * metadata.global_scratch_size
        if scratch_bytes:
            scratch = _aligned(scratch_bytes, metadata.global_scratch_align)
            arguments.append(Argument("global_scratch", scratch))
            return [*packed, struct.pack("Q", scratch.data_ptr()), _NULL], arguments
        return [*packed, _NULL, _NULL], arguments  # global and profile scratch


def _is_known(fault: Fault) -> bool:
    """Return whether Triton is at fault: 3.6 puts no proxy fence between cp.async and wgmma."""
    missing = fault.kind == "missing proxy fence" and "`cp.async.c" in fault.text
    return missing and triton.__version__.startswith("3.6.")


def _aligned(size: int, alignment: int) -> torch.Tensor:
    memory = torch.zeros(size + alignment, dtype=torch.uint8)
    return memory[-memory.data_ptr() % alignment :][:size]


@functools.cache
def program_of(text: str) -> Program:
    """Return a kernel's program."""
    return Program(text)


def _timed(session: Session, what: str, function: Any, *args: Any) -> Any:
    start = time.perf_counter()
    try:
        return function(*args)
    finally:
        session.seconds[what] += time.perf_counter() - start


def install(arch: int, mode: str = "adversarial", seed: int = 1) -> Session:
    """Launch all kernels of this process on the machine, and return what it will find.

    Args:
        arch: 80 or 90.
        mode: one of ``MODES``; see :func:`ptx.schedules.schedules_of`.
        seed: of the random order; a positive number.
    """
    if arch not in SHARED_MEMORY:
        raise ValueError(
            f"arch: got {arch!r}, expected one of {', '.join(map(str, SHARED_MEMORY))}"
        )
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    if seed < 1:
        raise ValueError(f"seed: got {seed!r}, expected a positive number")
    session = Session(arch, mode, schedules_of(mode, arch, seed))
    knobs.propagate_env = False  # child processes compile for real, into Triton's own cache
    knobs.cache.dir = str(cache_folder() / "triton")
    knobs.compilation.store_binary_only = True
    knobs.compilation.listener = functools.partial(_note_compiled, session)
    knobs.runtime.interpret = False
    knobs.propagate_env = True
    backends["nvidia"] = replace(backends["nvidia"], compiler=PtxBackend)
    triton.runtime.driver.set_active(PtxDriver(session))
    return session


def _note_compiled(session: Session, *, times: knobs.CompileTimes, **_: Any) -> None:
    session.counts["kernels"] += 1
    session.seconds["compile"] += times.total / 1e6
