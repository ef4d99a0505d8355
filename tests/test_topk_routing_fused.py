"""Tests of the kernels of top-k routing, interpreted on a CPU and compiled on a GPU."""

import dataclasses
import math
import sys

import pytest
import torch
from topk_routing_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    LOSSES,
    OPTIONS,
    cast,
    make_inputs,
    make_logits,
    make_options,
    plain_order,
    plain_tiles,
    route,
    run,
)

import mmfused
from mmfused import routing_from_indices, topk_routing, topk_routing_reference
from mmfused.kernels import tiles as shared
from mmfused.kernels import topk_routing as kernels
from mmfused.kernels.recording import launches_made
from mmfused.kernels.topk_routing import router_gradients, scores
from mmfused.kernels.topk_routing.plans import plan
from mmfused.random import uniform
from mmfused.testing import over_budget

# (tokens, experts, k): odd sizes, one token, several blocks of tokens, and more experts than lanes
# in a warp.
SHAPES = [(1, 5, 1), (3, 16, 3), (257, 13, 2), (257, 16, 1), (130, 70, 3), (65, 6, 5), (9, 1, 1)]


def module_of(function):
    """Return the module that defines a function; ``kernels.order`` is a function, not a module."""
    return sys.modules[function.__module__]


# ---- values and gradients ------------------------------------------------------------------------


def check(leaves, k, options, upstream=None):
    """Check values and gradients against the error budget, and the order against its definition.

    The reference is given the experts that the kernels chose.
    """
    tokens = len(next(iter(leaves.values())))
    upstream = (
        torch.randn(tokens, k, dtype=torch.float64, device=DEVICE) if upstream is None else upstream
    )
    got, routing = run(leaves, k, options, "fused", upstream)
    replay = dict(indices=routing.indices)
    plain, expected = run(leaves, k, options, "reference", upstream, **replay)
    exact, _ = run(cast(leaves, torch.float64), k, options, "reference", upstream, **replay)
    assert over_budget(got, exact, plain) == []
    assert torch.equal(routing.counts, expected.counts)
    check_order(routing, options.get("token_padding_mask"))
    return got, routing


def check_order(routing, mask):
    experts, rows = len(routing.offsets) - 1, routing.indices.numel()
    order, position, offsets = plain_order(routing.indices, mask, experts)
    assert routing.offsets.tolist() == offsets
    assert routing.order.tolist() == order
    assert routing.position.tolist() == position
    assert routing.tiles.tolist() == plain_tiles(
        offsets, rows, experts, shared.tile_rows(rows, experts)
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_from_logits(option):
    check(make_logits(137, 13), 2, make_options(option, 137, 13, 2))


@pytest.mark.parametrize("option", ["softmax", "mse segments", "jitter sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_logits(dtype, option):
    check(make_logits(70, 13, dtype), 3, make_options(option, 70, 13, 3))


@pytest.mark.parametrize(
    "option", ["mask", "available", "mse segments", "jitter sigmoid", "replay"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_input(dtype, option):
    check(make_inputs(70, 13, 150, dtype), 2, make_options(option, 70, 13, 2))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_router_with_half_precision_inputs(dtype):
    """Gradients too small for float16 keep all digits."""
    leaves = make_inputs(140, 16, 150, dtype, torch.float32)
    check(leaves, 2, {})
    with torch.no_grad():
        leaves["router_weight"] *= 1e-3
    check(leaves, 2, make_options("mask", 140, 16, 2))
    results = []
    for scale in (1.0, 2.0**-30):
        routing = route(leaves, 2, {}, "fused")
        weights = routing.weights
        generator = torch.Generator(DEVICE).manual_seed(0)
        upstream = scale * torch.randn(weights.shape, generator=generator, device=DEVICE)
        results.append(torch.autograd.grad(weights, leaves["router_weight"], upstream)[0])
    assert (
        torch.equal(results[0] * 2.0**-30, results[1]) and results[1][routing.counts[0] > 0].all()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_programs_for_the_products(monkeypatch, dtype):
    """Each program handles several blocks; upstream gradients grow from block to block."""
    monkeypatch.setattr(
        router_gradients, "plan", lambda *args: dataclasses.replace(plan(*args), programs=1)
    )
    leaves = make_inputs(150, 13, 150, dtype, torch.float32)
    growing = 10.0 ** (torch.arange(150, device=DEVICE) // 20 - 6)
    check(leaves, 2, {}, growing[:, None] * torch.randn(150, 2, device=DEVICE))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    tokens, experts, k = shape
    check(
        make_logits(tokens, experts),
        k,
        make_options("mask" if tokens > 9 else "softmax", tokens, experts, k),
    )
    check(make_inputs(min(tokens, 70), experts, 33), k, {})


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_large_logits(score):
    leaves = make_logits(40, 13)
    with torch.no_grad():
        leaves["logits"].mul_(30)
    check(leaves, 3, dict(score=score))


@pytest.mark.parametrize("from_input", [False, True])
def test_no_tokens(from_input):
    leaves = make_inputs(0, 5, 20) if from_input else make_logits(0, 5)
    got, routing = run(
        leaves, 2, make_options("mse segments", 0, 5, 2), "fused", torch.zeros(0, 2, device=DEVICE)
    )
    assert not any(value.any() for value in got.values()) and not routing.counts.any()
    check_order(routing, None)


@pytest.mark.parametrize("balance", ["switch", "gshard", "mse"])
def test_all_tokens_masked(balance):
    options = dict(
        token_padding_mask=torch.ones(70, dtype=torch.bool, device=DEVICE), balance=balance
    )
    for leaves in (make_logits(70, 13), make_inputs(70, 13, 20)):
        with torch.no_grad():
            next(iter(leaves.values())).fill_(math.nan)
        got, routing = run(leaves, 3, options, "fused", torch.randn(70, 3, device=DEVICE))
        assert not any(value.any() for value in got.values()) and not routing.counts.any()
        assert routing.indices.tolist() == [[0, 1, 2]] * 70
        check_order(routing, options["token_padding_mask"])


def test_all_tokens_to_one_expert():
    leaves = make_logits(200, 13)
    with torch.no_grad():
        leaves["logits"][:, 7] += 12
    _, routing = check(leaves, 1, {})
    assert routing.counts[0, 7] == 200


# ---- choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["softmax", "available", "bias"])
def test_ties_go_to_the_lower_index(option):
    """The logits have few distinct values, so nearly all rows have ties."""
    options = make_options(option, 257, 21, 4)
    if "selection_bias" in options:  # in float32, the sigmoids are exactly 0.5 and 0
        options["selection_bias"] = torch.randint(-2, 3, (21,), device=DEVICE).float()
        logits = torch.where(torch.rand(257, 21, device=DEVICE) < 0.5, 0.0, -200.0)
    else:
        logits = torch.randint(-2, 3, (257, 21), device=DEVICE).float()
    with mmfused.backend("fused"):
        got = topk_routing(logits, 4, **options)
    assert torch.equal(got.indices, topk_routing_reference(logits, 4, **options).indices)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_nan_logits(renormalize, score):
    """A NaN logit makes the losses and its token's weights NaN; the chosen indices stay valid.

    Experts with NaN are chosen last among the available experts.
    """
    available = torch.ones(2, 13, dtype=torch.bool, device=DEVICE)
    available[1, :9] = False
    segments = torch.arange(70, device=DEVICE) % 2
    options = dict(
        score=score, renormalize=renormalize, available=available, segments=segments, num_segments=2
    )
    logits = torch.randn(70, 13, device=DEVICE)
    want = route(dict(logits=logits), 3, options, "fused")
    logits[5, :9] = math.nan  # in segment 1, where these experts are unavailable
    got = route(dict(logits=logits), 3, options, "fused")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    logits[4, 2], logits[6], logits[7] = math.nan, math.nan, math.nan
    got = route(dict(logits=logits), 3, options, "fused")
    invalid = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    invalid[[4, 6, 7]] = True
    assert torch.equal(got.weights.isnan(), invalid[:, None].expand(-1, 3))
    assert torch.equal(got.weights[~invalid], want.weights[~invalid])
    assert all(getattr(got, name).isnan() for name in LOSSES)
    assert (
        got.indices[6].tolist() == [0, 1, 2]
        and got.indices[7].tolist() == [9, 10, 11]
        and 2 not in got.indices[4]
    )
    check_order(got, None)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_infinite_logits(score):
    """An expert with logit -inf has probability 0 and is chosen only before unavailable experts."""
    logits = torch.randn(70, 5, device=DEVICE)
    logits[:, 1], logits[3, 2:] = -math.inf, -math.inf
    available = torch.tensor([[True, True, True, False, True]], device=DEVICE)
    for renormalize in (True, False):
        options = dict(score=score, renormalize=renormalize, available=available)
        leaves = dict(logits=logits.requires_grad_())
        (got, routing), (want, _) = (
            run(leaves, 3, options, b, torch.ones(70, 3, device=DEVICE))
            for b in ("fused", "reference")
        )
        assert routing.indices[3].tolist() == [0, 1, 2] and not (routing.indices == 3).any()
        for name, value in got.items():  # the reference's gradient of log 0 may be NaN
            finite = want[name].isfinite()
            torch.testing.assert_close(value[finite], want[name][finite], rtol=1e-4, atol=1e-6)
            assert value.isfinite().all(), name
    logits = logits.detach()
    logits[0] = -math.inf
    assert route(dict(logits=logits), 2, dict(score=score), "fused").weights[0].isnan().all()


@pytest.mark.parametrize("source", ["logits", "x"])
def test_nan_in_masked_tokens_has_no_effect(source):
    leaves = make_logits(140, 13) if source == "logits" else make_inputs(140, 13, 40)
    options = make_options("segments", 140, 13, 2)
    upstream = torch.randn(140, 2, device=DEVICE)
    want, before = run(leaves, 2, options, "fused", upstream)
    mask = options["token_padding_mask"]
    with torch.no_grad():
        leaves[source][mask] = math.nan
    got, after = run(leaves, 2, options, "fused", upstream)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
        assert not name.startswith(f"d{source} ") or not value[mask].any(), name
    assert (
        all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        and not after.weights[mask].any()
    )


def test_replayed_indices_out_of_range_give_nan_only_for_their_tokens():
    """The losses, and the weights and gradients of tokens with an invalid index, are NaN.

    All other results equal those of clamped indices.
    """
    logits, options = (
        torch.randn(70, 5, device=DEVICE),
        (False, True, None, None, None, 1, None, "mse"),
    )
    indices = torch.randint(0, 5, (70, 2), device=DEVICE)
    bad = indices.clone()
    bad[3, 0], bad[40, 1], bad[69, 1] = -1, 5, 2**33 + 1
    invalid = (bad != indices).any(1)
    got, want = (
        torch.ops.mmfused.topk_routing_fwd(logits, None, None, 2, *options, given, 0.0, None)
        for given in (bad, bad.clamp(0, 4))
    )
    names = (
        "logits",
        "indices",
        "weights",
        "counts",
        "losses",
        "order",
        "position",
        "offsets",
        "tiles",
        "coefficients",
    )
    got, want = dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True))
    assert torch.equal(got["weights"].isnan(), invalid[:, None].expand(-1, 2))
    assert torch.equal(got["weights"][~invalid], want["weights"][~invalid])
    for name in ("counts", "order", "position", "offsets", "tiles"):
        assert torch.equal(got[name], want[name]), name
    one, tail = torch.ones((), device=DEVICE), (False, True, None, None, 1, None, "mse", 0.0, None)
    d_got, d_want = (
        torch.ops.mmfused.topk_routing_bwd(
            None, one, one, one, logits, given, want["weights"], want["coefficients"], *tail
        )
        for given in (bad, bad.clamp(0, 4))
    )
    assert (
        torch.equal(d_got[~invalid], d_want[~invalid])
        and d_got[invalid].isnan().all()
        and got["losses"].isnan().all()
    )
    for name, value in zip(names[5:9], torch.ops.mmfused.expert_order(bad, None, 5), strict=True):
        assert torch.equal(value, want[name]), name


def test_each_segment_is_balanced_by_itself():
    """Two segments prefer different experts; the third segment is empty and has no effect."""
    logits = torch.randn(130, 5, device=DEVICE) / 10
    segments = torch.arange(130, device=DEVICE) % 2
    logits[segments == 0, 1] += 2.0
    logits[segments == 1, 3] += 2.0
    leaves = dict(logits=logits.requires_grad_())
    got, routing = check(leaves, 1, dict(segments=segments, num_segments=3))
    d = got["dlogits from balance_loss"]
    assert (d[segments == 0, 1] > 0).all() and (d[segments == 0, 3] < 0).all()
    assert (d[segments == 1, 3] > 0).all() and (d[segments == 1, 1] < 0).all()
    assert routing.counts.tolist() == [[0, 65, 0, 0, 0], [0, 0, 0, 65, 0], [0] * 5]


# ---- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [128, 1], ids=["one step", "a step each"])
@pytest.mark.parametrize("masked", [0.0, 0.3, 1.0])
def test_order_of_a_routing_from_indices(monkeypatch, masked, rows):
    """Several blocks of tokens are scanned, either together or one by one.

    A token may choose an expert twice, and some experts get no tokens.
    """
    monkeypatch.setattr(module_of(kernels.order), "SCAN_ROWS", rows)
    indices = torch.randint(0, 7, (333, 3), device=DEVICE) * 3
    mask = torch.rand(333, device=DEVICE) < masked
    weights = torch.rand(333, 3, device=DEVICE)
    with mmfused.backend("fused"):
        for ignored in (mask, None):
            check_order(
                routing_from_indices(indices, weights, 21, token_padding_mask=ignored), ignored
            )
            strided = indices.T.contiguous().T
            check_order(
                routing_from_indices(strided, weights, 21, token_padding_mask=ignored), ignored
            )


@pytest.mark.parametrize("experts, k", [(16, 2), (300, 4)])
def test_scan_over_many_blocks(monkeypatch, experts, k):
    monkeypatch.setattr(module_of(kernels.order), "SCAN_ROWS", 2)
    monkeypatch.setattr(module_of(kernels.order), "SCAN_COLUMNS", 32)
    check(make_logits(40, experts), k, make_options("gshard", 40, experts, k))
    check(make_inputs(9, experts, 40, torch.float16), k, {})


def test_tile_map_and_tile_rows():
    for experts, rows in ((1, 0), (1, 100), (5, 999), (64, 5000)):
        ends = torch.randint(0, rows + 1, (experts,)).sort().values
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(DEVICE, torch.int32)
        want = plain_tiles(offsets.tolist(), rows, experts, shared.tile_rows(rows, experts))
        assert shared.tile_map(offsets, rows, experts).tolist() == want
    assert [shared.tile_rows(rows, 16) for rows in (0, 511, 512, 1023, 1024, 2048, 10**6)] == [
        16,
        16,
        32,
        32,
        64,
        128,
        128,
    ]


# ---- layouts, registration, behavior -------------------------------------------------------------


@pytest.mark.not_on_ptx("other strides may compile to another order of a sum")
def test_strided_inputs():
    dense = torch.randn(137, 13, device=DEVICE)
    views = [
        dense.T.contiguous().T,
        torch.cat((dense, dense), 1)[:, :13],
        torch.stack((dense, dense), 2)[:, :, 0],
    ]
    upstream, options = torch.randn(137, 2, device=DEVICE), make_options("segments", 137, 13, 2)
    options["token_padding_mask"] = torch.stack([options["token_padding_mask"]] * 2, 1)[:, 0]
    want, _ = run(dict(logits=dense.requires_grad_()), 2, options, "fused", upstream)
    for view in views:
        got, _ = run(dict(logits=view.detach().requires_grad_()), 2, options, "fused", upstream)
        assert all(torch.equal(got[name], want[name]) for name in want)
    leaves = make_inputs(70, 13, 40)
    upstream = torch.randn(70, 2, device=DEVICE)
    want, _ = run(leaves, 2, {}, "fused", upstream)
    x, weight = leaves["x"].detach(), leaves["router_weight"].detach()
    for view in (torch.cat((x, x), 1)[:, :40], x.T.contiguous().T):
        strided = leaves | dict(
            x=view.requires_grad_(), router_weight=weight.T.contiguous().T.requires_grad_()
        )
        got, _ = run(strided, 2, {}, "fused", upstream)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_repeated_runs_are_bitwise_equal():
    leaves, options = (
        make_inputs(140, 13, 70, torch.float16),
        make_options("jitter sigmoid", 140, 13, 2),
    )
    upstream = torch.randn(140, 2, device=DEVICE)
    first, second = (run(leaves, 2, options, "fused", upstream) for _ in range(2))
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("option", ["jitter sigmoid", "replay"])
@pytest.mark.parametrize("from_input", [False, True])
def test_opcheck(from_input, option):
    options = make_options(option, 37, 5, 2)
    names = "token_padding_mask", "segments", "num_segments", "available", "balance"
    common = [options.get(name, dict(num_segments=1, balance="switch").get(name)) for name in names]
    sigmoid, noise = (
        options.get("score") == "sigmoid",
        (options.get("jitter", 0.0), options.get("jitter_seed")),
    )
    leaves = [
        x.detach() for x in (make_inputs(37, 5, 40) if from_input else make_logits(37, 5)).values()
    ]
    args = (
        *(leaves if from_input else (*leaves, None, None)),
        2,
        sigmoid,
        True,
        options.get("selection_bias"),
    )
    args = (*args, *common, options.get("indices"), *noise)
    ops = torch.ops.mmfused
    torch.library.opcheck(ops.topk_routing_fwd, args)
    logits, indices, weights, *_, coefficients = ops.topk_routing_fwd(*args)
    logits, indices = (logits if from_input else leaves[0]), options.get("indices", indices)
    one = torch.ones((), device=DEVICE)
    for upstream in ((torch.randn_like(weights), one, one, one), (None, one, None, None)):
        backward = (
            *upstream,
            logits,
            indices,
            weights,
            coefficients,
            sigmoid,
            True,
            *common,
            *noise,
        )
        torch.library.opcheck(ops.topk_routing_bwd, backward)
    torch.library.opcheck(ops.expert_order, (indices, common[0], 5))
    if from_input:
        for needed in ((True, True), (True, False), (False, True)):
            args = (torch.randn_like(logits), leaves[0], leaves[1], common[0], *needed)
            torch.library.opcheck(ops.topk_routing_input_bwd, args)


def test_only_the_required_kernels_are_launched():
    """Forward launches three kernels, and backward one for each of logits, x and router weight."""

    def names(leaves, wanted):
        for name, value in leaves.items():
            value.requires_grad_(name in wanted)
        with launches_made() as launches:
            routing = route(leaves, 2, make_options("mse segments", 70, 5, 2), "fused")
            (routing.weights.sum() + routing.balance_loss).backward()
        return [launch.name.removesuffix("_kernel") for launch in launches]

    assert names(make_logits(70, 5), {"logits"}) == ["route", "scan", "finish", "logits"]
    forward = ["route_x", "scan", "finish", "logits"]
    assert names(make_inputs(70, 5, 40), {"x", "router_weight"}) == [*forward, "dx", "dw"]
    assert names(make_inputs(70, 5, 40), {"x"}) == [*forward, "dx"]
    assert names(make_inputs(70, 5, 40), {"router_weight", "router_bias"}) == [*forward, "dw"]


# ---- helpers -------------------------------------------------------------------------------------


def test_jitter_is_bitwise_equal_to_plain_pytorchs():
    """There are several blocks of tokens; some seeds are negative or have more than 32 bits."""
    for seed in (0, 1, 2**40 + 17, 2**63 - 1, -5):
        seed = torch.tensor(seed, device=DEVICE)
        want = 1 + 0.5 * (2 * uniform(seed, 150, 13) - 1)  # a factor of 0.5 is exact
        with mmfused.backend("fused"):
            logits = torch.ones(150, 13, device=DEVICE, requires_grad=True)
            routing = topk_routing(
                logits, 13, jitter=0.5, jitter_seed=seed, score="sigmoid", renormalize=False
            )
        order = want.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(routing.indices, order)
        torch.testing.assert_close(
            routing.weights, want.gather(1, order).sigmoid(), rtol=1e-6, atol=0
        )


def test_offsets_are_64_bit():
    """load_logits reads elements beyond the first 2^31."""
    if CUDA:
        pytest.skip("tested in the interpreter, which runs the same source")
    import triton
    import triton.language as tl

    @triton.jit
    def probe(load: tl.constexpr, ptr, out_ptr, first, stride, E: tl.constexpr):
        i = tl.arange(0, 16)
        at = i[:, None] * 16 + i[None, :]
        tl.store(out_ptr + at, load(ptr, first + i, i, i < 1, stride, 1, E))
        tl.store(out_ptr + 256 + at, load(ptr, i, i, i < 2, 1, stride, E))

    # Only written pages take memory; the others are shared zero pages.
    memory = torch.zeros(2_200_000_000, dtype=torch.int8)
    memory[9 * 240_000_000 : 9 * 240_000_000 + 2] = 7  # 9 rows down, or 9 columns to the right
    out = torch.full((2, 16, 16), -1.0)
    probe[(1,)](scores.load_logits, memory, out, 9, 240_000_000, E=10)
    assert (
        out[0, 0, :2].tolist() == [7, 7]
        and out[1, :2, 9].tolist() == [7, 7]
        and (out > 0).sum() == 4
    )
