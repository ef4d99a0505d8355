"""Random inputs for every public function.

MAKERS maps the name of a public function to a maker, which draws the arguments of a call.
"""

from __future__ import annotations

import importlib
import importlib.util

import small_loss_inputs
import torch
from drawing import Draw
from strided_views import DEVICE, EXPANDED
from torch import Tensor
from torch.nn.functional import normalize

import mmfused
from mmfused import CrossAttentionWeights
from mmfused.ops import OPS


def _padding(
    draw: Draw, prefix: str, batch: int, tokens: int, may_be_absent: bool = True
) -> tuple[dict, Tensor]:
    """Return the arguments that mask tokens or samples, and a mask of the padding tokens."""
    kind, given = draw.pick(f"{prefix}padding", "none", "mask", "lengths"), {}
    ignore = torch.zeros(batch, tokens, dtype=torch.bool)
    if kind == "mask":
        mask = given[f"{prefix}key_padding_mask"] = draw.flags(
            draw.pick("", 0.3, 0.9, 1.0), batch, tokens
        )
        ignore = mask.clone()
    if kind == "lengths":
        dtype = draw.pick("", torch.int64, torch.int32)
        lengths = given[f"{prefix}lengths"] = draw.integers(0, tokens + 1, batch, dtype=dtype)
        ignore = torch.arange(tokens) >= lengths[:, None]
    if may_be_absent and draw.given(f"{prefix}present"):
        given[f"{prefix}present"] = draw.flags(draw.pick("", 0.0, 0.6, 0.9), batch)
    return given, ignore


def query_pooling(draw: Draw) -> dict:
    batch, tokens = (
        draw.pick("batch", 0, 1, 2, 3, 5),
        draw.pick("tokens", 0, 1, 2, 5, 16, 17, 33, 64, 65),
    )
    dim, rows = (
        draw.pick("dim", 1, 2, 5, 8, 16, 17, 32, 33, 65),
        draw.pick("queries", 0, 1, 2, 3, 5, 9, 17),
    )
    heads = draw.pick("heads", 1, 1, 2, 3)
    k_dim, v_dim = heads * draw.pick("k_dim", 1, 3, 8, 16), heads * draw.pick("v_dim", 1, 3, 8, 16)
    norm = draw.given("norm") and (dim != 2 or draw.fixed.get("norm_of_two", True))
    mean = draw.pick("mean", 0, 0, 1, 3, 10, 30, 100) if norm else 0
    inputs = _tokens_and_padding(draw, batch, tokens, dim, mean) | dict(
        queries=draw.normal(
            *((batch,) if draw.pick("per_sample", True, False) else ()), rows, k_dim
        ),
        w_k=draw.weight(k_dim, dim, std=dim**-0.5),
        w_v=draw.weight(v_dim, dim, std=dim**-0.5),
        num_heads=heads,
        form=draw.pick("form", "auto", "absorbed", "projected"),
    )
    if draw.given("b_v"):
        inputs["b_v"] = draw.weight(v_dim)
    if draw.given("b_k", 0.3):
        inputs["b_k"] = draw.weight(k_dim)
    if draw.given("scale", 0.3):
        large = draw.pick("large", 0.5, 1.0, 30.0, 1e3)
        inputs["scale"] = large * (k_dim // heads) ** -0.5
    if norm:
        inputs["norm_weight"] = draw.weight(dim)
        if draw.given("norm_bias", 0.8):
            inputs["norm_bias"] = draw.weight(dim)
        inputs["norm_eps"] = draw.pick("norm_eps", 1e-5, 1e-6, 1e-3)
    if draw.given("dropout", 0.3):
        inputs["dropout_p"] = draw.pick("", 0.1, 0.5)
        if draw.given("dropout_seed", 0.8):
            inputs["dropout_seed"] = draw.seed()
    if draw.given("return_lse", 0.3):
        inputs["return_lse"] = True
    return inputs


def pooling_weights(draw: Draw) -> dict:
    same = ("num_heads", "scale", "norm_weight", "norm_eps", "queries", "w_k", "x")
    masks = ("key_padding_mask", "lengths", "cu_seqlens", "max_seqlen")
    inputs = {k: v for k, v in query_pooling(draw).items() if k in (*same, *masks)}
    return inputs | dict(chunk=draw.pick("chunk", 1, 2, 32))


def _tokens_and_padding(draw: Draw, batch: int, tokens: int, dim: int, mean: float) -> dict:
    if not draw.given("packed", 0.2):
        x = draw.normal(batch, tokens, dim, mean=mean, expand=EXPANDED[:1])
        padding, ignore = _padding(draw, "", batch, tokens, may_be_absent=False)
        draw.poison(x, ignore)
        return dict(x=x) | padding
    lengths = torch.randint(0, tokens + 1, (batch,), generator=draw.generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    offsets += draw.pick("first", 0, 0, 3)
    end = int(offsets[-1]) + draw.pick("more", 0, 0, 5)
    x = draw.normal(end, dim, mean=mean, expand=EXPANDED[:1])
    rows = torch.arange(end)
    draw.poison(x, (rows < offsets[0]) | (rows >= offsets[-1]))
    offsets = draw.place(offsets.to(draw.pick("", torch.int32, torch.int64)), expand=())
    return dict(x=x, cu_seqlens=offsets, max_seqlen=tokens + draw.pick("loose", 0, 0, 70))


def _attention(draw: Draw) -> tuple[dict, int, int]:
    """Return (options of both cross-attention functions, width, batch size)."""
    heads = draw.pick("heads", 1, 1, 2, 3)
    dim = heads * draw.pick("head_dim", 1, 3, 8, 16, 17)
    gate = draw.pick("gate", "channel", "token", "none")
    options = dict(
        num_heads=heads,
        gate=gate,
        indicator=draw.pick("indicator", True, False, "batch"),
        missing=draw.pick("missing", "skip", "zero", "attend", "constant"),
        pre_norm=draw.pick("pre_norm", True, False) if gate == "none" else True,
        norm_eps=draw.pick("norm_eps", 1e-5, 1e-6, 1e-3),
    )
    if draw.given("dropout", 0.3):
        options["dropout_p"] = draw.pick("", 0.1, 0.5)
        if draw.given("dropout_seed", 0.8):
            options["dropout_seed"] = draw.seed()
    return options, dim, draw.pick("batch", 0, 1, 2, 3, 5)


def _attention_weights(
    draw: Draw, dim: int, context_dim: int, options: dict
) -> CrossAttentionWeights:
    std = draw.pick("", 1.0, 1.0, 5.0)
    weights = dict(
        w_q=draw.weight(dim, dim, std=std * dim**-0.5),
        w_k=draw.weight(dim, context_dim, std=std * context_dim**-0.5),
        w_v=draw.weight(dim, context_dim, std=context_dim**-0.5),
        w_o=draw.weight(dim, dim, std=dim**-0.5),
    )
    biases = dict(b_q=dim, b_k=dim, b_v=dim, b_o=dim)
    if options["gate"] != "none":
        rows = dim if options["gate"] == "channel" else 1
        weights["w_g"] = draw.weight(rows, 2 * dim + bool(options["indicator"]), std=dim**-0.5)
        biases["b_g"] = rows
    return CrossAttentionWeights(
        **weights, **{name: draw.weight(n) for name, n in biases.items() if draw.given(name, 0.7)}
    )


def _norm(draw: Draw, dim: int) -> tuple[Tensor, Tensor]:
    return draw.weight(dim), draw.weight(dim)


def _unread(reads_absent: bool, ignore: Tensor, present: Tensor | None) -> Tensor:
    return ignore if reads_absent or present is None else ignore | ~present[:, None]


def gated_cross_attention(draw: Draw) -> dict:
    options, dim, batch = _attention(draw)
    context_dim = draw.pick("context_dim", 1, 5, 16, 33, dim)
    tokens, keys = (
        draw.pick("tokens", 0, 1, 2, 5, 17, 33, 65),
        draw.pick("keys", 0, 1, 2, 5, 17, 33, 65),
    )
    mean = draw.pick("mean", 0, 0, 1, 3, 10, 30, 100) if options["pre_norm"] else 0
    inputs = dict(
        x=draw.normal(batch, tokens, dim, mean=mean, expand=EXPANDED[:1]),
        context=draw.normal(batch, keys, context_dim, mean=mean, expand=EXPANDED[:1]),
        weights=_attention_weights(draw, dim, context_dim, options),
        norm_x=_norm(draw, dim),
        **options,
    )
    if options["pre_norm"]:
        inputs["norm_context"] = _norm(draw, context_dim)
    padding, ignore = _padding(draw, "context_", batch, keys)
    reads_absent = options["missing"] in ("attend", "constant")
    draw.poison(inputs["context"], _unread(reads_absent, ignore, padding.get("context_present")))
    return inputs | padding


def bidirectional_gated_cross_attention(draw: Draw) -> dict:
    options, dim, batch = _attention(draw)
    mean = draw.pick("mean", 0, 0, 1, 3, 10, 30, 100) if options["pre_norm"] else 0
    inputs = dict(to_a=_attention_weights(draw, dim, dim, options), **options)
    shared = draw.rarely("shared weights", 0.2)
    inputs["to_b"] = inputs["to_a"] if shared else _attention_weights(draw, dim, dim, options)
    for side in "ab":
        tokens = draw.pick(f"tokens_{side}", 0, 1, 2, 5, 17, 33)
        x = inputs[side] = draw.normal(batch, tokens, dim, mean=mean, expand=EXPANDED[:1])
        inputs[f"norm_{side}"] = _norm(draw, dim)
        padding, ignore = _padding(draw, f"{side}_", batch, tokens)
        draw.poison(x, ignore)
        inputs |= padding
    return inputs


def pack_passes(draw: Draw) -> dict:
    batch = draw.pick("batch", 0, 1, 3)
    passes = [draw.pick("", "both", "a", "b") for _ in range(draw.pick("passes", 1, 2, 3))]
    return dict(a=draw.normal(batch, 5, 3), b=draw.normal(batch, 2, 7), passes=passes)


def masked_info_nce(draw: Draw) -> dict:
    rows, dim = draw.pick("batch", 1, 2, 3, 5, 16, 17, 33, 40), draw.pick("dim", 1, 2, 8, 17, 33)
    symmetric = draw.pick("symmetric", False, False, True)
    with_target = not symmetric and draw.given("target", 0.4)
    columns = (
        draw.pick("candidates", 1, 5, 37, 70)
        if with_target
        else rows + draw.pick("more", 0, 0, 1, 13, 32)
    )
    # With equal candidates, the gradients of the queries would be rounding errors. So queries and
    # candidates are never expanded, and are normalized only if ``dim`` > 1.
    query, candidate = (
        torch.randn(n, dim, generator=draw.generator, dtype=torch.float64) for n in (rows, columns)
    )
    if dim > 1:
        query, candidate = normalize(query, dim=-1), normalize(candidate, dim=-1)
    query, candidate = (
        draw.place(query.to(draw.dtype), expand=()),
        draw.place(candidate.to(draw.dtype), expand=()),
    )
    inputs = dict(
        query=query,
        candidate=candidate,
        same_id=draw.pick("same_id", "drop", "mean", "sum"),
        symmetric=symmetric,
        positive_weight=draw.pick("positive_weight", 0.0, 0.0, 0.5, 2.0),
        label_smoothing=draw.pick("label_smoothing", 0.0, 0.0, 0.1, 0.7),
        reduction=draw.pick("reduction", "mean", "sum", "none"),
    )
    temperature = draw.pick("temperature", 1.0, 0.2, 0.05, 0.01, 1e-3, 1e-4)
    inputs["temperature"] = temperature
    if draw.given("temperature tensor"):
        dtype = draw.pick("", draw.dtype, draw.wide)
        inputs["temperature"] = draw.place(
            torch.full(draw.pick("", (), (1,)), temperature, dtype=dtype)
        )
    if with_target:
        inputs["target"] = draw.integers(0, columns, rows)
    keys = draw.pick("keys", "none", "none", "both", "candidates")
    if keys != "none":
        high = draw.pick("", 1, 3, 2 * columns)
        inputs["candidate_key"] = draw.integers(draw.pick("", -1, 0), high, columns)
        if keys == "both":
            inputs["query_key"] = draw.integers(0, high, rows)
    ids = draw.pick("ids", "none", "none", "both", "candidates")
    if ids != "none":
        high = draw.pick("", 2, columns // 3 + 1, 3 * columns)
        inputs["candidate_id"] = draw.integers(-high, high, columns)
        if ids == "both":
            inputs["query_id"] = draw.integers(-high, high, rows)
    if draw.given("row_weight", 0.3):
        weight = draw.uniform(rows, dtype=draw.pick("", draw.dtype, draw.wide))
        inputs["row_weight"] = draw.place(weight * draw.flags(draw.pick("", 0.0, 0.7, 1.0), rows))
    valid = _valid_pairs(
        **{
            name: inputs.get(name)
            for name in ("query", "candidate", "target", "same_id", *KEYS_AND_IDS)
        }
    )
    draw.poison(candidate, ~valid.any(0))
    if draw.rarely("margin", 0.15):
        inputs["false_negative_margin"] = draw.pick("", -0.2, 0.0, 0.1, 0.5)
    return inputs


KEYS_AND_IDS = ("query_key", "candidate_key", "query_id", "candidate_id")


def _valid_pairs(
    query, candidate, target, same_id, query_key, candidate_key, query_id, candidate_id
) -> Tensor:
    """Return a mask (B, C) of the pairs that are valid according to the documentation."""
    target = torch.arange(len(query)) if target is None else target
    is_target = target[:, None] == torch.arange(len(candidate))
    valid = torch.ones_like(is_target)
    if candidate_key is not None:
        query_key = candidate_key[target] if query_key is None else query_key
        valid = (query_key[:, None] == candidate_key) | (candidate_key == -1) | is_target
    if candidate_id is not None and same_id == "drop":
        query_id = candidate_id[target] if query_id is None else query_id
        valid = valid & ((query_id[:, None] != candidate_id) | is_target)
    return valid


def _routing_options(draw: Draw, tokens: int, experts: int, k: int) -> dict:
    options = dict(
        score=draw.pick("score", "softmax", "sigmoid"),
        renormalize=draw.pick("renormalize", True, False),
        balance=draw.pick("balance", "switch", "gshard", "mse"),
    )
    usable = torch.ones(tokens, experts, dtype=torch.bool)
    num_segments = draw.pick("num_segments", 1, 1, 2, 3)
    if num_segments > 1 or draw.given("segments", 0.2):
        options |= dict(segments=draw.integers(0, num_segments, tokens), num_segments=num_segments)
    if draw.given("available", 0.3):
        available = torch.rand(num_segments, experts, generator=draw.generator) < 0.6
        available[:, -k:] = True
        available = options["available"] = draw.place(available)
        usable = (
            available[options["segments"]]
            if "segments" in options
            else available[:1].expand(tokens, experts)
        )
        if draw.full:  # callers may change ``segments``, so use experts available in all segments
            usable = available.all(0).expand(tokens, experts)
    if draw.given("selection_bias", 0.3):
        options["selection_bias"] = draw.normal(
            experts, std=draw.pick("", 0.01, 1.0), dtype=draw.wide
        )
    if draw.given("mask", 0.4):
        options["token_padding_mask"] = draw.flags(draw.pick("", 0.3, 1.0), tokens)
    if draw.given("indices", 0.2):  # only available experts
        noise = torch.rand(tokens, experts, generator=draw.generator).masked_fill(~usable, -1)
        options["indices"] = draw.place(noise.argsort(1, descending=True)[:, :k].contiguous())
        if not options.get("available", usable).all() and 0 in options["indices"].stride():
            options["indices"] = noise.argsort(1, descending=True)[:, :k].contiguous()
    if draw.given("jitter", 0.2):
        options["jitter"] = draw.pick("", 0.01, 0.3)
        if draw.given("jitter_seed", 0.8):
            options["jitter_seed"] = draw.seed()
    return options


def _tokens_and_experts(draw: Draw) -> tuple[int, int, int]:
    tokens, experts = (
        draw.pick("tokens", 0, 1, 2, 5, 17, 33, 65),
        draw.pick("experts", 1, 2, 3, 8, 13, 16, 17, 33),
    )
    return tokens, experts, min(experts, draw.pick("k", 1, 2, 3, 5))


def topk_routing(draw: Draw) -> dict:
    tokens, experts, k = _tokens_and_experts(draw)
    logits = draw.normal(tokens, experts, std=draw.pick("std", 0.3, 1.0, 10.0, 1e3, 1e4))
    if draw.rarely("ties", 0.2):
        logits = draw.place(logits.round())
    options = _routing_options(draw, tokens, experts, k)
    if "token_padding_mask" in options:
        draw.poison(logits, options["token_padding_mask"])
    return dict(logits=logits, k=k, **options)


def topk_routing_from_input(draw: Draw) -> dict:
    tokens, experts, k = _tokens_and_experts(draw)
    dim = draw.pick("dim", 1, 2, 8, 17, 33, 65)
    x = draw.normal(tokens, dim)
    router = draw.weight(experts, dim, std=draw.pick("std", 0.3, 1.0, 10.0, 1e3) * dim**-0.5)
    options = _routing_options(draw, tokens, experts, k)
    if "token_padding_mask" in options:
        draw.poison(x, options["token_padding_mask"])
    if draw.given("router_bias"):
        options["router_bias"] = draw.weight(experts)
    return dict(x=x, router_weight=router, k=k, **options)


def routing_from_indices(draw: Draw) -> dict:
    tokens, experts, k = _tokens_and_experts(draw)
    weights = draw.uniform(tokens, k, dtype=draw.pick("", draw.dtype, draw.wide))
    inputs = dict(
        indices=draw.integers(0, experts, tokens, k), weights=weights, num_experts=experts
    )
    if draw.given("mask"):
        mask = inputs["token_padding_mask"] = draw.flags(draw.pick("", 0.3, 1.0), tokens)
        draw.poison(weights, mask)
    return inputs


def update_selection_bias(draw: Draw) -> dict:
    experts = draw.pick("experts", 1, 2, 13)
    shape = draw.pick("segments", (), (1,), (3,))
    # The bias is not expanded, because the function updates the bias in place.
    bias = draw.place(torch.randn(experts, generator=draw.generator, dtype=draw.wide), expand=())
    return dict(
        bias=bias,
        counts=draw.integers(0, 9, *shape, experts),
        rate=draw.pick("rate", 1e-3, 0.5),
        group=None,
    )


def _routing(draw: Draw) -> tuple[dict, Tensor]:
    """Return (routing, token padding mask).

    A kernel or plain PyTorch sorts the rows of the routing.
    """
    tokens, experts, k = _tokens_and_experts(draw)
    indices = torch.randint(0, experts, (tokens, k), generator=draw.generator)
    if draw.rarely("one expert", 0.3):
        indices[:] = experts - 1
    mask = torch.rand(tokens, generator=draw.generator) < draw.pick("", 0.3, 1.0)
    mask = mask if draw.given("mask") else torch.zeros_like(mask)
    weights = torch.rand(tokens, k, generator=draw.generator, dtype=torch.float64).to(draw.wide)
    fused = draw.wide == torch.float32 and draw.pick("sorted by a kernel", True, False)
    with mmfused.backend("fused" if fused else "composed"):
        routing = mmfused.routing_from_indices(
            indices.to(DEVICE), weights.to(DEVICE), experts, token_padding_mask=mask.to(DEVICE)
        )
    return type(routing)(*(draw.place(part.cpu(), expand=()) for part in routing)), mask


def grouped_linear(draw: Draw) -> dict:
    routing, mask = _routing(draw)
    (tokens, k), experts = routing.indices.shape, len(routing.offsets) - 1
    gather, out, width = (
        draw.pick("gather", True, False),
        draw.pick("out", 1, 7, 16, 33),
        draw.pick("dim", 1, 8, 17, 33, 64),
    )
    x = draw.normal(tokens if gather else tokens * k, width)
    draw.poison(x, mask if gather else torch.arange(tokens * k) >= routing.offsets[-1])
    inputs = dict(x=x, routing=routing, weight=draw.weight(experts, out, width, std=width**-0.5))
    if draw.given("bias"):
        inputs["bias"] = draw.weight(experts, out)
    return inputs | dict(gather=gather, combine=draw.pick("combine", True, False))


def grouped_mlp(draw: Draw) -> dict:
    routing, mask = _routing(draw)
    tokens, experts = len(routing.indices), len(routing.offsets) - 1
    dim, hidden, out = (
        draw.pick("dim", 1, 8, 17, 33),
        draw.pick("hidden", 1, 7, 16, 33),
        draw.pick("out", 1, 7, 16, 33),
    )
    activation = draw.pick("activation", "gelu", "relu", "swiglu")
    packed = activation == "swiglu" and draw.pick("packed", True, False)
    x = draw.normal(tokens, dim)
    draw.poison(x, mask)
    inputs = dict(
        x=x,
        routing=routing,
        w_up=draw.weight(experts, 2 * hidden if packed else hidden, dim, std=dim**-0.5),
        w_down=draw.weight(experts, out, hidden, std=hidden**-0.5),
        activation=activation,
    )
    if activation == "swiglu" and not packed:
        inputs["w_gate"] = draw.weight(experts, hidden, dim, std=dim**-0.5)
    for name, width in (("b_up", hidden), ("b_down", out)):
        if draw.given(name):
            inputs[name] = draw.weight(experts, width)
    return inputs


def expert_shares(draw: Draw) -> dict:
    routing, _ = _routing(draw)
    tokens = len(routing.indices)
    divisors = [n for n in range(1, tokens + 1) if tokens % n == 0] or [1]
    return dict(routing=routing, samples=draw.pick("samples", *divisors))


LOSSES = (
    "positive_similarity",
    "hard_negative_margin",
    "product_hinge",
    "product_consistency",
    "sigmoid_contrastive",
)
MAKERS = {
    maker.__name__: maker
    for maker in (
        query_pooling,
        pooling_weights,
        gated_cross_attention,
        bidirectional_gated_cross_attention,
        pack_passes,
        masked_info_nce,
        topk_routing,
        topk_routing_from_input,
        routing_from_indices,
        update_selection_bias,
        grouped_linear,
        grouped_mlp,
        expert_shares,
    )
}
MAKERS |= {name: getattr(small_loss_inputs, name) for name in (*LOSSES, "dual_alignment")}
# An op may define its own MAKERS in tests/<op>_inputs.py.
for op in OPS:
    if importlib.util.find_spec(f"{op}_inputs"):
        MAKERS |= importlib.import_module(f"{op}_inputs").MAKERS
