"""Counter-based random numbers that are the same on every backend.

This is Philox4x32-10 (Salmon et al., SC 2011) in torch's integer arithmetic. Each number depends
only on the seed and its position, so kernels get the same bits as this module for any tile size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """Return a random seed, a () int64 tensor, from the default generator of the device.

    Activation checkpointing and GradCache restore the generator's state, so their second forward
    pass gets the same seed.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def uniform(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) float32 numbers in [0, 1).

    The number at (r, c) is the first word of Philox with counter (r, c, 0, 0), scaled to [0, 1).
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    column = torch.arange(columns, device=seed.device)[None, :]
    c0, c1 = torch.broadcast_tensors(row, column)
    return _unit(_philox(seed, c0, c1, 0)[0])


def keep_mask(
    seed: Tensor,
    shape: tuple[int, ...],
    p: float,
    stream: int = 0,
) -> Tensor:
    """Return a dropout mask, a bool tensor of ``shape`` that is True with probability 1 - p.

    True means that the value is kept. All dimensions but the last are flattened to rows. The value
    at (r, c) is True if word c % 4 of Philox with counter (r, c // 4, stream, 0), scaled to [0, 1),
    is at least p.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    counters = -(-columns // 4)  # number of counters per row
    # The words are computed in one dimension and indexed. With a second dimension and a slice, an
    # exported graph would be valid for one width only, or for multiples of 4.
    at = torch.arange(rows * counters, device=seed.device)
    words = torch.stack(_philox(seed, at // counters, at % counters, stream), -1).flatten()
    row_start = torch.arange(rows, device=seed.device) * (4 * counters)
    index = row_start[:, None] + torch.arange(columns, device=seed.device)
    return (_unit(words) >= p)[index].view(shape)


def _philox(
    seed: Tensor,
    c0: Tensor,
    c1: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of each counter (c0, c1, stream, 0), as int64 in [0, 2^32)."""
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The products need 64 unsigned bits. int64 overflows, but its bits are the same.
        a = 0xD2511F53 * c0
        b = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _unit(word: Tensor) -> Tensor:
    """Convert 32-bit words to float32 in [0, 1), like Triton's ``uint_to_uniform_float``."""
    # A word x with the highest bit set is a negative int32, which Triton maps to -x - 1.
    folded = torch.where(word > 0x7FFFFFFF, _WORD - word, word)
    return folded.to(torch.float32) * 4.6566127342e-10  # slightly less than 2^-31, so never 1
