"""Parts of UniECS: a block of self-attention, and the pooling of a modality's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward part, each scaled by a learnable scalar."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads: int = num_heads
        self.dropout: float = dropout
        self.norm1: nn.LayerNorm = nn.LayerNorm(dim)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim)
        self.q_proj: nn.Linear = nn.Linear(dim, dim)
        self.k_proj: nn.Linear = nn.Linear(dim, dim)
        self.v_proj: nn.Linear = nn.Linear(dim, dim)
        self.out_proj: nn.Linear = nn.Linear(dim, dim)
        self.ffn: nn.Sequential = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.gamma1: nn.Parameter = nn.Parameter(torch.ones(()))
        self.gamma2: nn.Parameter = nn.Parameter(torch.ones(()))
        self.drop: nn.Dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        """Return (B, N, D) for x (B, N, D); ``ignore`` (B, N) bool masks keys."""
        normed = self.norm1(x)
        q, k, v = (
            proj(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = None if ignore is None else ~ignore[:, None, None]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        x = x + self.gamma1 * self.drop(self.out_proj(out.transpose(1, 2).flatten(2)))
        return x + self.gamma2 * self.ffn(self.norm2(x))


class Pool(nn.Module):
    """tanh(Linear(LN(mean of the tokens that are not ignored)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.linear: nn.Linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        """Return (B, D) for x (B, N, D); ``ignore`` (B, N) bool masks tokens."""
        if ignore is None:
            mean = x.mean(1)
        else:
            mean = x.masked_fill(ignore[..., None], 0).sum(1) / (~ignore).sum(1, keepdim=True)
        return self.linear(self.norm(mean)).tanh()
