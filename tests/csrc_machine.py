"""Run the compiled kernels of the C++ router on the PTX machine (tools/ptx).

nvcc compiles csrc/ to PTX and to a library with the host code, in which tests/csrc_launches.cpp
takes the place of the CUDA runtime. The host code launches kernels as on a GPU; each launch calls
Python, which runs the kernel's PTX.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from csrc_cases import BALANCES, DTYPES
from torch import Tensor

from mmfused import extension

LAUNCHES = Path(__file__).with_name("csrc_launches.cpp")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from ptx.build import cache_folder, compiler  # noqa: E402
from ptx.machine import Fault, Memory, Program, Schedule  # noqa: E402

ARCHITECTURES = (80, 90)
SCHEDULES = [Schedule(seed=seed) for seed in (0, 1, 2)]  # 0: in order
LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


# ---- compilation ---------------------------------------------------------------------------------


def why_not() -> str | None:
    """Return why the kernels cannot be compiled here, or None."""
    if extension._cuda_home() is None:
        return "nvcc not found: nothing to compile the CUDA sources with"
    return None if compiler() else "C++ compiler not found"


def compiled_router(architecture: int) -> CompiledRouter:
    """Return the kernels of csrc/ for one architecture, or skip the test."""
    return CompiledRouter(build(extension.source_folder(), cache_folder()), architecture)


def build(sources: Path, parent: Path) -> Path:
    """Compile csrc/, or a changed copy of it, and return the folder of the results.

    The folder lies in ``parent``. It is compiled only if it does not exist.
    """
    if reason := why_not():
        pytest.skip(reason)
    command = nvcc_command(sources)
    recipe = hashlib.sha256(repr((command, os.path.realpath(command[0]))).encode())
    for path in (*sorted(sources.glob("topk_routing*")), LAUNCHES):
        recipe.update(path.read_bytes())
    folder = parent / f"csrc_{recipe.hexdigest()[:16]}"
    with extension._build_lock(folder):
        if not (folder / "finished").is_file():
            compile_into(folder, command)
    return folder


def broken_sources(folder: Path, old: str, new: str) -> Path:
    """Copy csrc/ to ``folder`` with changed text, and with few kernels, to compile in seconds.

    The kernels are for float32 and at most 8 experts.
    """
    found = 0
    for path in extension.source_folder().glob("topk_routing*"):
        text = path.read_text()
        found += text.count(old)
        text = re.sub(r"with_shape<\w+>\(r", "with_shape<float>(r", text.replace(old, new))
        text = re.sub(r"\bShape<[^>]*>\{\}", "Shape<8, 1>{}", text)
        (folder / path.name).write_text(text)
    assert found == 1, f"{old!r} occurs {found} times"
    return folder


def nvcc_command(sources: Path) -> list[str]:
    """Return the command that makes a library, and keeps the PTX of each architecture."""
    home = extension._cuda_home()
    assert home is not None
    return [
        str(home / "bin" / "nvcc"),
        *extension.NVCC_FLAGS,
        "-std=c++17",
        "-lineinfo",
        "-shared",
        "-cudart=none",
        "-Xcompiler=-fPIC",
        "-Xlinker=-Bsymbolic",  # torch may have loaded the real CUDA runtime
        "--keep",
        f"--threads={len(ARCHITECTURES)}",
        *(f"-gencode=arch=compute_{x},code=compute_{x}" for x in ARCHITECTURES),
        f"-I{sources}",
        *(str(sources / name) for name in ("topk_routing.cu", "topk_routing_host.cpp")),
        str(LAUNCHES),
    ]


def compile_into(folder: Path, command: list[str]) -> None:
    """Run nvcc, and delete the files that it keeps besides the PTX."""
    done = subprocess.run(
        [*command, f"--keep-dir={folder}", "-o", str(folder / "launches.so")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in folder.glob("*.*"):
        if path.suffix not in (".ptx", ".so"):
            path.unlink()
    (folder / "finished").touch()


def entries(text: str) -> dict[str, str]:
    """Split a PTX module into one module per kernel, so that each is parsed alone."""
    head, *kernels = re.split(r"^(?=(?:\.visible )?\.entry )", text, flags=re.MULTILINE)
    end = kernels[-1].index("\n}\n") + 3
    kernels[-1], files = kernels[-1][:end], kernels[-1][end:]
    names = [re.search(r"\.entry (\w+)", kernel).group(1) for kernel in kernels]
    return {name: head + kernel + files for name, kernel in zip(names, kernels, strict=True)}


# ---- launches ------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of the host code, which launches kernels."""

    schedule: Schedule
    memory: list[Memory]  # of all tensors
    faults: list[Fault]
    errors: list[Exception]  # an exception cannot pass through C++


def extent(name: str, tensor: Tensor) -> Memory:
    """Return the memory from the first to the last element of a tensor."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    elements = last + 1 if tensor.numel() else 0
    start = tensor.data_ptr()
    return Memory(start, start + elements * tensor.element_size(), name)


class CompiledRouter:
    """The kernels of a folder made by :func:`build`, compiled for one architecture."""

    def __init__(self, folder: Path, architecture: int):
        ptx = folder / f"topk_routing.compute_{architecture}.ptx"
        self.texts = entries(ptx.read_text())
        self.program = cache(lambda name: Program(self.texts[name], name))
        self.library = ctypes.CDLL(str(folder / "launches.so"))

    def forward(self, case: dict, *, blocks: int = 512) -> dict[str, Tensor]:
        """Run the forward under every schedule, and return its outputs, which must be equal."""
        results = [self.forward_once(case, schedule, blocks) for schedule in SCHEDULES]
        return checked(results)

    def backward(self, case: dict, gradients, out: dict[str, Tensor]) -> Tensor:
        """Run the backward under every schedule, and return the gradient of the logits."""
        results = [self.backward_once(case, gradients, out, schedule) for schedule in SCHEDULES]
        return checked(results)["d_logits"]

    def forward_once(
        self, case: dict, schedule: Schedule, blocks: int = 512
    ) -> tuple[dict[str, Tensor], list[Fault]]:
        """Run the forward once and return its outputs and the faults of its kernels."""
        out = empty_outputs(case)
        sizes = (ctypes.c_int64 * 2)()
        self.library.csrc_workspaces(numbers(case, blocks), sizes)
        tensors = {"selection_bias": case["selection_bias"], "replay": case["indices"], **out}
        tensors["ints"] = torch.full((sizes[0],), -7, dtype=torch.int32)
        tensors["floats"] = torch.full((sizes[1],), float("nan"))
        faults = self._call("csrc_forward", case, tensors, schedule, blocks)
        if case["indices"] is not None:
            out["indices"] = case["indices"]
        return out, faults

    def backward_once(
        self, case: dict, gradients, out: dict[str, Tensor], schedule: Schedule
    ) -> tuple[dict[str, Tensor], list[Fault]]:
        """Run the backward once and return its output and the faults of its kernel."""
        d_logits = torch.full(case["source"].shape, float("nan"), dtype=case["source"].dtype)
        names = ("d_weights", "d_balance", "d_z", "d_entropy")
        tensors = dict(zip(names, gradients, strict=True))
        tensors |= {name: out[name] for name in ("indices", "weights", "coefficients")}
        tensors["d_logits"] = d_logits
        return {"d_logits": d_logits}, self._call("csrc_backward", case, tensors, schedule)

    def _call(
        self,
        name: str,
        case: dict,
        tensors: dict[str, Tensor | None],
        schedule: Schedule,
        blocks: int = 512,
    ) -> list[Fault]:
        """Call a function of the library, whose launches run on the machine."""
        inputs = ("source", "mask", "segments", "available", "jitter_seed")
        tensors = {key: case[key] for key in inputs} | tensors
        memory = [extent(key, x) for key, x in tensors.items() if x is not None]
        call = Call(schedule, memory, faults=[], errors=[])
        launch = LAUNCH(partial(self._launch, call))
        self.library.csrc_run_launches_with(launch)
        pointers = [None if x is None else x.data_ptr() for x in tensors.values()]
        status = getattr(self.library, name)(
            (ctypes.c_void_p * len(pointers))(*pointers),
            numbers(case, blocks),
            ctypes.c_float(case["jitter"]),
        )
        if call.errors:
            raise call.errors[0]
        assert status == 0, f"{name} returned {status}"
        return call.faults

    def _launch(
        self, call: Call, name: bytes, blocks: int, threads: int, shared: int, arguments
    ) -> None:
        """Run one kernel. ``arguments`` points to a pointer to each of its arguments."""
        try:
            program = self.program(name.decode())
            call.faults.extend(
                program.run(
                    (blocks, 1, 1),
                    [ctypes.string_at(arguments[i], n) for i, n in enumerate(program.parameters)],
                    call.memory,
                    threads=threads,
                    shared=shared,
                    schedule=call.schedule,
                )
            )
        except Exception as error:
            call.errors.append(error)


def empty_outputs(case: dict) -> dict[str, Tensor]:
    """Allocate the outputs of the forward in the schema's order, filled with NaN or -7."""
    tokens, experts = case["source"].shape
    rows, cells = tokens * case["k"], case["num_segments"] * experts
    shapes = dict(
        indices=((tokens, case["k"]), torch.int64),
        weights=((tokens, case["k"]), torch.float32),
        counts=((case["num_segments"], experts), torch.int64),
        losses=((3,), torch.float32),
        order=((rows,), torch.int32),
        position=((rows,), torch.int32),
        offsets=((experts + 1,), torch.int32),
        tiles=((rows // 16 + experts, 2), torch.int32),
        coefficients=((cells + 1,), torch.float32),
    )
    return {
        name: torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }


def numbers(case: dict, blocks: int) -> ctypes.Array:
    """Return the integers that csrc_launches.cpp expects."""
    logits = case["source"]
    values = [
        DTYPES.index(logits.dtype),
        *logits.stride(),
        *logits.shape,
        case["k"],
        case["num_segments"],
        case["sigmoid"],
        case["renormalize"],
        BALANCES.index(case["balance"]),
        blocks,
    ]
    return (ctypes.c_int64 * len(values))(*values)


def checked(results: list[tuple[dict[str, Tensor], list[Fault]]]) -> dict[str, Tensor]:
    """Return the outputs of the first run. No run may have a fault or other bits."""
    (first, _), *_ = results
    for out, faults in results:
        assert not faults, "\n".join(map(str, faults[:10]))
        for name, value in out.items():
            assert torch.equal(bits(value), bits(first[name])), f"{name} depends on the schedule"
    return first


def bits(value: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that NaN equals itself."""
    return value.contiguous().view(-1).view(torch.uint8)
