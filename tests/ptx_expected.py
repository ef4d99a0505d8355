"""What each opcode that treats each lane alone returns, as the PTX ISA says it.

A function gets ints, bools or float64s. The result is rounded to nearest even, or wrapped, by the
test; None means that PTX leaves it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from ptx_numbers import from_bits, rounded, signed, to_bits, unsigned

EXACT: dict[str, Callable] = {}
APPROXIMATE: dict[
    str, Callable
] = {}  # GPUs approximate these; two units in the last place are left


# ---- integers ------------------------------------------------------------------------------------


def _quotient(a: int, b: int) -> int | None:
    if b == 0:
        return None
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int | None:
    return None if b == 0 else a - b * _quotient(a, b)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED_NAMES = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}
SIGNED_OR_NOT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "min": min,
    "max": max,
    "div": _quotient,
    "rem": _remainder,
    **{f"setp.{name}": compare for name, compare in COMPARISONS.items()},
}
BITWISE = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "setp.eq": COMPARISONS["eq"],
    "setp.ne": COMPARISONS["ne"],
}


def _seen_as(view: Callable, bits: int, function: Callable) -> Callable:
    return lambda *operands: function(*(view(operand, bits) for operand in operands))


def _add_integers(bits: int) -> None:
    for kind, view in (("u", unsigned), ("s", signed)):
        for name, function in SIGNED_OR_NOT.items():
            EXACT[f"{name}.{kind}{bits}"] = _seen_as(view, bits, function)
        high = _seen_as(view, bits, lambda a, b: a * b >> bits)
        EXACT[f"mul.hi.{kind}{bits}"] = high
        EXACT[f"mov.{kind}{bits}"] = BITWISE["mov"]
    for name, alias in UNSIGNED_NAMES.items():
        EXACT[f"setp.{alias}.u{bits}"] = EXACT[f"setp.{name}.u{bits}"]
    for name, function in BITWISE.items():
        EXACT[f"{name}.b{bits}"] = _seen_as(unsigned, bits, function)
    for kind in "bus":
        EXACT[f"selp.{kind}{bits}"] = lambda a, b, p: a if p else b
    EXACT[f"neg.s{bits}"] = lambda a: -a
    EXACT[f"abs.s{bits}"] = _seen_as(signed, bits, abs)
    EXACT[f"shl.b{bits}"] = lambda a, b: a << min(b, bits)
    EXACT[f"shr.u{bits}"] = lambda a, b: unsigned(a, bits) >> min(b, bits)
    EXACT[f"shr.b{bits}"] = EXACT[f"shr.u{bits}"]
    EXACT[f"shr.s{bits}"] = lambda a, b: signed(a, bits) >> min(b, bits)


for _bits in (16, 32, 64):
    _add_integers(_bits)


def _add_wide(bits: int) -> None:
    for kind, view in (("u", unsigned), ("s", signed)):
        EXACT[f"mul.wide.{kind}{bits}"] = _seen_as(view, bits, lambda a, b: a * b)
        EXACT[f"mad.wide.{kind}{bits}"] = lambda a, b, c, view=view: (
            view(a, bits) * view(b, bits) + c
        )


_add_wide(16)
_add_wide(32)


def _bfe(a: int, b: int, c: int, is_signed: bool) -> int:
    at, length = b & 255, c & 255
    sign = a >> min(at + length - 1, 31) & 1 if is_signed and length else 0
    bits = [a >> at + i & 1 if i < length and at + i <= 31 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def _bfi(a: int, b: int, c: int, d: int, width: int) -> int:
    at, length = c & 255, d & 255
    for i in range(min(length, width - at)):
        b = b & ~(1 << at + i) | (a >> i & 1) << at + i
    return b


def _prmt(a: int, b: int, selector: int) -> int:
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    nibbles = [selector >> 4 * k & 15 for k in range(4)]
    chosen = [255 * (source[n - 8] >> 7) if n & 8 else source[n] for n in nibbles]
    return int.from_bytes(bytes(chosen), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    index = [4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) for i in range(32)]
    return sum((table >> k & 1) << i for i, k in enumerate(index))


EXACT |= {
    "mov.pred": lambda a: a,
    "and.pred": lambda a, b: a and b,
    "or.pred": lambda a, b: a or b,
    "xor.pred": lambda a, b: a != b,
    "not.pred": lambda a: not a,
    "cvta.to.global.u64": lambda a: a,
    "cvta.global.u64": lambda a: a,
    "cvta.param.u64": lambda a: a,
    "mapa.u64": lambda a, b: a,
    "mapa.shared::cluster.u32": lambda a, b: a,
    "min.relu.s32": lambda a, b: max(0, min(a, b)),
    "max.relu.s32": lambda a, b: max(0, a, b),
    "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "popc.b32": int.bit_count,
    "popc.b64": int.bit_count,
    "clz.b32": lambda a: 32 - a.bit_length(),
    "clz.b64": lambda a: 64 - a.bit_length(),
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfe.u32": lambda a, b, c: _bfe(a, b, c, False),
    "bfe.s32": lambda a, b, c: _bfe(a, b, c, True),
    "bfe.u64": lambda a, b, c: a >> (b & 255) & (1 << (c & 255)) - 1,
    "bfi.b32": lambda a, b, c, d: _bfi(a, b, c, d, 32),
    "bfi.b64": lambda a, b, c, d: _bfi(a, b, c, d, 64),
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
}

# ---- floating point ------------------------------------------------------------------------------


def fused(a: float, b: float, c: float) -> float | Fraction:
    """Return a * b + c exactly, or what IEEE 754 makes of infinities, NaNs and zeros."""
    if all(map(math.isfinite, (a, b, c))):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact != 0:
            return exact
    if math.isfinite(a) and math.isfinite(b) and math.isinf(c):
        return c  # the product may be too large for a float64
    return a * b + c


def _total(a: float, b: float) -> float | Fraction:
    return fused(a, 1.0, b)


def flush(x: float) -> float:
    """Return a zero of the same sign for a denormal float32."""
    return np.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def _flushed(function: Callable) -> Callable:
    """Return a function with .ftz: of flushed operands, and its float32 result flushed."""

    def with_ftz(*operands: float) -> float:
        result = function(*map(flush, operands))
        nearest = rounded(result, "f32") if isinstance(result, Fraction) else np.float32(result)
        return flush(float(nearest))

    return with_ftz


def _larger(a: float, b: float) -> float:
    if a != a or b != b:
        return b if a != a else a
    return max(a, b, key=lambda x: (x, math.copysign(1, x)))  # -0 is less than +0


def _smaller(a: float, b: float) -> float:
    if a != a or b != b:
        return b if a != a else a
    return min(a, b, key=lambda x: (x, math.copysign(1, x)))


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": fused,
    "mad": fused,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "max": _larger,
    "min": _smaller,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1.0 / a,
}


def _is_nan(a: float, b: float) -> bool:
    return a != a or b != b


ORDERED = {
    f"setp.{n}": lambda a, b, f=f: f(a, b) and not _is_nan(a, b) for n, f in COMPARISONS.items()
}
ORDERED |= {"setp.num": lambda a, b: not _is_nan(a, b), "setp.nan": _is_nan}
UNORDERED = {
    f"setp.{n}u": lambda a, b, f=f: f(a, b) or _is_nan(a, b) for n, f in COMPARISONS.items()
}
for _kind in ("f32", "f64", "f16", "bf16"):
    EXACT |= {f"{name}.{_kind}": f for name, f in {**ORDERED, **UNORDERED}.items()}
for _kind in ("f32", "f64", "ftz.f32"):
    wrapped = _flushed if _kind == "ftz.f32" else lambda function: function
    EXACT |= {f"{name}.{_kind}": wrapped(function) for name, function in ARITHMETIC.items()}
for _kind in ("f16", "bf16"):
    # A float64 does not hold every sum of two such numbers exactly.
    EXACT |= {f"add.{_kind}": _total, f"sub.{_kind}": lambda a, b: _total(a, -b)}
    EXACT[f"mul.{_kind}"] = ARITHMETIC["mul"]
EXACT["fma.bf16"] = fused
for _name in ("max", "min"):
    EXACT[f"{_name}.NaN.f32"] = lambda a, b, f=ARITHMETIC[_name]: (
        math.nan if _is_nan(a, b) else f(a, b)
    )
EXACT |= {f"mov.{kind}": lambda a: a for kind in ("f16", "bf16", "f32", "f64")}
EXACT |= {f"selp.{kind}": lambda a, b, p: a if p else b for kind in ("f32", "f64")}


def _directed(function: Callable, how: str) -> Callable:
    def directed(*operands: float) -> float:
        result = function(*operands)
        return rounded(result, "f32", how) if isinstance(result, Fraction) else result

    return directed


def _fused_down(a: float, b: float, c: float) -> float:
    """Round a * b + c down; where the terms cancel, that is -0."""
    result = _directed(fused, "down")(a, b, c)
    if result == 0 and c == -(a * b):
        return 0.0 if math.copysign(1, a * b) == math.copysign(1, c) == 1 else -0.0
    return result


def _reciprocal_of_upper_half(a: float) -> float:
    """rcp.approx.ftz.f64: the lower 32 bits of the result are 0; denormals are flushed."""
    tiny = 2.0**-1022
    inverse = 1.0 / (np.copysign(0.0, a) if abs(a) < tiny else a)
    inverse = np.copysign(0.0, inverse) if abs(inverse) < tiny else inverse
    bits = to_bits([inverse], "f64") >> 32 << 32
    return inverse if inverse != inverse else from_bits(bits, "f64")[0]


EXACT |= {
    "add.rz.f32": _directed(_total, "towards zero"),
    "fma.rm.f32": _fused_down,
    "rcp.ftz.f64": _reciprocal_of_upper_half,
}


def _inverse_root(a: float) -> float:
    return 1.0 / np.sqrt(a)


APPROXIMATE |= {
    "ex2.f32": np.exp2,
    "ex2.ftz.f32": _flushed(np.exp2),
    "lg2.f32": np.log2,
    "lg2.ftz.f32": _flushed(np.log2),
    "rsqrt.f32": _inverse_root,
    "rsqrt.ftz.f32": _flushed(_inverse_root),
    "tanh.f32": np.tanh,
}

# ---- conversions and pairs -----------------------------------------------------------------------

_TO_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(function: Callable, kind: str) -> Callable:
    low, high = (-(2**31), 2**31 - 1) if kind == "s32" else (0, 2**32 - 1)
    return lambda a: 0 if a != a else int(min(max(function(a), low), high))


_FLOATS = ("f32.bf16", "bf16.f32", "f32.f16", "f16.f32", "f64.f32", "f32.f64")
_INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
EXACT |= {f"cvt.{kinds}": lambda a: a for kinds in _FLOATS}
EXACT |= {f"cvt.f32.{kind}": lambda a: a for kind in _INTEGERS}
EXACT |= {f"cvt.f64.{kind}": lambda a: a for kind in _INTEGERS[2:]}
for _name, _function in _TO_WHOLE.items():
    EXACT[f"cvt.{_name}.f32.f32"] = _function
    EXACT[f"cvt.{_name}.s32.f32"] = _to_integer(_function, "s32")
for _name in ("rzi", "rni"):
    EXACT[f"cvt.{_name}.u32.f32"] = _to_integer(_TO_WHOLE[_name], "u32")
EXACT["cvt.sat.f32.f32"] = lambda a: min(a, 1.0) if a > 0 else 0.0


def _pair(low: float, high: float, kind: str) -> int:
    bits = to_bits([low, high], kind).tolist()
    return bits[0] | bits[1] << 16


def _halves(pairs: tuple[int, ...], kind: str) -> list[tuple]:
    """Return the low halves, then the high halves, as numbers."""
    halves = [[pair >> shift & 0xFFFF for pair in pairs] for shift in (0, 16)]
    return [tuple(from_bits(np.array(half, np.uint16), kind)) for half in halves]


def _each_half(function: Callable, kind: str) -> Callable:
    def both(*pairs: int) -> int:
        low, high = (function(*half) for half in _halves(pairs, kind))
        return _pair(low, high, kind)

    return both


for _kind in ("f16", "bf16"):
    EXACT[f"cvt.{_kind}x2.f32"] = lambda high, low, kind=_kind: _pair(low, high, kind)
    EXACT[f"add.{_kind}x2"] = _each_half(EXACT[f"add.{_kind}"], _kind)
for _kind in ("u16x2", "s16x2"):
    EXACT[f"add.{_kind}"] = lambda a, b: (a + b) & 0xFFFF | ((a >> 16) + (b >> 16) & 0xFFFF) << 16
EXACT["fma.bf16x2"] = _each_half(fused, "bf16")
