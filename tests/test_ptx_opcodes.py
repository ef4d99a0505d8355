"""Opcodes of the PTX machine that treat each lane alone, against what the PTX ISA says."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_expected import APPROXIMATE, EXACT
from ptx_kernels import HAS_COMPILER, NO_COMPILER, run
from ptx_numbers import BITS, evaluate, is_nan, operands, to_bits

from mmfused.tools.ptx.machine import signatures

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

THREADS = 128
REGISTERS = {16: "%rs", 32: "%r", 64: "%rd"}
# translate.py composes cvt between integers and mov between vectors of these: test_ptx_moves.py.
COMPOSED = ("extend.", "truncate.", "pack.", "unpack.")
LANEWISE = {*EXACT, *APPROXIMATE}


def kernel(opcode: str, result: str, kinds: list[str]) -> str:
    """Return statements that load the operands of a thread, run the opcode and store its result."""
    lines, names = [], []
    for k, kind in enumerate(kinds):
        register = f"{REGISTERS[BITS[kind]]}{k + 1}"
        lines.append(f"ld.global.b{BITS[kind]} {register}, [in{k}_at];")
        if kind == "pred":
            lines.append(f"setp.ne.u32 %p{k + 1}, {register}, 0;")
        names.append(f"%p{k + 1}" if kind == "pred" else register)
    to = "%p9" if result == "pred" else f"{REGISTERS[BITS[result]]}9"
    lines.append(f"{opcode} {to}, {', '.join(names)};")
    if result == "pred":
        lines.append("selp.u32 %r9, 1, 0, %p9;")
        to = "%r9"
    return "\n".join([*lines, f"st.global.b{BITS[result]} [out_at], {to};"])


def computed(opcode: str) -> tuple[np.ndarray, str, list[str], list[np.ndarray]]:
    """Return the bits that the machine computes, their type, and the operands."""
    result, *kinds = signatures()[opcode].split()
    columns = operands(kinds, THREADS)
    blocks = len(columns[0]) // THREADS
    out = np.zeros(len(columns[0]), f"u{BITS[result] // 8}")
    body = kernel(opcode, result, kinds)
    return run(body, *columns, out=out, threads=THREADS, blocks=blocks), result, kinds, columns


def differs(found: np.ndarray, expected: np.ndarray, kind: str) -> np.ndarray:
    """Return which rows differ in bits; any NaN equals any NaN."""
    if kind in ("f16x2", "bf16x2"):
        halves = differs(found.view(np.uint16), expected.view(np.uint16), kind[:-2])
        return halves.reshape(-1, 2).any(axis=1)
    different = found != expected
    if kind in ("f16", "bf16", "f32", "f64"):
        different &= ~(is_nan(found, kind) & is_nan(expected, kind))
    return different


def describe(row: int, columns: list[np.ndarray], found: np.ndarray, expected: np.ndarray) -> str:
    values = ", ".join(f"{column[row]:#x}" for column in columns)
    return f"operands {values}: got {found[row]:#x}, expected {expected[row]:#x}"


def test_every_opcode_of_the_machine_has_an_expectation():
    known = {name for name, types in signatures().items() if types}
    known -= {name for name in known if name.startswith(COMPOSED)}
    assert known == LANEWISE


@pytest.mark.parametrize("opcode", EXACT)
def test_an_opcode_returns_the_exact_result(opcode: str):
    found, result, kinds, columns = computed(opcode)
    values = evaluate(EXACT[opcode], columns, kinds)
    decided = np.array([value is not None for value in values])
    expected = to_bits([value if value is not None else 0 for value in values], result)
    pairs = next((word for word in opcode.split(".") if word.endswith("x2")), result)
    wrong = np.flatnonzero(differs(found, expected, pairs) & decided)
    assert not len(wrong), describe(wrong[0], columns, found, expected)


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_an_approximate_opcode_is_as_exact_as_float32(opcode: str):
    found, _, kinds, columns = computed(opcode)
    expected = to_bits(evaluate(APPROXIMATE[opcode], columns, kinds), "f32")
    exact = expected.view(np.float32)
    ordinary = np.isfinite(exact) & (exact != 0)
    np.testing.assert_array_max_ulp(found.view(np.float32)[ordinary], exact[ordinary], 2)
    wrong = np.flatnonzero(differs(found, expected, "f32") & ~ordinary)
    assert not len(wrong), describe(wrong[0], columns, found, expected)
