"""tools/readings.py reads rows with ncu, and puts what it measured beside the counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import triton

from mmfused.benchmarks import run
from mmfused.library import INTERPRETED
from mmfused.tools import fake_ncu, gpu, ncu, readings, readings_table
from mmfused.tools.bounds import kernel_counts, table
from mmfused.tools.targets import ROWS

COUNTS = kernel_counts.read()
ROW = "topk_routing/x-32768-e128"
SECONDS = "gpu__time_duration.sum"


# ---- beside the counts ---------------------------------------------------------------------------


def measured(name: str = ROW) -> tuple[list[dict], list[dict]]:
    """Return launches that are exactly as counted, and their counts."""
    counted = COUNTS[name]["3.8.0"]
    names = {key: names[0] for key, names in ncu.METRICS.items()}
    names = {key: name for key, name in names.items() if name.partition(".")[0] in fake_ncu.METRICS}
    text = fake_ncu.table(counted, list(names.values()))
    launches = [readings.values_of(launch, names) for launch in ncu.parse(text)]
    first = next(launch for launch in launches if "wavefronts" in launch)
    first["wavefronts"] /= fake_ncu.MORE_WAVEFRONTS
    return launches, counted


def sentences(launches: list[dict], counted: list[dict], card: str | None = "H200") -> list[str]:
    found = readings_table.groups(launches, counted)
    return [each for group in found for each in readings_table.differences(group, card)]


def of(launches: list[dict], name: str) -> dict:
    return next(launch for launch in launches if launch["name"] == name)


@pytest.mark.parametrize("row", kernel_counts.ROWS)
def test_a_reading_that_is_as_counted_has_no_differences(row):
    launches, counted = measured(row)
    left = [each for each in sentences(launches, counted) if "limited by" not in each]
    assert left == []  # the stand-in knows fewer units
    lines = readings_table.markdown(launches, counted, "H200").splitlines()
    assert sum(line.startswith("| **all** |") for line in lines) == 1
    whole = next(line for line in lines if line.startswith("| **all** |"))
    assert f"| {len(counted)} |" in whole


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("seconds", "route_x: time 1.30 times the prediction"),
        ("instructions", "route_x: instructions 1.30 times the count"),
        ("wavefronts", "route_x: wavefronts 1.30 times the count"),
        ("load", "route_x: wavefronts of loads 1.30 times the count"),
        ("copy", "route_x: wavefronts of cp.async 1.30 times the count"),
        ("l2_sectors", "route_x: L2 bytes 1.30 times the count"),
        ("dram_read", "route_x: DRAM bytes 1.23 times the count"),  # three quarters are reads
    ],
)
def test_a_difference_of_more_than_a_fifth_is_a_sentence_and_bold(key, sentence):
    launches, counted = measured()
    launch = of(launches, "route_x_kernel")
    launch[key] *= 1.15
    what = sentence.partition(" 1.")[0] + " 1."
    assert not any(each.startswith(what) for each in sentences(launches, counted))
    launch[key] *= 1.3 / 1.15
    assert any(each.startswith(sentence) for each in sentences(launches, counted))
    text = readings_table.markdown(launches, counted, "H200")
    line = next(line for line in text.splitlines() if line.startswith("| route_x |"))
    assert ("**" in line) == (key not in ("load", "copy")) and f"* {sentence}" in text


def test_small_kernels_and_small_parts_are_not_judged():
    launches, counted = measured("gated_cross_attention/uniecs")
    norm = of(launches, "norm_kernel")
    norm["l2_sectors"] *= 10
    assert norm["seconds"] < readings_table.LEAST_SECONDS
    assert not any(each.startswith("norm") for each in sentences(launches, counted))
    project = of(launches, "project_kernel")
    assert project["copy"] == 0 and project["wavefronts"] > 2e7
    project["copy"] = 5e5
    assert not any("cp.async" in each for each in sentences(launches, counted))
    project["copy"] = 5e6
    assert "project: wavefronts of cp.async none counted" in "\n".join(sentences(launches, counted))
    # What is no wavefront is not small beside wavefronts.
    project |= {"instructions": 2 * project["instructions"], "wavefronts": 1e11}
    assert "project: instructions 2.00 times" in "\n".join(sentences(launches, counted))


def test_short_kernels_without_a_count_share_a_line():
    launches, counted = measured("masked_info_nce/clip-65536")
    lines = readings_table.markdown(launches, counted, "H200").splitlines()
    others = [line for line in lines if " others | " in line]
    assert len(others) == 1 and len(lines) < 40
    assert "| _to_copy | 18 |" in "\n".join(lines)


def test_times_between_the_two_predictions_do_not_differ():
    launches, counted = measured()
    count = of(counted, "logits_kernel")["cards"]["H200"]
    assert count["low"] < 0.8 * count["high"]
    for seconds, found in (
        (count["low"], 1.0),
        ((count["low"] + count["high"]) / 2, 1.0),
        (count["low"] / 2, 0.5),
        (count["high"] * 2, 2.0),
    ):
        of(launches, "logits_kernel")["seconds"] = seconds
        (group,) = (
            group
            for group in readings_table.groups(launches, counted)
            if group.name == "logits_kernel"
        )
        assert readings_table.time_ratio(group, "H200") == pytest.approx(found)


def test_wavefronts_of_wgmma_are_those_that_are_nothing_else_where_ncu_does_not_list_them():
    launches, counted = measured("masked_info_nce/clip-65536")
    sweep = of(launches, "sweep_kernel")
    sweep["wavefronts"] = sweep["load"] + sweep["store"] + sweep["copy"]
    found = sentences(launches, counted)
    assert "sweep: wavefronts of wgmma and the rest 0.00 times the count" in "\n".join(found)
    sweep["wgmma"] = of(counted, "sweep_kernel")["shared"]["wgmma"]
    found = sentences(launches, counted)
    assert not any("wgmma" in each for each in found) and any("wavefronts 0." in x for x in found)


def test_launches_of_a_kernel_are_paired_in_order_and_summed():
    launches, counted = measured("gated_cross_attention/uniecs")
    found = readings_table.groups(launches, counted)
    (weights,) = (group for group in found if group.name == "weights_kernel")
    assert (len(weights.measured), weights.which, weights.is_counted) == (3, "backward", True)
    three = [count for count in counted if count["name"] == "weights_kernel"]
    assert weights.sum("l2_sectors") == pytest.approx(sum(x["l2_bytes"] for x in three) / 32)
    # The order of the passes is kept, and kernels without a count come last.
    order = [group.which for group in found]
    assert order == sorted(order, key=readings_table.PASSES.index) and order[-1].startswith("with")


def test_kernels_that_are_not_the_counted_ones_are_not_compared():
    launches, counted = measured()
    of(launches, "route_x_kernel")["blocks"] += 1
    launches.remove(of(launches, "dx_kernel"))
    launches.append(copy.copy(of(launches, "dw_kernel")))
    launches.append({"name": "mine_kernel", "blocks": 1, "seconds": 1e-3})
    found = sentences(launches, counted)
    assert (
        "route_x: not compared: 1 launches, 1 counted; blocks, measured and counted: 513 and 512"
        in found
    )
    assert "dx: not compared: 0 launches, 1 counted" in found
    # The launch too many has no count, and so the kernel has none that fits.
    assert "dw: not compared: 2 launches, 1 counted" in found
    text = readings_table.markdown(launches, counted, "H200")
    assert "| dx | 0 | not launched |" in text and "| mine | 1 | 1000 |" in text


def test_other_code_and_another_limiter_are_told():
    launches, counted = measured()
    route, count = of(launches, "route_x_kernel"), of(counted, "route_x_kernel")
    route |= {"registers": 17, "blocks_by_warps": 1, "dram_percent": 97.0}
    found = [each for each in sentences(launches, counted) if each.startswith("route_x")]
    assert found == [
        f"route_x: 17 registers, {count['registers']} counted: other code",
        f"route_x: 1 blocks on a multiprocessor, {count['resident']} counted",
        "route_x: limited by dram (97 % busy), by l2 in the count",
    ]
    # Without predictions of the card the counts are compared all the same.
    assert sentences(launches, counted, None)[:2] == found[:2]


def test_readings_of_another_architecture_or_a_dry_run_are_not_taken_for_others():
    record = {
        "op": "topk_routing",
        "case": "x-32768-e128",
        "dry_run": False,
        "card": "A100",
        "environment": {
            "device": "NVIDIA A100-SXM4-80GB",
            "versions": {"triton": "3.8.0"},
            "capability": (8, 0),
            "ncu": "2025.1.0.0",
            "commit": "0123456789abcdef",
            "dirty": False,
            "source": "one",
        },
    }
    launches, _ = measured()
    text = readings.table(record, launches)
    assert "commit 0123456789," in text and "Not counted." in text and "None." in text
    record |= {"card": "H100"}
    record["environment"]["capability"] = [9, 0]
    assert "Counted with Triton 3.8.0." in readings.table(record, launches)
    facts = record["environment"]
    assert readings.is_read(record, facts, "one", False)
    assert not readings.is_read(record, facts, "one", True)
    assert not readings.is_read(record, facts, "two", False)
    assert not readings.is_read(record, facts | {"ncu": "2026.1"}, "one", False)


def test_the_card_and_the_version_of_the_counts_are_found_by_name():
    facts = {"device": "NVIDIA H100 80GB HBM3"}
    assert readings.card_of(facts) == "H100" and readings.card_of({"device": "Tesla V100"}) is None
    assert readings.counted_with({"3.6.0": [], "3.8.0": []}, "3.6.0") == "3.6.0"
    assert readings.counted_with({"3.6.0": [], "3.8.0": []}, "3.7.1") == "3.8.0"
    assert readings.counted_with({}, "3.8.0") is None


# ---- the counts ----------------------------------------------------------------------------------


def test_the_subjects_are_counted_with_the_versions_of_triton_of_machines_with_a_gpu():
    assert {f"{row.op}/{row.case}" for row in ROWS} >= set(COUNTS) >= set(kernel_counts.ROWS)
    for versions in COUNTS.values():
        assert set(versions) >= set(kernel_counts.COUNTED_WITH)


def test_counts_of_launches_add_up_to_the_counts_of_their_row():
    """Rows whose floor is above 100 us have no gaps between launches."""
    bounds = json.loads(table.COUNTS.read_text())
    for row in kernel_counts.ROWS[:3]:
        for version, launches in COUNTS[row].items():
            for card in table.CARD_NAMES:
                for which, bound in bounds[row][version][card].items():
                    ones = [x["cards"][card] for x in launches if x["pass"] == which]
                    assert len(ones) == bound["launches"]
                    for key in ("low", "high"):
                        found = sum(x[key] for x in ones)
                        assert found == pytest.approx(bound[key], rel=0.03), (row, version, card)


# ---- the tool ------------------------------------------------------------------------------------


def test_a_dry_run_reads_a_row_resumes_and_makes_the_table_again(tmp_path, capsys, monkeypatch):
    command = ["--dry-run", "--out", str(tmp_path), ROW]
    assert readings.main(["--budget-seconds", "0", *command]) == readings.UNFINISHED
    assert f"{ROW}: left for another run" in capsys.readouterr().out
    assert readings.main(command) == 0
    printed = capsys.readouterr().out
    assert f"{ROW}: 9 launches; this ncu does not know" in printed
    assert "* route_x: wavefronts 1.40 times the count" in printed
    text = (tmp_path / "readings.md").read_text()
    assert text in printed and "### topk_routing x-32768-e128\n\nDry run, no measurement." in text
    name = "readings-topk_routing-x-32768-e128"
    record = json.loads((tmp_path / f"{name}.json").read_text())
    versions = record["environment"]["versions"]
    assert record["csv"] == f"{name}.csv" and versions["triton"] == triton.__version__
    assert record["environment"].keys() >= {"device", "commit", "dirty", "ncu", "source"}
    assert record["metrics"]["seconds"] == SECONDS and "wgmma" in record["missing"]
    assert (tmp_path / f"{name}.csv").read_text().startswith('"ID",')
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json", ".md"}
    assert readings.main(command) == 0 and f"{ROW}: read before" in capsys.readouterr().out
    # The tables follow the counts of today.
    now = copy.deepcopy(COUNTS)
    for launches in now[ROW].values():
        launches[0]["shared"] = {k: 1.4 * v for k, v in launches[0]["shared"].items()}
    monkeypatch.setattr(kernel_counts, "read", lambda: now)
    assert readings.main(["--again", "--out", str(tmp_path)]) == 0
    assert "wavefronts 1.40" not in (tmp_path / "readings.md").read_text()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", [ROW, "masked_info_nce/clip-65536"])
def test_the_profiled_step_launches_the_kernels_that_are_counted(name, capsys):
    assert readings.main(["--child", name, "--tiny"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    launched = json.loads(line.removeprefix(readings.MARK))
    ours = {count["name"] for count in COUNTS[name]["3.8.0"] if not count.get("torch")}
    # The plan of a tiny batch may take other kernels in the backward pass.
    assert ours & set(launched) >= {ROW: {"route_x_kernel", "dw_kernel"}}.get(
        name, {"sweep_kernel"}
    )


def test_a_row_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    environments, asked, text = [], [], fake_ncu.table(COUNTS[ROW]["3.8.0"][:2], [SECONDS])

    def profile(program, names, command, log, limit, environment):
        environments.append(environment)
        if command[-2] == kernel_counts.ROWS[0]:
            raise ncu.Failed("killed after 200 s")
        output = "" if command[-2] == kernel_counts.ROWS[1] else readings.MARK
        asked.append(set(names))
        return ncu.Profile(text, ncu.parse(text), {"seconds": SECONDS}, [], output)

    def failing(program, names, command, log, *_):
        log.unlink(missing_ok=True)
        raise ncu.Failed("no permission")

    monkeypatch.setenv("MMFUSED_BACKEND", "reference")
    monkeypatch.setattr(ncu, "profile", profile)
    command = ["--dry-run", "--out", str(tmp_path)]
    assert readings.main(command) == 1
    printed = capsys.readouterr().out
    assert f"{kernel_counts.ROWS[0]}: FAILED: killed after 200 s" in printed
    assert f"{kernel_counts.ROWS[1]}: FAILED: the step did not finish" in printed
    assert printed.count(": 2 launches\n") == len(kernel_counts.ROWS) - 2
    assert len(asked[0]) > 10 and asked[-1] == {"seconds"}
    assert {each["MMFUSED_TUNED"] for each in environments} == {"off"}
    assert not any("MMFUSED_BACKEND" in each for each in environments)
    # The next run reads only what is missing, and a failure is told before what is left.
    assert readings.main([*command, "--budget-seconds", "100"]) == 1 and len(environments) == 5
    monkeypatch.setattr(ncu, "profile", lambda *_: pytest.fail("read again"))
    assert readings.main([*command, *kernel_counts.ROWS[2:]]) == 0
    # Readings of older sources stay until there are new ones.
    monkeypatch.setattr(readings, "source_hash", lambda op: "newer")
    monkeypatch.setattr(ncu, "profile", failing)
    assert readings.main(command) == 1
    assert capsys.readouterr().out.count("\n### ") == 3 * (len(kernel_counts.ROWS) - 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "query_pooling/none"], "row: got 'query_pooling/none', expected some of"),
        (
            ["--dry-run", "models/fluid"],
            "row: got 'models/fluid' with --dry-run, expected one of query_pooling/fluid, ",
        ),
        (["--again"], "out: got None with --again, expected the folder of the readings"),
    ],
)
def test_invalid_arguments_end_with_a_sentence(arguments, message, capsys):
    assert readings.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_readings_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ncu, "find", lambda: "ncu")
    assert readings.main([]) == 2
    assert "readings need a CUDA GPU, but torch finds none" in capsys.readouterr().err


def test_make_gpu_reads_after_the_benches():
    for dry in (False, True):
        parts = gpu.slices(Path("out"), dry)
        names = [part.name for part in parts]
        assert all(names.index("readings") > names.index(f"bench-{op}") for op in run.OPS)
        command = parts[names.index("readings")].command
        assert ("--dry-run" in command) == dry and ("{budget}" in command) != dry
