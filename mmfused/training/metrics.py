"""How good a classifier is: loss, accuracy, and precision, recall and F1 of each class and in the
mean over classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Counts(NamedTuple):
    """Rows by class, (C,) int64 each."""

    hits: Tensor  # of this class and recognised as such
    predicted: Tensor  # taken for this class
    actual: Tensor  # of this class


def count(predictions: Tensor, labels: Tensor) -> Counts:
    """``predictions`` and ``labels`` (N,) int64, N at least 1, classes counted from 0."""
    size = int(max(predictions.max(), labels.max())) + 1
    hits = torch.bincount(labels[predictions == labels], minlength=size)
    return Counts(
        hits, torch.bincount(predictions, minlength=size), torch.bincount(labels, minlength=size)
    )


def class_scores(counts: Counts) -> dict[str, Tensor]:
    """precision = hits / predicted, recall = hits / actual, f1 = their harmonic mean, (C,) float64;
    0 / 0 counts as 0.
    """
    hits = counts.hits.double()
    return {
        "precision": hits / counts.predicted.clamp(min=1),
        "recall": hits / counts.actual.clamp(min=1),
        "f1": 2 * hits / (counts.predicted + counts.actual).clamp(min=1),
    }


def scores(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, and the means of :func:`class_scores` over the classes that occur in predictions or
    labels.
    """
    # Numbered anew: labels may be product numbers, and counting goes up to the largest.
    numbers = torch.cat([predictions, labels]).unique(return_inverse=True)[1]
    counts = count(*numbers.split(len(labels)))
    macro = {f"macro_{name}": float(value.mean()) for name, value in class_scores(counts).items()}
    return {"accuracy": float((predictions == labels).double().mean()), **macro}


def model_inputs(model, batch: dict) -> dict:
    """The part of ``batch`` that the model's modalities need, on the model's device."""
    names = {"image": ("pixel_values", "image_present"), "text": ("input_ids", "attention_mask")}
    wanted = [
        key
        for kind, keys in names.items()
        if model.config.modalities in (kind, "both")
        for key in keys
    ]
    device = next(model.parameters()).device
    return {key: batch[key].to(device, non_blocking=True) for key in (*wanted, "labels")}


@torch.no_grad()
def predict(
    model,
    batches: Iterable[dict],
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
):
    """(mean loss, predictions (N,), labels (N,)) in evaluation mode, under bf16 autocast where
    ``amp``.

    None as soon as ``stopped()`` is true. Raises RuntimeError where the loss is not a finite
    number."""
    was_training, device = model.training, next(model.parameters()).device
    losses, predictions, labels = [], [], []
    model.eval()
    try:
        for batch in batches:
            if stopped():
                return None
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                output = model(**model_inputs(model, batch))
            losses.append(output.loss.double() * len(batch["labels"]))
            predictions.append(output.logits.argmax(-1).cpu())
            labels.append(batch["labels"])
    finally:
        model.train(was_training)
    predictions, labels = torch.cat(predictions), torch.cat(labels)
    loss = float(sum(losses)) / len(labels)
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the validation loss is {loss}: the weights give numbers that are not finite"
        )
    return loss, predictions, labels


def evaluate(
    model,
    batches: Iterable[dict],
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> dict | None:
    """val_loss and :func:`scores` of ``model`` over ``batches``; arguments, None and errors as in
    :func:`predict`.
    """
    result = predict(model, batches, amp, stopped)
    return None if result is None else {"val_loss": result[0], **scores(*result[1:])}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the CUDA allocator held, or on the CPU the most resident memory of this
    process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
