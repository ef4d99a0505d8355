"""Routing with values that are non-finite, out of range or very large.

The tests run on the backends and on the C++ router.
"""

import itertools
import math

import csrc_cases
import csrc_machine
import pytest
import torch
from topk_routing_cases import DEVICE, DTYPES, LOSSES, cast, make_inputs, make_logits, run

import mmfused
from mmfused import routing_from_indices
from mmfused.ops.topk_routing import checks
from mmfused.testing import over_budget

BACKENDS = ("reference", "composed", "fused")
BALANCES = ("switch", "gshard", "mse")
inf, nan = math.inf, math.nan


@pytest.fixture(scope="session")
def router():
    return csrc_machine.compiled_router(90)


@pytest.fixture
def unchecked(monkeypatch):
    """Switch off checks of values, as on CUDA and in compiled graphs."""
    monkeypatch.setattr(checks, "check_value", lambda *_: None)


def check_non_finite(got, exact, plain):
    """Check NaN and inf against the float64 reference, and return the tables with zeros for both.

    If one gradient of a token is NaN in the reference, all gradients of the token may be NaN.
    """
    tables = [dict(table) for table in (got, exact, plain)]
    for name, want in exact.items():
        free = torch.zeros_like(want, dtype=torch.bool)
        if name[0] == "d":
            free |= want.isnan().any(-1, keepdim=True)
        for table in tables:
            value = table[name].masked_fill(free, 0.0)
            assert torch.equal(value.isnan(), want.isnan() & ~free), name
            assert torch.equal(value.isinf(), want.isinf()), name
            table[name] = value.nan_to_num(0.0, 0.0, 0.0)
    return tables


class Tables:
    """Results of several cases, compared together because the error of one number is random."""

    def __init__(self):
        self.seen = [{}, {}, {}]

    def add(self, tables):
        for table, seen in zip(tables, self.seen, strict=True):
            for name, value in table.items():
                seen.setdefault(name, []).append(value.flatten())

    def check(self):
        assert (
            over_budget(
                *({name: torch.cat(values) for name, values in seen.items()} for seen in self.seen)
            )
            == []
        )


def check_rows(together, options, leaves, k, backend, invalid):
    """Compare with the reference, except for the gradients of the tokens ``invalid``."""
    upstream = torch.randn(len(next(iter(leaves.values()))), k, dtype=torch.float64, device=DEVICE)
    results = [run(leaves, k, options, backend, upstream)]
    replay = dict(indices=options.get("indices", results[0][1].indices))
    results.append(run(cast(leaves, torch.float64), k, options, "reference", upstream, **replay))
    results.append(run(leaves, k, options, "reference", upstream, **replay))
    others = torch.ones(len(upstream), dtype=torch.bool, device=DEVICE)
    others[invalid] = False
    tables = [
        {n: x[others] if n[:2] in ("dl", "dx") else x for n, x in table.items()}
        for table, _ in results
    ]
    together.add(check_non_finite(*tables))
    for name in ("indices", "counts", "order", "position", "offsets"):
        assert torch.equal(getattr(results[0][1], name), getattr(results[1][1], name)), name
    return results[0]


# ---- NaN and inf ---------------------------------------------------------------------------------

ROWS = {
    "NaN": [nan, 0.5, 1, 2, -1, 0, 3],
    "all NaN": [nan] * 7,
    "inf": [1, inf, 0, -1, 2, 0.3, 0.1],
    "two inf": [1, inf, 0, inf, 2, 0.3, 0.1],
    "NaN and inf": [nan, inf, 0, -1, 2, 0.3, 0.1],
    "-inf": [-inf] * 7,
}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_non_finite_row_affects_only_its_token_and_its_segments_losses(score, balance, backend):
    """With balance "mse", the row also affects the gradients of its segment."""
    segments, together = (torch.arange(20) % 3 == 0).long().to(DEVICE), Tables()
    for row, renormalize in itertools.product(ROWS.values(), (True, False)):
        leaves = make_logits(20, 7)
        with torch.no_grad():
            leaves["logits"][4] = torch.tensor(row)
        options = dict(
            score=score, balance=balance, renormalize=renormalize, segments=segments, num_segments=2
        )
        got, _ = check_rows(together, options, leaves, 2, backend, [4])
        d = got["dlogits from weights"]
        assert d[:4].isfinite().all() and d[5:].isfinite().all()
        assert got["dlogits from all"][segments == 1].isfinite().all()
    together.check()


@pytest.mark.parametrize(
    "sigmoid, renormalize, balance", [*itertools.product([False, True], [False, True], BALANCES)]
)
def test_a_non_finite_row_in_the_cpp_router(sigmoid, renormalize, balance, router):
    options, together = dict(sigmoid=sigmoid, renormalize=renormalize, balance=balance), Tables()
    for row in ROWS.values():
        case = csrc_cases.make(20, 7, 2, segments=3, **options)
        case["source"][4] = torch.tensor(row)
        check_cpp(together, case, router, [4])
    together.check()


def check_cpp(together, case, router, invalid):
    gradients = csrc_cases.upstream(case)
    out = router.forward(case)
    out["d_logits"] = router.backward(case, gradients, out)
    exact, plain = (
        csrc_cases.expected(case, dtype, gradients) for dtype in (torch.float64, torch.float32)
    )
    for name in ("indices", "counts", "order", "position", "offsets", "tiles"):
        if name != "indices" or case["indices"] is None:
            assert torch.equal(out[name], exact[name]), name
    others = torch.ones(len(case["source"]), dtype=torch.bool)
    others[invalid] = False
    tables = [
        {n: t[n] for n in ("weights", "losses")} | {"d": t["d_logits"][others]}
        for t in (out, exact, plain)
    ]
    together.add(check_non_finite(*tables))
    return out


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("value", [nan, inf])
def test_a_non_finite_token_of_x_affects_only_its_outputs(value, backend):
    for dtype in DTYPES:
        leaves = make_inputs(40, 13, 33, dtype)
        upstream = torch.randn(40, 2, device=DEVICE)
        want, before = run(leaves, 2, {}, backend, upstream)
        with torch.no_grad():
            leaves["x"][17, 5] = value
        got, after = run(leaves, 2, {}, backend, upstream)
        others = torch.arange(40, device=DEVICE) != 17
        assert torch.equal(after.indices[others], before.indices[others])
        assert (
            torch.equal(got["weights"][others], want["weights"][others])
            and got["weights"][17].isnan().all()
        )
        name = "dx from weights"
        assert torch.equal(got[name][others], want[name][others])


# ---- out of range --------------------------------------------------------------------------------


def bad_values(tokens, experts, k):
    """Yield options with invalid values, and the affected tokens."""
    segments = (torch.arange(tokens) % 3).to(DEVICE)
    for s in (-1, 2**40):
        given = segments.clone()
        given[[2, tokens - 1]] = s
        yield dict(segments=given, num_segments=3), [2, tokens - 1]
        available = torch.ones(3, experts, dtype=torch.bool, device=DEVICE)
        available[:, 1] = False
        yield dict(segments=given, num_segments=3, available=available), [2, tokens - 1]
    given = torch.zeros_like(segments)
    given[1] = 1
    yield dict(segments=given, num_segments=1), [1]
    for usable in range(k):
        available = torch.ones(3, experts, dtype=torch.bool, device=DEVICE)
        available[1, usable:] = False
        yield (
            dict(segments=segments, num_segments=3, available=available),
            [t for t in range(tokens) if t % 3 == 1],
        )
    available = torch.zeros(1, experts, dtype=torch.bool, device=DEVICE)
    yield dict(available=available), list(range(tokens))
    for e in (experts, -(2**40)):
        indices = torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :k].contiguous()
        indices[3, 0], indices[tokens - 2, k - 1] = e, e
        yield dict(indices=indices, segments=segments, num_segments=3), [3, tokens - 2]
        yield dict(indices=indices), [3, tokens - 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(
    "score, renormalize, masked", [("softmax", True, False), ("sigmoid", False, True)]
)
def test_values_out_of_range_make_their_tokens_nan(
    score, renormalize, masked, balance, backend, unchecked
):
    mask = torch.zeros(11, dtype=torch.bool, device=DEVICE)
    mask[[2, 5]] = masked
    together = Tables()
    for options, invalid in bad_values(11, 5, 2):
        options = options | dict(score=score, renormalize=renormalize, balance=balance)
        options |= dict(token_padding_mask=mask) if masked else {}
        leaves = make_logits(11, 5)
        got, routing = check_rows(together, options, leaves, 2, backend, invalid)
        invalid_mask = torch.zeros(11, dtype=torch.bool, device=DEVICE)
        invalid_mask[invalid] = True
        assert torch.equal(got["weights"].isnan().all(1), invalid_mask & ~mask)
        assert all(got[name].isnan() for name in LOSSES)
        assert (
            got["dlogits from all"][invalid_mask & ~mask].isnan().all()
            and not got["dlogits from all"][mask].any()
        )
        if "indices" not in options:
            assert all(
                len(set(row)) == 2 and 0 <= min(row) <= max(row) < 5
                for row in routing.indices.tolist()
            )
    together.check()


@pytest.mark.parametrize(
    "sigmoid, renormalize, balance",
    [(False, True, "switch"), (True, False, "mse"), (True, True, "gshard")],
)
def test_values_out_of_range_in_the_cpp_router(sigmoid, renormalize, balance, router):
    together = Tables()
    for options, invalid in bad_values(11, 5, 2):
        case = csrc_cases.make(11, 5, 2, sigmoid=sigmoid, renormalize=renormalize, balance=balance)
        out = check_cpp(
            together,
            case | {name: getattr(x, "cpu", lambda x=x: x)() for name, x in options.items()},
            router,
            invalid,
        )
        assert out["losses"].isnan().all() and out["d_logits"][invalid].isnan().all()
    together.check()


def test_an_expert_chosen_twice_counts_twice():
    indices, together = torch.tensor([[1, 1], [0, 2], [3, 3]], device=DEVICE), Tables()
    for backend, score, renormalize in itertools.product(
        BACKENDS[1:], ("softmax", "sigmoid"), (True, False)
    ):
        check_rows(
            together,
            dict(indices=indices, score=score, renormalize=renormalize),
            make_logits(3, 4),
            2,
            backend,
            [],
        )
    together.check()


@pytest.mark.parametrize("routing_backend", BACKENDS)
def test_experts_with_indices_out_of_range_give_nan_only_for_their_tokens(
    routing_backend, unchecked
):
    """The routing and the experts may use different backends."""
    indices = torch.randint(0, 4, (9, 2), device=DEVICE)
    bad = indices.clone()
    bad[2, 1], bad[5, 0], bad[6] = 4, -1, 2**40
    invalid_mask = (bad != indices).any(1)
    x, up, down = (torch.randn(*shape, device=DEVICE) for shape in ((9, 6), (4, 8, 6), (4, 5, 8)))
    outs = {}
    for backend in BACKENDS:
        for name, given in (("good", indices.where(~invalid_mask[:, None], 0)), ("bad", bad)):
            weights = torch.full((9, 2), 0.5, device=DEVICE, requires_grad=True)
            leaf = x.clone().requires_grad_()
            with mmfused.backend(routing_backend):
                routing = routing_from_indices(given, weights, 4)
            assert routing.order.sort().values.tolist() == list(
                range(18)
            ) and routing.offsets.tolist()[::4] == [0, 18]
            with mmfused.backend(backend):
                out = mmfused.grouped_mlp(leaf, routing, up, down)
            outs[name] = (out, *torch.autograd.grad(out[~invalid_mask].sum(), [leaf, weights]))
        assert outs["bad"][0][invalid_mask].isnan().all()
        for a, b in zip(outs["bad"], outs["good"], strict=True):
            assert torch.allclose(a[~invalid_mask], b[~invalid_mask], rtol=1e-5, atol=1e-6)


# ---- large ---------------------------------------------------------------------------------------


def large(size):
    """Return logits up to ``size`` in absolute value.

    Each row has one kind of logits: far apart, near ``size``, near ``-size``, equal, or small.
    """
    logits = torch.randn(64, 13, dtype=torch.float64)
    near = torch.rand(64, 13, dtype=torch.float64) * 4
    logits[::8] *= size / 4
    logits[1::4], logits[2::4], logits[3::8] = size - near[1::4], near[2::4] - size, size
    return logits.clamp(-size, size)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "score, renormalize", [*itertools.product(["softmax", "sigmoid"], [True, False])]
)
def test_errors_stay_within_the_budget_for_large_logits(score, renormalize, dtype, backend):
    together = Tables()
    for size, balance in itertools.product((1e3, 1e4), BALANCES):
        leaves = dict(logits=large(size).to(DEVICE, dtype).requires_grad_())
        options = dict(score=score, renormalize=renormalize, balance=balance)
        upstream = torch.randn(64, 3, dtype=torch.float64, device=DEVICE)
        got, routing = run(leaves, 3, options, backend, upstream)
        exact, plain = (
            run(cast(leaves, to), 3, options, "reference", upstream, indices=routing.indices)[0]
            for to in (torch.float64, dtype)
        )
        together.add([got, exact, plain])
    together.check()


@pytest.mark.parametrize("sigmoid, renormalize", [*itertools.product([False, True], [True, False])])
def test_errors_stay_within_the_budget_for_large_logits_in_the_cpp_router(
    sigmoid, renormalize, router
):
    together = Tables()
    for size, balance in itertools.product((30, 1e3, 1e4), BALANCES):
        case = csrc_cases.make(64, 13, 3, sigmoid=sigmoid, renormalize=renormalize, balance=balance)
        case["source"].copy_(large(size) if size > 30 else size * torch.randn(64, 13))
        gradients = csrc_cases.upstream(case)
        # First, only the weights have upstream gradients; then, only the losses.
        for only in (slice(1), slice(1, 4)):
            given = [
                x if i in range(4)[only] else torch.zeros_like(x) for i, x in enumerate(gradients)
            ]
            out = router.forward(case)
            d = router.backward(case, given, out)
            replayed = case | dict(indices=out["indices"])
            exact, plain = (
                csrc_cases.expected(replayed, to, given)["d_logits"]
                for to in (torch.float64, torch.float32)
            )
            together.add([{f"d {size} {only}": x} for x in (d, exact, plain)])
    together.check()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_renormalized_weights_give_unchosen_experts_no_gradient(backend, score):
    """Some rows have a weight near 1."""
    logits = (
        (10 ** torch.linspace(-1, 4, 60)[:, None] * torch.randn(60, 11)).to(DEVICE).requires_grad_()
    )
    with mmfused.backend(backend):
        routing = mmfused.topk_routing(logits, 4, score=score, renormalize=True)
    (gradient,) = torch.autograd.grad(routing.weights, logits, torch.randn(60, 4, device=DEVICE))
    assert not gradient.scatter(1, routing.indices, 0.0).any()
    assert gradient.any()


def near_1():
    logits = torch.randn(40, 5) * 0.3
    logits[:, 0] += torch.linspace(8, 20, 40)
    return logits


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_gradient_of_a_probability_near_1_keeps_its_digits(backend, k):
    """The gradient of a probability P by its logit is computed as P times the sum of the others.

    In float32, P - P^2 would lose digits as P approaches 1.
    """
    logits, upstream, gradients = near_1(), torch.randn(40, k), []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaf = logits.to(DEVICE, dtype).requires_grad_()
        with mmfused.backend(name):
            weights = mmfused.topk_routing(leaf, k, renormalize=False).weights
        gradients += torch.autograd.grad(weights, leaf, upstream.to(DEVICE, dtype))
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_of_a_probability_near_1_keeps_its_digits_in_the_cpp_router(k, router):
    case = csrc_cases.make(40, 5, k, sigmoid=False, renormalize=False)
    case["source"].copy_(near_1())
    weights, *losses = csrc_cases.upstream(case)
    upstream = [weights, *map(torch.zeros_like, losses)]
    out = router.forward(case)
    got = router.backward(case, upstream, out)
    want = csrc_cases.expected(case | dict(indices=out["indices"]), torch.float64, upstream)[
        "d_logits"
    ]
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0.0)
