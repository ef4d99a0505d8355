"""All public symbols have types, and type checkers find the mistakes in user code."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USER_CODE = Path(__file__).with_name("user_code.py")
MARKED = {
    number
    for number, line in enumerate(USER_CODE.read_text(encoding="utf-8").splitlines(), 1)
    if line.endswith("# error")
}


def skip_without(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def test_public_symbols_have_types():
    skip_without("pyright")
    command = [sys.executable, ROOT / "tools" / "check_types.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_reports_exactly_the_marked_lines_of_user_code():
    skip_without("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, USER_CODE], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = {
        entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"
    }
    assert errors == MARKED, found


def test_mypy_reports_exactly_the_marked_lines_of_user_code(tmp_path):
    skip_without("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", USER_CODE]
    command += ["--cache-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"user_code\.py:(\d+): error: (.*)", done.stdout)
    assert {int(line) for line, _ in found} == MARKED, done.stdout
