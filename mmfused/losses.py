"""Small losses in plain PyTorch.

Only ``positive_similarity`` normalises its embeddings. The losses are float32 or float64 scalars.
Losses that compare all pairs of rows are computed for a block of rows at a time. If there are
several blocks, they are recomputed in backward, so only one block's pairs are stored at a time.
``dual_alignment`` and ``expert_shares`` compute the weights of MOON2.0's objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .library import active_exporter, check_tensors, no_autocast
from .ops._common import check_temperature, valid_or_nan
from .ops._common import unit_rows as unit_rows
from .ops.topk_routing import Routing

BLOCK_PAIRS = 2**22  # number of pairs per block, which take 16 MB in float32


def positive_similarity(query: Tensor, positive: Tensor) -> Tensor:
    """Return the mean over rows of ``1 - cos(query_i, positive_i)``.

    This is a loss of UniCA (arXiv 2606.28350), as this library interprets the paper. With
    normalised embeddings, ``masked_info_nce(..., positive_weight=...)`` computes the sum of the
    contrastive loss and ``positive_weight`` times this loss.

    Args:
        query: (B, D).
        positive: (B, D), the positive of each query.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> positive = torch.tensor([[3.0, 0.0], [1.0, 0.0]])  # parallel, perpendicular
        >>> mmfused.losses.positive_similarity(query, positive)
        tensor(0.5000)
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
    """Return the mean of ``max(0, margin + S_ij - S_ii)`` over rows i and their hard negatives j.

    This is L_hard in the V2V term of UniECS (arXiv 2508.13843), on logits S = query candidate^T /
    temperature. The positive of row i is candidate i. The hard negatives are the other candidates
    with the largest logits. Their number is ``min(floor(fraction * C), C - 1)``; if it is 0, the
    loss is 0.

    Args:
        query: (B, D).
        candidate: (C, D), C >= B.
        temperature: divisor of the logits, a number or a tensor of one element.
        margin: a number or a tensor of one element.
        fraction: fraction of the candidates that count as hard negatives, from 0 to 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> query, candidate = torch.eye(2), torch.tensor([[1.0, 0.9], [0.0, 1.0]])
        >>> logits = query @ candidate.T
        >>> logits
        tensor([[1.0000, 0.0000],
                [0.9000, 1.0000]])
        >>> # With one hard negative a row, only the second row is within the margin.
        >>> loss = mmfused.losses.hard_negative_margin(query, candidate, margin=0.2)
        >>> torch.allclose(loss, torch.tensor((0.0 + 0.2 + 0.9 - 1.0) / 2))
        True
    """
    op = "hard_negative_margin"
    query, candidate = _floats(op, query=query, candidate=candidate)
    check_temperature(op, temperature, query)
    temperature = valid_or_nan(temperature)
    _check_scalars(op, query, margin=margin)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{op}: fraction: got {fraction}, expected a number from 0 to 1")
    hardest = min(int(fraction * candidate.shape[0]), candidate.shape[0] - 1)
    if hardest == 0:  # return a zero that has gradients
        return query.new_zeros(()) * query.sum() * candidate.sum()

    def block(rows: Tensor, at: Tensor) -> Tensor:
        logits = rows @ candidate.T / temperature
        positive = logits.gather(1, at[:, None])
        others = logits.scatter(1, at[:, None], float("-inf"))
        return F.relu(margin + others.topk(hardest).values - positive).sum()

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
    """Return the mean over all pairs of ``max(0, margin_ij + S_ij - p_i)``.

    S = scale query candidate^T, and p_i is the score of row i's positive. margin_ij is ``margin``
    if i and j differ. If i = j, margin_ij is ``margin`` with ``diagonal``, and 0 without.

    Two losses of UniECS (arXiv 2508.13843) are means of this hinge. PPM is the mean over its three
    pairs of embeddings. PDC is the mean of two hinges with ``diagonal=True`` and S of the product
    embeddings. In the first hinge, ``positive`` is S_ii of the image embeddings, in the second S_ii
    of the text embeddings.

    Args:
        query: (B, D).
        candidate: (B, D).
        scale: factor of the logits, a number or a tensor of one element.
        margin: a number or a tensor of one element.
        positive: (B,) scores p_i; None takes S_ii.
        diagonal: whether the pairs with i = j have the margin.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> query, candidate = torch.randn(4, 8), torch.randn(4, 8)
        >>> loss = mmfused.losses.product_hinge(query, candidate, margin=0.3)
        >>> s = query @ candidate.T
        >>> margin = 0.3 * (1 - torch.eye(4))
        >>> torch.allclose(loss, (margin + s - s.diagonal()[:, None]).relu().mean(), atol=1e-5)
        True
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
    p = positive

    def block(rows: Tensor, at: Tensor) -> Tensor:
        hinge = rows @ candidate.T * scale - p[at, None]
        margins = torch.ones_like(hinge) * margin  # a product, because margin may have a gradient
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
    """Return a loss that makes three similarity matrices agree on each product's neighbours.

    This is PLC of UniECS (arXiv 2508.13843). ``product``, ``image`` and ``text`` each give a matrix
    S = scale query candidate^T. For each row, the ``top`` largest values of the product's S select
    the columns. The loss is the mean of ``max(0, (S_a - S_b)^2 - tolerance)`` over these columns,
    the rows, and the three pairs (a, b) of matrices.

    Args:
        product: query and candidate embeddings of the products, (B, D) each.
        image: query and candidate embeddings of the images, (B, D) each.
        text: query and candidate embeddings of the texts, (B, D) each.
        scale: factor of the similarities, a number or a tensor of one element.
        tolerance: a number or a tensor of one element.
        top: number of columns per row; at most B are used.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> pair = torch.randn(4, 8), torch.randn(4, 8)
        >>> mmfused.losses.product_consistency(pair, pair, pair)  # three equal matrices
        tensor(0.)
        >>> opposite = -pair[0], pair[1]
        >>> loss = mmfused.losses.product_consistency(pair, pair, opposite, tolerance=0.0)
        >>> s = pair[0] @ pair[1].T  # the text's matrix is -s; all 4 columns are in the top 10
        >>> torch.allclose(loss, 2 * (s + s).square().mean() / 3, rtol=1e-4)
        True
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
        s_product, s_image, s_text = (matrix.gather(1, nearest) for matrix in similarities)
        first, second, third = (
            F.relu((a - b).square() - tolerance).sum()
            for a, b in ((s_image, s_product), (s_text, s_product), (s_image, s_text))
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
    """Return the loss of SigLIP (arXiv 2303.15343).

    The loss is ``-1/B sum_ij log sigmoid(z_ij (q_i . c_j / temperature + bias))`` for queries q and
    candidates c. z_ij is 1 if i = j and -1 otherwise.

    Args:
        query: (B, D).
        candidate: (C, D), C >= B.
        temperature: a number or a tensor of one element; the default is the paper's initial value.
        bias: a number or a tensor of one element; the default is the paper's initial value.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> from torch.nn.functional import logsigmoid, normalize
        >>> image, text = (normalize(torch.randn(4, 16), dim=-1) for _ in range(2))
        >>> loss = mmfused.losses.sigmoid_contrastive(image, text)
        >>> z = 2 * torch.eye(4) - 1  # 1 for pairs, -1 for all others
        >>> expected = -logsigmoid(z * (image @ text.T / 0.1 - 10)).sum() / 4
        >>> torch.allclose(loss, expected, atol=1e-5)
        True
    """
    op = "sigmoid_contrastive"
    query, candidate = _floats(op, query=query, candidate=candidate)
    check_temperature(op, temperature, query)
    temperature = valid_or_nan(temperature)
    _check_scalars(op, query, bias=bias)

    def block(rows: Tensor, at: Tensor) -> Tensor:
        logits = rows @ candidate.T / temperature + bias
        positive = logits.gather(1, at[:, None])
        return -F.logsigmoid((-logits).scatter(1, at[:, None], positive)).sum()

    return _by_rows(block, query, candidate.shape[0]) / query.shape[0]


def expert_shares(routing: Routing, samples: int) -> Tensor:
    """Return the mean routing weight of each expert over the tokens of each sample, (B, Z).

    This is the vector G of a sample in MOON2.0 (arXiv 2511.12449), as this library interprets the
    paper. B is ``samples``, and Z is the number of experts. Masked tokens do not count. If all
    tokens of a sample are masked, the row of the sample is 0.

    Args:
        routing: the routing of B * N tokens, in which the tokens of a sample are adjacent.
        samples: number of samples B.

    Returns:
        (B, Z), in the dtype of ``routing.weights``.

    Raises:
        TypeError: ``routing`` is not a Routing.
        ValueError: ``samples`` does not divide the number of tokens.

    Examples:
        >>> import torch, mmfused
        >>> logits = torch.randn(3 * 5, 4)  # 3 samples of 5 tokens, 4 experts
        >>> shares = mmfused.losses.expert_shares(mmfused.topk_routing(logits, 2), samples=3)
        >>> shares.shape
        torch.Size([3, 4])
        >>> torch.allclose(shares.sum(1), torch.ones(3))
        True
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
    """Return the weights omega of M objectives in MOON2.0 (arXiv 2511.12449), and a sparsity loss.

    The weights and the sparsity loss are::

        p_zm = softmax over m of alignment_zm
        omega_m = mean over b in S_m of sum_z p_zm G_bz
        sparsity = mean over z of -sum_m p_zm log p_zm

    z is one of Z experts, m one of the M objectives, and b one of B samples. S_m is the set of the
    samples of objective m, and G is the matrix ``shares``. An objective has a large weight if its
    samples use the experts that are aligned with the objective.

    Args:
        alignment: (Z, M) learned matrix. Initialise it near zero, so that all objectives have the
            same weight at first.
        shares: (B, Z) routing weights of each sample, from :func:`expert_shares`. With several
            layers, use the mean over layers.
        members: (B, M) bool, which samples belong to each objective; None means all. An objective
            without samples has weight 0.
        detach_routing: whether to stop gradients to the router. With gradients, as in the paper,
            the router also learns to prefer the experts of easy objectives.
        normalise: sum to which the weights are scaled; None, as in the paper, does not scale them.

    Returns:
        The weights omega (M,), and the scalar sparsity loss, float32 or float64.

    Raises:
        TypeError, ValueError: bad input.

    Examples:
        >>> import torch, mmfused
        >>> alignment = torch.zeros(4, 3, requires_grad=True)  # 4 experts, 3 objectives
        >>> shares = torch.full((8, 4), 0.25)  # 8 samples
        >>> omega, sparsity = mmfused.losses.dual_alignment(alignment, shares)
        >>> torch.allclose(omega, torch.full((3,), 1 / 3))  # all the same at first
        True
        >>> objectives = torch.rand(3)
        >>> loss = omega @ objectives + 0.01 * sparsity
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
            "because alignment has as many rows"
        )
    shape = (shares.shape[0], alignment.shape[1])
    if members is not None and (members.dtype != torch.bool or members.shape != shape):
        raise ValueError(f"{op}: members: got {_described(members)}, expected bool {shape}")
    if normalise is not None and not normalise > 0:
        raise ValueError(f"{op}: normalise: got {normalise}, expected a positive sum, or None")


def _checked_pairs(op: str, **named: tuple[Tensor, Tensor]) -> list[list[Tensor]]:
    """Return pairs of embeddings in float32 or float64; raise ValueError if their shapes differ."""
    pairs = [
        _floats(op, **{f"{name}[{i}]": x for i, x in enumerate(pair)})
        for name, pair in named.items()
    ]
    first_name, first = next(iter(named)), pairs[0][0]
    for name, (query, candidate) in zip(named, pairs, strict=True):
        if query.shape != first.shape or candidate.shape != first.shape:
            raise ValueError(
                f"{op}: {name}: got shapes {tuple(query.shape)} and {tuple(candidate.shape)}, "
                f"expected {tuple(first.shape)} twice, as {first_name} has"
            )
    return pairs


def _floats(op: str, **tensors: Tensor) -> list[Tensor]:
    """Return embeddings (rows, dim) in a common dtype, float32 or float64.

    Raises:
        ValueError: an embedding has another dim or fewer rows than the first embedding.
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
                    f"{op}: {name}: got {_described(value)}, expected one floating-point element"
                )
        elif not isinstance(value, int | float):
            raise TypeError(
                f"{op}: {name}: got {value!r}, expected a number, or a tensor of one element"
            )


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"


# ---- blocks of rows ------------------------------------------------------------------------------


def _by_rows(
    block: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    pairs_per_row: int,
) -> Tensor:
    """Return the sum of ``block(rows, indices of the rows)`` over blocks of rows.

    If there are several blocks, they are recomputed in backward. An exported graph must be valid
    for any number of rows, so it has one block. torch.func does not support checkpoints, so there
    is one block under torch.func too.

    Args:
        block: returns the sum of the loss over the given rows.
        rows: the rows.
        pairs_per_row: number of pairs that ``block`` stores for each row.
    """
    indices = torch.arange(rows.shape[0], device=rows.device)
    one_block = bool(active_exporter()) or torch._C._are_functorch_transforms_active()
    step = rows.shape[0] if one_block else max(1, BLOCK_PAIRS // pairs_per_row)
    with no_autocast(rows.device.type):
        if one_block or step >= rows.shape[0]:
            return block(rows, indices)
        parts = zip(rows.split(step), indices.split(step), strict=True)
        return torch.stack([checkpoint(block, *part, use_reentrant=False) for part in parts]).sum()
