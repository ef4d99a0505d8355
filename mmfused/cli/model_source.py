"""Options of the commands that take a trained model, or a pretrained host without a training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .train_options import parse_option

if TYPE_CHECKING:
    from mmfused.training.load import Trained

# The options that belong to --host.
HOST_OPTIONS = (
    "model",
    "preset",
    "option",
    "tokenizer",
    "adapter",
    "image_size",
    "max_length",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the model to ``parser``."""
    group = parser.add_argument_group("model: --checkpoint, or --model and --host")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="folder of a run or of a checkpoint",
    )
    group.add_argument(
        "--model",
        help="unite or moon2, to use a pretrained host without a training",
    )
    group.add_argument(
        "--host",
        metavar="NAME",
        help="pretrained Qwen2-VL, a folder or a hub name",
    )
    group.add_argument(
        "--preset",
        help="with --host: tiny, paper or code (default: code for unite, paper for moon2)",
    )
    group.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="with --host: set a field of the model's config, as in mmfused train",
    )
    group.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="with --host: tokenizer folder or hub name (default: that of the host)",
    )
    group.add_argument(
        "--adapter",
        metavar="DIR",
        help="with --host: folder of LoRA adapters, ours or peft's, to merge into the host",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="with --host: side of the pictures in pixels (default: that of 16 x 16 tokens)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="T",
        help="with --host: largest number of tokens of a text (default: that of the preset)",
    )


def load_model(args: argparse.Namespace) -> Trained:
    """Load the model that the options name."""
    from mmfused.training.load import load_host, load_trained

    given = {name: getattr(args, name) for name in HOST_OPTIONS if getattr(args, name) is not None}
    placed = (args.backend, args.device, args.threads)
    if args.host is None:
        if args.checkpoint is None:
            raise ValueError("checkpoint: got None without host, expected one of the two")
        for name, value in given.items():
            raise ValueError(f"{name}: got {value!r} with checkpoint, expected it only with host")
        return load_trained(args.checkpoint, *placed)
    if args.checkpoint is not None:
        raise ValueError(f"checkpoint: got {args.checkpoint!r} with host, expected one of the two")
    if args.model is None:
        raise ValueError(f"model: got None with host {args.host!r}, expected unite or moon2")
    settings: dict[str, Any] = {
        "options": dict(map(parse_option, given.pop("option", []))),
        **dict(zip(("backend", "device", "threads"), placed, strict=True)),
    }
    return load_host(given.pop("model"), args.host, **settings, **given)
