"""Identify the sources of a result: by commit where there is one, and by a hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from mmfused.ops import OPS

ROOT = Path(__file__).resolve().parents[1]  # the checkout, or the installed package
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
# Folders whose sources neither compute nor time an op.
UNUSED = {"tests", "tools", "cli", "data", "fuse", "training"}


def source_facts() -> dict[str, Any]:
    """Return the checkout's commit, and whether any file other than results differs from it.

    A copy without .git reports the commit in MMFUSED_COMMIT, if set; the hash can confirm it.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if not (ROOT / ".git").exists():
        return {"commit": os.environ.get("MMFUSED_COMMIT"), "dirty": None}
    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def source_hash(op: str | None = None) -> str:
    """Hash the sources that decide what ``op`` computes and how it is timed.

    None: all sources, tests included.
    """
    found = hashlib.sha256()
    for path in sorted(path for path in ROOT.rglob("*.*") if path.suffix in SUFFIXES):
        name = path.relative_to(ROOT)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (op is None or serves(name, op)):
            found.update(f"{name.as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def serves(name: Path, op: str) -> bool:
    """Return whether a result of ``op``, an op or "models", may depend on this source file.

    It depends on the sources of the op and of the ops that it calls, on its benchmark, and on the
    files that all ops share.
    """
    folders, stem = set(name.parts), name.stem
    used = tuple(OPS) if op == "models" else (op, *OPS[op])
    if folders & UNUSED or stem == "inspect_cases":
        return False
    if "models" in folders:
        return op == "models"
    if "benchmarks" in folders:
        shared = ("measure", "footprint", "run")
        if op == "models":
            shared += ("model_steps", "torch_modules", "torch_functions")
        return stem in shared or stem.startswith((op, *used))
    owners = [each for each in OPS if each in folders or stem.startswith(each)]
    return not owners or owners[0] in used
