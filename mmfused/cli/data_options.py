"""Options of the commands that read a data set."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

# argparse has no public name for the class.
Group: TypeAlias = "argparse._ArgumentGroup | argparse.ArgumentParser"


def add_format_arguments(
    group: Group,
    option: str = "--data",
    split: str = "test or validation",
    columns: str = "those of training",
) -> None:
    """Add the options that say how the data set in ``option`` is written."""
    group.add_argument(
        "--format",
        metavar="NAME",
        help=f"format of {option}: metadata, classes, arrow, parquet, webdataset or glami; for "
        "pairs mmeb, unite, webqa, mbeer or mixture (default: detected)",
    )
    group.add_argument(
        "--columns",
        metavar="NAME=COLUMN,..",
        help=f"columns of {option}, as in image=filepath,text=title+description,label=class "
        f"(default: {columns})",
    )
    group.add_argument(
        "--split",
        metavar="NAME",
        help=f"part of {option.partition(' ')[0]} to read, if it has splits (default: {split})",
    )
    group.add_argument(
        "--labels",
        metavar="KIND",
        help="what labels are: index, a number from 0, or name, of a class (default: what the "
        "format says, or most labels are)",
    )


def add_catalogue_arguments(group: Group) -> None:
    """Add the options that say how the catalogue in ``--products`` is written."""
    group.add_argument(
        "--products-columns",
        metavar="NAME=COLUMN,..",
        help="columns of --products (default: those of its format)",
    )


def add_reading_arguments(group: Group) -> None:
    """Add the options that say how pictures are read."""
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="decode pictures when a batch needs them, instead of all at the start (default: if "
        "they would take more than 1 GiB)",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of threads that decode pictures (default: that of the CPUs, at most 8)",
    )


def parse_columns(given: str | None, option: str = "columns") -> dict[str, str] | None:
    """Return the columns in NAME=COLUMN,.. by name."""
    if given is None:
        return None
    columns: dict[str, str] = {}
    for part in given.split(","):
        name, equals, column = part.partition("=")
        if not name or not equals:
            raise ValueError(f"{option}: got {given!r}, expected NAME=COLUMN,..")
        if name in columns:
            raise ValueError(f"{option}: got {name} twice in {given!r}, expected each name once")
        columns[name] = column
    return columns


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options for `mmfused.training.load.Trained.load_set`."""
    return {
        "format": args.format,
        "split": args.split,
        "columns": parse_columns(args.columns),
        "labels": args.labels or "auto",
        "stream": getattr(args, "stream", None),
    }


def check_for_pairs(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is given that only products with labels have."""
    held = args.path if "path" in args else args.data
    for name in ("columns", "text_column", "labels", "products", "stream"):
        value = getattr(args, name, None)
        if value is not None and not (name == "stream" and value):
            raise ValueError(
                f"{name}: got {value!r} with {held!r}, which holds pairs, expected products with "
                "labels"
            )
