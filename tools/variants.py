"""The choices that tools/choices.py measures, and the variants of each choice.

A variant is a provider of the op's benchmark, with a context manager for its calls. The context
manager may replace the plan or the form that the library chooses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from ..benchmarks import run
from .patching import replaced_plan

LIBRARY = "the library's plan"
MakeContext = Callable[[], contextlib.AbstractContextManager]
Variants = dict[str, tuple[str, MakeContext]]  # name -> (provider, maker of a context for calls)


@dataclass(frozen=True)
class Choice:
    """Something that the library chooses for ``op``, with the cases and variants to measure.

    If ``variants`` is empty, the variants of a case are those of :func:`tile_variants`.
    """

    op: str
    name: str
    cases: Callable[[], list]
    variants: Variants


# ---- plans and forms -----------------------------------------------------------------------------


def changed_plan(op: str, change: Callable) -> MakeContext:
    """Make contexts that replace each result of ``plan(*args)`` by ``change(result, *args)``."""
    return lambda: replaced_plan(op, change)


def pooling_form(form: str) -> MakeContext:
    function = importlib.import_module("mmfused.ops.query_pooling.functional")
    return lambda: mock.patch.object(function, "cheaper_form", lambda *_: form)


def pooling_passes(reads: str) -> MakeContext:
    """Make contexts in which the forward reads X once ("one") or twice ("two")."""

    def change(plan, rows, dim, dtype, arch, norm, *_):
        from mmfused.kernels.query_pooling import plans

        big_shared, float32 = arch in (90, 100, 103), dtype == torch.float32
        if reads == "one":
            tiles = {"onepass": plans.Tile(16, 16, max(128, plans.column_chunk(dim)), 8, 1)}
        else:
            tiles = plans._tiles_of(("logits", "pool"), rows, big_shared, float32, norm)
        moments = {name: tile for name, tile in plan.forward.items() if name == "moments"}
        return replace(plan, forward=moments | tiles)

    return changed_plan("query_pooling", change)


def pooling_kernels() -> MakeContext:
    """Make contexts in which many rows of queries run as they do with padding."""
    from mmfused.kernels.query_pooling.plans import plan as original

    return changed_plan("query_pooling", lambda plan, *args: original(*args[:-1], padded=True))


def pooling_chunk(size: int) -> MakeContext:
    """Make contexts in which chunks of S have ``size`` MiB."""
    products = importlib.import_module("mmfused.kernels.query_pooling.products")
    return lambda: mock.patch.object(products, "CHUNK_BYTES", size * 2**20)


def loss_plan(**changes: Any) -> MakeContext:
    return changed_plan("masked_info_nce", lambda plan, *_: replace(plan, **changes))


def cases_named(op: str, *names: str) -> Callable[[], list]:
    return lambda: [case for case in run.load_op(op).cases("cuda", False) if case.name in names]


def pooling_choices() -> list[Choice]:
    def pooled() -> list:
        custom = run.load_op("query_pooling").custom
        sizes = [(8, 1), (32, 1), (64, 1), (128, 1), (256, 1), (1, 12), (8, 12), (32, 8), (64, 8)]
        return [custom({"B": 256, "L": queries, "H": heads}) for queries, heads in sizes]

    forms = {form: ("auto", pooling_form(form)) for form in ("absorbed", "projected")}
    passes = {
        f"forward reads X {count}": ("fused", pooling_passes(word))
        for count, word in (("once", "one"), ("twice", "two"))
    }
    names = ("fluid", "siglip-head", "bottleneck", "fluid-n512")
    many = {"kernels": ("fused", pooling_kernels())}
    many |= {f"{size} MiB of S": ("fused", pooling_chunk(size)) for size in (16, 64, 256)}
    rows = cases_named("query_pooling", "fluid-h8-b128", "fluid-h8-b1024")
    return [
        Choice("query_pooling", "form", pooled, forms),
        Choice("query_pooling", "passes", cases_named("query_pooling", *names), passes),
        Choice("query_pooling", "many rows", rows, many),
    ]


def loss_choices() -> list[Choice]:
    def sizes() -> list:
        custom = run.load_op("masked_info_nce").custom
        return [
            custom({"B": 16384, "D": width, "K": modalities})
            for width in (64, 128, 256)
            for modalities in (1, 4)
        ]

    backwards = {name: ("fused", loss_plan(backward=name)) for name in ("owner", "chunked")}
    chunks = {
        f"{size} MiB of dS": ("fused", loss_plan(chunk_bytes=size * 2**20))
        for size in (32, 128, 512, 2048)
    }
    large = cases_named("masked_info_nce", "clip-65536", "clip-65536-k4")
    return [
        Choice("masked_info_nce", "backward", sizes, backwards),
        Choice("masked_info_nce", "chunk", large, chunks),
    ]


def choices() -> list[Choice]:
    """Return the choices that are measured if no tiles are requested."""
    unchanged = contextlib.nullcontext
    routers: Variants = {"triton": ("fused", unchanged), "C++": ("fused C++", unchanged)}
    logits = ("logits-16384", "logits-16384-s3", "logits-8192-e128")
    routed = cases_named("topk_routing", *logits, "fluid-512", "x-32768-e128")
    return [
        *pooling_choices(),
        *loss_choices(),
        Choice("topk_routing", "router", routed, routers),
    ]


# ---- tiles ---------------------------------------------------------------------------------------


def tile_variants(op: ModuleType, name: str, case: Any, settings: run.Settings) -> Variants:
    """Return the library's plan, and plans that differ from it in one field of one tile."""
    problem, tiles = op.make(case, settings.device, settings.dtype), {}

    def collect(plan, *arguments):
        for path, tile in tiles_of(plan, arguments):
            tiles.setdefault(path, tile)
        return plan

    provider = op.PROVIDERS["fused"](case, settings.device, settings.dtype).load(problem.parameters)
    with changed_plan(name, collect)():
        provider.both(tuple(problem.inputs.values()), problem.upstream)
    variants: Variants = {LIBRARY: ("fused", contextlib.nullcontext)}
    for path, tile in tiles.items():
        for field, value in neighbours(tile):
            label = f"{'.'.join(path)}: {field} {getattr(tile, field)} -> {value}"
            change = functools.partial(with_field, path, field, value)
            variants[label] = ("fused", changed_plan(name, change))
    return variants


def tiles_of(plan: Any, arguments: tuple) -> list[tuple[tuple[str, ...], Any]]:
    """Return (path, tile) of all tiles in a plan.

    A path is the name of a field, followed by a key if the field is a dict. In grouped_mlp a plan
    is a single tile, whose path is the first argument of plan().
    """
    if hasattr(plan, "num_warps"):
        return [((str(arguments[0]),), plan)]
    found = []
    for name in (field.name for field in fields(plan)):
        value = getattr(plan, name)
        parts = {(name,): value}
        if isinstance(value, dict):
            parts = {(name, key): tile for key, tile in value.items()}
        found += [(path, tile) for path, tile in parts.items() if hasattr(tile, "num_warps")]
    return found


def neighbours(tile: Any) -> list[tuple[str, int]]:
    """Return (field, new value): sizes and warps halved or doubled, stages one more or less."""
    found = []
    for name, value in asdict(tile).items():
        if name == "num_stages":
            found += [(name, new) for new in (value - 1, value + 1) if new >= 1]
        elif name == "num_warps":
            found += [(name, new) for new in (value // 2, 2 * value) if 1 <= new <= 16]
        elif name.startswith("B") and value:
            found += [(name, new) for new in (value // 2, 2 * value) if new >= 16]
    return found


def with_field(path: tuple[str, ...], name: str, value: int, plan: Any, *arguments: Any) -> Any:
    """Return the plan with one field of the tile at ``path`` changed, if the plan has that tile."""
    tile = dict(tiles_of(plan, arguments)).get(path)
    if tile is None:
        return plan
    changed = replace(tile, **{name: value})
    if tile is plan:
        return changed
    if len(path) == 2:
        changed = getattr(plan, path[0]) | {path[1]: changed}
    return replace(plan, **{path[0]: changed})
