"""Test cases for the C++ router.

This file makes inputs, and computes the expected results with plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfused.ops.topk_routing import topk_routing_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BALANCES = ("switch", "gshard", "mse")

# The cases cover every number of lanes per token, every number of experts per lane, both scores and
# every balance loss.
CASES = {
    "one expert": dict(tokens=3, experts=1, k=1),
    "all experts": dict(tokens=33, experts=8, k=8, sigmoid=True),
    "first choice": dict(tokens=45, experts=5, k=1),
    "plain": dict(tokens=70, experts=16, k=2),
    "raw weights": dict(tokens=33, experts=13, k=3, renormalize=False),
    "raw sigmoid": dict(
        tokens=33, experts=7, k=3, renormalize=False, sigmoid=True, balance="gshard"
    ),
    "masked": dict(tokens=41, experts=13, k=3, masked=True, balance="mse"),
    "all masked": dict(tokens=9, experts=6, k=2, masked="all"),
    "no tokens": dict(tokens=0, experts=6, k=2, segments=2),
    "segments": dict(tokens=50, experts=20, k=4, segments=4, masked=True, sigmoid=True),
    "available": dict(tokens=37, experts=40, k=6, segments=3, available=True, balance="gshard"),
    "biased": dict(tokens=21, experts=70, k=6, biased=True, sigmoid=True, balance="mse"),
    "jitter": dict(tokens=30, experts=100, k=8, jitter=0.3, masked=True),
    "replay": dict(tokens=29, experts=24, k=5, replay=True, segments=2, balance="mse"),
    "many": dict(tokens=11, experts=200, k=8, biased=True, available=True, segments=2, jitter=0.01),
    "most": dict(tokens=9, experts=512, k=32, sigmoid=True, masked=True, balance="gshard"),
    "wide segments": dict(tokens=40, experts=130, k=3, segments=31, balance="gshard"),
}


def make(
    tokens,
    experts,
    k,
    *,
    sigmoid=False,
    renormalize=True,
    balance="switch",
    masked=False,
    segments=1,
    available=False,
    biased=False,
    jitter=0.0,
    replay=False,
    dtype=torch.float32,
    strided=False,
) -> dict:
    """Return the arguments of the op by name.

    The logits of masked tokens are NaN. With several segments, the last segment is empty.
    """
    logits = (
        torch.randn(experts, tokens).to(dtype).T
        if strided
        else torch.randn(tokens, experts).to(dtype)
    )
    mask = None
    if masked:
        mask = torch.ones(tokens, dtype=torch.bool) if masked == "all" else torch.rand(tokens) < 0.3
        logits[mask] = float("nan")
    usable = None
    if available:
        usable = torch.rand(segments, experts).argsort(1) < max(k + 1, experts // 2)
    segment = torch.randint(0, max(1, segments - 1), (tokens,)) if segments > 1 else None
    indices = None
    if replay:
        priority = (
            torch.rand(tokens, experts)
            if usable is None
            else torch.rand(tokens, experts) * usable[segment]
        )
        indices = priority.topk(k).indices
    return dict(
        source=logits,
        router_weight=None,
        router_bias=None,
        k=k,
        sigmoid=sigmoid,
        renormalize=renormalize and (k > 1 or sigmoid),
        selection_bias=torch.randn(experts) * 0.3 if biased else None,
        mask=mask,
        segments=segment,
        num_segments=segments,
        available=usable,
        balance=balance,
        indices=indices,
        jitter=jitter,
        jitter_seed=torch.tensor(0x123456789ABCDEF) if jitter else None,
    )


def upstream(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the upstream gradients of the weights, balance loss, z-loss and entropy."""
    return torch.randn(len(case["source"]), case["k"]), *torch.randn(3).unbind(0)


def expected(case: dict, dtype: torch.dtype, gradients=None) -> dict[str, Tensor]:
    """Compute a case with plain PyTorch in ``dtype``.

    Return every output of the op except ``coefficients``. With upstream ``gradients``, also return
    the gradient of the logits.
    """
    logits = case["source"].to(dtype, copy=True).requires_grad_(gradients is not None)
    with torch.enable_grad():
        routing = topk_routing_reference(
            logits,
            case["k"],
            score="sigmoid" if case["sigmoid"] else "softmax",
            renormalize=case["renormalize"],
            selection_bias=case["selection_bias"],
            token_padding_mask=case["mask"],
            segments=case["segments"],
            num_segments=case["num_segments"],
            available=case["available"],
            balance=case["balance"],
            indices=case["indices"],
            jitter=case["jitter"],
            jitter_seed=case["jitter_seed"],
        )
        losses = torch.stack([routing.balance_loss, routing.z_loss, routing.entropy])
        out = {
            name: getattr(routing, name).detach()
            for name in ("indices", "weights", "counts", "order", "position", "offsets")
        }
        out |= {
            "losses": losses.detach(),
            "tiles": tiles_of(routing.offsets, case["source"].shape[1], routing.order.numel()),
        }
        if gradients is not None:
            d_weights, *d_losses = (g.to(dtype) for g in gradients)
            (
                (routing.weights * d_weights).sum() + (losses * torch.stack(d_losses)).sum()
            ).backward()
            out["d_logits"] = logits.grad
    return out


def tiles_of(offsets: Tensor, experts: int, rows: int) -> Tensor:
    height = max(h for h in (16, 32, 64, 128) if h == 16 or h * experts <= rows)
    bounds = offsets.tolist()
    tiles = [(e, row) for e in range(experts) for row in range(bounds[e], bounds[e + 1], height)]
    return torch.tensor(tiles + [(-1, 0)] * (rows // 16 + experts - len(tiles)), dtype=torch.int32)
