"""Which sources a result was made with: the commit where there is one, and a hash that needs none."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from mmfused.ops import OPS

ROOT = Path(__file__).resolve().parents[1]  # the checkout, or the installed package
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def source_facts() -> dict:
    """The commit of the checkout this file lies in, and whether anything but results differs from
    it.

    A copy without its .git has the commit that MMFUSED_COMMIT names, if any; its hash tells whether
    that is true."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if not (ROOT / ".git").exists():
        return {"commit": os.environ.get("MMFUSED_COMMIT"), "dirty": None}
    try:
        commit, changes = (
            git("rev-parse", "HEAD"),
            git("status", "--porcelain", "--", ".", ":!benchmarks/results"),
        )
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def source_hash(op: str | None = None) -> str:
    """Of the sources that decide what ``op`` computes and how it is timed; None: of all, the tests
    among them.
    """
    found = hashlib.sha256()
    for path in sorted(path for path in ROOT.rglob("*.*") if path.suffix in SUFFIXES):
        name = path.relative_to(ROOT)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (op is None or serves(name, op)):
            found.update(f"{name.as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def serves(name: Path, op: str) -> bool:
    """Whether a result of ``op`` may depend on this source file."""
    rooms, last = set(name.parts), name.stem
    used = tuple(OPS) if op == "models" else (op, *OPS[op])
    if rooms & {"tests", "tools", "cli", "data", "fuse", "training"} or last == "inspect_cases":
        return False
    if "models" in rooms:
        return op == "models"
    if "benchmarks" in rooms:
        more = ("model_steps", "torch_modules") if op == "models" else ()
        return last in ("measure", "run", *more) or last.startswith((op, *used))
    others = [
        each for each in OPS if each in rooms or last.startswith(each)
    ]  # the op it belongs to; none: it is everybody's
    return not others or others[0] in used
