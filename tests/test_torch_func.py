"""torch.func on every op and module: grad, vmap, jvp, jacrev and combinations.

Expected values come from plain autograd in float64.
"""

import pytest
import torch
from module_cases import NAMES, case, floats, total
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import mmfused
from mmfused import losses

BACKENDS = ["auto", "composed"]
SAMPLES = 3


def stacked(make, *sizes):
    """Return the arguments of ``SAMPLES`` calls, stacked for vmap."""
    args, named = zip(*(make(*sizes) for _ in range(SAMPLES)), strict=True)
    positional = tuple(torch.stack(parts) for parts in zip(*args, strict=True))
    return positional, {key: torch.stack([each[key] for each in named]) for key in named[0]}


def sample(args, named, i):
    return tuple(x[i] for x in args), {name: x[i] for name, x in named.items()}


def reference_gradients(module, args, named):
    """Return the reference's gradients of ``total`` for each parameter and the first argument."""
    first = args[0].detach().clone().requires_grad_()
    leaves = dict(module.named_parameters())
    with mmfused.backend("reference"):
        out = total(module(first, *args[1:], **named))
    every = [*leaves.values(), first]
    found = torch.autograd.grad(out, every, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=False)), found[-1]


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad_gives_the_gradients_of_each_sample(name, backend):
    module, make = case(name)
    args, named = stacked(make, 2, 5)
    parameters = {key: x.detach() for key, x in module.named_parameters()}

    def loss(parameters, first, rest, named):
        return total(functional_call(module, parameters, (first, *rest), named))

    with mmfused.backend(backend):
        each = vmap(grad(loss, (0, 1)), (None, 0, 0, 0))(parameters, args[0], args[1:], named)
    for i in range(SAMPLES):
        want = reference_gradients(module, *sample(args, named, i))
        assert_close(({key: d[i] for key, d in each[0].items()}, each[1][i]), want)


@pytest.mark.parametrize("name", NAMES)
def test_jacrev_and_jvp_agree_with_autograd(name):
    module, make = case(name)
    args, named = make(2, 5)
    direction = floats(*args[0].shape)

    def value(first):
        return total(module(first, *args[1:], **named))

    with mmfused.backend("composed"):
        want = reference_gradients(module, args, named)[1]
        assert_close(jacrev(value)(args[0]), want)
        _, slope = jvp(value, (args[0],), (direction,))
    assert_close(slope, (want * direction).sum())


def test_hessian_of_masked_info_nce_equals_the_references():
    query, candidate = floats(4, 3), floats(5, 3)
    options = dict(temperature=0.5, symmetric=True)
    with mmfused.backend("composed"):
        got = hessian(lambda q: mmfused.masked_info_nce(q, candidate, **options))(query)
    plain = lambda q: mmfused.masked_info_nce_reference(q, candidate, **options)  # noqa: E731
    assert_close(got, torch.autograd.functional.hessian(plain, query))


def test_vmap_of_grad_through_routing_from_indices():
    x, weight, scores = floats(SAMPLES, 6, 4), floats(3, 5, 4), floats(SAMPLES, 6, 2)
    indices = torch.randint(0, 3, (SAMPLES, 6, 2))

    def value(x, scores, indices):
        routing = mmfused.routing_from_indices(indices, scores.softmax(-1), 3)
        return mmfused.grouped_linear(x, routing, weight, combine=True).square().sum()

    with mmfused.backend("composed"):
        got = vmap(grad(value, (0, 1)))(x, scores, indices)
        for i in range(SAMPLES):
            leaves = [t[i].clone().requires_grad_() for t in (x, scores)]
            want = torch.autograd.grad(value(*leaves, indices[i]), leaves)
            assert_close([d[i] for d in got], list(want))


def test_a_vectorized_jacobian_equals_a_loop():
    """With vectorize=True, PyTorch applies vmap to the backward, but not to the forward."""
    module, make = case("experts")
    (x,), _ = make(2, 3)
    jacobian = torch.autograd.functional.jacobian
    with mmfused.backend("composed"):
        each = [jacobian(lambda x: module(x)[0], x, vectorize=how) for how in (False, True)]
    assert_close(*each)


LOSSES = {
    "positive_similarity": (losses.positive_similarity, [(4, 3), (4, 3)]),
    "hard_negative_margin": (losses.hard_negative_margin, [(4, 3), (5, 3)]),
    "product_hinge": (losses.product_hinge, [(4, 3), (4, 3)]),
    "product_consistency": (
        lambda a, b, c, d, e, f: losses.product_consistency((a, b), (c, d), (e, f), top=2),
        [(4, 3)] * 6,
    ),
    "sigmoid_contrastive": (
        lambda q, c, t: losses.sigmoid_contrastive(q, c, temperature=t.exp(), bias=t),
        [(4, 3), (5, 3), ()],
    ),
    "dual_alignment": (
        lambda a, s: losses.dual_alignment(a, s.softmax(1), normalise=1)[1],
        [(4, 3), (5, 4)],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_of_grad_of_losses_in_blocks_of_rows(name, monkeypatch):
    loss, shapes = LOSSES[name]
    args = [floats(SAMPLES, *shape) for shape in shapes]
    all_arguments = tuple(range(len(args)))
    want = []
    for i in range(SAMPLES):
        leaves = [x[i].clone().requires_grad_() for x in args]
        want.append(torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True))
    monkeypatch.setattr(losses, "BLOCK_PAIRS", 8)
    got = vmap(grad(loss, all_arguments))(*args)
    assert_close(list(got), [torch.stack(parts) for parts in zip(*want, strict=True)])


def test_fused_raises_under_a_transform():
    module, make = case("pool")
    args, _ = make(2, 5)
    with (
        mmfused.backend("fused"),
        pytest.raises(RuntimeError, match="torch.func transforms need plain formulas"),
    ):
        grad(lambda x: module.float()(x).sum())(args[0].float())


def test_dropout_follows_the_randomness_of_vmap():
    module, make = case("pool dropout")
    x = make(2, 5)[0][0]
    same = x.expand(SAMPLES, *x.shape)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(module)(same)
    alike, unlike = (vmap(module, randomness=how)(same) for how in ("same", "different"))
    assert torch.equal(alike[0], alike[1]) and not torch.equal(unlike[0], unlike[1])
    seeds = torch.arange(SAMPLES)
    got = vmap(lambda x, seed: module(x, dropout_seed=seed))(same, seeds)
    assert_close(got, torch.stack([module(x, dropout_seed=seed) for seed in seeds]))


def test_an_invalid_length_gives_nan_only_for_its_sample():
    module, make = case("pool lengths")
    args, named = stacked(make, 2, 5)
    named["lengths"][1, 0] = 6
    with pytest.raises(ValueError, match="lengths: got a value out of range"):
        module(args[0][1], lengths=named["lengths"][1])
    out = vmap(lambda x, lengths: module(x, lengths=lengths))(args[0], named["lengths"])
    assert out[1, 0].isnan().all() and out[1, 1].isfinite().all() and out[0].isfinite().all()


def test_transforms_do_not_clamp_a_learned_temperature_in_place():
    module = mmfused.MaskedInfoNCE(0.07, learnable_temperature=True, max_scale=5.0).double()
    query, candidate = floats(4, 3), floats(4, 3)
    before = module.log_scale.detach().clone()
    parameters = {"log_scale": before.clone()}
    got = grad(lambda p: functional_call(module, p, (query, candidate)))(parameters)["log_scale"]
    jacrev(lambda q: module(q, candidate))(query)
    assert torch.equal(parameters["log_scale"], before) and torch.equal(module.log_scale, before)
    loss = module(query, candidate)
    loss.backward()
    assert module.log_scale < before
    assert_close(got, module.log_scale.grad)


def test_transforms_compile():
    args = floats(SAMPLES, 3, 4), floats(SAMPLES, 3, 4)
    each = vmap(grad(lambda q, c: mmfused.masked_info_nce(q, c, temperature=0.5)))
    assert_close(torch.compile(each, backend="eager", fullgraph=True)(*args), each(*args))
