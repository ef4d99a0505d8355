"""Random inputs for the functions of ``mmfused.losses``, used by function_inputs.py."""

from __future__ import annotations

import torch
from drawing import Draw
from torch import Tensor


def _pair(draw: Draw, more: bool = True) -> dict:
    rows, dim = draw.pick("batch", 1, 2, 5, 17), draw.pick("dim", 1, 3, 17)
    columns = rows + draw.pick("more", 0, 1, 13) * more
    return dict(query=draw.normal(rows, dim), candidate=draw.normal(columns, dim))


def _scalar(draw: Draw, name: str, value: float) -> float | Tensor:
    return draw.place(torch.tensor(value, dtype=draw.wide)) if draw.given(name) else value


def positive_similarity(draw: Draw) -> dict:
    pair = _pair(draw, more=False)
    return dict(query=pair["query"], positive=pair["candidate"])


def hard_negative_margin(draw: Draw) -> dict:
    return _pair(draw) | dict(
        margin=_scalar(draw, "margin", draw.pick("", 0.0, 0.2, 2.0)),
        fraction=draw.pick("fraction", 0.0, 0.3, 1.0),
        temperature=_scalar(draw, "temperature", draw.pick("", 0.1, 1.0)),
    )


def product_hinge(draw: Draw) -> dict:
    inputs = _pair(draw, more=False) | dict(
        margin=_scalar(draw, "margin", draw.pick("", 0.0, 0.3)),
        diagonal=draw.pick("diagonal", True, False),
    )
    inputs["scale"] = _scalar(draw, "scale", draw.pick("", 0.5, 10.0))
    if draw.given("positive"):
        inputs["positive"] = draw.normal(
            len(inputs["query"]), dtype=draw.pick("", draw.dtype, draw.wide)
        )
    return inputs


def product_consistency(draw: Draw) -> dict:
    rows, dim = draw.pick("batch", 1, 2, 5, 17), draw.pick("dim", 1, 3, 17)
    pairs = {
        name: (draw.normal(rows, dim), draw.normal(rows, dim))
        for name in ("product", "image", "text")
    }
    return pairs | dict(
        tolerance=_scalar(draw, "tolerance", draw.pick("", 0.0, 0.05)),
        top=draw.pick("top", 1, 3, 10),
        scale=_scalar(draw, "scale", draw.pick("", 0.5, 2.0)),
    )


def sigmoid_contrastive(draw: Draw) -> dict:
    scalars = dict(
        temperature=_scalar(draw, "temperature", 0.1),
        bias=_scalar(draw, "bias", draw.pick("", -10.0, 0.0)),
    )
    return _pair(draw) | scalars


def dual_alignment(draw: Draw) -> dict:
    experts, objectives, samples = (
        draw.pick("experts", 1, 2, 5),
        draw.pick("objectives", 1, 3),
        draw.pick("batch", 1, 2, 7),
    )
    inputs = dict(
        alignment=draw.normal(experts, objectives),
        shares=draw.uniform(samples, experts),
        detach_routing=draw.pick("detach_routing", False, True),
        normalise=draw.pick("normalise", None, 1, 3.0),
    )
    if draw.given("members"):
        inputs["members"] = draw.flags(0.5, samples, objectives)
    return inputs
