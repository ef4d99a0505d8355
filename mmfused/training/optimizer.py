"""The optimizer and its learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmfused.training.config import Schedule, TrainConfig

# The parts with a learning rate of their own, by its setting: the beginnings of their parameters'
# names, and their names in error messages.
RATED = {
    "lr_image": (("image_encoder.", "host.visual."), "image encoder or vision tower"),
    "lr_text": (("text_encoder.", "host.language_model."), "text encoder or language model"),
}


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    warmup: float,
    schedule: Schedule = "cosine",
) -> float:
    """Return the learning rate of one step: linear warm-up, then the schedule.

    Args:
        step: index of the step, counted from 0.
        steps: number of all steps.
        peak: the learning rate at the end of the warm-up.
        warmup: fraction of the steps that belongs to the warm-up.
        schedule: "cosine" and "linear" fall to 0 at the last step; "constant" stays at the peak.
    """
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    past, rest = step + 1 - ramp, max(1, steps - ramp)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * past / rest))
    return peak * (1 - past / rest) if schedule == "linear" else peak


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases and vectors do not decay.

    Each learning rate of ``config`` has two groups, with and without weight decay. The key "rate"
    of a group is the name of its setting.

    Raises:
        ValueError: a part with a learning rate of its own is missing or frozen.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for setting in ("lr", *own_rates(config)):
        groups |= {(setting, True): [], (setting, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and "norm" not in name and not name.endswith("bias")
            groups[_setting_of(name, config), decays].append(parameter)
    for setting in own_rates(config):
        if not groups[setting, True] and not groups[setting, False]:
            raise ValueError(
                f"{setting}: got {getattr(config, setting)}, expected None: the model trains no "
                f"{RATED[setting][1]}"
            )
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr": getattr(config, setting),
                "rate": setting,
            }
            for (setting, decays), parameters in groups.items()
        ],
        betas=config.betas,
    )


def own_rates(config: TrainConfig) -> list[str]:
    """Return the settings of parts with a learning rate of their own."""
    return [setting for setting in RATED if getattr(config, setting) is not None]


def _setting_of(name: str, config: TrainConfig) -> str:
    """Return the setting with the learning rate of the parameter ``name``."""
    found = [setting for setting in own_rates(config) if name.startswith(RATED[setting][0])]
    return found[0] if found else "lr"


def set_rates(
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    steps: int,
) -> dict[str, float]:
    """Set and return the learning rates of a step, by the names of their settings."""
    rates = {
        setting: learning_rate(
            step, steps, getattr(config, setting), config.warmup, config.schedule
        )
        for setting in ("lr", *own_rates(config))
    }
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate"]]
    return rates
