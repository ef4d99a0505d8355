"""``mmfused bench OP``: check the accuracy of an op, then time it against its baselines."""

from __future__ import annotations

import argparse

# In a checkout, mmfused.benchmarks is the folder benchmarks/ next to mmfused/.
from mmfused.benchmarks import run as benchmarks  # pyright: ignore[reportMissingImports]

HELP = "check and time an op against its baselines on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    benchmarks.add_arguments(parser, out=benchmarks.SCRATCH)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return benchmarks.run(args)
