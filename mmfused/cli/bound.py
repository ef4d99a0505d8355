"""``mmfused inspect --bound``: what limits each kernel, counted on the PTX machine.

The counting is in tools/bounds, which is part of a checkout, not of the wheel.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any


def run(args: argparse.Namespace) -> int:
    """Print what limits each launch of the chosen targets."""
    for option in ("arch", "sass"):
        if value := getattr(args, option):
            raise ValueError(f"--{option}: got {value!r}, expected no --bound beside it")
    rows, cards, report = (_tool(name) for name in ("rows", "cards", "report"))
    chosen = [
        (op, case)
        for op, case in rows.ROWS
        if args.op in (None, op) and case in (args.case or (case,))
    ]
    on = _cards(args, cards.CARDS)
    if not chosen:
        known = [case for op, case in rows.ROWS if args.op in (None, op)]
        raise ValueError(f"--case: got {args.case}, expected some of {', '.join(known)}")
    records = []
    for op, case in chosen:
        for card in on:
            print(report.text(op, case, card), flush=True)
            records += report.records(op, case, card) if args.json else []
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0


def _tool(name: str) -> Any:
    try:
        return importlib.import_module(f"mmfused.tools.bounds.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("mmfused.tools"):
            raise
        raise ValueError("--bound: got an installed mmfused, expected a checkout of it") from None


def _cards(args: argparse.Namespace, known: dict[str, Any]) -> list[Any]:
    """Return the cards that the options name; a process compiles for one architecture."""
    for name in args.card or ():
        if name not in known:
            raise ValueError(f"--card: got {name!r}, expected some of {', '.join(known)}")
    cards = [known[name] for name in args.card or ("H200",)]
    if len({card.arch for card in cards}) > 1:
        raise ValueError(f"--card: got {args.card}, expected cards of one architecture")
    return cards
