"""Scores of classifiers: loss, accuracy, precision, recall and F1; and the peak memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Counts(NamedTuple):
    """Numbers of rows for each of C classes, as (C,) int64 tensors."""

    hits: Tensor  # rows of the class that are predicted correctly
    predicted: Tensor  # rows predicted as the class
    actual: Tensor  # rows of the class


def count(predictions: Tensor, labels: Tensor) -> Counts:
    """Count rows by class.

    Args:
        predictions: (N,) int64, at least one; classes are numbered from 0.
        labels: (N,) int64.
    """
    size = int(max(predictions.max(), labels.max())) + 1
    return Counts(
        hits=torch.bincount(labels[predictions == labels], minlength=size),
        predicted=torch.bincount(predictions, minlength=size),
        actual=torch.bincount(labels, minlength=size),
    )


def class_scores(counts: Counts) -> dict[str, Tensor]:
    """Return precision, recall and F1 of each class as (C,) float64 tensors; 0 / 0 is 0."""
    hits = counts.hits.double()
    return {
        "precision": hits / counts.predicted.clamp(min=1),
        "recall": hits / counts.actual.clamp(min=1),
        "f1": 2 * hits / (counts.predicted + counts.actual).clamp(min=1),
    }


def scores(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy, and the means of :func:`class_scores` over the classes that occur.

    A class occurs if it is in ``predictions`` or in ``labels``.
    """
    # Renumber the classes, because `count` needs memory in proportion to the largest label.
    numbers = torch.cat([predictions, labels]).unique(return_inverse=True)[1]
    counts = count(*numbers.split(len(labels)))
    macro = {f"macro_{name}": float(value.mean()) for name, value in class_scores(counts).items()}
    return {"accuracy": float((predictions == labels).double().mean()), **macro}


def model_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the labels and the inputs of the model's modalities, on the model's device."""
    modalities = model.config.modalities
    names = ["labels"]
    if modalities in ("image", "both"):
        names += ["pixel_values", "image_present"]
    if modalities in ("text", "both"):
        names += ["input_ids", "attention_mask"]
    device = next(model.parameters()).device
    return {name: batch[name].to(device, non_blocking=True) for name in names}


@torch.no_grad()
def predict(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> tuple[float, Tensor, Tensor] | None:
    """Return the mean loss, the predictions (N,) and the labels (N,), in evaluation mode.

    Args:
        model: a classifier.
        batches: at least one batch.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch; if it returns true, `predict` returns None.

    Raises:
        RuntimeError: the loss is not finite.
    """
    was_training = model.training
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    predictions: list[Tensor] = []
    labels: list[Tensor] = []
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
    all_labels = torch.cat(labels)
    loss = float(sum(losses)) / len(all_labels)
    if not math.isfinite(loss):
        raise RuntimeError(f"the validation loss is {loss}; the weights may have diverged")
    return loss, torch.cat(predictions), all_labels


def evaluate_classifier(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, float] | None:
    """Return ``val_loss`` and :func:`scores`, or None if :func:`predict` returns None.

    Arguments and errors are those of :func:`predict`.
    """
    result = predict(model, batches, amp, stopped)
    if result is None:
        return None
    loss, predictions, labels = result
    return {"val_loss": loss, **scores(predictions, labels)}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated memory on CUDA, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
