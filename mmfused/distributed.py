"""Exchanges between ranks: agreement before the data, rows of all ranks, gradients and sums.

A loss over the rows of all ranks first exchanges one small message, so that all ranks raise where
one of them cannot continue, instead of waiting for data that never comes. Then candidates go to
every rank, their gradients return, and column sums are reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_TEXT_BYTES = 4096  # of the settings, or of an error message, in an exchange


def in_group() -> bool:
    """Return whether this process is one of several in an initialised process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- agreement -----------------------------------------------------------------------------------


def report_error(op: str, error: Exception, near: object) -> None:
    """Send ``error`` to the other ranks, whose next exchange raises and quotes it.

    The caller raises ``error`` on this rank. ``near``: a tensor of the data, if there is one: NCCL
    exchanges on its device.
    """
    text = str(error).removeprefix(f"{op}: ") or type(error).__name__
    _exchange(op, near, sizes=[0, 0], text=text, failed=True)


def refused(op: str, error: Exception, near: object) -> Exception:
    """Return ``error`` for the caller to raise, after sending it to the other ranks of a group.

    Raise it before the next exchange of this rank: there all other ranks raise and quote it.
    """
    if in_group():
        report_error(op, error, near)
    return error


def _exchange(
    op: str,
    near: object,
    sizes: list[int],
    text: str,
    failed: bool = False,
) -> list[list[int]]:
    """Return the ``sizes`` of every rank, from one small message.

    All ranks raise where one has failed or has another ``text`` of settings: before any of them
    waits for data that the others do not send, or send in another shape. Lines of the text are
    ``name: got value``.
    """
    data = text.encode(errors="backslashreplace")[:MAX_TEXT_BYTES]
    digest = int.from_bytes(blake2b(data, digest_size=7).digest(), "big")  # below 2^63
    message = torch.tensor([failed, len(data), digest, *sizes], device=_message_device(near))
    messages = _all_gather(message).tolist()
    failing = [rank for rank, (flag, *_) in enumerate(messages) if flag]
    digests = [theirs for _, _, theirs, *_ in messages]
    other = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if not failing and not other:
        return [rest for _, _, _, *rest in messages]
    lengths = [length for _, length, *_ in messages]
    texts = _all_texts(data, lengths, message.device)
    if failed:
        return []
    if failing:
        raise RuntimeError(f"{op}: rank {failing[0]} refused its inputs: {texts[failing[0]]}")
    first, second = (texts[rank].splitlines() for rank in (0, other[0]))
    line, theirs = next(pair for pair in zip(first, second, strict=False) if pair[0] != pair[1])
    raise ValueError(
        f"{op}: {line} on rank 0 and {theirs.partition(': got ')[2]} on rank {other[0]}, "
        "expected the same on all ranks"
    )


def _all_texts(data: bytes, lengths: list[int], device: torch.device) -> list[str]:
    """Return the text of every rank; ``lengths``: in bytes."""
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = _all_gather(padded.to(device)).tolist()
    texts = zip(rows, lengths, strict=True)
    return [bytes(row[:length]).decode(errors="replace") for row, length in texts]


def _all_gather(x: Tensor) -> Tensor:
    """(n,) of each of W ranks -> (W, n)."""
    out = x.new_empty(dist.get_world_size() * len(x))
    dist.all_gather_into_tensor(out, x)
    return out.view(-1, len(x))


def _message_device(near: object) -> torch.device:
    """Return the device for small messages.

    It is the CPU where the group can use it, wherever a rank's inputs are: all ranks must choose
    the same one.
    """
    kinds = [part.partition(":")[0] for part in str(dist.get_backend_config()).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    if isinstance(near, Tensor) and near.device.type in kinds:
        return near.device
    return torch.device(kinds[0])


def gradient_needed(*tensors: object) -> str:
    """Describe, as a setting, whether one of ``tensors`` needs a gradient.

    Backward exchanges gradients where they are needed, so all ranks must need them, or none.
    """
    needed = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )
    return "needed" if needed else "not needed (no_grad, or frozen)"


# ---- rows and sums -------------------------------------------------------------------------------


class Ranks:
    """The ranks of one loss: each keeps its own rows and sees the candidates of all, in rank order.

    Ranks may hold unequal numbers of rows and of candidates, and 0.

    Args:
        op: the name that errors begin with.
        query: this rank's rows.
        candidate: this rank's candidates.
        share_gradients: candidates get gradients from the rows of every rank ("global"), or from
            those of their own rank only ("local").
        settings: what must be the same on all ranks beside dtype and device, by name; all ranks
            raise where it differs.
    """

    def __init__(
        self,
        op: str,
        query: Tensor,
        candidate: Tensor,
        share_gradients: bool,
        settings: Mapping[str, object],
    ) -> None:
        self.rank: int = dist.get_rank()
        self.world: int = dist.get_world_size()
        self.share_gradients = share_gradients
        shared = {"the call": op, "dtype": candidate.dtype, "device": candidate.device.type}
        text = "\n".join(f"{name}: got {value}" for name, value in {**shared, **settings}.items())
        counts = _exchange(op, candidate, sizes=[len(query), len(candidate)], text=text)
        self.rows: list[int] = [rows for rows, _ in counts]
        self.candidates: list[int] = [candidates for _, candidates in counts]
        self.first_candidate: int = sum(self.candidates[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """(own candidates, ...) of every rank -> (all candidates, ...)."""
        largest = max(self.candidates)
        if not largest:
            return x.clone()
        padded = x.new_zeros(largest, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(self.world * largest, *x.shape[1:])
        dist.all_gather_into_tensor(out, padded)
        parts = zip(out.split(largest), self.candidates, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def own(self, x: Tensor) -> Tensor:
        """Return the part of (all candidates, ...) that belongs to this rank."""
        return x[self.first_candidate : self.first_candidate + self.candidates[self.rank]]

    def return_gradient(self, x: Tensor) -> Tensor:
        """Gradient to all candidates from this rank's rows -> to its own candidates.

        The result sums over the rows of every rank if gradients are shared.
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
        """Statistics (5, all candidates) over this rank's rows -> over the rows of all ranks.

        The first is a logsumexp, the others are sums.
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
        """Add the coefficients (4, all candidates) of all ranks, in place.

        Each rank's are zero outside its own columns.
        """
        dist.all_reduce(coefficients)
        return coefficients

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over ranks."""
        x = x.clone()
        dist.all_reduce(x)
        return x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(x.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.ranks.return_gradient(gradient.contiguous()), None


def gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, in rank order; ranks may have unequally many, or none.

    The gradient is summed over the uses of a row on all ranks. A loss that every rank evaluates on
    all rows has, averaged over ranks as DDP does, the gradient of one process.

    Raises:
        ValueError: on all ranks, where the rows of one have another shape or dtype, or need a
            gradient while those of the others need none.
    """
    if not in_group():
        return x
    if x.dim() == 0:
        error = ValueError("gather_rows: x: got a scalar, expected (rows, ...)")
        raise refused("gather_rows", error, x)
    settings = {"a row's shape": tuple(x.shape[1:]), "the rows' gradient": gradient_needed(x)}
    ranks = Ranks("gather_rows", x, x, share_gradients=True, settings=settings)
    return _GatherRows.apply(x, ranks) if x.is_floating_point() else ranks.gather(x)
