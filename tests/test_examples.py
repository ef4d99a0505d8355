"""Each script in examples/ runs on a CPU, and the losses that it compares are equal."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("[!_]*.py"))
ROW = re.compile(r"^ *\d+(?: +\d+\.\d+){2,}$", re.MULTILINE)  # a step and at least two losses


def packages(script):
    """Return the top-level packages that a script imports."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def environment():
    """Return the environment of a user without a GPU and without a network."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def test_there_are_examples():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_shows_equal_losses(script, tmp_path):
    for name in sorted(packages(script)):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest relative difference is" in done.stdout
    assert not re.search(r"\bnan\b", done.stdout)
    assert len(ROW.findall(done.stdout)) >= 5, done.stdout
    assert not list(tmp_path.iterdir())  # nothing is left in the user's folder


def test_every_example_is_in_the_documentation():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert [script.name for script in SCRIPTS if script.name not in page] == []
