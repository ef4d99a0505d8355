"""Counts and predictions of Triton kernels against what arithmetic gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_kernels import HAS_COMPILER, NO_COMPILER

from mmfused.tools.bounds.cards import H100

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def cases() -> dict:
    """Return the counts of bounds_cases.py, which needs a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, TESTS / "bounds_cases.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "numel"), [("copy", 10240), ("copy, odd", 10243)])
def test_a_copy_reads_and_writes_each_sector_once(cases: dict, name: str, numel: int):
    sectors = -(-numel * 4 // 32)
    assert cases[name]["distinct"] == [sectors, sectors]
    assert cases[name]["dram_bytes"] == 2 * sectors * 32
    if name == "copy":  # else a lane's four elements are four accesses to the same sectors
        assert cases[name]["l2_bytes"] == 2 * sectors * 32
    assert sum(cases[name]["wavefronts"].values()) == 0 and cases[name]["flops"] == 0


def test_a_large_copy_takes_the_rate_of_dram(cases: dict):
    copy = cases["copy, large"]
    assert copy["limiter"] == "dram" and copy["traced"] < copy["blocks"] == 1 << 18
    assert copy["dram_bytes"] == pytest.approx(2 * 4 * 2**28)
    assert copy["units"]["dram"] == pytest.approx(2 * 4 * 2**28 / H100.dram)


def test_a_softmax_takes_one_exponential_for_each_element(cases: dict):
    softmax = cases["softmax"]
    assert softmax["distinct"] == [12 * 125 // 2, 12 * 125 // 2]
    ex2 = sum(n for opcode, n in softmax["executed"].items() if opcode.startswith("ex2"))
    assert ex2 == 12 * 1024 // 32


@pytest.mark.parametrize(
    ("name", "m", "n", "k"),
    [
        ("product", 256, 192, 128),
        ("product, odd", 256, 192, 128),  # 200 x 136 x 104, in tiles of 64 x 64 x 32
        ("product, sm_80", 256, 192, 128),
        ("product, large", 8192, 8192, 8192),
    ],
)
def test_flops_of_a_product_are_those_of_its_tiles(cases: dict, name: str, m: int, n: int, k: int):
    assert cases[name]["flops"] == pytest.approx(2 * m * n * k, rel=1e-6)


def test_a_product_reads_and_writes_each_tensor_once_from_dram(cases: dict):
    for name in ("product", "product, sm_80"):
        reads = (256 * 128 + 128 * 192) * 2 // 32
        assert cases[name]["distinct"] == [reads, 256 * 192 * 2 // 32]
        # Each of 4 x 3 tiles reads 64 rows and 64 columns.
        tiles = 12 * (2 * 64 * 128 + 64 * 64) * 2
        assert cases[name]["l2_bytes"] == tiles


def test_a_large_product_nears_the_matrix_rate_if_l2_is_fast(cases: dict):
    product = cases["product, large"]
    matrix = 2 * 8192**3 / H100.matrix
    assert product["units"]["matrix"] == pytest.approx(matrix)
    assert matrix <= product["low"] < matrix / 0.75
    # At its lower rate, L2 is the bound: each tile reads 128 rows and 256 columns.
    l2 = (8192**3 * (1 / 128 + 1 / 256) + 8192**2) * 2 / min(H100.l2)
    assert product["limiter"] == "l2" and product["units"]["l2"] == pytest.approx(l2)


def test_wavefronts_are_told_apart_by_what_makes_them(cases: dict):
    product = cases["product, large"]
    shared, blocks, steps = product["shared"], 64 * 32, 8192 // 64
    # A step copies 128 rows and 256 columns of 64 numbers, of which 64 are a wavefront. Copies go
    # on for two steps after the last one, and fill in zeros.
    assert shared["copy"] == pytest.approx(blocks * (steps + 2) * (128 + 256))
    # In each of 4 parts of a step, two groups of warps read 64 rows of their own and all columns.
    assert shared["wgmma"] == pytest.approx(blocks * steps * 4 * 2 * (64 + 256) * 16 / 64)
    scale = product["blocks"] / product["traced"]
    assert sum(shared.values()) - shared["wgmma"] == pytest.approx(
        scale * sum(product["wavefronts"].values())
    )
    assert product["bulk_bytes"] == 0


# What each kernel writes; it reads all other tensors.
WRITES = {
    "pooling, hopper_forward_kernel": {"z_ptr", "sums_ptr"},
    "info_nce, sweep_kernel": {"row_ptr", "column_ptr"},
    "info_nce, merge_kernel": {"out_ptr"},
    "info_nce, target_kernel": {"out_ptr"},
    "routing, route_kernel": {"indices_ptr", "ints_ptr", "floats_ptr", "weights_ptr"},
    "routing, scan_kernel": {"totals_ptr", "sums_ptr", "prefix_ptr"},
    "routing, finish_kernel": {
        "losses_ptr",
        "tiles_ptr",
        "offsets_ptr",
        "counts_ptr",
        "position_ptr",
        "coefficients_ptr",
        "order_ptr",
    },
    "experts, rows_kernel": {"hidden_ptr", "out_ptr"},
    "experts, combine_kernel": {"out_ptr"},
    "attention, project_kernel": {"first.out_ptr", "second.out_ptr"},
    "attention, attend_kernel": {
        "first.attended_ptr",
        "first.lse_ptr",
        "second.attended_ptr",
        "second.lse_ptr",
    },
}
PARTLY = {("experts, rows_kernel", "tiles_ptr")}  # most tiles are not used


@pytest.mark.parametrize("name", WRITES)
def test_a_kernel_of_the_library_touches_each_sector_of_its_tensors_once(cases: dict, name: str):
    for tensor, (size, reads, writes) in cases["ops"][name].items():
        if (name, tensor) in PARTLY:
            assert 0 < reads < size and writes == 0
            continue
        expected = [0, size] if tensor in WRITES[name] else [size, 0]
        assert [reads, writes] == expected, tensor
