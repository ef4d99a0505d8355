"""Read PTX text: the kernels of a module, their registers, statements and source lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# Bits of each type.
WIDTHS = {
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "pred": 1},
}


class UnsupportedPtx(Exception):
    """PTX that the machine cannot run."""


class Location(NamedTuple):
    """A line of the kernel's source."""

    file: str
    line: int
    caller: str = ""  # the place that the function of this line was inlined at

    def __str__(self) -> str:
        return _place(self.file, self.line) + (f" (from {self.caller})" if self.caller else "")


def _place(file: str, line: int | str) -> str:
    return f"{'/'.join(file.split('/')[-2:])}:{line}"


class Statement(NamedTuple):
    """An instruction as it is written."""

    opcode: str
    operands: list[str]
    guard: str  # the predicate's name, or ""
    negated: bool
    location: Location

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        operands = ", ".join(re.sub(r",(?:[^,]+,){3,}", ", ..., ", op) for op in self.operands)
        scope = r"@\d+\b"  # that a register or label belongs to
        return re.sub(scope, "", f"{guard}{self.opcode} {operands}".rstrip())


@dataclass
class Kernel:
    """An entry function."""

    name: str
    parameters: dict[str, int]  # bytes of each parameter
    threads: int | None  # that the kernel requires
    registers: dict[str, int] = field(default_factory=dict)  # bits; "%r" stands for %r0, %r1, ...
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the number of the next statement
    tables: dict[str, list[str]] = field(default_factory=dict)  # labels that brx.idx chooses from
    shared: dict[str, int] = field(default_factory=dict)  # offset of each variable
    static_shared_bytes: int = 0

    def width(self, register: str) -> int:
        """Return the bits of a register."""
        if register in self.registers:
            return self.registers[register]
        return self.registers[register.rstrip("0123456789")]


def read_kernel(text: str, entry: str | None = None) -> Kernel:
    """Return a kernel of a PTX module.

    Args:
        text: the module.
        entry: name of the kernel; None if the module has only one.
    """
    names = re.findall(r"\.entry\s+([\w$]+)", text)
    if entry is None and len(names) != 1:
        raise UnsupportedPtx(f"entry: got None, expected one of {', '.join(names)}")
    if entry is not None and entry not in names:
        raise UnsupportedPtx(f"entry: got {entry!r}, expected one of {', '.join(names)}")
    start = re.search(rf"\.entry\s+{re.escape(entry or names[0])}\b", text)
    assert start is not None
    head, _, rest = text[start.start() :].partition("\n{")
    body = rest[: _end_of_scope(rest)]
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if cluster := re.search(r"\.reqnctapercluster\s+([2-9]|\d\d|\d+\s*,\s*[2-9])", head):
        raise UnsupportedPtx(
            f"{entry or names[0]}: the machine runs clusters of one block, not {cluster[1]}"
        )
    kernel = Kernel(entry or names[0], _parameters(head), int(threads[1]) if threads else None)
    _shared_variables(kernel, text, body)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE))
    _read_body(kernel, body, files)
    return kernel


def _end_of_scope(text: str) -> int:
    """Return the place of the brace that closes a scope, from the text after its opening brace."""
    depth = 1
    for match in re.finditer(r"//.*|/\*.*?\*/|[{}]", text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise UnsupportedPtx("a brace is not closed")


def _parameters(head: str) -> dict[str, int]:
    """Return the bytes of each parameter: ``.param .u32 x`` or ``.param .align 8 .b8 x[104]``."""
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([^,()]+)", head)
    parameters = {}
    for kind, words in found:
        name, _, count = words.split()[-1].partition("[")
        parameters[name] = WIDTHS[kind] // 8 * int(count.rstrip("]") or 1)
    return parameters


def _shared_variables(kernel: Kernel, module: str, body: str) -> None:
    """Place static variables from 0; dynamic memory follows."""
    declared = (
        r"^\s*(?:\.visible\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?;"
    )
    for align, kind, name, count in re.findall(declared, module, re.MULTILINE):
        if name not in body:
            continue
        at = -(-kernel.static_shared_bytes // int(align)) * int(align)
        kernel.shared[name] = at
        kernel.static_shared_bytes = at + WIDTHS[kind] // 8 * int(count or 1)
    kernel.static_shared_bytes = -(-kernel.static_shared_bytes // 16) * 16
    for name in re.findall(r"\.extern\s+\.shared\s+[^;]*?([\w$]+)\[\];", module):
        kernel.shared[name] = kernel.static_shared_bytes


def _read_body(kernel: Kernel, body: str, files: dict[str, str]) -> None:
    label, jumps = "", []
    for piece, location, scopes in _pieces(body, files):
        if piece.endswith(":"):
            label = _scoped(piece[:-1], scopes)
            kernel.labels[label] = len(kernel.statements)
        elif piece.startswith(".branchtargets"):
            kernel.tables[label] = split(piece.removeprefix(".branchtargets"))
        elif piece.startswith(".reg"):
            _declare_registers(kernel, piece, scopes)
        elif not piece.startswith("."):
            kernel.statements.append(_statement(kernel, piece, location, scopes))
            if scopes and kernel.statements[-1].opcode.startswith("bra"):
                jumps.append((len(kernel.statements) - 1, list(scopes)))
    for number, scopes in jumps:  # labels may follow
        operands = kernel.statements[number].operands
        names = [_scoped(operands[0], scopes[:k]) for k in range(len(scopes), -1, -1)]
        operands[0] = next((name for name in names if name in kernel.labels), operands[0])


def _scoped(name: str, scopes: list[int]) -> str:
    """Return the name of what is declared in a scope; other scopes may use the same name."""
    return f"{name}@{scopes[-1]}" if scopes else name


def _pieces(body: str, files: dict[str, str]) -> Iterator[tuple[str, Location, list[int]]]:
    """Yield labels ("name:") and statements, with source line and the numbers of open braces."""
    location, scopes, opened, text, is_inline = Location("?", 0), [], 0, "", False
    for line in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).splitlines():
        line, _, comment = line.strip().partition("//")
        if "inline asm" in comment:
            is_inline = "begin" in comment
        if line.startswith(".loc"):
            # In inline assembly, LLVM adds the lines of the assembly to those of the source.
            location = location if is_inline else _location(line, files)
            continue
        text += " " + line
        while text := text.strip():
            if text[0] == "{":  # a scope; operands in braces come later in a statement
                opened += 1
                scopes.append(opened)
                text = text[1:]
            elif text[0] == "}":
                scopes.pop()
                text = text[1:]
            elif label := re.match(r"[\w$]+:", text):
                yield label[0], location, scopes
                text = text[label.end() :]
            elif ";" in text:
                piece, _, text = text.partition(";")
                yield piece.strip(), location, scopes
            else:
                break


def _location(line: str, files: dict[str, str]) -> Location:
    """Return the place that a line ``.loc file line column, ..., inlined_at file line`` names."""
    _, file, number, *_ = line.replace(",", " ").split()
    inlined = re.search(r"inlined_at (\d+) (\d+)", line)
    caller = _place(files.get(inlined[1], "?"), inlined[2]) if inlined else ""
    return Location(files.get(file, "?"), int(number), caller)


def _declare_registers(kernel: Kernel, piece: str, scopes: list[int]) -> None:
    """Declare ``.reg .b32 %r<100>, tmp``; names in a scope are declared as ``name@scope``."""
    _, kind, names = piece.split(None, 2)
    for name in names.split(","):
        stem = re.sub(r"<\d+>$", "", name.strip())
        kernel.registers[_scoped(stem, scopes)] = WIDTHS[kind[1:]]


def _statement(kernel: Kernel, piece: str, location: Location, scopes: list[int]) -> Statement:
    guard, negated = "", False
    if piece.startswith("@"):
        guard, piece = piece[1:].split(None, 1)
        negated, guard = guard.startswith("!"), guard.lstrip("!")
    opcode, _, rest = piece.replace("\t", " ").partition(" ")
    for scope in reversed(scopes):
        for name in kernel.registers:
            if name.endswith(f"@{scope}"):
                plain = name.partition("@")[0]
                renamed = rf"(?<![\w%$]){re.escape(plain)}(?![\w@])"
                rest, guard = re.sub(renamed, name, rest), name if guard == plain else guard
    return Statement(opcode, split(rest), guard, negated, location)


def split(text: str) -> list[str]:
    """Split operands at commas outside of brackets and braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
