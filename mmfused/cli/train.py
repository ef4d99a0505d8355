"""``mmfused train``: one run of ``mmfused.training.train`` from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "train a model on a folder of products, or on the generated product set"
MODALITIES = {
    "image,text": "both",
    "text,image": "both",
    "both": "both",
    "image": "image",
    "text": "text",
}


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--model", default="fluid", help="fluid (default), uniecs, unica, moon2 or unite"
    )
    parser.add_argument(
        "--preset",
        default="tiny",
        help="tiny (default), or the paper's or the public code's size: paper, code",
    )
    parser.add_argument(
        "--without",
        metavar="PART,..",
        help="leave out components; each model's file has the list, ablate runs it",
    )
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="a field of the model's config; VALUE is JSON: stage=1, or a string",
    )
    parser.add_argument(
        "--init",
        metavar="DIR",
        help="begin with the weights and the tokenizer of a run, or of a checkpoint",
    )
    parser.add_argument(
        "--image-encoder",
        metavar="NAME",
        help="pretrained: a folder in timm's format, or a name timm can fetch",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="pretrained: a folder in transformers' format, or a hub name",
    )
    parser.add_argument(
        "--host", metavar="NAME", help="moon2, unite: a pretrained Qwen2-VL, a folder or a hub name"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with images and metadata.csv, or 'generated'",
    )
    parser.add_argument(
        "--val", metavar="DIR", help="the same, to validate on; the generated set has its own"
    )
    parser.add_argument(
        "--products",
        metavar="DIR",
        help="retrieval: the catalogue to look in (default: the data themselves)",
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="of the data's metadata.csv, not of the products' (default: text)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the run")
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    held.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out; begin where there is none",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help="checkpoint every N steps and at the end (default: --val-every)",
    )
    parser.add_argument(
        "--keep", type=int, metavar="K", help="checkpoints to keep, the newest (default: 2)"
    )
    parser.add_argument(
        "--backend", default="auto", help="auto, reference, composed or fused (default: auto)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="number of optimiser steps")
    length.add_argument("--epochs", type=float, help="number of passes over the data")
    parser.add_argument(
        "--modalities", default="image,text", help="image,text (default), image or text"
    )
    parser.add_argument(
        "--swap-text",
        type=float,
        metavar="P",
        help="swap this fraction of the texts to another class's",
    )
    parser.add_argument(
        "--drop-image",
        type=float,
        metavar="P",
        help="hide the image of this fraction of training samples",
    )
    parser.add_argument(
        "--drop-text",
        type=float,
        metavar="P",
        help="hide the text of this fraction of training samples",
    )
    parser.add_argument("--batch-size", type=int, help="samples in a forward pass (default: 64)")
    parser.add_argument(
        "--accumulate", type=int, metavar="N", help="batches in an optimiser step (default: 1)"
    )
    parser.add_argument(
        "--grad-cache",
        type=int,
        metavar="N",
        help="retrieval: encode N items of the batch at a time, exactly",
    )
    parser.add_argument(
        "--amp", help="auto, bf16 or off: bfloat16 autocast (default: auto, which is on for CUDA)"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument(
        "--max-length", type=int, metavar="T", help="tokens a text may have (default: 64)"
    )
    parser.add_argument(
        "--image-size", type=int, help="side of the pictures the model sees (default: as stored)"
    )
    parser.add_argument("--patch-size", type=int)
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer folder or hub name (default: trained on the texts)",
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help="write a line to metrics.jsonl every N steps (default: 1)",
    )
    parser.add_argument(
        "--val-every",
        type=int,
        metavar="N",
        help="validate every N steps (default: 10 times a run)",
    )


def run(args: argparse.Namespace) -> int:
    from mmfused.training.checkpoint import Stopped
    from mmfused.training.loop import TrainConfig, train
    from mmfused.training.ranks import join_ranks, leave_ranks, refused_together
    from mmfused.training.run_folder import is_finished
    from mmfused.training.setup import pick_device

    join_ranks(pick_device(args.device or "auto"))
    with refused_together():
        config = TrainConfig(**config_options(args))
    done = config.resume and is_finished(Path(config.out))
    try:
        summary = train(config)
    except Stopped as stop:
        print(f"mmfused: {stop}", file=sys.stderr)
        return 128 + stop.signum
    if leave_ranks() > 0:
        return 0
    print_table(summary)
    print(
        f"{args.out} holds this run, finished; nothing was done"
        if done
        else f"run written to {args.out}"
    )
    return 0


def config_options(args) -> dict:
    """What was given on the command line, over the preset's recipe; the other defaults live in
    TrainConfig.
    """
    from mmfused.training.config import RECIPES

    if args.modalities not in MODALITIES:
        raise ValueError(
            f"modalities: got {args.modalities!r}, expected image,text or image or text"
        )
    options = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("command", "run"):
        options.pop(name, None)
    options["modalities"] = MODALITIES[args.modalities]
    fields = dict(map(field_of, options.pop("option", [])))
    if "without" in options:
        fields["without"] = options.pop("without").split(",")
    if fields:
        options["model_options"] = fields
    return {**RECIPES.get((args.model, args.preset), {}), **options}


def field_of(given: str) -> tuple[str, object]:
    """A value that is no JSON is a string."""
    name, equals, value = given.partition("=")
    if not name or not equals:
        raise ValueError(f"option: got {given!r}, expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def print_table(summary: dict):
    rows = {
        "model": f"{summary['model']}, {summary['parameters'] / 1e6:.2f} M parameters, {summary['modalities']}",
        "data": f"{summary['train_rows']} rows, {summary['val_rows']} to validate, {len(summary['skipped'])} skipped",
        "backend": f"{summary['backend']} on {summary['device']}, bf16 autocast {'on' if summary['amp'] == 'bf16' else 'off'}",
        "steps": f"{summary['steps']}, {summary['step_seconds'] * 1e3:.1f} ms each, {summary['seconds']:.1f} s in all",
        **(class_rows(summary) if "val_loss" in summary else retrieval_rows(summary)),
        "peak memory": f"{summary['peak_memory'] / 2**20:.0f} MiB",
    }
    print_rows(rows)


def class_rows(summary: dict) -> dict[str, str]:
    return {
        "loss": f"{summary['train_loss']:.4f} training, {summary['val_loss']:.4f} validation",
        **score_rows(summary),
    }


def retrieval_rows(summary: dict) -> dict[str, str]:
    """Means over the pairs of views."""
    names = {"Recall@1": "recall_at_1", "Recall@5": "recall_at_5", "MRR": "mrr"}
    scores = {f"mean {name}": f"{summary[key]:.1%}" for name, key in names.items()}
    return {"loss": f"{summary['train_loss']:.4f} training", **scores}


def score_rows(scores: dict) -> dict[str, str]:
    names = {
        "accuracy": "accuracy",
        "macro precision": "macro_precision",
        "macro recall": "macro_recall",
        "macro F1": "macro_f1",
    }
    return {name: f"{scores[key]:.1%}" for name, key in names.items()}


def print_rows(rows: dict[str, str]):
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
