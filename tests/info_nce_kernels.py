"""Helpers for the tests of the masked InfoNCE kernels: small tiles, inputs, and error budgets."""

import dataclasses

import torch

import mmfused
from mmfused.kernels.masked_info_nce import forward, gradients
from mmfused.kernels.masked_info_nce import plan as planned
from mmfused.kernels.masked_info_nce.plans import Plan, Tile
from mmfused.ops.masked_info_nce import masked_info_nce, masked_info_nce_reference
from mmfused.testing import over_budget, value_and_gradients

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def small_tiles(monkeypatch, backward, dim=32, **sizes):
    """Replace the plan by one with small tiles, so that small inputs have several tiles.

    The memory limits allow chunks of 32 x 64 pairs in the backward and, with 53 columns, two groups
    of rows in the forward. On a GPU, only the ``backward`` of the plan is replaced.
    """
    tile = Tile(16, 32, 32, 4, 2, BD=32)
    owner = Tile(16, 32, 0, 4, 2, BD=max(32, 1 << (dim - 1).bit_length()))
    apply_ds = Tile(32, 32, 32, 4, 2, BD=32)
    small = Plan(
        tile,
        backward,
        tile,
        apply_ds,
        owner,
        partial_bytes=4 * 2 * 2 * 53,
        chunk_bytes=4 * 32 * 64,
        merge=(2, 32),
    )
    small = dataclasses.replace(small, **sizes)

    def plan(*args):
        return dataclasses.replace(planned(*args), backward=backward) if CUDA else small

    for module in (forward, gradients):
        monkeypatch.setattr(module, "plan", plan)
    return small


def make(rows=37, candidates=53, dim=19, *, scale=14.0, seed=0):
    torch.manual_seed(seed)
    query, candidate = (
        torch.randn(rows, dim, dtype=torch.float64),
        torch.randn(candidates, dim, dtype=torch.float64),
    )
    query, candidate = (x / x.norm(dim=1, keepdim=True) for x in (query, candidate))
    return dict(
        query=query, candidate=candidate, temperature=torch.tensor(1 / scale, dtype=torch.float64)
    )


def run(inputs, options, dtype, function=masked_info_nce, name="fused", upstream=None):
    """Return value and gradients. If ``dtype`` is float64, embeddings are rounded to float16."""
    rounded = {
        k: v.to(torch.float16 if dtype == torch.float64 else dtype)
        for k, v in inputs.items()
        if k != "temperature"
    }
    cast = {k: v.to(DEVICE, dtype).requires_grad_() for k, v in rounded.items()}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    cast["temperature"] = inputs["temperature"].to(DEVICE, acc).requires_grad_()
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with mmfused.backend(name):
        return value_and_gradients(lambda **leaves: function(**leaves, **options), cast, upstream)


def compare(inputs, options, dtype=torch.float32, name="fused"):
    """Return the results of a backend, and of the reference in float64 and in ``dtype``."""
    inputs = {
        k: v.to(dtype).double() if k != "temperature" else v.float().double()
        for k, v in inputs.items()
    }
    exact = {k: v.to(DEVICE, torch.float64).requires_grad_() for k, v in inputs.items()}
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = (
        torch.randn(len(inputs["query"]), device=DEVICE)
        if options.get("reduction") == "none"
        else None
    )
    want = value_and_gradients(
        lambda **leaves: masked_info_nce_reference(**leaves, **moved), exact, upstream
    )
    plain = run(inputs, options, dtype, masked_info_nce_reference, "reference", upstream)
    got = run(inputs, options, dtype, name=name, upstream=upstream)
    # The gradient of the temperature is a sum over rows, in which terms may cancel. Append the sum
    # of the absolute terms, so that the error is relative to this sum.
    terms = (exact["query"] * want["dquery"]).detach().sum(1) / exact["temperature"].detach()
    for results in (got, want, plain):
        slope = results["dtemperature"]
        results["dtemperature"] = torch.stack((slope, terms.abs().sum().to(slope.dtype)))
    return got, want, plain


def check(inputs, options, dtype=torch.float32, name="fused"):
    got, exact, plain = compare(inputs, options, dtype, name)
    assert over_budget(got, exact, plain) == []
    return got


def check_together(cases, dtype=torch.float32, name="fused"):
    """Check the error budget of many small cases together.

    A single case has so few numbers that its error is too random.
    """
    together = ({}, {}, {})
    for inputs, options in cases:
        for whole, part in zip(together, compare(inputs, options, dtype, name), strict=True):
            for key, value in part.items():
                whole.setdefault(key, []).append(value.flatten())
    assert (
        over_budget(
            *({key: torch.cat(values) for key, values in whole.items()} for whole in together)
        )
        == []
    )


def keys(rows, candidates, kinds, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return dict(
        query_key=torch.randint(0, kinds, (rows,), generator=generator),
        candidate_key=torch.randint(-1, kinds, (candidates,), generator=generator),
    )


def ids(rows, candidates, kinds=9, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return dict(
        query_id=torch.randint(-kinds, kinds, (rows,), generator=generator),
        candidate_id=torch.randint(-kinds, kinds, (candidates,), generator=generator) * 2**40,
    )
