"""tools/sanitize.py launches every kernel and evaluates the output of compute-sanitizer."""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from mmfused.benchmarks import report
from mmfused.cli.compiling import recorded_launches
from mmfused.kernels import tiles
from mmfused.library import INTERPRETED, KERNELS_ON_CPU
from mmfused.tools import sanitize, sanitize_launches

ROOT = Path(__file__).resolve().parents[1]
LAUNCHED = 'launched {"device": "some GPU", "launches": {"forward.sweep_kernel": 3}}'
RACE = """\
========= Error: Race reported between Write access at rows_kernel+0x2d0 in rows.py:168
=========     and Read access at rows_kernel+0x3f0 in rows.py:172 [32 hazards]
=========
========= Warning: Race reported between Write access at rows_kernel+0x10 in rows.py:1
=========     and Write access at rows_kernel+0x20 in rows.py:1 [2 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
OUT_OF_BOUNDS = """\
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x1f0 in somewhere.py:12
=========     by thread (1,0,0) in block (0,0,0)
=========     Access to 0x7f0000000204 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a fake compute-sanitizer on PATH, and return a function that sets the output of a run.

    By default, the run "control" reports its deliberate error, and other runs report no errors.
    """
    folder, answers = tmp_path / "bin", tmp_path / "answers"
    folder.mkdir()
    answers.mkdir()
    program = folder / "compute-sanitizer"
    program.write_text(f"""#!{sys.executable}
import json, os, pathlib, sys, time
op, tool = sys.argv[-1], sys.argv[sys.argv.index("--tool") + 1]
assert sys.argv[-2] == "--launch" and os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
with open({str(tmp_path / "calls")!r}, "a") as calls:
    print(op, tool, file=calls)
answer = pathlib.Path({str(answers)!r}) / f"{{op}}-{{tool}}"
text, code, seconds = "========= ERROR SUMMARY: 0 errors", 0, 0
if answer.exists():
    text, code, seconds = json.loads(answer.read_text())
print("========= COMPUTE-SANITIZER")
if code in (0, 86):
    print({LAUNCHED!r})
print(text, flush=True)
if seconds:
    os.system(f"sleep {{seconds}}")
sys.exit(code)
""")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def answer(op, tool, text, code=0, seconds=0):
        (answers / f"{op}-{tool}").write_text(json.dumps([text, code, seconds]))

    answer("control", "memcheck", OUT_OF_BOUNDS.format(kernel="control_kernel"), 86)
    return answer


def calls(tmp_path) -> list[str]:
    """Return the runs since the last call of this function, sorted by name."""
    file = tmp_path / "calls"
    rows = sorted(file.read_text().splitlines()) if file.exists() else []
    file.unlink(missing_ok=True)
    return rows


def sanitized(tmp_path, *words) -> tuple[int, dict]:
    code = sanitize.main([*words, "--out", str(tmp_path / "out")])
    return code, json.loads((tmp_path / "out" / "sanitize.json").read_text())


# ---- the launches --------------------------------------------------------------------------------


# An op that launches each kernel of kernels/tiles.py.
SHARED = {"query_pooling": {"tiles.pack_mask_kernel"}, "grouped_mlp": {"tiles.tile_map_kernel"}}


@pytest.mark.skipif(
    not KERNELS_ON_CPU,
    reason="needs kernels that run on a CPU",
)
@pytest.mark.parametrize("op", sanitize.OPS)
def test_launches_reach_every_kernel(op):
    """The launches reach every kernel of ``mmfused inspect`` and every kernel in the sources."""
    wanted = inspected(op, f"sm_{tiles.pretended_arch or 90}")
    if INTERPRETED:  # the interpreter has no Gluon
        wanted = {name for name in wanted if ".hopper_" not in name}
    missing_here = inspected(op, "sm_90") - wanted  # plans of another architecture launch them
    reached = set(sanitize_launches.launch(op))
    assert reached >= wanted, wanted - reached
    own = defined((ROOT / "kernels" / op).rglob("*.py")) | SHARED.get(op, set())
    assert reached >= own - missing_here, own - missing_here - reached


def test_every_op_and_shared_kernel_has_an_owner():
    assert {job.op for job in recorded_launches("sm_90")} == {*sanitize.OPS}
    assert set().union(*SHARED.values()) == defined((ROOT / "kernels").glob("*.py"))


def inspected(op, arch):
    """Return "module.kernel" of the kernels that ``mmfused inspect`` compiles for ``arch``."""
    return {
        f"{job.module.removeprefix('mmfused.kernels.')}.{job.kernel}"
        for job in recorded_launches(arch)
        if job.op == op
    }


def defined(paths):
    """Return "module.kernel" of the kernels in source files."""
    return {
        f"{path.relative_to(ROOT / 'kernels').with_suffix('').as_posix().replace('/', '.')}.{name}"
        for path in paths
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }


def test_launch_prints_one_line_of_json_at_the_end(monkeypatch, capsys):
    """The line shows that the run has finished."""
    done = Counter({"forward.sweep_kernel": 2})
    monkeypatch.setattr(sanitize_launches, "launch", lambda op: done)
    assert sanitize.main(["--launch", "grouped_mlp"]) == 0
    printed = json.loads(capsys.readouterr().out.removeprefix(sanitize.MARK))
    assert printed["launches"] == done and printed["device"] == report.device_name(
        torch.device(sanitize_launches.DEVICE)
    )
    monkeypatch.undo()
    assert sanitize.main(["--launch", "nothing"]) == 2
    assert "launch: got 'nothing', expected one of query_pooling" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error occurs only without a GPU")
def test_launching_needs_a_gpu_or_the_interpreter():
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        ROOT / "tools" / "sanitize.py",
        "--launch",
        "grouped_mlp",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 2 and "needs a CUDA GPU, or TRITON_INTERPRET=1" in done.stderr


# ---- results -------------------------------------------------------------------------------------


def test_a_green_run_is_not_repeated_until_the_source_changes(fake, tmp_path, monkeypatch, capsys):
    words = ("grouped_mlp", "query_pooling", "--tool", "memcheck", "--tool", "racecheck")
    code, found = sanitized(tmp_path, *words)
    assert code == 0 and {result["verdict"] for result in found.values()} == {"green"}
    expected = [
        "control memcheck",
        *[f"{op} {tool}" for tool in ("memcheck", "racecheck") for op in words[:2]],
    ]
    assert calls(tmp_path) == sorted(expected) == sorted(found)
    assert found["grouped_mlp memcheck"]["launches"] == {"forward.sweep_kernel": 3}
    assert found["grouped_mlp memcheck"]["device"] == "some GPU"
    assert not list((tmp_path / "out").glob("*.log"))

    assert sanitized(tmp_path, *words) == (0, found) and calls(tmp_path) == []
    assert "green already" in capsys.readouterr().out
    assert sanitized(tmp_path, *words, "--tool", "synccheck")[0] == 0
    assert calls(tmp_path) == ["grouped_mlp synccheck", "query_pooling synccheck"]
    monkeypatch.setattr(sanitize, "source_hash", lambda op: "0123456789abcdef")
    # The control, a kernel with a deliberate error, is not repeated.
    assert sanitized(tmp_path, *words)[0] == 0 and calls(tmp_path) == sorted(expected[1:])


def test_runs_with_errors_fail_and_are_repeated(fake, tmp_path, capsys):
    fake("masked_info_nce", "memcheck", OUT_OF_BOUNDS.format(kernel="sweep_kernel"), 86)
    fake("grouped_mlp", "racecheck", RACE, 86)
    words = ("masked_info_nce", "grouped_mlp", "--tool", "memcheck", "--tool", "racecheck")
    code, found = sanitized(tmp_path, *words)
    assert code == 1
    verdicts = {
        key: (result["verdict"], result["errors"], result["warnings"])
        for key, result in found.items()
    }
    assert verdicts["masked_info_nce memcheck"] == ("errors", 1, 0) and verdicts[
        "grouped_mlp racecheck"
    ] == ("errors", 1, 1)
    assert verdicts["grouped_mlp memcheck"] == ("green", 0, 0)
    assert found["masked_info_nce memcheck"]["reports"][0].startswith(
        "Invalid __global__ write of size 4 bytes\nat sweep_kernel"
    )
    assert (
        "Invalid __global__ write"
        in (tmp_path / "out" / "sanitize-masked_info_nce-memcheck.log").read_text()
    )
    assert "5 runs, 2 not green" in capsys.readouterr().out
    calls(tmp_path)
    assert sanitized(tmp_path, *words)[0] == 1
    assert calls(tmp_path) == ["grouped_mlp racecheck", "masked_info_nce memcheck"]


def test_errors_in_kernels_of_others_are_counted_but_do_not_fail_a_run(fake, tmp_path):
    fake(
        "grouped_mlp",
        "initcheck",
        OUT_OF_BOUNDS.format(kernel="void at::native::unrolled_elementwise_kernel<int>"),
        86,
    )
    fake(
        "topk_routing",
        "initcheck",
        OUT_OF_BOUNDS.format(kernel="void mmfused::(anonymous namespace)::route_kernel<4>(int)"),
        86,
    )
    code, found = sanitized(tmp_path, "grouped_mlp", "topk_routing", "--tool", "initcheck")
    results = [
        (found[f"{op} initcheck"]["verdict"], found[f"{op} initcheck"]["elsewhere"])
        for op in ("grouped_mlp", "topk_routing")
    ]
    assert code == 1 and results == [("green", 1), ("errors", 0)]


def test_a_run_that_hangs_is_terminated(fake, tmp_path):
    fake("query_pooling", "memcheck", "busy", seconds=60)
    start = time.monotonic()
    code, found = sanitized(tmp_path, "query_pooling", "--tool", "memcheck", "--limit-seconds", "2")
    assert code == 1 and time.monotonic() - start < 30
    result = found["query_pooling memcheck"]
    assert result["verdict"] == "hung" and result["note"] == "killed after 2 s"


@pytest.mark.skipif(
    not Path("/proc/self").exists(),
    reason="the test finds processes in /proc",
)
def test_terminating_the_program_terminates_its_runs(fake, tmp_path):
    fake("query_pooling", "memcheck", "busy", seconds=61)
    command = [
        sys.executable,
        ROOT / "tools" / "sanitize.py",
        "query_pooling",
        "--tool",
        "memcheck",
        "--out",
        tmp_path / "out",
    ]
    log = tmp_path / "out" / "sanitize-query_pooling-memcheck.log"
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (log.exists() and "busy" in log.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        # Between its fork and its exec, a child of the run has the run's command line.
        while len(children := running(tmp_path, b"query_pooling")) != 1:
            assert time.monotonic() < until
            time.sleep(0.1)
        (child,) = children
    finally:
        program.terminate()
    assert program.wait(30) == 143
    until = time.monotonic() + 10
    while (
        child.exists()
        and "Z" not in (child / "stat").read_text().split()[2]
        and time.monotonic() < until
    ):
        time.sleep(0.1)
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]


def running(tmp_path: Path, op: bytes) -> list[Path]:
    """Return the folders in /proc of the runs of an op."""
    paths = Path("/proc").glob("[0-9]*/cmdline")
    return [path.parent for path in paths if is_run(path, tmp_path, op)]


def is_run(path: Path, tmp_path: Path, op: bytes) -> bool:
    with contextlib.suppress(OSError):
        words = path.read_bytes().split(b"\0")
        return bytes(tmp_path / "bin" / "compute-sanitizer") in words and op in words
    return False


@pytest.mark.parametrize(
    "op, text, code, note",
    [
        (
            "query_pooling",
            "========= Error: Target application terminated before first instrumented API call",
            0,
            "printed no summary",
        ),
        (
            "query_pooling",
            "RuntimeError: no kernel image\n========= ERROR SUMMARY: 0 errors",
            1,
            "did not finish, exit code 1",
        ),
        ("control", "========= ERROR SUMMARY: 0 errors", 0, "other faults may be missed"),
    ],
)
def test_a_run_without_a_valid_result_fails(fake, tmp_path, op, text, code, note):
    fake(op, "memcheck", text, code)
    status, found = sanitized(tmp_path, "query_pooling", "--tool", "memcheck")
    result = found[f"{op} memcheck"]
    assert status == 1 and result["verdict"] == "failed" and note in result["note"]


def test_invalid_requests_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(sanitize, "USUAL_CUDA", str(tmp_path))
    for words, sentence in (
        ([], "compute-sanitizer is neither on PATH nor in CUDA_HOME"),
        (["pooling"], "op: got 'pooling', expected some of query_pooling"),
        (["--tool", "leaks"], "tool: got 'leaks', expected some of memcheck"),
        (["--jobs", "0"], "jobs: got 0, expected at least 1"),
    ):
        assert sanitize.main(words) == 2
        assert sentence in capsys.readouterr().err
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert sanitize.find_sanitizer() == str(program)
