"""``mmfused ablate``: one training with everything, and one without each component; a table of what
each is worth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import train

HELP = "train a model whole and without each of its components, and compare"


def add_arguments(parser: argparse.ArgumentParser):
    train.add_arguments(parser)
    parser.add_argument(
        "--only", metavar="PART,..", help="these components alone (default: all of the model's)"
    )


def run(args: argparse.Namespace) -> int:
    """Every training is a run of its own under ``--out``, so that ``--resume`` goes on with those
    that are not finished.
    """
    from mmfused.training.checkpoint import Stopped
    from mmfused.training.run_folder import check_replaceable

    parts = components(args.model)
    chosen = args.only.split(",") if args.only else list(parts)
    for part in chosen:
        if part not in parts:
            raise ValueError(f"only: got {part!r}, expected some of {', '.join(parts)}")
    if args.without:
        raise ValueError(
            f"without: got {args.without!r}, expected nothing: ablate leaves out one component after the other"
        )
    out = Path(args.out)
    check_replaceable(out / "ablation.json", "whole", args.overwrite or args.resume)
    try:
        return ablate(args, out, chosen)
    except Stopped as stop:
        print(f"mmfused: {stop}", file=sys.stderr)
        return 128 + stop.signum


def ablate(args: argparse.Namespace, out: Path, chosen: list[str]) -> int:
    from mmfused.models.config import AbsentPart
    from mmfused.training.run_folder import whole, write_json

    summaries = {"whole": one_run(args, out / "whole", None)}
    for part in chosen:
        try:
            summaries[f"without {part}"] = one_run(args, out / f"without-{part}", part)
        except AbsentPart as error:  # as UNITE's dual loss in its second stage
            if args.only:
                raise
            print(f"left out: {error}")
        whole(out / "ablation.json", lambda path: write_json(path, summaries))
    print_table(summaries)
    print(f"numbers written to {out / 'ablation.json'}")
    return 0


def components(model: str) -> tuple[str, ...]:
    import importlib

    from mmfused.models import MODELS

    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")
    return importlib.import_module(MODELS[model].model.__module__).COMPONENTS


def one_run(args: argparse.Namespace, out: Path, without: str | None) -> dict:
    from mmfused.training.loop import TrainConfig
    from mmfused.training.loop import train as train_model

    given = {name: value for name, value in vars(args).items() if name != "only"}
    given |= {"out": str(out), "without": without}
    print(f"{out.name}:")
    out.parent.mkdir(parents=True, exist_ok=True)
    return train_model(TrainConfig(**train.config_options(argparse.Namespace(**given))))


def print_table(summaries: dict[str, dict]):
    names = [
        name
        for name in ("accuracy", "macro_f1", "recall_at_1", "recall_at_5", "mrr")
        if name in summaries["whole"]
    ]
    width = max(map(len, summaries))
    print(f"\n{'':<{width}}  " + "  ".join(f"{name:>11}" for name in names) + "   seconds")
    for label, summary in summaries.items():
        print(
            f"{label:<{width}}  "
            + "  ".join(f"{summary[name]:>11.1%}" for name in names)
            + f"  {summary['seconds']:>8.1f}"
        )
