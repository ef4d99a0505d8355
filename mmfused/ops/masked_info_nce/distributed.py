"""What ranks exchange for one loss over all their rows: candidates forward, their gradients back, and the column sums of both."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Every rank keeps its own rows and sees the candidates of all, in rank order; ranks may hold unequal numbers of either.

    ``share_gradients``: candidates get gradients from every rank's rows ("global"), or from their own rank's alone ("local").
    """

    def __init__(self, query: Tensor, candidate: Tensor, share_gradients: bool):
        self.rank, self.world, self.share_gradients = dist.get_rank(), dist.get_world_size(), share_gradients
        mine = torch.tensor([len(query), len(candidate)], device=query.device)
        counts = torch.empty(2 * self.world, dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(counts, mine)
        self.rows, self.candidates = counts.view(self.world, 2).T.tolist()
        self.first_candidate = sum(self.candidates[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """(own candidates, ...) of every rank -> (all candidates, ...)."""
        largest = max(self.candidates)
        padded = x.new_zeros(largest, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(self.world * largest, *x.shape[1:])
        dist.all_gather_into_tensor(out, padded)
        return torch.cat([part[:count] for part, count in zip(out.split(largest), self.candidates, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        """The part of (all candidates, ...) that belongs to this rank."""
        return x[self.first_candidate : self.first_candidate + self.candidates[self.rank]]

    def return_gradient(self, x: Tensor) -> Tensor:
        """Gradient to all candidates from this rank's rows -> to its own candidates, from every rank's rows if shared."""
        if not self.share_gradients:
            return self.own(x)
        largest = max(self.candidates)
        padded = x.new_zeros(self.world, largest, *x.shape[1:])
        for rank, part in enumerate(x.split(self.candidates)):
            padded[rank, : len(part)] = part
        out = x.new_empty(largest, *x.shape[1:])
        dist.reduce_scatter_tensor(out, padded.flatten(0, 1))
        return out[: self.candidates[self.rank]]

    def merge_columns(self, statistics: Tensor) -> Tensor:
        """Statistics (5, all candidates) over this rank's rows -> over all rows: a logsumexp, and sums."""
        lse, sums = statistics[0], statistics[1:].contiguous()
        largest = lse.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        shift = largest.masked_fill(largest == float("-inf"), 0.0)
        total = (lse - shift).exp()
        dist.all_reduce(total)
        dist.all_reduce(sums)
        return torch.cat([(total.log() + shift)[None], sums])

    def share_columns(self, coefficients: Tensor) -> Tensor:
        """Coefficients (4, all candidates), zero but for this rank's columns -> everybody's, in place."""
        dist.all_reduce(coefficients)
        return coefficients

    def total(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x
