"""The counters of traces against accesses whose sectors and wavefronts arithmetic gives."""

from types import SimpleNamespace

import numpy as np
import pytest
from bounds_kernels import NOWHERE, global_access, shared_access, trace
from ptx_kernels import HAS_COMPILER, NO_COMPILER

from mmfused.tools.bounds.cards import A100, CARDS, H100, Card
from mmfused.tools.bounds.predict import resident_blocks

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
LANES = np.arange(32)
ROWS = LANES % 8  # of a matrix of ldmatrix

# ---- shared memory -------------------------------------------------------------------------------

WORDS = {
    "neighbours": (4 * LANES, 1),
    "neighbours in reverse": (124 - 4 * LANES, 1),
    "all lanes the same word": (0 * LANES, 1),
    "each second word": (8 * LANES, 2),
    "a column of 32 x 32": (128 * LANES, 32),
    "a column of padded rows": (132 * LANES, 1),
    "a column of swizzled rows": (128 * LANES + 4 * (LANES ^ 5), 1),
    "two words of one bank": (128 * (LANES // 16), 2),
    "half of the lanes off": (np.where(LANES < 16, 128 * LANES, NOWHERE), 16),
    "all lanes off": (NOWHERE + 0 * LANES, 0),
}


@pytest.mark.parametrize("statement", ["ld.shared.u32 %r3, [%r2];", "st.shared.u32 [%r2], %r1;"])
@pytest.mark.parametrize("name", WORDS)
def test_wavefronts_of_words_are_those_of_the_fullest_bank(name: str, statement: str):
    offsets, wavefronts = WORDS[name]
    assert shared_access(statement, offsets) == wavefronts


WIDE = {  # at most 128 bytes in a wavefront
    "8 bytes, neighbours": ("b64", 8 * LANES, 2),
    "8 bytes, each second": ("b64", 16 * LANES, 4),
    "8 bytes, a column of 256-byte rows": ("b64", 256 * LANES, 32),
    "8 bytes, a column of padded rows": ("b64", 264 * LANES, 2),
    "16 bytes, neighbours": ("v4", 16 * LANES, 4),
    "16 bytes, each second": ("v4", 32 * LANES, 8),
    "16 bytes, a column of 128-byte rows": ("v4", 128 * LANES, 32),
    "16 bytes, a column of padded rows": ("v4", 144 * LANES, 4),
    "16 bytes, a column of swizzled rows": ("v4", 128 * LANES + 16 * (LANES % 8), 4),
    "16 bytes, one quarter of the lanes on": ("v4", np.where(LANES < 8, 16 * LANES, NOWHERE), 1),
}


@pytest.mark.parametrize("name", WIDE)
def test_wavefronts_of_wide_loads_are_counted_by_halves_and_quarters_of_a_warp(name: str):
    kind, offsets, wavefronts = WIDE[name]
    load = {
        "b64": "ld.shared.b64 %rd3, [%r2];",
        "v4": "ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];",
    }
    assert shared_access(load[kind], offsets) == wavefronts


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("offsets", "each"),
    [
        pytest.param(128 * LANES, 8, id="rows of 128 bytes"),
        pytest.param(144 * LANES, 1, id="padded rows"),
        pytest.param(128 * LANES + 16 * (ROWS ^ 3), 1, id="swizzled rows"),
        pytest.param(64 * LANES, 4, id="rows of 64 bytes"),
    ],
)
def test_ldmatrix_and_stmatrix_take_the_wavefronts_of_their_rows(offsets, each: int, count: int):
    registers = "{" + ", ".join(f"%r{k + 3}" for k in range(count)) + "}"
    shape = f"matrix.sync.aligned.m8n8.x{count}.shared.b16"
    for statement in (f"ld{shape} {registers}, [%r2];", f"st{shape} [%r2], {registers};"):
        assert shared_access(statement, offsets) == each * count


# ---- global memory -------------------------------------------------------------------------------

SECTORS = {
    "neighbours": ("b32", 4 * LANES, 4),
    "neighbours, not aligned": ("b32", 4 * LANES + 4, 5),
    "all lanes the same": ("b32", 0 * LANES, 1),
    "each in a sector of its own": ("b32", 32 * LANES, 32),
    "each second": ("b32", 8 * LANES, 8),
    "8 lanes on": ("b32", np.where(LANES < 8, 4 * LANES, NOWHERE), 1),
    "all lanes off": ("b32", NOWHERE + 0 * LANES, 0),
    "2 bytes": ("b16", 2 * LANES, 2),
    "8 bytes": ("b64", 8 * LANES, 8),
    "16 bytes": ("v4.b32", 16 * LANES, 16),
    "16 bytes, each in a row of its own": ("v4.b32", 256 * LANES, 32),
}
VALUES = {"b32": "%r3", "b16": "%rs3", "b64": "%rd3", "v4.b32": "{%r3, %r4, %r5, %r6}"}


@pytest.mark.parametrize("name", SECTORS)
def test_sectors_of_a_load_and_a_store_are_the_different_ones_of_a_warp(name: str):
    kind, offsets, sectors = SECTORS[name]
    load = global_access(f"ld.global.{kind} {VALUES[kind]}, [%rd2];", offsets)
    assert load.total(load.trace.sectors, "ld.global") == sectors + 4  # and those of the offsets
    assert load.trace.distinct.sum(0).tolist() == [sectors + 4, 0]
    store = global_access(f"st.global.{kind} [%rd2], {VALUES[kind]};", offsets)
    assert store.total(store.trace.sectors, "st.global") == sectors
    assert store.trace.distinct.sum(0).tolist() == [4, sectors]
    assert store.trace.wavefronts.sum() == 0


def test_atomics_count_each_sector_once():
    atomic = global_access("red.global.add.u32 [%rd2], %r1;", 4 * (LANES % 16))
    assert atomic.total(atomic.trace.sectors, "red.global") == 2
    assert atomic.trace.distinct[:, 1].sum() == 2


def test_an_asynchronous_copy_counts_in_both_memories():
    copy = "cp.async.cg.shared.global [%r9], [%rd2], 16{};"
    body = "shl.b32 %r9, tid, 4; mov.u32 %r8, buffer; add.s32 %r9, %r9, %r8; "
    full = global_access(body + copy.format(""), 16 * LANES)
    assert full.total(full.trace.sectors, "cp.async") == 16
    assert full.total(full.trace.wavefronts, "cp.async") == 4
    # Lanes that copy no bytes write zeros and read nothing.
    none = global_access(body + "mov.u32 %r7, 0; " + copy.format(", %r7"), 16 * LANES)
    assert none.total(none.trace.sectors, "cp.async") == 0
    assert none.total(none.trace.wavefronts, "cp.async") == 4


def test_what_several_blocks_read_counts_once_from_dram():
    body = "mov.u64 %rd1, in0; ld.global.u32 %r1, [%rd1]; st.global.u32 [out_at], %r1;"
    made = trace(body, np.zeros(4 * 8, np.uint32), threads=32, blocks=4).trace
    reads, writes = made.distinct.sum(0)
    assert (reads, writes) == (1, 16)
    assert made.by_blocks.sum(0).tolist() == [4, 16]


def test_what_was_written_in_the_launch_is_not_read_from_dram():
    body = "st.global.u32 [out_at], tid; ld.global.u32 %r1, [out_at];"
    assert trace(body).trace.distinct.tolist() == [[0, 4]]
    body = "ld.global.u32 %r1, [out_at]; st.global.u32 [out_at], tid;"
    assert trace(body).trace.distinct.tolist() == [[4, 4]]


# ---- sampling ------------------------------------------------------------------------------------

STORES = "st.global.u32 [out_at], 1;" + "add.s32 %r1, tid, gid; xor.b32 %r2, %r1, tid;" * 50


def test_a_large_grid_is_sampled_and_its_counts_scale_exactly():
    everything = trace(STORES, threads=64, blocks=1000).trace
    sample = trace(STORES, threads=64, blocks=1000, steps=5000).trace
    assert everything.blocks == 1000 and sample.blocks < 50
    scaled = sample.executed * 1000 / sample.blocks
    assert np.array_equal(scaled, everything.executed)
    assert sample.sectors.sum() * 1000 / sample.blocks == everything.sectors.sum() == 8000
    # No block starts after the given number of instructions, and no earlier.
    each = everything.executed.sum() / 1000
    assert sample.blocks == -(-5000 // each)


def test_a_sample_is_spread_over_the_grid_and_always_the_same():
    def blocks() -> list[int]:
        out = trace(STORES, threads=32, blocks=1000, steps=2000).out.reshape(1000, 32)
        return np.flatnonzero(out[:, 0]).tolist()

    found = blocks()
    assert len(found) == -(-2000 // trace(STORES).trace.executed.sum()) and found == blocks()
    # In n equal parts of the grid, no two neighbouring parts are both empty.
    gaps = np.diff([0, *found, 1000])
    assert gaps.max() <= 2 * 1000 / len(found) and found[0] == 0 and found[-1] > 900


def test_all_blocks_of_a_small_grid_run_once():
    made = trace(STORES, threads=32, blocks=37)
    assert made.trace.blocks == 37 and made.out.all()


# ---- occupancy and cards -------------------------------------------------------------------------

# Registers of a thread, warps and shared bytes of a block, and the blocks that fit. Registers go to
# warps in units of 256, and each block of shared memory holds 1 KB more than it asks for (CUDA C++
# Programming Guide, compute capabilities; Hopper and Ampere Tuning Guides, occupancy).
OCCUPANCY = [
    (H100, 32, 4, 0, 16),  # 64 warps of 2048 threads
    (H100, 32, 1, 0, 32),  # at most 32 blocks
    (H100, 33, 4, 0, 12),  # 40 registers are taken: 48 warps
    (H100, 64, 8, 0, 4),
    (H100, 128, 8, 0, 2),
    (H100, 168, 8, 0, 1),  # 12 warps
    (H100, 168, 4, 0, 3),
    (H100, 255, 8, 0, 1),
    (H100, 64, 8, 227 << 10, 1),  # the most that a block may have
    (H100, 64, 4, 113 << 10, 2),
    (H100, 64, 4, 114 << 10, 1),
    (A100, 64, 4, 81 << 10, 2),
    (A100, 64, 4, 82 << 10, 1),
    (A100, 64, 4, 163 << 10, 1),
    (A100, 32, 1, 0, 32),
    (A100, 40, 8, 0, 6),
]


@pytest.mark.parametrize(("card", "registers", "warps", "shared", "blocks"), OCCUPANCY)
def test_resident_blocks_are_those_of_the_occupancy_rules(
    card: Card, registers: int, warps: int, shared: int, blocks: int
):
    code = SimpleNamespace(registers=registers)
    launch = SimpleNamespace(code=code, warps=warps, shared=shared)
    assert resident_blocks(launch, card) == blocks


OCCUPANCY_NUMBERS = {"shared_bytes", "registers", "warps", "blocks"}


@pytest.mark.parametrize("name", CARDS)
def test_each_number_of_a_card_has_a_source(name: str):
    card = vars(CARDS[name])
    numbers = {key for key, value in card.items() if isinstance(value, (int, float, tuple))}
    assert numbers - OCCUPANCY_NUMBERS - {"arch"} <= card["sources"].keys()
    assert card["sources"].keys() - numbers == {"occupancy"}
    assert all(len(source) > 10 for source in card["sources"].values())
