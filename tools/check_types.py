"""Type completeness of the package as users get it: ``python tools/check_types.py``.

pyright judges installed packages, so the sources are copied into an environment of their own, as a
wheel would install them. Exit status 1 where less than ``--at-least`` percent of the public symbols
have a known type; ``--verbose`` lists those that have none.
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
    """The interpreter of a new environment that holds the package, and sees what is here."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    skip = shutil.ignore_patterns("__pycache__", "results", "kernels")
    shutil.copytree(ROOT / "mmfused", site / "mmfused", ignore=skip)
    for name in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / name, site / "mmfused" / name, ignore=skip)
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def pyright(python: Path, *arguments: str) -> str:
    """The output of pyright under that interpreter."""
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    command = [sys.executable, "-m", "pyright", *arguments]
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(python.parents[1])}
    done = subprocess.run(
        command, cwd=python.parents[1], env=environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def main() -> int:
    """0 where enough is typed, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--at-least", type=float, default=AT_LEAST, metavar="PERCENT")
    parser.add_argument("--verbose", action="store_true", help="list the symbols without a type")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        said = pyright(install(Path(folder)), "--verifytypes", "mmfused", "--ignoreexternal")
    found = re.search(r"Type completeness score: ([\d.]+)%", said)
    if found is None:
        print(said)
        return 1
    if args.verbose:
        print(*(line.strip() for line in said.splitlines() if "error:" in line), sep="\n")
    print(f"{found[1]} % of the public symbols have a known type, expected {args.at_least:g} %")
    return 0 if float(found[1]) >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
