"""Counter-based random numbers, the same on every backend: Philox4x32-10 (Salmon et al., SC 2011) in integers of torch.

A kernel asks for the number at a logical position and gets what plain PyTorch computes here, bit for bit, whatever the tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed () int64 from the device's generator: checkpointing and GradCache restore that, so they draw it again."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def uniform(seed: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32 in [0, 1): position (r, c) is the first word of Philox4x32-10 with counter (r, c, 0, 0)."""
    counter = torch.arange(rows, device=seed.device)[:, None], torch.arange(columns, device=seed.device)[None, :]
    c0, c1, c2, c3 = *torch.broadcast_tensors(*counter), torch.zeros_like(counter[1]), torch.zeros_like(counter[1])
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits hold the products of 32: int64 wraps around, bits are what they are
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    signed = torch.where(c0 > 0x7FFFFFFF, _WORD - c0, c0)  # a 32-bit word below 0 counts as -1 - word
    return signed.to(torch.float32) * 4.6566127342e-10  # the largest float32 below 1 / (2^31 - 1): never 1
