"""Bulk copies of tensors and mbarriers in the PTX machine."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_bulk_kernels import form, launch, prepared, random
from ptx_kernels import HAS_COMPILER, NO_COMPILER, aligned, run, zeros

from mmfused.tools.ptx.machine import Schedule, signatures
from mmfused.tools.ptx.tensor_map import FIELDS, SWIZZLE_BYTES, encode

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

DTYPES = {"u8": np.uint8, "f16": np.float16, "s32": np.int32, "f32": np.float32, "u64": np.uint64}
DTYPES |= {"u32": np.uint32, "s64": np.int64, "f64": np.float64}

FILL = """
@leader mbarrier.init.shared::cta.b64 [full], 1;
bar.sync 0;
@leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {size};
@leader {load};
{{
.reg .pred complete;
again:
mbarrier.try_wait.parity.shared::cta.b64 complete, [full], 0;
@!complete bra.uni again;
}}
"""
DRAIN = """
@leader {store};
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
"""
LOAD = "cp.async.bulk{kind}.{to}.global.mbarrier::complete_tx::bytes [base], {source}, [full]"


def braces(start: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, start[::-1])) + "}"


def part(
    array: np.ndarray,
    start: tuple[int, ...],
    box: tuple[int, ...],
    fill: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a box of an array, with ``fill`` where it is outside, and where it is inside."""
    inside = np.meshgrid(
        *(np.arange(s, s + n) for s, n in zip(start, box, strict=True)), indexing="ij"
    )
    valid = np.all([(i >= 0) & (i < n) for i, n in zip(inside, array.shape, strict=True)], axis=0)
    clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(inside, array.shape, strict=True))
    return np.where(valid, array[clipped], np.array(fill, array.dtype)), valid


def swizzled(data: np.ndarray, swizzle: int) -> np.ndarray:
    """Return bytes as they lie in shared memory, from a multiple of 1024 on."""
    chunks = data.view(np.uint8).reshape(-1, 16)
    at = np.arange(len(chunks))
    width = max(SWIZZLE_BYTES[swizzle], 16) // 16
    places = at ^ (at >> 3 & (width - 1))
    out = np.empty_like(chunks)
    out[places] = chunks
    return out.ravel()


# ---- copies of boxes -----------------------------------------------------------------------------

# Shape of the tensor, the box, and where the box starts.
BOXES = [
    ((150,), (64,), (100,)),
    ((150,), (64,), (-3,)),
    ((40, 24), (8, 16), (5, 4)),
    ((40, 24), (8, 16), (36, 20)),
    ((40, 24), (8, 16), (-2, -5)),
    ((40, 24), (8, 16), (40, 0)),
    ((5, 7, 32), (2, 4, 16), (4, -1, 20)),
    ((3, 5, 7, 32), (2, 2, 4, 16), (-1, 4, 5, 0)),
    ((3, 4, 5, 6, 16), (1, 2, 2, 3, 16), (2, 3, -1, 4, 3)),
]


@pytest.mark.parametrize(("shape", "box", "start"), BOXES)
@pytest.mark.parametrize("element", ["u8", "f16", "s32", "u64"])
def test_a_box_is_copied_to_shared_memory_with_zeros_outside_of_the_tensor(
    shape, box, start, element
):
    shape = (*shape[:-1], -(-shape[-1] // 16) * 16)  # strides must be multiples of 16 bytes
    box = (*box[:-1], max(box[-1], 16))
    source = random(*shape, dtype=DTYPES[element])
    expected, _ = part(source, start, box, 0)
    check_load(source, expected, box, start, element, 0, Schedule())


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(1, late_copies=True, late_wgmma=True)])
def test_a_swizzle_exchanges_16_bytes_by_the_row(swizzle, schedule):
    box = (32, max(SWIZZLE_BYTES[swizzle], 32) // 4)
    source = random(40, 64)
    expected, _ = part(source, (10, 3), box, 0)
    check_load(source, expected, box, (10, 3), "f32", swizzle, schedule)


@pytest.mark.parametrize("element", ["f16", "f32", "f64"])
def test_floats_outside_of_the_tensor_are_nan_if_the_map_says_so(element):
    source = random(20, 32, dtype=DTYPES[element])
    expected, _ = part(source, (15, 28), (8, 16), np.nan)
    check_load(source, expected, (8, 16), (15, 28), element, 0, Schedule(), fill_nan=True)


def check_load(source, expected, box, start, element, swizzle, schedule, fill_nan=False):
    """Copy a box to shared memory, all of that to ``out``, and compare."""
    kind, to = f".tensor.{len(box)}d", ("shared::cta", "shared::cluster")[len(box) % 2]
    load = LOAD.format(kind=kind, to=to, source=f"[map, {braces(start)}]")
    store = f"cp.async.bulk.global.shared::cta.bulk_group [out], [base], {expected.nbytes}"
    out = aligned(np.zeros(expected.nbytes, np.uint8))
    body = FILL.format(size=expected.nbytes, load=load) + DRAIN.format(store=store)
    options = {"swizzle": swizzle, "fill_nan": fill_nan}

    def make_map(address: int, _: int) -> bytes:
        return encode(element, address, **form(source, box), **options)

    assert launch(body, source, out, make_map, schedule=schedule) == []
    data = swizzled(np.ascontiguousarray(expected), swizzle).view(expected.dtype)
    np.testing.assert_array_equal(out.view(expected.dtype), data)  # any NaN equals any NaN


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
STORES = [(None, name) for name in DTYPES]
STORES += [(name, kind) for name in REDUCTIONS for kind in ("u32", "s32", "s64")]
STORES += [("add", "f16"), ("add", "f32"), ("min", "f16"), ("max", "f16"), ("add", "f64")]


@pytest.mark.parametrize(("reduction", "element"), STORES)
@pytest.mark.parametrize("start", [(5, 4), (36, -3), (-2, 20)])
def test_a_box_is_stored_or_combined_where_it_is_inside_of_the_tensor(reduction, element, start):
    dtype, box = DTYPES[element], (8, 16)
    tile, out = random(*box, dtype=dtype), random(40, 32, dtype=dtype, seed=1)
    expected = out.copy()
    numbers, valid = part(np.arange(out.size).reshape(out.shape), start, box, 0)
    where = numbers[valid]
    combine = REDUCTIONS.get(reduction, lambda old, new: new)
    expected.ravel()[where] = combine(out.ravel()[where], tile[valid])
    load = LOAD.format(kind="", to="shared::cta", source=f"[in], {tile.nbytes}")
    opcode = "cp.async.bulk.tensor" if reduction is None else "cp.reduce.async.bulk.tensor"
    word = f".{reduction}" if reduction else ""
    store = f"{opcode}.2d.global.shared::cta{word}.bulk_group [map, {braces(start)}], [base]"
    body = FILL.format(size=tile.nbytes, load=load) + DRAIN.format(store=store)

    def make_map(_: int, address: int) -> bytes:
        return encode(element, address, **form(out, box))

    for late in (False, True):
        found = aligned(out)
        schedule = Schedule(late_wgmma=late)
        assert launch(body, tile, found, make_map, schedule=schedule) == []
        np.testing.assert_array_equal(found, expected)


def test_a_trace_counts_the_sectors_of_the_rows_that_are_inside():
    source, out, box = random(40, 64), aligned(np.zeros(2048, np.uint8)), (16, 32)
    load = LOAD.format(kind=".tensor.2d", to="shared::cta", source="[map, {40, 30}]")
    store = "cp.async.bulk.global.shared::cta.bulk_group [out], [base], 2048"
    body = FILL.format(size=2048, load=load) + DRAIN.format(store=store)
    program, parameters, memory = prepared(
        body, source, out, lambda at, _: encode("f32", at, **form(source, box))
    )
    trace = program.trace((1, 1, 1), parameters, memory, steps=1000)
    expected = {source.ctypes.data: [10 * 24 * 4 // 32, 0], out.ctypes.data: [0, 2048 // 32]}
    assert trace.distinct.tolist() == [expected[start] for start in sorted(expected)]


def test_a_kernel_makes_a_tensor_map():
    source, box = random(20, 24), (8, 16)
    values = {
        "global_address": ["in"],
        "rank": [1],
        "global_dim": [24, 20],
        "global_stride": [96],
        "box_dim": [16, 8],
        "element_stride": [1, 1],
        "elemtype": [7],
        "swizzle_mode": [0],
        "fill_mode": [0],
        "interleave_layout": [0],
    }
    assert set(values) == set(FIELDS)
    lines = ["shl.b32 %r1, lane, 2;", "add.u32 %r1, %r1, base;"]
    lines += ["st.shared.b32 [%r1+2048], 0;", "bar.warp.sync -1;", "mov.u64 %rd2, 96;"]
    for name, each in values.items():
        bits = 64 if name in ("global_address", "global_stride") else 32
        for k, value in enumerate(each):
            order = f"{k}, " if FIELDS[name].is_array else ""
            value = "%rd2" if name == "global_stride" else value
            opcode = f"tensormap.replace.tile.{name}.shared::cta.b1024.b{bits}"
            lines.append(f"@leader {opcode} [base+2048], {order}{value};")
    lines += [
        "bar.warp.sync -1;",
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
        "[out+1024], [base+2048], 0x80;",
        "add.s64 %rd1, out, 1024;",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd1], 0x80;",
    ]
    load = LOAD.format(kind=".tensor.2d", to="shared::cta", source="[%rd1, {12, 15}]")
    store = "cp.async.bulk.global.shared::cta.bulk_group [out], [base], 512"
    body = "\n".join(lines) + FILL.format(size=512, load=load) + DRAIN.format(store=store)
    memory = aligned(np.zeros(2048, np.uint8))
    out = memory[-memory.ctypes.data % 128 :][:1152]
    assert launch(body, source, out, lambda *_: bytes(128), schedule=Schedule()) == []
    expected, _ = part(source, (15, 12), box, 0)
    np.testing.assert_array_equal(out[:512].view(np.float32).reshape(box), expected)


# ---- mbarriers -----------------------------------------------------------------------------------


def test_every_opcode_of_bulk_copies_and_mbarriers_has_a_test():
    tested = {"load", "store", "commit_group", "wait_group", "wait_group.read"}
    tested |= {"tensor.load", "tensor.store"}
    expected = {f"cp.async.bulk.{name}" for name in tested}
    expected |= {f"mbarrier.{name}" for name in ("init", "inval", "arrive", "pending_count")}
    expected |= {f"mbarrier.{name}_tx" for name in ("expect", "complete")}
    expected |= {f"mbarrier.{n}_wait{p}" for n in ("test", "try") for p in ("", ".parity")}
    expected |= {"tensormap.replace", "tensormap.copy"}
    starts = ("cp.async.bulk", "mbarrier", "tensormap")
    assert {name for name in signatures() if name.startswith(starts)} == expected


def test_a_phase_ends_when_it_lacks_neither_arrivals_nor_bytes():
    waits = ["[full], %rd1", "[full], 0", "[full], 1"]
    tests, lines = 0, []

    def test() -> None:
        nonlocal tests
        for wait, parity in zip(waits, ("", ".parity", ".parity"), strict=True):
            lines.append(f"mbarrier.test_wait{parity}.shared::cta.b64 %p1, {wait};")
            lines.append("selp.u32 %r9, 1, 0, %p1;")
            lines.append(f"@leader st.global.u32 [out+{4 * tests}], %r9;")
            tests += 1

    lines += ["@leader mbarrier.init.shared::cta.b64 [full], 3;", "bar.warp.sync -1;"]
    lines += ["mov.u64 %rd1, 0;"]
    test()
    lines += ["@leader mbarrier.arrive.noComplete.shared::cta.b64 %rd1, [full], 2;"]
    lines += ["@leader mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [full], 64;"]
    test()
    lines += ["@leader mbarrier.arrive.release.cta.shared::cta.b64 %rd2, [full];"]
    test()
    lines += ["@leader mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [full], 64;"]
    test()
    lines += ["@leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 0;"]
    lines += ["@leader mbarrier.arrive.shared::cta.b64 _, [full], 2;"]
    test()
    for k, state in enumerate(("%rd1", "%rd2")):
        lines += [f"mbarrier.pending_count.b64 %r1, {state};"]
        lines += [f"@leader st.global.u32 [out+{4 * (tests + k)}], %r1;"]
    lines += ["mbarrier.try_wait.shared::cta.b64 %p1, [full], %rd2, 1000;"]
    lines += ["bar.warp.sync -1;", "@leader mbarrier.inval.shared::cta.b64 [full];"]
    body, out = "\n".join(lines), zeros(tests + 2)
    body = "mov.u32 %r8, buffer;\nsetp.eq.u32 %p5, tid, 0;\n" + body
    body = body.replace("[full]", "[%r8]").replace("@leader", "@%p5")
    found = run(body, out=out, shared=64)
    incomplete, complete = [0, 0, 1], [1, 1, 0]
    expected = [*incomplete, *incomplete, *incomplete, *complete, *[1, 0, 1]]
    np.testing.assert_array_equal(found, [*expected, 3, 1])
