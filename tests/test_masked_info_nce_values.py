"""Masked InfoNCE with large logits, non-finite rows, invalid arguments and unusual strides."""

import math

import pytest
import torch
from info_nce_kernels import DEVICE, check_together, ids, keys, make, small_tiles
from torch.nn.functional import normalize

import mmfused
from mmfused import masked_info_nce
from mmfused.ops import _common
from mmfused.ops.masked_info_nce import checks, scaled_info_nce

MIB = 2**20
BACKENDS = ("composed", "fused")


# ---- unwritten memory, which conftest.py fills with NaN ------------------------------------------


@pytest.mark.parametrize(("partial_bytes", "backward"), [(1, "chunked"), (512 * MIB, "owner")])
@pytest.mark.parametrize("same_id", [None, "drop", "mean", "sum"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_never_read_unwritten_memory(
    symmetric, same_id, partial_bytes, backward, monkeypatch
):
    small_tiles(monkeypatch, backward, partial_bytes=partial_bytes)

    def cases():
        shapes = [(3, 20), (16, 32), (20, 45)]  # below, at and above a tile of 16 x 32
        for seed, (rows, candidates) in enumerate(shapes if backward == "chunked" else shapes[::2]):
            for smoothing in (0.0, 0.1):
                for masked in (False, True):
                    options = dict(symmetric=symmetric, label_smoothing=smoothing)
                    options |= keys(rows, candidates, 3) if masked else {}
                    options |= (
                        {} if same_id is None else dict(ids(rows, candidates), same_id=same_id)
                    )
                    yield make(rows, candidates, seed=seed), options

    check_together(cases())


# ---- large logits --------------------------------------------------------------------------------


def large(kind, seed):
    """Return inputs with logits up to 10^4; ``kind`` selects the embeddings."""
    inputs = make(33, 41, 24, scale=1e4, seed=seed)
    query, candidate = inputs["query"], inputs["candidate"]
    if kind == "long rows":
        query *= 100
        candidate *= 100
        inputs["temperature"].fill_(1.0)
    if kind == "equal candidates":
        candidate[1::2] = candidate[0].clone()
    if kind == "targets equal queries":
        candidate[:33] = query
    if kind == "nearly parallel":
        for x in (query, candidate):
            x += 8 * query[0].clone()
            x /= x.norm(dim=1, keepdim=True)
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind",
    ["random", "long rows", "equal candidates", "targets equal queries", "nearly parallel"],
)
def test_errors_stay_within_the_budget_at_logits_of_ten_thousand(kind, backend, dtype):
    options = [
        dict(symmetric=True),
        dict(target=torch.arange(33).flip(0), label_smoothing=0.1),
        dict(keys(33, 41, 2), symmetric=True),
    ]
    check_together(((large(kind, seed), o) for seed in range(3) for o in options), dtype, backend)


def test_equal_candidates_have_bitwise_equal_logits():
    """The loss of 45 equal candidates is log(45).

    At logits of 10^4, summing the target's logit in another order would change the loss. A margin
    of 0 excludes no candidate that equals the target.
    """
    query, candidate = (normalize(torch.randn(n, 24), dim=-1).to(DEVICE) for n in (20, 1))
    candidate = candidate.expand(45, 24)
    for backend in BACKENDS:
        with mmfused.backend(backend):
            loss = masked_info_nce(query, candidate, temperature=1e-4, reduction="none")
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(45)))
    with mmfused.backend("composed"):
        loss = masked_info_nce(
            query, candidate, temperature=1e-4, reduction="none", false_negative_margin=0.0
        )
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(45)))


# ---- non-finite rows -----------------------------------------------------------------------------


def gradients(backend, query, candidate, *, upstream=None, function=masked_info_nce, **options):
    """Return the losses of the rows, and the gradients of query and candidate."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, candidate)]
    with mmfused.backend(backend):
        out = function(*leaves, **dict(temperature=0.3, reduction="none") | options)
        return out.detach(), *torch.autograd.grad(
            out, leaves, torch.ones_like(out) if upstream is None else upstream
        )


@pytest.mark.parametrize("backward", ["chunked", "owner"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_non_finite_row_affects_only_rows_with_the_same_key(
    symmetric, side, value, backend, backward, monkeypatch
):
    """Row 4 has key 0; rows with key 1 in the same tile are unaffected."""
    small_tiles(monkeypatch, backward)
    sides = [torch.randn(n, 8, device=DEVICE) for n in (20, 24)]
    key = torch.arange(24, device=DEVICE) % 2
    options = dict(query_key=key[:20], candidate_key=key, symmetric=symmetric, label_smoothing=0.1)
    want = gradients(backend, *sides, **options)
    sides[side][4, 1:3] = value
    got = gradients(backend, *sides, **options)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual[1::2], expected[1::2])
        assert actual.flatten(1).isnan().any(1)[4] if actual.dim() > 1 else actual[4].isnan()


# ---- invalid values: they give NaN on a GPU, where a check would need a sync ---------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Skip the checks of tensor values, as on a GPU."""
    for module in (checks, _common):
        monkeypatch.setattr(module, "check_value", lambda *_: None)


BAD_ROWS = {
    "a target below 0": ("target", -5),
    "a target one past the end": ("target", 24),
    "a target far past the end": ("target", 2**40),
    "a negative key": ("query_key", -1),
    "a key far below 0": ("query_key", -(2**40)),
    "a negative weight": ("row_weight", -1),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_an_invalid_value_makes_only_its_row_nan(case, backend, unchecked):
    name, value = BAD_ROWS[case]
    query, candidate = (torch.randn(n, 8, device=DEVICE) for n in (20, 24))
    key = torch.arange(24, device=DEVICE) % 2
    given = dict(
        target=key.new_tensor(range(20)),
        query_key=key[:20].clone(),
        candidate_key=key,
        row_weight=torch.ones(20, device=DEVICE),
    )
    want = gradients(backend, query, candidate, **given)
    given[name][4] = value
    got = gradients(backend, query, candidate, **given)
    rows = torch.arange(20, device=DEVICE) == 4
    for actual, expected in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(actual[~rows], expected[~rows])
        assert actual[rows].isnan().all()
    # Candidates with key 1 are unaffected, except 23: a target past the end is clamped to 23.
    torch.testing.assert_close(got[2][1:23:2], want[2][1:23:2])
    if name == "target":
        alone = gradients(backend, query, candidate, target=given["target"])
        assert torch.equal(alone[0].isnan(), rows) and torch.equal(alone[1].isnan().all(1), rows)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_candidate_key_below_minus_one_makes_every_row_nan(backend, unchecked):
    query, candidate = (torch.randn(n, 8, device=DEVICE) for n in (5, 6))
    for invalid in (-2, -(2**40)):
        key = torch.tensor([0, 1, invalid, 0, 1, -1], device=DEVICE)
        assert all(x.isnan().any() for x in gradients(backend, query, candidate, candidate_key=key))
        assert gradients(backend, query, candidate, candidate_key=key)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [-0.05, -0.3, math.nan, 0.0, 1e-39, -0.0])
def test_an_invalid_temperature_gives_nan(temperature, backend, unchecked):
    """A temperature is invalid if it is not positive or has no finite reciprocal."""
    query, candidate = (torch.randn(n, 8, device=DEVICE, dtype=torch.float16) for n in (5, 6))
    temperature = torch.tensor([temperature], device=DEVICE)
    for result in gradients(backend, query, candidate, temperature=temperature):
        assert result.isnan().all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("where", ["query", "candidate", "both"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_non_finite_embedding_makes_every_row_that_uses_it_nan(backend, value, where, symmetric):
    """The loss is NaN also where the logit is -inf, to which a softmax gives probability 0."""
    query, candidate = torch.ones(4, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    query[2] = -1
    if where != "candidate":
        query[1] = value
    if where != "query":
        candidate[0] = value
    with mmfused.backend(backend):
        out = mmfused.masked_info_nce(
            query, candidate, temperature=0.1, symmetric=symmetric, reduction="none"
        )
    rows = [1] if where == "query" and not symmetric else [0, 1, 2, 3]
    assert out[rows].isnan().all() and out.isnan().sum() == len(rows)


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_a_scale_does_not_round_the_embeddings(backend):
    query, candidate = (torch.randn(n, 8, device=DEVICE, dtype=torch.bfloat16) for n in (5, 6))
    scale = torch.tensor(14.3, device=DEVICE)
    with mmfused.backend(backend):
        out = scaled_info_nce(query, candidate, scale)
        want = scaled_info_nce(query.double(), candidate.double(), scale.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_finite_embeddings_whose_logit_overflows_give_nan(backend):
    with mmfused.backend(backend):
        x = 2e19 * torch.eye(2, 8, device=DEVICE)
        assert mmfused.masked_info_nce(x, x, temperature=1.0, reduction="none").isnan().all()
        x = 2 * torch.eye(2, 8, device=DEVICE)
        assert mmfused.masked_info_nce(x, x, temperature=5e-39, reduction="none").isnan().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("scale", [-20.0, 0.0, 3])
def test_scaled_info_nce_accepts_negative_and_zero_scales(scale, backend):
    query, candidate = (torch.randn(n, 8, device=DEVICE) for n in (5, 6))
    results = {}
    for name, dtype in (("got", torch.float32), ("want", torch.float64)):
        leaves = [
            x.to(dtype).requires_grad_()
            for x in (query, candidate, torch.tensor([scale], device=DEVICE))
        ]
        if name == "got":
            with mmfused.backend(backend):
                out = scaled_info_nce(*leaves)
        else:
            out = torch.nn.functional.cross_entropy(
                leaves[0] @ leaves[1].T * leaves[2], torch.arange(5, device=DEVICE)
            )
        results[name] = [x.double() for x in (out, *torch.autograd.grad(out, leaves))]
    torch.testing.assert_close(results["got"], results["want"], rtol=1e-4, atol=1e-5)


def test_a_temperature_without_a_finite_reciprocal_is_refused():
    x = torch.randn(4, 3)
    for temperature in (1e-39, torch.tensor(1e-39), torch.tensor(1e-60, dtype=torch.float64)):
        with pytest.raises(ValueError, match="too small for 1 / temperature in torch.float32"):
            masked_info_nce(x, x, temperature=temperature)
    assert masked_info_nce(x.double(), x.double(), temperature=1e-39).isfinite()


# ---- strides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_and_expanded_arguments_give_the_same_bits(backend, masked):
    """A strided view has every second element of a longer tensor, starting at an offset."""
    rows = dict(
        target=torch.randint(0, 24, (20,)),
        query_id=torch.randint(0, 5, (20,)),
        row_weight=torch.rand(20),
    )
    given = dict(
        rows,
        candidate_id=torch.randint(0, 5, (24,)),
        temperature=torch.tensor([0.3]),
        same_id="mean",
    )
    if masked:
        given |= dict(
            query_key=torch.randint(0, 3, (20,)), candidate_key=torch.randint(-1, 3, (24,))
        )
    sides = torch.randn(20, 8), torch.randn(24, 8)

    def view(x):
        if not isinstance(x, torch.Tensor):
            return x
        wide = torch.full([2 * n + 3 for n in x.shape], 77, dtype=x.dtype)
        wide[tuple(slice(3, None, 2) for _ in x.shape)] = x
        return wide[tuple(slice(3, None, 2) for _ in x.shape)]

    def loss_and_gradients(*sides, **given):
        with mmfused.backend(backend):
            # detach keeps the strides.
            leaves = [x.detach().to(DEVICE).requires_grad_() for x in sides]
            moved = {
                k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()
            }
            out = masked_info_nce(*leaves, **moved)
            return out, *torch.autograd.grad(out, leaves)

    want = loss_and_gradients(*sides, **given)
    got = loss_and_gradients(*map(view, sides), **{k: view(v) for k, v in given.items()})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expanded = {
        k: v[:1].expand(v.shape) if isinstance(v, torch.Tensor) else v for k, v in given.items()
    }
    dense = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in expanded.items()}
    sides = [x[:1].expand(x.shape) for x in sides]
    got = loss_and_gradients(*sides, **expanded)
    want = loss_and_gradients(*(x.contiguous() for x in sides), **dense)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_embeddings_give_the_same_bits(backend):
    """Strides do not change the order of summation.

    At logits of 10^2, another order in the backward would change a probability by 10^-5.
    """
    dense = torch.randn(5, 8, device=DEVICE), torch.randn(37, 8, device=DEVICE)
    turned = [x.T.contiguous().T for x in dense]
    options = dict(
        temperature=0.01,
        candidate_id=torch.randint(0, 9, (37,), device=DEVICE),
        same_id="mean",
        symmetric=True,
    )
    with mmfused.backend(backend):
        for want, got in zip(
            *(differentiated(sides, options) for sides in (dense, turned)), strict=True
        ):
            assert torch.equal(want, got)


def differentiated(sides, options):
    leaves = [x.detach().requires_grad_() for x in sides]
    out = masked_info_nce(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves)
