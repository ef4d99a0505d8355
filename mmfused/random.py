"""Counter-based random numbers that are the same on every backend.

Philox4x32-10 (Salmon et al., SC 2011) in integer arithmetic of torch. A kernel computes the number
at a logical position and gets the same bits as this module, whatever its tiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, a () int64 tensor, from the generator of the device.

    Checkpointing and GradCache restore the generator's state, so they draw the same seed again.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def uniform(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) float32 numbers in [0, 1).

    The number at (r, c) is the first word of Philox4x32-10 with counter (r, c, 0, 0).
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    column = torch.arange(columns, device=seed.device)[None, :]
    c0, c1 = torch.broadcast_tensors(row, column)
    return _unit(_philox(seed, c0, c1, 0)[0])


def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, stream: int = 0) -> Tensor:
    """Return the dropout mask: a bool tensor of ``shape``, True = keep, with probability 1 - p.

    All dimensions but the last are flattened to rows. Element (r, c) uses word c % 4 of Philox with
    counter (r, c // 4, stream, 0), scaled to [0, 1), and is kept where that is at least p.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    counters = -(-columns // 4)  # in a row
    # One dimension and no slice: otherwise an exported graph would hold for one width only, or for
    # multiples of 4.
    at = torch.arange(rows * counters, device=seed.device)
    words = torch.stack(_philox(seed, at // counters, at % counters, stream), -1).flatten()
    first = torch.arange(rows, device=seed.device) * (4 * counters)
    index = first[:, None] + torch.arange(columns, device=seed.device)
    return (_unit(words) >= p)[index].view(shape)


def _philox(
    seed: Tensor,
    c0: Tensor,
    c1: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words, int64 in [0, 2^32), of each counter (c0, c1, stream, 0)."""
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # Products of 32-bit numbers in 64 bits: int64 wraps around and keeps the right bits.
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
    """Convert 32-bit words to float32 in [0, 1), as Triton does."""
    # Read as a signed number, a word with its highest bit set is negative: it counts as -1 - word.
    signed = torch.where(word > 0x7FFFFFFF, _WORD - word, word)
    return signed.to(torch.float32) * 4.6566127342e-10  # a little less than 2^-31: never 1
