"""Kernels with faults of bounds, global memory and lanes (see ptx_broken.py)."""

from ptx_broken import (
    DIVERGENCE,
    GLOBAL_RACE,
    MISALIGNED,
    OUTSIDE_GLOBAL,
    OUTSIDE_PARAMETERS,
    OUTSIDE_SHARED,
    UNINITIALISED,
    Case,
)

MEMORY = {
    "uninitialised": Case(
        *UNINITIALISED,
        """
      + st.shared.u32 [own], tid;
      ! ld.shared.u32 %r1, [own];
        """,
    ),
    "written by another block only": Case(
        *UNINITIALISED,
        """
        setp.eq.u32 %p1, block, 0;
      - @%p1 st.shared.u32 [own], tid;
      + st.shared.u32 [own], tid;
      ! ld.shared.u32 %r1, [own];
        """,
        blocks=2,
    ),
    "uninitialised in a part": Case(
        *UNINITIALISED,
        """
        shl.b32 %r1, tid, 3;
        add.u32 %r1, %r1, base;
        st.shared.u32 [%r1], tid;
      + st.shared.u32 [%r1+4], tid;
      ! ld.shared.v2.u32 {%r2, %r3}, [%r1];
        """,
    ),
    "uninitialised atomic": Case(
        *UNINITIALISED,
        """
      + st.shared.u32 [own], 0;
      ! atom.shared.add.u32 %r1, [own], 1;
        """,
    ),
    "uninitialised operand of wgmma": Case(
        *UNINITIALISED,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
      + st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "before an array": Case(
        *OUTSIDE_GLOBAL,
        """
      -! ld.global.u32 %r1, [in+-4];
      + ld.global.u32 %r1, [in];
        """,
    ),
    "after an array": Case(
        *OUTSIDE_GLOBAL,
        """
      -! st.global.u32 [out+4096], 1;
      + @first st.global.u32 [mine+3968], 1;
        """,
    ),
    "between two arrays": Case(
        *OUTSIDE_GLOBAL,
        """
      -! ld.global.v2.u32 {%r1, %r2}, [in+4096];
      + ld.global.v2.u32 {%r1, %r2}, [in+4088];
        """,
    ),
    "a copy from outside": Case(
        *OUTSIDE_GLOBAL,
        """
      -! cp.async.ca.shared.global [own], [source+4096], 4, 4;
      + cp.async.ca.shared.global [own], [source+4096], 4, 0;
        cp.async.wait_all;
        """,
    ),
    "before shared memory": Case(
        *OUTSIDE_SHARED,
        """
        st.shared.u32 [own], tid;
      -! @first ld.shared.u32 %r1, [own+-128];
      + @first ld.shared.u32 %r1, [own];
        """,
    ),
    "after shared memory": Case(
        *OUTSIDE_SHARED,
        """
      -! st.shared.u32 [own+16384], tid;
      + st.shared.u32 [own+16128], tid;
        """,
    ),
    "wgmma outside of shared memory": Case(
        *OUTSIDE_SHARED,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
      - add.s64 b_desc, b_desc, 1024;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "after the parameters": Case(
        *OUTSIDE_PARAMETERS,
        """
      -! ld.param.u32 %r1, [p_out+8];
      + ld.param.u32 %r1, [p_out+4];
        """,
    ),
    "before the parameters": Case(
        *OUTSIDE_PARAMETERS,
        """
        mov.b64 %rd1, p_in;
      -! ld.param.u32 %r1, [%rd1+-4];
      + ld.param.u32 %r1, [%rd1+4];
        """,
    ),
    "misaligned in global memory": Case(
        *MISALIGNED,
        """
      -! ld.global.u32 %r1, [in+2];
      + ld.global.u16 %r1, [in+2];
        """,
    ),
    "misaligned in shared memory": Case(
        *MISALIGNED,
        """
        st.shared.u32 [own], tid;
        bar.sync 0;
      -! @low ld.shared.v2.u32 {%r1, %r2}, [own];
      + @low ld.shared.u32 %r1, [own];
        """,
    ),
}

GLOBAL_RACES = {
    "read after another warp's write": Case(
        *GLOBAL_RACE,
        """
      ? @first st.global.u32 [mine], 7;
      + bar.sync 0;
      ! @second ld.global.u32 %r1, [theirs];
        """,
    ),
    "write after another warp's read": Case(
        *GLOBAL_RACE,
        """
      ? @first ld.global.u32 %r1, [mine];
      + bar.sync 0;
      ! @second st.global.u32 [theirs], 7;
        """,
    ),
    "write after several warps' reads": Case(
        *GLOBAL_RACE,
        """
      ? @first ld.global.u32 %r1, [mine];
      ? @second ld.global.u32 %r1, [theirs];
      + bar.sync 0;
      ! @second st.global.u32 [theirs], 7;
        """,
    ),
    "write after another warp's write": Case(
        *GLOBAL_RACE,
        """
      ? @first st.global.u32 [mine], 7;
      + bar.sync 0;
      ! @second st.global.u32 [theirs], 8;
        """,
    ),
    "global: read of another lane's write": Case(
        *GLOBAL_RACE,
        """
        st.global.u32 [mine], 7;
      + bar.warp.sync -1;
      ! ld.global.u32 %r1, [next];
        """,
    ),
    "blocks write to the same place": Case(
        *GLOBAL_RACE,
        """
        mul.wide.u32 %rd1, block, 256;
      + add.s64 mine, mine, %rd1;
      ! st.global.u32 [mine], block;
        """,
        blocks=3,
    ),
    "a block reads what another one writes": Case(
        *GLOBAL_RACE,
        """
        setp.eq.u32 %p1, block, 0;
        setp.eq.u32 %p2, block, 1;
      ? @%p1 st.global.u32 [mine], 7;
      -! @%p2 ld.global.u32 %r1, [mine];
      + @%p1 ld.global.u32 %r1, [mine];
        """,
        blocks=2,
    ),
    "a block writes what others read": Case(
        *GLOBAL_RACE,
        """
        setp.eq.u32 %p1, block, 2;
      ? ld.global.u32 %r1, [mine];
      -! @%p1 st.global.u32 [mine], 7;
      + @%p1 st.global.u32 [mine+256], 7;
        """,
        blocks=3,
    ),
    "global: a plain write among atomics": Case(
        *GLOBAL_RACE,
        """
        setp.eq.u32 %p1, tid, 0;
      -? @%p1 st.global.u32 [out], 5;
      ! red.global.add.u32 [out], 1;
        """,
        blocks=2,
    ),
    "the same value, in place of another one": Case(
        *GLOBAL_RACE,
        """
      -! st.global.u32 [out], tid;
      + st.global.u32 [out], 5;
        """,
        blocks=2,
    ),
}

# Silent although several threads touch the same memory.
HARMLESS = {
    "warps write the same value": """
        st.shared.u32 [base], 7;
        st.global.u32 [out], 7;
        """,
    "atomics of all threads": """
        setp.eq.u32 %p1, tid, 0;
        @%p1 st.shared.u32 [base], 0;
        bar.sync 0;
        red.shared.add.u32 [base], 1;
        red.global.add.u32 [out], 1;
        """,
    "barriers of some lanes": """
        st.shared.u32 [own], tid;
        @low bar.warp.sync 0xffff;
        @low ld.shared.u32 %r1, [beside];
        """,
    "lanes that have returned": """
        @high ret;
        shfl.sync.bfly.b32 %r1, tid, 1, 31, -1;
        bar.warp.sync -1;
        bar.sync 0;
        """,
    "a warp that has returned": """
        @second ret;
        bar.sync 0;
        """,
    "lanes that meet again": """
        @low bra skip;
        st.shared.u32 [own], tid;
        bra meet;
      skip:
        st.shared.u32 [own], lane;
      meet:
        bar.sync 0;
        ld.shared.u32 %r1, [other];
        """,
    "copies under a guard that is false": """
        @fresh cp.async.ca.shared.global [own], [source], 4;
        cp.async.commit_group;
        """,
}

LANES = {
    "a shuffle names absent lanes": Case(
        *DIVERGENCE,
        """
      -! @low shfl.sync.bfly.b32 %r1, tid, 1, 31, -1;
      + @low shfl.sync.bfly.b32 %r1, tid, 1, 31, 0xffff;
        """,
    ),
    "a shuffle does not name its lane": Case(
        *DIVERGENCE,
        """
      -! shfl.sync.bfly.b32 %r1, tid, 1, 31, 0xffff;
      + shfl.sync.bfly.b32 %r1, tid, 1, 31, 0xffffffff;
        """,
    ),
    "a shuffle from an absent lane": Case(
        *DIVERGENCE,
        """
      -! @low shfl.sync.bfly.b32 %r1, tid, 16, 31, 0xffff;
      + @low shfl.sync.bfly.b32 %r1, tid, 8, 31, 0xffff;
        """,
    ),
    "a shuffle from a lane that has returned": Case(
        *DIVERGENCE,
        """
        @high ret;
      -! shfl.sync.bfly.b32 %r1, tid, 16, 31, -1;
      + shfl.sync.bfly.b32 %r1, tid, 8, 31, -1;
        """,
    ),
    "a vote names absent lanes": Case(
        *DIVERGENCE,
        """
      - @high bra skip;
      ! vote.sync.ballot.b32 %r1, first, -1;
      skip:
        """,
    ),
    "a reduction names absent lanes": Case(
        *DIVERGENCE,
        """
      - @high bra skip;
      ! redux.sync.add.s32 %r1, tid, -1;
      skip:
        """,
    ),
    "bar.warp.sync names absent lanes": Case(
        *DIVERGENCE,
        """
      - @high bra skip;
      ! bar.warp.sync -1;
      skip:
        """,
    ),
    "ldmatrix in a part of a warp": Case(
        *DIVERGENCE,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
      - @high bra skip;
      ! ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [at16];
      skip:
        """,
    ),
    "mma in a part of a warp": Case(
        *DIVERGENCE,
        """
        mov.b32 %r1, 0;
        mov.f32 %f0, 0f00000000;
      - @low bra skip;
      ! MMA;
      skip:
        """,
    ),
    "groups of copies in a part of a warp": Case(
        *DIVERGENCE,
        """
        cp.async.ca.shared.global [own], [source], 4;
      - @high bra skip;
      ! cp.async.commit_group;
      skip:
        cp.async.wait_all;
        """,
    ),
}
