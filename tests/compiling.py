"""Helpers for compilation tests. Child processes do not inherit SETTINGS."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmfused.cli import known
from mmfused.supported import TRITONS

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "TRITON_INTERPRET",
    "MMFUSED_BACKEND",
    "MMFUSED_ROUTER",
    "MMFUSED_CHECK",
)
ENV = {k: v for k, v in os.environ.items() if k not in SETTINGS}


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [env.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env=ENV | env | {"PYTHONPATH": path},
    )


def inspect(tmp_path: Path, arch: str, cases: tuple[str, ...], **env: str) -> list[dict]:
    table = tmp_path / "inspect.json"
    words = [word for case in cases for word in ("--case", case)]
    done = run_python(
        "-W",
        "ignore",
        "-m",
        "mmfused",
        "inspect",
        "--arch",
        arch,
        *words,
        "--json",
        str(table),
        **env,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(table.read_text())
    names = ("op", "kernel", "arch", "case")
    found = {tuple(row[name] for name in names): False for row in rows}
    found |= {tuple(row[name] for name in names): True for row in rows if row["known"]}
    spare = [entry for entry in known.entries() if not found.get(entry, True)]
    assert not spare, "not needed in mmfused/cli/known.py"
    return rows


@pytest.fixture(scope="session")
def oldest_triton(tmp_path_factory):
    """Return the folder of the oldest supported Triton, which is installed if necessary."""
    import triton

    oldest = TRITONS[0]
    if triton.__version__ == oldest:
        pytest.skip(f"Triton {oldest} is installed, so the other tests compile with it")
    if sys.platform != "linux":
        pytest.skip("Triton has wheels for Linux only")
    home = ROOT / ".venv" / f"triton-{oldest}"
    if not (home / "triton").is_dir():
        folder = tmp_path_factory.mktemp("triton")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--target",
            folder / "t",
            f"triton=={oldest}",
        ]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"pip cannot download Triton {oldest}")
        home.parent.mkdir(exist_ok=True)
        shutil.move(folder / "t", home)
    return home
