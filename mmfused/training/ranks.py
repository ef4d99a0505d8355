"""What the processes of one training say to each other beside gradients: joining, waiting,
agreeing, refusing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mmfused.distributed import in_group


class OtherRankError(RuntimeError):
    """Another rank refused what this one would have done; the message names it and quotes it."""


def join_ranks(device: torch.device) -> tuple[int, int]:
    """(rank, world); within ``torchrun`` the process group is made first: NCCL for CUDA, and gloo.

    What ranks say to each other then goes over the CPU, and no step waits for the device because of
    it."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def leave_ranks() -> int:
    """This process's rank; its process group, if any, is closed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def stop_together(stop) -> int | None:
    """The signal that has reached any rank, on all of them; ``stop`` is a
    ``checkpoint.StopRequest``.

    Ranks go by what it returns: a signal may come at any time after, and then counts the next time.
    """
    if not in_group():
        return stop.signum
    signum = torch.tensor(stop.signum or 0, device=_device())
    dist.all_reduce(signum, dist.ReduceOp.MAX)
    return int(signum) or None


def gather_texts(text: str) -> list[str]:
    """The texts of all ranks, in their order."""
    if not in_group():
        return [text]
    encoded = text.encode(errors="backslashreplace")  # a file's name may be no text
    data = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8).to(_device())
    sizes = _gather(torch.tensor([len(encoded)], device=data.device)).tolist()
    padded = data.new_zeros(max(1, *sizes))
    padded[: len(data)] = data
    parts = _gather(padded).view(len(sizes), -1).cpu()
    return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]


@contextmanager
def refused_together() -> Iterator[None]:
    """What raises on one rank raises on all, so that none waits for it: there its own error,
    elsewhere OtherRankError.

    All ranks must enter it, and exchange nothing within that an error could keep one of them from.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if in_group():
        refused = torch.tensor(int(error is not None), device=_device())
        dist.all_reduce(refused, dist.ReduceOp.MAX)
        refusals = (
            gather_texts("" if error is None else f"{error}" or type(error).__name__)
            if refused
            else []
        )
    if error is not None:
        raise error
    if in_group():
        for rank, refusal in enumerate(refusals):
            if refusal:
                raise OtherRankError(f"rank {rank} of {len(refusals)}: {refusal}")


def check_agreement(values: dict[str, object]) -> None:
    """Raises ValueError on all ranks, naming the first of the JSON ``values`` in which a rank
    differs from the first.
    """
    all_values = [json.loads(text) for text in gather_texts(json.dumps(values))]
    for name in values:
        first, *others = (theirs.get(name) for theirs in all_values)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ValueError(
                    f"{name}: got {first!r} on rank 0 and {other!r} on rank {rank}, expected one value"
                )


def _device() -> torch.device:
    kinds = [part.partition(":")[0] for part in str(dist.get_backend_config()).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _gather(mine: Tensor) -> Tensor:
    out = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(out, mine)
    return out
