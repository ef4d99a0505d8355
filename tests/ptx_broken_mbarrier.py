"""Kernels with faults of mbarriers and of specialised warps (see ptx_broken_bulk.py)."""

from ptx_broken import DEADLOCK, IN_FLIGHT
from ptx_broken_bulk import RACE_READ, case

BYTES_LEFT = "transaction", "leaves an mbarrier at which expected and copied bytes differ"
HAS_BYTES = "deadlock", "waits forever: copies bring more bytes than its mbarrier expects"
IN_USE = "mbarrier", "initialises an mbarrier that is in use"
LACKS_ARRIVALS = "deadlock", "waits forever for arrivals at its mbarrier"
LACKS_BYTES = "deadlock", "waits forever: its mbarrier expects more bytes than copies bring"
NO_MBARRIER = "mbarrier", "uses an mbarrier that is not initialised"
OUTSIDE_TABLE = "out of bounds", "branches outside of its table"
REGISTERS = "registers", "sets another number of registers than the rest of its warpgroup"
TOO_MANY_ARRIVALS = "mbarrier", "arrives more often than its mbarrier expects in a phase"

MBARRIERS = {
    "expects too few bytes of a copy": case(
        HAS_BYTES,
        """
        SETUP;
      -? @leader EXPECT(full, 512);
      + @leader EXPECT(full, 1024);
        @leader LOAD(base, 0, full);
      ! WAIT(full, 0);
        """,
    ),
    "expects too many bytes": case(
        LACKS_BYTES,
        """
        SETUP;
      - @leader EXPECT(full, 2048);
      + @leader EXPECT(full, 1024);
        @leader LOAD(base, 0, full);
      ! WAIT(full, 0);
        """,
    ),
    "lacks an arrival": case(
        LACKS_ARRIVALS,
        """
        SETUP;
      + @leader EXPECT(full, 1024);
      - @leader mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [full], 1024;
        @leader LOAD(base, 0, full);
      ! WAIT(full, 0);
        """,
    ),
    "has an arrival too many": case(
        TOO_MANY_ARRIVALS,
        """
        SETUP;
        @leader EXPECT(full, 1024);
      -! @leader ARRIVE(full);
        @leader LOAD(base, 0, full);
        WAIT(full, 0);
        """,
    ),
    "all lanes arrive instead of one": case(
        TOO_MANY_ARRIVALS,
        """
        SETUP;
        @leader mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [full], 1024;
        bar.sync 0;
      -! @first ARRIVE(full);
      + @leader ARRIVE(full);
        @leader LOAD(base, 0, full);
        WAIT(full, 0);
        """,
    ),
    "not initialised": case(
        NO_MBARRIER,
        """
      + SETUP;
      ! @leader EXPECT(full, 1024);
      ? @leader LOAD(base, 0, full);
      ? WAIT(full, 0);
        """,
    ),
    "used after its end": case(
        NO_MBARRIER,
        """
        SETUP;
        bar.sync 0;
        @leader mbarrier.inval.shared::cta.b64 [full];
      + @leader mbarrier.init.shared::cta.b64 [full], 1;
        bar.sync 0;
      ! @leader ARRIVE(full);
        """,
    ),
    "initialised without a barrier": case(
        ("race", "writes what another warp wrote without a barrier in between"),
        """
        @leader mbarrier.init.shared::cta.b64 [full], 1;
      + bar.sync 0;
        setp.eq.u32 %p1, tid, 32;
      ! @%p1 ARRIVE(full);
        """,
        also="mbarrier",
    ),
    "initialised twice": case(
        IN_USE,
        """
        @leader mbarrier.init.shared::cta.b64 [full], 1;
      + @leader mbarrier.inval.shared::cta.b64 [full];
      ! @leader mbarrier.init.shared::cta.b64 [full], 1;
        """,
    ),
    "ends while another warp waits": case(
        RACE_READ,
        """
        SETUP;
        @leader ARRIVE(full);
      ? WAIT(full, 0);
      + bar.sync 0;
        setp.eq.u32 %p1, tid, 32;
      ! @%p1 mbarrier.inval.shared::cta.b64 [full];
        """,
        also="mbarrier",
    ),
    "values behind an arrival": case(
        ("race", "reads what another warp wrote without a barrier in between"),
        """
        SETUP;
        @!first bra READ;
      + st.shared.u32 [own], tid;
      + bar.warp.sync -1;
        @leader ARRIVE(full);
      -? st.shared.u32 [own], tid;
        ret;
        READ:
        WAIT(full, 0);
      ! ld.shared.u32 %r1, [other];
        """,
        also="uninitialised read",
    ),
}

# Faults that look different from schedule to schedule.
UNEVEN = {
    "expects too few bytes": case(
        IN_FLIGHT,
        """
        SETUP;
      -? @leader EXPECT(full, 1024);
      + @leader EXPECT(full, 2048);
        @leader LOAD(base, 0, full);
      ? @leader LOAD(base+1024, 8, full);
        WAIT(full, 0);
      ! ld.shared.u32 %r1, [own+1024];
        """,
        threads=32,
        also="transaction, unfinished",
    ),
    "expects nothing": case(
        BYTES_LEFT,
        """
        SETUP;
      -! @leader ARRIVE(full);
      + @leader EXPECT(full, 1024);
      ? @leader LOAD(base, 0, full);
        WAIT(full, 0);
        """,
        also="unfinished",
    ),
}

WARPS = {
    "registers that differ": case(
        REGISTERS,
        """
      -? @first setmaxnreg.inc.sync.aligned.u32 240;
      -! @second setmaxnreg.inc.sync.aligned.u32 232;
      ? setmaxnreg.dec.sync.aligned.u32 40;
        """,
    ),
    "a branch outside of its table": case(
        OUTSIDE_TABLE,
        """
      - mov.u32 %r1, 2;
      + mov.u32 %r1, 1;
        targets: .branchtargets ZERO, ONE;
      ! brx.idx %r1, targets;
        ZERO:
        ONE:
        """,
    ),
    "a cluster barrier that a warp misses": case(
        DEADLOCK,
        """
      - @second bra WAITS;
        barrier.cluster.arrive.aligned;
      -! barrier.cluster.wait.aligned;
      - ret;
        WAITS:
      -? bar.sync 1;
      + barrier.cluster.wait.aligned;
        """,
    ),
}
