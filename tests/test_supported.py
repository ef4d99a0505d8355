"""The table of tested versions, its page, pyproject.toml and the workflow agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfused.supported import ARCHS, TESTED, TRITONS

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = [name for name in TESTED if name != "python"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.mark.parametrize("name", TESTED)
def test_oldest_is_not_newer_than_newest(name):
    oldest, newest = TESTED[name]
    assert numbers(oldest) <= numbers(newest)


@pytest.mark.parametrize("name", PACKAGES)
def test_each_lower_bound_in_pyproject_is_the_oldest_version(name):
    dependencies = PYPROJECT[PYPROJECT.index("\ndependencies = [") :]
    requirements = re.findall(rf'^ *"{name}(?![\w-])([^"]*)"', dependencies, re.MULTILINE)
    bounds = {re.match(r">=([\d.]+)", text) for text in requirements}
    assert bounds and None not in bounds, f"{name} stands without a lower bound"
    for bound in bounds:
        assert (*numbers(bound[1]), 0, 0)[:3] == numbers(TESTED[name][0])


def test_python_versions_of_the_metadata_are_the_tested_range():
    oldest, newest = TESTED["python"]
    assert f'requires-python = ">={oldest}"' in PYPROJECT
    listed = re.findall(r"Programming Language :: Python :: 3\.(\d+)", PYPROJECT)
    minor = range(numbers(oldest)[1], numbers(newest)[1] + 1)
    assert [int(text) for text in listed] == [*minor]
    assert f'target-version = "py{oldest.replace(".", "")}"' in PYPROJECT
    assert f'pythonVersion = "{oldest}"' in PYPROJECT


def test_tested_tritons_are_among_the_compiled_ones():
    assert TESTED["triton"][0] == TRITONS[0] and TESTED["triton"][1] in TRITONS


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "supported-versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {name.lower(): tuple(ends) for name, *ends in rows} == TESTED
    assert all(name in page for name in (*TRITONS, *ARCHS))


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_pins_are_one_end_of_the_table(end):
    command = [sys.executable, ROOT / "tools" / "pins.py", end]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    column = ("oldest", "newest").index(end)
    assert lines[0] == f"# Python {TESTED['python'][column]}"
    assert lines[1:-1] == [f"{name}=={TESTED[name][column]}" for name in PACKAGES]


def test_the_workflow_runs_both_ends():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    runs = jobs["test"]["strategy"]["matrix"]["include"]
    oldest, newest = TESTED["python"]
    assert runs == [
        {"versions": "oldest", "python": oldest},
        {"versions": "newest", "python": newest},
    ]
    steps = "\n".join(step.get("run", "") for step in jobs["test"]["steps"])
    assert 'tools/pins.py "$VERSIONS" | tee pins.txt' in steps
    assert '--constraint pins.txt --editable ".[dev]"' in steps and "make test" in steps
