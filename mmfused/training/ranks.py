"""Let the ranks of one training join, stop and fail together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mmfused.distributed import gather_into, in_group
from mmfused.training.signals import StopRequest


class OtherRankError(RuntimeError):
    """Another rank failed; the message gives that rank and its error."""


def join_ranks(device: torch.device) -> tuple[int, int]:
    """Return the rank and the number of ranks; create the process group under ``torchrun``.

    On CUDA, the new group has NCCL for CUDA tensors and gloo for CPU tensors. In this group, the
    functions below exchange CPU tensors, so they do not wait for the GPU.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def leave_ranks() -> int:
    """Destroy the process group, if there is one, and return the rank that this process had."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def stop_together(stop: StopRequest) -> int | None:
    """Return the number of a signal that a rank has received, or None if no rank has.

    The result is the same on all ranks. Ranks must act on the result and not on ``stop``, which may
    differ between ranks.
    """
    if not in_group():
        return stop.signum
    signum = torch.tensor(stop.signum or 0, device=_device())
    dist.all_reduce(signum, dist.ReduceOp.MAX)
    return int(signum) or None


def _gather_texts(text: str) -> list[str]:
    """Return the texts of all ranks, in rank order."""
    if not in_group():
        return [text]
    # An error message may contain a file name with lone surrogates.
    encoded = text.encode(errors="backslashreplace")
    data = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8).to(_device())
    sizes = _gather(torch.tensor([len(encoded)], device=data.device)).tolist()
    padded = data.new_zeros(max(1, *sizes))
    padded[: len(data)] = data
    parts = _gather(padded).view(len(sizes), -1).cpu()
    return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise an error on all ranks if the block raises an Exception on one rank.

    A rank whose block failed raises its own error, and the other ranks raise
    :class:`OtherRankError`. If a rank raises a BaseException that is not an Exception, such as
    KeyboardInterrupt, the other ranks are not told. All ranks must enter the block. The block must
    not contain collective operations, in which other ranks would wait for a rank that failed.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages: list[str] = []
    if in_group():
        failed = torch.tensor(int(error is not None), device=_device())
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed:
            messages = _gather_texts("" if error is None else f"{error}" or type(error).__name__)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise OtherRankError(f"rank {rank} of {len(messages)}: {message}")


def check_agreement(values: Mapping[str, object]) -> None:
    """Raise ValueError on all ranks if one of the ``values`` differs between ranks.

    Args:
        values: JSON values by the name that the error message gives.
    """
    all_values = [json.loads(text) for text in _gather_texts(json.dumps(values))]
    for name in values:
        first, *others = (theirs.get(name) for theirs in all_values)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ValueError(
                    f"{name}: got {first!r} on rank 0 and {other!r} on rank {rank}, "
                    "expected one value"
                )


def _device() -> torch.device:
    kinds = [part.partition(":")[0] for part in str(dist.get_backend_config()).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _gather(mine: Tensor) -> Tensor:
    out = mine.new_empty(dist.get_world_size() * len(mine))
    gather_into(out, mine)
    return out
