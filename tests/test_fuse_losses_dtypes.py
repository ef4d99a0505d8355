"""Tests that swapped losses return the original's dtype, also under autocast."""

import itertools

import pytest
import torch
from torch import nn

from mmfused import fuse
from mmfused.fuse import losses
from mmfused.testing import relative_error

B, D, SEEDS = 12, 16, 3
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = [
    "number",
    *((shape, dtype) for shape in ((), (1,)) for dtype in FLOATS),
    ((1, 1), torch.float32),
    ((), torch.int64),
]
LOSSES = {
    "clip": ("open_clip.loss.ClipLoss", {}, lambda loss, a, b: loss(a, b, loss.test_scale)),
    "ranking": (
        "sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss",
        {},
        lambda loss, a, b: loss.compute_loss_from_embeddings([a, b], None),
    ),
    "cached, both directions": (
        "sentence_transformers.sentence_transformer.losses.CachedMultipleNegativesRankingLoss",
        dict(
            mini_batch_size=5,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        ),
        lambda loss, a, b: loss.calculate_loss([[a[:7], a[7:]], [b[:7], b[7:]]], None),
    ),
    "dot": (
        "sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss",
        dict(similarity_fct="dot_score"),
        lambda loss, a, b: loss.compute_loss_from_embeddings([a, b], None),
    ),
}


def build(name, scale, swap):
    path, options, call = LOSSES[name]
    module, _, cls = path.rpartition(".")
    options = dict(options)
    if "similarity_fct" in options:
        options["similarity_fct"] = pytest.importorskip("sentence_transformers.util").dot_score
    args = [] if name == "clip" else [nn.Sequential(nn.Linear(1, 1))]
    loss = getattr(pytest.importorskip(module), cls)(*args, **options)
    if name == "clip":
        loss.test_scale = scale
    else:
        loss.scale = scale
    assert not swap or fuse(loss).swapped
    return lambda a, b: call(loss, a, b)


def scale_of(kind, dtype=None):
    if kind == "number":
        return 7.3
    shape, own = kind
    scale = torch.full(shape, 7.3).to(own).to(dtype or own)
    return scale.requires_grad_(own.is_floating_point)


def embeddings(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        nn.functional.normalize(torch.randn(B, D, generator=generator), dim=-1) for _ in range(2)
    )
    return [x.to(dtype) for x in (a, nn.functional.normalize(0.5 * a + b, dim=-1))]


def outcome(name, kind, dtype, swap, autocast, exact=False):
    """Return the stacked losses and gradients of several seeds, or the error.

    One seed is not enough, because the rounding error of a single scalar is random.
    """
    found = []
    for seed in range(SEEDS):
        scale = scale_of(kind, torch.float64 if exact and kind != "number" else None)
        a, b = (
            x.to(torch.float64 if exact else dtype).requires_grad_()
            for x in embeddings(seed, dtype)
        )
        try:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = build(name, scale, swap)(a, b)
            loss.backward()
        except Exception as error:
            return type(error), str(error)
        gradients = [a.grad, b.grad] + (
            [scale.grad] if torch.is_tensor(scale) and scale.requires_grad else []
        )
        found.append([loss.detach(), *gradients])
    return {str(i): torch.stack(values) for i, values in enumerate(zip(*found, strict=True))}


@pytest.fixture
def loss_calls(monkeypatch):
    module, calls = losses, []
    real = module.scaled_info_nce
    monkeypatch.setattr(
        module, "scaled_info_nce", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    return calls


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_swapped_loss_has_the_dtype_and_numbers_of_the_original(name, autocast, loss_calls):
    swapped, raised = 0, 0
    for dtype, kind in itertools.product(FLOATS, SCALES):
        plain = outcome(name, kind, dtype, False, autocast)
        loss_calls.clear()
        got = outcome(name, kind, dtype, True, autocast)
        case = (dtype, kind)
        if isinstance(plain, tuple):
            assert got == plain and not loss_calls, case
            raised += 1
            continue
        assert len(loss_calls) == SEEDS, case  # the library computes every loss that does not raise
        assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in plain.items()}, case
        exact = outcome(name, kind, dtype, False, None, exact=True)
        # With float64 embeddings, only the scale's gradient may be rounded to another dtype.
        if dtype == torch.float64:
            for key in [k for k, v in got.items() if v.dtype == dtype]:
                assert (got.pop(key) - exact.pop(key)).norm() <= 1e-10 * plain.pop(key).norm(), case
        # Plain PyTorch's error may be 0 by chance, so two rounding errors are added.
        for key, value in exact.items():
            error, allowed = relative_error(got[key], value), 2 * relative_error(plain[key], value)
            assert error <= allowed + 2 * torch.finfo(got[key].dtype).eps, (
                case,
                key,
                error,
                allowed,
            )
        swapped += 1
    assert swapped >= 20 and (raised > 0) == (name == "clip" or autocast is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_16_bit_scale_is_as_accurate_as_the_original(dtype):
    """The swapped loss must not round 1 / scale to 16 bits."""
    clip = pytest.importorskip("open_clip.loss").ClipLoss
    errors = {"plain": [], "fused": []}
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            nn.functional.normalize(torch.randn(64, 64, generator=generator), dim=-1)
            for _ in range(2)
        )
        given = [a.to(dtype), nn.functional.normalize(0.2 * a + b, dim=-1).to(dtype)]
        given.append((14 + 86 * torch.rand((), generator=generator)).to(dtype))
        gradients = {}
        for name in ("exact", *errors):
            loss = clip()
            if name == "fused":
                fuse(loss)
            leaves = [
                x.to(torch.float64 if name == "exact" else dtype, copy=True).requires_grad_()
                for x in given
            ]
            loss(*leaves).backward()
            gradients[name] = leaves[2].grad.double()
        for name, values in errors.items():
            values.append(
                ((gradients[name] - gradients["exact"]) / gradients["exact"]).abs().item()
            )
    assert sum(errors["fused"]) <= 1.1 * sum(errors["plain"])


CASES = list(
    zip(
        list(LOSSES)[:3],
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (False, False, True),
        strict=True,
    )
)


@pytest.mark.parametrize(("name", "dtype", "autocast"), CASES)
def test_swapped_loss_compiles_without_a_graph_break(name, dtype, autocast):
    torch._dynamo.reset()
    call, found = build(name, 7.3, True), []
    for function in (call, torch.compile(call, fullgraph=True, backend="eager")):
        leaves = [x.requires_grad_() for x in embeddings(0, dtype)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found)
