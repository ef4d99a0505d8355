"""The choices that tools/choices.py measures, and the variants of each.

A variant is a provider of an op's benchmark and a context in which its calls run: another plan,
another form, another router.
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

LIBRARY = "the library's own"
Wrap = Callable[[], contextlib.AbstractContextManager]
Variants = dict[str, tuple[str, Wrap]]  # name -> provider of the op, context of its calls


@dataclass(frozen=True)
class Choice:
    """One choice of the library: the ``cases`` of ``op`` to measure, and the ``variants``.

    Without variants, the tiles of each case are varied (:func:`tile_variants`).
    """

    op: str
    name: str
    cases: Callable[[], list]
    variants: Variants


# ---- forms, passes and backwards -----------------------------------------------------------------


def planned(op: str, change: Callable) -> Wrap:
    """Replace the plans of ``op`` by ``change(plan, *arguments of plan())``."""
    return lambda: replaced_plan(op, change)


def pooling_form(form: str) -> Wrap:
    function = importlib.import_module("mmfused.ops.query_pooling.functional")
    return lambda: mock.patch.object(function, "cheaper_form", lambda *_: form)


def pooling_passes(which: str, passes: str) -> Wrap:
    """Read X once ("one") or twice in the forward or the backward, wherever that is possible."""

    def change(plan, rows, dim, dtype, arch, norm, *_):
        from mmfused.kernels.query_pooling import plans

        hopper, wide_type = arch in (90, 100, 103), dtype == torch.float32
        if passes == "one":
            few = plans.Tile(16, 16 if rows <= 16 else 32, plans.column_chunk(dim), 8, 1)
            tiles = {"onepass": few}
        else:
            kernels = ("logits", "pool") if which == "forward" else ("dlogits", "dx", "dq")
            tiles = plans._two_reads(kernels, rows, hopper, wide_type, norm)
        moments = {name: tile for name, tile in getattr(plan, which).items() if name == "moments"}
        return replace(plan, **{which: moments | tiles})

    return planned("query_pooling", change)


def loss_plan(**changes: Any) -> Wrap:
    return planned("masked_info_nce", lambda plan, *_: replace(plan, **changes))


def cross_attention_form(form: str) -> Wrap:
    def context():
        from mmfused.kernels.gated_cross_attention import plans

        return plans.form(form)

    return context


def by_name(op: str, *names: str) -> Callable[[], list]:
    return lambda: [case for case in run.load_op(op).cases("cuda", False) if case.name in names]


def pooling_choices() -> list[Choice]:
    def pooled() -> list:
        custom = run.load_op("query_pooling").custom
        sizes = [(8, 1), (32, 1), (64, 1), (128, 1), (256, 1), (1, 12), (8, 12), (32, 8), (64, 8)]
        return [custom({"B": 256, "L": queries, "H": heads}) for queries, heads in sizes]

    forms = {form: ("auto", pooling_form(form)) for form in ("absorbed", "projected")}
    passes = {
        f"{which} reads X {count}": ("fused", pooling_passes(which, word))
        for which in ("forward", "backward")
        for count, word in (("once", "one"), ("twice", "two"))
    }
    names = ("fluid", "siglip-head", "bottleneck", "fluid-n512")
    return [
        Choice("query_pooling", "form", pooled, forms),
        Choice("query_pooling", "passes", by_name("query_pooling", *names), passes),
    ]


def loss_choices() -> list[Choice]:
    def sizes() -> list:
        custom = run.load_op("masked_info_nce").custom
        return [
            custom({"B": 16384, "D": width, "K": modalities})
            for width in (64, 128, 256)
            for modalities in (1, 4)
        ]

    ways = {way: ("fused", loss_plan(backward=way)) for way in ("owner", "chunked")}
    chunks = {
        f"{size} MiB of dS": ("fused", loss_plan(chunk_bytes=size * 2**20))
        for size in (32, 128, 512, 2048)
    }
    large = by_name("masked_info_nce", "clip-65536", "clip-65536-k4")
    return [
        Choice("masked_info_nce", "backward", sizes, ways),
        Choice("masked_info_nce", "chunk", large, chunks),
    ]


def choices() -> list[Choice]:
    """Return every choice that the library makes by a rule or a table."""
    plain = contextlib.nullcontext
    forms = {form: ("fused", cross_attention_form(form)) for form in ("epilogue", "block")}
    layers = ("uniecs", "uniecs-missing", "uniecs-n50", "uniecs-n512")
    routers: Variants = {"triton": ("fused", plain), "C++": ("fused C++", plain)}
    logits = ("logits-16384", "logits-16384-s3", "logits-8192-e128")
    routed = by_name("topk_routing", *logits, "fluid-512", "x-32768-e128")
    return [
        *pooling_choices(),
        *loss_choices(),
        Choice("gated_cross_attention", "form", by_name("gated_cross_attention", *layers), forms),
        Choice("topk_routing", "router", routed, routers),
    ]


# ---- tiles ---------------------------------------------------------------------------------------


def tile_variants(op: ModuleType, name: str, case: Any, settings: run.Settings) -> Variants:
    """Return variants that each change one field of one tile that this case's launches use."""
    problem, seen = op.make(case, settings.device, settings.dtype), {}

    def note(plan, *arguments):
        for path, tile in tiles_of(plan, arguments):
            seen.setdefault(path, tile)
        return plan

    provider = op.PROVIDERS["fused"](case, settings.device, settings.dtype).load(problem.parameters)
    with planned(name, note)():
        provider.both(tuple(problem.inputs.values()), problem.upstream)
    variants: Variants = {LIBRARY: ("fused", contextlib.nullcontext)}
    for path, tile in seen.items():
        for field, value in neighbours(tile):
            label = f"{'.'.join(path)}: {field} {getattr(tile, field)} -> {value}"
            change = functools.partial(with_field, path, field, value)
            variants[label] = ("fused", planned(name, change))
    return variants


def tiles_of(plan: Any, arguments: tuple) -> list[tuple[tuple[str, ...], Any]]:
    """Return (path, tile) of all tiles of a plan.

    If a plan is itself a tile (grouped_mlp), its path is its kind, the first argument of plan().
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
    """Return half and double each size and the number of warps, and one stage more or less."""
    found = []
    for name, value in asdict(tile).items():
        if name == "num_stages":
            found += [(name, near) for near in (value - 1, value + 1) if near >= 1]
        elif name == "num_warps":
            found += [(name, near) for near in (value // 2, 2 * value) if 1 <= near <= 16]
        elif name.startswith("B") and value:
            found += [(name, near) for near in (value // 2, 2 * value) if near >= 16]
    return found


def with_field(path: tuple[str, ...], name: str, value: int, plan: Any, *arguments: Any) -> Any:
    """Return the plan with one field of the tile at ``path`` changed, if it has that tile."""
    tile = dict(tiles_of(plan, arguments)).get(path)
    if tile is None:
        return plan
    changed = replace(tile, **{name: value})
    if tile is plan:
        return changed
    if len(path) == 2:
        changed = getattr(plan, path[0]) | {path[1]: changed}
    return replace(plan, **{path[0]: changed})
