"""Objectives of MOON2.0 (arXiv 2511.12449) and their weights omega; the equations are in moon2.py.

A part is a result of `MOON2.encode`. The losses are computed over the rows of all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfused.distributed import gather_rows, in_group
from mmfused.losses import dual_alignment
from mmfused.models.retrieval import VIEWS, View
from mmfused.ops.masked_info_nce import loss_over_ranks, masked_info_nce

if TYPE_CHECKING:
    from mmfused.models.moon2 import MOON2Config

INTER: dict[str, View] = {f"inter_{view}": view for view in VIEWS}
INTRA: tuple[str, str] = ("intra_positive", "intra_negative")
UNUSED_KEY = 1 << 62  # a candidate's key that no query has

EncodedPart = dict[str, Tensor]


def objectives(c: MOON2Config) -> tuple[str, ...]:
    """Return the names of the objectives of a configuration."""
    inter = () if "inter" in c.without else tuple(INTER)
    return inter + (() if "intra" in c.without else INTRA)


def inter_losses(
    query: EncodedPart,
    candidate: EncodedPart,
    negative: EncodedPart | None,
    c: MOON2Config,
    margin: Tensor,
) -> dict[str, Tensor]:
    """Return L_inter for each view of the queries; candidates are in the view "both"."""
    parts = [candidate] if negative is None else [candidate, negative]
    candidates, ids = (torch.cat([part[name] for part in parts]) for name in ("both", "labels"))
    not_empty = [part["has_image"] | part["has_text"] for part in parts]
    weight = not_empty[0]
    if negative is not None and "filtering" not in c.without:
        weight = weight * reliability(
            query["both"], candidate["both"], negative["both"], not_empty[1], c, margin
        )
    weight = weight.to(query["both"].dtype)
    return {
        name: contrast(
            query[view],
            candidates,
            temperature=c.temperature,
            weight=weight * has(query, view),
            real=torch.cat(not_empty),
            query_id=query["labels"],
            candidate_id=ids,
            own_only=c.own_negative_only,
        )
        for name, view in INTER.items()
    }


@torch.no_grad()
def reliability(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    real: Tensor,
    c: MOON2Config,
    margin: Tensor,
) -> Tensor:
    """Return the weights (B,) of the triplets: 1 if phi >= filter_threshold, else phi.

    ``real`` (B,) bool is False for empty negatives, whose triplets have weight 1.
    """
    difference = (query * (positive - negative)).sum(-1)
    phi = torch.sigmoid(c.filter_slope * (difference - margin.to(query.dtype)))
    reliable = (phi >= c.filter_threshold) | ~real
    return torch.where(reliable, torch.ones_like(phi), phi)


def intra_loss(part: EncodedPart, c: MOON2Config) -> Tensor:
    """Return L_intra of a part: InfoNCE from each item's image to its text."""
    image, text, real, labels = part["image"], part["text"], part["has_text"], part["labels"]
    ids = labels
    if c.roll:
        text, real, ids = (torch.cat([x, previous_rows(x)]) for x in (text, real, labels))
    return contrast(
        image,
        text,
        temperature=c.intra_temperature,
        weight=has(part, "both").to(image.dtype),
        real=real,
        query_id=labels,
        candidate_id=ids,
        own_only=c.roll,
    )


def objective_weights(
    names: list[str],
    alignment: Tensor,
    query: EncodedPart,
    candidate: EncodedPart,
    negative: EncodedPart | None,
    c: MOON2Config,
) -> tuple[Tensor, Tensor]:
    """Return omega (M,) of the M objectives in ``names``, and L_sparsity.

    ``alignment`` is W*, with a column for each of `objectives(c)`. An objective of L_inter uses the
    experts' shares of its view of ``query``. An objective of L_intra uses the shares of the images
    of ``candidate`` or of ``negative``.
    """
    intra: dict[str, EncodedPart | None] = dict(zip(INTRA, (candidate, negative), strict=True))
    shares, real = [], []
    for name in names:
        part, view = (query, INTER[name]) if name in INTER else (intra[name], "image")
        assert part is not None  # ``names`` has only objectives whose parts are given
        shares.append(part["shares"][:, VIEWS.index(view)])
        real.append(has(part, view))
    eye = torch.eye(len(names), dtype=torch.bool, device=real[0].device)
    members = eye.repeat_interleave(len(query["both"]), 0) & torch.cat(real)[:, None]
    share = torch.cat(shares)  # a row for each objective and sample, (M B, Z)
    rows = gather_rows(torch.cat([share, members.to(share.dtype)], 1))
    order = objectives(c)
    return dual_alignment(
        alignment[:, [order.index(name) for name in names]],
        rows[:, : c.num_experts],
        members=rows[:, c.num_experts :] > 0,
        detach_routing=c.detach_routing,
        normalise=c.normalise,
    )


def has(part: EncodedPart, view: View) -> Tensor:
    """Return a mask (B,) of the items that have the view's modalities: both for "both"."""
    image, text = part["has_image"], part["has_text"]
    return {"image": image, "text": text, "both": image & text}[view]


def contrast(
    query: Tensor,
    candidates: Tensor,
    *,
    temperature: float,
    weight: Tensor,
    real: Tensor,
    query_id: Tensor,
    candidate_id: Tensor,
    own_only: bool,
) -> Tensor:
    """Return the InfoNCE of this rank's B queries with the candidates of all ranks.

    Candidate i is the positive of query i. ``weight`` (B,) weighs the queries. Negatives of a query
    are the ``real`` candidates with another id. With ``own_only``, query i has only candidates
    i + B, i + 2 B, ... as negatives.
    """
    key_offset = (dist.get_rank() << 32) if in_group() else 0
    rows = torch.arange(len(query), device=query.device) + key_offset
    query_key = rows if own_only else torch.zeros_like(rows)
    repeats = len(candidates) // max(len(query), 1)
    options: dict[str, Any] = {
        "temperature": temperature,
        "row_weight": weight,
        "query_key": query_key,
        "candidate_key": query_key.repeat(repeats).masked_fill(~real, UNUSED_KEY),
        "query_id": query_id,
        "candidate_id": candidate_id,
    }
    if in_group():
        return loss_over_ranks(query, candidates, True, **options)
    return masked_info_nce(query, candidates, **options)


def previous_rows(x: Tensor) -> Tensor:
    """Return the previous row of each row in the batch of all ranks, cyclically."""
    if not in_group():
        return x.roll(1, 0)
    ranks = gather_rows(torch.full((len(x),), dist.get_rank(), device=x.device))
    first = (ranks < dist.get_rank()).sum()
    return gather_rows(x)[(first + torch.arange(len(x), device=x.device) - 1) % len(ranks)]
