"""Translate PTX statements into instructions of the machine.

Most opcodes need nothing here: the C++ table gives the types of their operands (``OPCODE`` in
lanes.h). Opcodes with another syntax, such as memory accesses, have a function in ``FAMILIES``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from .parse import WIDTHS, Kernel, Statement, UnsupportedPtx, split

SHARED_BASE = 1024  # SharedMemory::BASE
# In the order of run.cpp's Special.
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
SPECIAL += ("%ntid.x", "%laneid", "%warpid")
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
        signatures: types of the operands of each opcode; "" if FAMILIES has a function for it.
    """

    def __init__(self, kernel: Kernel, signatures: dict[str, str]) -> None:
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
        family = FAMILIES.get(words[0])
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


# ---- moves and conversions -----------------------------------------------------------------------


def _mov(t: Translator, words: list[str], tokens: list[str]) -> None:
    to, value = tokens
    if value.startswith("{"):
        parts = registers_of(value)
        bits = WIDTHS[words[-1]] // len(parts)
        sources = [t.source(part, f"b{max(bits, 16)}") for part in parts]
        t.emit(f"pack.{len(parts)}x{bits}", [t.destination(to, words[-1]), *sources])
    elif to.startswith("{"):
        parts = registers_of(to)
        bits = WIDTHS[words[-1]] // len(parts)
        source = t.source(value, words[-1])
        for k, part in enumerate(parts):
            if part != "_":
                operands = [t.destination(part, f"b{bits}"), source, Operand("constant", k)]
                t.emit(f"unpack.{len(parts)}x{bits}", operands)
    else:
        t.generic(spelling(words), tokens)


def _cvt(t: Translator, words: list[str], tokens: list[str]) -> None:
    to, kind = words[-2:]
    if re.fullmatch(r"[usb]\d+", to) and re.fullmatch(r"[usb]\d+", kind):
        return _convert_integer(t, to, kind, tokens)
    opcode = spelling(words)
    types = t.signatures.get(opcode)
    if types and to[0] in "us" and WIDTHS[to] == 32 and t.kernel.width(tokens[0]) == 64:
        narrow = t.temporary(32)
        t.emit(opcode, [narrow, t.source(tokens[1], kind)])
        return t.extend(Operand("register", tokens[0]), narrow, to)
    t.generic(opcode, tokens)


def _convert_integer(t: Translator, to: str, kind: str, tokens: list[str]) -> None:
    register = t.destination(tokens[0], f"b{t.kernel.width(tokens[0])}")
    value = t.source(tokens[1], kind)
    if WIDTHS[to] == WIDTHS[kind] == 64:
        return t.emit("mov.b64", [register, value])
    if WIDTHS[kind] == 64:
        low = t.temporary(32)
        t.emit("truncate.u64", [low, value])
        return t.extend(register, low, to)
    if WIDTHS[to] > WIDTHS[kind]:
        if to[0] == kind[0] or t.kernel.width(tokens[0]) <= WIDTHS[to]:
            return t.extend(register, value, kind)
        narrow = t.temporary(32)
        t.extend(narrow, value, kind)
        value = narrow
    t.extend(register, value, to)  # a register wider than its type is extended by that type


def _setp(t: Translator, words: list[str], tokens: list[str]) -> None:
    """Write ``p|q``: the results of both halves of packed floats, or a result and its inverse."""
    to, _, second = tokens[0].partition("|")
    if not second:
        return t.generic(spelling(words), tokens)
    predicates = [t.destination(name.strip(), "pred") for name in (to, second)]
    if not words[-1].endswith("x2"):
        t.generic(spelling(words), [to.strip(), *tokens[1:]])
        return t.emit("not.pred", [predicates[1], predicates[0]])
    sources = [t.source(token, "b32") for token in tokens[1:]]
    opcode = spelling(words).removesuffix("x2")
    for k, predicate in enumerate(predicates):
        halves = [t.temporary(16) for _ in sources]
        for half, source in zip(halves, sources, strict=True):
            t.emit("unpack.2x16", [half, source, Operand("constant", k)])
        t.emit(opcode, [predicate, *halves])


# ---- memory --------------------------------------------------------------------------------------


def _space(t: Translator, words: list[str]) -> str:
    for word in words[1:]:
        space = word.partition("::")[0]
        if space in ("global", "shared", "param"):
            return space
    t.unsupported("names no address space: global, shared or param")


def _shape(t: Translator, words: list[str], space: str) -> tuple[int, int]:
    """Return bits and number of the values of a load or store."""
    count = next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1)
    bits = WIDTHS[words[-1]]
    if space != "param":
        t.smallest_access = min(t.smallest_access, bits * count // 8)
    return bits, count


def _ld(t: Translator, words: list[str], tokens: list[str]) -> None:
    space, kind = _space(t, words), words[-1]
    bits, count = _shape(t, words, space)
    loaded, extended = [], []
    for token in registers_of(tokens[0]):
        register = NONE if token == "_" else Operand("register", token)
        is_signed = kind[0] == "s" and bits < 32
        if register is NONE or ((t.kernel.width(token) == 64) == (bits == 64) and not is_signed):
            loaded.append(register)
        else:
            loaded.append(t.temporary(32))
            extended.append((register, loaded[-1]))
    address = _ld_address(t, space, tokens[1])
    t.emit(f"ld.{space}.{bits}x{count}", [*loaded, *address], outputs=count)
    for register, value in extended:
        t.extend(register, value, kind)


def _ld_address(t: Translator, space: str, token: str) -> list[Operand]:
    base = token.strip("[] ").split("+")[0].strip()
    if space != "param" or not t.is_register(base) or t.kernel.width(base) == 64:
        return t.address(token, "u32" if space == "shared" else "u64")
    narrow, offset = t.address(token, "u32")  # Triton 3.9 keeps addresses of parameters in 32 bits
    wide = t.temporary(64)
    t.emit("extend.u32", [wide, narrow])
    return [wide, offset]


def _st(t: Translator, words: list[str], tokens: list[str]) -> None:
    space = _space(t, words)
    bits, count = _shape(t, words, space)
    values = [t.source(token, f"b{max(bits, 16)}") for token in registers_of(tokens[1])]
    address = t.address(tokens[0], "u32" if space == "shared" else "u64")
    t.emit(f"st.{space}.{bits}x{count}", [*address, *values], outputs=0)


def _atom(t: Translator, words: list[str], tokens: list[str]) -> None:
    space = _space(t, words)
    _shape(t, words, space)
    to = t.destination(tokens[0], words[-1]) if words[0] == "atom" else NONE
    at, value = tokens[-2:]
    address = t.address(at, "u32" if space == "shared" else "u64")
    ignored = {"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "shared::cta"}
    name = [word for word in words if word not in ignored and word != space]
    opcode = ".".join([name[0], space, *name[1:]])
    t.emit(opcode, [to, *address, t.source(value, words[-1])])


def _matrix(t: Translator, words: list[str], tokens: list[str]) -> None:
    """ldmatrix and stmatrix."""
    opcode = spelling(["shared" if word == "shared::cta" else word for word in words])
    loads = words[0] == "ldmatrix"
    registers, at = (tokens[0], tokens[1]) if loads else (tokens[1], tokens[0])
    values = [t.source(token, "b32") for token in registers_of(registers)]
    address = t.address(at, "u32")
    if loads:
        t.emit(opcode, [*values, *address], outputs=len(values))
    else:
        t.emit(opcode, [*address, *values], outputs=0)


def _cp(t: Translator, words: list[str], tokens: list[str]) -> None:
    if words[1] != "async" or "bulk" in words:
        t.unsupported("is no cp.async of 4, 8 or 16 bytes")
    if words[2] in ("commit_group", "wait_all"):
        return t.emit(f"cp.async.{words[2]}", [], outputs=0)
    if words[2] == "wait_group":
        return t.emit("cp.async.wait_group", numbers(int(tokens[0], 0)), outputs=0)
    size = int(tokens[2], 0)
    t.smallest_access = min(t.smallest_access, size)
    bytes_copied = t.source(tokens[3], "u32") if len(tokens) > 3 else NONE
    ends = [*t.address(tokens[0], "u32"), *t.address(tokens[1], "u64")]
    t.emit(f"cp.async.{size}", [*ends, bytes_copied], outputs=0)


# ---- matrices ------------------------------------------------------------------------------------


def _mma(t: Translator, words: list[str], tokens: list[str]) -> None:
    values = [t.source(token, "b32") for group in tokens for token in registers_of(group)]
    t.emit(spelling(words), values, outputs=len(registers_of(tokens[0])))


def _wgmma(t: Translator, words: list[str], tokens: list[str]) -> None:
    opcode = spelling(words)
    if words[1] == "wait_group":
        return t.emit(opcode, numbers(int(tokens[0], 0)), outputs=0)
    if words[1] != "mma_async":  # a fence orders accesses to registers only
        return t.emit("nothing" if words[1] == "fence" else opcode, [], outputs=0)
    d = [t.source(token, "b32") for token in registers_of(tokens[0])]
    in_registers = tokens[1].startswith("{")
    a = [t.source(token, "b32" if in_registers else "b64") for token in registers_of(tokens[1])]
    scale_a, scale_b, *transposed = (int(token) for token in tokens[4:])
    if (scale_a, scale_b) != (1, 1):
        t.unsupported("negates an operand")
    columns = int(re.search(r"m64n(\d+)k16", opcode)[1])
    form = numbers(columns, in_registers, not in_registers and transposed[0], transposed[-1])
    last = [t.source(tokens[2], "b64"), t.source(tokens[3], "pred"), *form]
    t.emit(opcode, [*d, *a, *last], outputs=len(d))


# ---- control -------------------------------------------------------------------------------------


def _jump(t: Translator, words: list[str], tokens: list[str]) -> None:
    opcode = "bra" if tokens else "ret"
    t.emit(opcode, [Operand("label", token) for token in tokens], outputs=0)


def _bar(t: Translator, words: list[str], tokens: list[str]) -> None:
    if words[1] == "warp":
        return t.emit("bar.warp.sync", [t.source(tokens[0], "b32")], outputs=0)
    kind = next((word for word in words if word in ("sync", "arrive")), words[-1])
    operands = [t.source(token, "u32") for token in tokens] + [NONE] * (2 - len(tokens))
    t.emit(f"bar.{kind}", operands, outputs=0)


def _shfl(t: Translator, words: list[str], tokens: list[str]) -> None:
    to, _, in_range = tokens[0].partition("|")
    predicate = t.destination(in_range.strip(), "pred") if in_range else NONE
    sources = [t.source(token, "b32") for token in tokens[1:]]
    t.emit(spelling(words), [t.destination(to.strip(), "b32"), predicate, *sources], outputs=2)


def _exchange(t: Translator, words: list[str], tokens: list[str]) -> None:
    """vote.ballot, match.any, redux and activemask."""
    kind = "pred" if words[0] == "vote" else "b32"
    sources = [t.source(token, kind if k == 0 else "b32") for k, token in enumerate(tokens[1:])]
    t.emit(spelling(words), [t.destination(tokens[0], "b32"), *sources])


def _fence(t: Translator, words: list[str], tokens: list[str]) -> None:
    is_proxy = words[1:3] == ["proxy", "async"] and "global" not in words
    t.emit("fence.proxy.async" if is_proxy else "nothing", [], outputs=0)


FAMILIES: dict[str, Callable[[Translator, list[str], list[str]], None]] = {
    "mov": _mov,
    "cvt": _cvt,
    "setp": _setp,
    "ld": _ld,
    "st": _st,
    "atom": _atom,
    "red": _atom,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
    "cp": _cp,
    "mma": _mma,
    "wgmma": _wgmma,
    "bra": _jump,
    "ret": _jump,
    "exit": _jump,
    "bar": _bar,
    "barrier": _bar,
    "shfl": _shfl,
    "vote": _exchange,
    "match": _exchange,
    "redux": _exchange,
    "activemask": _exchange,
    "fence": _fence,
    "membar": _fence,
}
