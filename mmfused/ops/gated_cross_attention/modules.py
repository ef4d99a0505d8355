"""Gated cross-attention with its parameters, one direction or both, and FLUID's gate between two
equally long sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...children import read, read_norm, reset_children
from .checks import check_options
from .functional import bidirectional_gated_cross_attention, gated_cross_attention
from .reference import CrossAttentionWeights


class _Direction(nn.Module):
    """The parameters of one direction: q_proj, k_proj, v_proj, out_proj and, with a gate,
    gate_proj.
    """

    def __init__(self, dim: int, context_dim: int, gate: str, indicator: bool | str, bias: bool):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        width = 2 * dim + (1 if indicator else 0)
        self.dim, self.context_dim, self.gate_width = (
            dim,
            context_dim,
            dim if gate == "channel" else 1,
        )
        self.gate_proj = None if gate == "none" else nn.Linear(width, self.gate_width, bias=bias)

    def reset_parameters(self) -> None:
        """As torch begins the projections and norms."""
        reset_children(self)

    def weights(
        self,
        name: str = "GatedCrossAttention",
        device_type: str = "cpu",
    ) -> CrossAttentionWeights:
        """What the function takes, for a call on such a device; ``name`` of this direction, for
        errors.
        """
        weights, biases = [], []
        for part in ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj"):
            child = getattr(self, part)
            width = self.gate_width if part == "gate_proj" else self.dim
            absent = child is None and part == "gate_proj"
            pair = (None, None) if absent else read(child, f"{name}.{part}", width, device_type)
            weights.append(pair[0])
            biases.append(pair[1])
        return CrossAttentionWeights(*weights, *biases)

    forward = weights


class GatedCrossAttention(_Direction):
    """x reads context and a gate blends what it read into it: :func:`gated_cross_attention` and its
    parameters.

    Args: dim, context_dim: widths of x and of the context (default ``dim``); ``dim`` divides by
        ``num_heads``. gate: "channel", "token" or "none".  indicator: True, False or "batch".
        missing: "skip", "zero", "attend" or "constant". pre_norm: LayerNorms before the
        projections; False: one over ``x + A``, only with ``gate="none"`` (UniCA). bias: of all
        projections.  dropout: of probabilities and of what is read, in training. norm_eps: of the
        LayerNorms.

    Parameters: norm_x, norm_context (with pre_norm), q_proj, k_proj, v_proj, out_proj, gate_proj:
    columns for x, A, indicator."""

    def __init__(
        self,
        dim,
        num_heads,
        *,
        context_dim=None,
        gate="channel",
        indicator=True,
        missing="skip",
        pre_norm=True,
        bias=True,
        dropout=0.0,
        norm_eps=1e-5,
    ):
        _check(type(self).__name__, dim, num_heads, gate, indicator, missing, pre_norm, dropout)
        context_dim = dim if context_dim is None else context_dim
        super().__init__(dim, context_dim, gate, indicator, bias)
        self.options = dict(
            num_heads=num_heads,
            gate=gate,
            indicator=indicator,
            missing=missing,
            pre_norm=pre_norm,
            norm_eps=norm_eps,
        )
        self.dropout = dropout
        self.norm_x = nn.LayerNorm(dim, norm_eps)
        self.norm_context = nn.LayerNorm(context_dim, norm_eps) if pre_norm else None

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        context_key_padding_mask: Tensor | None = None,
        context_lengths: Tensor | None = None,
        context_present: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, dim), context (B, M, context_dim) -> (B, N, dim); the masks as in
        :func:`gated_cross_attention`.
        """
        device = _device_type(x)
        name, eps = "GatedCrossAttention", self.options["norm_eps"]
        return gated_cross_attention(
            x,
            context,
            self.weights(name, device),
            **self.options,
            norm_x=read_norm(self.norm_x, f"{name}.norm_x", self.dim, device, eps),
            norm_context=read_norm(
                self.norm_context, f"{name}.norm_context", self.context_dim, device, eps
            ),
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=dropout_seed,
            context_key_padding_mask=context_key_padding_mask,
            context_lengths=context_lengths,
            context_present=context_present,
        )

    def extra_repr(self) -> str:
        return (
            ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            + f", dropout={self.dropout}"
        )


class BidirectionalGatedCrossAttention(nn.Module):
    """a reads b and b reads a, in the same launches: :func:`bidirectional_gated_cross_attention`
    and its parameters.

    Options as :class:`GatedCrossAttention`'s; both sides are ``dim`` wide. ``share_weights``: one
    set of projections for both directions (LXMERT). Parameters: norm_a, norm_b, and to_a and to_b,
    each with q_proj, k_proj, v_proj, out_proj, gate_proj."""

    def __init__(
        self,
        dim,
        num_heads,
        *,
        share_weights=False,
        gate="channel",
        indicator=True,
        missing="skip",
        pre_norm=True,
        bias=True,
        dropout=0.0,
        norm_eps=1e-5,
    ):
        super().__init__()
        _check(type(self).__name__, dim, num_heads, gate, indicator, missing, pre_norm, dropout)
        self.options = dict(
            num_heads=num_heads,
            gate=gate,
            indicator=indicator,
            missing=missing,
            pre_norm=pre_norm,
            norm_eps=norm_eps,
        )
        self.dropout = dropout
        self.norm_a, self.norm_b = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.to_a = _Direction(dim, dim, gate, indicator, bias)
        self.to_b = self.to_a if share_weights else _Direction(dim, dim, gate, indicator, bias)

    def reset_parameters(self) -> None:
        """As torch begins the projections and norms."""
        reset_children(self)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        *,
        a_key_padding_mask: Tensor | None = None,
        a_lengths: Tensor | None = None,
        a_present: Tensor | None = None,
        b_key_padding_mask: Tensor | None = None,
        b_lengths: Tensor | None = None,
        b_present: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """a (B, N, dim), b (B, M, dim) -> a', b'; the masks as in
        :func:`bidirectional_gated_cross_attention`.
        """
        name, device = "BidirectionalGatedCrossAttention", _device_type(a)
        dim, eps = self.to_a.dim, self.options["norm_eps"]
        return bidirectional_gated_cross_attention(
            a,
            b,
            self._weights("to_a", device),
            self._weights("to_b", device),
            norm_a=read_norm(self.norm_a, f"{name}.norm_a", dim, device, eps),
            norm_b=read_norm(self.norm_b, f"{name}.norm_b", dim, device, eps),
            **self.options,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=dropout_seed,
            a_key_padding_mask=a_key_padding_mask,
            a_lengths=a_lengths,
            a_present=a_present,
            b_key_padding_mask=b_key_padding_mask,
            b_lengths=b_lengths,
            b_present=b_present,
        )

    def _weights(self, direction: str, device_type: str) -> CrossAttentionWeights:
        """By a call, so that what is on the direction itself acts."""
        child, name = getattr(self, direction), f"BidirectionalGatedCrossAttention.{direction}"
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            raise TypeError(
                f"{name} is sharded by itself; fully_shard takes the whole module, or its projections."
            )
        return CrossAttentionWeights(*child(name, device_type))

    def extra_repr(self) -> str:
        return (
            ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            + f", dropout={self.dropout}"
        )


class TokenGate(nn.Module):
    """FLUID's gate (arXiv 2508.07264, section 4.4): ``s a + (1 - s) b``, ``s = sigmoid(MLP([a ;
    b]))`` one scalar a token.

    a, b (B, l, dim) -> (B, l, dim); the MLP has ReLU and dropout after each of its ``hidden``
    layers. :meth:`share` gives s (B, l)."""

    def __init__(self, dim: int, hidden: Sequence[int] | None = None, dropout: float = 0.0):
        super().__init__()
        widths = (2 * dim, *((dim,) if hidden is None else hidden))
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def reset_parameters(self) -> None:
        """As torch begins its layers."""
        reset_children(self)

    def share(self, a: Tensor, b: Tensor) -> Tensor:
        """s (B, l), the share of a."""
        if a.shape != b.shape:
            raise ValueError(
                f"TokenGate: b: got shape {tuple(b.shape)}, expected {tuple(a.shape)}, as a has"
            )
        return self.mlp(torch.cat((a, b), -1)).sigmoid().squeeze(-1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        s = self.share(a, b)[..., None]
        return s * a + (1 - s) * b


def pack_passes(
    a: Tensor,
    b: Tensor,
    passes: Sequence[str] = ("both", "a", "b"),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several passes over the same pairs as one batch: (a, b, a_present, b_present), each
    ``len(passes)`` times as long.

    A pass "a" lacks b, "b" lacks a; what it lacks are zeros. UniECS encodes every item as "both",
    "a" and "b": give the packed batch to a :class:`BidirectionalGatedCrossAttention` and
    ``chunk(len(passes))`` what it returns: equal to one call a pass."""
    unknown = [name for name in passes if name not in ("both", "a", "b")]
    if unknown or not passes:
        raise ValueError(f"pack_passes: passes: got {tuple(passes)}, expected some of both, a, b")
    packed, present = [], []
    for x, other in ((a, "b"), (b, "a")):
        packed.append(torch.cat([torch.zeros_like(x) if name == other else x for name in passes]))
        present.append(
            torch.cat([x.new_full((len(x),), name != other, dtype=torch.bool) for name in passes])
        )
    return packed[0], packed[1], present[0], present[1]


def _device_type(x: object) -> str:
    return x.device.type if isinstance(x, Tensor) else "cpu"  # what is no tensor is refused later


def _check(name, dim, num_heads, gate, indicator, missing, pre_norm, dropout) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(
            f"{name}: num_heads is {num_heads}; it must be positive and divide dim = {dim}."
        )
    check_options(name, gate, indicator, missing, pre_norm, dropout=dropout)
