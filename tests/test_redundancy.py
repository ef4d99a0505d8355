"""Tests of finding warps that compute the same product, and of the list of those that do."""

from types import SimpleNamespace

import pytest

from mmfused.cli import known
from mmfused.cli.compiling import recorded_launches
from mmfused.cli.inspect import report_of
from mmfused.cli.redundancy import find_redundant
from mmfused.supported import ARCHS
from mmfused.tools import compile_matrix

MMA = "versionMajor = 2, versionMinor = 0, warpsPerCTA = [{}], instrShape = [16, 8]"
WGMMA = "versionMajor = 3, versionMinor = 0, warpsPerCTA = [{}], instrShape = [16, {}, 16]"
DOT = (
    "%s = tt.dot %x, %q, %c : tensor<{0}x64xbf16, #ttg.dot_op<{{opIdx = 0, parent = #mma}}>> * "
    "tensor<64x{1}xbf16, #ttg.dot_op<{{opIdx = 1, parent = #mma}}>> -> tensor<{0}x{1}xf32, #mma>"
)
GROUP_DOT = (
    "%s = ttng.warp_group_dot %x, %q, %c {{isAsync = true}} : !ttg.memdesc<{0}x64xbf16, #shared> * "
    "!ttg.memdesc<64x{1}xbf16, #shared1> -> tensor<{0}x{1}xf32, #mma> loc(#loc)"
)

# Of MAXIMUM: what is left of the list. It may become smaller, not larger.
MAXIMUM = 226


def ttgir(layout, product):
    return f"#mma = #ttg.nvidia_mma<{{{layout}}}>\nmodule {{\n  {product}\n}}\n"


@pytest.mark.parametrize(
    "layout, product, copies",
    [
        (MMA.format("8, 1"), DOT.format(32, 32), 4),
        (MMA.format("2, 4"), DOT.format(32, 32), 0),
        (MMA.format("1, 8"), DOT.format(16, 32), 2),
        (MMA.format("4, 1"), DOT.format(64, 32), 0),
        (MMA.format("1, 1"), DOT.format(16, 4), 0),  # narrower than an instruction
        (WGMMA.format("8, 1", 64), GROUP_DOT.format(64, 64), 2),
        (WGMMA.format("8, 1", 64), GROUP_DOT.format(128, 64), 0),
        (WGMMA.format("4, 2", 64), GROUP_DOT.format(64, 64), 2),
        (WGMMA.format("4, 2", 32), GROUP_DOT.format(64, 64), 0),
    ],
)
def test_warps_beyond_the_rows_or_columns_of_a_product_are_redundant(layout, product, copies):
    found = find_redundant(ttgir(layout, product))
    assert [sentence.split()[0] for sentence in found] == [str(copies)] * bool(copies)


def test_batched_products_are_spread_over_the_batch_first():
    layout = MMA.format("4, 2, 1").replace("[16, 8]", "[1, 16, 8]")
    product = "%s = tt.dot %x, %q, %c : tensor<{0}x32x16xf32, #mma> -> tensor<{0}x32x16xf32, #mma>"
    assert not find_redundant(ttgir(layout, product.format(4)))
    assert find_redundant(ttgir(layout, product.format(2))) == [
        "2 warps compute the same 2x32x16 product"
    ]


def test_products_without_matrix_instructions_are_left_out():
    text = "#blocked = #ttg.blocked<{warpsPerCTA = [8, 1]}>\n" + DOT.format(16, 16)
    assert not find_redundant(text.replace("#mma", "#blocked"))


def test_list_of_known_launches_only_shrinks():
    assert len(known.entries()) <= MAXIMUM


def test_list_names_launches_that_exist():
    """That each is still needed is checked where kernels compile (compiling.inspect)."""
    cases = {op: {c for o, _, _, c in known.entries() if o == op} for op, *_ in known.entries()}
    for arch in ARCHS:
        launched = {
            (op, job.kernel.removesuffix("_kernel"), arch, job.case)
            for op, names in cases.items()
            for job in recorded_launches(arch, op, sorted(names))
        }
        assert {entry for entry in known.entries() if entry[2] == arch} <= launched


def test_compile_matrix_names_entries_that_no_launch_needs():
    names = ("op", "kernel", "arch", "case")
    rows = [dict(zip(names, entry, strict=True), known="2 warps") for entry in known.entries()]
    assert compile_matrix.unneeded(rows) == []
    rows[3]["known"] = ""
    assert compile_matrix.unneeded(rows) == [" ".join(rows[3][name] for name in names)]


def test_redundant_warps_are_a_fault_unless_they_are_listed(monkeypatch):
    measured = SimpleNamespace(
        registers=64,
        stack=0,
        shared=1024,
        instructions={"mma": 8},
        races=[],
        redundant=["2 warps compute the same 32x32 product"],
        sass=None,
    )
    job = next(recorded_launches("sm_80", "query_pooling", ["fluid"]))
    monkeypatch.setattr(known, "KNOWN", {})
    report = report_of(job, measured)
    assert report.fault == "2 warps compute the same 32x32 product" and not report.known
    cases = {("query_pooling", "onepass_forward"): ("issue 3", {"sm_80, sm_90": "wide, fluid"})}
    monkeypatch.setattr(known, "KNOWN", cases)
    report = report_of(job, measured)
    assert report.known == "2 warps compute the same 32x32 product: issue 3" and not report.fault
    assert str(report).endswith("(2 warps compute the same 32x32 product: issue 3)")
