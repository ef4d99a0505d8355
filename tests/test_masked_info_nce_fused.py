"""Tests of the kernels of masked InfoNCE.

On a CPU the kernels run in Triton's interpreter. The tiles are small, so that small inputs span
several tiles. On a GPU the kernels use the planned tiles.
"""

import pytest
import torch
from info_nce_kernels import CUDA, DEVICE, check, check_together, ids, keys, make, run, small_tiles

import mmfused
from mmfused.kernels.masked_info_nce import backward, forward, plans
from mmfused.library import INTERPRETED
from mmfused.ops.masked_info_nce import autograd, masked_info_nce

BACKWARDS = ("chunked", "owner")
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.fixture(params=BACKWARDS)
def tiles(request, monkeypatch):
    return small_tiles(monkeypatch, request.param)


TARGET = dict(target=torch.randint(0, 53, (37,), generator=torch.Generator().manual_seed(3)))
OPTIONS = {
    "symmetric": dict(symmetric=True),
    "target": TARGET,
    "one key and -1": dict(symmetric=True, candidate_key=torch.arange(53) % 2 - 1),
    "three keys": dict(symmetric=True, candidate_key=torch.arange(53) % 4 - 1),
    "many keys": dict(keys(37, 53, 20), **TARGET),
    "keys and ids": dict(keys(37, 53, 3), **ids(37, 53), symmetric=True),
    "drop": dict(ids(37, 53), **TARGET),
    "mean": dict(ids(37, 53), **keys(37, 53, 3), same_id="mean", symmetric=True),
    "sum": dict(
        candidate_id=torch.arange(53) % 20, same_id="sum", label_smoothing=0.1, symmetric=True
    ),
    "smoothed": dict(label_smoothing=0.2, row_weight=torch.arange(37.0) % 3, **TARGET),
    "smoothed with keys": dict(
        keys(37, 53, 3), label_smoothing=0.2, positive_weight=0.5, symmetric=True, reduction="sum"
    ),
    "no reduction": dict(
        keys(37, 53, 2),
        reduction="none",
        positive_weight=0.5,
        row_weight=torch.arange(37.0) % 3,
        symmetric=True,
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_value_and_gradients(tiles, option):
    check(make(), OPTIONS[option])


@pytest.mark.parametrize("option", ["symmetric", "keys and ids", "sum"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision(tiles, option, dtype):
    """The row weights are subnormal in float16."""
    check(
        make(), OPTIONS[option] | dict(row_weight=torch.full((37,), 1e-7), reduction="sum"), dtype
    )


@pytest.mark.parametrize(
    "rows, candidates, dim", [(65, 65, 40), (1, 1, 7), (1, 70, 16), (33, 33, 3)]
)
def test_shapes(monkeypatch, rows, candidates, dim):
    several = [make(rows, candidates, dim, seed=seed) for seed in range(8 if rows == 1 else 1)]
    for kind in BACKWARDS:
        small_tiles(monkeypatch, kind, dim)
        check_together((inputs, dict(symmetric=True)) for inputs in several)
        if candidates == 1:
            got = run(several[0], dict(symmetric=True), torch.float32)
            assert not any(value.any() for value in got.values())  # exactly 0
    if rows < 65:
        masked = dict(keys(rows, candidates, 2), target=torch.full((rows,), candidates - 1))
        check_together((inputs, masked) for inputs in several)


def test_tiles_planned_for_a_gpu():
    check(make(33, 70, 20), OPTIONS["symmetric"] | dict(candidate_key=torch.arange(70) % 3 - 1))
    check(make(20, 70, 20), dict(symmetric=True), torch.float16)
    check(make(20, 40, 300), dict(symmetric=True), torch.float16)


@pytest.mark.parametrize("scale", [25.0, 100.0, 1e4])
def test_large_scales(tiles, scale):
    """At the first scale, the 16-bit logits are at most 32, and no maximum is subtracted.

    float32 is tested only with the chunked backward on a CPU.
    """
    dtype = torch.float32 if tiles.backward == "chunked" and not CUDA else torch.float16
    for option in ("symmetric", "keys and ids"):
        got = check(make(scale=scale), OPTIONS[option], dtype)
        assert all(value.isfinite().all() for value in got.values())


def test_rows_without_negatives_have_a_loss_of_exactly_zero(tiles):
    """Each of the first 20 rows has a unique key; its loss and gradients are exactly 0."""
    key = torch.cat((torch.arange(20), torch.full((17,), 30), torch.full((16,), 31)))
    options = dict(candidate_key=key, symmetric=True, reduction="none")
    got = check(make(), options)
    assert (
        not got["out"][:20].any()
        and not got["dquery"][:20].any()
        and not got["dcandidate"][:20].any()
    )
    assert got["out"][20:].all() and got["dquery"][20:].any(1).all()


def test_nan_in_a_masked_candidate_has_no_effect(tiles):
    inputs, key = make(), torch.arange(53) % 3
    masked = torch.arange(53) % 3 == 2
    inputs["candidate"][masked] = float("nan")
    options = dict(query_key=torch.arange(37) % 2, candidate_key=key, target=torch.arange(37) % 2)
    got = check(inputs, options)
    assert (
        all(value.isfinite().all() for value in got.values())
        and not got["dcandidate"][masked.to(DEVICE)].any()
    )
    inputs["candidate"][3] = float("nan")  # its key is 0
    with torch.no_grad():
        out = masked_info_nce_fused(inputs, options | dict(reduction="none"))
    assert torch.equal(out.isnan(), (torch.arange(37) % 2 == 0).to(DEVICE))


def masked_info_nce_fused(inputs, options):
    with mmfused.backend("fused"):
        moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        embeddings = {k: inputs[k].to(DEVICE, torch.float32) for k in ("query", "candidate")}
        return masked_info_nce(**embeddings, temperature=0.07, **moved)


def test_repeated_runs_are_bitwise_equal(tiles):
    first, second = (run(make(), OPTIONS["mean"], torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_non_contiguous_inputs_give_the_same_bits():
    inputs = make(dim=38)
    views = {k: v[:, ::2] if v.dim() else v for k, v in inputs.items()}
    dense = {k: v.contiguous() for k, v in views.items()}
    got, want = (run(x, OPTIONS["symmetric"], torch.float32) for x in (views, dense))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.not_on_ptx("counts the calls of a jit function in the interpreter")
@pytest.mark.skipif(CUDA, reason="only the interpreter can count the computed tiles")
def test_tiles_without_pairs_are_skipped(monkeypatch):
    """With four sorted keys, each sweep computes 8 of the 8 x 4 tiles.

    If the first column of tiles has key -1, the first two rows of tiles compute only that column.
    Each of the other six rows of tiles computes two tiles.
    """
    small_tiles(monkeypatch, "chunked", chunk_bytes=4 * 128 * 128)
    calls = []
    for module in (forward, backward):
        original = module.products
        monkeypatch.setattr(
            module,
            "products",
            lambda *args, f=original, m=module: calls.append(m.__name__) or f(*args),
        )
    for shared, visited in ((0, 8), (32, 2 + 6 * 2)):
        calls.clear()
        key = torch.arange(128) // 32
        options = dict(
            query_key=key,
            candidate_key=key.masked_fill(key < shared // 32, -1),
            target=torch.arange(128),
        )
        run(make(128, 128, 8), options, torch.float32)
        assert [sum(name.endswith(kind) for name in calls) for kind in ("forward", "backward")] == [
            visited,
            visited,
        ]


def arguments(symmetric, everything, with_keys):
    torch.manual_seed(0)
    q, c = torch.randn(20, 24, device=DEVICE), torch.randn(40, 24, device=DEVICE)
    int64 = dict(device=DEVICE, dtype=torch.int64)
    q_key, c_key = (
        torch.arange(20, **int64) // 10,
        torch.arange(-8, 32, **int64).div(16, rounding_mode="floor"),
    )
    vectors = (
        (q_key, c_key, torch.arange(20, **int64) % 7, torch.arange(40, **int64) % 9)
        if with_keys
        else (None,) * 4
    )
    bias = torch.zeros(40, device=DEVICE) if with_keys else None
    inputs = (
        q,
        c,
        bias,
        torch.tensor(3.0, device=DEVICE),
        torch.arange(20, **int64),
        *vectors,
        not everything,
    )
    coefficients = (
        torch.rand(4, 20, device=DEVICE),
        torch.rand(4, 40, device=DEVICE) if symmetric else None,
    )
    return (*inputs, symmetric, everything), (
        *coefficients,
        *inputs,
        everything,
        True,
        not everything,
        with_keys,
    )


@pytest.mark.parametrize(
    "symmetric, everything, with_keys",
    [(True, False, False), (False, True, True), (True, False, True)],
)
def test_opcheck(monkeypatch, symmetric, everything, with_keys):
    small_tiles(monkeypatch, "owner" if symmetric and with_keys else "chunked")
    sweep, sweep_bwd = arguments(symmetric, everything, with_keys)
    torch.library.opcheck(torch.ops.mmfused.info_nce_sweep.default, sweep)
    torch.library.opcheck(torch.ops.mmfused.info_nce_sweep_bwd.default, sweep_bwd)


def test_plans_stay_within_their_memory_limits():
    """Scratch memory at D = 768 is below 1 GB for B = 65536 and below 4 GB for B = 262144."""
    for rows, most in ((65536, 1e9), (262144, 4e9)):
        plan = plans.plan(768, torch.bfloat16, 90, True, False)
        splits, length, groups, each = plans.sweep_grid(
            rows, rows, plan.sweep, plan.partial_bytes, 2
        )
        assert groups * each * plan.sweep.BM >= rows and splits * length * plan.sweep.BN >= rows
        assert 4 * 2 * groups * rows <= plan.partial_bytes
        height, width = plans.chunk(rows, rows, plan.apply_ds, plan.chunk_bytes, 2)
        assert 2 * height * width + 2 * 4 * rows * 768 <= most
    for rows, candidates in ((1, 1), (1000, 3), (17, 10**6), (20000, 33333)):
        height, width = plans.chunk(rows, candidates, plan.apply_ds, plan.chunk_bytes, 2)
        assert (
            height % plan.apply_ds.BM == 0
            and width % plan.apply_ds.BN == 0
            and 2 * height * width <= plan.chunk_bytes
        )


@pytest.mark.parametrize("kind", ["owner", "chunked", "composed"])
@pytest.mark.parametrize("only", [0, 1])
def test_no_gradient_is_computed_for_a_constant_side(monkeypatch, kind, only):
    """The gradient of the other side is bitwise unchanged."""
    if kind != "composed":
        small_tiles(monkeypatch, kind)
    results, name = [], "info_nce_sweep_bwd" + ("_composed" if kind == "composed" else "")
    real = getattr(autograd, name)
    monkeypatch.setattr(autograd, name, lambda *args: results.append(real(*args)) or results[-1])
    sides = [torch.randn(n, 24, device=DEVICE, requires_grad=True) for n in (20, 40)]
    with mmfused.backend("composed" if kind == "composed" else "fused"):
        want = torch.autograd.grad(
            mmfused.masked_info_nce(*sides, temperature=2.0, symmetric=True), sides
        )
        sides[1 - only] = sides[1 - only].detach()
        (got,) = torch.autograd.grad(
            mmfused.masked_info_nce(*sides, temperature=2.0, symmetric=True), sides[only]
        )
    assert torch.equal(got, want[only])
    assert [x.numel() > 0 for x in results[-1]] == [only == 0, only == 1, False]


@pytest.mark.parametrize(
    "query_key, candidate_key",
    [([3], [7]), ([7], [3]), ([5, 5, 9], [7, 7, 7, 2]), ([7, 7], [5, 9, 1])],
)
def test_sides_without_a_common_key_read_no_unwritten_memory(tiles, query_key, candidate_key):
    """Each row sees only its target. conftest.py fills new memory with NaN."""
    options = dict(
        query_key=torch.tensor(query_key),
        candidate_key=torch.tensor(candidate_key),
        positive_weight=0.5,
    )
    check(make(len(query_key), len(candidate_key), 7), options)
