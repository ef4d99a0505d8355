"""tools/readings.py: ncu is found, asked and read; readings are compared with their counts."""

from __future__ import annotations

import copy
import json
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
import triton

from mmfused.benchmarks import run
from mmfused.library import INTERPRETED
from mmfused.tools import fake_ncu, gpu, ncu, readings, readings_table
from mmfused.tools.bounds import kernel_counts, table
from mmfused.tools.bounds.cards import CARDS
from mmfused.tools.targets import ROWS

ROOT = Path(__file__).resolve().parents[1]
COUNTS = kernel_counts.read()
ROW = "topk_routing/x-32768-e128"
SECONDS, REGISTERS = "gpu__time_duration.sum", "launch__registers_per_thread"


# ---- what ncu writes -----------------------------------------------------------------------------

HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream",'
HEAD += '"Block Size","Grid Size","Device","CC"'
BLANK = ",".join(['""'] * 11)


def row(number: int, name: str, block: str, grid: str, *values: str) -> str:
    cells = (str(number), "108", "python3", "127.0.0.1", name, "1", "7", block, grid, "0", "9.0")
    return ",".join(f'"{cell}"' for cell in (*cells, *values))


SWEEP = ("sweep_kernel", "(256, 1, 1)", "(64, 2, 2)")
OTHER = ("void at::native::f<4, at::native::G<float>>(int, T2)", "(128, 1, 1)", "(3, 1, 1)")
# The tables of several versions: base units and scaled ones, between other output and alone.
BASE = f"""==PROF== Connected to process 108 (/usr/bin/python3.12)
==PROF== Profiling "sweep_kernel" - 0: 0%....50%....100% - 7 passes
{HEAD},"dram__bytes_read.sum","{SECONDS}","{REGISTERS}"
{BLANK},"byte","ns","register/thread"
{row(0, *SWEEP, "10,240,000", "12,512", "168")}
{row(1, *OTHER, "n/a", "992", "16")}
==PROF== Disconnected from process 108
"""
SCALED = f"""{HEAD},"dram__bytes_read.sum","{SECONDS}","{REGISTERS}"
{BLANK},"Mbyte","usecond","register/thread"
{row(0, *SWEEP, "10.24", "12.512", "168")}
{row(1, *OTHER, "", "0.992", "16")}
"""
# A decimal comma, and metrics in another order.
COMMAS = f"""{HEAD},"{SECONDS}","{REGISTERS}","dram__bytes_read.sum"
{BLANK},"us","","byte"
{row(0, *SWEEP, "12,5120", "168", "10.240.000")}
{row(1, *OTHER, "0,992000", "16", "nan")}
"""


@pytest.mark.parametrize("text", [BASE, SCALED, COMMAS])
def test_tables_of_ncu_are_read_in_base_units(text):
    first, second = ncu.parse(text)
    assert (first.name, first.blocks, first.threads) == ("sweep_kernel", 256, 256)
    assert first.values[SECONDS] == pytest.approx(12.512e-6)
    assert first.values["dram__bytes_read.sum"] == pytest.approx(10.24e6)
    assert first.values[REGISTERS] == 168
    assert (second.name, second.blocks) == ("f", 3)
    assert second.values["dram__bytes_read.sum"] is None
    assert second.values[SECONDS] == pytest.approx(992e-9)


def test_output_without_a_table_has_no_launches():
    assert ncu.parse("==PROF== Connected\n==WARNING== No kernels were profiled.\n") == []
    assert ncu.parse(f"{HEAD},{SECONDS!r}\n") == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("53,261,312", 53261312),
        ("4.0e-05", 4e-5),
        ("1,024", 1024),
        ("1,234,567.5", 1234567.5),
        ("97.03", 97.03),
        ("117.344", 117.344),
        ("65,77", 65.77),
        ("27.595.520", 27595520),
        ("12 (4; 4; 4)", 12),
        ("-3", -3),
        ("inf", None),
        ("n/a", None),
        ("", None),
    ],
)
def test_numbers_are_read_with_separators_of_thousands(text, value):
    assert ncu.number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("unit", "scale"),
    [
        ("", 1),
        ("%", 1),
        ("inst", 1),
        ("sector", 1),
        ("second", 1),
        ("ms", 1e-3),
        ("usecond", 1e-6),
        ("ns", 1e-9),
        ("nsecond", 1e-9),
        ("byte", 1),
        ("Kbyte/block", 1e3),
        ("Gbyte/second", 1e9),
        ("hz", 1),
        ("Mhz", 1e6),
        ("Ghz", 1e9),
        ("cycle/nsecond", 1e9),
        ("cycle/second", 1),
        ("register/thread", 1),
    ],
)
def test_units_are_scaled_to_base_units(unit, scale):
    assert ncu.scale(unit) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("sweep_kernel", "sweep_kernel"),
        ("saxpy(int, float, float *)", "saxpy"),
        ("void at::native::elementwise_kernel<4, F<a::b>>(int)", "elementwise_kernel"),
        ("void mmfused::(anonymous namespace)::route_kernel<4>(int)", "route_kernel"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_NNT", "nvjet_hsh_128x256_64x4_2x1_v_bz_NNT"),
    ],
)
def test_kernels_are_named_without_namespaces_and_arguments(kernel, name):
    assert ncu.short_name(kernel) == name


# ---- the program ---------------------------------------------------------------------------------


def program(folder: Path, text: str = "") -> Path:
    """Write a program called ncu."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ncu"
    path.write_text(f"#!{sys.executable}\nimport sys, time\nwords = sys.argv[1:]\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_ncu_is_found_on_path_in_cuda_home_and_where_nsight_compute_is_installed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(ncu, "USUAL_CUDA", str(tmp_path / "usual"))
    monkeypatch.setattr(ncu, "USUAL_NSIGHT", str(tmp_path / "nsight" / "*"))
    assert readings.main([]) == 2
    message = capsys.readouterr().err
    assert "ncu is neither on PATH nor in CUDA_HOME/bin" in message and message.count("\n") == 1
    # The newest installation counts, but any of the earlier places is preferred.
    for folder in ("nsight/2024.3.2", "nsight/2025.10.1", "usual/bin", "cuda/bin", "path"):
        path = program(tmp_path / folder)
        assert ncu.find() == str(path)
    program(tmp_path / "nsight" / "2025.9.0")
    (tmp_path / "path" / "ncu").unlink()
    (tmp_path / "cuda" / "bin" / "ncu").unlink()
    (tmp_path / "usual" / "bin" / "ncu").unlink()
    assert ncu.find() == str(tmp_path / "nsight" / "2025.10.1" / "ncu")


LISTS = """
if "--version" in words:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2024.3.2.0 (build 34861637)")
elif "launch" in words:
    print("launch__registers_per_thread   Counter   register/thread   Registers per thread")
elif "source" in words:
    sys.exit("==ERROR== unrecognised option '--query-metrics-collection'")
else:
    print("Device NVIDIA H100\\n-----")
    print("dram__bytes_op_read          Counter         byte   # of bytes read from DRAM")
    print("gpu__time_duration           Counter         ns     with l2__other in its text")
"""


def test_ncu_is_asked_which_metrics_it_knows(tmp_path):
    asked = [str(program(tmp_path, LISTS))]
    assert ncu.version(asked) == "2024.3.2.0"
    names = ncu.known(asked)
    assert names == {"launch__registers_per_thread", "dram__bytes_op_read", "gpu__time_duration"}
    # Another name is used where the first one is unknown; the rest is not asked for.
    assert ncu.chosen(names) == {
        "seconds": "gpu__time_duration.sum",
        "dram_read": "dram__bytes_op_read.sum",
        "registers": "launch__registers_per_thread",
    }
    # A version that lists no metrics of a launch may know them all the same.
    chosen = ncu.chosen({"gpu__time_duration"})
    assert chosen["waves"] == "launch__waves_per_multiprocessor" and "wavefronts" not in chosen
    assert ncu.chosen(set()) == {key: names[0] for key, names in ncu.METRICS.items()}


REFUSES = """
log = words[words.index("--log-file") + 1]
metrics = words[words.index("--metrics") + 1].split(",")
open({calls!r}, "a").write(" ".join(words) + "\\n")
for name in ("dram__bytes_read", "smsp__inst_issued"):
    if name + ".sum" in metrics:
        print("==ERROR== Failed to find metric regex:^" + name + "\\\\.(sum|avg)$")
        sys.exit(1)
print("launched null")
open(log, "w").write({table!r})
"""


def test_metrics_that_ncu_refuses_do_not_lose_the_others(tmp_path):
    calls = tmp_path / "calls"
    path = program(tmp_path / "bin", REFUSES.format(calls=str(calls), table=BASE))
    names = {
        "seconds": SECONDS,
        "instructions": "smsp__inst_issued.sum",
        "dram_read": "dram__bytes_read.sum",
    }
    found = ncu.profile([str(path)], names, ["step", "it"], tmp_path / "log.csv", 30)
    assert found.names == {"seconds": SECONDS, "dram_read": "dram__bytes_op_read.sum"}
    assert "instructions" in found.missing and "dram_read" not in found.missing
    assert len(found.launches) == 2 and found.output == "launched null\n"
    first, *_, last = calls.read_text().splitlines()
    assert last.endswith(" step it") and len(calls.read_text().splitlines()) == 3
    for words in (
        "--csv --page raw --print-units base",
        "--profile-from-start off",
        "--clock-control none",
        f"--metrics {','.join(names.values())}",
    ):
        assert words in first


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("print('==ERROR== ERR_NVGPUCTRPERM - no permission'); sys.exit(1)", "run as root"),
        ("print('==WARNING== No kernels were profiled.')", "code 0: No kernels were profiled"),
        ("print('Traceback:\\nOutOfMemoryError: much')\nsys.exit(3)", "code 3: OutOfMemoryError"),
        ("import os; os.system('sleep 60')", "killed after 1 s"),
    ],
)
def test_a_run_without_launches_says_why(tmp_path, text, why):
    path, begun = program(tmp_path, text), time.monotonic()
    with pytest.raises(ncu.Failed, match=why):
        ncu.profile([str(path)], {"seconds": SECONDS}, ["step"], tmp_path / "log.csv", 1)
    assert time.monotonic() - begun < 20


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


def test_the_record_says_what_was_read_with_what(tmp_path):
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
    def profile(program, names, command, log, *_):
        if command[-2] == kernel_counts.ROWS[0]:
            raise ncu.Failed("killed after 200 s")
        log.write_text(BASE)
        return ncu.Profile(ncu.parse(BASE), {"seconds": SECONDS}, [], readings.MARK)

    monkeypatch.setattr(ncu, "profile", profile)
    assert readings.main(["--dry-run", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{kernel_counts.ROWS[0]}: FAILED: killed after 200 s" in printed
    assert printed.count(": 2 launches\n") == len(kernel_counts.ROWS) - 1
    # The next run reads only what is missing.
    monkeypatch.setattr(ncu, "profile", lambda *_: pytest.fail("read again"))
    assert readings.main(["--dry-run", "--out", str(tmp_path), kernel_counts.ROWS[1]]) == 0


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


def test_every_metric_is_of_a_unit_that_ncu_has():
    for names in ncu.METRICS.values():
        for name in names:
            assert name.startswith(
                ("gpu__", "smsp__", "sm__", "l1tex__", "lts__", "dram__", "launch__")
            )
    assert {CARDS[name].arch for name in table.CARD_NAMES} == {90}
