"""Each mechanism beside those it was preferred to, and each tile beside its neighbours: ``python
tools/choices.py``.

The library decides by fixed rules and tables (``form="auto"``, kernels/*/plans.py). Here they are
measured: every variant passes the gate of its op's benchmark and is then timed in turn with the
others, as run.py times providers. What comes out is for a person to read and to write into the
tables; benchmarks/NOTES.md keeps what was expected of it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import torch

if not __package__:  # run as a file: the checkout it lies in comes first, whatever is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import measure, report, run
from mmfused.benchmarks.sources import source_hash

LIBRARY = "as the library does"
Wrap = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Choice:
    """``cases`` of ``op`` that decide it; ``variants``: by name, a provider of the op and what its
    calls run in.
    """

    op: str
    name: str
    cases: Callable[[], list]
    variants: dict[str, tuple[str, Wrap]]


# ---- the choices ---------------------------------------------------------------------------------


def planned(op: str, change: Callable) -> Wrap:
    """Kernels of ``op`` run with ``change(plan, *what it was asked for)`` in place of their plan."""

    @contextlib.contextmanager
    def context():
        kernels = importlib.import_module(f"mmfused.kernels.{op}")
        with mock.patch.object(kernels, "plan", functools.partial(_changed, kernels.plan, change)):
            yield

    return context


def _changed(plan: Callable, change: Callable, *asked):
    return change(plan(*asked), *asked)


def pooling_form(form: str) -> Wrap:
    function = importlib.import_module("mmfused.ops.query_pooling.functional")
    return lambda: mock.patch.object(function, "cheaper_form", lambda *_: form)


def pooling_passes(which: str, passes: str) -> Wrap:
    """``which`` of forward and backward reads X once or twice, wherever it may."""

    def change(plan, rows, dim, dtype, arch, *_):
        from mmfused.kernels.query_pooling import plans

        hopper, wide_type = arch in (90, 100, 103), dtype == torch.float32
        if passes == "one":
            few = plans.Tile(16, 16 if rows <= 16 else 32, plans.column_chunk(dim), 8, 1)
            tiles = {"onepass": few}
        else:
            kernels = ("logits", "pool") if which == "forward" else ("dlogits", "dx", "dq")
            tiles = plans._two_reads(kernels, rows, hopper, wide_type)
        kept = {name: tile for name, tile in getattr(plan, which).items() if name == "moments"}
        return replace(plan, **{which: kept | tiles})

    return planned("query_pooling", change)


def loss_plan(**changes) -> Wrap:
    return planned("masked_info_nce", lambda plan, *_: replace(plan, **changes))


def cross_attention_form(form: str) -> Wrap:
    def context():
        from mmfused.kernels.gated_cross_attention import plans

        return plans.form(form)

    return context


def choices() -> list[Choice]:
    from mmfused.benchmarks import (
        gated_cross_attention_cases,
        masked_info_nce,
        query_pooling,
        topk_routing,
    )

    def by_name(module, *names):
        return [case for case in module.CASES if case.name in names]

    def pooled(queries, heads):
        return query_pooling.custom({"B": 256, "L": queries, "H": heads})

    many = [(8, 1), (32, 1), (64, 1), (128, 1), (256, 1), (1, 12), (8, 12), (32, 8), (64, 8)]
    plain = contextlib.nullcontext
    return [
        Choice(
            "query_pooling",
            "form",
            lambda: [pooled(*sizes) for sizes in many],
            {form: ("auto", pooling_form(form)) for form in ("absorbed", "projected")},
        ),
        Choice(
            "query_pooling",
            "passes",
            lambda: by_name(query_pooling, "fluid", "siglip-head", "bottleneck", "fluid-n512"),
            {
                f"{which} reads X {count}": ("fused", pooling_passes(which, word))
                for which in ("forward", "backward")
                for count, word in (("once", "one"), ("twice", "two"))
            },
        ),
        Choice(
            "masked_info_nce",
            "backward",
            lambda: [
                masked_info_nce.custom({"B": 16384, "D": width, "K": k})
                for width in (64, 128, 256)
                for k in (1, 4)
            ],
            {way: ("fused", loss_plan(backward=way)) for way in ("owner", "chunked")},
        ),
        Choice(
            "masked_info_nce",
            "chunk",
            lambda: by_name(masked_info_nce, "clip-65536", "clip-65536-k4"),
            {
                f"{size} MiB of dS": ("fused", loss_plan(chunk_bytes=size * 2**20))
                for size in (32, 128, 512, 2048)
            },
        ),
        Choice(
            "gated_cross_attention",
            "form",
            lambda: by_name(
                gated_cross_attention_cases, "uniecs", "uniecs-missing", "uniecs-n50", "uniecs-n512"
            ),
            {form: ("fused", cross_attention_form(form)) for form in ("epilogue", "block")},
        ),
        Choice(
            "topk_routing",
            "router",
            lambda: by_name(
                topk_routing,
                "logits-16384",
                "logits-16384-s3",
                "logits-8192-e128",
                "fluid-512",
                "x-32768-e128",
            ),
            {"triton": ("fused", plain), "C++": ("fused C++", plain)},
        ),
    ]


# ---- tiles ---------------------------------------------------------------------------------------


def tile_variants(op, name: str, case, settings: run.Settings) -> dict[str, tuple[str, Wrap]]:
    """The library's own way, then one change of one tile at a time, of those that this case's
    launches ask for.
    """
    problem, seen = op.make(case, settings.device, settings.dtype), {}

    def listen(plan, *asked):
        for path, tile in tiles_of(plan, asked):
            seen.setdefault(path, tile)
        return plan

    provider = op.PROVIDERS["fused"](case, settings.device, settings.dtype).load(problem.parameters)
    with planned(name, listen)():
        provider.both(tuple(problem.inputs.values()), problem.upstream)
    variants = {LIBRARY: ("fused", contextlib.nullcontext)}
    for path, tile in seen.items():
        for field, value in neighbours(tile):
            label = f"{'.'.join(path)}: {field} {getattr(tile, field)} -> {value}"
            variants[label] = ("fused", planned(name, functools.partial(_with, path, field, value)))
    return variants


def tiles_of(plan, asked: tuple) -> list[tuple[tuple[str, ...], object]]:
    """(path, tile) of all tiles of a plan; one that is a tile itself, grouped_mlp's, has the kind
    asked for as its path.
    """
    if hasattr(plan, "num_warps"):
        return [((str(asked[0]),), plan)]
    found = []
    for name in (field.name for field in fields(plan)):
        value = getattr(plan, name)
        parts = (
            {(name, key): tile for key, tile in value.items()}
            if isinstance(value, dict)
            else {(name,): value}
        )
        found += [(path, tile) for path, tile in parts.items() if hasattr(tile, "num_warps")]
    return found


def neighbours(tile) -> list[tuple[str, int]]:
    """Half and twice of each size and of the warps, one stage more or less."""
    found = []
    for name, value in asdict(tile).items():
        if name == "num_stages":
            found += [(name, near) for near in (value - 1, value + 1) if near >= 1]
        elif name == "num_warps":
            found += [(name, near) for near in (value // 2, 2 * value) if 1 <= near <= 16]
        elif name.startswith("B") and value:
            found += [(name, near) for near in (value // 2, 2 * value) if near >= 16]
    return found


def _with(path: tuple[str, ...], name: str, value: int, plan, *asked):
    """The plan with one field of the tile at ``path`` changed, where it has that tile."""
    tile = dict(tiles_of(plan, asked)).get(path)
    if tile is None:
        return plan
    changed = replace(tile, **{name: value})
    if tile is plan:
        return changed
    return replace(
        plan,
        **{path[0]: getattr(plan, path[0]) | {path[1]: changed} if len(path) == 2 else changed},
    )


# ---- running -------------------------------------------------------------------------------------


def compare(op, case, variants: dict[str, tuple[str, Wrap]], settings: run.Settings) -> dict:
    """Gate and samples of each variant of one case."""
    builders = {name: functools.partial(_build, op, *parts) for name, parts in variants.items()}
    problem = op.make(case, settings.device, settings.dtype)
    check = measure.AccuracyCheck(
        types.SimpleNamespace(**{**vars(op), "PROVIDERS": builders}), case, problem
    )
    providers, found = {}, {}
    for name in builders:
        if settings.budget.spent():
            found[name] = {
                "gate": "skipped",
                "reasons": [f"the budget of {settings.budget.limit:.0f} s was spent"],
            }
            continue
        provider, found[name] = check.admit(name, None)
        print(
            f"{case.name}: {name}: {'; '.join([found[name]['gate'], *found[name]['reasons']])}",
            flush=True,
        )
        if provider is not None:
            providers[name] = provider
    del check
    if settings.device.type == "cuda":
        times, refused = measure.graph_seconds(providers, problem, settings.repeats, True)
        for name, why in refused.items():
            found[name]["reasons"].append(why)
    else:
        times = measure.eager_seconds(providers, problem, settings.repeats, True)
    for name, passes in times.items():
        found[name]["seconds"] = passes
    return found


def _build(
    op,
    name: str,
    wrap: Wrap,
    case,
    device: torch.device,
    dtype: torch.dtype,
) -> measure.Provider:
    provider = op.PROVIDERS["composed" if name == "auto" else name](case, device, dtype)
    if name == "auto":
        provider.backend = "auto"
    if wrap is not contextlib.nullcontext:
        provider.within = wrap
    return provider


def small(case):
    """A size that Triton's interpreter runs in seconds."""
    limits = {"B": 3, "N": 20, "M": 9, "T": 40, "D": 64, "I": 32, "L": 4, "H": 4, "E": 8, "k": 2}
    return replace(
        case,
        **{name: min(size, limits[name]) for name, size in asdict(case).items() if name in limits},
    )


def table(found: dict[str, dict]) -> str:
    """Medians of forward and backward by case, the fastest in bold."""
    names = list(dict.fromkeys(name for variants in found.values() for name in variants))
    lines = [["case", *names], ["---"] * (1 + len(names))]
    for case, variants in found.items():
        times = medians(variants)
        shown = {name: f"{1e3 * time:.3f} ms" for name, time in times.items()}
        cells = [
            shown.get(name, variants[name]["gate"] if name in variants else "") for name in names
        ]
        best = min(times, key=times.get, default=None)
        lines.append(
            [
                case,
                *(
                    f"**{cell}**" if name == best else cell
                    for name, cell in zip(names, cells, strict=True)
                ),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tiles_table(variants: dict[str, dict]) -> str:
    """The fastest first, beside how many times faster than the library's own tiles they are."""
    times = medians(variants)
    own = times.get(LIBRARY, float("nan"))
    lines = [
        f"| {name} | {1e3 * time:.3f} ms | {own / time:.3f} |"
        for name, time in sorted(times.items(), key=lambda x: x[1])
    ]
    lines += [
        f"| {name} | {'; '.join([v['gate'], *v['reasons']])} | |"
        for name, v in variants.items()
        if name not in times
    ]
    return "\n".join(["| change | forward + backward | times faster |", "|---|---|---|", *lines])


def medians(variants: dict[str, dict]) -> dict[str, float]:
    return {
        name: statistics.median(v["seconds"]["both"])
        for name, v in variants.items()
        if "seconds" in v
    }


# ---- the request ---------------------------------------------------------------------------------


def measure_choices(args: argparse.Namespace) -> int:
    """0, or 3 where variants wait for another run. What the gate refuses is in the table: a variant
    owes nobody to be right.
    """
    asked = asked_choices(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    budget = measure.Budget(args.budget_seconds)
    settings = run.Settings(
        device, dtype, 1 if args.quick else args.repeats, True, False, args.quick, budget
    )
    facts = report.environment(device) | {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds")
    }
    folder = Path(
        args.out or (run.SCRATCH if args.quick else run.RESULTS / report.slug(facts["device"]))
    )
    waiting = []
    for choice in asked:
        op, path = run.load_op(choice.op), folder / f"choices-{choice.op}-{choice.name}.json"
        fresh = {
            "choice": choice.name,
            "op": f"choices of {choice.op}",
            "settings": settings.facts(),
            "shapes": {},
            "cases": {},
        }
        fresh |= {"environment": facts | {"source": source_hash(choice.op)}}
        record = goes_on(path, fresh)
        for case in choice.cases()[: 1 if args.quick else None]:
            name = case.name
            case = small(case) if args.quick else case
            if name in record["cases"] and not left_out(record["cases"][name]):
                continue
            if budget.spent():
                waiting.append(f"{choice.op} {choice.name} {name}")
                continue
            with (
                mock.patch.object(op, "need_kernels", lambda *_: None)
                if args.quick
                else contextlib.nullcontext()
            ):
                variants = choice.variants or tile_variants(op, choice.op, case, settings)
                record["cases"][name] = compare(op, case, variants, settings)
                record["shapes"][name] = asdict(case)
            waiting += (
                [f"{choice.op} {choice.name} {name}"] if left_out(record["cases"][name]) else []
            )
            report.write_json(record, path)
        tables = (
            map(tiles_table, record["cases"].values()) if args.tiles else [table(record["cases"])]
        )
        print(f"\n{choice.op}: {choice.name}\n", *tables, "", sep="\n", flush=True)
    print(
        f"Raw samples are in {folder}.",
        *([f"For another run: {', '.join(waiting)}."] if waiting else []),
    )
    return run.UNFINISHED if waiting else 0


def asked_choices(args: argparse.Namespace) -> list[Choice]:
    if args.op is not None:
        run.load_op(args.op)  # refuses what is none
    if not args.tiles:
        return [choice for choice in choices() if args.op in (None, choice.op)]
    if args.op is None:
        raise ValueError("op is None; tiles takes the op whose case it names.")
    cases = {case.name: case for case in run.load_op(args.op).cases("cuda", False)}
    if args.tiles not in cases:
        raise ValueError(f"tiles is {args.tiles!r}; {args.op} takes one of {', '.join(cases)}.")
    return [Choice(args.op, f"tiles-{args.tiles}", lambda: [cases[args.tiles]], {})]


def goes_on(path: Path, fresh: dict) -> dict:
    """What ``path`` holds, if it was measured with the same sources, versions and settings; else
    ``fresh``.
    """
    if not path.exists():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(
        found["environment"][name] == fresh["environment"][name]
        for name in ("device", "versions", "source")
    )
    return found if same and found["settings"] == fresh["settings"] else fresh


def left_out(variants: dict[str, dict]) -> bool:
    return any(variant["gate"] == "skipped" for variant in variants.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/choices.py", description="Measure what the library decides by rule or table."
    )
    option = parser.add_argument
    option("--op", metavar="OP", help="only the choices of this op")
    option(
        "--tiles",
        metavar="CASE",
        help="of --op's benchmark: its tiles instead, one change at a time",
    )
    option(
        "--repeats", type=int, default=15, metavar="N", help="samples of each time (default: 15)"
    )
    option(
        "--budget-seconds",
        type=float,
        metavar="S",
        help="try nothing more after these seconds (exit code 3)",
    )
    option(
        "--quick",
        action="store_true",
        help="one tiny case each, interpreted kernels too: shows that all works",
    )
    option(
        "--out",
        metavar="DIR",
        help=f"folder for the results (default: benchmarks/results/<device>, {run.SCRATCH} if --quick)",
    )
    try:
        return measure_choices(parser.parse_args(argv))
    except ValueError as error:
        print(f"tools/choices.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
