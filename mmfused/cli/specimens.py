"""The launches ``mmfused inspect`` compiles: for each op the cases that reach every kernel and variant, run on meta tensors."""

from __future__ import annotations

import torch

# op -> label -> what the op's runner below takes. Together they reach every kernel and variant.
# query_pooling: rows R, dim D, dtype, norm, padding, per-sample queries, dX wanted, dropout (where it is not 0)
# masked_info_nce: rows B, candidates C, dim D, dtype, symmetric, keys, ids ("none", "drop", "same"), everything
# topk_routing: experts E, choices k, dim D (None: from logits), dtype, router dtype, sigmoid, renormalize, balance, everything
# gated_cross_attention: D, heads, context width (None: both directions), dtype, gate, indicator, missing, masks, pre_norm, dropout,
# form (where it is not the default: then forward alone)
# grouped_mlp: tokens T, D, I, experts E, choices k, activation (or None: the linear layer), biases, packed, dtype
SPECIMENS = {
    "query_pooling": {
        "fluid": (32, 768, "bfloat16", False, "none", False, True),
        "fluid frozen": (32, 768, "bfloat16", False, "none", False, False),
        "fluid text": (32, 768, "float16", True, "padding", False, True),
        "fluid code": (256, 768, "bfloat16", False, "padding", True, True),
        "siglip": (12, 768, "bfloat16", True, "lengths", False, True),
        "bottleneck": (2, 768, "bfloat16", False, "none", False, True),
        "tiny": (16, 192, "bfloat16", True, "lengths", False, True),
        "odd": (21, 100, "bfloat16", True, "padding", False, True),
        "wide": (32, 1024, "bfloat16", True, "padding", False, True),
        "widest": (64, 4096, "bfloat16", True, "lengths", False, True),
        "float32": (32, 768, "float32", True, "padding", False, True),
        "fluid drop": (32, 768, "bfloat16", False, "none", False, True, 0.1),
        "code drop": (256, 768, "bfloat16", False, "padding", True, True, 0.1),
        "siglip drop": (12, 768, "float16", True, "lengths", False, True, 0.1),
        "bottleneck drop": (2, 768, "bfloat16", False, "none", False, True, 0.1),
        "wide drop": (32, 1024, "bfloat16", True, "padding", False, True, 0.1),
        "widest drop": (64, 4096, "bfloat16", True, "lengths", False, True, 0.1),
        "odd drop": (21, 100, "float16", True, "padding", False, True, 0.1),
        "float32 drop": (32, 768, "float32", True, "padding", False, True, 0.1),
    },
    "masked_info_nce": {
        "nce": (65536, 65536, 768, "bfloat16", True, False, "none", False),
        "nce narrow": (65536, 65536, 256, "bfloat16", True, False, "none", False),
        "nce keys ids": (65536, 65536, 768, "bfloat16", True, True, "drop", False),
        "nce narrow keys": (16384, 16384, 256, "float16", True, True, "drop", False),
        "nce all": (16384, 16384, 768, "float16", True, True, "same", True),
        "nce narrow all": (16384, 16384, 256, "bfloat16", True, False, "same", True),
        "nce tiny all": (16384, 16384, 128, "float16", True, True, "same", True),
        "nce unite": (4096, 8192, 1536, "bfloat16", False, True, "none", False),
        "nce smooth": (4096, 4096, 64, "bfloat16", False, False, "none", True),
        "nce largest": (262144, 262144, 768, "bfloat16", True, False, "none", False),
        "nce odd": (1003, 3331, 300, "float16", True, True, "drop", False),
        "nce odd narrow": (1003, 3331, 100, "float16", True, True, "none", False),
        "nce float32": (4096, 4096, 768, "float32", True, True, "drop", False),
        "nce float32 all": (4096, 4096, 512, "float32", True, True, "same", True),
    },
    "topk_routing": {
        "route fluid": (16, 2, 768, "bfloat16", "bfloat16", False, True, "mse", False),
        "route exact": (16, 2, 768, "bfloat16", "float32", False, True, "switch", False),
        "route half": (5, 1, 300, "float16", "float32", False, False, "gshard", True),
        "route 64": (64, 8, 2048, "bfloat16", "float32", False, True, "switch", False),
        "route 32 all": (32, 4, 1024, "bfloat16", "float32", True, True, "mse", True),
        "route 64 all": (64, 8, 2048, "float16", "float16", True, True, "gshard", True),
        "route 128": (128, 8, 2048, "bfloat16", "bfloat16", False, True, "switch", False),
        "route 128 exact": (128, 8, 2048, "bfloat16", "float32", True, True, "mse", True),
        "route 128 half": (128, 8, 2048, "float16", "float32", True, True, "mse", True),
        "route 256": (256, 8, 7168, "bfloat16", "float32", True, True, "switch", True),
        "route 512": (512, 8, 4096, "bfloat16", "float32", True, True, "switch", True),
        "route float32": (16, 2, 768, "float32", "float32", False, True, "switch", False),
        "route 128 f32": (128, 8, 2048, "float32", "float32", True, True, "mse", True),
        "logits 5": (5, 2, None, "float32", None, False, True, "switch", False),
        "logits 64": (64, 2, None, "float16", None, False, False, "gshard", True),
        "logits 128": (128, 8, None, "float32", None, False, True, "switch", False),
        "logits 128 all": (128, 8, None, "bfloat16", None, True, True, "mse", True),
        "logits 512": (512, 8, None, "float32", None, False, True, "switch", True),
        "logits 256": (256, 8, None, "float32", None, True, False, "mse", True),
    },
    "grouped_mlp": {
        "moe fluid": (16384, 768, 3072, 16, 2, "gelu", True, False, "bfloat16"),
        "moe fluid 2k": (2048, 768, 3072, 16, 2, "gelu", True, False, "bfloat16"),
        "moe fluid 512": (512, 768, 3072, 16, 2, "gelu", True, False, "bfloat16"),
        "moe fluid 256": (256, 768, 3072, 16, 2, "gelu", True, False, "bfloat16"),
        "moe fluid 64": (64, 768, 3072, 16, 2, "gelu", True, False, "bfloat16"),
        "moe mllm": (8192, 2048, 5504, 4, 1, "swiglu", False, True, "bfloat16"),
        "moe fine": (32768, 2048, 768, 128, 8, "swiglu", True, False, "bfloat16"),
        "moe fine 1k": (1024, 2048, 768, 128, 8, "swiglu", False, True, "float16"),
        "moe fine 512": (512, 2048, 768, 128, 8, "swiglu", False, True, "bfloat16"),
        "moe fine 64": (64, 2048, 768, 128, 8, "swiglu", True, True, "bfloat16"),
        "moe linear": (8192, 1024, 1024, 8, 2, None, True, False, "bfloat16"),
        "moe odd": (1003, 300, 70, 5, 3, "swiglu", True, True, "float16"),
        "moe odd 20": (20, 300, 70, 5, 3, "relu", True, False, "bfloat16"),
        "moe float32": (16384, 768, 3072, 16, 2, "swiglu", True, False, "float32"),
        "moe float32 512": (512, 768, 3072, 16, 2, "gelu", True, False, "float32"),
    },
    "gated_cross_attention": {
        "uniecs": (256, 8, None, "bfloat16", "channel", True, "skip", True, True, 0.1),
        "uniecs eval": (256, 8, None, "bfloat16", "channel", True, "skip", False, True, 0.0),
        "uniecs zeroed": (256, 4, None, "bfloat16", "channel", True, "constant", True, True, 0.0),
        "cross 64": (64, 4, None, "float16", "channel", False, "zero", True, True, 0.1),
        "cross 512": (512, 4, None, "bfloat16", "channel", True, "skip", True, True, 0.1),
        "cross 768": (768, 12, None, "bfloat16", "channel", True, "skip", True, True, 0.1),
        "cross 768 token": (768, 8, None, "bfloat16", "token", True, "zero", True, True, 0.1),
        "cross 1024": (1024, 16, None, "float16", "channel", True, "attend", True, True, 0.0),
        "unica": (256, 8, 768, "bfloat16", "none", True, "skip", True, False, 0.1),
        "one way": (192, 2, 1024, "bfloat16", "token", True, "constant", True, True, 0.0),
        "one way odd": (70, 2, 300, "float16", "channel", True, "skip", True, True, 0.1),
        "cross float32": (256, 8, None, "float32", "channel", True, "skip", True, True, 0.1),
        "cross 768 f32": (768, 6, None, "float32", "channel", True, "skip", True, True, 0.1),
        "unica float32": (1024, 8, 768, "float32", "none", True, "zero", True, False, 0.1),
        "block": (256, 8, None, "bfloat16", "channel", True, "skip", True, True, 0.1, "block"),
        "block eval": (256, 8, None, "float16", "channel", True, "zero", False, True, 0.0, "block"),
        "block zeroed": (256, 4, None, "bfloat16", "channel", True, "constant", True, True, 0.0, "block"),
        "block 64": (64, 4, None, "float16", "channel", False, "zero", True, True, 0.1, "block"),
        "block token": (192, 4, 1024, "float16", "token", True, "attend", True, True, 0.1, "block"),
        "block unica": (256, 8, 768, "bfloat16", "none", True, "skip", True, False, 0.1, "block"),
        "block even": (250, 5, None, "bfloat16", "channel", True, "skip", True, True, 0.1, "block"),
        "block odd": (255, 5, None, "bfloat16", "token", True, "skip", True, True, 0.1, "block"),
        "block float32": (256, 8, None, "float32", "channel", True, "skip", True, True, 0.1, "block"),
    },
}


def _query_pooling_on_meta(rows, dim, dtype, norm, padding, per_sample, need_dx, dropout=0.0) -> None:
    from mmfused.kernels import query_pooling

    compute = getattr(torch, dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, length = 64, 197
    x, q = empty(batch, length, dim), empty(batch, rows, dim) if per_sample else empty(rows, dim)
    mask = empty(batch, length, dtype=torch.bool) if padding == "padding" else None
    lengths = empty(batch, dtype=torch.int64) if padding == "lengths" else None
    drops = (dropout, empty(dtype=torch.int64) if dropout else None)
    z, *stats = query_pooling.forward(x, q, mask, lengths, 1e-5 if norm else None, *drops)
    dksum = empty(*z.shape[:2], dtype=torch.float32) if dropout else None
    query_pooling.backward(empty(*z.shape), dksum, x, q, z, *stats, mask, lengths, need_dx, *drops)


def _masked_info_nce_on_meta(batch, candidates, dim, dtype, symmetric, keys, ids, everything) -> None:
    from mmfused.kernels import masked_info_nce

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    embeddings = empty(batch, dim, dtype=getattr(torch, dtype)), empty(candidates, dim, dtype=getattr(torch, dtype))
    bias = empty(candidates, dtype=torch.float32) if keys or ids != "none" else None
    q_key, c_key = (empty(batch), empty(candidates)) if keys else (None, None)
    q_id, c_id = (empty(batch), empty(candidates)) if ids != "none" else (None, None)
    args = (*embeddings, bias, empty(dtype=torch.float32), empty(batch), q_key, c_key, q_id, c_id, ids == "drop")
    masked_info_nce.sweep(*args, symmetric, everything)
    row, column = empty(4, batch, dtype=torch.float32), empty(4, candidates, dtype=torch.float32) if symmetric else None
    for need_scale in (True, False) if bias is None else (True,):  # the tiles differ where nothing else needs the logits
        masked_info_nce.sweep_backward(row, column, *args, everything, True, True, need_scale)


def _topk_routing_on_meta(experts, k, dim, dtype, router_dtype, sigmoid, renormalize, balance, everything) -> None:
    """``everything``: padding, segments with their own experts, a selection bias, jitter; and a replayed choice made elsewhere."""
    from mmfused.kernels import topk_routing

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, segments = 8192, 3 if everything else 1
    source = empty(tokens, experts if dim is None else dim, dtype=getattr(torch, dtype))
    router = (None, None)
    if dim is not None:
        router = empty(experts, dim, dtype=getattr(torch, router_dtype)), empty(experts, dtype=getattr(torch, router_dtype))
    bias = mask = segment = available = seed = None
    if everything:
        bias, mask, available = empty(experts), empty(tokens, dtype=torch.bool), empty(segments, experts, dtype=torch.bool)
        segment, seed = empty(tokens, dtype=torch.int64), empty(dtype=torch.int64)
    masked, noise = (mask, segment, segments, available, balance), (0.1 if everything else 0.0, seed)

    def forward(given):
        return topk_routing.forward(source, *router, k, sigmoid, renormalize, bias, *masked, given, *noise)

    logits, indices, weights, *_, coefficients = forward(None)
    logits = source if dim is None else logits
    upstream = (empty(tokens, k), empty(), empty(), empty())
    d_logits = topk_routing.backward(*upstream, logits, indices, weights, coefficients, sigmoid, renormalize, *masked, *noise)
    if dim is not None:
        topk_routing.input_backward(d_logits, source, router[0], mask, True, True)
    if everything:
        forward(indices)
        topk_routing.order(indices, mask, experts)


def _grouped_mlp_on_meta(tokens, dim, width, experts, k, activation, biases, packed, dtype) -> None:
    from mmfused.kernels import grouped_mlp

    compute = getattr(torch, dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    def bias(n):
        return empty(experts, n) if biases else None

    rows, integer = tokens * k, torch.int32
    order = (empty(rows, dtype=integer), empty(rows, dtype=integer), empty(experts + 1, dtype=integer))
    order += (empty(rows // 16 + experts, 2, dtype=integer),)
    x, weights, w_down = empty(tokens, dim), empty(tokens, k, dtype=torch.float32), empty(experts, dim, width)
    if activation is None:
        w_up, wants = empty(experts, width, dim), (True, True, True)
        for combine, gather in ((None, True), (weights, True), (None, False), (weights, False)):
            source, d_out = (x if gather else empty(rows, dim)), empty(rows if combine is None else tokens, width)
            args = (source, w_up, bias(width), combine, *order, k, gather)
            grouped_mlp.linear_forward(*args)
            grouped_mlp.linear_backward(d_out, *args, *wants)
        return
    w_up = empty(experts, 2 * width if packed else width, dim)
    w_gate = empty(experts, width, dim) if activation == "swiglu" and not packed else None
    up = (w_up, w_gate, w_down)
    grouped_mlp.mlp_forward(x, *up, bias(width), bias(dim), weights, *order, activation, packed)
    hidden = empty(2 if activation == "swiglu" else 1, rows, width)
    grouped_mlp.mlp_backward(
        empty(tokens, dim), x, hidden, *up, bias(dim), weights, *order, activation, packed, True, True, biases
    )  # fmt: skip


def _gated_cross_attention_on_meta(
    dim, heads, context_dim, dtype, gate, indicator, missing, masks, pre_norm, dropout, form=None
) -> None:  # fmt: skip
    from mmfused.kernels import gated_cross_attention

    compute = getattr(torch, dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, lengths, directions = 64, (197, 64), 2 if context_dim is None else 1
    widths = (dim, context_dim or dim)
    tokens = [empty(batch, length, width) for length, width in zip(lengths, widths, strict=True)]
    norms = [empty(width) for width in widths for _ in range(2)]
    norms[2:] = norms[2:] if pre_norm or directions == 2 else [empty(0)] * 2
    ignores = [empty(batch, length, dtype=torch.bool) if masks else empty(0, dtype=torch.bool) for length in lengths]
    absents = [empty(batch if masks else 0, dtype=torch.bool) for _ in range(2)]
    if directions == 1:
        ignores[0], absents[0] = empty(0, dtype=torch.bool), empty(0, dtype=torch.bool)
    gates = dict(channel=dim, token=1, none=0)[gate]
    gate_width = 2 * dim + (1 if indicator else 0)
    weight = [empty(dim, dim), *[empty(dim, widths[1])] * 2, empty(dim, dim), empty(gates, gate_width) if gates else empty(0)]
    weights = (weight + [empty(dim)] * 4 + [empty(gates)]) * directions
    flags = [empty(batch if indicator else 0, dtype=torch.float32)] * directions
    seed = empty(dtype=torch.int64) if dropout else None
    lists = (tokens, norms, ignores, absents, weights, flags)
    options = (heads, gate, missing, pre_norm, 1e-5, dropout, seed)
    if form is not None:
        with gated_cross_attention.plans.form(form):
            gated_cross_attention.forward(*lists, *options)
        return
    results = gated_cross_attention.forward(*lists, *options)
    d_outs = [empty(*x.shape) for x in tokens[:directions]]
    gated_cross_attention.backward(d_outs, *lists, results[directions:], *options)


ON_META = {
    "query_pooling": _query_pooling_on_meta,
    "masked_info_nce": _masked_info_nce_on_meta,
    "topk_routing": _topk_routing_on_meta,
    "grouped_mlp": _grouped_mlp_on_meta,
    "gated_cross_attention": _gated_cross_attention_on_meta,
}
