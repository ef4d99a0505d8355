"""The cases whose launches are counted: each op with its options, at the shapes of a model.

Tensors hold zeros that take no memory, because the recorder computes nothing. The dtype is bfloat16
and all gradients are needed, unless the name of a case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import mmfused

from .torch_work import untouched

HALF, FLOAT = torch.bfloat16, torch.float32
ModuleType = TypeVar("ModuleType", bound=nn.Module)


class Call(NamedTuple):
    """A call of an op: what runs, and the tensors whose gradients are needed."""

    run: Callable[[], Any]
    leaves: list[Tensor]


def floats(*shape: int, dtype: torch.dtype = HALF, grad: bool = True) -> Tensor:
    """Return a tensor of zeros that needs a gradient, unless ``grad`` is False."""
    return untouched(shape, dtype=dtype).requires_grad_(grad)


def integers(*shape: int) -> Tensor:
    """Return a tensor of int64."""
    return untouched(shape, dtype=torch.int64)


def mask(*shape: int) -> Tensor:
    """Return a tensor of bool."""
    return untouched(shape, dtype=torch.bool)


def module(make: Callable[[], ModuleType], dtype: torch.dtype = HALF) -> ModuleType:
    """Return the module that ``make`` makes, with zeros in place of its weights."""
    with torch.device("meta"):
        made = make()

    for part in made.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = nn.Parameter(untouched(x.shape, dtype=dtype))
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = untouched(x.shape, dtype=x.dtype)
    return made


# ---- query pooling: FLUID's Q-Transform ----------------------------------------------------------


def pooling(
    *,
    B: int = 1024,
    N: int = 197,
    D: int = 768,
    L: int | None = 32,
    dtype: torch.dtype = HALF,
    tokens_trained: bool = True,
    queries: tuple[int, ...] | None = None,
    padding: str = "",
    **options: Any,
) -> Call:
    """Return a call of QueryPooling; ``queries``: the shape of given queries."""
    pool = module(lambda: mmfused.QueryPooling(D, L, **options), dtype)
    x = floats(B, N, D, dtype=dtype, grad=tokens_trained)
    given = None if queries is None else floats(*queries, D, dtype=dtype)
    kept = {
        "": {},
        "mask": {"key_padding_mask": mask(B, N)},
        "lengths": {"lengths": integers(B)},
    }[padding]
    leaves = [x, *pool.parameters(), *([] if given is None else [given])]
    return Call(lambda: pool(x, queries=given, **kept), [x for x in leaves if x.requires_grad])


def q_transform(**options: Any) -> Call:
    """Return a call of QTransform."""
    transform = module(lambda: mmfused.QTransform(768, 32, **options))
    x = floats(1024, 197, 768)
    return Call(lambda: transform(x), [x, *transform.parameters()])


PROJECTED = dict(q_proj=True, out_proj=True, bias=True)
POOLING: dict[str, Callable[[], Call]] = {
    "plain": lambda: pooling(),
    "float32": lambda: pooling(dtype=FLOAT),
    "8 heads": lambda: pooling(num_heads=8, B=128),
    "1 query, 12 heads, all projections": lambda: pooling(L=1, num_heads=12, **PROJECTED),
    "2 queries over 32 tokens": lambda: pooling(L=2, N=32),
    "all projections and biases": lambda: pooling(**PROJECTED),
    "LayerNorm of the tokens": lambda: pooling(norm_kv=True),
    "padding mask": lambda: pooling(padding="mask"),
    "lengths": lambda: pooling(padding="lengths"),
    "dropout": lambda: pooling(dropout=0.1),
    "dropout, bias, LayerNorm, mask": lambda: pooling(
        dropout=0.1, norm_kv=True, padding="mask", **PROJECTED
    ),
    "frozen tokens": lambda: pooling(tokens_trained=False),
    "given queries": lambda: pooling(L=None, queries=(32,)),
    "given queries for each sample": lambda: pooling(L=None, queries=(1024, 32)),
    "QTransform, 1 layer": lambda: q_transform(),
    "QTransform, 2 layers": lambda: q_transform(depth=2, num_heads=8),
}

# ---- gated cross-attention: UniECS's layer -------------------------------------------------------


def cross_attention(
    *,
    directions: int = 2,
    B: int = 1024,
    N: int = 197,
    M: int = 64,
    D: int = 256,
    H: int = 8,
    dtype: torch.dtype = HALF,
    padding: str = "",
    present: bool = False,
    **options: Any,
) -> Call:
    """Return a call of the layer with one direction or with both."""
    names = ("a", "b") if directions == 2 else ("context",)
    given = {}
    for name, length in zip(names, (N, M) if directions == 2 else (M,), strict=True):
        if padding == "mask":
            given[f"{name}_key_padding_mask"] = mask(B, length)
        if padding == "lengths":
            given[f"{name}_lengths"] = integers(B)
        if present:
            given[f"{name}_present"] = mask(B)
    kind = mmfused.BidirectionalGatedCrossAttention
    if directions == 1:
        kind = mmfused.GatedCrossAttention
    layer = module(lambda: kind(D, H, **options), dtype)
    a, b = floats(B, N, D, dtype=dtype), floats(B, M, D, dtype=dtype)
    return Call(lambda: layer(a, b, **given), [a, b, *layer.parameters()])


CROSS_ATTENTION: dict[str, Callable[[], Call]] = {
    "both directions": lambda: cross_attention(),
    "one direction": lambda: cross_attention(directions=1),
    "float32": lambda: cross_attention(dtype=FLOAT),
    "768 wide": lambda: cross_attention(B=512, M=128, D=768, H=12),
    "small batch, 64 wide": lambda: cross_attention(B=4, N=33, M=21, D=64, H=4),
    "gate for each token": lambda: cross_attention(gate="token"),
    "no gate": lambda: cross_attention(gate="none"),
    "UniCA: no gate, LayerNorm after": lambda: cross_attention(
        B=320, N=196, D=768, H=12, gate="none", pre_norm=False
    ),
    "no indicator": lambda: cross_attention(indicator=False),
    "no biases": lambda: cross_attention(bias=False),
    "shared weights": lambda: cross_attention(share_weights=True),
    "dropout": lambda: cross_attention(dropout=0.1),
    "padding masks": lambda: cross_attention(padding="mask"),
    "lengths": lambda: cross_attention(padding="lengths"),
    "missing: skip": lambda: cross_attention(present=True),
    "missing: zero": lambda: cross_attention(present=True, missing="zero"),
    "missing: attend": lambda: cross_attention(present=True, missing="attend"),
    "missing: constant": lambda: cross_attention(present=True, missing="constant"),
    "missing: skip, indicator of the batch": lambda: cross_attention(
        present=True, indicator="batch"
    ),
    "missing: skip, one direction": lambda: cross_attention(directions=1, present=True),
    "missing: skip, masks, dropout": lambda: cross_attention(
        present=True, padding="mask", dropout=0.1
    ),
}

# ---- routing -------------------------------------------------------------------------------------


def routing(
    *,
    T: int = 16384,
    D: int | None = None,
    E: int = 16,
    k: int = 2,
    S: int = 1,
    dtype: torch.dtype = FLOAT,
    router_dtype: torch.dtype = FLOAT,
    bias: bool = False,
    losses: tuple[str, ...] = ("balance_loss", "z_loss"),
    given: tuple[str, ...] = (),
    **options: Any,
) -> Call:
    """Return a call of topk_routing, or with ``D`` of topk_routing_from_input.

    Args:
        T, D, E, k, S: tokens, width, experts, experts of a token, segments.
        dtype, router_dtype: of the logits or tokens, and of the router.
        bias: whether the router has a bias.
        losses: which losses are used.
        given: names of further tensors that are given.
        options: of topk_routing.
    """
    tensors = {
        "selection_bias": lambda: floats(E, dtype=FLOAT, grad=False),
        "token_padding_mask": lambda: mask(T),
        "segments": lambda: integers(T),
        "available": lambda: mask(S, E),
        "indices": lambda: integers(T, k),
    }
    options |= {name: tensors[name]() for name in given} | {"num_segments": S}
    x = floats(T, E if D is None else D, dtype=dtype)
    router = [] if D is None else [floats(E, D, dtype=router_dtype)]
    router_bias = floats(E, dtype=router_dtype) if bias else None

    def run() -> list[Tensor]:
        if router:
            out = mmfused.topk_routing_from_input(x, router[0], k, router_bias, **options)
        else:
            out = mmfused.topk_routing(x, k, **options)
        return [out.weights, *(getattr(out, name) for name in losses)]

    return Call(run, [x, *router, *([] if router_bias is None else [router_bias])])


FROM_X: dict[str, Any] = dict(T=32768, D=2048, E=128, k=8, dtype=HALF)
SEGMENTS: dict[str, Any] = dict(S=3, given=("segments",))
ROUTING: dict[str, Callable[[], Call]] = {
    "logits": lambda: routing(),
    "logits, no loss": lambda: routing(losses=()),
    "logits, all losses": lambda: routing(losses=("balance_loss", "z_loss", "entropy")),
    "logits in bfloat16": lambda: routing(dtype=HALF),
    "logits, gshard": lambda: routing(balance="gshard"),
    "logits, mse": lambda: routing(balance="mse"),
    "logits, sigmoid, selection bias": lambda: routing(score="sigmoid", given=("selection_bias",)),
    "logits, padding mask": lambda: routing(given=("token_padding_mask",)),
    "logits, segments": lambda: routing(**SEGMENTS),
    "logits, segments, gshard": lambda: routing(balance="gshard", **SEGMENTS),
    "logits, segments, available experts": lambda: routing(S=3, given=("segments", "available")),
    "logits, jitter": lambda: routing(jitter=0.01),
    "logits, given indices": lambda: routing(given=("indices",)),
    "logits, 512 experts": lambda: routing(E=512, k=8),
    "x": lambda: routing(**FROM_X),
    "x, router with bias": lambda: routing(bias=True, **FROM_X),
    "x, router in bfloat16": lambda: routing(router_dtype=HALF, **FROM_X),
    "x in float32": lambda: routing(**FROM_X | dict(dtype=FLOAT)),
    "x, no loss": lambda: routing(losses=(), **FROM_X),
    "x, padding mask, segments, mse": lambda: routing(
        S=3, given=("token_padding_mask", "segments"), balance="mse", **FROM_X
    ),
    "x, jitter": lambda: routing(jitter=0.01, **FROM_X),
}

# ---- experts -------------------------------------------------------------------------------------


def experts(
    *,
    T: int = 512,
    D: int = 768,
    width: int = 3072,
    E: int = 16,
    k: int = 2,
    dtype: torch.dtype = HALF,
    masked: bool = False,
    tokens_trained: bool = True,
    **options: Any,
) -> Call:
    """Return a call of TopKMoE, with its router."""
    moe = module(lambda: mmfused.TopKMoE(D, width, E, k, **options), dtype)
    x = floats(T, D, dtype=dtype, grad=tokens_trained)
    ignored = mask(T) if masked else None

    def run() -> list[Tensor]:
        out, choice = moe(x, token_padding_mask=ignored)
        return [out, choice.balance_loss]

    return Call(run, [*([x] if tokens_trained else []), *moe.parameters()])


def grouped(
    *,
    T: int = 8192,
    D: int = 2048,
    width: int = 5504,
    E: int = 4,
    k: int = 1,
    packed: bool = False,
    bias: bool = False,
    activation: str = "swiglu",
) -> Call:
    """Return a call of grouped_mlp for a given routing."""
    choice = _given_routing(T, E, k)
    x = floats(T, D)
    gated = activation == "swiglu" and not packed
    w_up = floats(E, 2 * width if packed else width, D)
    parts = {"w_down": floats(E, D, width)}
    if gated:
        parts["w_gate"] = floats(E, width, D)
    if bias:
        parts |= {"b_up": floats(E, width), "b_down": floats(E, D)}
    return Call(
        lambda: mmfused.grouped_mlp(x, choice, w_up, activation=activation, **parts),
        [x, w_up, *parts.values(), choice.weights],
    )


def grouped_layer(*, combine: bool, bias: bool = True) -> Call:
    """Return a call of grouped_linear."""
    T, D, E, k = 8192, 768, 16, 2
    choice = _given_routing(T, E, k)
    x = floats(T * k if combine else T, D)
    weight, b = floats(E, D, D), floats(E, D) if bias else None
    leaves = [x, weight, *([] if b is None else [b]), *([choice.weights] if combine else [])]
    return Call(
        lambda: mmfused.grouped_linear(x, choice, weight, b, gather=not combine, combine=combine),
        leaves,
    )


def _given_routing(T: int, E: int, k: int) -> mmfused.Routing:
    """Return a routing as a leaf, whose tensors hold no values."""
    number = torch.int32
    return mmfused.Routing(
        indices=integers(T, k),
        weights=floats(T, k, dtype=FLOAT),
        counts=integers(1, E),
        balance_loss=floats(dtype=FLOAT, grad=False),
        z_loss=floats(dtype=FLOAT, grad=False),
        entropy=floats(dtype=FLOAT, grad=False),
        order=untouched((T * k,), dtype=number),
        position=untouched((T * k,), dtype=number),
        offsets=untouched((E + 1,), dtype=number),
        tiles=untouched((T * k // 16 + E, 2), dtype=number),
    )


LARGE: dict[str, Any] = dict(T=32768, D=2048, width=768, E=128, k=8, bias=False)
EXPERTS: dict[str, Callable[[], Call]] = {
    "TopKMoE, GELU, biases": lambda: experts(),
    "TopKMoE, 256 tokens": lambda: experts(T=256),
    "TopKMoE, ReLU": lambda: experts(activation="relu"),
    "TopKMoE, SwiGLU, no biases": lambda: experts(activation="swiglu", bias=False),
    "TopKMoE, SwiGLU, 128 experts": lambda: experts(activation="swiglu", **LARGE),
    "TopKMoE, k = 1": lambda: experts(k=1),
    "TopKMoE, float32": lambda: experts(dtype=FLOAT),
    "TopKMoE, padding mask": lambda: experts(masked=True),
    "TopKMoE, jitter": lambda: experts(jitter=0.01),
    "TopKMoE, selection bias": lambda: experts(selection_bias=True),
    "TopKMoE, frozen tokens": lambda: experts(tokens_trained=False),
    "grouped_mlp, SwiGLU, k = 1": lambda: grouped(),
    "grouped_mlp, SwiGLU, packed": lambda: grouped(packed=True),
    "grouped_mlp, GELU, biases": lambda: grouped(activation="gelu", bias=True),
    "grouped_mlp, ReLU": lambda: grouped(activation="relu"),
    "grouped_linear, gather": lambda: grouped_layer(combine=False),
    "grouped_linear, gather, no bias": lambda: grouped_layer(combine=False, bias=False),
    "grouped_linear, combine": lambda: grouped_layer(combine=True),
}

# ---- masked InfoNCE: UNITE's loss ----------------------------------------------------------------


def info_nce(
    *,
    B: int = 4096,
    C: int | None = None,
    D: int = 1536,
    dtype: torch.dtype = HALF,
    given: tuple[str, ...] = (),
    learnable: bool = False,
    **options: Any,
) -> Call:
    """Return a call of masked_info_nce.

    Args:
        B, C, D: queries, candidates (default B), width.
        dtype: of the embeddings.
        given: "target", "keys", "ids" and "weights", of which the op gets tensors.
        learnable: whether the temperature is a tensor that needs a gradient.
        options: of masked_info_nce.
    """
    C = B if C is None else C
    q, c = floats(B, D, dtype=dtype), floats(C, D, dtype=dtype)
    for name in given:
        if name == "target":
            options["target"] = integers(B)
        elif name == "weights":
            options["row_weight"] = floats(B, dtype=FLOAT, grad=False)
        else:
            one = name.removesuffix("s")
            options |= {f"query_{one}": integers(B), f"candidate_{one}": integers(C)}
    temperature = floats(dtype=FLOAT) if learnable else 0.05
    return Call(
        lambda: mmfused.masked_info_nce(q, c, temperature=temperature, **options),
        [q, c, *([temperature] if isinstance(temperature, Tensor) else [])],
    )


def info_nce_module(**options: Any) -> Call:
    """Return a call of MaskedInfoNCE, which scales the embeddings to length 1."""
    loss = module(lambda: mmfused.MaskedInfoNCE(0.05, **options), FLOAT)
    q, c = floats(4096, 1536), floats(4096, 1536)
    return Call(lambda: loss(q, c), [q, c, *loss.parameters()])


UNITE = ("keys", "ids", "weights")
INFO_NCE: dict[str, Callable[[], Call]] = {
    "plain": lambda: info_nce(),
    "float32": lambda: info_nce(dtype=FLOAT),
    "float16": lambda: info_nce(dtype=torch.float16),
    "65536 rows": lambda: info_nce(B=65536, D=768),
    "symmetric": lambda: info_nce(symmetric=True),
    "symmetric, 65536 rows": lambda: info_nce(B=65536, D=768, symmetric=True),
    "target": lambda: info_nce(C=8192, given=("target",)),
    "keys": lambda: info_nce(given=("keys",)),
    "keys, symmetric": lambda: info_nce(given=("keys",), symmetric=True),
    "ids, drop": lambda: info_nce(given=("ids",)),
    "ids, mean": lambda: info_nce(given=("ids",), same_id="mean"),
    "ids, sum": lambda: info_nce(given=("ids",), same_id="sum"),
    "weights": lambda: info_nce(given=("weights",)),
    "label smoothing": lambda: info_nce(label_smoothing=0.1),
    "positive weight": lambda: info_nce(positive_weight=0.5),
    "learnable temperature": lambda: info_nce(learnable=True),
    "reduction: none": lambda: info_nce(reduction="none"),
    "keys, ids, weights": lambda: info_nce(given=UNITE),
    "UNITE: keys, ids, weights, target": lambda: info_nce(C=8192, given=(*UNITE, "target")),
    "all options": lambda: info_nce(
        given=UNITE, symmetric=True, same_id="mean", label_smoothing=0.1, learnable=True
    ),
    "MaskedInfoNCE": lambda: info_nce_module(),
    "MaskedInfoNCE, learnable temperature": lambda: info_nce_module(learnable_temperature=True),
}

OPS: dict[str, dict[str, Callable[[], Call]]] = {
    "query pooling": POOLING,
    "gated cross-attention": CROSS_ATTENTION,
    "routing": ROUTING,
    "experts": EXPERTS,
    "masked InfoNCE": INFO_NCE,
}
