"""Check that the public symbols of mmfused have types, with ``pyright --verifytypes``.

    python tools/check_types.py [--at-least PERCENT] [--verbose]

pyright checks an installed package, so the sources are first copied into a temporary virtual
environment. The exit status is 1 if less than PERCENT of the public symbols have a known type, or
if pyright prints no score.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AT_LEAST = 95.0


def install(folder: Path) -> Path:
    """Create an environment with mmfused and this interpreter's packages.

    Returns the Python executable of the new environment.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    skip = shutil.ignore_patterns("__pycache__", "results", "kernels")
    shutil.copytree(ROOT / "mmfused", site / "mmfused", ignore=skip)
    for name in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / name, site / "mmfused" / name, ignore=skip)
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def pyright(python: Path, *arguments: str) -> str:
    """Return the output of pyright for the environment of ``python``."""
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    command = [sys.executable, "-m", "pyright", *arguments]
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(python.parents[1])}
    done = subprocess.run(
        command, cwd=python.parents[1], env=environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--at-least",
        type=float,
        default=AT_LEAST,
        metavar="PERCENT",
        help=f"required percentage of symbols with a known type (default: {AT_LEAST:g})",
    )
    parser.add_argument("--verbose", action="store_true", help="list symbols without a known type")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = pyright(install(Path(folder)), "--verifytypes", "mmfused", "--ignoreexternal")
    found = re.search(r"Type completeness score: ([\d.]+)%", output)
    if found is None:
        print(output)
        return 1
    if args.verbose:
        print(*(line.strip() for line in output.splitlines() if "error:" in line), sep="\n")
    print(f"public symbols with a known type: {found[1]} %, expected at least {args.at_least:g} %")
    return 0 if float(found[1]) >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
