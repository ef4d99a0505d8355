"""The alternatives of a plan: other kernels, and tiles that differ in one field.

:func:`why_invalid` states what the launchers assume about a plan (see each ``plans.py``);
:func:`moves` returns only plans for which it holds. The numbers of programs and of partial sums are
left alone, because they make all GPUs of an architecture compute the same sums.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

KERNELS = "kernels"  # the group of whole-plan alternatives
_MIB = 2**20
_LARGEST = {"num_stages": 6, "num_warps": 16, "residents": 4, "halvings": 3}
_REGISTERS = (128, 168, 255)
Path = tuple[str, ...]


class Move(NamedTuple):
    """A change of a plan: what it says in tables, and the changed plan."""

    label: str
    plan: Any


def moves(op: str, arguments: Mapping[str, Any], plan: Any) -> dict[str, list[Move]]:
    """Return the alternatives of a plan, by what they change.

    Args:
        op: the name of the op.
        arguments: those of ``plan()``, as in ``tuned.Reached``.
        plan: the plan to change.

    Returns:
        Other kernels are under "kernels", other numbers under the path of their tile, such as
        "forward.onepass". Every plan is valid.
    """
    found = {KERNELS: list(_alternatives(op, arguments, plan))}
    for path, tile in tiles_of(plan):
        if _is_used(op, plan, path):
            found[_name(path)] = [
                Move(f"{_name(path)}: {name} {getattr(tile, name)} -> {value}", changed)
                for name, value in _neighbours(op, arguments, path, tile)
                for changed in [with_field(plan, path, name, value)]
            ]
    valid = {
        group: [move for move in of_group if why_invalid(op, arguments, move.plan) is None]
        for group, of_group in found.items()
    }
    return {group: of_group for group, of_group in valid.items() if of_group}


# ---- tiles of a plan -----------------------------------------------------------------------------


def tiles_of(plan: Any) -> list[tuple[Path, Any]]:
    """Return (path, tile) of all tiles in a plan.

    A path is the name of a field, followed by a key if the field is a dict. A plan of grouped_mlp
    is a single tile, whose path is empty.
    """
    if hasattr(plan, "num_warps"):
        return [((), plan)]
    found = []
    for name in (field.name for field in fields(plan)):
        value = getattr(plan, name)
        parts = {(name,): value}
        if isinstance(value, dict):
            parts = {(name, key): tile for key, tile in value.items()}
        found += [(path, tile) for path, tile in parts.items() if is_dataclass(tile)]
    return found


def with_field(plan: Any, path: Path, name: str, value: Any) -> Any:
    """Return the plan with one field of the tile at ``path`` changed."""
    tile = replace(dict(tiles_of(plan))[path], **{name: value})
    if not path:
        return tile
    if len(path) == 2:
        tile = getattr(plan, path[0]) | {path[1]: tile}
    return replace(plan, **{path[0]: tile})


def _name(path: Path) -> str:
    return ".".join(path) or "tile"


def _neighbours(
    op: str,
    arguments: Mapping[str, Any],
    path: Path,
    tile: Any,
) -> Iterator[tuple[str, Any]]:
    """Yield (field, value): sizes and warps halved or doubled, other numbers one step away."""
    for name in (field.name for field in fields(tile)):
        value = getattr(tile, name)
        if name in _fixed(op, arguments, path, tile):
            continue
        if name == "maxnreg":
            yield from ((name, other) for other in _next_registers(value))
        elif name in ("num_stages", "residents", "halvings"):
            least = 0 if name == "halvings" else 1
            near = (value - 1, value + 1)
            yield from ((name, other) for other in near if least <= other <= _LARGEST[name])
        elif name == "num_warps":
            near = (value // 2, 2 * value)
            yield from ((name, other) for other in near if 1 <= other <= _LARGEST[name])
        elif value:
            yield from ((name, other) for other in (value // 2, 2 * value) if 1 <= other <= 256)


def _next_registers(value: int | None) -> Iterable[int]:
    if value is None or value not in _REGISTERS:
        return (168, 255)
    at = _REGISTERS.index(value)
    return [_REGISTERS[i] for i in (at - 1, at + 1) if 0 <= i < len(_REGISTERS)]


def _fixed(op: str, arguments: Mapping[str, Any], path: Path, tile: Any) -> set[str]:
    """Return the fields of a tile that must stay as they are."""
    if type(tile).__name__ == "HopperTile":  # rows and chunks are given, slots are what fits
        return {"BR", "CHUNKS", "SLOTS"}
    if op == "gated_cross_attention":
        whole = path[0] in ("rows", "together", "d_attend_long")  # BN is the width, or the key
        # If BK holds all terms, the weight stays in shared memory: another kind of kernel.
        keeps = tile.BK == 0 or tile.BK >= _terms(arguments)
        attends = tile.BK == 0
        return (
            ({"BN"} if whole else set())
            | ({"BK"} if keeps else set())
            | ({"PART", "residents"} if attends else set())
        )
    if op == "grouped_mlp" and not arguments["kind"].endswith("weights"):
        return {"BM"}  # the map of tiles has tile_rows() rows
    if op == "masked_info_nce" and path == ("owner",):
        return {"BD"}  # all columns
    if op == "query_pooling":
        if path[-1] in ("short", "moments"):  # a tile holds all tokens; rows do not matter
            return {"BN"} if path[-1] == "short" else {"BR"}
        if path[-1] == "softmax" and tile.BN >= arguments["length"]:
            return {"BN"}  # a tile holds all tokens
    return set()


def _terms(arguments: Mapping[str, Any]) -> int:
    return min(arguments["dim"], arguments["context_dim"])


def _is_used(op: str, plan: Any, path: Path) -> bool:
    """Return whether kernels with this tile run."""
    if op != "masked_info_nce" or path == ("sweep",):
        return True
    used = ("owner",) if plan.backward == "owner" else ("pairs", "apply_ds")
    return path[0] in used


# ---- what the launchers assume -------------------------------------------------------------------


def why_invalid(op: str, arguments: Mapping[str, Any], plan: Any) -> str | None:
    """Return why the launchers cannot run a plan, or None if they can."""
    reasons = {
        "gated_cross_attention": _why_invalid_gated,
        "grouped_mlp": _why_invalid_grouped,
        "masked_info_nce": _why_invalid_loss,
        "query_pooling": _why_invalid_pooling,
        "topk_routing": _why_invalid_routing,
    }[op](arguments, plan)
    return next(iter(reasons), None)


def _why_invalid_gated(arguments: Mapping[str, Any], plan: Any) -> Iterator[str]:
    for path, tile in tiles_of(plan):
        if min(tile.BM, tile.BN) < 16 and path[0] != "rows":
            yield f"{_name(path)}: a product needs 16 rows and columns"
        if 0 < tile.BK < 16 or tile.PART < 16:
            yield f"{_name(path)}: a product needs 16 terms"
        if path[0] in ("rows", "together") and tile.BN < max(
            arguments["dim"], arguments["context_dim"]
        ):
            yield f"{_name(path)}: BN does not hold a row"
        if tile.BK and path[0] != "together" and tile.PART > max(tile.BN, 64):
            yield f"{_name(path)}: PART exceeds BN"


def _why_invalid_grouped(arguments: Mapping[str, Any], tile: Any) -> Iterator[str]:
    from mmfused.kernels.tiles import tile_rows

    if min(tile.BM, tile.BN, tile.BK) < 16:
        yield "a product needs 16 rows, columns and terms"
    if tile.BN >> tile.halvings < 16:
        yield "halvings leave fewer than 16 columns"
    heights = {tile_rows(arguments["rows"] // part, arguments["experts"]) for part in (1, 2)}
    if not arguments["kind"].endswith("weights") and tile.BM not in heights:
        yield "BM is not tile_rows()"


def _why_invalid_loss(arguments: Mapping[str, Any], plan: Any) -> Iterator[str]:
    for path, tile in tiles_of(plan):
        sizes = [size for size in (tile.BM, tile.BN, tile.BK, tile.BD) if size]
        if min(sizes) < 16:
            yield f"{_name(path)}: a product needs 16 rows, columns and terms"
    if plan.apply_ds.BM % plan.pairs.BM or plan.apply_ds.BN % plan.pairs.BN:
        yield "tiles of apply_ds are not made of tiles of pairs"
    if arguments["dtype"] == "float32":
        if plan.sweep != plan.pairs:
            yield "logits of forward and backward would differ in their last bits"
        if plan.backward == "owner":
            yield "logits of forward and backward would differ in their last bits"
    if plan.backward == "owner" and arguments["dim"] > 256:
        yield "the sums of owner do not fit into registers"


def _why_invalid_pooling(arguments: Mapping[str, Any], plan: Any) -> Iterator[str]:
    for path, tile in (*plan.forward.items(), *plan.backward.items()):
        kind = type(tile).__name__
        if kind == "Tile":
            if not (16 <= tile.BN <= 64 and 16 <= tile.BR and 16 <= tile.BD):
                yield f"{path}: expected 16 to 64 tokens, and 16 rows and columns or more"
            if path == "short" and tile.BN < arguments["length"]:
                yield f"{path}: the tile does not hold all tokens"
        elif kind == "SoftmaxTile" and min(tile.BN, tile.BR) < 16:
            yield f"{path}: expected at least 16 tokens and rows"
    # Where one token has all the weight, the gradient is 0 only if both compute the same logits.
    if "softmax" in plan.backward and "softmax" not in plan.forward:
        yield "logits of forward and backward would differ in their last bits"


def _why_invalid_routing(arguments: Mapping[str, Any], plan: Any) -> Iterator[str]:
    if plan.rows.BR < 1:
        yield "rows: expected at least one token"
    if plan.route is not None and plan.route.BN % plan.rows.BR:
        yield "route: BN is not a multiple of the BR of rows"
    for path, tile in tiles_of(plan):
        if path != ("rows",) and min(tile.BN, tile.BD) < 16:
            yield f"{_name(path)}: a product needs 16 tokens and columns"


# ---- other kernels -------------------------------------------------------------------------------


def _alternatives(op: str, arguments: Mapping[str, Any], plan: Any) -> Iterator[Move]:
    if op == "masked_info_nce":
        yield from _losses(plan)
    if op == "query_pooling":
        yield from _poolings(arguments, plan)


def _losses(plan: Any) -> Iterator[Move]:
    other = "chunked" if plan.backward == "owner" else "owner"
    yield Move(f"backward: {plan.backward} -> {other}", replace(plan, backward=other))
    sizes = (plan.chunk_bytes // 4, 4 * plan.chunk_bytes) if other == "owner" else ()
    for size in sizes:
        if 32 * _MIB <= size <= 2048 * _MIB:
            label = f"chunk of dS: {plan.chunk_bytes // _MIB} -> {size // _MIB} MiB"
            yield Move(label, replace(plan, chunk_bytes=size))


def _poolings(arguments: Mapping[str, Any], plan: Any) -> Iterator[Move]:
    """Yield plans with other kernels; a forward with ``softmax`` stays.

    A backward with ``softmax`` needs that forward. It is the library's for many rows, also if the
    log-sum-exp has a gradient, which the forward's plan does not know.
    """
    plans, can = _pooling(arguments)
    softmax = {"softmax": plans._softmax(arguments["length"])}
    forwards, backwards = list(_pooling_forwards(arguments)), list(_pooling_backwards(arguments))
    if "softmax" in plan.forward:
        forwards, backwards = [], [*backwards, softmax]
    elif can["softmax"]:
        label = f"kernels: {_kernels(plan.forward)}, {_kernels(plan.backward)} -> softmax"
        yield Move(label, replace(plan, forward=softmax, backward=softmax))
    kept = {name: tile for name, tile in plan.forward.items() if name == "moments"}
    for tiles in forwards:
        if tiles.keys() != plan.forward.keys() - kept.keys():
            label = f"forward: {_kernels(plan.forward)} -> {_kernels(tiles)}"
            yield Move(label, replace(plan, forward=kept | tiles))
    for tiles in backwards:
        if tiles.keys() != plan.backward.keys():
            label = f"backward: {_kernels(plan.backward)} -> {_kernels(tiles)}"
            yield Move(label, replace(plan, backward=tiles))


def _kernels(tiles: Mapping[str, Any]) -> str:
    return " + ".join(name for name in tiles if name != "moments")


def _pooling(arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the module of plans, and what decides which kernels of query pooling can run."""
    import torch

    plans = importlib.import_module("mmfused.kernels.query_pooling.plans")
    dtype, dim = getattr(torch, arguments["dtype"]), arguments["dim"]
    big_shared = arguments["arch"] in (90, 100, 103)
    padded = arguments["norm"] or arguments["padded"]
    gluon = plans.has_gluon(arguments["arch"], dtype) and arguments["tma"] and dim <= 1024
    return plans, {
        "float32": dtype == torch.float32,
        "big_shared": big_shared,
        # In float16 torch's settings may forbid the products in another process.
        "softmax": not padded and dtype == torch.bfloat16,
        "onepass": dtype != torch.float32 and dim <= (1024 if big_shared else 768),
        "hopper": gluon,
    }


def _pooling_forwards(arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    plans, can = _pooling(arguments)
    a = arguments
    yield plans._tiles_of(
        ("logits", "pool"), a["rows"], can["big_shared"], can["float32"], a["norm"]
    )
    if can["onepass"]:
        yield {"onepass": plans._onepass(a["dim"], a["arch"], a["dropout"])}
    if can["hopper"]:
        yield {"hopper": plans._hopper_forward(a["rows"], a["dim"])}
    crowded = a["norm"] or a["dropout"]
    short = plans._short(a["dim"], a["arch"], crowded, a["length"])
    if short is not None and not (can["float32"] or a["per_sample"]):
        yield {"short": short}


def _pooling_backwards(arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    plans, can = _pooling(arguments)
    a = arguments
    names = ("dlogits", "dx", "dq")
    options = (can["big_shared"], can["float32"], a["norm"], a["dropout"])
    yield plans._tiles_of(names, a["rows"], *options)
    given = ("rows", "dim", "norm", "dropout", "per_sample", "dlse")
    if can["hopper"] and plans._hopper_backward_fits(*(a[name] for name in given)):
        yield {"hopper": plans._hopper_backward(a["rows"], a["dim"], False)}
    few = a["rows"] <= 16 and a["length"] <= plans.PAIR_TOKENS and a["dim"] <= 768
    if can["hopper"] and few and not a["per_sample"]:
        yield {"pairs": plans._hopper_backward(a["rows"], a["dim"], True)}
