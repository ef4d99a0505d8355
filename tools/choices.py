"""Time the forms and tile sizes that the library chooses automatically, and their alternatives.

    python tools/choices.py [--op OP [--tiles CASE]]

Each variant (tools/variants.py) must first pass the accuracy check of its op's benchmark. The
variants of a case are then timed in turn, like the providers in benchmarks/run.py. The
script changes nothing in the library.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import types
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import measure, report, run
from mmfused.benchmarks.sources import source_hash
from mmfused.tools.variants import LIBRARY, Choice, MakeContext, Variants, choices, tile_variants

# ---- running -------------------------------------------------------------------------------------


def compare(
    op: types.ModuleType,
    case: Any,
    variants: Variants,
    settings: run.Settings,
) -> dict[str, dict]:
    """Check and time each variant of one case.

    Returns one entry per variant, to store in the record. The key "gate" of an entry is the result
    of the accuracy check.
    """
    builders = {name: functools.partial(_build, op, *parts) for name, parts in variants.items()}
    problem = op.make(case, settings.device, settings.dtype)
    op_with_variants: Any = types.SimpleNamespace(**{**vars(op), "PROVIDERS": builders})
    check = measure.AccuracyCheck(op_with_variants, case, problem)
    providers, entries = {}, {}
    for name in builders:
        if settings.budget.spent():
            reason = f"the budget of {settings.budget.limit:.0f} s was spent"
            entries[name] = {"gate": "skipped", "reasons": [reason]}
            continue
        provider, entry = check.admit(name, None)
        print(f"{case.name}: {name}: {'; '.join([entry['gate'], *entry['reasons']])}", flush=True)
        entries[name] = entry
        if provider is not None:
            providers[name] = provider
    del check
    if settings.device.type == "cuda":
        times, without_graph = measure.graph_seconds(providers, problem, settings.repeats, True)
        for name, reason in without_graph.items():
            entries[name]["reasons"].append(reason)
    else:
        times = measure.eager_seconds(providers, problem, settings.repeats, True)
    for name, passes in times.items():
        entries[name]["seconds"] = passes
    return entries


def _build(
    op: types.ModuleType,
    name: str,
    make_context: MakeContext,
    case: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> measure.Provider:
    provider = op.PROVIDERS["composed" if name == "auto" else name](case, device, dtype)
    if name == "auto":
        provider.backend = "auto"
    if make_context is not contextlib.nullcontext:
        provider.within = make_context
    return provider


def small(case: Any) -> Any:
    """Return the case with sizes small enough for Triton's interpreter."""
    limits = {"B": 3, "N": 20, "M": 9, "T": 40, "D": 64, "I": 32, "L": 4, "H": 4, "E": 8, "k": 2}
    sizes = {name: size for name, size in asdict(case).items() if name in limits}
    return replace(case, **{name: min(size, limits[name]) for name, size in sizes.items()})


# ---- tables --------------------------------------------------------------------------------------


def table(found: dict[str, dict]) -> str:
    """Return a table with the median time of forward + backward of each case and variant.

    The fastest variant of each case is in bold.
    """
    names = list(dict.fromkeys(name for variants in found.values() for name in variants))
    lines = [["case", *names], ["---"] * (1 + len(names))]
    for case, variants in found.items():
        times = medians(variants)
        best = min(times, key=times.__getitem__, default=None)
        cells = []
        for name in names:
            cell = variants[name]["gate"] if name in variants else ""
            if name in times:
                cell = f"{1e3 * times[name]:.3f} ms"
            cells.append(f"**{cell}**" if name == best else cell)
        lines.append([case, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tiles_table(variants: dict[str, dict]) -> str:
    """Return a table of the variants, fastest first, with speed-ups over the library's plan."""
    times = medians(variants)
    library = times.get(LIBRARY, float("nan"))
    lines = [
        f"| {name} | {1e3 * time:.3f} ms | {library / time:.3f} |"
        for name, time in sorted(times.items(), key=lambda pair: pair[1])
    ]
    lines += [
        f"| {name} | {'; '.join([entry['gate'], *entry['reasons']])} | |"
        for name, entry in variants.items()
        if name not in times
    ]
    return "\n".join(["| change | forward + backward | speed-up |", "|---|---|---|", *lines])


def medians(variants: dict[str, dict]) -> dict[str, float]:
    return {
        name: statistics.median(entry["seconds"]["both"])
        for name, entry in variants.items()
        if "seconds" in entry
    }


# ---- the command ---------------------------------------------------------------------------------


def measure_choices(args: argparse.Namespace) -> int:
    """Measure the requested choices.

    Returns 0, or 3 if the budget ran out before all cases were measured. A variant that fails the
    accuracy check is shown in the table; it is not an error.
    """
    requested = requested_choices(args)
    settings = chosen_settings(args)
    facts = report.environment(settings.device)
    facts |= {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    usual = run.SCRATCH if args.quick else run.RESULTS / report.slug(facts["device"])
    folder = Path(args.out or usual)
    all_left = []
    for choice in requested:
        record, left = measure_choice(choice, settings, facts, folder)
        all_left += left
        cases = record["cases"]
        tables = map(tiles_table, cases.values()) if args.tiles else [table(cases)]
        print(f"\n{choice.op}: {choice.name}\n", *tables, "", sep="\n", flush=True)
    note = [f"Left for another run: {', '.join(all_left)}."] if all_left else []
    print(f"Raw samples are in {folder}.", *note)
    return run.UNFINISHED if all_left else 0


def measure_choice(
    choice: Choice,
    settings: run.Settings,
    facts: dict,
    folder: Path,
) -> tuple[dict, list[str]]:
    """Measure the cases that the results file of ``choice`` lacks.

    Returns the record, and the names of the cases that the budget left unmeasured or incomplete.
    """
    op, path = run.load_op(choice.op), folder / f"choices-{choice.op}-{choice.name}.json"
    fresh = {
        "choice": choice.name,
        "op": f"choices of {choice.op}",
        "settings": settings.facts(),
        "shapes": {},
        "cases": {},
        "environment": facts | {"source": source_hash(choice.op)},
    }
    record, left = resumed(path, fresh), []
    for case in choice.cases()[: 1 if settings.quick else None]:
        name = case.name
        case = small(case) if settings.quick else case
        if name in record["cases"] and not incomplete(record["cases"][name]):
            continue
        if settings.budget.spent():
            left.append(f"{choice.op} {choice.name} {name}")
            continue
        accept_interpreter = mock.patch.object(op, "need_kernels", lambda *_: None)
        with accept_interpreter if settings.quick else contextlib.nullcontext():
            variants = choice.variants or tile_variants(op, choice.op, case, settings)
            record["cases"][name] = compare(op, case, variants, settings)
            record["shapes"][name] = asdict(case)
        if incomplete(record["cases"][name]):
            left.append(f"{choice.op} {choice.name} {name}")
        report.write_json(record, path)
    return record, left


def chosen_settings(args: argparse.Namespace) -> run.Settings:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run.Settings(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        repeats=1 if args.quick else args.repeats,
        backward=True,
        compiled=False,
        quick=args.quick,
        budget=measure.Budget(args.budget_seconds),
    )


def requested_choices(args: argparse.Namespace) -> list[Choice]:
    if args.op is not None:
        run.load_op(args.op)  # raises for an unknown op
    if not args.tiles:
        return [choice for choice in choices() if args.op in (None, choice.op)]
    if args.op is None:
        raise ValueError("op: got None with tiles, expected the op of the case")
    cases = {case.name: case for case in run.load_op(args.op).cases("cuda", False)}
    if args.tiles not in cases:
        names = ", ".join(cases)
        raise ValueError(f"{args.op}: tiles: got {args.tiles!r}, expected one of {names}")
    return [Choice(args.op, f"tiles-{args.tiles}", lambda: [cases[args.tiles]], {})]


def resumed(path: Path, fresh: dict) -> dict:
    """Return the record in ``path``, or ``fresh`` if the record cannot be continued.

    The device, versions, sources and settings of the record must be those of ``fresh``.
    """
    if not path.exists():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(
        found["environment"][name] == fresh["environment"][name]
        for name in ("device", "versions", "source")
    )
    return found if same and found["settings"] == fresh["settings"] else fresh


def incomplete(variants: dict[str, dict]) -> bool:
    return any(entry["gate"] == "skipped" for entry in variants.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/choices.py",
        description="Time the forms and tile sizes that the library chooses automatically, "
        "and their alternatives.",
    )
    option = parser.add_argument
    option("--op", metavar="OP", help="only the choices of this op")
    tiles = "vary the tiles of this case of --op's benchmark, one change at a time"
    option("--tiles", metavar="CASE", help=tiles)
    repeats = "timing samples per variant (default: 15)"
    option("--repeats", type=int, default=15, metavar="N", help=repeats)
    budget = "seconds after which no case is started (exit status 3 if not all were measured)"
    option("--budget-seconds", type=float, metavar="S", help=budget)
    quick = "a tiny case of each choice, to check the tool; also works with Triton's interpreter"
    option("--quick", action="store_true", help=quick)
    where = f"benchmarks/results/<device>, {run.SCRATCH} if --quick"
    option("--out", metavar="DIR", help=f"folder for the results (default: {where})")
    try:
        return measure_choices(parser.parse_args(argv))
    except ValueError as error:
        print(f"tools/choices.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
