"""The small losses of the five papers, in plain PyTorch.

They are hinges, consistency, absolute similarity, the sigmoid loss and MOON2.0's dual alignment.
Each takes embeddings as given (only ``positive_similarity`` normalises) and returns a scalar,
float32 or float64. A loss over all pairs is computed a block of rows at a time, and again in
backward: no B x C matrix is stored.
"""

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

BLOCK_PAIRS = 2**22  # pairs at a time: 16 MB of float32


def positive_similarity(query: Tensor, positive: Tensor) -> Tensor:
    """Mean over the rows of ``1 - cos(query_i, positive_i)``, both (B, D).

    UniCA (arXiv 2606.28350), in this library's reading. Together with the contrastive loss:
    ``masked_info_nce(..., positive_weight=...)`` on normalised embeddings.
    """
    op = "positive_similarity"
    query, positive = _floats(op, query=query, positive=positive)
    if query.shape[0] != positive.shape[0]:
        raise ValueError(
            f"{op}: positive: got {positive.shape[0]} rows, expected {query.shape[0]}, as query has"
        )
    return (1 - F.cosine_similarity(query, positive, dim=-1)).mean()


def hard_negative_margin(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    margin: float | Tensor = 0.2,
    fraction: float = 0.5,
) -> Tensor:
    """Hinge over the hardest negatives of each row: mean of ``max(0, margin + S_ij - S_ii)``.

    S = query candidate^T / temperature. query (B, D), candidate (C, D), C >= B; the positive of row
    i is candidate i, and the hardest are the ``floor(fraction * C)`` largest of the others. The
    loss is 0 where there is none. UniECS (arXiv 2508.13843), L_hard of its V2V term, on scaled
    logits.
    """
    op = "hard_negative_margin"
    query, candidate = _floats(op, query=query, candidate=candidate)
    check_temperature(op, temperature, query)
    temperature = valid_or_nan(temperature)
    _check_scalars(op, query, margin=margin)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{op}: fraction: got {fraction}, expected a number from 0 to 1")
    hardest = min(int(fraction * candidate.shape[0]), candidate.shape[0] - 1)
    if hardest == 0:  # a zero with gradients
        return query.new_zeros(()) * query.sum() * candidate.sum()

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
    margin: float | Tensor = 0.3,
    positive: Tensor | None = None,
    diagonal: bool = False,
) -> Tensor:
    """Mean over all pairs of ``max(0, margin_ij + S_ij - p_i)``, S = scale query candidate^T.

    Both embeddings are (B, D). UniECS (arXiv 2508.13843): PPM is the mean of this over its three
    pairs of embeddings, with margin a1 off the diagonal and p_i = S_ii. PDC is the mean of two with
    ``diagonal=True`` (the margin on every pair), S of the whole products, and ``positive`` (B,):
    S_ii of the image's, then of the text's embedding.
    """
    op = "product_hinge"
    query, candidate = _floats(op, query=query, candidate=candidate)
    if query.shape[0] != candidate.shape[0]:
        raise ValueError(
            f"{op}: candidate: got {candidate.shape[0]} rows, expected {query.shape[0]}, "
            "as query has"
        )
    check_tensors(op, query=query, positive=positive)
    _check_scalars(op, query, scale=scale, margin=margin)
    if positive is None:
        positive = (query * candidate).sum(-1) * scale
    elif positive.shape != query.shape[:1] or not positive.is_floating_point():
        raise ValueError(
            f"{op}: positive: got {_described(positive)}, expected floats ({query.shape[0]},)"
        )
    own = positive

    def block(rows: Tensor, at: Tensor) -> Tensor:
        hinge = rows @ candidate.T * scale - own[at, None]
        margins = torch.ones_like(hinge) * margin  # a product: the margin may be learned
        margins = margins if diagonal else margins.scatter(1, at[:, None], 0.0)
        return F.relu(hinge + margins).sum()

    return _by_rows(block, query, candidate.shape[0]) / (query.shape[0] * candidate.shape[0])


def product_consistency(
    product: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor],
    *,
    scale: float | Tensor = 1.0,
    tolerance: float | Tensor = 0.05,
    top: int = 10,
) -> Tensor:
    """Agreement of three similarity matrices on the nearest neighbours of each product.

    PLC of UniECS (arXiv 2508.13843). Each argument is a pair (query (B, D), candidate (B, D)) with
    S = scale query candidate^T. For each row take the ``top`` largest of the product's S (fewer if
    B is smaller); the loss is the mean over them, the rows and the three pairs of matrices of
    ``max(0, (S_a - S_b)^2 - tolerance)``.
    """
    op = "product_consistency"
    if top < 1:
        raise ValueError(f"{op}: top: got {top}, expected at least 1")
    pairs = _checked_pairs(op, product=product, image=image, text=text)
    _check_scalars(op, pairs[0][0], scale=scale, tolerance=tolerance)
    count = pairs[0][0].shape[0]
    top = min(top, count)
    widths = [query.shape[1] for query, _ in pairs]

    def block(rows: Tensor, at: Tensor) -> Tensor:
        similarities = [
            part @ candidate.T * scale
            for part, (_, candidate) in zip(rows.split(widths, 1), pairs, strict=True)
        ]
        nearest = similarities[0].topk(top).indices
        mm, vm, tm = (matrix.gather(1, nearest) for matrix in similarities)
        first, second, third = (
            F.relu((a - b).square() - tolerance).sum() for a, b in ((vm, mm), (tm, mm), (vm, tm))
        )
        return first + second + third

    queries = torch.cat([query for query, _ in pairs], 1)
    return _by_rows(block, queries, 3 * count) / (3 * count * top)


def sigmoid_contrastive(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
) -> Tensor:
    """SigLIP's loss: ``-1/B sum_ij log sigmoid(z_ij (q_i . c_j / temperature + bias))``.

    arXiv 2303.15343. query (B, D), candidate (C, D), C >= B; z is 1 for row i's candidate i and -1
    elsewhere. Both scalars may be tensors with gradients; the defaults are the paper's initial
    values.
    """
    op = "sigmoid_contrastive"
    query, candidate = _floats(op, query=query, candidate=candidate)
    check_temperature(op, temperature, query)
    temperature = valid_or_nan(temperature)
    _check_scalars(op, query, bias=bias)

    def block(rows: Tensor, at: Tensor) -> Tensor:
        logits = rows @ candidate.T / temperature + bias
        own = logits.gather(1, at[:, None])
        return -F.logsigmoid((-logits).scatter(1, at[:, None], own)).sum()

    return _by_rows(block, query, candidate.shape[0]) / query.shape[0]


def expert_shares(routing: Routing, samples: int) -> Tensor:
    """Share of each sample's tokens that went to each of Z experts, by weight: (B, Z).

    MOON2.0's G of a sample, in this library's reading. ``routing`` of B * N tokens, those of a
    sample adjacent; the mean is over the tokens of a sample that are not masked, 0 where all are.
    """
    op = "expert_shares"
    if not isinstance(routing, Routing):
        raise TypeError(f"{op}: routing: got a {type(routing).__name__}, expected a Routing")
    tokens, experts = routing.indices.shape[0], routing.offsets.shape[0] - 1
    if samples < 1 or tokens % samples:
        raise ValueError(
            f"{op}: samples: got {samples}, expected a divisor of the routing's {tokens} tokens"
        )
    weights = routing.weights
    dense = weights.new_zeros(tokens, experts).scatter_add(1, routing.indices, weights)
    routed = routing.position.view(routing.indices.shape)[:, 0] < routing.offsets[-1]
    count = routed.view(samples, -1).sum(1, keepdim=True).clamp(min=1)
    return dense.view(samples, -1, experts).sum(1) / count


def dual_alignment(
    alignment: Tensor,
    shares: Tensor,
    *,
    members: Tensor | None = None,
    detach_routing: bool = False,
    normalise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of M objectives from a learned matrix and the routing, as in MOON2.0.

        p_zm = softmax over m of alignment_zm
        omega_m = mean over b in B_m of sum_z p_zm G_bz
        sparsity = mean over z of -sum_m p_zm log p_zm

    arXiv 2511.12449: an objective weighs more, the more its samples use experts aligned with it.

    Args:
        alignment: (Z, M), the learned matrix; near zero at first, so that all objectives weigh the
            same.
        shares: (B, Z), routing weights G of each sample, see :func:`expert_shares`; their mean
            where there are several layers.
        members: (B, M) bool, which samples an objective has (B_m), default all. An objective
            without any weighs 0.
        detach_routing: no gradient to the router. Otherwise, as in the paper, the router also
            learns to favour experts of easy objectives.
        normalise: scale the weights to this sum: 1, or M for a mean of 1. None, as in the paper: no
            scaling.

    Returns:
        omega (M,) and the sparsity loss, float32 or float64.
    """
    _check_alignment(alignment, shares, members, normalise)
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


# ---- input validation ----------------------------------------------------------------------------


def _check_alignment(
    alignment: Tensor,
    shares: Tensor,
    members: Tensor | None,
    normalise: float | None,
) -> None:
    op = "dual_alignment"
    check_tensors(op, alignment=alignment, shares=shares, members=members)
    for name, tensor in (("alignment", alignment), ("shares", shares)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{op}: {name}: got {_described(tensor)}, expected a matrix of floats")
    if shares.shape[1] != alignment.shape[0]:
        raise ValueError(
            f"{op}: shares: got shape {tuple(shares.shape)}, expected (B, {alignment.shape[0]}), "
            "as alignment has rows"
        )
    shape = (shares.shape[0], alignment.shape[1])
    if members is not None and (members.dtype != torch.bool or members.shape != shape):
        raise ValueError(f"{op}: members: got {_described(members)}, expected bool {shape}")
    if normalise is not None and not normalise > 0:
        raise ValueError(f"{op}: normalise: got {normalise}, expected a positive sum, or None")


def _checked_pairs(op: str, **named: tuple[Tensor, Tensor]) -> list[list[Tensor]]:
    """Return pairs of embeddings in float32 or float64, all of one shape."""
    pairs = [
        _floats(op, **{f"{name}[{i}]": x for i, x in enumerate(pair)})
        for name, pair in named.items()
    ]
    first_name, first = next(iter(named)), pairs[0][0]
    for name, (query, candidate) in zip(named, pairs, strict=True):
        if query.shape != first.shape or candidate.shape != first.shape:
            raise ValueError(
                f"{op}: {name}: got shapes {tuple(query.shape)} and {tuple(candidate.shape)}, "
                f"expected two of {tuple(first.shape)}, as {first_name} has"
            )
    return pairs


def _floats(op: str, **tensors: Tensor) -> list[Tensor]:
    """Return embeddings (rows, dim) in one dtype, float32 or float64.

    ``ValueError`` unless all have the dim of the first, and at least as many rows.
    """
    check_tensors(op, **tensors)
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
            raise ValueError(f"{op}: {name}: got {_described(tensor)}, expected floats (rows, dim)")
    for name, tensor in others:
        if tensor.shape[1] != first.shape[1] or tensor.shape[0] < first.shape[0]:
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tensor.shape)}, expected at least "
                f"{first.shape[0]} rows of {first.shape[1]}, as {first_name} has"
            )
    dtypes = [tensor.dtype for tensor in tensors.values()]
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    return [tensor.to(dtype) for tensor in tensors.values()]


def _check_scalars(op: str, query: Tensor, **scalars: float | Tensor) -> None:
    for name, value in scalars.items():
        if isinstance(value, Tensor):
            check_tensors(op, query=query, **{name: value})
            if value.numel() != 1 or not value.is_floating_point():
                raise ValueError(
                    f"{op}: {name}: got {_described(value)}, expected one floating element"
                )
        elif not isinstance(value, int | float):
            raise TypeError(
                f"{op}: {name}: got {value!r}, expected a number, or a tensor of one element"
            )


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"


# ---- blocks of rows ------------------------------------------------------------------------------


def _by_rows(block: Callable[[Tensor, Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """Sum ``block(rows, their indices)`` over blocks of rows.

    Several blocks are each computed again in backward. All rows are one block in an exported graph,
    which must fit any number of rows, and under torch.func, which supports no checkpoint.
    """
    indices = torch.arange(rows.shape[0], device=rows.device)
    whole = bool(graph_made()) or torch._C._are_functorch_transforms_active()
    step = rows.shape[0] if whole else max(1, BLOCK_PAIRS // width)
    with no_autocast(rows.device.type):
        if whole or step >= rows.shape[0]:
            return block(rows, indices)
        parts = zip(rows.split(step), indices.split(step), strict=True)
        return torch.stack([checkpoint(block, *part, use_reentrant=False) for part in parts]).sum()
