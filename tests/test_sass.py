"""Tests of reading machine code: loops, paths and counts."""

import pytest

from mmfused.cli import flow, sass

LISTING = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   SHFL.BFLY PT, R2, R2, 0x1, 0x1f ;
.L_x_2:
	//## File "kernels/some.py", line 7
        /*0030*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
	//## File "kernels/some.py", line 8
        /*0060*/                   BRA.DIV ~URZ, `(.L_x_6) ;
        /*0070*/              @!UP1 BRA `(.L_x_2) ;
        /*0080*/                   BSSY B0, `(.L_x_4) ;
        /*0090*/                   BRA P4, `(.L_x_3) ;
        /*00a0*/                   MUFU.EX2 R3, R3 ;
        /*00b0*/                   MUFU.EX2 R4, R4 ;
        /*00c0*/                   BSYNC B0 ;
.L_x_3:
        /*00d0*/                   MUFU.RCP R3, R3 ;
        /*00e0*/                   BSYNC B0 ;
        /*00f0*/                   STG.E [R8], R3 ;
.L_x_4:
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0110*/               @P6 BRA `(.L_x_1) ;
        /*0120*/                   STG.E.128 [R8], R4 ;
        /*0130*/                   EXIT ;
.L_x_5:
        /*0140*/                   BRA `(.L_x_5);
        /*0150*/                   NOP;
.L_x_6:
        /*0160*/                   WARPSYNC.COLLECTIVE R16, `(.L_x_7) ;
.L_x_7:
        /*0170*/                   BRA `(.L_x_1) ;
"""


def test_loops_are_counted_without_the_loops_inside_of_them():
    code = sass.parse(LISTING)
    outer, inner = code.loops
    assert (outer.depth, inner.depth) == (1, 2)
    assert inner.innermost and not outer.innermost and code.main_loops == [inner]
    assert inner.products == {"HMMA 16x8x16": 1, "HGMMA 64x128x16": 1}
    assert inner.opcodes == {"LDSM": 1, "HMMA": 1, "HGMMA": 1, "BRA": 2}
    assert outer.instructions == 10 and outer.opcodes["MUFU"] == 3
    assert code.rest.opcodes == {"LDC": 1, "EXIT": 2, "STG": 1}


def test_shortest_and_longest_path_of_an_iteration():
    """A join (BSYNC) goes on where its BSSY says, not with the next instruction."""
    outer, inner = sass.parse(LISTING).loops
    # SHFL, BSSY, BRA; two MUFU or one; BSYNC; BAR, BRA.
    assert (outer.shortest, outer.longest) == (7, 8)
    assert inner.shortest == inner.longest == inner.instructions == 5


def test_code_that_nothing_reaches_and_paths_of_diverged_warps_are_left_out():
    code = sass.parse(LISTING)
    counted = sum(loop.instructions for loop in code.loops) + code.rest.instructions
    assert code.total.instructions == counted == 19
    assert not {"WARPSYNC", "NOP"} & code.total.opcodes.keys()


def test_jump_tables_lead_to_each_of_their_targets():
    """A kernel with specialised warps starts with one."""
    code = sass.parse("""
        /*0000*/                   BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R3, R3 ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/                   SHFL.BFLY PT, R2, R2, 0x1, 0x1f ;
        /*0040*/                   BRA `(.L_x_2) ;
""")
    assert code.total.instructions == 5
    assert code.loops[0].opcodes == {"SHFL": 1, "BRA": 1}


def test_printed_summary_has_a_line_for_each_loop_and_the_rest():
    assert sass.parse(LISTING).rows() == [
        "  loop: 10 instructions (7 to 8 run): 3 MUFU, 1 SHFL, 1 BAR",
        "    loop: 5 instructions: 1 HMMA 16x8x16, 1 HGMMA 64x128x16, 1 LDSM",
        "  rest: 4 instructions: 1 STG",
    ]


def test_damaged_cubin_gives_a_one_line_error():
    with pytest.raises(RuntimeError, match="nvdisasm cannot read the 7 bytes of a cubin"):
        sass.read(b"damaged")


def test_loops_that_share_a_header_are_one_loop():
    loop, inner = flow.natural_loops([{1}, {2, 4}, {1, 3}, {1, 3}, set()])
    assert (loop.header, loop.body, loop.own) == (1, {1, 2, 3}, {1, 2})
    assert (inner.header, inner.body, inner.depth) == (3, {3}, 2)


def test_jump_into_the_middle_of_a_loop_makes_no_natural_loop():
    assert not flow.natural_loops([{1, 2}, {2}, {1}])
