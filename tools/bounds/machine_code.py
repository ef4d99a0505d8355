"""What ptxas makes of a kernel: registers, and how many instructions."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

from mmfused.tools.ptx.build import cache_folder

_PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
# Everything but arithmetic: what costs.py counts one by one in PTX, and what is never issued.
_OTHER = re.compile(
    r"LD|ST|HMMA|HGMMA|SHFL|REDUX|BAR|MUFU|DEPBAR|NOP|WARP|B[SR]|EXIT|ATOM|RED|UTMA|UBLK|SYNCS"
)


class MachineCode(NamedTuple):
    """Of a kernel.

    ``registers`` and ``stack`` bytes are of a thread; ``arithmetic`` is the number of instructions
    that compute, and ``products`` that of matrix instructions.
    """

    registers: int
    stack: int
    arithmetic: int
    products: int


def machine_code(ptx: str, arch: int) -> MachineCode:
    """Compile PTX for an architecture, such as 90; results are stored."""
    version = (_PROGRAMS / "ptxas").stat().st_size
    key = hashlib.sha256(
        repr((ptx, arch, version, _OTHER.pattern, MachineCode._fields)).encode()
    ).hexdigest()
    path = cache_folder() / "machine_code" / key[:32]
    if path.is_file():
        return MachineCode(*json.loads(path.read_text()))
    found = _compile(ptx, arch)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{id(found)}")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found


def _compile(ptx: str, arch: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "kernel.ptx", Path(name) / "kernel.cubin"
        source.write_text(ptx)
        target = f"sm_{arch}{'a' if arch >= 90 else ''}"
        log = _run(_PROGRAMS / "ptxas", "-v", f"-arch={target}", source, "-o", cubin)
        text = _run(_PROGRAMS / "nvdisasm", "-c", cubin)
    registers, stack = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes stack", log)
    opcodes = _INSTRUCTION.findall(text)
    return MachineCode(
        int(registers[1]),
        int(stack[1]) if stack else 0,
        sum(not _OTHER.match(opcode) for opcode in opcodes),
        sum(opcode in ("HMMA", "HGMMA") for opcode in opcodes),
    )


def _run(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr
