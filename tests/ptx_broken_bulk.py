"""Kernels with faults of bulk copies and mbarriers (see ptx_broken.py).

Besides what those of ptx_broken.py have, each kernel is given:
  leader          a predicate: thread 0
  full empty      addresses of two mbarriers
  tile result     addresses of the tensor maps of `in` and `out`, as 32 rows of 32 words; a box has
                  8 rows, which are 1024 bytes
and, as shorthands:
  SETUP;                 initialises both mbarriers, for one arrival in each phase; a barrier
  EXPECT(full, 1024);    arrives, and expects bytes in this phase
  ARRIVE(empty);
  LOAD(base, 8, full);   copies the box from row 8 on to shared memory
  LOAD_BYTES(in+64);     copies 128 bytes of `in` to `base`, which `full` expects
  STORE(base, 8);        copies a box from shared memory to `out`
  WAIT(full, 0);         waits for the end of the phase of a parity
"""

import re

from ptx_broken import (
    HEAD,
    IN_FLIGHT,
    MISALIGNED,
    NO_FENCE,
    OUTSIDE_GLOBAL,
    OUTSIDE_SHARED,
    UNFINISHED,
    WGMMA_READS,
    Case,
)

BULK_HEAD = HEAD.replace(
    ".param .u64 p_out)",
    ".param .u64 p_out,\n.param .align 64 .b8 p_tile[128], .param .align 64 .b8 p_result[128])",
).replace(
    ".reg .pred low",
    ".shared .align 8 .b8 bars[16];\n.reg .pred leader;\n.reg .b32 full, empty;\n"
    ".reg .b64 tile, result;\n.reg .pred low",
)
BULK_HEAD += """
setp.eq.u32 leader, tid, 0;
mov.u32 full, bars;
add.u32 empty, full, 8;
mov.b64 tile, p_tile;
cvta.param.u64 tile, tile;
mov.b64 result, p_result;
cvta.param.u64 result, result;
"""
_LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
_SHORTHANDS = {
    r"SETUP;": "@leader mbarrier.init.shared::cta.b64 [full], 1; "
    "@leader mbarrier.init.shared::cta.b64 [empty], 1; bar.sync 0;",
    r"EXPECT\((.*), (.*)\);": r"mbarrier.arrive.expect_tx.shared::cta.b64 _, [\1], \2;",
    r"ARRIVE\((.*)\);": r"mbarrier.arrive.shared::cta.b64 _, [\1];",
    r"LOAD\((.*), (.*), (.*)\);": rf"{_LOAD} [\1], [tile, {{0, \2}}], [\3];",
    r"LOAD_BYTES\((.*)\);": r"cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes "
    r"[base], [\1], 128, [full];",
    r"STORE\((.*), (.*)\);": r"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group "
    r"[result, {0, \2}], [\1];",
    r"WAIT\((.*), (.*)\);": r"{ .reg .pred complete; again: "
    r"mbarrier.try_wait.parity.shared::cta.b64 complete, [\1], \2; @!complete bra again; }",
}
ABANDONED = "unfinished", "is not waited for before its mbarrier ends"
BULK_READS = "race", "writes what an unfinished bulk copy still reads"
TENSOR_MAP = "tensor map", "has a tensor map that is not valid for it"
RACE_READ = "race", "writes what another warp read without a barrier in between"
GLOBAL_RACE = "race", "touches what another thread wrote or read meanwhile"


def case(fault: tuple[str, str], body: str, **options) -> Case:
    """Return a case whose body may use the shorthands."""
    for pattern, text in _SHORTHANDS.items():
        body = re.sub(pattern, text, body)
    return Case(*fault, body, head=BULK_HEAD, **options)


BULK_LOADS = {
    "read before the wait": case(
        IN_FLIGHT,
        """
        SETUP;
        @leader EXPECT(full, 1024);
      ? @leader LOAD(base, 0, full);
      + WAIT(full, 0);
      ! ld.shared.u32 %r1, [own];
      - WAIT(full, 0);
        """,
        threads=32,
    ),
    "another warp waits": case(
        IN_FLIGHT,
        """
        SETUP;
        setp.eq.u32 %p1, tid, 32;
        @%p1 EXPECT(full, 1024);
      ? @%p1 LOAD(base, 0, full);
        @first bra READ;
        WAIT(full, 0);
        READ:
      + bar.sync 0;
      ! @first ld.shared.u32 %r1, [own];
        """,
        also="race, uninitialised read",
    ),
    "waits for another copy": case(
        IN_FLIGHT,
        """
        SETUP;
        @leader EXPECT(full, 1024);
        @leader EXPECT(empty, 1024);
        @leader LOAD(base, 0, full);
        @leader LOAD(base+1024, 8, empty);
        WAIT(full, 0);
      + WAIT(empty, 0);
      ! ld.shared.u32 %r1, [own+1024];
      - WAIT(empty, 0);
        """,
    ),
    "a buffer that is filled again too soon": case(
        IN_FLIGHT,
        """
        SETUP;
        @leader EXPECT(full, 1024);
        @leader EXPECT(empty, 1024);
      ? @leader LOAD(base, 0, full);
      + WAIT(full, 0);
      ! @leader LOAD(base, 8, empty);
      - WAIT(full, 0);
        WAIT(empty, 0);
        """,
    ),
    "a buffer that another warp still reads": case(
        RACE_READ,
        """
        SETUP;
        @leader EXPECT(full, 1024);
        @leader EXPECT(empty, 1024);
      ? @leader LOAD(base, 0, full);
        WAIT(full, 0);
      ? ld.shared.u32 %r1, [own];
      + bar.sync 0;
        setp.eq.u32 %p1, tid, 32;
      ! @%p1 LOAD(base, 8, empty);
        WAIT(empty, 0);
        """,
        also="copy in flight",
    ),
    "a buffer that wgmma still reads": case(
        WGMMA_READS,
        """
        SETUP;
        @leader EXPECT(full, 3072);
        @leader LOAD(base, 0, full);
        @leader LOAD(base+1024, 8, full);
        @leader LOAD(base+2048, 16, full);
        WAIT(full, 0);
        wgmma.fence.sync.aligned;
        WGMMA;
        wgmma.commit_group.sync.aligned;
      - bar.sync 0;
      + wgmma.wait_group.sync.aligned 0;
      + bar.sync 0;
        @leader EXPECT(empty, 1024);
      ! @leader LOAD(base, 0, empty);
        WAIT(empty, 0);
      - wgmma.wait_group.sync.aligned 0;
        """,
        threads=128,
    ),
    "written over plain writes without a fence": case(
        NO_FENCE,
        """
        SETUP;
        st.shared.u32 [own], tid;
      + fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader EXPECT(full, 1024);
      ! @leader LOAD(base, 0, full);
        WAIT(full, 0);
        """,
    ),
    "nobody waits": case(
        ABANDONED,
        """
        SETUP;
        @leader EXPECT(full, 1024);
      ! @leader LOAD(base, 0, full);
      + WAIT(full, 0);
        """,
    ),
    "a barrier that ends before its copy": case(
        ABANDONED,
        """
        SETUP;
        @leader EXPECT(full, 1024);
      ! @leader LOAD(base, 0, full);
      + WAIT(full, 0);
        bar.sync 0;
        @leader mbarrier.inval.shared::cta.b64 [full];
        """,
    ),
    "outside of shared memory": case(
        OUTSIDE_SHARED,
        """
        SETUP;
      ? @leader EXPECT(full, 1024);
      -! @leader LOAD(base+16256, 0, full);
      + @leader LOAD(base+15360, 0, full);
      + WAIT(full, 0);
        """,
        also="transaction",
    ),
    "to a misaligned place": case(
        MISALIGNED,
        """
        SETUP;
      ? @leader EXPECT(full, 1024);
      -! @leader LOAD(base+64, 0, full);
      + @leader LOAD(base+128, 0, full);
      + WAIT(full, 0);
        """,
        also="transaction",
    ),
    "no tensor map": case(
        TENSOR_MAP,
        """
        SETUP;
      ? @leader EXPECT(full, 1024);
      - mov.b64 tile, p_in;
      ! @leader LOAD(base, 0, full);
      + WAIT(full, 0);
        """,
        also="transaction",
    ),
    "bytes from outside of an array": case(
        OUTSIDE_GLOBAL,
        """
        SETUP;
        @leader EXPECT(full, 128);
      -! @leader LOAD_BYTES(in+4096);
      + @leader LOAD_BYTES(in+3968);
        WAIT(full, 0);
        """,
    ),
}

BULK_STORES = {
    "no fence before the store": case(
        NO_FENCE,
        """
        st.shared.u32 [own], tid;
        st.shared.u32 [own+256], tid;
        st.shared.u32 [own+512], tid;
        st.shared.u32 [own+768], tid;
      + fence.proxy.async.shared::cta;
        bar.sync 0;
      ! @leader STORE(base, 0);
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        """,
    ),
    "the source is overwritten": case(
        BULK_READS,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader STORE(base, 0);
        cp.async.bulk.commit_group;
      + cp.async.bulk.wait_group.read 0;
      ! @leader st.shared.u32 [own], 7;
      - cp.async.bulk.wait_group.read 0;
        """,
    ),
    "waits for too few groups": case(
        BULK_READS,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        st.shared.v4.u32 [at16+1024], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader STORE(base, 0);
        cp.async.bulk.commit_group;
        @leader STORE(base+1024, 8);
        cp.async.bulk.commit_group;
      - cp.async.bulk.wait_group.read 1;
      + cp.async.bulk.wait_group.read 0;
        @leader st.shared.u32 [own], 7;
      ! @leader st.shared.u32 [own+1024], 7;
      - cp.async.bulk.wait_group 0;
        """,
    ),
    "another thread waits": case(
        BULK_READS,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader STORE(base, 0);
        cp.async.bulk.commit_group;
      - @!leader cp.async.bulk.wait_group.read 0;
      + @leader cp.async.bulk.wait_group.read 0;
        bar.sync 0;
      ! @second st.shared.u32 [other], 7;
      - cp.async.bulk.wait_group.read 0;
        """,
    ),
    "nobody waits": case(
        UNFINISHED,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
      ! @leader STORE(base, 0);
        cp.async.bulk.commit_group;
      + cp.async.bulk.wait_group.read 0;
        """,
    ),
    "not committed": case(
        UNFINISHED,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
      ! @leader STORE(base, 0);
      + cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        """,
    ),
    "what it writes is read after its read": case(
        GLOBAL_RACE,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader STORE(base, 0);
        cp.async.bulk.commit_group;
      - cp.async.bulk.wait_group.read 0;
      + cp.async.bulk.wait_group 0;
      ! @leader ld.global.u32 %r1, [out];
        """,
    ),
    "two stores to one place": case(
        GLOBAL_RACE,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader STORE(base, 0);
        cp.async.bulk.commit_group;
      + cp.async.bulk.wait_group 0;
      ! @leader STORE(base, 0);
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        """,
    ),
    "blocks store to one place": case(
        GLOBAL_RACE,
        """
        st.shared.v4.u32 [at16], {1, 1, 1, 1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
      + shl.b32 block, block, 3;
      - and.b32 block, block, 0;
      ! @leader STORE(base, block);
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        """,
        blocks=2,
    ),
}

BULK = {
    **{f"bulk load: {name}": each for name, each in BULK_LOADS.items()},
    **{f"bulk store: {name}": each for name, each in BULK_STORES.items()},
}
