"""Small calls that launch every kernel of gated_cross_attention, for ``tools/sanitize.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import mmfused
from mmfused.tools.sanitize_launches import DEVICE, HALF, backward, choose, randn, seed


def launches() -> Iterator[Callable[[], None]]:
    """Cover aligned widths, unaligned widths, widths above 256, and heads wider than 32."""
    yield lambda: attend(24, 3, dropout=0.2)
    yield lambda: attend(20, 2, context=36, gate="token", missing="zero")
    yield lambda: attend(
        24, 3, context=40, gate="none", pre_norm=False, missing="constant", indicator="batch"
    )
    yield lambda: attend(264, 2, lengths=(9, 12), gate="token", missing="attend", dropout=0.2)
    yield lambda: attend(80, 2, lengths=(70, 37), masked=False)


def attend(
    dim: int,
    heads: int,
    *,
    lengths: tuple[int, int] = (9, 37),
    context: int | None = None,
    masked: bool = True,
    dtype: torch.dtype = HALF,
    **options: Any,
) -> None:
    """Call a module forward and backward.

    ``masked``: some samples lack a side. On the second side, all tokens of sample 2 are masked, and
    some tokens of the other samples.

    ``context``: the context width of ``GatedCrossAttention``. None calls
    ``BidirectionalGatedCrossAttention`` instead.
    """
    both, batch = context is None, 4
    kind = mmfused.BidirectionalGatedCrossAttention if both else mmfused.GatedCrossAttention
    if not both:
        options["context_dim"] = context
    module = kind(dim, heads, **options).to(DEVICE, dtype)
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
    outs = module(*sides, dropout_seed=seed(), **(masks if masked else {}))
    backward(outs, *sides, *module.parameters())
