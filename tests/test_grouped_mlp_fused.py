"""Tests of the kernels of grouped experts."""

import dataclasses
import math

import numpy
import pytest
import torch
from grouped_mlp_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    SHAPES,
    VARIANTS,
    check,
    choose_experts,
    make_mlp,
    randn,
    run_linear,
    run_mlp,
)

import mmfused
from mmfused import routing_from_indices
from mmfused.kernels.grouped_mlp import backward, forward, weight_gradients
from mmfused.kernels.grouped_mlp.plans import KINDS, plan
from mmfused.kernels.recording import launches_made
from mmfused.kernels.tiles import tile_rows

NARROW = (3, 48, 80, 32)  # experts, dim, hidden width, output width


def replace_plan(monkeypatch, function):
    for module in (forward, backward, weight_gradients):
        monkeypatch.setattr(module, "plan", function)


@pytest.fixture(autouse=True)
def long_steps(monkeypatch):
    """Use a larger BK in the interpreter, which is faster with fewer steps.

    On a GPU, the registers would not suffice for this BK in float32.
    """
    if not CUDA:
        replace_plan(monkeypatch, lambda *args: dataclasses.replace(plan(*args), BK=64))


# ---- forward and every gradient ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, bias", [("odd", True), ("even", False)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mlp_stays_within_the_budget(variant, shape, bias, dtype):
    tokens, experts, k, *_, out = SHAPES[shape]
    mask = (torch.rand(tokens) < 0.2).to(DEVICE)
    options = dict(variant=variant, mask=mask, upstream=torch.randn(tokens, out, device=DEVICE))
    check(
        run_mlp,
        make_mlp(shape, variant, bias),
        choose_experts(tokens, experts, k),
        dtype=dtype,
        **options,
    )


def test_float32_plans_stay_within_the_budget(monkeypatch):
    replace_plan(monkeypatch, plan)
    options = dict(variant="swiglu", upstream=torch.randn(37, 36, device=DEVICE))
    check(run_mlp, make_mlp("odd", "swiglu"), choose_experts(37, 5, 2), **options)


MORE_SHAPES = [
    ("wide", "swiglu"),
    ("top 1", "packed"),
    ("one token", "gelu"),
    ("three tokens", "swiglu"),
    ("no token", "packed"),
]


@pytest.mark.parametrize(
    "shape, variant, dtype",
    [(*case, torch.float32) for case in MORE_SHAPES] + [("many tiles", "gelu", torch.float16)],
)
def test_mlp_stays_within_the_budget_at_more_shapes(shape, variant, dtype):
    tokens, experts, k, *_, out = SHAPES[shape]
    upstream = torch.randn(tokens, out, device=DEVICE)
    got = check(
        run_mlp,
        make_mlp(shape, variant),
        choose_experts(tokens, experts, k),
        dtype=dtype,
        variant=variant,
        upstream=upstream,
    )
    assert not any(value.any() for value in got.values()) == (shape == "no token")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", [False, True], ids=["rows", "combine"])
@pytest.mark.parametrize("gather", [False, True], ids=["sorted", "gather"])
def test_linear_stays_within_the_budget(gather, combine, dtype):
    for shape, bias in (("odd", True), ("even", False)):
        tokens, experts, k, dim, _, out = SHAPES[shape]
        leaves = dict(
            x=randn(tokens if gather else tokens * k, dim), weights=torch.rand(tokens, k).double()
        )
        leaves["weight"] = randn(experts, out, dim) / 8
        if bias:
            leaves["bias"] = randn(experts, out)
        mask = (torch.arange(tokens) % 5 == 3).to(DEVICE)
        options = dict(gather=gather, combine=combine, mask=mask)
        upstream = torch.randn(tokens if combine else tokens * k, out, device=DEVICE)
        got = check(
            run_linear,
            leaves,
            choose_experts(tokens, experts, k),
            dtype=dtype,
            upstream=upstream,
            **options,
        )
        live = int((~mask).sum())
        if not combine:  # rows of masked tokens are 0
            assert not got["out"][live * k :].any() and got["out"][: live * k].all(1).any()
        if not gather:
            assert not got["dx"][live * k :].any() and got["dx"][: live * k].any(1).all()


@pytest.mark.parametrize(
    "height, arch",
    [
        *((16, 90), (32, 90), (64, 80), (64, 90), (128, 80), (128, 90)),
        pytest.param(
            "long",
            90,
            marks=pytest.mark.not_on_ptx("tiles in float32 need more shared memory than a GPU has"),
        ),
    ],
)
@pytest.mark.parametrize("variant", ["gelu", "swiglu"])
def test_16_bit_plans_keep_the_budget_in_float32(monkeypatch, variant, height, arch):
    """Run 16-bit plans in float32, because 16-bit rounding could hide errors."""
    if CUDA:
        pytest.skip("16-bit plans may not fit a GPU in float32; only the interpreter runs them")
    planned = set()

    def half(kind, rows, experts, n, k, dtype, _):
        if height == "long":  # plan for large batches and widths
            rows, n, k = 64 * rows, 4096, 4096
        planned.add(kind)
        tile = plan(kind, rows, experts, n, k, torch.float16, arch)
        assert kind.endswith("weights") or tile.BM == (128 if height == "long" else height)
        return tile

    replace_plan(monkeypatch, half)
    experts, dim, width, out = NARROW
    tokens = (128 if height == "long" else height) * experts // 2
    leaves = make_mlp((tokens, experts, 2, dim, width, out), variant)
    mask = torch.arange(tokens) % 7 == 3
    mask[: tokens // 2] = False
    indices = choose_experts(tokens, experts, 2)
    assert tile_rows(2 * tokens, experts) == (128 if height == "long" else height)
    check(run_mlp, leaves, indices, variant=variant, mask=mask, upstream=torch.randn(tokens, out))
    assert planned == {"rows", "gathered weights"} | (
        {"gated", "gated hidden"} if variant == "swiglu" else {"hidden"}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", ["one", "half"])
def test_experts_without_tokens_have_zero_gradients(choice, dtype):
    tokens, experts, k = 41, 6, 1 if choice == "one" else 2
    leaves = make_mlp((tokens, experts, k, 24, 20, 12), "packed")
    indices = choose_experts(tokens, experts, k, choice)
    got = check(
        run_mlp,
        leaves,
        indices,
        dtype=dtype,
        variant="packed",
        upstream=torch.randn(tokens, 12, device=DEVICE),
    )
    empty = torch.bincount(indices.flatten(), minlength=experts) == 0
    assert empty.tolist() == [True, False, True, choice == "one", True, choice == "one"]
    for name in ("dw_up", "dw_down", "db_up", "db_down"):
        assert not got[name][empty].any() and got[name][~empty].flatten(1).any(1).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["gelu", "packed"])
def test_masked_tokens_may_be_nan(variant, dtype):
    leaves, indices = make_mlp("odd", variant), choose_experts(37, 5, 2)
    mask = (torch.rand(37) < 0.4).to(DEVICE)
    upstream = torch.randn(37, 36, device=DEVICE)
    want = run_mlp(leaves, indices, dtype, variant=variant, mask=mask, upstream=upstream)
    leaves["x"][mask.cpu()] = math.nan
    upstream[mask] = math.nan
    got = run_mlp(leaves, indices, dtype, variant=variant, mask=mask, upstream=upstream)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    assert not any(got[name][mask].any() for name in ("out", "dx", "dweights"))
    leaves["x"][:], mask = math.nan, torch.ones_like(mask)
    for name, value in run_mlp(leaves, indices, dtype, variant=variant, mask=mask).items():
        assert not value.any(), name


@pytest.mark.parametrize("gather", [False, True], ids=["sorted", "gather"])
def test_grouped_linear_does_not_read_rows_of_masked_tokens(gather):
    tokens, experts, k, dim, _, out = SHAPES["odd"]
    mask = (torch.arange(tokens) % 3 == 0).to(DEVICE)
    live = int((~mask).sum()) * k
    leaves = dict(
        x=randn(tokens if gather else tokens * k, dim), weights=torch.rand(tokens, k).double()
    )
    leaves |= dict(weight=randn(experts, out, dim) / 8, bias=randn(experts, out))
    indices = choose_experts(tokens, experts, k)
    for combine in (False, True):
        upstream = torch.randn(tokens if combine else tokens * k, out, device=DEVICE)
        options = dict(gather=gather, combine=combine, mask=mask)
        want = run_linear(leaves, indices, torch.float32, upstream=upstream, **options)
        poisoned = leaves | {"x": leaves["x"].clone()}
        poisoned["x"][mask.cpu() if gather else torch.arange(tokens * k) >= live] = math.nan
        upstream[mask if combine else torch.arange(tokens * k, device=DEVICE) >= live] = math.nan
        for name, value in run_linear(
            poisoned, indices, torch.float32, upstream=upstream, **options
        ).items():
            assert torch.equal(value, want[name]), name


# ---- layouts -------------------------------------------------------------------------------------


def test_strided_inputs_weights_and_gradients_give_the_same_results():
    leaves, indices = make_mlp("odd", "swiglu"), choose_experts(37, 5, 2)
    want = run_mlp(
        leaves, indices, torch.float32, variant="swiglu", upstream=torch.ones(37, 36, device=DEVICE)
    )
    joint = torch.cat([leaves["w_gate"], leaves["w_up"]], 1)
    views = {
        "the halves of a packed weight": dict(w_gate=joint[:, :50], w_up=joint[:, 50:]),
        "experts and rows transposed": {
            n: leaves[n].transpose(0, 1).contiguous().transpose(0, 1)
            for n in ("w_up", "w_gate", "w_down")
        },
        "only w_up transposed": dict(
            w_up=leaves["w_up"].transpose(0, 1).contiguous().transpose(0, 1)
        ),
        "rows and columns transposed": dict(
            w_down=leaves["w_down"].mT.contiguous().mT, x=leaves["x"].T.contiguous().T
        ),
        "wider rows": dict(
            x=torch.cat([leaves["x"], torch.full_like(leaves["x"], math.nan)], 1)[:, :70]
        ),
    }
    for name, changed in views.items():
        strided = leaves | changed
        upstream = torch.ones((), device=DEVICE).expand(37, 36)
        got = run_mlp(strided, indices, torch.float32, variant="swiglu", upstream=upstream)
        for key, value in got.items():
            torch.testing.assert_close(
                value,
                want[key],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, n=name, k=key: f"{n}, {k}: {m}",
            )


def test_packed_weight_matches_two_separate_weights():
    leaves, indices = make_mlp("odd", "packed"), choose_experts(37, 5, 2)
    packed = run_mlp(leaves, indices, torch.float32, variant="packed")
    joint = leaves.pop("w_up")
    halves = run_mlp(
        leaves | dict(w_gate=joint[:, :50], w_up=joint[:, 50:]),
        indices,
        torch.float32,
        variant="swiglu",
    )
    packed["dw_gate"], packed["dw_up"] = packed["dw_up"].chunk(2, 1)
    for name, value in halves.items():
        assert torch.equal(value, packed[name]), name


# ---- registration --------------------------------------------------------------------------------


def sorted_rows(tokens, experts, k):
    with mmfused.backend("composed"):
        routing = routing_from_indices(
            choose_experts(tokens, experts, k), torch.rand(tokens, k, device=DEVICE), experts
        )
    return routing.weights, routing[6:]


NEEDS = (
    (True, True, True),
    (True, False, False),
    (False, True, False),
    (False, False, True),
    (False, False, False),
)


@pytest.mark.parametrize(
    "variant, needs",
    [("packed", n) for n in NEEDS] + [("swiglu", n) for n in NEEDS[2:4]] + [("relu", NEEDS[0])],
)
def test_mlp_operators_pass_opcheck(variant, needs):
    weights, rows = sorted_rows(5, 3, 2)
    leaves = {
        name: value.float().to(DEVICE)
        for name, value in make_mlp((5, 3, 2, 10, 8, 9), variant, variant != "relu").items()
    }
    x, w_up, w_gate, w_down, b_up, b_down = (
        leaves.get(n) for n in ("x", "w_up", "w_gate", "w_down", "b_up", "b_down")
    )
    how = ("swiglu" if variant == "packed" else variant, variant == "packed")
    args = (x, w_up, w_gate, w_down, b_up, b_down, weights, *rows, *how)
    if all(needs):
        torch.library.opcheck(torch.ops.mmfused.grouped_mlp_fwd, args)
    out, hidden = torch.ops.mmfused.grouped_mlp_fwd(*args)
    args = (
        torch.randn_like(out),
        x,
        hidden,
        w_up,
        w_gate,
        w_down,
        b_down,
        weights,
        *rows,
        *how,
        *needs,
    )
    torch.library.opcheck(torch.ops.mmfused.grouped_mlp_bwd, args)


@pytest.mark.parametrize("combine", [False, True], ids=["rows", "combine"])
@pytest.mark.parametrize("gather", [False, True], ids=["sorted", "gather"])
def test_linear_operators_pass_opcheck(gather, combine):
    weights, rows = sorted_rows(6, 3, 2)
    x, weight = (
        torch.randn(6 if gather else 12, 10, device=DEVICE),
        torch.randn(3, 9, 10, device=DEVICE),
    )
    bias, weights = torch.randn(3, 9, device=DEVICE), weights if combine else None
    common = (x, weight, bias, weights, *rows, 2, gather)
    torch.library.opcheck(torch.ops.mmfused.grouped_linear_fwd, common)
    out = torch.ops.mmfused.grouped_linear_fwd(*common)
    for needs in NEEDS[:1] if gather else NEEDS:
        torch.library.opcheck(
            torch.ops.mmfused.grouped_linear_bwd, (torch.randn_like(out), *common, *needs)
        )


# ---- behaviour -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gelu", "packed"])
def test_repeats_and_given_tiles_agree_bit_for_bit(variant):
    leaves, indices = make_mlp("odd", variant), choose_experts(37, 5, 2)
    mask, upstream = (torch.rand(37) < 0.1).to(DEVICE), torch.randn(37, 36, device=DEVICE)
    options = dict(variant=variant, mask=mask, upstream=upstream)
    want = run_mlp(leaves, indices, torch.float16, **options)
    for sort in ("composed", "fused"):
        for name, value in run_mlp(leaves, indices, torch.float16, sort=sort, **options).items():
            assert torch.equal(value, want[name]), (sort, name)


@pytest.mark.parametrize("only", ["x", "weights", "w_up", "w_down", "b_up", "b_down"])
def test_gradient_of_a_single_input_of_grouped_mlp(only):
    leaves, indices = make_mlp((9, 3, 2, 20, 12, 10), "packed"), choose_experts(9, 3, 2)
    want = run_mlp(leaves, indices, torch.float32, variant="packed")
    got = run_mlp(leaves, indices, torch.float32, variant="packed", frozen=leaves.keys() - {only})
    assert set(got) == {"out", f"d{only}"}
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combine", [False, True], ids=["rows", "combine"])
@pytest.mark.parametrize("only", ["x", "weights", "weight", "bias"])
def test_gradient_of_a_single_input_of_grouped_linear(only, combine):
    if only == "weights" and not combine:
        pytest.skip("routing weights are not used")
    tokens, experts, k, dim, out = 9, 3, 2, 20, 10
    leaves = dict(
        x=randn(tokens, dim),
        weights=torch.rand(tokens, k).double(),
        weight=randn(experts, out, dim),
    )
    leaves["bias"] = randn(experts, out)
    indices = choose_experts(tokens, experts, k)
    want = run_linear(leaves, indices, torch.float32, gather=True, combine=combine)
    got = run_linear(
        leaves, indices, torch.float32, gather=True, combine=combine, frozen=leaves.keys() - {only}
    )
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-5)


def test_kernels_that_are_launched():
    """Forward launches three kernels. Backward launches five, or three if parameters are frozen.

    The kernels of the routing are not counted.
    """
    leaves, indices = make_mlp("odd", "swiglu"), choose_experts(37, 5, 2)
    with launches_made() as launches:
        run_mlp(leaves, indices, torch.float32, variant="swiglu", sort="fused")
    sort = ("count_kernel", "scan_kernel", "finish_kernel")
    products = ["rows_kernel", "rows_kernel", "combine_kernel"]
    assert [launch.name for launch in launches if launch.name not in sort] == [
        *products,
        "hidden_kernel",
        "weights_kernel",
        "weights_kernel",
        "rows_kernel",
        "combine_kernel",
    ]
    frozen = ("w_up", "w_gate", "w_down", "b_up", "b_down")
    with launches_made() as launches:
        run_mlp(leaves, indices, torch.float32, variant="swiglu", sort="fused", frozen=frozen)
    made = [launch.name for launch in launches if launch.name not in sort]
    assert made == [*products, "hidden_kernel", "rows_kernel", "combine_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_plans_have_valid_tiles(arch, dtype):
    """BM must be the tile height of the map of tiles, except for the gradients of weights."""
    for rows, experts in ((0, 5), (100, 16), (512, 16), (1024, 16), (1 << 20, 8)):
        for n, k in ((768, 3072), (5504, 2048), (70, 300)):
            for kind in KINDS:
                tile = plan(kind, rows, experts, n, k, dtype, arch)
                assert kind.endswith("weights") or tile.BM == tile_rows(rows, experts)
                assert tile.BN >> tile.halvings >= 16
                if tile.BM >= 64 and dtype != torch.float32:
                    assert tile.BM * tile.num_warps >= 256


# ---- offsets above 2^31 --------------------------------------------------------------------------


@pytest.mark.parametrize("far", ["x", "weight", "out"])
def test_offsets_are_64_bit(far):
    """Compute a product with tokens, weights or output rows beyond element 2^31."""
    if CUDA:
        pytest.skip("this test runs only in the interpreter")
    from mmfused.kernels.grouped_mlp.forward import rows_kernel

    width = 32768
    rows = 2**31 // width + 20
    # 4.3 GB, but pages that are never touched take no memory.
    storage = torch.from_numpy(numpy.zeros(rows * width, numpy.float16))
    first, stride_e, x, n = 0, 16 * width, torch.randn(4, width).half(), 16
    order, weight = torch.tensor([3, 0, 2, 1], dtype=torch.int32), torch.zeros(1)
    out = torch.full((4, n), math.nan, dtype=torch.float16)
    if far == "x":
        x = storage.view(rows, width)
        order = torch.tensor([rows - 1, rows - 3, rows - 2, 5], dtype=torch.int32)
        x[order.long(), :40] = torch.randn(4, 40).half()
    if far == "weight":
        weight, stride_e = storage, 2**31 + 8
    else:
        weight = torch.zeros(2 * stride_e, dtype=torch.float16)
    matrix = weight[stride_e:].as_strided((16, 40), (width if far == "weight" else 40, 1))[
        : 3 if far == "weight" else 16
    ]
    matrix.copy_(torch.randn(matrix.shape))
    if far == "out":
        out, n, first = storage.view(rows, width), width, rows - 4
        order = torch.zeros(rows, dtype=torch.int32)
        order[first:] = torch.tensor([3, 0, 2, 1])
    offsets, tiles = (
        torch.tensor([first, first, first + 4], dtype=torch.int32),
        torch.tensor([[1, first]], dtype=torch.int32),
    )
    rows_kernel[(1,)](
        x,
        weight,
        None,
        None,
        order,
        offsets,
        tiles,
        None,
        out,
        len(order),
        2,
        1,
        x.stride(0),
        stride_e,
        *matrix.stride(),
        N=n,
        K=40,
        k=1,
        BM=16,
        BN=16,
        BK=16,
        HALVINGS=0,
        GROUP=1,
        GATHER=True,
        ACTIVATION="none",
        TAIL=False,
        UPCAST=False,
    )
    want = x[order[first:].long(), :40].double() @ matrix.double().T
    torch.testing.assert_close(out[first:, : len(matrix)].double(), want, rtol=1e-2, atol=1e-2)
