"""Inputs for the tests of the gated cross-attention kernels, and a function that runs a case."""

import torch
from sums_in_order import sums_of
from torch import nn

import mmfused
from mmfused import BidirectionalGatedCrossAttention, GatedCrossAttention
from mmfused.library import INTERPRETED

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter truncates where hardware rounds to bfloat16, so bfloat16 is tested only on a GPU.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

# name -> (B, N, M, D, heads, context width of GatedCrossAttention). Sizes are unusual on purpose.
SHAPES = {
    "odd": (4, 9, 11, 70, 2, 70),
    "narrow": (4, 6, 7, 20, 2, 36),
    "several tiles": (2, 67, 35, 16, 1, 16),
    "many keys": (2, 5, 131, 16, 1, 24),
    "four heads of 48": (3, 7, 6, 192, 4, 192),
    "head dim 96": (3, 7, 6, 192, 2, 192),
    "wide": (3, 7, 6, 264, 2, 264),
    # Rows are aligned and heads are common, so that 16-bit dtypes get their large tiles.
    "2 heads of 32": (3, 70, 66, 64, 2, 96),
    "short": (3, 9, 40, 64, 2, 64),
    "short and long": (3, 60, 190, 64, 2, 64),
    "short and long, wide": (6, 64, 130, 128, 2, 128),
    "8 heads of 32": (3, 9, 40, 256, 8, 192),
    "many rows": (3, 70, 9, 256, 8, 256),
    "2 heads of 64": (2, 70, 9, 128, 2, 256),
    "long": (3, 133, 101, 128, 2, 192),
}


def make(shape="narrow", *, both=True, dtype=torch.float64, masks="mixed", **options):
    """Return a module with random parameters, its tokens, and its masks by argument name.

    ``masks``: "none", "present" (some inputs are absent) or "mixed" (also with padding).
    """
    batch, n, m, dim, heads, context = SHAPES[shape]
    if both:
        module = BidirectionalGatedCrossAttention(dim, heads, **options)
    else:
        module = GatedCrossAttention(dim, heads, context_dim=context, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5 if parameter.dim() > 1 else 0.5)
    inputs = [torch.randn(batch, n, dim), torch.randn(batch, m, dim if both else context)]
    present = torch.arange(batch) != batch - 2, torch.arange(batch) != 0
    second = "b" if both else "context"
    extra = {}
    if masks != "none":
        extra[f"{second}_present"] = present[1]
        if both:
            extra["a_present"] = present[0]
    if masks == "mixed":
        ignore = torch.rand(batch, m) < 0.3
        ignore[-1, : m - m // 3] = True  # padded on the left
        ignore[0, 0] = True  # in an absent context, the first valid token is not token 0
        extra[f"{second}_key_padding_mask"] = ignore
        if both:
            extra["a_lengths"] = torch.randint(1, n + 1, (batch,))
    extra = {name: value.to(DEVICE) for name, value in extra.items()}
    return module.to(DEVICE, dtype), [x.to(DEVICE, dtype).requires_grad_() for x in inputs], extra


def run(module, inputs, extra, backend, dtype=None, upstream=None, seed=11):
    """Return the outputs and the gradients of tokens and parameters, by name."""
    dtype = dtype or inputs[0].dtype
    module = module.to(dtype)
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with sums_of(backend), mmfused.backend(backend):
        outs = module(*leaves, **extra, dropout_seed=torch.tensor(seed, device=DEVICE))
    outs = outs if isinstance(outs, tuple) else (outs,)
    named = {"x0": leaves[0], "x1": leaves[1]} | dict(module.named_parameters())
    if upstream is None:
        upstream = [torch.ones_like(out) for out in outs]
    upstream = [u.to(dtype) for u in upstream[: len(outs)]]
    with sums_of(backend):
        gradients = torch.autograd.grad(outs, list(named.values()), upstream)
    results = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    results |= {f"d {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    # The error of a single number is too random to judge. So append the gradient of a token gate's
    # bias to the gradient of the gate's weight.
    for name in [name for name, gradient in results.items() if gradient.shape == (1,)]:
        weight = name.replace("bias", "weight")
        results[weight] = torch.cat([results[weight], results.pop(name)[None]], 1)
    return results


def upstream_for(inputs):
    return [torch.randn(x.shape, dtype=torch.float64, device=DEVICE) for x in inputs]
