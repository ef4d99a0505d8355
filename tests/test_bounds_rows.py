"""Tests of the table of counted targets: it is complete, and chosen rows are as it says."""

from __future__ import annotations

import json
import os

import pytest
import triton
from compiling import ROOT, run_python
from ptx_kernels import HAS_COMPILER, NO_COMPILER

from mmfused.cli import inspect, main
from mmfused.supported import TRITONS
from mmfused.tools.bounds import cards, table
from mmfused.tools.targets import ROWS

COUNTS = json.loads((ROOT / "benchmarks" / "bounds.json").read_text())
# Rows of most ops that are counted in some seconds.
CHOSEN = ("topk_routing/logits-16384", "query_pooling/bottleneck", "query_pooling/fluid")
CHOSEN += ("grouped_mlp/fluid-256",)
CHANGED = 0.03  # a row that changes by more needs a new line in the table

COUNT = """
import json, sys
from mmfused.cli import main
from mmfused.tools.bounds.table import count

counts = {row: count(*row.split("/")) for row in sys.argv[2:]}
print("counts", json.dumps(counts))
sys.exit(main(["inspect", "--bound", "--case", "logits-16384", "--json", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Count the chosen rows; also return what ``mmfused inspect --bound`` printed and wrote."""
    if not HAS_COMPILER:
        pytest.skip(NO_COMPILER)
    path = tmp_path_factory.mktemp("bounds") / "launches.json"
    path_of_triton = os.environ.get("PYTHONPATH", "")
    options = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path_of_triton}
    done = run_python("-W", "ignore", "-c", COUNT, str(path), *CHOSEN, **options)
    assert done.returncode == 0, done.stderr
    counts = next(line for line in done.stdout.splitlines() if line.startswith("counts "))
    return json.loads(counts.removeprefix("counts ")), done.stdout, json.loads(path.read_text())


def test_every_target_on_a_gpu_is_counted_with_every_supported_triton_on_two_cards():
    targets = {f"{row.op}/{row.case}" for row in ROWS if row.device == "cuda"}
    assert set(COUNTS) == targets
    for row, found in COUNTS.items():
        assert set(found) == set(TRITONS), row
        for on_cards in found.values():
            assert set(on_cards) == {"H100", "H200"}, row
            for passes in on_cards.values():
                for bound in passes.values():
                    assert 0 < bound["floor"] and 0 < bound["low"] <= bound["high"], row


def test_the_notes_have_the_table_of_the_counts():
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    for card in table.CARD_NAMES:
        assert f"**{card}**" in notes
    for row, found in COUNTS.items():
        for version in TRITONS:
            for card in table.CARD_NAMES:
                cell = table.times(found[version][card])
                assert any(
                    line.startswith(f"| {row.replace(chr(47), chr(32))}") and f"| {cell} |" in line
                    for line in notes.splitlines()
                ), (row, version, card, cell)


def test_chosen_rows_take_the_predicted_time_of_the_table(counted):
    version = triton.__version__
    if version not in TRITONS:
        pytest.skip(f"the table has no column for Triton {version}")
    changed = [
        f"{row}, {card}, {which}: predicted {1e6 * bound['high']:.1f} us, in the table "
        f"{1e6 * known['high']:.1f} us: python tools/bounds/table.py --row {row}"
        for row, on_cards in counted[0].items()
        for card, passes in on_cards.items()
        for which, bound in passes.items()
        for known in [COUNTS[row][version][card][which]]
        if abs(bound["high"] / known["high"] - 1) > CHANGED
    ]
    assert not changed, "\n".join(changed)


def test_every_rate_of_a_card_has_a_source():
    for card in cards.CARDS.values():
        occupancy = {"shared_bytes", "registers", "warps", "blocks"}
        rates = set(card.__dataclass_fields__) - {"name", "arch", "sources"} - occupancy
        assert rates | {"occupancy"} <= set(card.sources), card.name


def test_inspect_bound_tells_of_each_launch_what_limits_it(counted):
    _, printed, records = counted
    names = [record["name"] for record in records]
    assert names == ["route_kernel", "scan_kernel", "finish_kernel", "cat", "logits_kernel"]
    route = records[0]
    assert route["units"]["dram"] == pytest.approx(route["dram_bytes"] / cards.H200.dram)
    assert max(route["units"].values()) <= route["low"] <= route["high"]
    for text in (
        "topk_routing logits-16384, forward, H200, Triton ",
        "  route: ",
        "us of each unit: issue ",
        " % of the last one idle",
        "most time at topk_routing/",
    ):
        assert text in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--card", "H100"], "--card: got ['H100'], expected --bound beside it"),
        (["--op", "models"], "--op: got 'models', expected --bound beside it"),
        (["--bound", "--card", "V100"], "--card: got 'V100', expected some of H100, H200, A100"),
        (["--bound", "--card", "A100", "--card", "H100"], "expected cards of one architecture"),
        (["--bound", "--case", "nope"], "--case: got ['nope'], expected some of fluid, "),
    ],
)
def test_inspect_refuses_options_that_do_not_fit(options, message, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "INTERPRETED", False)
    assert main(["inspect", *options]) == 2
    assert message in capsys.readouterr().err
