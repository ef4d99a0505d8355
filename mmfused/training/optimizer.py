"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmfused.training.config import TrainConfig


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    warmup: float,
) -> float:
    """Return the learning rate of one step: linear warm-up, then cosine decay to 0.

    Args:
        step: index of the step, counted from 0.
        steps: number of all steps.
        peak: the learning rate at the end of the warm-up.
        warmup: fraction of the steps that belongs to the warm-up.
    """
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - ramp) / max(1, steps - ramp)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases and vectors do not decay."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim <= 1 or "norm" in name or name.endswith("bias")
            (undecayed if no_decay else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
