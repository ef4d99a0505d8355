"""The launches that ``mmfused inspect`` compiles. Together they reach every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import masked_info_nce as kernels


@dataclass(frozen=True)
class Case:
    """Sizes and options of one forward and backward."""

    batch: int
    candidates: int
    dim: int
    dtype: str = "bfloat16"
    symmetric: bool = True
    keys: bool = False
    # Other candidates with the row's id: "drop" excludes them, "same" makes them positives.
    ids: Literal["none", "drop", "same"] = "none"
    everything: bool = False  # compute numbers and sums of logits, beside the logsumexp


CASES = {
    "nce": Case(batch=65536, candidates=65536, dim=768),
    "nce narrow": Case(batch=65536, candidates=65536, dim=256),
    "nce keys ids": Case(batch=65536, candidates=65536, dim=768, keys=True, ids="drop"),
    "nce narrow keys": Case(
        batch=16384,
        candidates=16384,
        dim=256,
        dtype="float16",
        keys=True,
        ids="drop",
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
    "nce odd": Case(
        batch=1003,
        candidates=3331,
        dim=300,
        dtype="float16",
        keys=True,
        ids="drop",
    ),
    "nce odd narrow": Case(batch=1003, candidates=3331, dim=100, dtype="float16", keys=True),
    "nce float32": Case(
        batch=4096,
        candidates=4096,
        dim=768,
        dtype="float32",
        keys=True,
        ids="drop",
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
    """Call the launchers on meta tensors with the shapes of this case."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, candidates, dtype = case.batch, case.candidates, getattr(torch, case.dtype)
    has_ids = case.ids != "none"
    masked = case.keys or has_ids
    inputs = dict(
        q=empty(batch, case.dim, dtype=dtype),
        c=empty(candidates, case.dim, dtype=dtype),
        bias=empty(candidates, dtype=torch.float32) if masked else None,
        scale=empty(dtype=torch.float32),
        target=empty(batch),
        q_key=empty(batch) if case.keys else None,
        c_key=empty(candidates) if case.keys else None,
        q_id=empty(batch) if has_ids else None,
        c_id=empty(candidates) if has_ids else None,
        drop=case.ids == "drop",
        everything=case.everything,
    )
    kernels.sweep(**inputs, columns=case.symmetric)
    # Without masks the tiles depend on whether the scale's gradient needs the logits.
    for need_scale in (True,) if masked else (True, False):
        kernels.sweep_backward(
            row=empty(4, batch, dtype=torch.float32),
            column=empty(4, candidates, dtype=torch.float32) if case.symmetric else None,
            **inputs,
            need_dq=True,
            need_dc=True,
            need_scale=need_scale,
        )
