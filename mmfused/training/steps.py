"""What a training step is made of beside the model: learning rate, optimiser, hidden modalities."""

from __future__ import annotations

import math

import torch


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share ``warmup`` of the ``steps``, then half a cosine to 0; ``step``
    counts from 0.
    """
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - ramp) / max(1, steps - ramp)))


def drop_modalities(
    batch: dict,
    image: float,
    text: float,
    generator: torch.Generator,
    tokenizer,
) -> dict:
    """The batch with samples' image or text hidden, with these probabilities and never both, where
    a sample has both.

    A hidden text is what an empty one looks like: [CLS] [SEP].
    """
    rows = len(batch["labels"])
    draw = torch.rand(rows, generator=generator)
    whole = batch["image_present"] & (batch["attention_mask"].sum(1) > 2)
    no_image, no_text = whole & (draw < image), whole & (draw >= image) & (draw < image + text)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[no_text] = tokenizer.pad_token_id
    ids[no_text, 0], ids[no_text, 1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    mask[no_text, 2:] = 0
    pixels = batch["pixel_values"].masked_fill(no_image[:, None, None, None], 0.0)
    present = batch["image_present"] & ~no_image
    return {
        **batch,
        "pixel_values": pixels,
        "image_present": present,
        "input_ids": ids,
        "attention_mask": mask,
    }


def make_optimizer(model, config):
    """AdamW; weights of norms and biases are not decayed."""
    groups = [
        {"params": [], "weight_decay": config.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim <= 1 or "norm" in name or name.endswith("bias")
        groups[kept]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
