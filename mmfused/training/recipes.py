"""The settings of training that the papers or the public code give."""

from __future__ import annotations

from typing import Any

# The papers' settings by model and preset; command-line options override them.
_FLUID = {
    "lr": 2e-5,
    "weight_decay": 0.01,
    "epochs": 15,
    "batch_size": 128,
    "max_length": 512,
}
_FLUID_CODE = {**_FLUID, "augment": "none"}
# max_length is text_length of the presets.
_UNIECS = {
    "lr": 1e-6,
    "weight_decay": 0.01,
    "epochs": 50,
    "batch_size": 256,
    "max_length": 64,
}
_UNIECS_CODE = {
    **_UNIECS,
    "lr_image": 1e-5,
    "betas": (0.9, 0.98),
    "schedule": "cosine",
    "augment": "none",
}
# VISTA, UniCA's baseline, gives max_length; its second stage gives the augmentation.
_UNICA = {"lr": 2e-5, "epochs": 5, "batch_size": 640, "max_length": 109}
# The paper gives the batch size and LoRA's; the rest is from the public scripts of the 2B model.
_UNITE = {"epochs": 1, "batch_size": 4096, "max_length": 2048}
_UNITE_CODE = {
    **_UNITE,
    "weight_decay": 0.0,
    "warmup": 0.03,
    "schedule": "cosine",
    "betas": (0.9, 0.999),
    "clip": 1.0,
    "grad_checkpointing": True,
}
_UNITE_STAGES = {
    1: {"lr": 1e-4, "lora": {"rank": 8, "alpha": 16, "dropout": 0.05}},
    2: {"lr": 2e-5, "lora": {"rank": 8, "alpha": 64, "dropout": 0.05}},
}
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("fluid", "paper"): _FLUID,
    ("fluid", "code"): _FLUID_CODE,
    ("uniecs", "paper"): _UNIECS,
    ("uniecs", "code"): _UNIECS_CODE,
    ("unica", "paper"): _UNICA,
    ("unica", "code"): {**_UNICA, "augment": "light"},
    ("moon2", "paper"): {"lr": 1e-5, "epochs": 1, "batch_size": 256},
    ("unite", "paper"): _UNITE,
    ("unite", "code"): _UNITE_CODE,
}
# What depends on the model's stage.
RECIPES_OF_STAGES: dict[tuple[str, str], dict[int, dict[str, Any]]] = {
    ("unite", "paper"): _UNITE_STAGES,
    ("unite", "code"): _UNITE_STAGES,
}


def recipe(model: str, preset: str, stage: object = None) -> dict[str, Any]:
    """Return the settings of a model's paper or public code; empty if it gives none.

    Args:
        model: name of the model.
        preset: name of its preset.
        stage: the stage of UNITE's training, 1 or 2.

    Examples:
        >>> from mmfused.training.recipes import recipe
        >>> first, second = (recipe("unite", "code", stage) for stage in (1, 2))
        >>> first["lr"], first["lora"]["alpha"], second["lr"], second["lora"]["alpha"]
        (0.0001, 16, 2e-05, 64)
    """
    of_stages = RECIPES_OF_STAGES.get((model, preset), {})
    of_stage = [changes for number, changes in of_stages.items() if number == stage]
    return {**RECIPES.get((model, preset), {}), **(of_stage[0] if of_stage else {})}
