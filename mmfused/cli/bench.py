"""``mmfused bench OP``: check an op's accuracy, then time it against its baselines."""

from __future__ import annotations

import argparse

# In a checkout the package's folder benchmarks/ is beside mmfused/.
from mmfused.benchmarks import run as benchmarks  # pyright: ignore[reportMissingImports]

HELP = "check and time an op against its baselines on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    benchmarks.add_arguments(parser, out=benchmarks.SCRATCH)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    return benchmarks.run(args)
