"""Matrix instructions of the PTX machine, on matrices laid out as the PTX ISA says.

The matrices hold small integers, so that every sum is exact.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_kernels import HAS_COMPILER, NO_COMPILER, run, zeros
from ptx_layouts import (
    LAYOUTS,
    Layout,
    Stored,
    a_fragment,
    accumulator,
    b_fragment,
    small_fragment,
    store,
)
from ptx_numbers import to_bits

from mmfused.tools.ptx.machine import IN_ORDER, Schedule, signatures

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

KINDS = ("bf16", "f16")
COLUMNS = (8, 16, 32, 64, 128, 256)


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-99, 100, shape)


def halves(matrix: np.ndarray, kind: str = "bf16") -> np.ndarray:
    """Return a matrix as bits of a 16-bit type."""
    return to_bits(matrix.ravel().tolist(), kind).reshape(matrix.shape)


def names(prefix: str, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{k}" for k in range(count)) + "}"


def test_every_matrix_instruction_of_the_machine_has_a_test():
    tested = [
        *(rf"{name}.m8n8.x[124](.trans)?.shared.b16" for name in ("ldmatrix", "stmatrix")),
        r"mma.m16n8k16.row.col.f32.(bf16.bf16|f16.f16).f32",
        r"wgmma.mma_async.m64n\d+k16.f32.(bf16.bf16|f16.f16)",
        r"wgmma.(fence|commit_group|wait_group|move)",
    ]
    known = [name for name in signatures() if re.match("ldmatrix|stmatrix|mma|wgmma", name)]
    assert [name for name in known if not re.fullmatch("|".join(tested), name)] == []


# ---- ldmatrix and stmatrix -----------------------------------------------------------------------

# Rows lie 48 bytes apart, in another order than the lanes.
ROW_PLACES = (48 * np.random.default_rng(1).permutation(32)).astype(np.uint32)
SPACES = ("shared", "shared::cta")


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_reads_rows_or_columns(count: int, trans: str):
    rows = np.random.default_rng(2).integers(0, 1 << 16, (32, 8), np.uint16)
    places = ROW_PLACES.copy()
    places[8 * count :] = 0xFFFFFFF0  # these lanes give no addresses
    matrices = rows.reshape(4, 8, 8)[:count]
    matrices = matrices.transpose(0, 2, 1) if trans else matrices
    expected = np.stack([small_fragment(matrix) for matrix in matrices], axis=1)
    for space in SPACES:
        body = f"""
            mov.u32 %r10, buffer;
            ld.global.b32 %r11, [in1_at];
            add.s32 %r11, %r11, %r10;
            ld.global.v4.b32 {names("r", 4)}, [in0_at];
            st.shared.v4.b32 [%r11], {names("r", 4)};
            bar.warp.sync -1;
            ld.global.b32 %r11, [in2_at];
            add.s32 %r11, %r11, %r10;
            ldmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 {names("r", count)}, [%r11+16];
            {"".join(f"st.global.b32 [out_at+{4 * k}], %r{k};" for k in range(count))}"""
        found = run(body, rows, ROW_PLACES + 16, places, out=zeros(32, count), shared=2048)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_writes_rows_or_columns(count: int, trans: str):
    rows = np.random.default_rng(3).integers(0, 1 << 16, (8 * count, 8), np.uint16)
    matrices = rows.reshape(count, 8, 8)
    matrices = matrices.transpose(0, 2, 1) if trans else matrices
    registers = np.stack([small_fragment(matrix) for matrix in matrices], axis=1)
    places = ROW_PLACES.copy()
    places[8 * count :] = 0xFFFFFFF0
    for space in SPACES:
        body = f"""
            mov.u32 %r10, buffer;
            ld.global.b32 %r11, [in1_at];
            add.s32 %r11, %r11, %r10;
            {"".join(f"ld.global.b32 %r{k}, [in0_at+{4 * k}];" for k in range(count))}
            stmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 [%r11+16], {names("r", count)};
            bar.warp.sync -1;
            setp.lt.u32 %p1, tid, {8 * count};
            @%p1 ld.shared.v4.b32 {names("r", 4)}, [%r11+16];
            @%p1 st.global.v4.b32 [out_at], {names("r", 4)};"""
        found = run(body, registers, places, out=zeros(32, 8, dtype=np.uint16), shared=2048)
        np.testing.assert_array_equal(found[: 8 * count], rows)
        assert not found[8 * count :].any()


# ---- mma -----------------------------------------------------------------------------------------


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """Return the accumulators [lane, register] of a @ b + c."""
    body = f"""
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [in0_at];
        ld.global.v2.b32 {{%r5, %r6}}, [in1_at];
        ld.global.v4.f32 {names("f", 4)}, [in2_at];
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {names("f", 4)},
            {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {names("f", 4)};
        st.global.v4.f32 [out_at], {names("f", 4)};"""
    fragments = a_fragment(halves(a, kind)), b_fragment(halves(b, kind))
    start = accumulator(c.astype(np.float32))
    return run(body, *fragments, start, out=zeros(32, 4, dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_mma_multiplies(kind: str):
    a, b, c = integers(16, 16), integers(16, 8, seed=1), integers(16, 8, seed=2)
    np.testing.assert_array_equal(mma(a, b, c, kind), accumulator(a @ b + c))


@pytest.mark.parametrize("kind", KINDS)
def test_mma_passes_infinities_and_nan_on(kind: str):
    a, b, c = np.ones((16, 16)), np.ones((16, 8)), np.zeros((16, 8))
    a[3, 5], a[9, 0], a[9, 15], a[14, 7] = np.inf, np.inf, -np.inf, np.nan
    found = mma(a, b, c, kind)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found, accumulator(a @ b + c))
    assert set(found.view(np.uint32)[np.isnan(found)].tolist()) == {0x7FFFFFFF}


# ---- wgmma ---------------------------------------------------------------------------------------


def copy_to_shared(bytes_each: int) -> str:
    """Return statements that copy in0 to shared memory; %rd1 becomes its address for wgmma."""
    moves = "".join(
        f"ld.global.v4.b32 {names('r', 4)}, [in0_at+{at}];\n"
        f"st.shared.v4.b32 [%r11+{at}], {names('r', 4)};\n"
        for at in range(0, bytes_each, 16)
    )
    return f"""
        mov.u32 %r10, buffer;
        mad.lo.s32 %r11, tid, {bytes_each}, %r10;
        {moves}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        and.b32 %r12, %r10, 0x3FFFF;
        shr.u32 %r12, %r12, 4;
        cvt.u64.u32 %rd1, %r12;"""


def wgmma(columns: int, kind: str, a: str, scale: str, transposed: str) -> str:
    """Return a wgmma into %f0, %f1, ... with the descriptor of B in %rd3."""
    shape = f"m64n{columns}k16.f32.{kind}.{kind}"
    registers = names("f", columns // 2)
    return f"""
        wgmma.mma_async.sync.aligned.{shape} {registers}, {a}, %rd3, {scale}, 1, 1, {transposed};"""


def frame(columns: int, body: str) -> str:
    """Load the accumulators from in1, run the body, which ends with wgmma, and store them."""
    each = range(columns // 2)
    return f"""
        {"".join(f"ld.global.f32 %f{k}, [in1_at+{4 * k}];" for k in each)}
        wgmma.fence.sync.aligned;
        {body}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        {"".join(f"st.global.f32 [out_at+{4 * k}], %f{k};" for k in each)}"""


def by_warp(matrix: np.ndarray, fragment) -> np.ndarray:
    """Return the fragments [thread, register] of a matrix; each warp holds 16 rows."""
    return np.concatenate([fragment(rows) for rows in np.split(matrix, len(matrix) // 16)])


class Case:
    """a @ b + c by wgmma.

    Args:
        columns: of b.
        kind: the type of a and b.
        a: how a lies in shared memory; None: it lies in registers.
        b: how b lies in shared memory.
        steps: instructions, of 16 columns of a each.
        groups: of four warps, with 64 rows of a each.
    """

    def __init__(
        self,
        columns: int,
        kind: str,
        a: Layout | None,
        b: Layout,
        steps: int = 1,
        groups: int = 1,
    ) -> None:
        self.columns, self.kind, self.steps, self.groups = columns, kind, steps, groups
        self.a = integers(64 * groups, 16 * steps, seed=columns)
        self.b = integers(columns, 16 * steps, seed=1)
        self.c = integers(64 * groups, columns, seed=2)
        self.stored_b = store(halves(self.b, kind), b, k_first=columns % 32 == 0)
        self.stored_a: Stored | None = None
        if a is not None:
            self.stored_a = store(halves(self.a, kind), a, k_first=columns % 64 == 0)

    def body(self, scale: str) -> str:
        lines = [copy_to_shared(len(self.image()) * 2 // (128 * self.groups))]
        products = [self.step(k, scale if k == 0 else "1") for k in range(self.steps)]
        return "\n".join([*lines, frame(self.columns, "".join(products))])

    def image(self) -> np.ndarray:
        images = [stored.image for stored in (self.stored_b, self.stored_a) if stored is not None]
        image = np.concatenate(images)
        return np.concatenate([image, np.zeros(-len(image) % (1024 * self.groups), np.uint16)])

    def step(self, number: int, scale: str) -> str:
        k, transposed = 16 * number, str(int(not self.stored_b.layout.k_major))
        lines = [f"add.s64 %rd3, %rd1, {self.stored_b.descriptor(0, k, 0):#x};"]
        if self.stored_a is None:
            a = "{%r1, %r2, %r3, %r4}"
            lines.append(f"ld.global.v4.b32 {a}, [in2_at+{16 * number}];")
        else:
            a, start = "%rd2", len(self.stored_b.image)
            transposed = f"{int(not self.stored_a.layout.k_major)}, {transposed}"
            first = self.stored_a.descriptor(0, k, start)
            second = self.stored_a.descriptor(64, k, start) if self.groups == 2 else first
            lines += [
                "setp.lt.u32 %p9, tid, 128;",
                f"selp.b64 %rd2, {first:#x}, {second:#x}, %p9;",
                "add.s64 %rd2, %rd2, %rd1;",
            ]
        return "\n".join([*lines, wgmma(self.columns, self.kind, a, scale, transposed)])

    def fragments(self) -> np.ndarray:
        steps = np.split(halves(self.a, self.kind), self.steps, axis=1)
        return np.concatenate([by_warp(step, a_fragment) for step in steps], axis=1)

    def check(
        self,
        scale: str = "1",
        accumulates: bool = True,
        schedule: Schedule = IN_ORDER,
        before: str = "",
    ) -> None:
        image, threads = self.image(), 128 * self.groups
        start = by_warp(self.c.astype(np.float32), accumulator)
        found = run(
            before + self.body(scale),
            image,
            start,
            *(() if self.stored_a else (self.fragments(),)),
            out=np.zeros_like(start),
            threads=threads,
            shared=image.nbytes,
            schedule=schedule,
        )
        expected = self.a @ self.b.T + (self.c if accumulates else 0)
        np.testing.assert_array_equal(found, by_warp(expected, accumulator))


LATE = Schedule(seed=3, late_wgmma=True)


@pytest.mark.parametrize("columns", range(8, 257, 8))
def test_wgmma_of_every_shape(columns: int):
    for kind in KINDS:
        Case(columns, kind, None, Layout(128, True)).check()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("a", [None, *LAYOUTS], ids=str)
def test_wgmma_of_every_layout(a: Layout | None, columns: int):
    for number, b in enumerate(LAYOUTS):
        kind = KINDS[(number + columns // 16) % 2]
        Case(columns, kind, a, b).check(schedule=(IN_ORDER, LATE)[number % 2])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_wgmma_steps_along_k_and_over_warpgroups(layout: Layout):
    steps = layout.chunks // 2 if layout.k_major and layout.swizzle else 3
    for schedule in (IN_ORDER, LATE):
        Case(32, "bf16", layout, layout, steps, groups=2).check(schedule=schedule)


@pytest.mark.parametrize(
    ("scale", "accumulates"),
    [("0", False), ("1", True), ("%p1", False), ("%p2", True)],
)
def test_wgmma_accumulates_if_scale_d_is_true(scale: str, accumulates: bool):
    predicates = "setp.ne.u32 %p1, 1, 1;\nsetp.eq.u32 %p2, 1, 1;"
    for schedule in (IN_ORDER, LATE):
        case = Case(16, "f16", None, Layout(64, True))
        case.check(scale, accumulates, schedule, before=predicates)
