"""Small sets of pairs in the layouts in which they are published."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path, number=0, size=(8, 6)):
    """Write a picture whose pixels all have the value ``number``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), number, np.uint8)).save(path)


def write(path, rows):
    """Write rows as a JSON list, or as JSON lines, as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return path


def mmeb_row(query, positive, negative="", images=("", "", "")):
    texts = dict(zip(("qry", "pos_text", "neg_text"), (query, positive, negative), strict=True))
    keys = ("qry_image_path", "pos_image_path", "neg_image_path")
    return {**texts, **dict(zip(keys, images, strict=True))}


def text_set(folder: Path, tasks):
    """Write a folder of MMEB with a file for each task, whose rows are (query, positive, ...)."""
    for task, rows in tasks.items():
        write(folder / f"{task}.json", [mmeb_row(*row) for row in rows])
    return folder


def texts_of(pairs, rows):
    return [pairs.items.texts[int(row)] for row in rows]
