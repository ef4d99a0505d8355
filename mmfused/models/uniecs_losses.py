"""Losses of UniECS (arXiv 2508.13843): nine terms in three groups, and their weights.

v, t and f are the embeddings of image, text and both; 1 is the query and 2 the candidate. The CLAL
terms compare S^mm = s f_1 f_2^T, S^vm = s v_1 f_2^T and S^tm = s t_1 f_2^T with s = exp(log_scale).

    CMAL  alignment 1/2 [2 - cos(v_1, f_1) + 2 - cos(t_1, f_1)]; InfoNCE V2T (symmetric), V2F, T2F
    CLAL  PPM and PDC (hinges), PLC (agreement of the three S on the nearest candidates)
    IMCL  V2V = InfoNCE + L_hard; T2T
    L_k = mean of the terms of group k, weighted by loss_weights
    L = sum_k omega_k L_k over the three groups k (adaptive)
    omega_k proportional to (g_k + eps)^-beta, with sum 1; g_k = |dL_k / d embeddings|

Without adaptive weights, L is the mean of all terms, weighted by loss_weights.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmfused.library import no_autocast, once_differentiable
from mmfused.losses import hard_negative_margin, product_consistency, product_hinge
from mmfused.ops.masked_info_nce import masked_info_nce

TERMS: dict[str, tuple[str, ...]] = {
    "cmal": ("alignment", "v2t", "v2f", "t2f"),
    "clal": ("ppm", "pdc", "plc"),
    "imcl": ("v2v", "t2t"),
}
NAMES: tuple[str, ...] = tuple(chain.from_iterable(TERMS.values()))

Pair = tuple[Tensor, Tensor]


class LossOptions(NamedTuple):
    """The config fields that the losses use, as constants that torch.compile accepts."""

    without: tuple[str, ...]
    temperature: float
    temperature_v2v: float
    temperature_t2t: float
    margins: tuple[float, float, float, float]
    hard_fraction: float
    nearest: int
    v2f: Literal["v_to_f", "f_to_v"]
    loss_weights: tuple[float, ...]
    beta: float
    epsilon: float


class _Side(NamedTuple):
    """Embeddings v, t or f of the queries or of the candidates."""

    rows: Tensor  # (B, D)
    has: Tensor  # (B,) int64, 1 if the item has the modality (f: at least one), else 0
    label: Tensor  # (B,) int64


def loss_terms(
    rows: Tensor,
    log_scale: Tensor,
    ids: Tensor,
    options: LossOptions,
) -> dict[str, Tensor]:
    """Return the unweighted terms of the groups that are not ablated.

    Args:
        rows: (B, 6, D): v_1, t_1, f_1, v_2, t_2, f_2.
        log_scale: scalar.
        ids: (B, 6) int64: label, has_image, has_text (0 or 1) of the query, then of the candidate.
        options: see LossOptions.
    """
    o = options
    v1, t1, f1, v2, t2, f2 = rows.transpose(0, 1).contiguous()
    label1, image1, text1, label2, image2, text2 = ids.T.contiguous()
    image = _Side(v1, image1, label1), _Side(v2, image2, label2)
    text = _Side(t1, text1, label1), _Side(t2, text2, label2)
    both = _Side(f1, image1 | text1, label1), _Side(f2, image2 | text2, label2)
    v2f = (image[0], both[1]) if o.v2f == "v_to_f" else (both[0], image[1])
    terms: dict[str, Tensor] = {}
    with no_autocast(rows.device.type):
        if "cmal" not in o.without:
            distance = 4 - _mean_cosine(v1, f1, image1) - _mean_cosine(t1, f1, text1)
            terms["alignment"] = distance / 2
            terms["v2t"] = _nce(image[0], text[1], o.temperature, symmetric=True)
            terms["v2f"] = _nce(*v2f, o.temperature)
            terms["t2f"] = _nce(text[0], both[1], o.temperature)
        if "clal" not in o.without:
            vm = (v2f[0].rows, v2f[1].rows)
            terms |= _clal((f1, f2), vm, (t1, f2), log_scale.exp().to(rows.dtype), o)
        if "imcl" not in o.without:
            terms["v2v"] = _nce(*image, o.temperature_v2v)
            if "hard_negatives" not in o.without:
                terms["v2v"] = terms["v2v"] + hard_negative_margin(
                    v1,
                    v2,
                    temperature=o.temperature_v2v,
                    margin=o.margins[3],
                    fraction=o.hard_fraction,
                )
            terms["t2t"] = _nce(*text, o.temperature_t2t)
    return terms


def _nce(
    query: _Side,
    candidate: _Side,
    temperature: float,
    symmetric: bool = False,
) -> Tensor:
    """Return the InfoNCE over the pairs in which query and candidate have `has` = 1."""
    # An item with `has` = 0 gets a unique key, so that it is not a negative.
    count = len(query.rows)
    unique = torch.arange(1, count + 1, device=query.rows.device)
    return masked_info_nce(
        query.rows,
        candidate.rows,
        temperature=temperature,
        symmetric=symmetric,
        row_weight=(query.has & candidate.has).to(query.rows.dtype),
        query_key=unique * (1 - query.has),
        candidate_key=(unique + count) * (1 - candidate.has),
        query_id=query.label,
        candidate_id=candidate.label,
    )


def _clal(
    mm: Pair,
    vm: Pair,
    tm: Pair,
    scale: Tensor,
    o: LossOptions,
) -> dict[str, Tensor]:
    ppm = [product_hinge(*pair, scale=scale, margin=o.margins[0]) for pair in (mm, vm, tm)]
    own = [(a * b).sum(1) * scale for a, b in (vm, tm)]
    pdc = [
        product_hinge(*mm, scale=scale, margin=o.margins[1], positive=positive, diagonal=True)
        for positive in own
    ]
    plc = product_consistency(mm, vm, tm, scale=scale, tolerance=o.margins[2], top=o.nearest)
    return {"ppm": _sum(ppm) / 3, "pdc": _sum(pdc) / 2, "plc": plc}


def _sum(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0])


def _mean_cosine(a: Tensor, b: Tensor, has: Tensor) -> Tensor:
    """Return the mean cosine of unit rows over the items with ``has`` = 1; 0 for no items."""
    return ((a * b).sum(1) * has).sum() / has.sum().clamp(min=1)


def weighted_mean(terms: dict[str, Tensor], options: LossOptions) -> Tensor:
    """Return the mean of the terms, weighted by `loss_weights`."""
    pairs = zip(NAMES, options.loss_weights, strict=True)
    weights = {name: weight for name, weight in pairs if name in terms}
    return _sum([w * terms[name] for name, w in weights.items()]) / sum(weights.values())


def group_losses(terms: dict[str, Tensor], options: LossOptions) -> list[Tensor]:
    """Return L_k, the weighted mean of each group's terms."""
    groups = [{name: terms[name] for name in names if name in terms} for names in TERMS.values()]
    return [weighted_mean(group, options) for group in groups if group]


def adaptive_weights(norms: Tensor, options: LossOptions) -> Tensor:
    """Return the weights omega (K,) of the groups, given the norms (K,) of their gradients.

    A group with a zero gradient gets weight 0. The sum is 1 unless all gradients are zero.
    """
    power = (norms + options.epsilon).pow(-options.beta) * (norms > 0)
    return power / power.sum().clamp(min=torch.finfo(power.dtype).tiny)


class _AdaptiveLoss(torch.autograd.Function):
    """L = sum_k omega_k L_k; forward computes the gradients, on which omega depends."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        log_scale: Tensor,
        ids: Tensor,
        options: LossOptions,
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = rows.detach().requires_grad_(), log_scale.detach().requires_grad_()
            terms = loss_terms(*leaves, ids, options)
            losses = group_losses(terms, options)
            gradients = [
                torch.autograd.grad(
                    loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for loss in losses
            ]
        omega = adaptive_weights(torch.stack([of_rows.norm() for of_rows, _ in gradients]), options)
        saved = [
            _sum([w * g for w, g in zip(omega, part, strict=True)])
            for part in zip(*gradients, strict=True)
        ]
        ctx.save_for_backward(*saved)
        values = torch.stack(list(terms.values())).detach()
        ctx.mark_non_differentiable(values)
        total = _sum([w * loss.detach() for w, loss in zip(omega, losses, strict=True)])
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_rows, of_scale = ctx.saved_tensors
        return upstream * of_rows, upstream * of_scale, None, None


# Dynamo cannot trace autograd.grad inside a Function, but AOTAutograd can trace this function.
@torch.compiler.allow_in_graph
def adaptive_loss(
    rows: Tensor,
    log_scale: Tensor,
    ids: Tensor,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Return L with adaptive weights, and the stacked unweighted terms, which are detached.

    The results are the same under no_grad.
    """
    return _AdaptiveLoss.apply(rows, log_scale, ids, LossOptions(*options))
