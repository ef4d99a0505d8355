"""Every public module, with the options that matter for torch.func, torch.export and ONNX.

A case is a name, a module and a function ``make(batch, tokens)`` that returns the positional and
keyword arguments of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import mmfused

D = 8
AVAILABLE = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def some(*shape: int) -> Tensor:
    """Return random flags. In a matrix, the first row is all True."""
    flags = torch.rand(shape) < 0.5
    if len(shape) == 2:
        flags[0] = True
    return flags


def lengths(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, tokens + 1, (batch,))


def contrastive_options(batch: int) -> dict[str, Tensor]:
    return dict(
        query_key=torch.randint(0, 2, (batch,)),
        candidate_key=torch.randint(-1, 2, (batch,)),
        target=torch.randint(0, batch, (batch,)),
        row_weight=torch.rand(batch).double(),
    )


def cases() -> Iterator[tuple[str, nn.Module, Callable[[int, int], tuple[tuple, dict]]]]:
    pool, gated, both = (
        mmfused.QueryPooling,
        mmfused.GatedCrossAttention,
        mmfused.BidirectionalGatedCrossAttention,
    )
    moe, nce = mmfused.TopKMoE, mmfused.MaskedInfoNCE
    yield "pool", pool(D, 3), lambda b, n: ((floats(b, n, D),), {})
    yield (
        "pool bias mask",
        pool(D, 3, 2, bias=True, q_proj=True, out_proj=True, norm_kv=True),
        lambda b, n: ((floats(b, n, D), some(b, n)), {}),
    )
    yield (
        "pool lengths",
        pool(D, 3, bias=True, out_proj=True),
        lambda b, n: ((floats(b, n, D),), dict(lengths=lengths(b, n))),
    )
    yield (
        "pool dropout",
        pool(D, 3, 2, bias=True, dropout=0.3),
        lambda b, n: ((floats(b, n, D),), dict(dropout_seed=torch.tensor(4))),
    )
    yield (
        "transform",
        mmfused.QTransform(D, 3, 2, 2),
        lambda b, n: ((floats(b, n, D), some(b, n)), {}),
    )
    yield (
        "gated",
        gated(D, 2),
        lambda b, n: ((floats(b, n, D), floats(b, n + 1, D)), dict(context_present=some(b))),
    )
    yield (
        "gated constant",
        gated(D, 2, missing="constant", gate="token"),
        lambda b, n: (
            (floats(b, n, D), floats(b, n + 1, D)),
            dict(context_lengths=lengths(b, n), context_present=some(b)),
        ),
    )
    yield (
        "gated post-norm",
        gated(D, 2, gate="none", pre_norm=False, missing="zero"),
        lambda b, n: ((floats(b, n, D), floats(b, n + 1, D)), dict(context_present=some(b))),
    )
    yield (
        "both directions",
        both(D, 2, indicator="batch"),
        lambda b, n: (
            (floats(b, n, D), floats(b, n + 1, D)),
            dict(a_key_padding_mask=some(b, n), b_present=some(b)),
        ),
    )
    yield "token gate", mmfused.TokenGate(D), lambda b, n: ((floats(b, n, D), floats(b, n, D)), {})
    yield "experts", moe(D, 12, 4, 2), lambda b, n: ((floats(b, n, D),), {})
    yield (
        "experts swiglu",
        moe(D, 12, 4, 2, activation="swiglu", num_segments=2, available=AVAILABLE, balance="mse"),
        lambda b, n: (
            (floats(b, n, D),),
            dict(token_padding_mask=some(b, n), segments=torch.randint(0, 2, (b, n))),
        ),
    )
    yield (
        "experts sigmoid",
        moe(
            D,
            12,
            4,
            1,
            activation="relu",
            score="sigmoid",
            selection_bias=True,
            balance="gshard",
            bias=False,
        ),
        lambda b, n: ((floats(b, n, D),), dict(token_padding_mask=some(b, n))),
    )
    yield "contrastive", nce(), lambda b, n: ((floats(b, D), floats(b, D)), {})
    yield (
        "contrastive symmetric",
        nce(learnable_temperature=True, symmetric=True, label_smoothing=0.1, positive_weight=0.3),
        lambda b, n: (
            (floats(b, D), floats(b + 2, D)),
            dict(candidate_id=torch.randint(0, 5, (b + 2,))),
        ),
    )
    yield (
        "contrastive keys",
        nce(same_id="mean", false_negative_margin=0.1),
        lambda b, n: ((floats(b, D), floats(b, D)), contrastive_options(b)),
    )


NAMES = [name for name, *_ in cases()]


def case(name: str) -> tuple[nn.Module, Callable[[int, int], tuple[tuple, dict]]]:
    module, make = next((module, make) for key, module, make in cases() if key == name)
    return module.double(), make


def outputs(out) -> list[Tensor]:
    """Return a list of the differentiable outputs of a module."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out[1], mmfused.Routing):
        return [out[0], out[1].balance_loss, out[1].z_loss, out[1].entropy]
    return list(out)


def total(out) -> Tensor:
    return sum(part.square().sum() for part in outputs(out))
