"""UniCA's cross-attention between image and text, in both directions (Bi-CA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmfused.ops.gated_cross_attention import BidirectionalGatedCrossAttention

if TYPE_CHECKING:
    from mmfused.models.unica import UniCAConfig


def _start_at_zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


class FeedForward(nn.Module):
    """LN(x + Drop(FFN(x))), or with ``pre_norm`` x + Drop(FFN(LN(x))), the identity at first."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.pre_norm: bool = pre_norm
        expand, contract = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.layers: nn.Sequential = nn.Sequential(expand, nn.GELU(), contract, nn.Dropout(dropout))
        if pre_norm:
            _start_at_zero(contract)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D) for x (B, N, D)."""
        return x + self.layers(self.norm(x)) if self.pre_norm else self.norm(x + self.layers(x))


class BiCA(nn.Module):
    """One block of cross-attention between image and text, in both directions."""

    image_ffn: FeedForward | None
    text_ffn: FeedForward | None

    def __init__(self, c: UniCAConfig) -> None:
        super().__init__()
        pre = c.bica_norm == "pre"
        self.attention: BidirectionalGatedCrossAttention = BidirectionalGatedCrossAttention(
            c.text_dim,
            c.bica_heads,
            share_weights=c.share_weights,
            gate="none",
            indicator=False,
            missing="skip",
            pre_norm=pre,
            dropout=c.dropout,
        )
        if pre:
            _start_at_zero(self.attention.to_a.out_proj)
            _start_at_zero(self.attention.to_b.out_proj)
        hidden = 4 * c.text_dim if c.ffn is None else c.ffn
        self.image_ffn, self.text_ffn = (
            None if "ffn" in c.without else FeedForward(c.text_dim, hidden, c.dropout, pre)
            for _ in range(2)
        )

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        ignore: Tensor,
        both: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the image and text tokens after cross-attention.

        Args:
            image: (B, N, D).
            text: (B, M, D).
            ignore: (B, M) bool, True = padded text token.
            both: (B,) bool, the samples with image and text. Other samples do not change.
        """
        image, text = self.attention(
            image, text, b_key_padding_mask=ignore, a_present=both, b_present=both
        )
        if self.image_ffn is None or self.text_ffn is None:
            return image, text
        both = both[:, None, None]
        image = torch.where(both, self.image_ffn(image), image)
        return image, torch.where(both, self.text_ffn(text), text)
