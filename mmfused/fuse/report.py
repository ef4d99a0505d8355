"""The report of :func:`mmfused.fuse` and its printed table."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from itertools import zip_longest

_PAGE = "https://mmfused.github.io/mmfused/fuse.html"
_WIDTH = 100  # characters per line
_GAP = "  "
_MAX_WIDTHS = (30, 26, 7)  # of the first three columns
_HEADER = ("module", "class", "", "what it does now, or why it was left")


@dataclass
class FuseReport:
    """What :func:`fuse` did to each known module; ``str`` of the report is a table.

    All keys are qualified names; "" is the root. Benefits are not measured: "by count" marks a
    number that is calculated from tensor sizes.

    Attributes:
        swapped: what each swapped module does now.
        left: why each known module that was not swapped was left unchanged.
        expected: the expected benefit of each swapped module, and when to expect no benefit.
        classes: the name of each module's original class.

    Examples:
        >>> import torch, mmfused
        >>> report = mmfused.fuse(torch.nn.TransformerDecoderLayer(32, 4))
        >>> list(report.swapped)
        ['multihead_attn']
        >>> report.left
        {'self_attn': 'Self-attention: its tokens are its queries.'}
        >>> print(report)
        fuse: 1 swapped, 1 left
        module          class                        what it does now, or why it was left
        multihead_attn  MultiheadAttention  swapped  pools, or attends to another input, ...
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = []
        for name, text in self.swapped.items():
            expected = self.expected.get(name)
            text = f"{text}.\nexpected: {expected}." if expected else f"{text}."
            rows.append((name, self.classes.get(name, ""), "swapped", text))
        for name, text in self.left.items():
            rows.append((name, self.classes.get(name, ""), "left", text))
        title = f"fuse: {len(self.swapped)} swapped, {len(self.left)} left"
        if not rows:
            title += f". No module that fuse knows; {_PAGE} lists them."
        return "\n".join([title, *_table(rows)])


class _NameWrapper(textwrap.TextWrapper):
    """Wrap names after dots and before capitals."""

    wordsep_simple_re = re.compile(r"(?<=\.)|(?<=[a-z0-9])(?=[A-Z])")


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Return the table's lines; rows that are equal except for digits in the name are merged."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        groups.setdefault((re.sub(r"\d+", "*", name), *rest), []).append(name or "(root)")
    cells: list[tuple[str, ...]] = [_HEADER] if groups else []
    for (pattern, *rest), names in groups.items():
        cells.append((names[0] if len(names) == 1 else f"{pattern} ({len(names)})", *rest))
    widths = []
    for column, most in enumerate(_MAX_WIDTHS):
        widths.append(min(max((len(row[column]) for row in cells), default=0), most))
    widths.append(_WIDTH - sum(widths) - 3 * len(_GAP))
    return [line for row in cells for line in _lines(row, widths)]


def _lines(row: tuple[str, ...], widths: list[int]) -> list[str]:
    columns: list[list[str]] = []
    for cell, width in zip(row, widths, strict=True):
        wrapper = _NameWrapper if len(columns) < 3 else textwrap.TextWrapper
        wrap = wrapper(width, break_on_hyphens=False).wrap
        columns.append([line for part in cell.splitlines() for line in wrap(part)])
    lines = []
    for cells in zip_longest(*columns, fillvalue=""):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(_GAP.join(padded).rstrip())
    return lines
