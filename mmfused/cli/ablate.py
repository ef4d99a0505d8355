"""``mmfused ablate``: train a model with and without each component, and compare the scores."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import train
from .train_options import config_options

HELP = "train a model with all components, then without each of them, and compare the scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused train``, and ``--only``."""
    train.add_arguments(parser)
    parser.add_argument(
        "--only",
        metavar="PART,..",
        help="leave out only these components, one at a time (default: all components)",
    )


def run(args: argparse.Namespace) -> int:
    """Train each variant and return the exit code.

    Each variant is a separate run in a subfolder of ``--out``, so ``--resume`` resumes the
    unfinished variants.
    """
    from mmfused.training.run_folder import check_replaceable
    from mmfused.training.signals import Stopped

    parts = _components(args.model)
    chosen = args.only.split(",") if args.only else list(parts)
    for part in chosen:
        if part not in parts:
            raise ValueError(f"only: got {part!r}, expected some of {', '.join(parts)}")
    if args.without:
        raise ValueError(
            f"without: got {args.without!r}, expected no such option: ablate leaves out the "
            "components one at a time"
        )
    out = Path(args.out)
    check_replaceable(out / "ablation.json", "whole", args.overwrite or args.resume)
    try:
        return _ablate(args, out, chosen)
    except Stopped as stop:
        print(f"mmfused: {stop}", file=sys.stderr)
        return 128 + stop.signum


def _ablate(args: argparse.Namespace, out: Path, chosen: list[str]) -> int:
    from mmfused.models.config import AbsentPart
    from mmfused.training.files import write_atomically, write_json

    summaries = {"whole": _train_without(args, out / "whole", None)}
    for part in chosen:
        try:
            summaries[f"without {part}"] = _train_without(args, out / f"without-{part}", part)
        except AbsentPart as error:
            # The model does not have the part. UNITE's second stage, for example, has no dual loss.
            if args.only:
                raise
            print(f"skipped: {error}")
        write_atomically(out / "ablation.json", lambda path: write_json(path, summaries))
    _print_table(summaries)
    print(f"scores written to {out / 'ablation.json'}")
    return 0


def _components(model: str) -> tuple[str, ...]:
    from mmfused.models import MODELS

    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")
    return importlib.import_module(MODELS[model].model.__module__).COMPONENTS


def _train_without(args: argparse.Namespace, out: Path, part: str | None) -> dict[str, Any]:
    """Train without ``part`` (None: with all parts), and return the summary."""
    from mmfused.training.run import TrainConfig
    from mmfused.training.run import train as train_model

    given = {name: value for name, value in vars(args).items() if name != "only"}
    given |= {"out": str(out), "without": part}
    print(f"{out.name}:")
    out.parent.mkdir(parents=True, exist_ok=True)
    return train_model(TrainConfig(**config_options(argparse.Namespace(**given))))


def _print_table(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    scores = ("accuracy", "macro_f1", "recall_at_1", "recall_at_5", "mrr")
    names = [name for name in scores if name in summaries["whole"]]
    width = max(map(len, summaries))
    columns = "  ".join(f"{name:>11}" for name in names)
    print(f"\n{'':<{width}}  {columns}   seconds")
    for label, summary in summaries.items():
        values = "  ".join(f"{summary[name]:>11.1%}" for name in names)
        print(f"{label:<{width}}  {values}  {summary['seconds']:>8.1f}")
