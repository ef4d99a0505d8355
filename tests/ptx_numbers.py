"""Numbers as PTX's types hold them: bits, exact rounding, and inputs that find mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

# Significant bits, exponent of the smallest number, and exponent that is too large.
FORMATS = {
    "f16": (11, -24, 16),
    "bf16": (8, -133, 128),
    "f32": (24, -149, 128),
    "f64": (53, -1074, 1024),
}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
BITS = {"pred": 32, "bf16": 16} | {f"{k}{b}": b for k in "usf" for b in (8, 16, 32, 64)}
_ROUND = {"nearest even": round, "towards zero": math.trunc, "down": math.floor}

Value = int | float | Fraction


def signed(value: int, bits: int) -> int:
    """Return the integer of some bits that two's complement makes of a value."""
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def unsigned(value: int, bits: int) -> int:
    """Return a value modulo 2**bits."""
    return value % (1 << bits)


def rounded(exact: Fraction, kind: str, how: str = "nearest even") -> float:
    """Return an exact number, rounded once to a floating-point type; the sign of 0 is +."""
    digits, lowest, too_large = FORMATS[kind]
    size, sign = abs(exact), -1 if exact < 0 else 1
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** max(exponent - digits + 1, lowest)
    value = _ROUND[how](exact / step) * step
    if abs(value) < Fraction(2) ** too_large:
        return math.copysign(float(value), sign)
    if how == "nearest even" or (how == "down" and sign < 0):
        return math.copysign(math.inf, sign)
    return sign * float((2 - Fraction(2) ** (1 - digits)) * 2 ** (too_large - 1))


@np.errstate(over="ignore", invalid="ignore")
def to_bits(values: Sequence[Value], kind: str) -> np.ndarray:
    """Return values as the bits of a type, rounded to nearest even or wrapped."""
    if kind[0] in "us" or kind == "pred":
        return np.array([int(v) % (1 << BITS[kind]) for v in values], f"u{BITS[kind] // 8}")
    if kind == "bf16":
        finite = [rounded(Fraction(v), kind) if v and math.isfinite(v) else v for v in values]
        return (np.array(finite, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    numbers = [rounded(v, kind) if isinstance(v, Fraction) else v for v in values]
    return np.array(numbers, np.float64).astype(FLOATS[kind]).view(f"u{BITS[kind] // 8}")


@np.errstate(invalid="ignore")
def from_bits(bits: np.ndarray, kind: str) -> list:
    """Return the values of bits: ints, bools or float64s."""
    if kind == "pred":
        return bits.astype(bool).tolist()
    if kind == "bf16":
        return list((bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    if kind in FLOATS:
        return list(bits.view(FLOATS[kind]).astype(np.float64))
    return bits.view(f"{'i' if kind[0] == 's' else 'u'}{bits.itemsize}").tolist()


def is_nan(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return where bits of a floating-point type are a NaN."""
    digits, _, _ = FORMATS[kind]
    infinity = (1 << BITS[kind] - 1) - (1 << digits - 1)
    return (bits & (1 << BITS[kind] - 1) - 1) > infinity


# ---- inputs --------------------------------------------------------------------------------------

_REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1 / 3, -0.4, 3.0, 65504.0, 65520.0, 2.0**-20]
_REALS += [2.0**31, -(2.0**31), 2.0**32, 2.0**31 - 128, 2.0**63, 1 + 2**-7, 1 + 2**-8, -(2.0**-130)]
_WHOLE = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256]
_RANDOM = 600


def edges(kind: str) -> np.ndarray:
    """Return special values of a type, as bits: the smallest and largest, zeros, NaNs."""
    if kind == "pred":
        return np.array([0, 1], np.uint32)
    bits = BITS[kind]
    if kind[0] in "us":
        top = 1 << bits - 1
        return to_bits([*_WHOLE, top - 1, top, top + 1, -1, -2, -17, 0x5A5A5A5A5A5A5A5A], kind)
    digits, _, _ = FORMATS[kind]
    infinity, smallest, sign = (1 << bits - 1) - (1 << digits - 1), 1 << digits - 1, 1 << bits - 1
    special = [1, smallest - 1, smallest, infinity - 1, infinity, infinity + 1, sign - 1]
    both_signs = np.array([s | x for s in (0, sign) for x in special], f"u{bits // 8}")
    return np.concatenate([to_bits(_REALS, kind), both_signs])


def draw(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Return random bits of a type: a half are any bits, a half are small or ordinary numbers."""
    if kind == "pred":
        return rng.integers(0, 2, count, np.uint32)
    any_bits = rng.integers(0, 1 << BITS[kind], count, f"u{BITS[kind] // 8}")
    if kind[0] in "us":
        ordinary = to_bits(rng.integers(-70, 70, count).tolist(), kind)
    else:  # few digits: sums cancel, and results lie halfway between two numbers
        numbers = rng.integers(-4096, 4096, count) * 2.0 ** rng.integers(-20, 9, count)
        ordinary = to_bits(numbers.tolist(), kind)
    return np.where(rng.random(count) < 0.5, any_bits, ordinary)


def operands(kinds: Sequence[str], multiple: int = 128) -> list[np.ndarray]:
    """Return bits for each operand: special values with each other, then random values."""
    rng = np.random.default_rng(0)
    special = [edges(kind) for kind in kinds]
    pairs = np.indices([len(values) for values in special[:2]]).reshape(len(kinds[:2]), -1)
    count = pairs.shape[1]
    chosen = [*pairs, *(rng.integers(0, len(values), count) for values in special[2:])]
    extra = _RANDOM + -(count + _RANDOM) % multiple
    return [
        np.concatenate([values[index], draw(rng, kind, extra)])
        for values, index, kind in zip(special, chosen, kinds, strict=True)
    ]


def evaluate(function: Callable, columns: list[np.ndarray], kinds: Sequence[str]) -> list:
    """Return a function of scalars for each row of the operands."""
    values = [from_bits(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    with np.errstate(all="ignore"):
        return [function(*row) for row in zip(*values, strict=True)]
