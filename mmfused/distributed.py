"""Communication between ranks for losses over the rows of all ranks.

Before any data, the ranks exchange a small message. If one rank cannot continue, all ranks raise an
error instead of waiting for data that never comes. Then each rank gathers the candidates of all
ranks. Column sums are added over ranks, and each candidate's gradient is returned to its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_TEXT_BYTES = 4096  # largest size of the settings, or of an error message, that is sent


def in_group() -> bool:
    """Return whether there is an initialised process group with several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- collectives ---------------------------------------------------------------------------------
# torch 2.14 warns about the old names; torch 2.11 has only those.


def gather_into(out: Tensor, x: Tensor) -> None:
    """Write the tensors ``x`` of all ranks, which have equal shapes, into ``out`` in rank order."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x)


def _reduce_scatter_into(out: Tensor, x: Tensor) -> None:
    """Add the tensors ``x`` of all ranks, and write this rank's part of the sum into ``out``."""
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, x)


# ---- agreement -----------------------------------------------------------------------------------


def report_error(op: str, error: Exception, near: object) -> None:
    """Send ``error`` to the other ranks, whose next exchange raises an error with its text.

    The caller must raise ``error`` on this rank.

    Args:
        op: name of the operator.
        error: the error.
        near: a tensor of the data, if there is one; NCCL exchanges messages on its device.
    """
    text = str(error).removeprefix(f"{op}: ") or type(error).__name__
    _exchange(op, near, sizes=[0, 0], text=text, failed=True)


def reported(op: str, error: Exception, near: object) -> Exception:
    """Send ``error`` to the other ranks, if there are any, and return it for the caller to raise.

    The arguments are those of :func:`report_error`.
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
    """Exchange a small message, and return the ``sizes`` of each rank.

    If some ranks have failed, the other ranks raise an error. If no rank has failed and the
    settings in ``text`` differ, all ranks raise an error.

    Args:
        op: name of the operator.
        near: a tensor of the data, if there is one; NCCL exchanges messages on its device.
        sizes: numbers of rows and of candidates on this rank.
        text: settings in lines ``name: got value``, or the error message if ``failed``.
        failed: whether this rank has failed.
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
        raise RuntimeError(f"{op}: rank {failing[0]} failed: {texts[failing[0]]}")
    first, second = (texts[rank].splitlines() for rank in (0, other[0]))
    line, theirs = next(pair for pair in zip(first, second, strict=False) if pair[0] != pair[1])
    raise ValueError(
        f"{op}: {line} on rank 0 and {theirs.partition(': got ')[2]} on rank {other[0]}, "
        "expected the same on all ranks"
    )


def _all_texts(data: bytes, lengths: list[int], device: torch.device) -> list[str]:
    """Return the text of each rank, given the lengths of all texts in bytes."""
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = _all_gather(padded.to(device)).tolist()
    texts = zip(rows, lengths, strict=True)
    return [bytes(row[:length]).decode(errors="replace") for row, length in texts]


def _all_gather(x: Tensor) -> Tensor:
    """Return the (n,) tensors of all W ranks as one (W, n) tensor."""
    out = x.new_empty(dist.get_world_size() * len(x))
    gather_into(out, x)
    return out.view(-1, len(x))


def _message_device(near: object) -> torch.device:
    """Return the device for small messages.

    The device type must be the same on all ranks, but the ranks' inputs may be on devices of
    different types. Therefore the CPU is used if the group supports it.
    """
    kinds = [part.partition(":")[0] for part in str(dist.get_backend_config()).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    if isinstance(near, Tensor) and near.device.type in kinds:
        return near.device
    return torch.device(kinds[0])


def gradient_needed(*tensors: object) -> str:
    """Return a text that tells whether one of ``tensors`` needs a gradient.

    The text is a setting that must agree on all ranks, because backward exchanges gradients.
    """
    needed = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )
    return "needed" if needed else "not needed (no_grad, or frozen)"


# ---- rows and sums -------------------------------------------------------------------------------


class Ranks:
    """Communication for one loss, in which each rank's rows are compared with all candidates.

    The candidates of all ranks are concatenated in rank order. Ranks may have different numbers of
    rows and candidates, including 0.

    Args:
        op: name of the operator, with which error messages begin.
        query: the rows of this rank.
        candidate: the candidates of this rank.
        share_gradients: whether candidates get gradients from the rows of all ranks ("global"), or
            only from the rows of their own rank ("local").
        settings: settings by name, which must be equal on all ranks, like dtype and device type.
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
        """Return the tensors ``x`` (candidates of the rank, ...) of all ranks, concatenated."""
        largest = max(self.candidates)
        if not largest:
            return x.clone()
        padded = x.new_zeros(largest, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(self.world * largest, *x.shape[1:])
        gather_into(out, padded)
        parts = zip(out.split(largest), self.candidates, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def own(self, x: Tensor) -> Tensor:
        """Return the rows of this rank's candidates in a tensor (all candidates, ...)."""
        return x[self.first_candidate : self.first_candidate + self.candidates[self.rank]]

    def return_gradient(self, x: Tensor) -> Tensor:
        """Return the gradient of this rank's candidates.

        Args:
            x: gradient of all candidates from the rows of this rank. If gradients are shared, the
                gradients from the rows of all ranks are added.
        """
        largest = max(self.candidates)
        if not self.share_gradients or not largest:
            return self.own(x)
        padded = x.new_zeros(self.world, largest, *x.shape[1:])
        for rank, part in enumerate(x.split(self.candidates)):
            padded[rank, : len(part)] = part
        out = x.new_empty(largest, *x.shape[1:])
        _reduce_scatter_into(out, padded.flatten(0, 1))
        return out[: self.candidates[self.rank]]

    def merge_columns(self, statistics: Tensor) -> Tensor:
        """Return statistics of all columns over the rows of all ranks.

        Args:
            statistics: (5, all candidates), over the rows of this rank: a logsumexp and four sums.
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
        """Return the coefficients of all columns, written in place.

        Args:
            coefficients: (4, all candidates), zero except in the columns of this rank.
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
    """Return the rows of all ranks, in rank order; ranks may have different numbers of rows, or 0.

    The gradient of a row is the sum of the row's gradients on all ranks. If every rank evaluates
    the same loss on all rows, and DDP averages the gradients over ranks, the result is therefore
    the gradient of a single process.

    Raises:
        ValueError: rows differ between ranks in shape, dtype, device type or the need for a
            gradient; the error is raised on all ranks.
    """
    if not in_group():
        return x
    if x.dim() == 0:
        error = ValueError("gather_rows: x: got a scalar, expected (rows, ...)")
        raise reported("gather_rows", error, x)
    settings = {"a row's shape": tuple(x.shape[1:]), "the rows' gradient": gradient_needed(x)}
    ranks = Ranks("gather_rows", x, x, share_gradients=True, settings=settings)
    return _GatherRows.apply(x, ranks) if x.is_floating_point() else ranks.gather(x)
