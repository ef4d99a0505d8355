"""``mmfused env``: what a bug report needs, and the backend that each op would use here."""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch
from torch.utils import collect_env

import mmfused
from mmfused import extension, tuned_file
from mmfused.benchmarks import report  # pyright: ignore[reportMissingImports]
from mmfused.ops import OPS

HELP = "show what a bug report needs, the backend that each op would use here, and why not fused"
PACKAGES = (
    "torch",
    "triton",
    "timm",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "open_clip_torch",
    "sentence-transformers",
    "peft",
    "accelerate",
    "lightning",
)
# Variables that change what runs. Others are not printed, because they may hold secrets.
VARIABLES = (
    "MMFUSED_",
    "TRITON_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "CUDA_",
    "CUBLAS_",
    "NCCL_",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype of the tensors (default float32)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the information and return the exit code."""
    rows = _software() | _hardware() | _settings()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print()
    for op in OPS:
        for device in _devices() or [torch.device("cpu")]:
            print(_backend_of(op, device, getattr(torch, args.dtype)))
    return 0


def _software() -> dict[str, str]:
    folder = Path(mmfused.__file__).parent
    commit = report.source_facts()["commit"]
    at_commit = f", commit {commit[:7]}" if commit else ""
    return {
        "mmfused": f"{mmfused.__version__} in {folder}{at_commit}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _installed(name) for name in PACKAGES},
        "CUDA of torch": torch.version.cuda or "not in this build of torch",
        "nvcc": collect_env.get_running_cuda_version(collect_env.run) or "not found",
        "gcc": collect_env.get_gcc_version(collect_env.run) or "not found",
    }


def _hardware() -> dict[str, str]:
    cpu = report.device_name(torch.device("cpu"))
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    return {
        "NVIDIA driver": driver or "not found",
        **{str(device): _describe(device) for device in _devices()},
        "CPU": f"{cpu.removeprefix('CPU ')}, {torch.get_num_threads()} threads",
    }


def _settings() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return {
        "backend": mmfused.library.current_backend(),
        "router": f"{mmfused.library.current_router()}; C++: {_extension_state()}",
        **{f"tuned, {device}": _tuned(device) for device in _devices()},
        **{name: os.environ[name] for name in names},
    }


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension_state() -> str:
    reasons = extension.why_not()
    if extension.built():
        return f"built, cannot run here ({'; '.join(reasons)})" if reasons else "built"
    if reasons:
        return f"not built ({'; '.join(reasons)})"
    return "not built yet (built at the first use)"


def _tuned(device: torch.device) -> str:
    """Return what `mmfused tune` has kept for a GPU."""
    try:
        found = tuned_file.of_device(device.index)
    except ValueError as error:
        return str(error)
    if found is None:
        return "nothing (`mmfused tune` has not run on this GPU with this Triton, or is off)"
    counts = Counter(entry.op for entry in found.entries)
    plans = ", ".join(f"{op} {number}" for op, number in counts.items()) or "none"
    factor, router = found.absorbed_must_save or "as usual", found.router or "as usual"
    return f"plans: {plans}; absorbed_must_save: {factor}; router: {router}; in {found.path}"


def _describe(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"


def _backend_of(op: str, device: torch.device, dtype: torch.dtype) -> str:
    chosen = mmfused.library.current_backend()
    if chosen in ("reference", "composed"):
        return f"{op}: {chosen} on {device}, as set"
    reasons = mmfused.library.why_not_fused(device, dtype)
    if not reasons:
        return f"{op}: fused on {device}, {_language_of(op, device, dtype)} kernels"
    return f"{op}: composed on {device}; not fused: {'; '.join(reasons)}"


def _language_of(op: str, device: torch.device, dtype: torch.dtype) -> str:
    from mmfused.kernels.query_pooling.plans import has_gluon

    if op != "query_pooling" or device.type != "cuda":
        return "Triton"
    major, minor = torch.cuda.get_device_capability(device)
    return "Gluon" if has_gluon(10 * major + minor, dtype) else "Triton"
