"""Tests of ``pytest --ptx``: what skips a test, and what fails one."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.build import compiler

TESTS = Path(__file__).parent


def markers():
    """Yield file, line and arguments of each use of ``pytest.mark.not_on_ptx``."""
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        called = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "not_on_ptx":
                call = called.get(node)
                yield f"{path.name}:{node.lineno}", call.args if call else []


def test_at_most_20_tests_are_skipped_on_ptx_each_for_a_reason():
    found = dict(markers())
    assert len(found) <= 20
    for place, args in found.items():
        assert len(args) == 1 and isinstance(args[0], ast.Constant) and args[0].value, place


def test_not_on_ptx_marks_single_tests():
    """A marked class or module would hide how many tests are skipped."""
    for path in sorted(TESTS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.Assign):
                text = ast.unparse(getattr(node, "value", None) or ast.Tuple(node.decorator_list))
                assert "mark.not_on_ptx" not in text, f"{path.name}:{node.lineno}"


@pytest.fixture(scope="module", params=["80", "90"])
def output(request):
    """Return the output of the cases, run with --ptx."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider"]
    command += ["--ptx", request.param, TESTS / "ptx_driver_cases.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"sm_{request.param}, adversarial schedules: 15 launches" in done.stdout, done.stdout
    return done.stdout


def test_cases_pass_but_the_faulty_ones(output):
    failed = re.findall(r"^FAILED \S+::(\w+)", output, re.MULTILINE)
    assert failed == ["test_faulty_results_differ", "test_faulty_view_is_left"], output
    assert "2 failed, 14 passed, 1 skipped" in output and "not on PTX: its reason" in output


def test_reports_name_kernel_element_and_values(output):
    differ = r"last_kernel: results differ: out_ptr\[0\] \(torch.int32\) is 7 in order and [0-6] "
    assert re.search(differ, output), output
    assert re.search(
        r"scale_kernel: out of bounds: tests/ptx_driver_cases.py:22 .* side.x\+0xf0", output
    )
