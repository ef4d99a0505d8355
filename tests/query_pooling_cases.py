"""Inputs for the query pooling tests, and a function that runs a case."""

import importlib

import torch
from sums_in_order import sums_of

import mmfused
from mmfused import query_pooling
from mmfused.kernels.query_pooling.plans import plan
from mmfused.library import INTERPRETED
from mmfused.testing import value_and_gradients

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter truncates where hardware rounds to bfloat16, so bfloat16 is tested only on a GPU.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

# name -> (B, N, D, L, heads, Dk, Dv). Sizes are unusual on purpose.
SHAPES = {
    "one pass": (3, 37, 70, 5, 1, 24, 20),
    "row blocks": (2, 65, 96, 9, 4, 32, 48),
    "head dim 96": (2, 19, 192, 3, 2, 192, 192),
    # Samples that fit into one tile: more of them than programs, and several blocks of rows.
    "short": (19, 21, 70, 5, 1, 24, 20),
    "short row blocks": (9, 32, 96, 5, 4, 32, 48),
    "wide": (2, 21, 1056, 3, 2, 16, 12),
    "more samples than partial sums": (130, 9, 64, 2, 1, 8, 8),
    "one query": (2, 33, 64, 1, 4, 16, 16),
    # Lengths around the tiles' numbers of tokens, and widths of several kinds of column chunks.
    "1 token": (3, 1, 256, 2, 1, 8, 8),
    "31 tokens": (2, 31, 768, 2, 1, 8, 8),
    "32 tokens": (5, 32, 300, 1, 12, 24, 24),
    "65 tokens": (1, 65, 832, 3, 6, 24, 24),
}
PADDINGS = ("none", "mask", "lengths")


def make(
    shape="one pass",
    *,
    per_sample=False,
    norm=False,
    padding="none",
    dtype=torch.float64,
    grad=True,
    device=DEVICE,
):
    batch, length, dim, queries, heads, k_dim, v_dim = SHAPES[shape]

    def randn(*size):
        return torch.randn(*size, dtype=torch.float64).to(device, dtype).requires_grad_(grad)

    inputs = dict(
        x=randn(batch, length, dim),
        queries=randn(*((batch,) if per_sample else ()), queries, k_dim),
        w_k=(randn(k_dim, dim) * dim**-0.5).detach().requires_grad_(grad),
        w_v=(randn(v_dim, dim) * dim**-0.5).detach().requires_grad_(grad),
        b_v=randn(v_dim),
    )
    if norm:
        inputs |= dict(norm_weight=randn(dim), norm_bias=randn(dim))
    if padding == "mask":
        ignore = torch.rand(batch, length) < 0.4
        ignore[0] = True  # a sample without tokens
        ignore[1, : length // 2] = True  # a sample padded on the left
        inputs["key_padding_mask"] = ignore.to(device)
    if padding == "lengths":
        inputs["lengths"] = torch.randint(0, length + 1, (batch,)).to(device)
        inputs["lengths"][:2] = torch.tensor([0, length])
    return inputs, heads


def cast(inputs, dtype):
    return {
        k: v.detach().to(dtype).requires_grad_(v.requires_grad) if v.is_floating_point() else v
        for k, v in inputs.items()
    }


def run(inputs, heads, backend, upstream=None, form="absorbed", **kwargs):
    def call(**tensors):
        with mmfused.backend(backend):
            return query_pooling(**tensors, num_heads=heads, form=form, **kwargs)

    with sums_of(backend):
        return value_and_gradients(call, inputs, upstream)


def upstream_for(inputs):
    queries = inputs["queries"]
    return torch.randn(
        inputs["x"].shape[0],
        queries.shape[-2],
        inputs["w_v"].shape[0],
        dtype=torch.float64,
        device=DEVICE,
    )


def use_half_precision_plan(monkeypatch, arch):
    """Use the float16 plan of ``arch``, without Gluon, for every dtype and GPU."""

    def half_plan(rows, dim, dtype, own_arch, norm, *, dropout, length, padded, **options):
        options = dict(dropout=dropout, length=length, padded=padded)
        return plan(rows, dim, torch.float16, arch, norm, **options)

    for name in ("forward", "backward"):
        module = importlib.import_module(f"mmfused.kernels.query_pooling.{name}")
        monkeypatch.setattr(module, "plan", half_plan)


def run_with_lse(inputs, heads, backend, upstream, form="absorbed", **kwargs):
    """Return the output, the log-sum-exp with 0 for -inf, and the gradients.

    ``upstream``: the gradients of the output and of the log-sum-exp.
    """
    leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    with sums_of(backend):
        with mmfused.backend(backend):
            out = query_pooling(**leaves, num_heads=heads, form=form, return_lse=True, **kwargs)
        outs = dict(zip(("out", "lse"), out, strict=True))
        upstream = [u.to(part.dtype) for u, part in zip(upstream, out, strict=True)]
        gradients = torch.autograd.grad(out, list(wanted.values()), upstream)
    outs["lse"] = outs["lse"].masked_fill(outs["lse"].isneginf(), 0.0)
    results = outs | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def upstream_with_lse(inputs, heads):
    out = upstream_for(inputs)
    shape = (len(out), heads, inputs["queries"].shape[-2])
    return out, torch.randn(shape, dtype=torch.float64, device=DEVICE)
