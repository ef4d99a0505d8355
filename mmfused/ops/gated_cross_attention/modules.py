"""Modules for gated cross-attention, and FLUID's gate between two sequences of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from ...children import read, read_norm, reset_children
from .checks import check_num_heads, check_options
from .functional import bidirectional_gated_cross_attention, gated_cross_attention
from .reference import CrossAttentionWeights, Gate, Indicator, Missing


class ModuleOptions(TypedDict):
    """The options of a module that are passed to the function in every call."""

    num_heads: int
    gate: Gate
    indicator: Indicator
    missing: Missing
    pre_norm: bool
    norm_eps: float


class _Direction(nn.Module):
    """The parameters of one direction: q_proj, k_proj, v_proj, out_proj, and gate_proj if gated."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        gate: Gate,
        indicator: Indicator,
        bias: bool,
    ) -> None:
        super().__init__()
        self.q_proj: nn.Linear = nn.Linear(dim, dim, bias=bias)
        self.k_proj: nn.Linear = nn.Linear(context_dim, dim, bias=bias)
        self.v_proj: nn.Linear = nn.Linear(context_dim, dim, bias=bias)
        self.out_proj: nn.Linear = nn.Linear(dim, dim, bias=bias)
        width = 2 * dim + (1 if indicator else 0)
        self.dim = dim
        self.context_dim = context_dim
        self.gate_width: int = dim if gate == "channel" else 1
        self.gate_proj: nn.Linear | None = (
            None if gate == "none" else nn.Linear(width, self.gate_width, bias=bias)
        )

    def reset_parameters(self) -> None:
        """Reset projections and norms as torch does."""
        reset_children(self)

    def weights(
        self,
        name: str = "GatedCrossAttention",
        device_type: str = "cpu",
    ) -> CrossAttentionWeights:
        """Return the weights as :func:`gated_cross_attention` takes them.

        Args:
            name: name of this direction in error messages.
            device_type: device type of the tokens, for autocast.
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
    """Let x attend to a context, and blend x and the result with a gate.

    Holds the parameters of :func:`gated_cross_attention`: norm_x, norm_context (with pre_norm),
    q_proj, k_proj, v_proj, out_proj and gate_proj. The input of gate_proj is the concatenation of
    x, the attention output A, and the indicator.

    Args:
        dim: width of x and of the output; a multiple of ``num_heads``.
        num_heads: number of attention heads.
        context_dim: width of the context, default ``dim``.
        gate, indicator, missing: as in :func:`gated_cross_attention`.
        pre_norm: True: normalise x and the context before the projections. False: normalise the sum
            ``x + A`` instead (UniCA); needs ``gate="none"``.
        bias: whether the projections have biases.
        dropout: dropout rate of the attention probabilities and of A in training, in [0, 1).
        norm_eps: epsilon of the LayerNorms.

    Raises:
        TypeError, ValueError: bad arguments.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.GatedCrossAttention(16, num_heads=2, context_dim=24)
        >>> text, image = torch.randn(2, 5, 16), torch.randn(2, 9, 24)
        >>> has_image = torch.tensor([True, False])
        >>> out = layer(text, image, context_present=has_image)
        >>> out.shape
        torch.Size([2, 5, 16])
        >>> torch.equal(out[1], text[1])  # unchanged, as this sample has no image
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        gate: Gate = "channel",
        indicator: Indicator = True,
        missing: Missing = "skip",
        pre_norm: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        check_num_heads(type(self).__name__, num_heads, dim)
        check_options(type(self).__name__, gate, indicator, missing, pre_norm, dropout=dropout)
        context_dim = dim if context_dim is None else context_dim
        super().__init__(dim, context_dim, gate, indicator, bias)
        self.options: ModuleOptions = ModuleOptions(
            num_heads=num_heads,
            gate=gate,
            indicator=indicator,
            missing=missing,
            pre_norm=pre_norm,
            norm_eps=norm_eps,
        )
        self.dropout = dropout
        self.norm_x: nn.LayerNorm = nn.LayerNorm(dim, norm_eps)
        self.norm_context: nn.LayerNorm | None = (
            nn.LayerNorm(context_dim, norm_eps) if pre_norm else None
        )

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
        """Return the output (B, N, dim).

        Args:
            x: (B, N, dim).
            context: (B, M, context_dim).
            context_key_padding_mask: (B, M) bool, True = ignore.
            context_lengths: (B,) int, the number of tokens that count; an alternative to the mask.
            context_present: (B,) bool, default all True.
            dropout_seed: see :func:`gated_cross_attention`.
        """
        device = _device_type(x)
        name, eps = "GatedCrossAttention", self.options["norm_eps"]
        norm_context = read_norm(
            self.norm_context,
            f"{name}.norm_context",
            self.context_dim,
            device,
            eps,
        )
        return gated_cross_attention(
            x,
            context,
            self.weights(name, device),
            **self.options,
            norm_x=read_norm(self.norm_x, f"{name}.norm_x", self.dim, device, eps),
            norm_context=norm_context,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=dropout_seed,
            context_key_padding_mask=context_key_padding_mask,
            context_lengths=context_lengths,
            context_present=context_present,
        )

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return _repr(self.options, self.dropout)


class BidirectionalGatedCrossAttention(nn.Module):
    """Let a attend to b and b attend to a, in the same kernel launches.

    Holds the parameters of :func:`bidirectional_gated_cross_attention`: norm_a, norm_b, and the
    submodules to_a and to_b, each with q_proj, k_proj, v_proj, out_proj and gate_proj.

    Args:
        dim: width of both sides; a multiple of ``num_heads``.
        num_heads: number of attention heads.
        share_weights: whether to_a and to_b are one module (LXMERT).
        gate, indicator, missing, pre_norm, bias, dropout, norm_eps: as in
            :class:`GatedCrossAttention`.

    Raises:
        TypeError, ValueError: bad arguments.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.BidirectionalGatedCrossAttention(16, num_heads=2)
        >>> image, text = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
        >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])  # True = ignore
        >>> new_image, new_text = layer(image, text, b_key_padding_mask=padding)
        >>> new_image.shape, new_text.shape
        (torch.Size([2, 9, 16]), torch.Size([2, 5, 16]))
        >>> torch.equal(new_text[padding], text[padding])  # ignored tokens do not change
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        share_weights: bool = False,
        gate: Gate = "channel",
        indicator: Indicator = True,
        missing: Missing = "skip",
        pre_norm: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_num_heads(type(self).__name__, num_heads, dim)
        check_options(type(self).__name__, gate, indicator, missing, pre_norm, dropout=dropout)
        self.options: ModuleOptions = ModuleOptions(
            num_heads=num_heads,
            gate=gate,
            indicator=indicator,
            missing=missing,
            pre_norm=pre_norm,
            norm_eps=norm_eps,
        )
        self.dropout = dropout
        self.norm_a: nn.LayerNorm = nn.LayerNorm(dim, norm_eps)
        self.norm_b: nn.LayerNorm = nn.LayerNorm(dim, norm_eps)
        self.to_a: _Direction = _Direction(dim, dim, gate, indicator, bias)
        self.to_b: _Direction = (
            self.to_a if share_weights else _Direction(dim, dim, gate, indicator, bias)
        )

    def reset_parameters(self) -> None:
        """Reset projections and norms as torch does."""
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
        """Return the outputs for a (B, N, dim) and b (B, M, dim).

        Args:
            a: (B, N, dim).
            b: (B, M, dim).
            a_key_padding_mask: (B, N) bool, True = ignore.
            b_key_padding_mask: (B, M) bool, True = ignore.
            a_lengths, b_lengths: (B,) int, the number of tokens that count; an alternative to the
                masks.
            a_present, b_present: (B,) bool, default all True.
            dropout_seed: see :func:`gated_cross_attention`.
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

    def _weights(
        self, direction: Literal["to_a", "to_b"], device_type: str
    ) -> CrossAttentionWeights:
        # Call the direction as a module, so that its hooks run.
        child = getattr(self, direction)
        name = f"BidirectionalGatedCrossAttention.{direction}"
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            raise TypeError(
                f"{name}: got a sharded module, expected fully_shard on the whole "
                "BidirectionalGatedCrossAttention, or on its projections"
            )
        return CrossAttentionWeights(*child(name, device_type))

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return _repr(self.options, self.dropout)


class TokenGate(nn.Module):
    """FLUID's gate between two sequences: ``s a + (1 - s) b`` with one scalar s per token.

    ``s = sigmoid(MLP([a ; b]))``, where the MLP has ReLU and dropout after each hidden layer.

    Args:
        dim: width of the tokens.
        hidden: widths of the hidden layers, default ``(dim,)``.
        dropout: dropout rate after each hidden layer in training.

    Source: FLUID (arXiv 2508.07264), section 4.4.

    Examples:
        >>> import torch, mmfused
        >>> gate = mmfused.TokenGate(16)
        >>> image, text = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
        >>> s = gate.share(image, text)[..., None]  # between 0 and 1
        >>> torch.allclose(gate(image, text), s * image + (1 - s) * text)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = (2 * dim, *((dim,) if hidden is None else hidden))
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.mlp: nn.Sequential = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def reset_parameters(self) -> None:
        """Reset the layers as torch does."""
        reset_children(self)

    def share(self, a: Tensor, b: Tensor) -> Tensor:
        """Return s (B, l), the weight of a."""
        if a.shape != b.shape:
            raise ValueError(
                f"TokenGate: b: got shape {tuple(b.shape)}, expected {tuple(a.shape)}, as a has"
            )
        return self.mlp(torch.cat((a, b), -1)).sigmoid().squeeze(-1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the blend of a and b, each (B, l, dim)."""
        s = self.share(a, b)[..., None]
        return s * a + (1 - s) * b


def pack_passes(
    a: Tensor,
    b: Tensor,
    passes: Sequence[Literal["both", "a", "b"]] = ("both", "a", "b"),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack several passes over the pairs (a, b) into one batch.

    In the pass "both", both sides are present. In the pass "a", side b is absent and set to zeros.
    In the pass "b", side a is absent and set to zeros. UniECS encodes every item in these three
    passes. Call a :class:`BidirectionalGatedCrossAttention` on the packed batch, and split each
    output with ``chunk(len(passes))``.

    Args:
        a: (B, N, dim).
        b: (B, M, dim).
        passes: the passes to pack, each "both", "a" or "b".

    Returns:
        a, b, a_present and b_present, each with ``len(passes) * B`` samples.

    Raises:
        ValueError: ``passes`` is empty or has an unknown name.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.BidirectionalGatedCrossAttention(16, num_heads=2, missing="constant")
        >>> image, text = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
        >>> a, b, a_present, b_present = mmfused.pack_passes(image, text)
        >>> new_a, new_b = layer(a, b, a_present=a_present, b_present=b_present)
        >>> of_both, of_image, of_text = new_a.chunk(3)
        >>> torch.allclose(of_both, layer(image, text)[0], atol=1e-5)
        True
    """
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
    return x.device.type if isinstance(x, Tensor) else "cpu"  # the function rejects other objects


def _repr(options: ModuleOptions, dropout: float) -> str:
    named = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{named}, dropout={dropout}"
