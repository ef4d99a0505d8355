"""Small calls that between them launch every kernel, forward and backward, for
``tools/sanitize.py``.

Sizes are odd, so that every mask of a load is needed; options are those that differ in mechanism.
On a GPU in bfloat16 and, where float32 has kernels of its own, in that; under
``TRITON_INTERPRET=1`` on the CPU with float16 in place of bfloat16."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

import mmfused
from mmfused import extension, library
from mmfused.kernels import gated_cross_attention, masked_info_nce, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
FLOAT = torch.float32


def launch(op: str) -> Counter:
    """Run every variant of ``op``; how often each kernel was launched, as "module.kernel"."""
    if DEVICE == "cpu" and not tiles.INTERPRETED:
        raise ValueError(
            "--launch needs a CUDA GPU, or TRITON_INTERPRET=1 to run the kernels on a CPU."
        )
    torch.manual_seed(0)
    with counted() as launches, mmfused.backend("fused"):
        for variant in VARIANTS[op]():
            variant()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return launches


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts what goes through ``tiles.launch``, which every launcher has imported by name."""
    launches, original = Counter(), tiles.launch

    def counting(kernel, *args, **options):
        launches[
            f"{kernel.fn.__module__.removeprefix('mmfused.kernels.')}.{kernel.fn.__name__}"
        ] += 1
        return original(kernel, *args, **options)

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("mmfused.kernels") and getattr(module, "launch", None) is original
    ]
    for module in holders:
        module.launch = counting
    try:
        yield launches
    finally:
        for module in holders:
            module.launch = original


def randn(*shape: int, dtype: torch.dtype = HALF, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * std).to(dtype).requires_grad_()


def choose(chance: float, *shape: int) -> Tensor:
    return torch.rand(*shape, device=DEVICE) < chance


def integers(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, device=DEVICE)


def seed() -> Tensor:
    return torch.tensor(1234567890123, device=DEVICE)


def backward(outs: Tensor | tuple[Tensor, ...], *leaves: Tensor | None) -> None:
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    torch.autograd.grad(outs, wanted, [torch.randn_like(out) for out in outs])


# ---- query pooling -------------------------------------------------------------------------------


def query_pooling() -> Iterator:
    yield lambda: pool(3, 70, 36, 3, 2, padding="mask", norm=True, dropout=0.2)
    yield lambda: pool(3, 37, 64, 2, 1, need_dx=False)
    yield lambda: pool(2, 70, 100, 9, 2, padding="lengths", per_sample=True, dropout=0.2)
    yield lambda: pool(2, 21, 1100, 3, 1, padding="mask", norm=True, strided=True)
    yield lambda: pool(2, 21, 1100, 3, 1, dropout=0.2)
    yield lambda: pool(3, 70, 36, 5, 1, padding="lengths", norm=True, dtype=FLOAT)


def pool(
    batch,
    length,
    dim,
    queries,
    heads,
    *,
    padding=None,
    norm=False,
    per_sample=False,
    dropout=0.0,
    need_dx=True,
    strided=False,
    dtype=HALF,
) -> None:
    """The first sample has no token where there is a padding."""
    x = (
        randn(length, batch, dim, dtype=dtype).transpose(0, 1)
        if strided
        else randn(batch, length, dim, dtype=dtype)
    )
    x = x.detach().requires_grad_(need_dx)
    q = randn(*([batch] if per_sample else []), queries, 8 * heads, dtype=dtype)
    w_k, w_v = (randn(8 * heads, dim, dtype=dtype, std=dim**-0.5) for _ in range(2))
    weight, bias = (randn(dim, dtype=dtype), randn(dim, dtype=dtype)) if norm else (None, None)
    masks = {}
    if padding == "mask":
        masks["key_padding_mask"] = choose(0.4, batch, length)
        masks["key_padding_mask"][0] = True
    if padding == "lengths":
        masks["lengths"] = torch.tensor([0, *[length - 5] * (batch - 1)], device=DEVICE)
    out = mmfused.query_pooling(
        x,
        q,
        w_k,
        w_v,
        num_heads=heads,
        norm_weight=weight,
        norm_bias=bias,
        dropout_p=dropout,
        dropout_seed=seed(),
        **masks,
    )
    backward(out, x, q, w_k, w_v, weight, bias)


# ---- masked InfoNCE ------------------------------------------------------------------------------


def info_nce() -> Iterator:
    yield lambda: contrast(150, 211, 20, symmetric=True)
    yield lambda: contrast(150, 211, 64, keys=True, ids="drop", target=True)
    yield lambda: contrast(150, 211, 300, keys=True, ids="drop", symmetric=True)
    yield lambda: contrast(70, 90, 20, keys=True, ids="mean", symmetric=True, smoothing=0.1)
    yield lambda: contrast(
        70, 90, 36, keys=True, ids="sum", symmetric=True, smoothing=0.1, dtype=FLOAT
    )
    yield lambda: in_pieces(150, 150, 20, symmetric=True)
    yield lambda: in_pieces(150, 150, 300, symmetric=True)


def in_pieces(*shape, **options) -> None:
    """As a batch too large for one scratch: programs add to their own column sums, and dS comes in
    several chunks.
    """
    usual = masked_info_nce.plan
    masked_info_nce.plan = lambda *args: replace(usual(*args), partial_bytes=1, chunk_bytes=1)
    try:
        contrast(*shape, **options)
    finally:
        masked_info_nce.plan = usual


def contrast(
    rows,
    columns,
    dim,
    *,
    keys=False,
    ids=None,
    symmetric=False,
    target=False,
    smoothing=0.0,
    dtype=HALF,
) -> None:
    """Candidates of nobody, of everybody and in between; one that nobody sees holds NaN."""
    query, candidate = (randn(n, dim, dtype=dtype, std=dim**-0.5).detach() for n in (rows, columns))
    masks = {}
    if keys:
        masks = dict(candidate_key=integers(3, columns, low=-1), query_key=integers(3, rows))
        masks["candidate_key"][-1] = 7
        candidate[-1] = float("nan")
    if ids:
        masks |= dict(candidate_id=integers(columns // 3, columns), same_id=ids)
    if target:
        masks["target"] = integers(columns - 1, rows)
    temperature = torch.tensor(0.1, device=DEVICE).requires_grad_()
    query, candidate = query.requires_grad_(), candidate.requires_grad_()
    loss = mmfused.masked_info_nce(
        query,
        candidate,
        temperature=temperature,
        symmetric=symmetric,
        label_smoothing=smoothing,
        **masks,
    )
    backward(loss, query, candidate, temperature)


# ---- routing -------------------------------------------------------------------------------------


def topk_routing() -> Iterator:
    routers = ["triton"]
    if DEVICE == "cuda" and not extension.why_not():
        routers.append("cuda")
    for name in routers:
        yield lambda name=name: route(70, 5, 2, router=name, ties=True)
        yield lambda name=name: route(
            70, 5, 2, router=name, everything=True, balance="gshard", score="sigmoid"
        )
        yield lambda name=name: route(
            37, 130, 8, router=name, everything=True, balance="mse", dtype=HALF
        )
        yield lambda name=name: route(37, 5, 2, router=name, replay=True)
    yield lambda: route(70, 5, 2, dim=36, dtype=HALF, router_dtype=FLOAT, everything=True)
    yield lambda: route(70, 16, 2, dim=128, dtype=HALF, router_dtype=HALF)
    yield lambda: route(37, 130, 8, dim=70, dtype=HALF, router_dtype=FLOAT, score="sigmoid")
    yield lambda: route(37, 5, 2, dim=36, dtype=FLOAT, router_dtype=FLOAT)
    yield lambda: mmfused.routing_from_indices(
        integers(5, 70, 2), randn(70, 2, dtype=FLOAT), 5, token_padding_mask=choose(0.3, 70)
    )


def route(
    tokens,
    experts,
    k,
    *,
    dim=None,
    dtype=FLOAT,
    router_dtype=None,
    router="triton",
    everything=False,
    replay=False,
    ties=False,
    **options,
) -> None:
    """``everything``: padding, segments with their own experts, a selection bias and jitter."""
    if everything:
        segments, usable = 3, torch.rand(3, experts, device=DEVICE) < 0.7
        usable[:, -k:] = True
        options |= dict(
            token_padding_mask=choose(0.3, tokens),
            segments=integers(segments, tokens),
            num_segments=segments,
            available=usable,
            selection_bias=torch.randn(experts, device=DEVICE),
            jitter=0.1,
            jitter_seed=seed(),
        )
    if replay:
        options["indices"] = integers(experts, tokens, k)
    if dim is None:
        leaves = [randn(tokens, experts, dtype=dtype)]
        if ties:
            leaves = [leaves[0].detach().round().requires_grad_()]
        with library.router(router):
            routing = mmfused.topk_routing(leaves[0], k, **options)
            backward(
                (routing.weights, routing.balance_loss, routing.z_loss, routing.entropy), *leaves
            )
        return
    leaves = [
        randn(tokens, dim, dtype=dtype),
        randn(experts, dim, dtype=router_dtype, std=dim**-0.5),
    ]
    leaves.append(randn(experts, dtype=router_dtype))
    routing = mmfused.topk_routing_from_input(leaves[0], leaves[1], k, leaves[2], **options)
    backward((routing.weights, routing.balance_loss, routing.z_loss, routing.entropy), *leaves)


# ---- experts -------------------------------------------------------------------------------------


def grouped_mlp() -> Iterator:
    yield lambda: mlp(37, 5, 2, 70, 50, 36, "gelu")
    yield lambda: mlp(37, 5, 2, 70, 50, 36, "swiglu", sort="composed")
    yield lambda: mlp(160, 3, 2, 64, 80, 48, "swiglu", packed=True)
    yield lambda: mlp(160, 3, 2, 64, 80, 48, "relu")
    yield lambda: mlp(37, 5, 2, 36, 20, 24, "swiglu", dtype=FLOAT)
    for gather in (True, False):
        for combine in (True, False):
            yield lambda gather=gather, combine=combine: linear(37, 5, 2, 70, 50, gather, combine)


def sorted_rows(tokens, experts, k, sort="fused") -> tuple[mmfused.Routing, Tensor]:
    """Some tokens are masked, and expert 1 gets nothing. ``sort``: with "composed" the map of tiles
    is left to the experts.
    """
    indices = (
        torch.rand(tokens, experts, device=DEVICE)
        .index_fill_(1, torch.tensor([1], device=DEVICE), -1.0)
        .argsort(1)
    )
    weights = torch.rand(tokens, k, device=DEVICE, requires_grad=True)
    with mmfused.backend(sort):
        indices = indices.flip(1)[:, :k].contiguous()
        return mmfused.routing_from_indices(
            indices, weights, experts, token_padding_mask=choose(0.2, tokens)
        ), weights


def mlp(
    tokens,
    experts,
    k,
    dim,
    width,
    out,
    activation,
    *,
    packed=False,
    sort="fused",
    dtype=HALF,
) -> None:
    routing, weights = sorted_rows(tokens, experts, k, sort)
    x = randn(tokens, dim, dtype=dtype)
    w_up = randn(experts, 2 * width if packed else width, dim, dtype=dtype, std=0.1)
    w_gate = (
        randn(experts, width, dim, dtype=dtype, std=0.1)
        if activation == "swiglu" and not packed
        else None
    )
    w_down, b_up, b_down = (
        randn(experts, *shape, dtype=dtype, std=0.1) for shape in ((out, width), (width,), (out,))
    )
    result = mmfused.grouped_mlp(
        x, routing, w_up, w_down, b_up=b_up, b_down=b_down, w_gate=w_gate, activation=activation
    )
    backward(result, x, weights, w_up, w_gate, w_down, b_up, b_down)


def linear(tokens, experts, k, inputs, outputs, gather, combine) -> None:
    routing, weights = sorted_rows(tokens, experts, k)
    x = randn(tokens if gather else tokens * k, inputs)
    weight, bias = randn(experts, outputs, inputs, std=0.1), randn(experts, outputs)
    out = mmfused.grouped_linear(x, routing, weight, bias, gather=gather, combine=combine)
    backward(out, x, weight, bias, weights if combine else None)


# ---- gated cross-attention -----------------------------------------------------------------------


def cross_attention() -> Iterator:
    """An even width and an odd one are loaded differently, and one above 256 takes more launches."""
    yield lambda: attend(24, 3, dropout=0.2)
    yield lambda: attend(20, 2, context=36, gate="token", missing="zero")
    yield lambda: attend(
        24, 3, context=40, gate="none", pre_norm=False, missing="constant", indicator="batch"
    )
    yield lambda: attend(264, 2, lengths=(9, 12), gate="token", missing="attend", dropout=0.2)
    yield lambda: attend(264, 2, lengths=(9, 12), missing="constant")
    yield lambda: attend(24, 3, dropout=0.2, dtype=FLOAT)
    for dtype in (HALF, FLOAT):
        yield lambda dtype=dtype: attend(24, 3, dropout=0.2, form="block", dtype=dtype)
    yield lambda: attend(20, 2, context=36, gate="token", missing="zero", form="block")
    yield lambda: attend(24, 3, context=40, gate="none", pre_norm=False, form="block")


def attend(
    dim,
    heads,
    *,
    lengths=(9, 37),
    context=None,
    form="epilogue",
    dtype=HALF,
    **options,
) -> None:
    """One sample lacks a side, one has nothing but padding, the others some of it. ``context``: its
    width, in one direction.
    """
    both, batch = context is None, 4
    kind = mmfused.BidirectionalGatedCrossAttention if both else mmfused.GatedCrossAttention
    module = kind(dim, heads, **({} if both else dict(context_dim=context)), **options).to(
        DEVICE, dtype
    )
    sides = [
        randn(batch, length, width, dtype=dtype)
        for length, width in zip(lengths, (dim, context or dim), strict=True)
    ]
    second, ignore = "b" if both else "context", choose(0.3, batch, lengths[1])
    ignore[2] = True
    masks = {
        f"{second}_key_padding_mask": ignore,
        f"{second}_present": torch.arange(batch, device=DEVICE) != 0,
    }
    if both:
        masks |= dict(
            a_lengths=torch.tensor([9, 0, 5, 7], device=DEVICE),
            a_present=torch.arange(batch, device=DEVICE) != 3,
        )
    with gated_cross_attention.plans.form(form):
        outs = module(*sides, dropout_seed=seed(), **masks)
    backward(outs, *sides, *module.parameters())


# ---- a fault on purpose --------------------------------------------------------------------------


@triton.jit
def control_kernel(ptr):
    tl.store(ptr + tl.arange(0, 32), 1.0)


def control() -> Iterator:
    """A kernel that writes past its buffer. Never in the interpreter, whose memory is this
    process's own.
    """
    if DEVICE != "cuda":
        raise ValueError("--launch control needs a CUDA GPU: it writes past the end of a buffer.")
    yield lambda: control_kernel[(1,)](torch.empty(1, device=DEVICE), num_warps=1)


VARIANTS = {
    "query_pooling": query_pooling,
    "masked_info_nce": info_nce,
    "topk_routing": topk_routing,
    "grouped_mlp": grouped_mlp,
    "gated_cross_attention": cross_attention,
    "control": control,
}
