"""Work that the ranks of one node divide among themselves, for :mod:`.warmup`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..distributed import in_group

_T = TypeVar("_T")


def all_ranks(work: Callable[[], _T]) -> list[_T]:
    """Do ``work`` on each rank, and return the results of all ranks, which wait for each other.

    If it fails on a rank, all ranks raise an error. The results must be picklable.
    """
    if not in_group():
        return [work()]
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (None if error is None else str(error), result))
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed: {message}")
    return [result for _, result in everyone]


def own_part(keys_of: Callable[[], set[str]]) -> set[str]:
    """Return the keys that this rank is to work on, of those that ``keys_of`` returns on its node.

    Each key goes to one of the ranks of the node that have it.
    """
    host = socket.gethostname()
    everyone = all_ranks(lambda: (host, keys_of()))
    held = [theirs if name == host else set() for name, theirs in everyone]
    rank = dist.get_rank() if in_group() else 0
    own = set()
    for number, key in enumerate(sorted(set().union(*held))):
        holders = [other for other, theirs in enumerate(held) if key in theirs]
        if holders[number % len(holders)] == rank:
            own.add(key)
    return own


def cores() -> int:
    """Return this rank's share of the cores of its node."""
    count = getattr(os, "sched_getaffinity", None)
    cores = len(count(0)) if count else os.cpu_count() or 1
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if in_group() else 1
    return max(1, cores // sharing)
