"""Tests of the alternatives that ``mmfused tune`` times: launchers can run all of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mmfused.benchmarks import run
from mmfused.kernels import tuned
from mmfused.kernels.gated_cross_attention import plans as gated
from mmfused.kernels.grouped_mlp import plans as grouped
from mmfused.kernels.masked_info_nce import plans as loss
from mmfused.kernels.query_pooling import plans as pooling
from mmfused.kernels.tiles import tile_rows
from mmfused.kernels.topk_routing import plans as routing
from mmfused.tuning import calls, candidates

BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.float16, BF16)
CPU = torch.device("cpu")


def reached_by(op, call):
    with tuned.forced(()), tuned.observed() as reached:
        call()
    return [found for found in reached if found.op == op]


def calls_of_plan(op, arch, dtype):
    """Call ``plan()`` of an op for many shapes."""
    on = dict(dtype=dtype, arch=arch)
    flags = (False, True)
    if op == "query_pooling":
        for rows, dim, norm, length in itertools.product((2, 32, 96), (96, 768), flags, (16, 197)):
            for drop, sample, tma in itertools.product(flags, flags, flags):
                options = dict(dropout=drop, per_sample=sample, tma=tma, length=length)
                pooling.plan(rows, dim, norm=norm, padded=norm, **on, **options)
    elif op == "gated_cross_attention":
        for (dim, other), head, drop in itertools.product(
            ((256, 256), (768, 768), (96, 200)), (32, 64, 96), flags
        ):
            gated.plan(dim, other, head, dropout=drop, **on)
    elif op == "grouped_mlp":
        for kind, rows, n in itertools.product(grouped.KINDS, (20, 512, 5000, 30000), (75, 768)):
            grouped.plan(kind, rows, 16, n, 768, **on)
    elif op == "masked_info_nce":
        for dim, columns, everything, logits in itertools.product((40, 128, 768), *[flags] * 3):
            loss.plan(dim, columns=columns, everything=everything, logits=logits, **on)
    else:
        for experts, from_input in itertools.product((2, 16, 128, 300), flags):
            routing.plan(experts, from_input=from_input, **on)


def all_moves(op, arch, dtype):
    for call in reached_by(op, lambda: calls_of_plan(op, arch, dtype)):
        arguments = dict(call.arguments)
        assert candidates.why_invalid(op, arguments, call.default) is None, call
        for group, moves in candidates.moves(op, arguments, call.default).items():
            for move in moves:
                yield arguments, call.default, group, move.plan


@pytest.mark.parametrize("op", run.OPS[:-1])
def test_every_alternative_differs_and_keeps_what_launchers_assume(op):
    checks = {
        "query_pooling": check_pooling,
        "gated_cross_attention": check_gated,
        "grouped_mlp": check_grouped,
        "masked_info_nce": check_loss,
        "topk_routing": check_routing,
    }
    count = 0
    for arch, dtype in itertools.product((80, 90, 100, 120), DTYPES):
        for arguments, default, _, plan in all_moves(op, arch, dtype):
            assert plan != default
            checks[op](arguments, default, plan)
            count += 1
    assert count > 400


def check_pooling(arguments, default, plan):
    assert plan.partials == default.partials
    for name, tile in (*plan.forward.items(), *plan.backward.items()):
        if isinstance(tile, pooling.Tile):
            assert 16 <= tile.BN <= 64
        if name == "short":
            assert tile.BN >= arguments["length"]
        if isinstance(tile, pooling.HopperTile):
            assert arguments["arch"] == 90 and arguments["tma"] and arguments["dtype"] != "float32"
    assert ("moments" in plan.forward) == arguments["norm"]
    softmax = [tiles.get("softmax") for tiles in (plan.forward, plan.backward)]
    for tile in filter(None, softmax):
        assert not (arguments["norm"] or arguments["padded"])
        assert tile.BN <= 256


def check_gated(arguments, default, plan):
    widest = max(arguments["dim"], arguments["context_dim"])
    narrowest = min(arguments["dim"], arguments["context_dim"])
    assert plan.most_keys == default.most_keys and plan.rows.BN >= widest
    before = dict(candidates.tiles_of(default))
    for path, tile in candidates.tiles_of(plan):
        if before[path].BK >= narrowest:  # the weight stays in shared memory, or all of a row
            assert tile.BK == before[path].BK
        elif tile.BK:
            assert tile.BK < 2 * narrowest
    for name, tile in plan.d_attend_long.items():
        assert tile.BN == int(name)


def check_grouped(arguments, default, tile):
    assert tile.BN >> tile.halvings >= 16
    if not arguments["kind"].endswith("weights"):
        assert tile.BM == default.BM
        rows = arguments["rows"]
        assert tile.BM in {tile_rows(n, arguments["experts"]) for n in (rows, rows // 2)}


def check_loss(arguments, default, plan):
    assert plan.apply_ds.BM % plan.pairs.BM == plan.apply_ds.BN % plan.pairs.BN == 0
    assert plan.partial_bytes == default.partial_bytes and plan.merge == default.merge
    if arguments["dtype"] == "float32":
        assert plan.sweep == plan.pairs and plan.backward == "chunked"
    if plan.backward == "owner":
        assert plan.owner.BD >= arguments["dim"]
    assert 32 <= plan.chunk_bytes // 2**20 <= 2048


def check_routing(arguments, default, plan):
    assert (plan.programs, plan.experts) == (default.programs, default.experts)
    assert plan.route is None or plan.route.BN % plan.rows.BR == 0


def test_pooling_has_every_kernel_that_can_run_as_alternative():
    def kernels(arch, rows=32, dtype=BF16, **options):
        options = dict(tma=True, length=197) | options
        (call,) = reached_by(
            "query_pooling", lambda: pooling.plan(rows, 768, dtype, arch, False, **options)
        )
        moves = candidates.moves("query_pooling", dict(call.arguments), call.default)
        return {label.partition(":")[2].strip() for label, _ in moves.get("kernels", ())}

    assert kernels(90) == {
        "hopper -> logits + pool",
        "hopper -> onepass",
        "hopper, hopper -> softmax",
        "hopper -> dlogits + dx + dq",
    }
    assert kernels(80) == {
        "onepass -> logits + pool",
        "onepass, dlogits + dx + dq -> softmax",
    }
    assert kernels(80, dtype=torch.float16) == {"onepass -> logits + pool"}
    assert kernels(80, padded=True) == {"onepass -> logits + pool"}
    assert kernels(90, rows=2, length=16) >= {"short -> hopper", "pairs -> hopper"}
    assert kernels(90, dtype=torch.float32) == set()


def test_backward_by_matrix_products_has_the_forward_with_the_same_logits():
    """One token has all the weight, so that the gradient of the queries is exactly 0."""
    plan = pooling.plan(64, 768, BF16, 90, False, tma=True, length=197)
    few = pooling.plan(8, 768, BF16, 90, False, tma=True, length=197)
    (call,) = reached_by(
        "query_pooling", lambda: pooling.plan(64, 768, BF16, 90, False, tma=True, length=197)
    )
    arguments = dict(call.arguments)
    for move in candidates.moves("query_pooling", arguments, plan)["kernels"]:
        assert move.plan.forward == plan.forward and "softmax" not in move.plan.backward
        (back,) = (
            other
            for other in candidates.moves("query_pooling", arguments, move.plan)["kernels"]
            if other.plan == plan
        )
        assert back.label.endswith("-> softmax")
    mixed = replace(few, backward=plan.backward)
    assert "would differ" in candidates.why_invalid("query_pooling", arguments, mixed)


def test_moves_change_one_field_of_one_tile():
    plan = gated.plan(256, 256, 32, BF16, 90)
    changed = candidates.with_field(plan, ("attend",), "BM", 128)
    assert changed == replace(plan, attend=replace(plan.attend, BM=128))
    plan = pooling.plan(32, 768, BF16, 80, False)
    changed = candidates.with_field(plan, ("forward", "onepass"), "num_stages", 5)
    assert changed.forward == {"onepass": replace(plan.forward["onepass"], num_stages=5)}
    assert changed.backward == plan.backward
    tile = grouped.plan("rows", 512, 16, 768, 3072, BF16, 90)
    assert candidates.with_field(tile, (), "num_warps", 8) == replace(tile, num_warps=8)


def test_unused_tiles_of_the_loss_are_left_alone():
    (call,) = reached_by("masked_info_nce", lambda: loss.plan(128, BF16, 90, True, False))
    arguments = dict(call.arguments)
    assert set(candidates.moves("masked_info_nce", arguments, call.default)) == {
        "kernels",
        "sweep",
        "owner",
    }
    chunked = replace(call.default, backward="chunked")
    moves = candidates.moves("masked_info_nce", arguments, chunked)
    assert set(moves) == {"kernels", "sweep", "pairs", "apply_ds"}
    assert [move.label for move in moves["kernels"]] == [
        "backward: chunked -> owner",
        "chunk of dS: 512 -> 128 MiB",
        "chunk of dS: 512 -> 2048 MiB",
    ]


# ---- the calls of a case -------------------------------------------------------------------------


def problem_of(op, arch=90, dtype=BF16, **shape):
    module = run.load_op(op)
    return calls.problem_of(op, module, module.custom(shape), CPU, dtype, arch)


@pytest.mark.parametrize(
    "op, shape, kernels",
    [
        ("query_pooling", dict(B=2, N=20, D=128, L=4), {"short_forward_kernel"}),
        ("masked_info_nce", dict(B=20, D=128), {"sweep_kernel", "owner_kernel"}),
        ("grouped_mlp", dict(T=20, D=64, I=32, E=4), {"rows_kernel", "weights_kernel"}),
        ("topk_routing", dict(T=20, D=64, E=4), {"route_x_kernel", "dx_kernel", "dw_kernel"}),
        ("gated_cross_attention", dict(B=2, N=9, M=5, D=64, H=2), {"attend_kernel"}),
    ],
)
def test_launches_and_plans_of_a_case_are_found_without_running(op, shape, kernels):
    problem = problem_of(op, **shape)
    names = {launch.name for launch in problem.launches(problem.default()).made}
    assert kernels <= names
    assert problem.reached and {call.op for call in problem.reached} == {op}
    # Every alternative can be launched.
    for i, call in enumerate(problem.reached):
        for moves in candidates.moves(op, dict(call.arguments), call.default).values():
            for move in moves:
                problem.launches(problem.default().with_plan(i, move.plan))


def test_launches_follow_the_plans_and_the_architecture():
    problem = problem_of("masked_info_nce", B=20, D=128)
    ((i, plan),) = (
        (i, call.default)
        for i, call in enumerate(problem.reached)
        if dict(call.arguments)["logits"]
    )
    changed = problem.default().with_plan(i, replace(plan, backward="chunked"))
    names = {launch.name for launch in problem.launches(changed).made}
    assert "apply_ds_kernel" in names and "owner_kernel" not in names
    assert problem.entries(changed) == [tuned.Entry(*problem.reached[i][:3], changed.plans[i])]
    assert problem.entries(problem.default()) == []
    other = problem_of("masked_info_nce", arch=80, B=20, D=128)
    assert other.default() != problem.default()


def test_text_of_launches_holds_grids_and_sizes_of_chunks():
    problem = problem_of("masked_info_nce", B=2000, D=512)
    i = next(i for i, call in enumerate(problem.reached) if dict(call.arguments)["logits"])
    base = problem.launches(problem.default())
    plan = problem.reached[i].default
    chunks = problem.default().with_plan(i, replace(plan, chunk_bytes=2**21))
    assert problem.launches(chunks).text != base.text
    unused = problem.default().with_plan(i, replace(plan, owner=replace(plan.owner, BM=32)))
    assert problem.launches(unused).text == base.text
    problem = problem_of("gated_cross_attention", arch=90, B=256, N=197, M=64, D=256, H=8)
    (plan,) = problem.default().plans
    walks = replace(plan, gate=replace(plan.gate, residents=2))
    assert problem.launches(calls.Plans([walks])).text != problem.launches(problem.default()).text
