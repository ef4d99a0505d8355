"""What ptxas makes of a kernel: registers, and how many instructions."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from mmfused.cli.compiling import resources
from mmfused.cli.sass import disassemble
from mmfused.kernels.tiles import OPTIONS
from mmfused.tools.ptx.build import cache_folder

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
# Everything but arithmetic: what costs.py counts one by one in PTX, and what is never issued.
_OTHER = re.compile(
    r"LD|ST|HMMA|HGMMA|SHFL|REDUX|BAR|MUFU|DEPBAR|NOP|WARP|B[SR]|EXIT|ATOM|RED|UTMA|UBLK|SYNCS"
)


class MachineCode(NamedTuple):
    """What ptxas made of a kernel.

    ``registers`` and ``stack`` bytes are of a thread; ``arithmetic`` is the number of instructions
    that compute, and ``products`` that of matrix instructions.
    """

    registers: int
    stack: int
    arithmetic: int
    products: int


def machine_code(ptx: str, arch: int) -> MachineCode:
    """Compile PTX for an architecture, such as 90; results are stored."""
    parts = (ptx, arch, triton.__version__, _OTHER.pattern, MachineCode._fields)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    path = cache_folder() / "machine_code" / key[:32]
    if path.is_file():
        return MachineCode(*json.loads(path.read_text()))
    found = _compile(ptx, arch)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found


def _compile(ptx: str, arch: int) -> MachineCode:
    target = GPUTarget("cuda", arch, 32)
    backend = CUDABackend(target)
    options = backend.parse_options(OPTIONS)
    # Triton chooses ptxas and its options by version and architecture. The driver of tools/ptx has
    # a subclass of this compiler, which stops at PTX.
    cubin = CUDABackend.make_cubin(backend, ptx, {}, options, arch)
    registers, stack = resources(cubin, f"a kernel for sm_{arch}")
    opcodes = _INSTRUCTION.findall(disassemble(cubin))
    return MachineCode(
        registers,
        stack,
        sum(not _OTHER.match(opcode) for opcode in opcodes),
        sum(opcode in ("HMMA", "HGMMA") for opcode in opcodes),
    )
