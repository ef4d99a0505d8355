"""The options of ``mmfused tune``, checked before any work."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mmfused.benchmarks import run as benchmarks  # pyright: ignore[reportMissingImports]

from ..ops import OPS
from ..tuned_file import VARIABLE


@dataclass(frozen=True)
class Chosen:
    """An op to tune, its benchmark, and the cases, those that users wait for most first."""

    op: str
    module: ModuleType
    cases: list[Any]


@dataclass(frozen=True)
class Options:
    """What to tune and how.

    Attributes:
        chosen: the ops and their cases.
        whole: whether these are all cases, so that the form and the router are tuned too.
        dtype: of the cases.
        repeats: samples of each plan.
        budget_seconds: after which nothing new begins; None: no limit.
        out: the file to write, or its folder; None: in the folder that the library reads.
        jobs: processes that compile.
        dry_run: whether to compile only.
        arch: the architecture of a dry run, such as 90.
    """

    chosen: list[Chosen]
    whole: bool
    dtype: torch.dtype
    repeats: int
    budget_seconds: float | None
    out: Path | None
    jobs: int
    dry_run: bool
    arch: int


def options_of(args: argparse.Namespace) -> Options:
    """Return the options of the command.

    Raises:
        ValueError: an option has a value that is not possible.
    """
    if args.repeats < 3:
        raise ValueError(f"--repeats: got {args.repeats}, expected at least 3")
    if args.jobs < 1:
        raise ValueError(f"--jobs: got {args.jobs}, expected at least 1")
    if args.budget_seconds is not None and not args.budget_seconds >= 0:
        raise ValueError(f"--budget-seconds: got {args.budget_seconds}, expected 0 or more")
    if args.dtype not in benchmarks.DTYPES:
        names = ", ".join(benchmarks.DTYPES)
        raise ValueError(f"--dtype: got {args.dtype!r}, expected one of {names}")
    if args.dry_run and args.out:
        raise ValueError(f"--out: got {args.out!r}, expected none with --dry-run")
    chosen = _chosen(args)
    return Options(
        chosen=chosen,
        whole=not (args.case or args.shape),
        dtype=benchmarks.DTYPES[args.dtype],
        repeats=args.repeats,
        budget_seconds=args.budget_seconds,
        out=None if args.dry_run else _out(args.out or None),
        jobs=args.jobs,
        dry_run=args.dry_run,
        arch=_arch(args),
    )


def _chosen(args: argparse.Namespace) -> list[Chosen]:
    for op in args.ops:
        if op not in OPS:
            raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    modules = {op: benchmarks.load_op(op) for op in dict.fromkeys(args.ops or OPS)}
    if args.shape:
        if args.case or len(args.ops) != 1:
            raise ValueError(
                f"--shape: got {args.shape!r}, expected one OP and no --case beside it"
            )
        ((op, module),) = modules.items()
        return [Chosen(op, module, [module.custom(benchmarks.parse_shape(args.shape))])]
    cases = {op: sorted(m.cases("cuda", False), key=_order) for op, m in modules.items()}
    names = [case.name for of_op in cases.values() for case in of_op]
    for name in args.case or ():
        if name not in names:
            raise ValueError(f"--case: got {name!r}, expected one of {', '.join(names)}")
    found = [
        Chosen(op, modules[op], [c for c in of_op if c.name in (args.case or [c.name])])
        for op, of_op in cases.items()
    ]
    return [one for one in found if one.cases]


def _order(case: Any) -> bool:
    return not case.headline


def _out(text: str | None) -> Path | None:
    """Return the file or folder to write to: that of the option, or the one that is read."""
    name, is_option = "--out", text is not None
    if text is None:
        name, text = VARIABLE, os.environ.get(VARIABLE, "off")
        if text in ("", "off"):
            return None
    path = Path(text)
    if path.is_dir() and not is_option:
        return path
    if path.suffix != ".json" or path.is_dir():  # beside the file is a folder of the same name
        raise ValueError(f"{name}: got {text!r}, expected a file with the suffix .json")
    return path


def _arch(args: argparse.Namespace) -> int:
    """Return the architecture: that of the GPU, or of ``--arch`` in a dry run."""
    from mmfused.kernels.tiles import SHARED_MEMORY

    if args.arch is not None:
        if not args.dry_run:
            raise ValueError(f"--arch: got {args.arch!r}, expected --dry-run beside it")
        supported = {f"sm_{number}": number for number in SHARED_MEMORY}
        if args.arch not in supported:
            raise ValueError(f"--arch: got {args.arch!r}, expected one of {', '.join(supported)}")
        return supported[args.arch]
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in SHARED_MEMORY:
        names = ", ".join(f"sm_{number}" for number in SHARED_MEMORY)
        raise ValueError(f"tune: got a GPU of sm_{major}{minor}, expected one of {names}")
    return 10 * major + minor
