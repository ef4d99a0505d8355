"""Gradients of one step: of batches one after the other, of one contrastive batch in chunks
(GradCache), and over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from mmfused.distributed import in_group


def add_gradients(model, batches: Iterable[dict], count: int, amp: bool = False):
    """Adds the gradient of the mean loss of ``count`` batches, one after the other in memory; (mean
    loss, mean terms), detached.

    A batch holds the arguments of ``model``. For losses that are means over samples, and batches of
    one size, that is the gradient of the one big batch. It is not for what couples samples: a
    contrastive loss takes its negatives, a balance loss its shares, and BatchNorm its statistics
    from one micro-batch; for the first there is :func:`add_cached_gradients`."""
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = model(**to_device(batch, device))
        (output.loss / count).backward()
        for name, value in {"": output.loss, **output.losses}.items():
            sums[name] = sums.get(name, 0) + value.detach() / count
    return sums.pop(""), sums


def add_cached_gradients(model, batch: dict[str, dict], chunk: int, amp: bool = False):
    """As :func:`add_gradients` of one batch of a retrieval model, whose items are encoded ``chunk``
    at a time: GradCache.

    Gao et al. 2021 (arXiv 2101.06983): encode without a graph, take the loss's gradient with
    respect to the encoded rows, encode each chunk again and go on backwards from there. Exact, for
    twice the forward passes and the memory of one chunk; each chunk draws the same dropout again.
    What a model averages over items (MOON2.0's balance loss) becomes the mean of the chunks'."""
    device = next(model.parameters()).device
    batch = to_device(batch, device)
    cached: dict[str, list] = {role: [] for role in batch}
    states: dict[str, list] = {role: [] for role in batch}
    for role, items in batch.items():
        for part in chunks(items, chunk):
            states[role].append(random_state(device))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                cached[role].append(model.encode_part(role, part))
    leaves = {role: joined(parts, batch[role]["labels"], chunk) for role, parts in cached.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        output = model.compare(**leaves)
    output.loss.backward()
    after = random_state(device)
    for role, items in batch.items():
        total = len(items["labels"])
        for i, part in enumerate(chunks(items, chunk)):
            set_random_state(states[role][i], device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                again = model.encode_part(role, part)
            pairs = []
            for name, leaf in leaves[role].items():
                if leaf.requires_grad and leaf.grad is not None and again[name].requires_grad:
                    share = len(part["labels"]) / max(total, 1)
                    rows = slice(i * chunk, (i + 1) * chunk)
                    pairs.append(
                        (again[name], leaf.grad[rows] if leaf.dim() else leaf.grad * share)
                    )
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    set_random_state(after, device)
    return output.loss.detach(), {name: value.detach() for name, value in output.losses.items()}


def chunks(items: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(items["labels"])
    starts = range(0, max(count, 1), size)  # of no rows, one chunk of none
    return [
        {name: value[first : first + size] for name, value in items.items()} for first in starts
    ]


def joined(parts: list[dict[str, Tensor]], labels: Tensor, chunk: int) -> dict[str, Tensor]:
    """The chunks' rows one below the other and the weighted means of what is a mean, as leaves."""
    shares = [len(part) / max(len(labels), 1) for part in labels.split(chunk)]
    leaves = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        value = (
            torch.cat(values)
            if first.dim()
            else sum(v * share for v, share in zip(values, shares, strict=True))
        )
        leaves[name] = value.requires_grad_() if value.is_floating_point() else value
    return leaves


def to_device(batch, device: torch.device):
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True)


def random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + (
        [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    )


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@torch.no_grad()
def average_gradients(model) -> None:
    """The mean of each gradient over the ranks, in one message per dtype; a rank without one counts
    as zeros.
    """
    if not in_group():
        return
    groups: dict[torch.dtype, list] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))
