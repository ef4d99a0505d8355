"""``mmfused bench OP``: the accuracy gate, then times against the op's baselines
(benchmarks/run.py).
"""

from __future__ import annotations

import argparse

from mmfused.benchmarks import run as benchmarks

HELP = "check and time an op against its baselines on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks.add_arguments(parser, out=benchmarks.SCRATCH)


def run(args: argparse.Namespace) -> int:
    return benchmarks.run(args)
