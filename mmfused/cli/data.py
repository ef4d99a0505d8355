"""``mmfused data``: print what a data set holds, before a model is trained on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .data_options import add_format_arguments, check_for_pairs, reading_options
from .tables import print_rows

HELP = "print what a data set holds: rows, classes, lost rows by reason, texts and pictures"
# Number of reasons, tasks and other groups that are printed; the JSON file has all.
PRINTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused data`` to ``parser``."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="the data set: a folder with images and metadata.csv, or another format that "
        "docs/data.md lists",
    )
    add_format_arguments(parser, "PATH", "train", "those of the format")
    parser.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PX",
        help="side of the model's input pictures, for the memory that they take (default: 224)",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every picture and name the broken ones (default: read some headers)",
    )
    parser.add_argument(
        "--sheet",
        metavar="FILE",
        help="write a PNG with up to 48 items, evenly spread over the classes",
    )
    parser.add_argument("--out", metavar="FILE", help="write the report to this JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace the files")


def run(args: argparse.Namespace) -> int:
    """Read the data set, print the tables, write the files and return the exit code."""
    from mmfused.data import contact_sheet, report
    from mmfused.data.pair_sets import PairSet
    from mmfused.models.fields import check_field
    from mmfused.training.files import write_atomically, write_json

    check_field("image_size", args.image_size, int)
    sheet = _checked("sheet", args.sheet, ".png", args.overwrite)
    out = _checked("out", args.out, ".json", args.overwrite)
    name, dataset = _open(args)
    if isinstance(dataset, PairSet):
        found = report.describe_pairs(dataset, args.decode, _bar)
        cells = partial(contact_sheet.pair_cells, dataset)
    else:
        found = report.describe_products(dataset, args.image_size, args.decode, _bar)
        cells = partial(contact_sheet.product_cells, dataset)
    found = {"path": args.path, "format": name, **found}
    print_rows(_pair_rows(found) if found["kind"] == "pairs" else _product_rows(found))
    _print_groups("lost", found["lost"])
    _print_groups("broken", found["pictures"]["broken"])
    if sheet:
        write_atomically(sheet, lambda path: contact_sheet.write_sheet(path, cells()))
        print(f"contact sheet written to {sheet}")
    if out:
        write_atomically(out, lambda path: write_json(path, found))
        print(f"report written to {out}")
    return 0


def _checked(name: str, value: str | None, suffix: str, overwrite: bool) -> Path | None:
    """Return the path of a file to write; raise if it cannot or must not be written."""
    if value is None:
        return None
    path = Path(value)
    if path.suffix.lower() != suffix or not path.parent.is_dir():
        raise ValueError(f"{name}: got {value!r}, expected a {suffix} file in an existing folder")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{name}: {path} already exists; choose another name or overwrite it")
    return path


def _open(args: argparse.Namespace) -> tuple[str, Any]:
    """Return the name of the format and the set, whose pictures are not decoded yet."""
    from mmfused.training.datasets import Source, read_pairs, read_products

    options = {name: value for name, value in reading_options(args).items() if name != "stream"}
    source = Source("path", args.path, stream=True, needs_label=False, **options)
    if not source.holds_pairs:
        return source.format_name, read_products(source)
    check_for_pairs(args)
    return source.format_name, read_pairs(source)


def _bar(looks: Iterable[Any], count: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(
        looks,
        desc="pictures",
        total=count,
        unit=" pictures",
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; few lines in a log file
    )


def _product_rows(found: Mapping[str, Any]) -> dict[str, str]:
    classes, memory = found["classes"], found["memory"]
    unlabelled = classes["without_label"]
    rows = {
        "data": f"{found['path']}, format {found['format']}",
        "rows": f"{found['rows']}, of which {found['usable_rows']} are usable",
        "classes": f"{classes['count']}"
        + (f", and {unlabelled} rows without a label" if unlabelled else ""),
    }
    if classes["count"]:
        largest, smallest = classes["most_frequent"][0], classes["smallest"]
        rows["largest class"] = f"{largest['name']}, {largest['rows']} rows"
        rows["smallest class"] = f"{smallest['name']}, {smallest['rows']} rows"
        rows["most frequent"] = _listed(classes["most_frequent"])
    rows |= _shared_rows(found)
    how = "decoded when needed" if memory["streamed"] else "decoded at the start"
    rows["memory"] = (
        f"{_bytes(memory['bytes'])} at {memory['image_size']} px; in training, pictures are {how}"
    )
    return rows


def _pair_rows(found: Mapping[str, Any]) -> dict[str, str]:
    kinds = [
        {"name": f"{kind['query']} -> {kind['candidate']}", "rows": kind["pairs"]}
        for kind in found["modalities"]
    ]
    return {
        "data": f"{found['path']}, format {found['format']}",
        "queries": f"{found['queries']}",
        "candidates": f"{found['candidates']}",
        "positives": f"{_range(found['positives'])} for a query",
        "negatives": f"{_range(found['negatives'])} for a query",
        "tasks": f"{len(found['tasks'])}: {_listed(found['tasks'])}",
        "corpora": f"{len(found['corpora'])}: {_listed(found['corpora'])}",
        "query -> positive": _listed(kinds),
        **_shared_rows(found),
    }


def _shared_rows(found: Mapping[str, Any]) -> dict[str, str]:
    texts, pictures = found["texts"], found["pictures"]
    of = "rows" if found["kind"] == "products" else "items"
    some = pictures["read"] < pictures["files"]
    seen = "all" if not some else f"{pictures['read']} of {pictures['files']}, evenly spread"
    lost = sum(group["rows"] for group in found["lost"])
    broken = sum(group["rows"] for group in pictures["broken"])
    rows = {
        "lost": f"{lost}" + (", see below" if lost else ""),
        "texts": f"{texts['empty']} empty; {texts['median_length']} characters in the median, "
        f"{texts['longest']} at most",
        "pictures": f"{pictures['present']} {of} with a picture, {pictures['without']} without",
        "decoded" if pictures["decoded"] else "headers read": f"{seen}; "
        f"{pictures['distinct']} distinct, {broken} broken" + (", see below" if broken else ""),
    }
    if pictures["formats"]:
        kinds = [{"name": name, "rows": count} for name, count in pictures["formats"].items()]
        width, height = (_range(pictures[side]) for side in ("width", "height"))
        rows |= {
            "picture formats": _listed(kinds),
            "picture files": f"{_range(map(_bytes, pictures['bytes']))}",
            "picture sizes": f"width {width} px, height {height} px",
        }
    return rows


def _listed(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return names and counts in one line."""
    more = f" and {len(groups) - PRINTED} more" if len(groups) > PRINTED else ""
    return (
        ", ".join(f"{_line(group['name'])} ({group['rows']})" for group in groups[:PRINTED]) + more
    )


def _print_groups(title: str, groups: Sequence[Mapping[str, Any]]) -> None:
    for group in groups[:PRINTED]:
        print(f"{title}  {group['rows']} x {_line(group['reason'])}")
        print(f"{'':{len(title)}}  for example {_line(group['example'])}")
    if len(groups) > PRINTED:
        print(f"{title}  {len(groups) - PRINTED} more reasons")


def _line(text: str) -> str:
    """Return a text of the data as one printable line, shortened."""
    text = " ".join(text.split())[:300]
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _range(values: Iterable[Any]) -> str:
    smallest, median, largest = values
    if smallest == largest:
        return f"{smallest}"
    return f"{smallest} to {largest}, {median} in the median"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
