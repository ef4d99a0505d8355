"""Small kernels that are broken on purpose, each with its repair, for test_ptx_checks.py.

A kernel is written as a difference: lines with "-" are only in the broken kernel, lines with "+"
only in the repaired one. "!" marks the line that the first report must name when warps run in
order; "?" marks lines that other reports may name, for instance if warps run in another order.

Each kernel is given:
  tid lane warp block  numbers of the thread
  low high             predicates: lanes 0 to 15, lanes 16 to 31
  first second last    predicates: warps 0, 1 and 3
  own other beside     addresses in shared memory of the word of this thread, of the same lane of
                       warp 1 or 0, and of the next lane
  base at16            addresses of shared memory (16 KiB) and of 16 bytes for each thread
  a_desc b_desc        descriptors of a 64x16 and a 16x8 matrix, at base and at base + 2048
  WGMMA; MMA;          %f0 to %f3 = a @ b, asynchronously; a product of %r1 and %r1
  in out               addresses of arrays of 1024 words, which hold 0 to 1023
  source               address of the word of this thread in `in`
  mine theirs next     addresses in `out` of the word of this thread, of the same lane of warp 1 or
                       0, and of the next lane
"""

from __future__ import annotations

import re
from typing import NamedTuple

WORDS = 1024
WGMMA = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
    "{%f0, %f1, %f2, %f3}, a_desc, b_desc, fresh, 1, 1, 0, 0;"
)
MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{%f1, %f2, %f3, %f4}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f0, %f0, %f0, %f0};"
)

HEAD = """
.version 8.5
.target sm_90a
.address_size 64
.visible .entry broken(.param .u64 p_in, .param .u64 p_out)
.reqntid {threads}
{{
.shared .align 1024 .b8 buffer[16384];
.reg .pred low, high, first, second, last, fresh, %p<9>;
.reg .b32 tid, lane, warp, block, own, other, beside, base, at16, %r<99>;
.reg .b64 in, out, source, mine, theirs, next, a_desc, b_desc, %rd<99>;
.reg .f32 %f<99>;
mov.u32 tid, %tid.x;
mov.u32 block, %ctaid.x;
and.b32 lane, tid, 31;
shr.u32 warp, tid, 5;
setp.lt.u32 low, lane, 16;
setp.ge.u32 high, lane, 16;
setp.eq.u32 first, warp, 0;
setp.eq.u32 second, warp, 1;
setp.eq.u32 last, warp, 3;
setp.ne.u32 fresh, tid, tid;
mov.u32 base, buffer;
mad.lo.u32 own, tid, 4, base;
mad.lo.u32 at16, tid, 16, base;
xor.b32 other, own, 128;
xor.b32 beside, own, 4;
shr.u32 %r98, base, 4;
cvt.u64.u32 a_desc, %r98;
or.b64 a_desc, a_desc, 0x1000080000;
add.s64 b_desc, a_desc, 128;
ld.param.u64 in, [p_in];
ld.param.u64 out, [p_out];
mul.wide.u32 %rd98, tid, 4;
add.s64 source, in, %rd98;
add.s64 mine, out, %rd98;
xor.b32 %r98, tid, 32;
mul.wide.u32 %rd98, %r98, 4;
add.s64 theirs, out, %rd98;
xor.b32 %r98, tid, 1;
mul.wide.u32 %rd98, %r98, 4;
add.s64 next, out, %rd98;
"""


class Kernel(NamedTuple):
    """The text of a PTX module, the line of the first report, and the lines of all reports."""

    text: str
    line: int
    lines: set[int]


class Case(NamedTuple):
    """A broken kernel, the kind of its first fault, a part of the report, and other kinds."""

    kind: str
    what: str
    body: str
    threads: int = 64
    blocks: int = 1
    also: str = ""
    head: str = HEAD

    def kernel(self, broken: bool) -> Kernel:
        """Return the broken or the repaired kernel. Line n of the body is line n of its source."""
        text, line, lines, written = self.head.format(threads=self.threads), 0, set(), ""
        for number, written in enumerate(self.body.splitlines()):
            marks, statement = re.fullmatch(r"\s*([-+!?]*)\s*(.*)", written).groups()
            line = number if "!" in marks else line
            lines |= {number} if set(marks) & {"!", "?"} else set()
            statement = {"WGMMA;": WGMMA, "MMA;": MMA}.get(statement, statement)
            if ("+" if broken else "-") not in marks:
                text += f".loc 1 {number} 0\n{statement}\n"
        return Kernel(text + 'ret;\n}\n.file 1 "kernels/broken.py"\n', line, lines)


READ_AFTER_WRITE = "race", "reads what another warp wrote without a barrier in between"
WRITE_AFTER_READ = "race", "writes what another warp read without a barrier in between"
WRITE_AFTER_WRITE = "race", "writes what another warp wrote without a barrier in between"
OTHER_LANE = "race", "touches what another lane touched without bar.warp.sync in between"
GLOBAL_RACE = "race", "touches what another thread wrote or read meanwhile"
WGMMA_READS = "race", "writes what an unfinished wgmma still reads"
IN_FLIGHT = "copy in flight", "touches what an unfinished cp.async still writes"
NO_FENCE = "missing proxy fence", "touches what was written without fence.proxy.async"
UNINITIALISED = "uninitialised read", "reads what nothing has written in this block"
OUTSIDE_GLOBAL = "out of bounds", "touches global memory outside of every tensor"
OUTSIDE_SHARED = "out of bounds", "touches shared memory outside of the block's"
OUTSIDE_PARAMETERS = "out of bounds", "reads outside of the parameters"
MISALIGNED = "misaligned", "has an address that is no multiple of the access's size"
DIVERGENCE = "divergence", "needs lanes that are elsewhere"
DESCRIPTOR = "descriptor", "has a descriptor that differs between lanes"
DEADLOCK = "deadlock", "waits forever"
UNFINISHED = "unfinished", "is not waited for before the warp ends"

BARRIERS = {
    "read after write": Case(
        *READ_AFTER_WRITE,
        """
      ? @first st.shared.u32 [own], 7;
      + bar.sync 0;
      ! @second ld.shared.u32 %r1, [other];
        """,
        also="uninitialised read",
    ),
    "write after read": Case(
        *WRITE_AFTER_READ,
        """
        st.shared.u32 [own], tid;
        bar.sync 0;
      ? @second ld.shared.u32 %r1, [own];
      + bar.sync 0;
      ! @first st.shared.u32 [other], 7;
        """,
    ),
    "write after write": Case(
        *WRITE_AFTER_WRITE,
        """
      ? @first st.shared.u32 [own], 7;
      + bar.sync 0;
      ! @second st.shared.u32 [other], 8;
        """,
    ),
    "a plain write among atomics": Case(
        *WRITE_AFTER_WRITE,
        """
      ? @first st.shared.u32 [own], 0;
      ? @first red.shared.add.u32 [own], 1;
      + bar.sync 0;
      ! @second red.shared.add.u32 [other], 1;
        """,
        also="uninitialised read",
    ),
    "read of another lane's write": Case(
        *OTHER_LANE,
        """
        st.shared.u32 [own], tid;
      + bar.warp.sync -1;
      ! ld.shared.u32 %r1, [beside];
        """,
    ),
    "write after another lane's read": Case(
        *OTHER_LANE,
        """
        st.shared.u32 [own], tid;
        bar.warp.sync -1;
        ld.shared.u32 %r1, [beside];
      + bar.warp.sync -1;
      ! st.shared.u32 [own], 7;
        """,
    ),
    "a fence does not synchronise lanes": Case(
        *OTHER_LANE,
        """
        st.shared.u32 [own], tid;
        fence.proxy.async;
      + bar.warp.sync -1;
      ! ld.shared.u32 %r1, [beside];
        """,
    ),
    "read before the wait at a named barrier": Case(
        *READ_AFTER_WRITE,
        """
      ? @first st.shared.u32 [own], 7;
        @first bar.arrive 1, 64;
      + @second bar.sync 1, 64;
      ! @second ld.shared.u32 %r1, [other];
      - @second bar.sync 1, 64;
        """,
        also="uninitialised read",
    ),
    "arrives before it writes": Case(
        *READ_AFTER_WRITE,
        """
      - @first bar.arrive 1, 64;
      ? @first st.shared.u32 [own], 7;
      + @first bar.arrive 1, 64;
        @second bar.sync 1, 64;
      ! @second ld.shared.u32 %r1, [other];
        """,
        also="uninitialised read",
    ),
    "a consumer that arrives before it has read": Case(
        *WRITE_AFTER_READ,
        """
        @second bar.arrive 2, 64;
        mov.u32 %r2, 0;
      again:
        @first bar.sync 2, 64;
      ! @first st.shared.u32 [own], %r2;
        @first bar.arrive 1, 64;
        @second bar.sync 1, 64;
      - @second bar.arrive 2, 64;
      ? @second ld.shared.u32 %r1, [other];
      + @second bar.arrive 2, 64;
        add.u32 %r2, %r2, 1;
        setp.lt.u32 %p1, %r2, 4;
        @%p1 bra again;
        """,
    ),
    "deadlock: different barriers": Case(
        *DEADLOCK,
        """
      -! @first bar.sync 1, 64;
      -? @second bar.sync 2, 64;
      + bar.sync 1, 64;
        """,
    ),
    "deadlock: a warp does not arrive": Case(
        *DEADLOCK,
        """
      - @second bra skip;
      ! bar.sync 1, 64;
      skip:
      ? bar.sync 0;
        """,
    ),
    "deadlock: a wrong count": Case(
        *DEADLOCK,
        """
      -! bar.sync 1, 96;
      + bar.sync 1, 64;
        """,
    ),
    "bar.sync in a part of a warp": Case(
        *DIVERGENCE,
        """
      - @high bra skip;
      ! bar.sync 0;
      skip:
        """,
    ),
    "bar.sync under a guard": Case(
        *DIVERGENCE,
        """
      -! @low bar.sync 0;
      + bar.sync 0;
        """,
    ),
}
