"""The small losses of the five papers: hinges, consistency, absolute similarity, the sigmoid loss,
MOON2.0's dual alignment.

Each takes embeddings as they are (only ``positive_similarity`` normalises) and gives a scalar,
float32 or float64. Where a loss looks at all pairs it does so a block of rows at a time and
computes the block again in backward: no B x C matrix stays alive."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .library import check_tensors, graph_made, no_autocast
from .ops._common import check_temperature, valid_or_nan
from .ops._common import unit_rows as unit_rows
from .ops.topk_routing import Routing

BLOCK_PAIRS = 2**22  # pairs alive at a time: 16 MB of float32


def positive_similarity(query: Tensor, positive: Tensor) -> Tensor:
    """Mean over the rows of ``1 - cos(query_i, positive_i)``, both (B, D): UniCA (arXiv
    2606.28350), this library's reading.

    In one sweep with the contrastive loss: ``masked_info_nce(..., positive_weight=...)`` on
    normalised embeddings."""
    query, positive = _floats("positive_similarity", query=query, positive=positive)
    if query.shape[0] != positive.shape[0]:
        raise ValueError(
            f"positive_similarity: positive: got {positive.shape[0]} rows, expected {query.shape[0]}, as query has"
        )
    return (1 - F.cosine_similarity(query, positive, dim=-1)).mean()


def hard_negative_margin(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    margin: float = 0.2,
    fraction: float = 0.5,
) -> Tensor:
    """Hinge over each row's hardest negatives: mean of ``max(0, margin + S_ij - S_ii)``, S = query
    candidate^T / temperature.

    query (B, D), candidate (C, D), C >= B, row i's positive is candidate i; the hardest are the
    ``floor(fraction * C)`` largest of the others. 0 where there is none. UniECS (arXiv 2508.13843),
    L_hard of its V2V term, on scaled logits."""
    query, candidate = _floats("hard_negative_margin", query=query, candidate=candidate)
    check_temperature("hard_negative_margin", temperature, query)
    temperature = valid_or_nan(temperature)
    _check_scalars("hard_negative_margin", query, margin=margin)
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"hard_negative_margin: fraction: got {fraction}, expected a number from 0 to 1"
        )
    hardest = min(int(fraction * candidate.shape[0]), candidate.shape[0] - 1)
    if hardest == 0:
        return query.new_zeros(()) * query.sum() * candidate.sum()  # a zero that backward can pass

    def block(rows: Tensor, at: Tensor) -> Tensor:
        logits = rows @ candidate.T / temperature
        own = logits.gather(1, at[:, None])
        others = logits.scatter(1, at[:, None], float("-inf"))
        return F.relu(margin + others.topk(hardest).values - own).sum()

    return _by_rows(block, query, candidate.shape[0]) / (query.shape[0] * hardest)


def product_hinge(
    query: Tensor,
    candidate: Tensor,
    *,
    scale: float | Tensor = 1.0,
    margin: float = 0.3,
    positive: Tensor | None = None,
    diagonal: bool = False,
) -> Tensor:
    """Mean over all pairs of ``max(0, margin_ij + S_ij - p_i)``, S = scale query candidate^T, both
    (B, D).

    PPM of UniECS (arXiv 2508.13843) is the mean of this over its three pairs of embeddings, with
    margin a1 off the diagonal and p_i the own diagonal S_ii. PDC is the mean of two with
    ``diagonal=True`` (the margin on every pair), S of the whole products, and ``positive`` (B,):
    S_ii of the image's, then of the text's embedding."""
    query, candidate = _floats("product_hinge", query=query, candidate=candidate)
    if query.shape[0] != candidate.shape[0]:
        raise ValueError(
            f"product_hinge: candidate: got {candidate.shape[0]} rows, expected {query.shape[0]}, as query has"
        )
    check_tensors("product_hinge", query=query, positive=positive)
    _check_scalars("product_hinge", query, scale=scale, margin=margin)
    if positive is not None and (
        positive.shape != query.shape[:1] or not positive.is_floating_point()
    ):
        raise ValueError(
            f"product_hinge: positive: got shape {tuple(positive.shape)} and dtype {positive.dtype}, expected floats "
            f"({query.shape[0]},)."
        )
    if positive is None:
        positive = (query * candidate).sum(-1) * scale

    def block(rows: Tensor, at: Tensor) -> Tensor:
        hinge = rows @ candidate.T * scale - positive[at, None]
        away = torch.ones_like(hinge) * margin  # which may be learned
        return F.relu(hinge + (away if diagonal else away.scatter(1, at[:, None], 0.0))).sum()

    return _by_rows(block, query, candidate.shape[0]) / (query.shape[0] * candidate.shape[0])


def product_consistency(
    product: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor],
    *,
    scale: float | Tensor = 1.0,
    tolerance: float = 0.05,
    top: int = 10,
) -> Tensor:
    """PLC of UniECS (arXiv 2508.13843): three similarity matrices agree on each product's nearest
    ones.

    Each argument is a pair (query (B, D), candidate (B, D)) with S = scale query candidate^T. For
    each row the ``top`` largest of the product's S (fewer if B is smaller): mean over them, the
    rows and the three pairs of matrices of ``max(0, (S_a - S_b)^2 - tolerance)``."""
    if top < 1:
        raise ValueError(f"product_consistency: top: got {top}, expected at least 1")
    named = {"product": product, "image": image, "text": text}
    pairs = [
        _floats("product_consistency", **{f"{name}[{i}]": x for i, x in enumerate(pair)})
        for name, pair in named.items()
    ]
    for name, (query, candidate) in zip(named, pairs, strict=True):
        if query.shape != pairs[0][0].shape or candidate.shape != pairs[0][0].shape:
            raise ValueError(
                f"product_consistency: {name}: got shapes {tuple(query.shape)} and {tuple(candidate.shape)}, expected two of "
                f"{tuple(pairs[0][0].shape)}, as product has."
            )
    _check_scalars("product_consistency", pairs[0][0], scale=scale, tolerance=tolerance)
    count = pairs[0][0].shape[0]
    top = min(top, count)
    widths = [query.shape[1] for query, _ in pairs]

    def block(rows: Tensor, at: Tensor) -> Tensor:
        mm, vm, tm = (
            part @ candidate.T * scale
            for part, (_, candidate) in zip(rows.split(widths, 1), pairs, strict=True)
        )
        nearest = mm.topk(top).indices
        mm, vm, tm = (matrix.gather(1, nearest) for matrix in (mm, vm, tm))
        return sum(
            F.relu((a - b).square() - tolerance).sum() for a, b in ((vm, mm), (tm, mm), (vm, tm))
        )

    return _by_rows(block, torch.cat([query for query, _ in pairs], 1), 3 * count) / (
        3 * count * top
    )


def sigmoid_contrastive(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343): ``-1/B sum_ij log sigmoid(z_ij (q_i . c_j / temperature +
    bias))``.

    query (B, D), candidate (C, D), C >= B; z is 1 for row i's candidate i and -1 elsewhere. Both
    scalars may be tensors with gradients; the defaults are the paper's initial values."""
    query, candidate = _floats("sigmoid_contrastive", query=query, candidate=candidate)
    check_temperature("sigmoid_contrastive", temperature, query)
    temperature = valid_or_nan(temperature)
    _check_scalars("sigmoid_contrastive", query, bias=bias)

    def block(rows: Tensor, at: Tensor) -> Tensor:
        logits = rows @ candidate.T / temperature + bias
        own = logits.gather(1, at[:, None])
        return -F.logsigmoid((-logits).scatter(1, at[:, None], own)).sum()

    return _by_rows(block, query, candidate.shape[0]) / query.shape[0]


def expert_shares(routing: Routing, samples: int) -> Tensor:
    """(B, Z): what share of each sample's tokens went to each of Z experts, by weight: MOON2.0's G
    of a sample, as read here.

    ``routing`` of B * N tokens, a sample's side by side; the mean is over a sample's tokens that
    are not masked, 0 where all are."""
    if not isinstance(routing, Routing):
        raise TypeError(
            f"expert_shares: routing: got a {type(routing).__name__}, expected a Routing"
        )
    tokens, experts = routing.indices.shape[0], routing.offsets.shape[0] - 1
    if samples < 1 or tokens % samples:
        raise ValueError(
            f"expert_shares: samples: got {samples}, expected a divisor of the routing's {tokens} tokens"
        )
    dense = routing.weights.new_zeros(tokens, experts).scatter_add(
        1, routing.indices, routing.weights
    )
    live = routing.position.view(routing.indices.shape)[:, 0] < routing.offsets[-1]
    count = live.view(samples, -1).sum(1, keepdim=True).clamp(min=1)
    return dense.view(samples, -1, experts).sum(1) / count


def dual_alignment(
    alignment: Tensor,
    shares: Tensor,
    *,
    members: Tensor | None = None,
    detach_routing: bool = False,
    normalise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """MOON2.0 (arXiv 2511.12449): weights of M objectives from what the experts that serve them are
    aligned with, and how sharply.

        p_zm = softmax over m of alignment_zm      omega_m = mean over b in B_m of sum_z p_zm G_bz
        sparsity = mean over z of -sum_m p_zm log p_zm

    Args: alignment: (Z, M), the learned matrix; near zero at first, so that all objectives weigh
        the same. shares: (B, Z), routing weights of each sample, see :func:`expert_shares`; of
        several layers, their mean. members: (B, M) bool, which samples an objective has (B_m),
        default all; an objective without any weighs 0. detach_routing: no gradient to the router,
        which otherwise learns to favour experts of easy objectives, as the paper has it. normalise:
        scale the weights to this sum: 1, or M for a mean of 1. None: as they are, the paper's.

    Returns: omega (M,) and the sparsity loss, float32 or float64.
    """
    op = "dual_alignment"
    check_tensors(op, alignment=alignment, shares=shares, members=members)
    for name, tensor in (("alignment", alignment), ("shares", shares)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected a matrix of floats"
            )
    if shares.shape[1] != alignment.shape[0]:
        raise ValueError(
            f"{op}: shares: got shape {tuple(shares.shape)}, expected (B, {alignment.shape[0]}), as alignment has rows"
        )
    if members is not None and (
        members.dtype != torch.bool or members.shape != (shares.shape[0], alignment.shape[1])
    ):
        raise ValueError(
            f"{op}: members: got shape {tuple(members.shape)} and dtype {members.dtype}, expected bool "
            f"{(shares.shape[0], alignment.shape[1])}."
        )
    if normalise is not None and not normalise > 0:
        raise ValueError(f"{op}: normalise: got {normalise}, expected a positive sum, or None")
    dtype = reduce(torch.promote_types, (alignment.dtype, shares.dtype), torch.float32)
    shares = shares.detach() if detach_routing else shares
    with no_autocast(alignment.device.type):
        log_p = alignment.to(dtype).log_softmax(1)
        aligned = shares.to(dtype) @ log_p.exp()  # (B, M)
        if members is None:
            members = torch.ones_like(aligned, dtype=torch.bool)
        omega = (aligned * members).sum(0) / members.sum(0).clamp(min=1)
        if normalise is not None:
            total = omega.sum()
            omega = normalise * omega / total.masked_fill(total == 0, 1.0)
        return omega, -(log_p.exp() * log_p).sum(1).mean()


def _floats(op: str, **tensors: Tensor) -> list[Tensor]:
    """The embeddings in one dtype, float32 at least; ValueError unless (rows, dim) of one dim, with
    a candidate for every row.
    """
    check_tensors(op, **tensors)
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected floats (rows, dim)"
            )
    for name, tensor in others:
        if tensor.shape[1] != first.shape[1] or tensor.shape[0] < first.shape[0]:
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tensor.shape)}, expected at least {first.shape[0]} rows of {first.shape[1]}, "
                f"as {first_name} has."
            )
    dtype = reduce(
        torch.promote_types, (tensor.dtype for tensor in tensors.values()), torch.float32
    )
    return [tensor.to(dtype) for tensor in tensors.values()]


def _check_scalars(op: str, query: Tensor, **scalars: float | Tensor) -> None:
    for name, value in scalars.items():
        if isinstance(value, Tensor):
            check_tensors(op, query=query, **{name: value})
            if value.numel() != 1 or not value.is_floating_point():
                raise ValueError(
                    f"{op}: {name}: got shape {tuple(value.shape)} and dtype {value.dtype}, expected one floating element"
                )
        elif not isinstance(value, int | float):
            raise TypeError(
                f"{op}: {name}: got {value!r}, expected a number, or a tensor of one element"
            )


def _by_rows(block: Callable[[Tensor, Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """Sum of ``block(rows, their indices)`` over blocks of rows, each computed again in backward
    where there are several; all at once in a graph for any number of rows, and under torch.func,
    which takes no checkpoint."""
    indices = torch.arange(rows.shape[0], device=rows.device)
    whole = bool(graph_made()) or torch._C._are_functorch_transforms_active()
    step = rows.shape[0] if whole else max(1, BLOCK_PAIRS // width)
    with no_autocast(rows.device.type):
        if whole or step >= rows.shape[0]:
            return block(rows, indices)
        parts = zip(rows.split(step), indices.split(step), strict=True)
        return torch.stack([checkpoint(block, *part, use_reentrant=False) for part in parts]).sum()
