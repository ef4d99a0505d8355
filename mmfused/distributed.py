"""What ranks exchange for one loss over all their rows: first whether all can go on, then
candidates forward, their gradients back, and the column sums of both."""

from __future__ import annotations

from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST = 4096  # bytes of a sentence


def refuse(op: str, error: Exception, near: object) -> None:
    """Tell the other ranks, whose exchange raises and quotes ``error``, which the caller raises on
    this one.

    ``near``: a tensor of the data, if there is one: NCCL exchanges on its device.
    """
    text = str(error).removeprefix(f"{op}: ") or type(error).__name__
    _exchange(op, near, [0, 0], text, refused=True)


def _exchange(
    op: str,
    near: object,
    sizes: list[int],
    text: str,
    refused: bool = False,
) -> list[list[int]]:
    """Every rank's ``sizes``, in one small message. All ranks raise where one refuses, or has
    another ``text`` of settings: before any of them waits for data that the others do not send, or
    send in another shape."""
    data = text.encode(errors="backslashreplace")[:LONGEST]
    digest = int.from_bytes(blake2b(data, digest_size=7).digest(), "big")  # below 2^63
    mine = torch.tensor([refused, len(data), digest, *sizes], device=_device(near))
    told = _all_gather(mine).tolist()
    refusing = [rank for rank, (flag, *_) in enumerate(told) if flag]
    other = [rank for rank, (_, _, theirs, *_) in enumerate(told) if theirs != told[0][2]]
    if not refusing and not other:
        return [rest for _, _, _, *rest in told]
    padded = torch.zeros(max(length for _, length, *_ in told), dtype=torch.uint8)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = zip(_all_gather(padded.to(mine.device)).tolist(), told, strict=True)
    texts = [bytes(row[:length]).decode(errors="replace") for row, (_, length, *_) in rows]
    if refused:
        return []
    if refusing:
        raise RuntimeError(f"{op}: rank {refusing[0]} refused its inputs: {texts[refusing[0]]}")
    first, second = (texts[rank].splitlines() for rank in (0, other[0]))
    line, theirs = next(pair for pair in zip(first, second, strict=False) if pair[0] != pair[1])
    raise ValueError(
        f"{op}: {line} on rank 0 and {theirs.partition(' is ')[2]} on rank {other[0]}; it takes the same on all ranks."
    )


def _all_gather(x: Tensor) -> Tensor:
    """(n,) -> (W, n)."""
    out = x.new_empty(dist.get_world_size() * len(x))
    dist.all_gather_into_tensor(out, x)
    return out.view(-1, len(x))


def _device(near: object) -> torch.device:
    """Where small messages go: not where a rank's inputs happen to be, for the ranks must choose
    alike.
    """
    kinds = [part.partition(":")[0] for part in str(dist.get_backend_config()).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return (
        near.device
        if isinstance(near, Tensor) and near.device.type in kinds
        else torch.device(kinds[0])
    )


def gradient_needed(*tensors: object) -> str:
    """As a setting: backward exchanges gradients where they are needed, and so must all ranks or
    none.
    """
    needed = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )
    return "needed" if needed else "not needed (no_grad, or frozen)"


class Ranks:
    """Every rank keeps its own rows and sees the candidates of all, in rank order; ranks may hold
    unequal numbers of either, and 0.

    ``share_gradients``: candidates get gradients from every rank's rows ("global"), or from their
    own rank's alone ("local").
    ``settings``: what must be the same on all ranks, by name, beside dtype and device; all raise
    where it is not."""

    def __init__(
        self,
        op: str,
        query: Tensor,
        candidate: Tensor,
        share_gradients: bool,
        settings: dict[str, object],
    ):
        self.rank, self.world, self.share_gradients = (
            dist.get_rank(),
            dist.get_world_size(),
            share_gradients,
        )
        settings = {
            "the call": op,
            "dtype": candidate.dtype,
            "device": candidate.device.type,
            **settings,
        }
        text = "\n".join(f"{name} is {value}" for name, value in settings.items())
        counts = _exchange(op, candidate, [len(query), len(candidate)], text)
        self.rows, self.candidates = zip(*counts, strict=True)
        self.first_candidate = sum(self.candidates[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """(own candidates, ...) of every rank -> (all candidates, ...)."""
        largest = max(self.candidates)
        if not largest:
            return x.clone()
        padded = x.new_zeros(largest, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(self.world * largest, *x.shape[1:])
        dist.all_gather_into_tensor(out, padded)
        return torch.cat(
            [part[:count] for part, count in zip(out.split(largest), self.candidates, strict=True)]
        )

    def own(self, x: Tensor) -> Tensor:
        """The part of (all candidates, ...) that belongs to this rank."""
        return x[self.first_candidate : self.first_candidate + self.candidates[self.rank]]

    def return_gradient(self, x: Tensor) -> Tensor:
        """Gradient to all candidates from this rank's rows -> to its own candidates, from every
        rank's rows if shared.
        """
        largest = max(self.candidates)
        if not self.share_gradients or not largest:
            return self.own(x)
        padded = x.new_zeros(self.world, largest, *x.shape[1:])
        for rank, part in enumerate(x.split(self.candidates)):
            padded[rank, : len(part)] = part
        out = x.new_empty(largest, *x.shape[1:])
        dist.reduce_scatter_tensor(out, padded.flatten(0, 1))
        return out[: self.candidates[self.rank]]

    def merge_columns(self, statistics: Tensor) -> Tensor:
        """Statistics (5, all candidates) over this rank's rows -> over all rows: a logsumexp, and
        sums.
        """
        lse, sums = statistics[0], statistics[1:].contiguous()
        largest = lse.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        shift = largest.masked_fill(largest == float("-inf"), 0.0)
        total = (lse - shift).exp()
        dist.all_reduce(total)
        dist.all_reduce(sums)
        return torch.cat([(total.log() + shift)[None], sums])

    def share_columns(self, coefficients: Tensor) -> Tensor:
        """Coefficients (4, all candidates), zero but for this rank's columns -> everybody's, in
        place.
        """
        dist.all_reduce(coefficients)
        return coefficients

    def total(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x
