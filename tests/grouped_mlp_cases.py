"""Inputs for the tests of the grouped MLP kernels, and functions that run a case."""

import torch
from sums_in_order import sums_of

import mmfused
from mmfused import grouped_linear, grouped_mlp, routing_from_indices
from mmfused.library import INTERPRETED
from mmfused.testing import over_budget, value_and_gradients

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter truncates where hardware rounds to bfloat16, so bfloat16 is tested only on a GPU.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

# name -> (T, E, k, D, hidden width, Dout). Sizes are unusual on purpose.
SHAPES = {
    "odd": (37, 5, 2, 70, 50, 36),
    "even": (29, 5, 3, 80, 80, 48),  # multiples of 16, so that 16-bit dtypes use aligned loads
    "wide": (11, 3, 1, 300, 70, 90),
    "many tiles": (257, 16, 2, 12, 70, 9),
    "top 1": (257, 13, 1, 6, 10, 7),
    "one token": (1, 5, 3, 12, 10, 9),
    "three tokens": (3, 16, 2, 12, 10, 9),
    "no token": (0, 5, 2, 12, 10, 9),
}
VARIANTS = ("gelu", "relu", "swiglu", "packed")


def randn(*shape):
    """Draw normal values and round them to bfloat16."""
    return torch.randn(*shape).to(torch.bfloat16).double()


def choose_experts(tokens, experts, k, choice="random"):
    """Return the chosen experts (T, k) int64.

    ``choice="one"``: every token ranks expert 1 first. "half": every token ranks the experts with
    even numbers last.
    """
    score = torch.rand(tokens, experts)
    if choice == "one":
        score[:, 1] += 1
    if choice == "half":
        score[:, ::2] -= 1
    return score.argsort(1, descending=True)[:, :k].to(DEVICE)


def make_mlp(shape="odd", variant="gelu", bias=True):
    """Return the differentiable arguments of :func:`run_mlp` in float64.

    The variant "packed" is SwiGLU with the gate and up weights in one tensor.
    """
    tokens, experts, k, dim, width, out = SHAPES[shape] if isinstance(shape, str) else shape
    leaves = dict(
        x=randn(tokens, dim),
        weights=torch.rand(tokens, k).double(),
        w_up=randn(experts, 2 * width if variant == "packed" else width, dim) / 8,
        w_down=randn(experts, out, width) / 8,
    )
    if variant == "swiglu":
        leaves["w_gate"] = randn(experts, width, dim) / 8
    if bias:
        leaves |= dict(b_up=randn(experts, width), b_down=randn(experts, out))
    return leaves


def run_mlp(
    leaves,
    indices,
    dtype,
    backend="fused",
    *,
    variant="gelu",
    mask=None,
    upstream=None,
    frozen=(),
    sort="composed",
):
    """Return the output and the gradients.

    ``sort``: the backend that sorts the rows. "composed" makes no tile map, so the launcher of the
    grouped MLP makes the map.
    """
    experts, activation = len(leaves["w_down"]), "swiglu" if variant == "packed" else variant

    def call(x, weights, **parameters):
        with mmfused.backend(sort):
            routing = routing_from_indices(indices, weights, experts, token_padding_mask=mask)
        with mmfused.backend(backend):
            return grouped_mlp(x, routing, **parameters, activation=activation)

    with sums_of(backend):
        return value_and_gradients(call, cast(leaves, dtype, frozen), upstream)


def run_linear(
    leaves, indices, dtype, backend="fused", *, gather, combine, mask=None, upstream=None, frozen=()
):
    def call(x, weights, **parameters):
        with mmfused.backend("composed"):
            routing = routing_from_indices(
                indices, weights, len(parameters["weight"]), token_padding_mask=mask
            )
        with mmfused.backend(backend):
            return grouped_linear(x, routing, **parameters, gather=gather, combine=combine)

    if not combine:
        frozen = (*frozen, "weights")
    return value_and_gradients(call, cast(leaves, dtype, frozen), upstream)


def cast(leaves, dtype, frozen=()):
    """Cast routing weights to at least float32, other leaves to ``dtype``. Keep the strides."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {k: v.to(DEVICE, wide if k == "weights" else dtype) for k, v in leaves.items()}
    return {k: v.requires_grad_(k not in frozen) for k, v in tensors.items()}


def check(run, *args, dtype=torch.float32, **options):
    """Check that the fused backend is within the error budget, and return the fused results."""
    exact = run(*args, torch.float64, "reference", **options)
    plain = run(*args, dtype, "reference", **options)
    fused = run(*args, dtype, "fused", **options)
    assert not over_budget(fused, exact, plain)
    return fused
