"""Draw a contact sheet: small pictures of some items of a data set with their texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .folder import ProductFolder
from .pictures import BrokenPicture
from .report import spread

if TYPE_CHECKING:
    import torch

    from .pair_items import PairItems
    from .pair_sets import PairSet

MOST = 48  # items of a sheet
COLUMNS = 8
SIDE = 144  # of a picture, in pixels
GAP = 8
LINE = 16  # height of a line of text
LINES = 3
CELL = SIDE + GAP, SIDE + LINES * LINE + GAP
GREY = (230, 230, 230)


class Cell(NamedTuple):
    """One item of a sheet."""

    image: torch.Tensor | None  # (3, SIDE, SIDE) uint8
    heading: str
    text: str


def product_cells(products: ProductFolder, most: int = MOST) -> list[Cell]:
    """Return items of a product set, evenly spread over its classes, by label."""
    names = products.class_names
    cells = []
    for row in rows_of_groups(products.labels, most).tolist():
        label = products.labels[row]
        heading = "no label" if label < 0 else str(label) if names is None else names[label]
        cells.append(Cell(_image(products, row), heading, products.texts[row]))
    return cells


def pair_cells(pairs: PairSet, most: int = MOST) -> list[Cell]:
    """Return queries, each followed by its first positive, evenly spread over the tasks."""
    cells = []
    for query in rows_of_groups(pairs.tasks, most // 2).tolist():
        task = pairs.task_names[pairs.tasks[query]]
        for role, row in (("query", pairs.queries[query]), ("positive", pairs.positives[query][0])):
            text = pairs.items.texts[int(row)]
            cells.append(Cell(_image(pairs.items, int(row)), f"{role}, {task}", text))
    return cells


def _image(dataset: ProductFolder | PairItems, row: int) -> torch.Tensor | None:
    try:
        return dataset.load_image(row, SIDE)
    except BrokenPicture:
        return None


def rows_of_groups(groups: Sequence[int] | np.ndarray, most: int) -> np.ndarray:
    """Return at most ``most`` rows, by group, as many of each group as possible.

    Of more groups than ``most``, evenly spaced ones are taken. The rows of a group are evenly
    spaced.

    Examples:
        >>> from mmfused.data.contact_sheet import rows_of_groups
        >>> rows_of_groups([0, 0, 0, 0, 0, 1, 2, 2], 5).tolist()
        [0, 4, 5, 6, 7]
    """
    _, owner, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    counts = np.zeros_like(sizes)
    if len(sizes) > most:
        counts[spread(len(sizes), most)] = 1
    else:
        while (left := min(most, len(owner)) - counts.sum()) > 0:
            unfinished = np.flatnonzero(counts < sizes)
            share = max(1, left // len(unfinished))
            chosen = unfinished[:left]
            counts[chosen] = np.minimum(sizes[chosen], counts[chosen] + share)
    rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])
    return np.concatenate(
        [
            of_group[spread(len(of_group), count)]
            for of_group, count in zip(rows, counts, strict=True)
        ]
    )


def write_sheet(path: Path, cells: Iterable[Cell]) -> None:
    """Write a PNG with the cells in rows of eight; a grey square stands for no picture."""
    cells = list(cells)
    font = _font()
    width, height = CELL
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (GAP + min(COLUMNS, len(cells)) * width, GAP + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left = GAP + number % COLUMNS * width
        top = GAP + number // COLUMNS * height
        if cell.image is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), GREY)
        else:
            sheet.paste(Image.fromarray(cell.image.permute(1, 2, 0).numpy()), (left, top))
        lines = [*_lines(font, cell.heading, 1), *_lines(font, cell.text, LINES - 1)]
        for line, text in enumerate(lines):
            draw.text((left, top + SIDE + 2 + line * LINE), text, "black", font)
    sheet.save(path, "PNG")


def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, which has Latin, Greek and Cyrillic letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 11)


def _lines(font: ImageFont.FreeTypeFont, text: str, count: int) -> list[str]:
    """Return the text in at most ``count`` lines as wide as a picture, shortened by an ellipsis."""
    rest = " ".join(text[:500].split())
    lines = []
    while rest and len(lines) < count:
        is_last = len(lines) == count - 1
        fits = _fitting(font, rest)
        if fits == len(rest):
            lines.append(rest)
        elif is_last:
            lines.append(rest[: _fitting(font, rest, "…")] + "…")
        else:
            space = rest.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
            lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    return lines


def _fitting(font: ImageFont.FreeTypeFont, text: str, end: str = "") -> int:
    """Return how many of the first letters of ``text`` fit beside each other, at least one."""
    count = min(len(text), SIDE)
    while count > 1 and font.getlength(text[:count] + end) > SIDE:
        count -= 1
    return count
