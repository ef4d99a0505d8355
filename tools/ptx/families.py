"""Opcodes of PTX whose operands follow a syntax of their own, such as memory accesses.

Each function turns the words of an opcode and its operands into instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from . import hopper
from .parse import WIDTHS
from .translate import NONE, Operand, Translator, numbers, registers_of, spelling

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
    if "bulk" in words:
        return hopper.bulk_copy(t, words, tokens)
    if words[1] != "async":
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
    if words[1] == "cluster":
        return t.emit(f"barrier.cluster.{words[2]}", [], outputs=0)
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
    **hopper.FAMILIES,
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
