"""Translate PTX statements into instructions of the machine.

Most opcodes need nothing here: the C++ table gives the types of their operands (``OPCODE`` in
lanes.h). Opcodes with another syntax, such as memory accesses, have a function in families.py or
hopper.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from .parse import WIDTHS, Kernel, Statement, UnsupportedPtx, split

SHARED_BASE = 1024  # SharedMemory::BASE
# In the order of run.cpp's Special.
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
SPECIAL += ("%ntid.x", "%laneid", "%warpid")
# A cluster has one block.
CLUSTER = {"%cluster_ctarank": 0, "%cluster_nctarank": 1}
CLUSTER |= {f"%cluster_ctaid.{axis}": 0 for axis in "xyz"}
CLUSTER |= {f"%cluster_nctaid.{axis}": 1 for axis in "xyz"}
_MOVES = ("mov.b32", "mov.f32", "mov.u32")
# Modifiers that make no difference on this machine.
IGNORED = {"rn", "approx", "full", "uni", "sync", "aligned"}


class Operand(NamedTuple):
    """What an operand of an instruction stands for.

    ``kind`` is "register", "predicate", "constant" (the value is its bits), "special" (a place in
    SPECIAL), "integer" (a number for the instruction itself), "label" or "none".
    """

    kind: str
    value: str | int = 0
    wide: bool = False  # a constant of 64 bits


NONE = Operand("none")


class Instruction(NamedTuple):
    """An instruction for the machine."""

    opcode: str
    operands: list[Operand]
    outputs: int  # how many of the operands are written; these come first
    guard: str
    negated: bool
    statement: int  # its number in the kernel


class Translator:
    """Translate a kernel.

    Args:
        kernel: the kernel; temporary registers are added to it.
        signatures: types of the operands of each opcode; "" if ``families`` has a function for it.
        families: what translates opcodes with another syntax, by their first word.
    """

    def __init__(
        self,
        kernel: Kernel,
        signatures: dict[str, str],
        families: Mapping[str, Callable[[Translator, list[str], list[str]], None]],
    ) -> None:
        self.families = families
        self.kernel = kernel
        self.signatures = {name: types.split() for name, types in signatures.items()}
        self.instructions: list[Instruction] = []
        self.smallest_access = 16  # bytes
        offsets, at = {}, 0
        for name, size in kernel.parameters.items():
            offsets[name] = at = -(-at // min(size & -size, 8)) * min(size & -size, 8)
            at += size
        self.parameter_offsets: dict[str, int] = offsets
        starts = []
        for self.number, self.statement in enumerate(kernel.statements):
            starts.append(len(self.instructions))
            self._translate(self.statement)
        starts.append(len(self.instructions))
        self._resolve_labels(starts)
        self._mark_moves_of_accumulators()

    def _translate(self, statement: Statement) -> None:
        words = statement.opcode.split(".")
        family = self.families.get(words[0])
        try:
            if family is not None:
                family(self, words, statement.operands)
            else:
                self.generic(spelling(words), statement.operands)
        except (ValueError, KeyError, IndexError) as error:
            self.unsupported(f"has operands that the machine cannot read ({error!r})")

    def _resolve_labels(self, starts: list[int]) -> None:
        places = {label: starts[number] for label, number in self.kernel.labels.items()}
        for instruction in self.instructions:
            for k, operand in enumerate(instruction.operands):
                if operand.kind == "label":
                    instruction.operands[k] = Operand("integer", places[operand.value])

    def _mark_moves_of_accumulators(self) -> None:
        """Replace moves of what a wgmma computes by "wgmma.move", which may wait for the result."""
        written = {
            operand
            for instruction in self.instructions
            for operand in instruction.operands[: instruction.outputs]
            if instruction.opcode.startswith("wgmma.mma_async")
        }
        moves = [k for k, i in enumerate(self.instructions) if written and i.opcode in _MOVES]
        size = 0
        while size < len(written):  # copies of copies
            size = len(written)
            for to, value in (self.instructions[k].operands for k in moves):
                written |= {to} if value in written else set()
        for k in moves:
            if self.instructions[k].operands[1] in written:
                self.instructions[k] = self.instructions[k]._replace(opcode="wgmma.move")

    def unsupported(self, why: str) -> NoReturn:
        """Raise UnsupportedPtx for the current statement."""
        where = f"{self.kernel.name}, {self.statement.location}"
        raise UnsupportedPtx(f"{where}: the machine cannot run `{self.statement}`: it {why}")

    def types(self, opcode: str) -> list[str]:
        """Return the types of the operands of an opcode that the machine knows."""
        if opcode not in self.signatures:
            self.unsupported(f"knows no opcode {opcode!r}; tools/ptx says how to add one")
        return self.signatures[opcode]

    def emit(self, opcode: str, operands: list[Operand], outputs: int = 1) -> None:
        """Append an instruction with the guard of the current statement."""
        self.types(opcode)
        guard = self.statement.guard, self.statement.negated
        self.instructions.append(Instruction(opcode, operands, outputs, *guard, self.number))

    def generic(self, opcode: str, tokens: list[str]) -> None:
        """Translate an opcode that treats each lane alone: one destination, then sources."""
        first, *types = self.types(opcode)
        if len(types) != len(tokens) - 1:
            self.unsupported(f"has {len(tokens)} operands, expected {1 + len(types)}")
        sources = [self.source(token, kind) for token, kind in zip(tokens[1:], types, strict=True)]
        self.emit(opcode, [self.destination(tokens[0], first), *sources])

    # ---- operands --------------------------------------------------------------------------------

    def is_register(self, token: str) -> bool:
        """Return whether a token names a register."""
        stem = token.rstrip("0123456789")
        return token in self.kernel.registers or stem in self.kernel.registers

    def temporary(self, bits: int) -> Operand:
        """Return a new register."""
        name = f"temporary{len(self.kernel.registers)}."
        self.kernel.registers[name] = bits
        return Operand("register", name)

    def destination(self, token: str, kind: str) -> Operand:
        """Return the register that a value of a type is written to; its width must fit."""
        if token == "_":
            return NONE
        width = self.kernel.width(token)
        if kind == "pred":
            return Operand("predicate", token)
        if (width == 64) != (WIDTHS[kind] == 64):
            self.unsupported(f"writes {WIDTHS[kind]} bits to {token} of {width} bits")
        return Operand("register", token)

    def source(self, token: str, kind: str) -> Operand:
        """Return the operand for a token that is read as a value of a type."""
        if kind == "pred":
            constant = re.fullmatch(r"-?\d+", token)
            if constant:
                return Operand("constant", 0xFFFFFFFF if int(token) else 0)
            return Operand("predicate", token)
        if token in CLUSTER:
            return Operand("constant", CLUSTER[token])
        if token in SPECIAL:
            return Operand("special", SPECIAL.index(token))
        if self.is_register(token):
            return self._cell(token, WIDTHS[kind] == 64)
        return self._constant(token, kind)

    def _cell(self, register: str, wide: bool) -> Operand:
        """Return a register, or its low half if 32 bits of a wider register are read."""
        operand = Operand("register", register)
        is_wide = self.kernel.width(register) == 64
        if is_wide and not wide:
            low = self.temporary(32)
            self.emit("truncate.u64", [low, operand])
            return low
        if wide and not is_wide:
            self.unsupported(f"reads 64 bits of {register}")
        return operand

    def _constant(self, token: str, kind: str) -> Operand:
        wide = WIDTHS[kind] == 64
        if token in self.parameter_offsets:
            return Operand("constant", self.parameter_offsets[token], wide)
        if token in self.kernel.shared:
            return Operand("constant", SHARED_BASE + self.kernel.shared[token], wide)
        if token[:2].lower() in ("0f", "0d"):
            return Operand("constant", int(token[2:], 16), token[1] in "dD")
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", token):
            bits = (1 << max(WIDTHS[kind], 8)) - 1
            return Operand("constant", int(token.rstrip("U"), 0) & bits, wide)
        if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", token):
            packed = struct.pack("<d" if wide else "<f", float(token))
            return Operand("constant", int.from_bytes(packed, "little"), wide)
        self.unsupported(f"has an operand {token!r} that the machine does not know")

    def address(self, token: str, kind: str) -> list[Operand]:
        """Return base and offset of ``[base+offset]``."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", token)
        if match is None:
            raise ValueError(token)
        return [self.source(match[1], kind), Operand("integer", int(match[2] or "0", 0))]

    def extend(self, to: Operand, value: Operand, kind: str) -> None:
        """Write a value of up to 32 bits to a register that may be wider than its type."""
        width = self.kernel.width(str(to.value))
        if WIDTHS[kind] == 32 and width <= 32:
            return self.emit("mov.b32", [to, value])
        sign = "s" if kind[0] == "s" else "u"
        if WIDTHS[kind] < 32:
            narrow = self.temporary(32) if width == 64 else to
            self.emit(f"extend.{sign}{WIDTHS[kind]}", [narrow, value])
            value = narrow
        if width == 64:
            self.emit(f"extend.{sign}32", [to, value])


def spelling(words: list[str]) -> str:
    """Return an opcode without the modifiers that make no difference."""
    return ".".join(word for word in words if word not in IGNORED)


def numbers(*values: int) -> list[Operand]:
    """Return operands for the instruction itself."""
    return [Operand("integer", int(value)) for value in values]


def registers_of(token: str) -> list[str]:
    """Return the registers of ``{a, b}`` or of ``a``."""
    return split(token[1:-1]) if token.startswith("{") else [token]
