"""Find, in the TTGIR of kernels, matrix products that several warps compute in the same way.

A layout of a product spreads warps over rows and columns. If the warps cover more of either than
the result has, some warps load the same operands and compute the same values as others. It happens
where a result has fewer rows than 16 for each warp.
"""

from __future__ import annotations

import re

_LAYOUT = re.compile(
    r"#(\w+) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[([\d, ]+)\].*?instrShape = \[([\d, ]+)\]"
)
_PRODUCT = re.compile(r"= (?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<([\dx]+)x[a-z]+\d+, #(\w+)>")


def find_redundant(ttgir: str) -> list[str]:
    """Return one sentence for each shape of product that several warps compute in the same way.

    Products of ``mma.sync`` and ``wgmma`` are looked at. One thread starts a product of
    ``tcgen05``, and products without matrix instructions (of float32) are left out.

    Args:
        ttgir: ``compiled.asm["ttgir"]`` of Triton 3.6 to 3.9.
    """
    layouts = {
        name: (_numbers(warps, ","), _numbers(instruction, ","))
        for name, warps, instruction in _LAYOUT.findall(ttgir)
    }
    found = {}
    for shape, name in _PRODUCT.findall(ttgir):
        if name in layouts:
            copies = _copies(_numbers(shape, "x"), *layouts[name])
            if copies > 1:
                found[shape] = f"{copies} warps compute the same {shape} product"
    return list(found.values())


def _numbers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator)]


def _copies(shape: list[int], warps: list[int], instruction: list[int]) -> int:
    """Return how many warps compute each element of a product.

    ``instruction`` may have the depth of the product as its last number; a warp's part of a wgmma
    has 16 rows.
    """
    copies = 1
    for size, count, step in zip(shape, warps, instruction, strict=False):
        copies *= max(1, count * step // max(size, step))
    return copies
