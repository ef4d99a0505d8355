"""``mmfused env``: versions, devices, and the backend that each op would use here."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch

import mmfused
from mmfused import extension
from mmfused.ops import OPS

HELP = "show versions, devices, the backend that each op would use here, and why it is not fused"
PACKAGES = (
    "torch",
    "triton",
    "timm",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
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
    print(f"mmfused       {mmfused.__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        print(f"{name:<13} {_installed(name)}")
    print(f"CUDA          {torch.version.cuda or 'not in this build of torch'}")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    print(f"CPU           {torch.get_num_threads()} threads")
    for device in devices:
        print(_describe(device))
    print(f"backend       {mmfused.library.current_backend()}")
    print(f"router        {mmfused.library.current_router()}; C++: {_extension_state()}")
    for op in OPS:
        for device in devices or [torch.device("cpu")]:
            print(_backend_of(op, device, getattr(torch, args.dtype)))
    return 0


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


def _describe(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{device!s:<13} {properties.name}, sm_{properties.major}{properties.minor}, {memory}"


def _backend_of(op: str, device: torch.device, dtype: torch.dtype) -> str:
    chosen = mmfused.library.current_backend()
    if chosen in ("reference", "composed"):
        return f"{op}: {chosen} on {device}, as set"
    reasons = mmfused.library.why_not_fused(device, dtype)
    if not reasons:
        return f"{op}: fused on {device}"
    return f"{op}: composed on {device}; not fused: {'; '.join(reasons)}"
