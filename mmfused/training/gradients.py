"""Gradients of a step: over several batches, over chunks of a batch (GradCache), over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfused.distributed import in_group

Items: TypeAlias = dict[str, Tensor]


def add_gradients(
    model: Any,
    batches: Iterable[dict[str, Any]],
    count: int,
    amp: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the mean loss of ``count`` batches to ``.grad``, one batch at a time.

    If the loss is a mean over independent samples, and all batches have the same size, the result
    is the gradient of one large batch. Contrastive losses compare only samples of the same batch;
    for a larger batch, use :func:`add_cached_gradients`.

    Args:
        model: called with each batch as keyword arguments.
        batches: ``count`` batches, on any device.
        count: number of batches.
        amp: compute under bfloat16 autocast.

    Returns:
        The mean loss, and the means of the loss terms by name, detached.
    """
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = model(**to_device(batch, device))
        (output.loss / count).backward()
        for name, value in {"": output.loss, **output.losses}.items():
            sums[name] = sums.get(name, 0) + value.detach() / count
    return sums.pop(""), sums


def add_cached_gradients(
    model: Any,
    batch: dict[str, Items],
    chunk: int,
    amp: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of one batch to ``.grad``, encoding ``chunk`` items at a time (GradCache).

    GradCache (Gao et al. 2021, arXiv 2101.06983) first encodes all chunks without a graph, and
    computes the gradient of the loss with respect to the encoded rows. Then it encodes each chunk
    again, with the same dropout, and backpropagates the rows' gradient through the encoder. Each
    chunk is encoded twice, but only one chunk and its graph are on the model's device.

    The gradient is exact if the encoder treats items separately. A scalar that the encoder computes
    from all items of a call, such as MOON2.0's balance loss, is computed for each chunk and
    averaged. BatchNorm normalises each chunk by its own statistics.

    Args:
        model: a retrieval model.
        batch: items by role: "query", "candidate", and "negative" if the model takes negatives, on
            any device.
        chunk: number of items of a chunk.
        amp: compute under bfloat16 autocast.

    Returns:
        The loss, and its terms by name, detached.
    """
    device = next(model.parameters()).device
    parts = {role: model.split(items, chunk) for role, items in batch.items()}
    cached: dict[str, list[Items]] = {role: [] for role in batch}
    states: dict[str, list[list[Tensor]]] = {role: [] for role in batch}
    for role, chunks in parts.items():
        for part in chunks:
            states[role].append(_random_state(device))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                cached[role].append(model.encode_part(role, to_device(part, device)))
    counts = {role: [len(part["labels"]) for part in chunks] for role, chunks in parts.items()}
    leaves = {role: _join(rows, counts[role]) for role, rows in cached.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        output = model.compare(**leaves)
    output.loss.backward()
    after = _random_state(device)
    for role, chunks in parts.items():
        first = 0
        for part, count, state in zip(chunks, counts[role], states[role], strict=True):
            _set_random_state(state, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                encoded = model.encode_part(role, to_device(part, device))
            rows = slice(first, first + count)
            _backward(encoded, leaves[role], rows, count / max(sum(counts[role]), 1))
            first += count
            del encoded  # with its graph, if nothing was propagated through it
    _set_random_state(after, device)
    return output.loss.detach(), {name: value.detach() for name, value in output.losses.items()}


def _backward(
    encoded: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    rows: slice,
    share: float,
) -> None:
    """Backpropagate the gradients of ``leaves`` through the encoding of one chunk.

    Args:
        encoded: the encoding of the chunk, with a graph.
        leaves: the encodings of all chunks, from :func:`_join`, with gradients.
        rows: rows of the chunk in the leaves.
        share: weight of the chunk in the means of scalars.
    """
    tensors: list[Tensor] = []
    gradients: list[Tensor] = []
    for name, leaf in leaves.items():
        if leaf.requires_grad and leaf.grad is not None and encoded[name].requires_grad:
            tensors.append(encoded[name])
            gradients.append(leaf.grad[rows] if leaf.dim() else leaf.grad * share)
    if tensors:
        torch.autograd.backward(tensors, gradients)


def _join(parts: list[Items], counts: list[int]) -> Items:
    """Return leaf tensors: the rows of all chunks, and the mean of each scalar over chunks.

    In the mean, chunks are weighted by their numbers of items, ``counts``.
    """
    shares = [count / max(sum(counts), 1) for count in counts]
    leaves: Items = {}
    for name, example in parts[0].items():
        values = [part[name] for part in parts]
        if example.dim():
            value = torch.cat(values)
        else:
            weighted = [v * share for v, share in zip(values, shares, strict=True)]
            value = sum(weighted[1:], start=weighted[0])
        leaves[name] = value.requires_grad_() if value.is_floating_point() else value
    return leaves


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch``, a tensor, None or a nested dict of these, on ``device``."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return None if batch is None else batch.to(device, non_blocking=True)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average the gradients over ranks, with one all-reduce per dtype.

    A gradient that is None counts as zeros.
    """
    if not in_group():
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
