"""``mmfused tune``: time the library's plans and their alternatives on this machine's GPU.

What is faster is kept in a file for this GPU and this version of Triton, which the library reads.
See docs/tuning.md and :mod:`mmfused.tuning`.
"""

from __future__ import annotations

import argparse
import os

HELP = "time the kernels' tile sizes and their alternatives on this GPU, and keep what is faster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    option = parser.add_argument
    option("ops", nargs="*", metavar="OP", help="tune the plans of this op (default: all ops)")
    case = "tune for this case of the benchmarks; may be repeated (default: all cases)"
    option("--case", action="append", metavar="NAME", help=case)
    shape = "tune one op for these sizes instead; `mmfused bench --help` lists them"
    option("--shape", metavar="B=..,N=..", help=shape)
    option("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    budget = "begin nothing new after these seconds (exit status 3 if anything is left)"
    option("--budget-seconds", type=float, metavar="S", help=budget)
    repeats = "samples of each plan (default: 15)"
    option("--repeats", type=int, default=15, metavar="N", help=repeats)
    out = "the file to write (default: the one that the library reads, see `mmfused env`)"
    option("--out", metavar="FILE", help=out)
    jobs = max(1, min(16, (os.cpu_count() or 2) - 1))
    text = f"number of parallel compilations (default: {jobs} here)"
    option("--jobs", type=int, default=jobs, metavar="N", help=text)
    dry = "list the plans and their alternatives, and compile them, without a GPU"
    option("--dry-run", action="store_true", help=dry)
    arch = "architecture for --dry-run (default: that of the GPU, or sm_90)"
    option("--arch", metavar="sm_90", help=arch)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from ..tuning.command import tune
    from ..tuning.options import options_of

    return tune(options_of(args))
