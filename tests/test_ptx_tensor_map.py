"""Tensor maps of the PTX machine: what CUDA's driver refuses is refused."""

from __future__ import annotations

import pytest

from mmfused.tools.ptx.tensor_map import ELEMENTS, encode

GOOD = {
    "element": "bf16",
    "address": 0x1000,
    "dims": [100, 50],
    "strides": [208],
    "box": [64, 32],
    "swizzle": 3,
}
REFUSED = {
    "an unknown type": ({"element": "f8"}, "element: got 'f8', expected one of u8, u16"),
    "NaN of integers": ({"element": "u16", "fill_nan": True}, "fill_nan: got True for u16"),
    "an unknown swizzle": ({"swizzle": 4}, "swizzle: got 4, expected a number from 0 to 3"),
    "an odd address": ({"address": 0x1008}, "address: got 0x1008, expected a multiple of 16"),
    "six dimensions": (
        {"dims": [16] * 6, "strides": [32] * 5},
        "dims: got 6 dims and 5 strides, expected 1 to 5",
    ),
    "too few strides": ({"strides": []}, "dims: got 2 dims and 0 strides"),
    "no elements": ({"dims": [100, 0]}, r"dims: got \[100, 0\], expected 1 to"),
    "an odd stride": ({"strides": [200]}, r"strides: got \[200\], expected multiples of 16"),
    "a large stride": ({"strides": [1 << 40]}, "strides: got .*, expected multiples of 16 below"),
    "a large box": ({"box": [64, 257]}, r"box: got \[64, 257\], expected 2 numbers from 1 to 256"),
    "a narrow box": ({"box": [4, 32]}, "box: got a first dimension of 8 bytes, expected a mul"),
    "a box wider than its swizzle": (
        {"swizzle": 2},
        "box: got a first dimension of 128 bytes, a swizzle of 64 bytes",
    ),
    "other steps than 1": (
        {"element_strides": [1, 2]},
        r"element_strides: got \[1, 2\], expected 1 each",
    ),
}


def test_a_tensor_map_has_128_bytes():
    assert len(encode(**GOOD)) == 128


def test_types_have_the_numbers_of_tensormap_replace():
    assert [ELEMENTS.index(name) for name in ("u8", "f16", "f32", "bf16")] == [0, 6, 7, 10]


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_a_tensor_map_that_cuda_refuses_is_refused(change: dict, why: str):
    with pytest.raises(ValueError, match=f"^{why}"):
        encode(**{**GOOD, **change})
