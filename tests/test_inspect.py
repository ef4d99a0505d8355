"""Tests of ``mmfused inspect`` without a GPU, and of the committed compile matrix."""

import argparse
import json

import pytest
from compiling import ROOT, run_python

from mmfused.cli import bound
from mmfused.cli.compiling import recorded_launches
from mmfused.kernels.tiles import SHARED_MEMORY
from mmfused.ops import OPS
from mmfused.supported import ARCHS, TRITONS

COMMAND = ("-W", "ignore", "-m", "mmfused", "inspect", "--arch", "sm_80", "--case", "logits 5")


def test_every_launch_sets_enable_fp_fusion():
    for job in recorded_launches("sm_90"):
        assert job.options["enable_fp_fusion"] is True, job.kernel


def test_second_inspection_reads_the_cache_and_compiles_damaged_results_again(tmp_path):
    env = {
        "MMFUSED_INSPECT_CACHE": str(tmp_path / "store"),
        "TRITON_CACHE_DIR": str(tmp_path / "users"),
    }
    first = run_python(*COMMAND, "--sass", **env)
    results = sorted((tmp_path / "store").iterdir())
    assert first.returncode == 0 and len(results) == 4, first.stderr
    assert first.stdout.count("  rest: ") == 4  # a line of machine code for each launch
    assert not (tmp_path / "users").exists()  # Triton's own cache is not used
    original = json.loads(results[0].read_text())
    results[0].write_text(json.dumps({**original, "registers": 77}))
    second = run_python(*COMMAND, "--sass", **env)
    assert " 77 " in second.stdout  # read from the cache, not measured
    results[0].write_text("{")
    third = run_python(*COMMAND, "--sass", **env)
    message = f"{results[0]} is damaged, so its launch is compiled again."
    assert sorted(third.stdout.splitlines()) == sorted([*first.stdout.splitlines(), message])
    assert json.loads(results[0].read_text()) == original


def test_unreadable_binary_gives_a_one_line_error(tmp_path):
    code = f"""
import pathlib, sys
import triton
from mmfused.cli import inspect, main
real = triton.compile
def damaged(*args, **kwargs):
    compiled = real(*args, **kwargs)
    compiled.asm["cubin"] = compiled.asm["cubin"][:100]
    return compiled
triton.compile = damaged
sys.exit(main({COMMAND[4:]!r}))
"""
    done = run_python("-W", "ignore", "-c", code, MMFUSED_INSPECT_CACHE=str(tmp_path))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "cuobjdump cannot read the 100 bytes" in done.stderr
    assert "may be damaged" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unknown_architecture_is_rejected():
    done = run_python("-W", "ignore", "-m", "mmfused", "inspect", "--arch", "sm_99")
    assert done.returncode == 2 and "--arch: got 'sm_99', expected one of sm_80" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": ["sm_80"]}, r"--arch: got \['sm_80'\], expected no --bound"),
        ({"sass": True}, "--sass: got True, expected no --bound"),
        ({"card": ["B200"]}, "--card: got 'B200', expected some of H100, H200, A100"),
        ({"card": ["A100", "H100"]}, "expected cards of one architecture"),
        (
            {"op": "topk_routing", "case": ["fluid"]},
            "--case: got .*, expected some of logits-16384",
        ),
    ],
)
def test_options_that_cannot_be_counted_are_rejected(options: dict, message: str):
    given = dict.fromkeys(("op", "case", "card", "arch", "sass", "json")) | options
    with pytest.raises(ValueError, match=message):
        bound.run(argparse.Namespace(**given))


def test_supported_versions_are_sorted_and_architectures_known():
    by_number = sorted(TRITONS, key=lambda version: [int(part) for part in version.split(".")])
    assert by_number == list(TRITONS)
    assert {int(arch.removeprefix("sm_")) for arch in ARCHS} <= set(SHARED_MEMORY)


def test_committed_compile_matrix_is_complete_and_has_no_fault():
    lines = (ROOT / "benchmarks" / "results" / "compile_matrix.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert cells[0] == ["op", "Triton", *ARCHS, "faults", "at commit"]
    assert {(op, version) for op, version, *_ in cells[2:]} == {
        (op, version) for op in OPS for version in TRITONS
    }
    for op, version, *compiled, faults, _ in cells[2:]:
        numbers = [int(cell.split(",")[0]) for cell in compiled]
        assert min(numbers) > 0 and faults == "0", (op, version)
