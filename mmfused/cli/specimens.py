"""The launches ``mmfused inspect`` compiles: for each op the cases that reach every kernel and variant, run on meta tensors."""

from __future__ import annotations

import torch

# op -> label -> what the op's runner below takes. Together they reach every kernel and variant.
# query_pooling: rows R, dim D, dtype, norm, padding, per-sample queries, dX wanted
# masked_info_nce: rows B, candidates C, dim D, dtype, symmetric, keys, ids ("none", "drop", "same"), everything
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
}


def _query_pooling_on_meta(rows, dim, dtype, norm, padding, per_sample, need_dx) -> None:
    from mmfused.kernels import query_pooling

    compute = getattr(torch, dtype)

    def empty(*shape, dtype=compute):
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, length = 64, 197
    x, q = empty(batch, length, dim), empty(batch, rows, dim) if per_sample else empty(rows, dim)
    mask = empty(batch, length, dtype=torch.bool) if padding == "padding" else None
    lengths = empty(batch, dtype=torch.int64) if padding == "lengths" else None
    z, *stats = query_pooling.forward(x, q, mask, lengths, 1e-5 if norm else None)
    query_pooling.backward(empty(*z.shape), x, q, z, *stats, mask, lengths, need_dx)


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
    masked_info_nce.sweep_backward(row, column, *args, everything, True, True)


ON_META = {"query_pooling": _query_pooling_on_meta, "masked_info_nce": _masked_info_nce_on_meta}
