"""Counter-based random numbers, the same on every backend: Philox4x32-10 (Salmon et al., SC 2011)
in integers of torch.

A kernel asks for the number at a logical position and gets what plain PyTorch computes here, bit
for bit, whatever the tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed () int64 from the device's generator: checkpointing and GradCache restore that, so
    they draw it again.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def uniform(seed: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32 in [0, 1): position (r, c) is the first word of Philox4x32-10 with
    counter (r, c, 0, 0).
    """
    counter = (
        torch.arange(rows, device=seed.device)[:, None],
        torch.arange(columns, device=seed.device)[None, :],
    )
    return _unit(_philox(seed, *torch.broadcast_tensors(*counter), 0)[0])


def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, stream: int = 0) -> Tensor:
    """What dropout keeps, ``shape`` bool: of row r (all dimensions but the last taken as one) and
    column c it is word c % 4 of Philox with counter (r, c // 4, stream, 0), as a number in [0, 1),
    that must be at least p."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    counters = -(-columns // 4)  # of a row
    # In one dimension, and no slice: a graph would hold for one width, or for those that 4 divides.
    at = torch.arange(rows * counters, device=seed.device)
    words = torch.stack(_philox(seed, at // counters, at % counters, stream), -1).flatten()
    first = torch.arange(rows, device=seed.device) * (4 * counters)
    return (_unit(words) >= p)[first[:, None] + torch.arange(columns, device=seed.device)].view(
        shape
    )


def _philox(
    seed: Tensor,
    c0: Tensor,
    c1: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, int64 in [0, 2^32), of each counter (c0, c1, stream, 0)."""
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        a, b = (
            0xD2511F53 * c0,
            0xCD9E8D57 * c2,
        )  # 64 bits hold the products of 32: int64 wraps around, bits are what they are
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _unit(word: Tensor) -> Tensor:
    """float32 in [0, 1) of a 32-bit word, as Triton makes it."""
    signed = torch.where(
        word > 0x7FFFFFFF, _WORD - word, word
    )  # a word below 0, read as signed, counts as -1 - word
    return signed.to(torch.float32) * 4.6566127342e-10  # a little less than 2^-31: never 1
