"""``mmfused export``: write a trained model as a folder for other libraries."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from .model_card import model_card
from .new_folder import add_out_arguments, check_out, new_folder

HELP = "write a trained model, or an encoder of it, as a folder for transformers or timm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused export`` to ``parser``."""
    parser.add_argument(
        "checkpoint",
        metavar="RUN",
        help="folder of a run or of a checkpoint",
    )
    parser.add_argument(
        "--part",
        help="the encoder to write: image or text (fluid, uniecs; default for unica: text)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="type of the weights: float32 or bfloat16 (default: float32)",
    )
    add_out_arguments(parser, "export")


def run(args: argparse.Namespace) -> int:
    """Load the run, write the folder and return the exit code."""
    import mmfused
    from mmfused.models.encoder_export import save_image, save_text
    from mmfused.models.qwen_export import ExportDtype, save_host
    from mmfused.training.run_folder import load_saved, read_settings

    out, source = Path(args.out), Path(args.checkpoint)
    if args.dtype not in get_args(ExportDtype):
        raise ValueError(f"dtype: got {args.dtype!r}, expected float32 or bfloat16")
    check_out(out, "export", args.overwrite)
    settings = read_settings(source)
    part = _checked_part(args.part, settings, source)
    model, tokenizer = load_saved(source, settings)
    name, length = settings["training"]["model"], settings["training"]["max_length"]
    record = {"mmfused": mmfused.__version__, "model": name, "config": model.config.to_dict()}
    if part is not None:
        record["part"] = part
    with new_folder(out, "export", record, args.overwrite) as folder:
        if part is None:
            save_host(model, tokenizer, folder, args.dtype)
        elif part == "image":
            save_image(model, folder, args.dtype)
        else:
            save_text(model, tokenizer, folder, args.dtype, length)
        card = model_card(source, settings, model, part)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{name if part is None else f'{part} encoder of {name}'} of {source} written to {out}")
    return 0


def _checked_part(
    part: str | None,
    settings: Mapping[str, Any],
    source: Path,
) -> Literal["image", "text"] | None:
    """Return the part to write, None for a host, after a check that the model has it."""
    from mmfused.models import MODELS
    from mmfused.models.encoder_export import check_part
    from mmfused.models.qwen_export import check_exportable
    from mmfused.models.weights import named

    name = settings["training"]["model"]
    if name in ("unite", "moon2"):
        if part is not None:
            expected = f"no part with model {name!r}, whose host is written"
            raise ValueError(f"part: got {part!r}, expected {expected}")
        check_exportable(name, settings["model"].get("without"))
        return None
    if part is None and name == "unica":
        part = "text"
    if part != "image" and part != "text":
        raise ValueError(f"part: got {part!r} with model {name!r}, expected image or text")
    with named(f"checkpoint: {source}"):
        config = MODELS[name].config.from_dict(settings["model"])
    check_part(config, part)
    return part
