"""Options of the commands that take a trained model, or a pretrained one without a training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .train_options import parse_option

if TYPE_CHECKING:
    from mmfused.training.load import Trained

# The options that belong to a pretrained model.
PRETRAINED_OPTIONS = (
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
    group = parser.add_argument_group("model: a run, or a pretrained model with --model")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="folder of a run or of a checkpoint, or a pretrained folder",
    )
    group.add_argument(
        "--model",
        help="fluid, uniecs, unica, moon2 or unite, to use a pretrained folder or host without a "
        "training",
    )
    group.add_argument(
        "--host",
        metavar="NAME",
        help="unite, moon2: pretrained Qwen2-VL, a folder or a hub name",
    )
    group.add_argument(
        "--preset",
        help="with --model: tiny, paper or code (default: code, but paper for moon2)",
    )
    group.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="with --model: set a field of the model's config, as in mmfused train",
    )
    group.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="with --model: tokenizer folder or hub name (default: that of the folder or host)",
    )
    group.add_argument(
        "--adapter",
        metavar="DIR",
        help="with --model: folder of LoRA adapters, ours or peft's, to merge into the host",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="with --model: side of the pictures in pixels (default: that of the image encoder; "
        "with a host, of 16 x 16 tokens)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="T",
        help="with --model: largest number of tokens of a text (default: that of the preset)",
    )


def load_model(args: argparse.Namespace) -> Trained:
    """Load the model that the options name."""
    from mmfused.training.initial import is_pretrained
    from mmfused.training.load import load_pretrained, load_trained
    from mmfused.training.run_folder import read_settings

    given = {name: getattr(args, name) for name in PRETRAINED_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    placed = (args.backend, args.device, args.threads)
    source = args.checkpoint if args.host is None else args.host
    if source is None:
        raise ValueError("checkpoint: got None without host, expected one of the two")
    if None not in (args.checkpoint, args.host):
        raise ValueError(f"checkpoint: got {args.checkpoint!r} with host, expected one of the two")
    if args.host is None and not is_pretrained(Path(source)):
        read_settings(Path(source))  # which says what is wrong with a path
        for name, value in given.items():
            raise ValueError(
                f"{name}: got {value!r} with the run {source!r}, "
                "expected it only with host or a pretrained folder"
            )
        return load_trained(source, *placed)
    _check_model(args.model, source, hosted=args.host is not None)
    settings: dict[str, Any] = {
        "options": dict(map(parse_option, given.pop("option", []))),
        **dict(zip(("backend", "device", "threads"), placed, strict=True)),
    }
    try:
        return load_pretrained(given.pop("model"), source, **settings, **given)
    except ValueError as error:
        setting, colon, reason = str(error).partition(": ")
        if args.host is not None or setting not in ("init", "host"):
            raise
        raise ValueError(f"checkpoint{colon}{reason}") from error


def _check_model(model: str | None, source: str, hosted: bool) -> None:
    """Require the name of a model that can be loaded from the pretrained ``source``."""
    from mmfused.models import MODELS
    from mmfused.training.config import HOSTED

    names = HOSTED if hosted else tuple(MODELS)
    if model not in names:
        raise ValueError(f"model: got {model!r} with {source!r}, expected {', '.join(names)}")
