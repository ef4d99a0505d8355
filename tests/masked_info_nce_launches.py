"""Small calls that launch every kernel of masked_info_nce, for ``tools/sanitize.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import mmfused
from mmfused.tools.patching import replaced_plan
from mmfused.tools.sanitize_launches import DEVICE, FLOAT, HALF, backward, integers, randn


def launches() -> Iterator[Callable[[], None]]:
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
    """Call the loss with scratch limits of one byte, which a very large batch would also reach."""

    def change(plan, *_):
        return replace(plan, partial_bytes=1, chunk_bytes=1)

    with replaced_plan("masked_info_nce", change):
        contrast(*shape, **options)


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
    """Call the loss forward and backward.

    With ``keys``, the embedding of the last candidate is NaN, and no row has the key of this
    candidate.
    """
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
