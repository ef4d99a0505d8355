"""From the arguments of ``mmfused train`` to those of TrainConfig."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .data_options import parse_columns

MODALITIES = {
    "image,text": "both",
    "text,image": "both",
    "both": "both",
    "image": "image",
    "text": "text",
}


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments for TrainConfig: the given options, and the recipe for options not given."""
    from mmfused.training.recipes import recipe

    if args.modalities is not None and args.modalities not in MODALITIES:
        raise ValueError(
            f"modalities: got {args.modalities!r}, expected 'image,text', 'image' or 'text'"
        )
    options = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("command", "run"):
        options.pop(name, None)
    if args.modalities is not None:
        options["modalities"] = MODALITIES[args.modalities]
    if args.betas is not None:
        options["betas"] = _parse_betas(args.betas)
    for name in ("columns", "products_columns"):
        if name in options:
            options[name] = parse_columns(options[name], name)
    first = _settings_of_init(args)
    for name in ("preset", "modalities"):
        if name in first["training"]:
            options.setdefault(name, first["training"][name])
    fields = dict(map(parse_option, options.pop("option", [])))
    if "without" in options:
        fields["without"] = options.pop("without").split(",")
    if fields:
        options["model_options"] = fields
    if "lora" in options:
        options["lora"] = _parse_lora(options["lora"])
    preset = options.setdefault("preset", "tiny")
    stage = fields.get("stage", first["model"].get("stage", 2))  # 2: the default of UNITEConfig
    settings = recipe(args.model, preset, stage)
    if not _trains_images(fields, first["model"], options.get("lora")):
        settings.pop("lr_image", None)
    if args.resume and settings:
        settings = _recipe_of_run(Path(args.out), settings)
    return {**settings, **options}


def _trains_images(fields: dict[str, Any], first: dict[str, Any], lora: Any) -> bool:
    """Return whether the image encoder is trained, as far as the options tell."""
    frozen = fields.get("freeze", first.get("freeze"))
    named_targets = isinstance(lora, dict) and "targets" in lora  # perhaps of the texts alone
    return not (isinstance(frozen, (list, tuple)) and "image" in frozen) and not named_targets


def _recipe_of_run(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe with the values of the run in ``out``, if there is one.

    A run goes on with the recipe that it started with, perhaps that of an earlier version.
    """
    from mmfused.training.resume import resumed_settings

    run = resumed_settings(out)
    if run is None:
        return settings
    return {name: run["training"][name] for name in settings if name in run["training"]}


def _settings_of_init(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the run in ``--init``, whose preset and modalities are defaults.

    A run that is resumed has the same preset and modalities, and no longer needs ``--init``. A
    pretrained folder in ``--init`` has neither.
    """
    from mmfused.training.initial import is_pretrained, read_init
    from mmfused.training.resume import resumed_settings

    own = resumed_settings(Path(args.out)) if args.init is not None and args.resume else None
    if own is not None:
        return own
    if args.init is None or is_pretrained(Path(args.init)):
        return {"training": {}, "model": {}}
    return read_init(args.init, args.model)


def _parse_betas(given: str) -> tuple[float, ...]:
    """Return the numbers of B1,B2."""
    try:
        first, second = map(float, given.split(","))
    except ValueError as error:
        raise ValueError(f"betas: got {given!r}, expected two numbers, as in 0.9,0.98") from error
    return first, second


def parse_option(given: str) -> tuple[str, object]:
    """Return the name and the value of NAME=VALUE; a value that is not JSON is a string."""
    name, equals, value = given.partition("=")
    if not name or not equals:
        raise ValueError(f"option: got {given!r}, expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parse_lora(given: str) -> dict[str, object] | str:
    """Return the options in NAME=VALUE,..; names of targets are joined by "+"."""
    if given == "none":
        return given
    options: dict[str, object] = {}
    for part in given.split(","):
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise ValueError(f"lora: got {given!r}, expected NAME=VALUE,.. or none")
        if name in options:
            raise ValueError(f"lora: got {name} twice in {given!r}, expected each name once")
        options[name] = value.split("+") if name == "targets" else parse_option(part)[1]
    return options
