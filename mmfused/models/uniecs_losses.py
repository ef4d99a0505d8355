"""The losses of UniECS (arXiv 2508.13843), see mmfused/models/uniecs.py: nine terms, three groups,
and how they are weighted.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from mmfused.library import no_autocast, once_differentiable
from mmfused.losses import hard_negative_margin, product_consistency, product_hinge
from mmfused.ops.masked_info_nce import masked_info_nce

TERMS = {
    "cmal": ("alignment", "v2t", "v2f", "t2f"),
    "clal": ("ppm", "pdc", "plc"),
    "imcl": ("v2v", "t2t"),
}
NAMES = tuple(chain.from_iterable(TERMS.values()))


class LossOptions(NamedTuple):
    """What the losses need of the config: plain constants, which torch.compile can hand to a
    function it does not trace.
    """

    without: tuple[str, ...]
    temperature: float
    temperature_v2v: float
    temperature_t2t: float
    margins: tuple[float, ...]
    hard_fraction: float
    nearest: int
    v2f: str
    loss_weights: tuple[float, ...]
    beta: float
    epsilon: float


def loss_terms(
    rows: Tensor,
    log_scale: Tensor,
    ids: Tensor,
    options: LossOptions,
) -> dict[str, Tensor]:
    """The terms of the groups that are not left out, unweighted.

    rows (B, 6, D): v_1, t_1, f_1, v_2, t_2, f_2; ids (B, 6) int64: label, 1 with an image, 1 with a
    text, of 1 and of 2."""
    o = options
    v1, t1, f1, v2, t2, f2 = rows.transpose(0, 1).contiguous()
    label1, image1, text1, label2, image2, text2 = ids.T.contiguous()
    both1, both2 = image1 | text1, image2 | text2

    def nce(query, candidate, has_query, has_candidate, temperature, symmetric=False):
        apart = torch.arange(
            1, len(query) + 1, device=query.device
        )  # what has none of it is nobody's negative
        keys = {
            "query_key": apart * (1 - has_query),
            "candidate_key": (apart + len(query)) * (1 - has_candidate),
        }
        weight = (has_query & has_candidate).to(query.dtype)
        labels = {"query_id": label1, "candidate_id": label2}
        return masked_info_nce(
            query,
            candidate,
            temperature=temperature,
            symmetric=symmetric,
            row_weight=weight,
            **keys,
            **labels,
        )

    vm, vm_has = ((v1, f2), (image1, both2)) if o.v2f == "v_to_f" else ((f1, v2), (both1, image2))
    terms = {}
    with no_autocast(rows.device.type):
        if "cmal" not in o.without:
            terms["alignment"] = (
                4 - _mean_cosine(v1, f1, image1) - _mean_cosine(t1, f1, text1)
            ) / 2
            terms["v2t"] = nce(v1, t2, image1, text2, o.temperature, symmetric=True)
            terms["v2f"] = nce(*vm, *vm_has, o.temperature)
            terms["t2f"] = nce(t1, f2, text1, both2, o.temperature)
        if "clal" not in o.without:
            terms |= _clal((f1, f2), vm, (t1, f2), log_scale.exp().to(rows.dtype), o)
        if "imcl" not in o.without:
            terms["v2v"] = nce(v1, v2, image1, image2, o.temperature_v2v)
            if "hard_negatives" not in o.without:
                hard = {"margin": o.margins[3], "fraction": o.hard_fraction}
                terms["v2v"] = terms["v2v"] + hard_negative_margin(
                    v1, v2, temperature=o.temperature_v2v, **hard
                )
            terms["t2t"] = nce(t1, t2, text1, text2, o.temperature_t2t)
    return terms


def _clal(mm, vm, tm, scale: Tensor, o: LossOptions) -> dict[str, Tensor]:
    ppm = [product_hinge(*pair, scale=scale, margin=o.margins[0]) for pair in (mm, vm, tm)]
    own = [(a * b).sum(1) * scale for a, b in (vm, tm)]
    pdc = [
        product_hinge(*mm, scale=scale, margin=o.margins[1], positive=positive, diagonal=True)
        for positive in own
    ]
    plc = product_consistency(mm, vm, tm, scale=scale, tolerance=o.margins[2], top=o.nearest)
    return {"ppm": sum(ppm) / 3, "pdc": sum(pdc) / 2, "plc": plc}


def _mean_cosine(a: Tensor, b: Tensor, has: Tensor) -> Tensor:
    """Of unit rows, over the items that have the modality; 0 where nobody has."""
    return ((a * b).sum(1) * has).sum() / has.sum().clamp(min=1)


def weighted_mean(terms: dict[str, Tensor], options: LossOptions) -> Tensor:
    weights = {
        name: weight
        for name, weight in zip(NAMES, options.loss_weights, strict=True)
        if name in terms
    }
    return sum(weight * terms[name] for name, weight in weights.items()) / sum(weights.values())


def group_losses(terms: dict[str, Tensor], options: LossOptions) -> list[Tensor]:
    """L_k: the weighted mean of each group's terms."""
    groups = [{name: terms[name] for name in names if name in terms} for names in TERMS.values()]
    return [weighted_mean(group, options) for group in groups if group]


def adaptive_weights(norms: Tensor, options: LossOptions) -> Tensor:
    """omega (K,), of sum 1, from the norms of the groups' gradients; a group without any gradient
    weighs 0.
    """
    power = (norms + options.epsilon).pow(-options.beta) * (norms > 0)
    return power / power.sum().clamp(min=torch.finfo(power.dtype).tiny)


class _AdaptiveLoss(torch.autograd.Function):
    """The weights need each group's gradient, so it is taken in forward; backward has the weighted
    sum ready.
    """

    @staticmethod
    def forward(ctx, rows, log_scale, ids, options):
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
        ctx.save_for_backward(
            *(
                sum(w * g for w, g in zip(omega, part, strict=True))
                for part in zip(*gradients, strict=True)
            )
        )
        values = torch.stack(list(terms.values())).detach()
        ctx.mark_non_differentiable(values)
        return sum(w * loss.detach() for w, loss in zip(omega, losses, strict=True)), values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        of_rows, of_scale = ctx.saved_tensors
        return upstream * of_rows, upstream * of_scale, None, None


@torch.compiler.allow_in_graph  # Dynamo does not trace autograd.grad in a Function; AOTAutograd traces all of this as it runs
def adaptive_loss(
    rows: Tensor,
    log_scale: Tensor,
    ids: Tensor,
    options: tuple,
) -> tuple[Tensor, Tensor]:
    """The groups' sum by adaptive weights, and the terms' values stacked, without gradients; the
    same under no_grad.
    """
    return _AdaptiveLoss.apply(rows, log_scale, ids, LossOptions(*options))
