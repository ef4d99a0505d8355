"""The layers that the benchmark of gated cross-attention compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfused

from .gated_cross_attention_cases import Case, present


class Softmax(nn.Module):
    """Multi-head attention with a Linear for each projection, and an explicit softmax."""

    def __init__(self, dim: int, num_heads: int, p: float) -> None:
        super().__init__()
        self.num_heads, self.drop = num_heads, nn.Dropout(p)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.q(x), self.k(context), self.v(context))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in parts)
        probs = self.drop((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1))
        return self.o((probs @ v).transpose(1, 2).flatten(2))


class Plain(nn.Module):
    """The layer of UniECS or UniCA, with a Linear for each projection.

    The gate's input is the concatenation of x, the attention output and the presence flag.
    """

    present_a: Tensor | None
    present_b: Tensor | None

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        self.case, dim = case, case.D
        for side, is_present in zip("ab", present(case, device), strict=True):
            self.register_buffer(f"present_{side}", is_present)
            self.add_module(f"norm_{side}", nn.LayerNorm(dim))
            self.add_module(f"attention_{side}", self.attention())
            if not case.post_norm:
                self.add_module(f"gate_{side}", nn.Linear(2 * dim + 1, dim))
        self.drop = nn.Dropout(case.p)

    def attention(self) -> nn.Module:
        return Softmax(self.case.D, self.case.H, self.case.p)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        sides = {"a": a, "b": b}
        normed = sides
        if not self.case.post_norm:
            normed = {side: getattr(self, f"norm_{side}")(x) for side, x in sides.items()}
        outs = []
        for side, other in ("ab", "ba"):
            x = sides[side]
            attention = getattr(self, f"attention_{side}")
            attn_out = self.drop(self.attend(attention, normed[side], normed[other]))
            out = self.blend(side, x, attn_out, getattr(self, f"present_{other}"))
            if self.present_a is not None and self.present_b is not None:
                out = torch.where((self.present_a & self.present_b)[:, None, None], out, x)
            outs.append(out)
        return torch.cat(outs, 1)

    def attend(self, attention: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return attention(x, context)

    def blend(self, side: str, x: Tensor, attn_out: Tensor, is_present: Tensor | None) -> Tensor:
        if self.case.post_norm:
            return getattr(self, f"norm_{side}")(x + attn_out)
        flag = x.new_ones(len(x)) if is_present is None else is_present.to(x)
        parts = [x, attn_out, flag[:, None, None].expand(-1, x.shape[1], 1)]
        g = torch.sigmoid(getattr(self, f"gate_{side}")(torch.cat(parts, -1)))
        return g * attn_out + (1 - g) * x


class WithMultiheadAttention(Plain):
    """``Plain`` with nn.MultiheadAttention instead of ``Softmax``."""

    def attention(self) -> nn.Module:
        return nn.MultiheadAttention(
            self.case.D, self.case.H, dropout=self.case.p, batch_first=True
        )

    def attend(self, attention: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return attention(x, context, context, need_weights=False)[0]


class Merged(nn.Module):
    """The layer with fewer GEMMs, and without a concatenation of the gate's inputs.

    One GEMM per modality computes the queries of one direction, and the keys and values of the
    other direction.

    ``attend(q, k, v, p)``: attention on tensors (B, tokens, H, D / H) with dropout p.
    ``gathered``: compute only the samples that have both modalities.
    ``blend(x, attn_out, logits)``: sigmoid and blend of the gate, by default with torch.lerp.
    """

    both: Tensor | None

    def __init__(
        self,
        case: Case,
        device: torch.device,
        attend: Callable[..., Tensor],
        gathered: bool = False,
        blend: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.case, self.attend, self.gathered = case, attend, gathered
        self.blend = blend or (lambda x, attn_out, logits: x.lerp(attn_out, logits.sigmoid()))
        dim = case.D
        for side in "ab":
            self.add_module(f"norm_{side}", nn.LayerNorm(dim))
            self.add_module(f"qkv_{side}", nn.Linear(dim, 3 * dim))
            self.add_module(f"out_{side}", nn.Linear(dim, dim))
            if not case.post_norm:
                self.add_module(f"gate_{side}", nn.Linear(dim, dim))
                self.add_module(f"gate_read_{side}", nn.Linear(dim, dim, bias=False))
                self.add_module(f"gate_flag_{side}", nn.Linear(1, dim, bias=False))
        present_a, present_b = present(case, device)
        both = None if present_a is None or present_b is None else present_a & present_b
        self.register_buffer("both", both)
        self.drop = nn.Dropout(case.p)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.both is None:
            return torch.cat(self.layer(a, b), 1)
        if not self.gathered:
            both = self.both[:, None, None]
            pairs = zip(self.layer(a, b), (a, b), strict=True)
            return torch.cat([torch.where(both, out, x) for out, x in pairs], 1)
        index = self.both.nonzero().squeeze(1)
        outs = self.layer(a.index_select(0, index), b.index_select(0, index))
        pairs = zip(outs, (a, b), strict=True)
        return torch.cat([x.index_copy(0, index, out) for out, x in pairs], 1)

    def layer(self, a: Tensor, b: Tensor) -> list[Tensor]:
        heads, post_norm = self.case.H, self.case.post_norm
        parts = []
        for x, side in ((a, "a"), (b, "b")):
            normed = x if post_norm else getattr(self, f"norm_{side}")(x)
            qkv = getattr(self, f"qkv_{side}")(normed)
            parts.append(qkv.unflatten(-1, (3, heads, -1)).unbind(2))
        (q_a, k_a, v_a), (q_b, k_b, v_b) = parts
        p = self.case.p if self.training else 0.0
        attn_a = self.attend(q_a, k_b, v_b, p).flatten(2)
        attn_b = self.attend(q_b, k_a, v_a, p).flatten(2)
        return [self.finish("a", a, attn_a), self.finish("b", b, attn_b)]

    def finish(self, side: str, x: Tensor, attended: Tensor) -> Tensor:
        attn_out = self.drop(getattr(self, f"out_{side}")(attended))
        if self.case.post_norm:
            return getattr(self, f"norm_{side}")(x + attn_out)
        gate = getattr(self, f"gate_{side}")
        # The presence flag is 1, because outputs of samples that lack a modality are not used.
        bias = gate.bias + getattr(self, f"gate_flag_{side}").weight[:, 0]
        logits = F.linear(x, gate.weight, bias) + getattr(self, f"gate_read_{side}")(attn_out)
        return self.blend(x, attn_out, logits)


class Ours(nn.Module):
    """The library's layer, with its outputs concatenated."""

    present_a: Tensor | None
    present_b: Tensor | None

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        options: dict[str, Any] = {"gate": "none", "pre_norm": False} if case.post_norm else {}
        self.layer = mmfused.BidirectionalGatedCrossAttention(
            case.D, case.H, dropout=case.p, **options
        )
        for side, is_present in zip("ab", present(case, device), strict=True):
            self.register_buffer(f"present_{side}", is_present)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        outs = self.layer(a, b, a_present=self.present_a, b_present=self.present_b)
        return torch.cat(outs, 1)
