"""``mmfused train``: call ``mmfused.training.run.train`` from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

from .data_options import (
    add_catalogue_arguments,
    add_format_arguments,
    add_reading_arguments,
)
from .tables import print_summary
from .train_options import config_options

Group: TypeAlias = argparse._ArgumentGroup  # argparse has no public name for the class

HELP = "train a model on a folder of products, or on the generated product set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused train`` to ``parser``, in groups.

    Most options have no default here, so that a recipe can replace TrainConfig's default where the
    option is not given. The defaults in the help are TrainConfig's.
    """
    parser.usage = "%(prog)s [--model MODEL] --data DIR [--val DIR] --out DIR [option ...]"
    parser.epilog = (
        "With --preset paper or code, the options of the optimization and --max-length default to "
        "the values of the paper or the public code, if it gives them."
    )
    _add_model_arguments(parser.add_argument_group("model"))
    _add_pretrained_arguments(parser.add_argument_group("pretrained weights"))
    _add_data_arguments(parser.add_argument_group("data"))
    _add_reading_arguments(parser.add_argument_group("reading of data"))
    _add_step_arguments(parser.add_argument_group("optimization"))
    _add_lora_arguments(parser.add_argument_group("LoRA and memory"))
    _add_run_arguments(parser.add_argument_group("run folder"))
    _add_device_arguments(parser.add_argument_group("device"))


def _add_model_arguments(group: Group) -> None:
    group.add_argument(
        "--model",
        default="fluid",
        help="fluid, uniecs, unica, moon2 or unite (default: fluid)",
    )
    group.add_argument(
        "--preset",
        help="tiny, paper (the paper's sizes) or code (the public code's sizes); with --init, only "
        "the recipe, that of the run if not given (default: tiny)",
    )
    group.add_argument(
        "--without",
        metavar="PART,..",
        help="components to leave out; COMPONENTS in the model's file lists them (default: none)",
    )
    group.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="set a field of the model's config, as in stage=1; VALUE is JSON or a plain string",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="side of the model's input pictures in pixels (default: as stored)",
    )
    group.add_argument(
        "--patch-size",
        type=int,
        metavar="PX",
        help="side of a patch in pixels (default: that of the preset; for tiny, 8 or 16)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="T",
        help="largest number of tokens of a text (default: 64)",
    )


def _add_pretrained_arguments(group: Group) -> None:
    group.add_argument(
        "--init",
        metavar="DIR",
        help="folder of a run or checkpoint, with whose model, weights and tokenizer training "
        "starts, or a pretrained folder; the options below replace parts of it",
    )
    group.add_argument(
        "--image-encoder",
        metavar="NAME",
        help="image encoder: a folder in the format of timm, open_clip or transformers, or the "
        "name of a timm model",
    )
    group.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="text encoder: a folder in transformers' format or a hub name",
    )
    group.add_argument(
        "--host",
        metavar="NAME",
        help="moon2 and unite: Qwen2-VL, a folder or a hub name",
    )
    group.add_argument(
        "--adapter",
        metavar="DIR",
        help="folder of a LoRA adapter, which is merged into --host before training",
    )
    group.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer folder or hub name (default: that of --text-encoder, --host or --init, or "
        "a new one trained on the texts)",
    )


def _add_data_arguments(group: Group) -> None:
    group.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="the training set: a folder with images and metadata.csv, another format that "
        "docs/data.md lists, or 'generated' (required)",
    )
    group.add_argument(
        "--val",
        metavar="DIR",
        help="the validation set, or the fraction of --data that becomes it, as in 0.1 (required, "
        "but not with 'generated' or where --data holds a test set)",
    )
    group.add_argument(
        "--products",
        metavar="DIR",
        help="retrieval models: folder of the catalogue to search (default: --data in training, "
        "--val in validation)",
    )
    add_catalogue_arguments(group)
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help="text column of --data and --val, short for --columns text=NAME (default: text)",
    )
    group.add_argument(
        "--modalities",
        metavar="NAMES",
        help="fluid: image,text, image or text; with --init, those of the run if not given "
        "(default: image,text)",
    )
    group.add_argument(
        "--augment",
        metavar="NAME",
        help="random changes of training pictures: none; light, a slight crop; or strong, also "
        "flip, colours and erasing (default: strong, but none with 'generated')",
    )
    group.add_argument(
        "--swap-text",
        type=float,
        metavar="P",
        help="fraction of the texts that are replaced by a text of another class (default: 0)",
    )
    group.add_argument(
        "--drop-image",
        type=float,
        metavar="P",
        help="fraction of the training items whose image is hidden (default: 0)",
    )
    group.add_argument(
        "--drop-text",
        type=float,
        metavar="P",
        help="fraction of the training items whose text is hidden (default: 0)",
    )


def _add_reading_arguments(group: Group) -> None:
    add_format_arguments(group, "--data and --val", "train", "those of the format")
    add_reading_arguments(group)
    group.add_argument(
        "--num-negatives",
        type=int,
        metavar="N",
        help="unica, unite: number of hard negatives of a query (default: 1)",
    )
    group.add_argument(
        "--mix-tasks",
        action="store_const",
        const=True,
        help="pairs with tasks: a batch may have pairs of several tasks, instead of one",
    )


def _add_step_arguments(group: Group) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="number of optimizer steps (default: as many as --epochs takes)",
    )
    length.add_argument(
        "--epochs",
        type=float,
        metavar="N",
        help="number of passes over the data (default: 60)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="number of items per batch, over all ranks (default: 64)",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="number of batches per optimizer step (default: 1)",
    )
    group.add_argument(
        "--micro-batch",
        "--grad-cache",
        dest="grad_cache",
        type=int,
        metavar="N",
        help="retrieval models: encode N items of the batch at a time, to save memory (default: "
        "all at once)",
    )
    _add_optimizer_arguments(group)
    group.add_argument("--seed", type=int, help="seed of all random draws (default: 0)")


def _add_optimizer_arguments(group: Group) -> None:
    group.add_argument("--lr", type=float, help="peak learning rate (default: 0.001)")
    group.add_argument(
        "--lr-image",
        type=float,
        metavar="LR",
        help="the same for the image encoder or vision tower (default: that of --lr)",
    )
    group.add_argument(
        "--lr-text",
        type=float,
        metavar="LR",
        help="the same for the text encoder or language model (default: that of --lr)",
    )
    group.add_argument(
        "--warmup",
        type=float,
        metavar="P",
        help="fraction of the steps in which the learning rate rises (default: 0.1)",
    )
    group.add_argument(
        "--schedule",
        metavar="NAME",
        help="of the learning rate after that: cosine or linear, down to 0, or constant (default: "
        "cosine)",
    )
    group.add_argument(
        "--betas",
        metavar="B1,B2",
        help="betas of AdamW (default: 0.9,0.98)",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        metavar="W",
        help="weight decay of AdamW (default: 0.05)",
    )
    group.add_argument(
        "--clip",
        type=float,
        metavar="NORM",
        help="largest norm of the gradient (default: 1)",
    )


def _add_lora_arguments(group: Group) -> None:
    group.add_argument(
        "--lora",
        metavar="NAME=VALUE,..",
        help="train LoRA adapters: rank=8,alpha=16,dropout=0.05,targets=q_proj+v_proj; or none "
        "(default: the adapters of --init, if it has some)",
    )
    group.add_argument(
        "--grad-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="save memory: compute activations of the transformers again in the backward pass",
    )


def _add_run_arguments(group: Group) -> None:
    group.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for the run (required)",
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run in --out",
    )
    existing.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint in --out, or start if there is none",
    )
    group.add_argument(
        "--val-every",
        type=int,
        metavar="N",
        help="validate every N steps and at the end (default: a tenth of all steps)",
    )
    group.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help="save a checkpoint every N steps and at the end (default: that of --val-every)",
    )
    group.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="keep the K newest checkpoints (default: 2)",
    )
    group.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help="write a line to metrics.jsonl every N steps (default: 1)",
    )


def _add_device_arguments(group: Group) -> None:
    group.add_argument("--device", help="cpu, cuda, ... (default: cuda if available)")
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="number of CPU threads (default: torch's)",
    )
    group.add_argument(
        "--backend",
        default="auto",
        help="auto, reference, composed or fused (default: auto)",
    )
    group.add_argument(
        "--amp",
        help="bfloat16 autocast: auto, bf16 or off (default: auto, on for GPUs with bfloat16)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print the summary and return the exit code."""
    from mmfused.training.ranks import fail_together, join_ranks, leave_ranks
    from mmfused.training.run import TrainConfig, train
    from mmfused.training.run_folder import is_finished
    from mmfused.training.setup import pick_device
    from mmfused.training.signals import Stopped

    join_ranks(pick_device(args.device or "auto"))
    with fail_together():
        config = TrainConfig(**config_options(args))
    was_finished = config.resume and is_finished(Path(config.out))
    try:
        summary = train(config)
    except Stopped as stop:
        print(f"mmfused: {stop}", file=sys.stderr)
        return 128 + stop.signum
    if leave_ranks() > 0:
        return 0
    print_summary(summary)
    if was_finished:
        print(f"the run in {args.out} is already finished; nothing was done")
    else:
        print(f"run written to {args.out}")
    return 0
