"""Identify the sources that a result was measured with, by their commit and by a hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from mmfused.ops import OPS

ROOT = Path(__file__).resolve().parents[1]  # the checkout, or the installed package
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
# Folders with sources that do not affect the results of an op.
UNUSED = {"tests", "tools", "cli", "data", "fuse", "training", "tuning", "warmup"}


def source_facts() -> dict[str, Any]:
    """Return the commit, and whether any file outside benchmarks/results differs from it.

    In a copy without .git, the commit is the value of MMFUSED_COMMIT or None.
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
    """Return a hash of the sources that affect results of ``op``, or of all sources if None."""
    digest = hashlib.sha256()
    for path in sorted(path for path in ROOT.rglob("*.*") if path.suffix in SUFFIXES):
        name = path.relative_to(ROOT)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (op is None or affects(name, op)):
            digest.update(f"{name.as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def affects(name: Path, op: str) -> bool:
    """Return whether the source file ``name`` affects results of ``op`` (an op, or "models").

    The hash covers the op, the ops that it calls, their benchmarks, and the sources that all ops
    share.
    """
    folders, stem = set(name.parts), name.stem
    used = tuple(OPS) if op == "models" else (op, *OPS[op])
    if folders & UNUSED or stem == "inspect_cases":
        return False
    if "models" in folders:
        return op == "models"
    if "benchmarks" in folders:
        shared = ("measure", "footprint", "run", "attention")
        if op == "models":
            shared += ("model_step", "model_steps", "hosted_model_steps")
            shared += ("torch_modules", "torch_functions")
        return stem in shared or stem.startswith((op, *used))
    owners = [each for each in OPS if each in folders or stem.startswith(each)]
    return not owners or owners[0] in used
