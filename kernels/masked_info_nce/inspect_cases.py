"""The launches that ``mmfused inspect`` compiles: together they reach every kernel and variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import masked_info_nce as kernels


@dataclass(frozen=True)
class Case:
    batch: int
    candidates: int
    dim: int
    dtype: str = "bfloat16"
    symmetric: bool = True
    keys: bool = False
    ids: Literal["none", "drop", "same"] = (
        "none"  # "same": other candidates with the row's id are positives
    )
    everything: bool = False  # smoothing and the positives' own term too


CASES = {
    "nce": Case(batch=65536, candidates=65536, dim=768),
    "nce narrow": Case(batch=65536, candidates=65536, dim=256),
    "nce keys ids": Case(batch=65536, candidates=65536, dim=768, keys=True, ids="drop"),
    "nce narrow keys": Case(
        batch=16384, candidates=16384, dim=256, dtype="float16", keys=True, ids="drop"
    ),
    "nce all": Case(
        batch=16384,
        candidates=16384,
        dim=768,
        dtype="float16",
        keys=True,
        ids="same",
        everything=True,
    ),
    "nce narrow all": Case(batch=16384, candidates=16384, dim=256, ids="same", everything=True),
    "nce tiny all": Case(
        batch=16384,
        candidates=16384,
        dim=128,
        dtype="float16",
        keys=True,
        ids="same",
        everything=True,
    ),
    "nce unite": Case(batch=4096, candidates=8192, dim=1536, symmetric=False, keys=True),
    "nce smooth": Case(batch=4096, candidates=4096, dim=64, symmetric=False, everything=True),
    "nce largest": Case(batch=262144, candidates=262144, dim=768),
    "nce odd": Case(batch=1003, candidates=3331, dim=300, dtype="float16", keys=True, ids="drop"),
    "nce odd narrow": Case(batch=1003, candidates=3331, dim=100, dtype="float16", keys=True),
    "nce float32": Case(
        batch=4096, candidates=4096, dim=768, dtype="float32", keys=True, ids="drop"
    ),
    "nce float32 all": Case(
        batch=4096,
        candidates=4096,
        dim=512,
        dtype="float32",
        keys=True,
        ids="same",
        everything=True,
    ),
}


def launch(case: Case) -> None:
    """Call the launchers on meta tensors of the shapes of this case."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    embeddings = (
        empty(case.batch, case.dim, dtype=getattr(torch, case.dtype)),
        empty(case.candidates, case.dim, dtype=getattr(torch, case.dtype)),
    )
    bias = empty(case.candidates, dtype=torch.float32) if case.keys or case.ids != "none" else None
    q_key, c_key = (empty(case.batch), empty(case.candidates)) if case.keys else (None, None)
    q_id, c_id = (empty(case.batch), empty(case.candidates)) if case.ids != "none" else (None, None)
    args = (
        *embeddings,
        bias,
        empty(dtype=torch.float32),
        empty(case.batch),
        q_key,
        c_key,
        q_id,
        c_id,
        case.ids == "drop",
    )
    kernels.sweep(*args, case.symmetric, case.everything)
    row, column = (
        empty(4, case.batch, dtype=torch.float32),
        empty(4, case.candidates, dtype=torch.float32) if case.symmetric else None,
    )
    for need_scale in (
        (True, False) if bias is None else (True,)
    ):  # the tiles differ where nothing else needs the logits
        kernels.sweep_backward(row, column, *args, case.everything, True, True, need_scale)
