"""Kernels with faults of asynchronous work: cp.async and wgmma (see ptx_broken.py)."""

from ptx_broken import (
    DEADLOCK,
    DESCRIPTOR,
    IN_FLIGHT,
    NO_FENCE,
    OTHER_LANE,
    READ_AFTER_WRITE,
    UNFINISHED,
    WGMMA,
    WGMMA_READS,
    Case,
)

ASYNCHRONOUS = {
    "read before the wait": Case(
        *IN_FLIGHT,
        """
        cp.async.ca.shared.global [own], [source], 4;
        cp.async.commit_group;
      + cp.async.wait_group 0;
      ! ld.shared.u32 %r1, [own];
      - cp.async.wait_group 0;
        """,
    ),
    "waits for too few groups": Case(
        *IN_FLIGHT,
        """
        cp.async.ca.shared.global [own], [source], 4;
        cp.async.commit_group;
        cp.async.ca.shared.global [own+1024], [source], 4;
        cp.async.commit_group;
      - cp.async.wait_group 1;
      + cp.async.wait_group 0;
        ld.shared.u32 %r1, [own];
      ! ld.shared.u32 %r2, [own+1024];
      - cp.async.wait_group 0;
        """,
    ),
    "write before the wait": Case(
        *IN_FLIGHT,
        """
        cp.async.ca.shared.global [own], [source], 4;
        cp.async.commit_group;
      + cp.async.wait_group 0;
      ! st.shared.u32 [own], 7;
      - cp.async.wait_group 0;
        """,
    ),
    "two copies to one place": Case(
        *IN_FLIGHT,
        """
      ? cp.async.ca.shared.global [own], [source], 4;
      + cp.async.wait_all;
      ! cp.async.ca.shared.global [own], [source+128], 4;
        cp.async.wait_all;
        """,
    ),
    "a copy that another warp reads": Case(
        *READ_AFTER_WRITE,
        """
      ? @first cp.async.ca.shared.global [own], [source], 4;
        cp.async.wait_all;
      + bar.sync 0;
      ! @second ld.shared.u32 %r1, [other];
        """,
        also="copy in flight, uninitialised read",
    ),
    "a copy that another lane reads": Case(
        *OTHER_LANE,
        """
        cp.async.ca.shared.global [own], [source], 4;
        cp.async.wait_all;
      + bar.warp.sync -1;
      ! ld.shared.u32 %r1, [beside];
        """,
    ),
    "a barrier before the wait": Case(
        *IN_FLIGHT,
        """
      ? cp.async.ca.shared.global [own], [source], 4;
      - bar.sync 0;
        cp.async.wait_all;
      + bar.sync 0;
      ! ld.shared.u32 %r1, [other];
        """,
        also="race",
    ),
    "the warp ends before its copies": Case(
        *UNFINISHED,
        """
      ! cp.async.ca.shared.global [own], [source], 4;
        cp.async.commit_group;
      + cp.async.wait_group 0;
        """,
    ),
    "operands of wgmma overwritten": Case(
        *WGMMA_READS,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        WGMMA;
        wgmma.commit_group.sync.aligned;
      + wgmma.wait_group.sync.aligned 0;
      ! st.shared.v4.u32 [at16], {1, 1, 1, 1};
      - wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "operands of wgmma overwritten by another warpgroup": Case(
        *WGMMA_READS,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
        setp.ge.u32 %p1, warp, 4;
        @%p1 bra write;
        wgmma.fence.sync.aligned;
        WGMMA;
        wgmma.commit_group.sync.aligned;
      - bar.arrive 1, 256;
        wgmma.wait_group.sync.aligned 0;
      + bar.arrive 1, 256;
        ret;
      write:
        bar.sync 1, 256;
      ! st.shared.v4.u32 [base], {1, 1, 1, 1};
        """,
        threads=256,
    ),
    "the warp ends before its wgmma": Case(
        *UNFINISHED,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
      + wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "three warps of a warpgroup": Case(
        *DEADLOCK,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
      - @last ret;
        wgmma.fence.sync.aligned;
        WGMMA;
        wgmma.commit_group.sync.aligned;
      ! wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "no fence before wgmma": Case(
        *NO_FENCE,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
      + fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "no fence before wgmma, repaired in the reader": Case(
        *NO_FENCE,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        bar.sync 0;
      + fence.proxy.async;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "a fence of global memory only": Case(
        *NO_FENCE,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
      - fence.proxy.async.global;
      + fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "a fence before the copies have arrived": Case(
        *NO_FENCE,
        """
        cp.async.cg.shared.global [at16], [in], 16;
        cp.async.cg.shared.global [at16+2048], [in], 16;
      - fence.proxy.async;
        cp.async.wait_all;
      + fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "no barrier before wgmma": Case(
        *READ_AFTER_WRITE,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
      ? @last st.shared.u32 [base+2048], 7;
        fence.proxy.async;
      + bar.sync 0;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "a descriptor that differs between lanes": Case(
        *DESCRIPTOR,
        """
        st.shared.v4.u32 [at16], {0, 0, 0, 0};
        st.shared.v4.u32 [at16+2048], {0, 0, 0, 0};
        fence.proxy.async;
        bar.sync 0;
        cvt.u64.u32 %rd1, lane;
      - add.s64 b_desc, b_desc, %rd1;
        wgmma.fence.sync.aligned;
      ! WGMMA;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
}


def pipelined(buffers: int, steps: int = 5, ahead: int = 2) -> Case:
    """Return a kernel that copies tiles two steps ahead, into a ring of buffers, and multiplies.

    When a step copies a tile, the wgmma of the step before has ended, its own wgmma has not: three
    buffers are enough.
    """
    lines = ["mul.wide.u32 %rd1, tid, 16;", "add.s64 in, in, %rd1;", "add.s64 out, out, %rd1;"]
    lines += ["setp.eq.u32 %p0, tid, tid;"]

    def copy(step: int) -> list[str]:
        to, start = 4096 * (step % buffers), 256 * step
        copies = [
            f"cp.async.cg.shared.global [at16+{to}], [in+{start}], 16;",
            f"cp.async.cg.shared.global [at16+{to + 2048}], [in+{start + 16}], 16;",
        ]
        return [*(copies if step < steps else []), "cp.async.commit_group;"]

    for step in range(ahead):
        lines += copy(step)
    for step in range(steps):
        wgmma = WGMMA.replace("a_desc", "%rd2").replace("b_desc", "%rd3")
        lines += [f"cp.async.wait_group {ahead - 1};", "fence.proxy.async;", "bar.sync 0;"]
        lines += [f"add.s64 %rd2, a_desc, {256 * (step % buffers)};", "add.s64 %rd3, %rd2, 128;"]
        lines += ["wgmma.fence.sync.aligned;", wgmma.replace("fresh", "%p0" if step else "fresh")]
        lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;"]
        lines += ["bar.sync 0;"]  # all warps have issued this wgmma
        lines += copy(step + ahead)
    lines += ["wgmma.wait_group.sync.aligned 0;", "cp.async.wait_all;"]
    lines += ["st.global.v4.f32 [out], {%f0, %f1, %f2, %f3};"]
    return Case("", "", "\n".join(lines), threads=128)
