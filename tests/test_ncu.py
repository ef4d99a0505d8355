"""tools/ncu.py finds ncu, asks it which metrics it knows, and reads the tables of its versions."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path

import pytest

from mmfused.tools import ncu, readings

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


def test_a_table_without_units_is_read_as_it_is():
    lines = BASE.splitlines()
    (launch, _) = ncu.parse("\n".join(line for line in lines if line != lines[3]))
    assert launch.values[SECONDS] == 12512


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
elif "occupancy" in words:
    print("launch__occupancy_limit_warps  Counter   block   Occupancy limit due to warps")
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
    launch = {"launch__registers_per_thread", "launch__occupancy_limit_warps"}
    assert names == launch | {"dram__bytes_op_read", "gpu__time_duration"}
    # Another name is used where the first one is unknown; the rest is not asked for.
    assert ncu.chosen(names) == {
        "seconds": "gpu__time_duration.sum",
        "dram_read": "dram__bytes_op_read.sum",
        "registers": "launch__registers_per_thread",
        "blocks_by_warps": "launch__occupancy_limit_warps",
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
    # The table is kept without the lines that have paths of the machine.
    assert found.table.splitlines() == BASE.splitlines()[2:6]
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


def test_every_metric_is_of_a_unit_that_ncu_has():
    for names in ncu.METRICS.values():
        for name in names:
            assert name.startswith(
                ("gpu__", "smsp__", "sm__", "l1tex__", "lts__", "dram__", "launch__")
            )
