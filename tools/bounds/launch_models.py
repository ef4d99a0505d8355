"""Training steps of the five models whose launches are counted.

These are the steps of benchmarks/model_steps.py: from the encoders' tokens to the loss, in float32,
without dropout. As in training, gradients are clipped and AdamW makes the step.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import mmfused.models
from mmfused.benchmarks import model_steps
from mmfused.training.optimizer import make_optimizer

from .launch_cases import FLOAT, floats, module
from .launches import Launch, recorded

TITLES = {
    "fluid": "FLUID",
    "uniecs": "UniECS",
    "unica": "UniCA",
    "moon2": "MOON2.0",
    "unite": "UNITE",
}
_ADAMW: Any = SimpleNamespace(
    weight_decay=0.01, lr=1e-4, lr_image=None, lr_text=None, betas=(0.9, 0.999)
)


class StepLaunches(NamedTuple):
    """What the three parts of a training step launch."""

    forward: list[Launch]
    backward: list[Launch]
    update: list[Launch]  # clips the gradients and makes the optimizer's step


def step_launches(name: str) -> StepLaunches:
    """Count the second training step of a model: the optimizer has its state already."""
    batch = next(case.B for case in model_steps.CASES if case.name == name)
    make, meta = model_steps.STEPS[name], torch.device("meta")
    step = module(lambda: make(mmfused.models, batch, False, meta, FLOAT), FLOAT)
    inputs = [floats(*shape, dtype=FLOAT) for shape in step.shapes().values()]
    parameters = [x for x in step.parameters() if x.requires_grad]
    optimizer = make_optimizer(step, _ADAMW) if parameters else None
    _step(step, inputs, parameters, optimizer)
    return _step(step, inputs, parameters, optimizer)


def _step(
    step: model_steps.Step,
    inputs: list[torch.Tensor],
    parameters: list[torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> StepLaunches:
    for x in (*inputs, *parameters):
        x.grad = None
    with recorded() as forward:
        loss = step(*inputs)
    with recorded() as backward:
        loss.backward()
    with recorded() as update:
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return StepLaunches(forward, backward, update)
