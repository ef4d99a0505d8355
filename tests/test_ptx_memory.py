"""Loads, stores, copies, atomics and moves of the PTX machine."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from ptx_kernels import HAS_COMPILER, NO_COMPILER, aligned, run, zeros
from ptx_numbers import signed

from mmfused.tools.ptx.machine import IN_ORDER, Memory, Program, Schedule, signatures

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

SHAPES = [(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4)]
SHAPES += [(64, 1), (64, 2), (64, 4)]
CLASS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
LATE = Schedule(seed=5, late_copies=True)


def random(*shape: int, dtype: type = np.uint32, seed: int = 0) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, shape, dtype, endpoint=True)


def group(bits: int, count: int, first: int = 1) -> str:
    """Return the registers of a vector."""
    registers = [f"{CLASS[bits]}{first + k}" for k in range(count)]
    return registers[0] if count == 1 else "{" + ", ".join(registers) + "}"


def suffix(bits: int, count: int, kind: str = "b") -> str:
    return (f".v{count}" if count > 1 else "") + f".{kind}{bits}"


def test_every_memory_instruction_of_the_machine_has_a_test():
    shapes = "|".join(f"{bits}x{count}" for bits, count in SHAPES)
    updates = "|".join(map(re.escape, UPDATES))
    tested = [
        rf"(ld|st)\.(global|shared)\.({shapes})",
        rf"ld\.param\.({shapes})",
        rf"(atom|red)\.(global|shared)\.({updates})",
        r"cp\.async\.(4|8|16|commit_group|wait_group|wait_all)",
        r"cp\.async\.bulk\..*",  # test_ptx_bulk.py
    ]
    known = [name for name in signatures() if re.match("(ld|st|atom|red|cp)[.]", name)]
    assert [name for name in known if not re.fullmatch("|".join(tested), name)] == []


# ---- loads and stores ----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "count"), SHAPES)
def test_values_of_every_width_pass_through_global_and_shared_memory(bits: int, count: int):
    form, registers, size = suffix(bits, count), group(bits, count), bits // 8 * count
    body = f"""
        mov.u32 %r10, buffer;
        mad.lo.u32 %r10, tid, {size}, %r10;
        ld.global{form} {registers}, [in0_at];
        st.shared{form} [%r10+64], {registers};
        bar.sync 0;
        ld.shared{form} {group(bits, count, 5)}, [%r10+64];
        st.global{form} [out_at], {group(bits, count, 5)};"""
    data = random(64, size, dtype=np.uint8)
    found = run(body, data, out=np.zeros_like(data), threads=64, shared=4096)
    np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize("space", ["global", "shared", "shared::cta"])
@pytest.mark.parametrize(("kind", "bits"), [(k, b) for k in "us" for b in (8, 16, 32)])
def test_a_load_extends_values_to_wider_registers(kind: str, bits: int, space: str):
    data = random(32, dtype=np.dtype(f"u{bits // 8}").type)
    setup, at = "", "in0_at"
    if space != "global":
        setup = f"""
            ld.global.b{bits} {CLASS[bits]}9, [in0_at];
            mov.u32 %r10, buffer;
            mad.lo.u32 %r10, tid, 8, %r10;
            st.{space}.b{bits} [%r10], {CLASS[bits]}9;"""
        at = "%r10"
    body = f"""{setup}
        ld.{space}.{kind}{bits} %r1, [{at}];
        ld.{space}.{kind}{bits} %rd1, [{at}];
        st.global.b64 [out_at], %rd1;
        st.global.b32 [out_at+8], %r1;"""
    found = run(body, data, out=zeros(32, 2, dtype=np.uint64), shared=256)
    wide = data.astype(np.int64)
    expected = wide if kind == "u" else np.array([signed(int(v), bits) for v in wide])
    np.testing.assert_array_equal(found[:, 0].view(np.int64), expected)
    np.testing.assert_array_equal(found[:, 1].astype(np.uint32), expected.astype(np.uint32))


def test_a_vector_load_may_leave_elements_out():
    body = """
        ld.global.v4.b32 {_, %r1, _, %r2}, [in0_at];
        st.global.v2.b32 [out_at], {%r2, %r1};"""
    data = random(32, 4)
    np.testing.assert_array_equal(run(body, data, out=zeros(32, 2)), data[:, [3, 1]])


def test_constants_and_negative_offsets_are_stored():
    body = """
        st.global.v4.b32 [out_at], {7, -1, 0x10, 0f3F800000};
        add.s64 %rd1, out_at, 32;
        st.global.b64 [%rd1+-16], 0xFFFFFFFFFFFFFFFE;
        st.global.f32 [%rd1+-8], 0.5;"""
    found = run(body, out=zeros(32, 8))
    expected = [7, 0xFFFFFFFF, 16, 0x3F800000, 0xFFFFFFFE, 0xFFFFFFFF, 0x3F000000, 0]
    np.testing.assert_array_equal(found, [expected] * 32)


PARAMETERS = """.version 8.0
.visible .entry kernel(
    .param .u64 out, .param .u8 a, .param .u16 b, .param .s32 c, .param .f32 d, .param .u64 e,
    .param .align 16 .b8 f[24]
)
.reqntid 32
{
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [out];
    ld.param.u8 %rs1, [a];
    cvt.u32.u16 %r1, %rs1;
    st.global.b32 [%rd1], %r1;
    ld.param.u16 %r2, [b];
    st.global.b32 [%rd1+4], %r2;
    ld.param.s32 %rd2, [c];
    st.global.b64 [%rd1+8], %rd2;
    ld.param.f32 %f1, [d];
    st.global.f32 [%rd1+16], %f1;
    ld.param.u64 %rd3, [e];
    st.global.b64 [%rd1+24], %rd3;
    ld.param.v2.u32 {%r3, %r4}, [f+8];
    st.global.v2.b32 [%rd1+32], {%r3, %r4};
    mov.b64 %rd4, f;
    ld.param.b32 %r5, [%rd4+16];
    mov.b32 %r6, f;
    ld.param.b32 %r7, [%r6+20];
    mov.b64 %rd5, {%r5, %r7};
    st.global.b64 [%rd1+40], %rd5;
    ret;
}
"""


def test_parameters_of_every_type_are_read():
    out, structure = aligned(zeros(6, dtype=np.uint64)), random(24, dtype=np.uint8).tobytes()
    values = [(out.ctypes.data, 8), (0xAB, 1), (0xCDEF, 2), (2**32 - 5, 4), (0x40490FDB, 4)]
    packed = [value.to_bytes(size, "little") for value, size in [*values, (2**63 + 9, 8)]]
    program = Program(PARAMETERS)
    assert program.parameters == [8, 1, 2, 4, 4, 8, 24]
    memory = [Memory(out.ctypes.data, out.ctypes.data + out.nbytes, "out")]
    assert program.run((1, 1, 1), [*packed, structure], memory) == []
    expected = [0xAB | 0xCDEF << 32, 2**64 - 5, 0x40490FDB, 2**63 + 9]
    assert out.tolist() == [*expected, *np.frombuffer(structure[8:], np.uint64).tolist()]


@pytest.mark.parametrize(("bits", "count"), SHAPES)
def test_a_parameter_is_read_in_every_width(bits: int, count: int):
    structure = random(32, dtype=np.uint8).tobytes()
    text = f"""
.visible .entry kernel(.param .u64 out, .param .align 32 .b8 s[32])
.reqntid 32
{{
    .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.u64 %rd8, [out];
    ld.param{suffix(bits, count)} {group(bits, count)}, [s];
    st.global{suffix(bits, count)} [%rd8], {group(bits, count)};
    ret;
}}
"""
    out = aligned(zeros(32, dtype=np.uint8))
    memory = [Memory(out.ctypes.data, out.ctypes.data + 32, "out")]
    start = out.ctypes.data.to_bytes(8, "little")
    assert Program(text).run((1, 1, 1), [start, structure], memory) == []
    size = bits // 8 * count
    assert out.tobytes() == structure[:size] + bytes(32 - size)


# ---- cp.async ------------------------------------------------------------------------------------

COPIES = [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)]


@pytest.mark.parametrize("schedule", [IN_ORDER, LATE], ids=["at once", "late"])
@pytest.mark.parametrize(("cache", "size"), COPIES)
def test_a_copy_fills_what_its_source_does_not_give_with_zeros(cache, size, schedule):
    body = f"""
        mov.u32 %r10, buffer;
        mad.lo.u32 %r10, tid, 16, %r10;
        ld.global.b32 %r1, [in1_at];
        cp.async.{cache}.shared.global [%r10], [in0_at], {size}, %r1;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared{suffix(32, size // 4)} {group(32, size // 4)}, [%r10];
        st.global{suffix(32, size // 4)} [out_at], {group(32, size // 4)};"""
    data = random(32, size, dtype=np.uint8)
    sizes = np.arange(32, dtype=np.uint32) % (size // 4 + 1) * 4
    found = run(body, data, sizes, out=np.zeros_like(data), shared=512, schedule=schedule)
    np.testing.assert_array_equal(found, np.where(np.arange(size) < sizes[:, None], data, 0))


def test_a_copy_of_no_bytes_reads_no_memory():
    body = """
        mov.u64 %rd1, 0;
        mov.u32 %r10, buffer;
        mad.lo.u32 %r10, tid, 4, %r10;
        cp.async.ca.shared.global [%r10], [%rd1], 4, 0;
        cp.async.wait_all;
        ld.shared.b32 %r1, [%r10];
        st.global.b32 [out_at], %r1;"""
    assert not run(body, out=zeros(32) + 1, shared=128).any()


@pytest.mark.parametrize("schedule", [IN_ORDER, LATE], ids=["at once", "late"])
@pytest.mark.parametrize("wait", ["cp.async.wait_group", "cp.async.wait_all"])
def test_copies_complete_group_by_group(wait: str, schedule: Schedule):
    copies = "".join(
        f"cp.async.ca.shared.global [%r10+{128 * k}], [in0_at+{4 * k}], 4;\n"
        "cp.async.commit_group;\n"
        for k in range(3)
    )
    waits = [f"{wait} {2 - k};" if wait.endswith("group") else f"{wait};" for k in range(3)]
    reads = "".join(
        f"{waits[k]}\nld.shared.b32 %r1, [%r10+{128 * k}];\nst.global.b32 [out_at+{4 * k}], %r1;\n"
        for k in range(3)
    )
    setup = "mov.u32 %r10, buffer;\nmad.lo.u32 %r10, tid, 4, %r10;\n"
    data = random(32, 3)
    found = run(
        setup + copies + reads, data, out=np.zeros_like(data), shared=384, schedule=schedule
    )
    np.testing.assert_array_equal(found, data)


# ---- atomics -------------------------------------------------------------------------------------

UPDATES = {
    "add.u32": lambda a, b: a + b,
    "add.s32": lambda a, b: a + b,
    "add.u64": lambda a, b: a + b,
    "max.u32": max,
    "max.s32": lambda a, b: max(signed(a, 32), signed(b, 32)),
    "min.u32": min,
    "min.s32": lambda a, b: min(signed(a, 32), signed(b, 32)),
    "or.b32": lambda a, b: a | b,
    "and.b32": lambda a, b: a & b,
    "exch.b32": lambda a, b: b,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("update", UPDATES)
def test_atom_returns_the_old_value_and_red_none(update: str, space: str):
    bits = int(update[-2:])
    register, at = CLASS[bits], "out_at" if space == "global" else "%r10"
    body = f"""
        mov.u32 %r10, buffer;
        mad.lo.u32 %r10, tid, 16, %r10;
        ld.global.b{bits} {register}1, [in0_at];
        ld.global.b{bits} {register}2, [in1_at];
        st.{space}.b{bits} [{at}], {register}1;
        st.{space}.b{bits} [{at}+8], {register}1;
        bar.warp.sync -1;
        atom.{space}.acq_rel.gpu.{update} {register}3, [{at}], {register}2;
        red.{space}.relaxed.gpu.{update} [{at}+8], {register}2;
        bar.warp.sync -1;
        ld.{space}.b{bits} {register}4, [{at}];
        ld.{space}.b{bits} {register}5, [{at}+8];
        st.global.b{bits} [out_at], {register}3;
        st.global.b{bits} [out_at+8], {register}4;
        st.global.b{bits} [out_at+16], {register}5;"""
    dtype = np.dtype(f"u{bits // 8}").type
    old, value = random(32, dtype=dtype), random(32, dtype=dtype, seed=1)
    found = run(body, old, value, out=zeros(32, 3, dtype=np.uint64), shared=512)
    new = [UPDATES[update](int(a), int(b)) % (1 << bits) for a, b in zip(old, value, strict=True)]
    np.testing.assert_array_equal(found.astype(dtype), np.stack([old, new, new], axis=1))


@pytest.mark.parametrize("space", ["global", "shared"])
def test_lanes_of_several_warps_add_to_one_place(space: str):
    at = "out" if space == "global" else "%r10"
    body = f"""
        mov.u32 %r10, buffer;
        setp.eq.u32 %p1, tid, 0;
        @%p1 st.{space}.b32 [{at}], 0;
        bar.sync 0;
        atom.{space}.add.u32 %r1, [{at}], 1;
        st.global.b32 [out_at+4], %r1;"""
    found = run(body, out=zeros(96, 2), threads=96, shared=4)
    np.testing.assert_array_equal(np.sort(found[:, 1]), np.arange(96))


# ---- moves and conversions of integers -----------------------------------------------------------


@pytest.mark.parametrize(("parts", "bits"), [(2, 16), (2, 32), (4, 8), (4, 16)])
def test_mov_packs_and_unpacks_vectors(parts: int, bits: int):
    narrow, whole = group(bits, parts), CLASS[parts * bits]
    size = bits // 8
    loads = "".join(
        f"ld.global.b{bits} {CLASS[bits]}{k + 1}, [in0_at+{k * size}];\n" for k in range(parts)
    )
    stores = "".join(
        f"st.global.b{bits} [out_at+{(parts + k) * size}], {CLASS[bits]}{k + 5};\n"
        for k in range(parts)
    )
    body = f"""{loads}
        mov.b{parts * bits} {whole}11, {narrow};
        st.global.b{parts * bits} [out_at], {whole}11;
        ld.global.b{parts * bits} {whole}12, [in0_at];
        mov.b{parts * bits} {group(bits, parts, 5)}, {whole}12;
        {stores}"""
    data = random(32, parts, dtype=np.dtype(f"u{size}").type)
    found = run(body, data, out=np.zeros((32, 2 * parts), data.dtype))
    np.testing.assert_array_equal(found, np.hstack([data, data]))


def test_mov_may_leave_parts_out():
    body = """
        ld.global.b64 %rd1, [in0_at];
        mov.b64 {_, %r1}, %rd1;
        st.global.b32 [out_at], %r1;"""
    data = random(32, dtype=np.uint64)
    np.testing.assert_array_equal(run(body, data, out=zeros(32)), data >> 32)


INTEGERS = [f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize(("to", "kind"), list(itertools.product(INTEGERS, INTEGERS)))
def test_cvt_between_integers_extends_or_truncates(to: str, kind: str):
    """The destination may be wider than its type: it is extended as the type says."""
    to_bits, bits = int(to[1:]), int(kind[1:])
    data = random(32, dtype=np.uint64)
    wanted = [register for size, register in CLASS.items() if size >= max(to_bits, 16)]
    stores = {"%rs": "b16", "%r": "b32", "%rd": "b64"}
    values = [signed(int(v), bits) if kind[0] == "s" else int(v) % (1 << bits) for v in data]
    values = [signed(v, to_bits) if to[0] == "s" else v % (1 << to_bits) for v in values]
    for register in dict.fromkeys(wanted):
        body = f"""
            ld.global.b{max(bits, 16)} {CLASS[bits]}1, [in0_at];
            cvt.{to}.{kind} {register}2, {CLASS[bits]}1;
            st.global.{stores[register]} [out_at], {register}2;"""
        found = run(body, data, out=np.zeros_like(data))
        width = int(stores[register][1:])
        assert found.tolist() == [value % (1 << width) for value in values], register


def test_the_lower_half_of_a_wide_register_is_read_as_32_bits():
    body = """
        ld.global.b64 %rd1, [in0_at];
        add.u32 %r1, %rd1, 1;
        cvt.s64.s32 %rd2, %rd1;
        st.global.b32 [out_at], %r1;
        st.global.b64 [out_at+8], %rd2;"""
    data = random(32, dtype=np.uint64)
    found = run(body, data, out=zeros(32, 2, dtype=np.uint64))
    np.testing.assert_array_equal(found[:, 0], (data + 1).astype(np.uint32))
    np.testing.assert_array_equal(found[:, 1].view(np.int64), data.astype(np.int32))
