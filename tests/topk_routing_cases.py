"""Inputs for the tests of top-k routing, and functions that run a case and give expected values."""

import torch

import mmfused
from mmfused import topk_routing, topk_routing_from_input
from mmfused.library import INTERPRETED

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter truncates where hardware rounds to bfloat16, so bfloat16 is tested only on a GPU.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
LOSSES = ("balance_loss", "z_loss", "entropy")

# Options for make_options. For each of mask, bias, replay and available that is True, make_options
# draws a random tensor. segments is the number of segments.
OPTIONS = {
    "softmax": dict(),
    "sigmoid": dict(score="sigmoid"),
    "raw": dict(renormalize=False),
    "raw sigmoid": dict(score="sigmoid", renormalize=False, mask=True),
    "mask": dict(mask=True),
    "gshard": dict(balance="gshard", mask=True),
    "mse": dict(balance="mse", mask=True),
    "segments": dict(segments=3, mask=True),
    "available": dict(segments=3, available=True, renormalize=False),
    "gshard segments": dict(segments=3, available=True, balance="gshard", score="sigmoid"),
    "mse segments": dict(segments=3, available=True, mask=True, balance="mse", score="sigmoid"),
    "mse raw": dict(segments=3, balance="mse", renormalize=False),
    "bias": dict(bias=True, score="sigmoid"),
    "jitter": dict(jitter=0.3, mask=True, balance="mse"),
    "jitter sigmoid": dict(jitter=0.3, score="sigmoid", segments=3, available=True, bias=True),
    "replay": dict(replay=True, mask=True),
    "replay mse": dict(replay=True, segments=3, balance="mse", renormalize=False, score="sigmoid"),
}


def make_options(name, tokens, experts, k, device=DEVICE):
    """Return the keyword arguments for an entry of OPTIONS."""
    options = dict(OPTIONS[name])
    if options.pop("mask", False):
        options["token_padding_mask"] = torch.rand(tokens) < 0.3
    if "segments" in options:
        number = options["num_segments"] = options["segments"]
        options["segments"] = torch.randint(0, number, (tokens,))
    if options.pop("available", False):
        options["available"] = torch.rand(options["num_segments"], experts) < 0.7
        options["available"][:, -k:] = True
    if options.pop("bias", False):
        options["selection_bias"] = torch.randn(experts)
    if options.pop("replay", False):
        # A token may choose an expert twice.
        options["indices"] = torch.randint(0, experts, (tokens, k))
    if "jitter" in options:
        options["jitter_seed"] = torch.tensor(2**62 + 12345678901)
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }


def make_logits(tokens, experts, dtype=torch.float32):
    return dict(
        logits=torch.randn(tokens, experts, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    )


def make_inputs(tokens, experts, dim, dtype=torch.float32, router_dtype=None):
    router = dict(device=DEVICE, dtype=router_dtype or dtype)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((tokens, dim), (experts, dim), (experts,))
    )
    x, weight, bias = x.to(DEVICE, dtype), (weight * dim**-0.5).to(**router), bias.to(**router)
    return dict(
        x=x.requires_grad_(),
        router_weight=weight.requires_grad_(),
        router_bias=bias.requires_grad_(),
    )


def cast(tensors, dtype):
    return {name: value.detach().to(dtype).requires_grad_() for name, value in tensors.items()}


def route(leaves, k, options, backend):
    with mmfused.backend(backend):
        return (
            topk_routing(k=k, **leaves, **options)
            if "logits" in leaves
            else topk_routing_from_input(k=k, **leaves, **options)
        )


def run(leaves, k, options, backend, upstream=None, indices=None):
    """Return a dictionary of results, and the routing.

    The results are the weights, the losses, and the gradients "d<leaf> from <output>". ``upstream``
    is the upstream gradient of the weights. The losses have an upstream gradient of 1. The output
    "all" is the sum of all outputs, weighted with the upstream gradients.
    """
    if indices is not None:
        options = options | dict(indices=indices)
    routing = route(leaves, k, options, backend)
    results = {name: getattr(routing, name) for name in ("weights", *LOSSES)}
    total = 0
    for name, value in list(results.items()):
        scalar = (value * upstream).sum() if name == "weights" else value
        total = total + scalar
        results |= _gradients(scalar, leaves, name)
    results |= _gradients(total, leaves, "all")
    return {name: value.detach() for name, value in results.items()}, routing


def _gradients(scalar, leaves, name):
    gradients = torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True)
    return {
        f"d{leaf} from {name}": gradient for leaf, gradient in zip(leaves, gradients, strict=True)
    }


def plain_order(indices, mask, experts):
    """Return order, position and offsets as lists, computed by definition."""
    tokens, k = indices.shape
    masked = [False] * tokens if mask is None else mask.tolist()
    key = [
        experts if masked[a // k] else expert for a, expert in enumerate(indices.flatten().tolist())
    ]
    order = sorted(range(tokens * k), key=lambda a: (key[a], a))
    position = [0] * (tokens * k)
    for row, a in enumerate(order):
        position[a] = row
    return order, position, [sum(e < first for e in key) for first in range(experts + 1)]


def plain_tiles(offsets, rows, experts, height):
    found = [[e, row] for e in range(experts) for row in range(offsets[e], offsets[e + 1], height)]
    return found + [[-1, 0]] * (rows // 16 + experts - len(found))
