"""Agreement between the processes of one training: they join, stop and fail together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mmfused.distributed import in_group
from mmfused.training.signals import StopRequest


class OtherRankError(RuntimeError):
    """Another rank failed; the message names it and quotes its error."""


def join_ranks(device: torch.device) -> tuple[int, int]:
    """Return (rank, world); under ``torchrun`` the process group is made first.

    It has gloo, and NCCL for CUDA: small messages go over the CPU, and need no device sync.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def leave_ranks() -> int:
    """Close the process group, if there is one, and return the rank that this process had."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def stop_together(stop: StopRequest) -> int | None:
    """Return, on all ranks, the signal that has reached any of them.

    Ranks act on the returned value, not on ``stop``: a signal may come at any time after, and
    counts at the next call.
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
    # A file's name may have lone surrogates.
    encoded = text.encode(errors="backslashreplace")
    data = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8).to(_device())
    sizes = _gather(torch.tensor([len(encoded)], device=data.device)).tolist()
    padded = data.new_zeros(max(1, *sizes))
    padded[: len(data)] = data
    parts = _gather(padded).view(len(sizes), -1).cpu()
    return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]


@contextmanager
def refused_together() -> Iterator[None]:
    """Raise on all ranks what is raised on one, so that none waits for it forever.

    The failing rank raises its own error, the others :class:`OtherRankError`. All ranks must enter
    the block, and an error in it must not keep a rank from an exchange that others wait for.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    refusals: list[str] = []
    if in_group():
        refused = torch.tensor(int(error is not None), device=_device())
        dist.all_reduce(refused, dist.ReduceOp.MAX)
        if refused:
            refusals = _gather_texts("" if error is None else f"{error}" or type(error).__name__)
    if error is not None:
        raise error
    for rank, refusal in enumerate(refusals):
        if refusal:
            raise OtherRankError(f"rank {rank} of {len(refusals)}: {refusal}")


def check_agreement(values: Mapping[str, object]) -> None:
    """Raise ValueError on all ranks, naming the first of the JSON ``values`` that differs."""
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
    dist.all_gather_into_tensor(out, mine)
    return out
