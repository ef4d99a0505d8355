"""Tests of routing and experts with NaN, strided views, uninitialized memory and no tokens."""

import math
import sys

import pytest
import torch
from grouped_mlp_cases import make_mlp, run_linear, run_mlp
from topk_routing_cases import CUDA, DEVICE, OPTIONS, make_inputs, make_logits, make_options, route

import mmfused
from mmfused import (
    TopKMoE,
    grouped_linear,
    routing_from_indices,
    topk_routing,
    update_selection_bias,
)
from mmfused.ops.grouped_mlp import composed
from mmfused.testing import relative_error

BACKENDS = ("reference", "composed", "fused")
GARBAGE = 2**20 + 7


# ---- NaN and inf ---------------------------------------------------------------------------------


def strict_grouped_mm(x, weight, *, offs):
    """Emulate torch's bfloat16 grouped_mm and check what grouped_mm requires on a GPU.

    Rows or columns must be dense. The stride between the dense rows or columns, and the address of
    the matrix, must be multiples of 16 bytes.
    """
    for matrix in (x, weight):
        row, column = matrix.stride()[-2:]
        dense = (column, row) if row == 1 else (row, column)
        assert (
            dense[1] == 1
            and dense[0] % 8 == 0
            and dense[0] >= matrix.shape[-1 if column == 1 else -2]
        )
        assert matrix.data_ptr() % 16 == 0
    bounds = [0, *offs.tolist()]
    if weight.dim() == 2:  # the gradient of a weight
        return torch.stack(
            [x[:, a:b] @ weight[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        )
    out = x.new_full((x.shape[0], weight.shape[2]), math.nan)
    for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        out[a:b] = x[a:b] @ weight[e]
    return out


@pytest.fixture(params=[*BACKENDS, "grouped_mm"])
def backend(request, monkeypatch):
    if request.param == "grouped_mm":
        monkeypatch.setattr(composed, "_has_grouped_mm", lambda x, weight: True)
        monkeypatch.setattr(composed, "_grouped_mm", strict_grouped_mm)
        return "composed"
    return request.param


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "upstream", "weights"])
@pytest.mark.parametrize("variant", ["gelu", "relu", "swiglu"])
def test_non_finite_token_affects_only_its_own_results(variant, where, value, backend):
    """Only the results of token 4 and the parameter gradients of the token's experts may change.

    All other results must be bitwise equal.
    """
    leaves = make_mlp((19, 5, 2, 16, 24, 8), variant)
    indices = torch.tensor([[1, 3], [0, 2], [4, 0], [2, 4]], device=DEVICE)[
        torch.arange(19, device=DEVICE) % 4
    ]
    mask = torch.arange(19, device=DEVICE) % 9 == 8
    upstream = torch.randn(19, 8, device=DEVICE)
    options = dict(variant=variant, mask=mask)
    want = run_mlp(leaves, indices, torch.float32, backend, upstream=upstream, **options)
    if where == "upstream":
        upstream[4, 3] = value
    else:
        leaves[where][4, 1] = value
    got = run_mlp(leaves, indices, torch.float32, backend, upstream=upstream, **options)
    others = torch.arange(19, device=DEVICE) != 4
    for name in ("out", "dx", "dweights"):
        assert torch.equal(got[name][others], want[name][others]), name
    chosen = torch.tensor([e in (1, 3) for e in range(5)], device=DEVICE)
    for name in want.keys() - {"out", "dx", "dweights"}:
        assert torch.equal(got[name][~chosen], want[name][~chosen]), name
    assert where == "upstream" or not got["out"][4].isfinite().all()


# ---- views ---------------------------------------------------------------------------------------


VIEWS = ("every second", "shifted", "transposed", "wider rows")


def view(tensor, how):
    """Return a view that has the values of ``tensor`` in another memory layout."""
    garbage = (
        torch.ones_like(tensor) if tensor.dtype == torch.bool else torch.full_like(tensor, GARBAGE)
    )
    if how == "every second":
        return torch.stack((tensor, garbage), -1)[..., 0]
    if how == "shifted":
        return torch.cat((garbage.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.cat((garbage, tensor), -1)[..., tensor.shape[-1] :]


def values_of(call, leaves, options):
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in leaves.items()}
    out = call(**leaves, **options)
    outs = out if isinstance(out, tuple) else (out,)
    total = sum(
        (x * (1 + torch.arange(x.numel(), device=x.device).view(x.shape) % 3)).sum()
        for x in outs
        if x.requires_grad
    )
    wanted = [x for x in leaves.values() if x.is_floating_point()]
    return [*outs, *torch.autograd.grad(total, wanted, allow_unused=True)]


def check_views(call, leaves, options, exact, views=VIEWS):
    want = values_of(call, leaves, options)
    for how in views:
        tables = [
            {
                n: view(x, how) if isinstance(x, torch.Tensor) and x.dim() else x
                for n, x in table.items()
            }
            for table in (leaves, options)
        ]
        for i, (a, b) in enumerate(zip(values_of(call, *tables), want, strict=True)):
            if a is not None or b is not None:
                same = torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-5)
                assert same, (how, i)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_of_routing_may_be_a_view(backend):
    segments = torch.randint(0, 2, (21,), device=DEVICE)
    options = dict(
        token_padding_mask=torch.rand(21, device=DEVICE) < 0.2, segments=segments, num_segments=2
    )
    options["available"] = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    options["available"][0, 2] = options["available"][1, 4] = False
    router = dict(
        router_weight=torch.randn(7, 12, device=DEVICE) / 4,
        router_bias=torch.randn(7, device=DEVICE),
    )
    router |= dict(x=torch.randn(21, 12, device=DEVICE))
    k = 2
    bias = torch.randn(7, device=DEVICE)
    replay = torch.rand(21, 7, device=DEVICE).argsort(1)[:, :k].contiguous()

    noise = dict(k=k, jitter=0.1, jitter_seed=torch.arange(3, 9, device=DEVICE)[2])

    def from_input(**given):
        return mmfused.topk_routing_from_input(**noise, **given)

    def from_logits(**given):
        return topk_routing(**noise, **given)

    logits = dict(logits=torch.randn(21, 7, device=DEVICE))
    with mmfused.backend(backend):
        check_views(from_input, router, options | dict(selection_bias=bias), backend == "fused")
        check_views(from_logits, logits, options | dict(selection_bias=bias), backend == "fused")
        check_views(
            from_logits, logits, options | dict(indices=replay, balance="mse"), backend == "fused"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_arguments_of_routing_match_contiguous_copies(backend):
    one = torch.ones((), device=DEVICE)
    expanded = dict(
        x=torch.randn(12, device=DEVICE).expand(9, 12),
        router_weight=torch.randn(5, 12, device=DEVICE),
        router_bias=(0.3 * one).expand(5),
    )
    options = dict(
        selection_bias=(0.2 * one).expand(5),
        token_padding_mask=(one < 0).expand(9),
        segments=one.long().expand(9),
        num_segments=2,
        available=(one > 0).expand(2, 5),
    )
    for given in (
        options,
        options | dict(indices=torch.tensor([3, 1], device=DEVICE).expand(9, 2)),
    ):
        results = []
        for copy in (False, True):
            tables = [
                {n: x.clone() if copy and isinstance(x, torch.Tensor) else x for n, x in t.items()}
                for t in (expanded, given)
            ]
            tables = [
                {
                    n: x.contiguous() if copy and isinstance(x, torch.Tensor) else x
                    for n, x in t.items()
                }
                for t in tables
            ]
            leaves = {n: x.detach().requires_grad_() for n, x in tables[0].items()}
            with mmfused.backend(backend):
                routing = mmfused.topk_routing_from_input(k=2, **leaves, **tables[1])
            upstream = (2.0 * one).expand(9, 2)
            results.append(
                [*routing, *torch.autograd.grad(routing.weights, list(leaves.values()), upstream)]
            )
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_of_routing_from_indices_may_be_a_view(backend):
    leaves = dict(weights=torch.rand(21, 2, device=DEVICE))
    options = dict(indices=torch.randint(0, 5, (21, 2), device=DEVICE), num_experts=5)
    options["token_padding_mask"] = torch.rand(21, device=DEVICE) < 0.2
    with mmfused.backend(backend):
        check_views(routing_from_indices, leaves, options, True)


def test_bias_and_counts_of_update_selection_bias_may_be_views():
    counts, want = torch.randint(0, 9, (2, 5)), torch.zeros(5)
    update_selection_bias(want, counts)
    for how in VIEWS:
        for other in VIEWS:
            bias = view(torch.zeros(5), other)
            update_selection_bias(bias, view(counts, how))
            assert torch.equal(bias, want)


@pytest.mark.parametrize("variant", ["gelu", "swiglu", "packed"])
def test_every_tensor_of_the_experts_may_be_a_view(variant, backend):
    leaves = {n: x.float().to(DEVICE) for n, x in make_mlp((5, 3, 2, 8, 8, 8), variant).items()}
    with mmfused.backend("fused"):  # this backend also makes the map of tiles
        routing = topk_routing(
            torch.randn(5, 3, device=DEVICE),
            2,
            token_padding_mask=torch.arange(5, device=DEVICE) == 3,
        )
    fields = {n: getattr(routing, n) for n in ("indices", "order", "position", "offsets", "tiles")}
    activation = "swiglu" if variant == "packed" else variant

    def mlp(x, weights, indices, order, position, offsets, tiles, **parameters):
        rows = routing._replace(
            weights=weights,
            indices=indices,
            order=order,
            position=position,
            offsets=offsets,
            tiles=tiles,
        )
        with mmfused.backend(backend):
            return mmfused.grouped_mlp(x, rows, **parameters, activation=activation)

    def linear(x, weights, indices, order, position, offsets, tiles, w_up, b_up):
        rows = routing._replace(
            weights=weights,
            indices=indices,
            order=order,
            position=position,
            offsets=offsets,
            tiles=tiles,
        )
        with mmfused.backend(backend):
            sorted_rows = grouped_linear(x, rows, w_up, b_up)
            return sorted_rows, grouped_linear(
                sorted_rows, rows, w_up.mT, gather=False, combine=True
            )

    # The interpreter is slow; test_strides.py tests other layouts.
    views = ("every second", "wider rows") if backend == "fused" else VIEWS
    check_views(mlp, leaves, fields, False, views)
    if variant == "gelu":
        check_views(
            linear, {n: leaves[n] for n in ("x", "weights", "w_up", "b_up")}, fields, False, views
        )
    expanded = {n: x[:1].expand_as(x) for n, x in leaves.items()}
    got, want = (
        values_of(mlp, table, fields)
        for table in (expanded, {n: x.contiguous() for n, x in expanded.items()})
    )
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gaps_between_rows_are_not_read():
    """Each row has an odd number of bfloat16 values and is followed by NaN.

    A CPU's matrix product may read two values at a time.
    """
    routing = topk_routing(torch.randn(33, 3), 1)
    x, weight = (
        torch.full((33, 36), math.nan, dtype=torch.bfloat16),
        torch.randn(3, 16, 33, dtype=torch.bfloat16),
    )
    x[:, :33] = torch.randn(33, 33)
    with mmfused.backend("composed"):
        got, want = (
            grouped_linear(rows, routing, weight, gather=False)
            for rows in (x[:, :33], x[:, :33].clone())
        )
    assert torch.equal(got, want)


# ---- uninitialized memory, and rows of masked tokens ---------------------------------------------


@pytest.fixture
def garbage(monkeypatch):
    """Fill uninitialized memory: integers with garbage, floats with NaN."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if (
                sys._getframe(1).f_globals.get("__name__", "").startswith("mmfused")
                and tensor.dtype != torch.bool
            ):
                tensor.fill_(
                    math.nan
                    if tensor.is_floating_point()
                    else GARBAGE
                    if tensor.element_size() > 1
                    else 77
                )
            return tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.mark.parametrize("option", OPTIONS)
def test_routing_does_not_read_uninitialized_memory(option, garbage):
    """Compare with composed for no tokens, only masked tokens, and several blocks of tokens."""
    for tokens, all_masked in ((0, False), (21, True), (70, False)):
        options = make_options(option, tokens, 13, 2)
        if all_masked:
            options["token_padding_mask"] = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
        upstream = torch.randn(tokens, 2, device=DEVICE)
        for leaves in (make_logits(tokens, 13), make_inputs(tokens, 13, 20)):
            results = []
            for backend in ("fused", "composed"):
                replay = options | dict(indices=results[0][0].indices) if results else options
                routing = route(leaves, 2, replay, backend)
                total = (
                    (routing.weights * upstream).sum()
                    + routing.balance_loss
                    + routing.z_loss
                    - routing.entropy
                )
                results.append((routing, torch.autograd.grad(total, list(leaves.values()))))
            (routing, got), (expected, want) = results
            for name in ("counts", "order", "position", "offsets"):
                assert torch.equal(getattr(routing, name), getattr(expected, name)), name
            assert ((routing.tiles[:, 0] >= -1) & (routing.tiles[:, 0] < 13)).all()
            assert ((routing.tiles[:, 1] >= 0) & (routing.tiles[:, 1] <= tokens * 2)).all()
            for a, b in zip((*routing[1:6], *got), (*expected[1:6], *want), strict=True):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sort", ["composed", "fused"])
@pytest.mark.parametrize("variant", ["gelu", "packed"])
def test_experts_do_not_read_uninitialized_memory(variant, sort, garbage):
    for tokens, experts, k in ((0, 5, 2), (1, 1, 1), (40, 5, 2)):
        # Odd experts get no tokens, and a token may choose an even expert twice.
        indices = torch.rand(tokens, experts).argsort(1)[:, :k].to(DEVICE) // 2 * 2
        indices = indices.clamp(max=experts - 1)
        for share in (0.0, 0.4, 1.0):
            mask = (torch.rand(tokens) < share).to(DEVICE)
            leaves = make_mlp((tokens, experts, k, 12, 10, 9), variant)
            upstream = torch.randn(tokens, 9, device=DEVICE)
            options = dict(variant=variant, mask=mask, upstream=upstream, sort=sort)
            got, want = (
                run_mlp(leaves, indices, torch.float32, b, **options)
                for b in ("fused", "reference")
            )
            for name, value in got.items():
                assert relative_error(value, want[name]) < 1e-5, name
            linear = dict(x=leaves["x"], weights=leaves["weights"], weight=leaves["w_up"])
            for combine in (False, True):
                rows = torch.randn(
                    tokens if combine else tokens * k, len(leaves["w_up"][0]), device=DEVICE
                )
                options = dict(gather=True, combine=combine, mask=mask, upstream=rows)
                got, want = (
                    run_linear(linear, indices, torch.float32, b, **options)
                    for b in ("fused", "reference")
                )
                for name, value in got.items():
                    assert relative_error(value, want[name]) < 1e-5, name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_module_accepts_no_tokens(shape, activation, backend):
    moe = TopKMoE(16, 8, 5, activation=activation).to(DEVICE)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    with mmfused.backend(backend):
        out, routing = moe(x)
    assert out.shape == shape and routing.indices.shape == (0, 2) and not routing.counts.any()
    losses = routing.balance_loss + routing.z_loss + routing.entropy
    assert losses == 0
    (out.sum() + losses).backward()
    assert x.grad.shape == shape and all(
        p.grad is not None and not p.grad.any() for p in moe.parameters()
    )


# ---- the selection bias --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_module_cast_to_another_dtype_keeps_its_selection_bias_in_float32_or_float64(dtype):
    moe = TopKMoE(12, 8, 5, selection_bias=True)
    moe.selection_bias.copy_(1 + torch.arange(5) * 2**-20)  # more digits than 16 bits can hold
    want = moe.selection_bias.clone()
    moe = torch.nn.Sequential(moe).to(dtype)[0]
    wide = torch.promote_types(dtype, torch.float32)
    assert (
        moe.w_up.dtype == dtype
        and moe.selection_bias.dtype == wide
        and torch.equal(moe.selection_bias, want.to(wide))
    )
    if CUDA or dtype != torch.float16:
        out, routing = moe(torch.randn(3, 12, dtype=dtype))
        assert out.dtype == dtype and "selection_bias" in moe.state_dict()
        update_selection_bias(moe.selection_bias, routing.counts)
        assert not torch.equal(moe.selection_bias, want.to(wide))
    assert moe.to("meta").selection_bias.device.type == "meta"
