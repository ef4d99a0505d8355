"""Gated cross-attention: one modality attends to another, and a gate blends tokens and result.

    A  = Drop(MHA(q = LN_x(x), k = v = LN_c(context)) W_o^T + b_o)
    g  = sigmoid([x ; A ; e] W_g^T + b_g)
    x' = g * A + (1 - g) * x

x are the tokens of a modality, A is the attention output, g the gate and x' the result. MHA is
multi-head attention with projections of q, k and v. The indicator e is 1 if the context is present,
else 0, and [ ; ] concatenates. The gate has one number for each channel or for each token. The x in
g and x' is not normalised. Dropout also acts on the attention probabilities. UniECS uses this block
(arXiv 2508.13843). UniCA (arXiv 2606.28350) has no gate, and normalises the sum instead of x and
context: x' = LN_x(x + A).

In the bidirectional form, a attends to b, and b attends to a, not to the output for a. The kernels
compute both directions in the same launches. LayerNorm is folded into the projections. One launch
computes all queries, keys and values; later launches compute the attention, A, and gate and x'. No
kernel concatenates x, A and e. Instead, with W_gx, W_ga and w_e the columns of W_g for x, A and e,

    [x ; A ; e] W_g^T = x W_gx^T + A W_ga^T + e w_e^T

FLOPs per sample for both directions, with N_a and N_b tokens of width D and a gate per channel:
12 (N_a + N_b) D^2 + 8 N_a N_b D forward. Backward needs twice as many FLOPs, plus the FLOPs to
recompute the attention's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...children import Called, layer_norm, linear
from ...random import draw_seed, keep_mask
from .._common import masked_softmax, padding_mask

Gate = Literal["channel", "token", "none"]
Indicator = bool | Literal["batch"]
Missing = Literal["skip", "zero", "attend", "constant"]
Norm = Sequence[Tensor]  # weight and bias


class CrossAttentionWeights(NamedTuple):
    """Weights and biases of one direction, with the shapes of ``nn.Linear``; biases may be None.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.GatedCrossAttention(16, num_heads=2, context_dim=24)
        >>> weights = layer.weights()
        >>> weights.w_k.shape  # from 24 channels of the context to 16
        torch.Size([16, 24])
        >>> weights.w_g.shape  # a gate per channel, from x, A and the indicator
        torch.Size([16, 33])
    """

    w_q: Tensor | Called  # (D, D), for x
    w_k: Tensor | Called  # (D, Dc), for the context
    w_v: Tensor | Called  # (D, Dc), for the context
    w_o: Tensor | Called  # (D, D), for the output
    # (D or 1, 2D or 2D + 1): columns for x, A and the indicator; None without a gate
    w_g: Tensor | Called | None = None
    b_q: Tensor | None = None  # (D,)
    b_k: Tensor | None = None  # (D,)
    b_v: Tensor | None = None  # (D,)
    b_o: Tensor | None = None  # (D,)
    b_g: Tensor | None = None  # (D,) or (1,)


class SideInput(NamedTuple):
    """The arguments for one modality."""

    tokens: Tensor  # (B, N, D)
    norm: Norm | Called | None = None
    key_padding_mask: Tensor | None = None  # (B, N) bool, True = ignore
    lengths: Tensor | None = None  # (B,)
    present: Tensor | None = None  # (B,) bool


class Side(NamedTuple):
    """One modality with combined masks."""

    tokens: Tensor  # (B, N, D)
    norm: Norm | Called | None
    ignore: Tensor | None  # (B, N) bool: masked tokens
    absent: Tensor | None  # (B,) bool: samples without this modality, or fully masked
    normed: Tensor | None = None  # (B, N, D): normalised tokens, if ``norm`` must be called

    def norm_tokens(self, tokens: Tensor, eps: float) -> Tensor:
        """Return ``normed`` if it is given, else normalise ``tokens``."""
        if self.normed is not None:
            return self.normed
        assert self.norm is not None
        return layer_norm(tokens, self.norm, eps)


@dataclass(frozen=True)
class CrossAttentionOptions:
    """The options of :func:`gated_cross_attention`; see there."""

    num_heads: int
    gate: Gate = "channel"
    indicator: Indicator = True
    missing: Missing = "skip"
    pre_norm: bool = True
    norm_eps: float = 1e-5
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


def gated_cross_attention_reference(
    x: Tensor,
    context: Tensor,
    weights: CrossAttentionWeights,
    *,
    num_heads: int,
    norm_x: tuple[Tensor, Tensor] | Called | None = None,
    norm_context: tuple[Tensor, Tensor] | Called | None = None,
    gate: Gate = "channel",
    indicator: Indicator = True,
    missing: Missing = "skip",
    pre_norm: bool = True,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    context_key_padding_mask: Tensor | None = None,
    context_lengths: Tensor | None = None,
    context_present: Tensor | None = None,
) -> Tensor:
    """Compute :func:`gated_cross_attention`.

    This is the specification: plain PyTorch for any floating dtype on any device.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.GatedCrossAttention(16, num_heads=2)
        >>> norm = layer.norm_x.weight, layer.norm_x.bias
        >>> x, context = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
        >>> exact = mmfused.gated_cross_attention_reference(
        ...     x, context, layer.weights(), num_heads=2, norm_x=norm, norm_context=norm
        ... )
        >>> torch.allclose(layer(x, context), exact, atol=1e-5)
        True
    """
    options = CrossAttentionOptions(
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=_seed(dropout_p, dropout_seed, x),
    )
    masks = (context_key_padding_mask, context_lengths, context_present)
    side = side_of(SideInput(x, norm_x))
    return attend_reference(
        side, side_of(SideInput(context, norm_context, *masks)), weights, options
    )


def bidirectional_gated_cross_attention_reference(
    a: Tensor,
    b: Tensor,
    to_a: CrossAttentionWeights,
    to_b: CrossAttentionWeights,
    *,
    num_heads: int,
    norm_a: tuple[Tensor, Tensor] | Called | None = None,
    norm_b: tuple[Tensor, Tensor] | Called | None = None,
    gate: Gate = "channel",
    indicator: Indicator = True,
    missing: Missing = "skip",
    pre_norm: bool = True,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    a_key_padding_mask: Tensor | None = None,
    a_lengths: Tensor | None = None,
    a_present: Tensor | None = None,
    b_key_padding_mask: Tensor | None = None,
    b_lengths: Tensor | None = None,
    b_present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`bidirectional_gated_cross_attention`, one direction after the other.

    This is the specification: plain PyTorch for any floating dtype on any device.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.BidirectionalGatedCrossAttention(16, num_heads=2)
        >>> norm = layer.norm_a.weight, layer.norm_a.bias
        >>> weights = layer.to_a.weights(), layer.to_b.weights()
        >>> a, b = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
        >>> exact_a, exact_b = mmfused.bidirectional_gated_cross_attention_reference(
        ...     a, b, *weights, num_heads=2, norm_a=norm, norm_b=norm
        ... )
        >>> torch.allclose(layer(a, b)[1], exact_b, atol=1e-5)
        True
    """
    options = CrossAttentionOptions(
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=_seed(dropout_p, dropout_seed, a),
    )
    side_a = side_of(SideInput(a, norm_a, a_key_padding_mask, a_lengths, a_present))
    side_b = side_of(SideInput(b, norm_b, b_key_padding_mask, b_lengths, b_present))
    return (
        attend_reference(side_a, side_b, to_a, options, direction=0),
        attend_reference(side_b, side_a, to_b, options, direction=1),
    )


def _seed(dropout_p: float, dropout_seed: Tensor | None, like: Tensor) -> Tensor | None:
    return draw_seed(like.device) if dropout_p and dropout_seed is None else dropout_seed


def side_of(given: SideInput) -> Side:
    """Derive ``ignore`` from mask and lengths, and ``absent`` from ``ignore`` and ``present``."""
    tokens, norm, mask, lengths, present = given
    ignore = padding_mask(tokens, mask, lengths)
    absents = [] if present is None else [~present]
    if not tokens.shape[1]:
        absents.append(torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device))
    elif ignore is not None:
        absents.append(ignore.all(1))
    absent = torch.stack(absents).any(0) if absents else None
    if not (norm is None or isinstance(norm, Called)):
        norm = [part.to(tokens.dtype) for part in norm]
    return Side(tokens, norm, ignore, absent)


def attend_reference(
    x: Side,
    context: Side,
    w: CrossAttentionWeights,
    options: CrossAttentionOptions,
    direction: int = 0,
) -> Tensor:
    """Compute the output x' (B, N, D) of one direction.

    ``direction``: 0 or 1. The two directions have different dropout masks from one seed.
    """
    num_heads, dropout_p, seed = options.num_heads, options.dropout_p, options.dropout_seed
    context_tokens, ignore = read_context(context, options.missing, collapse=dropout_p == 0)
    unchanged = unchanged_tokens(x, context, options.missing)
    # Tokens that stay unchanged may be NaN.
    tokens = x.tokens if unchanged is None else x.tokens.masked_fill(unchanged[:, :, None], 0.0)

    def normed(y, side):
        return side.norm_tokens(y, options.norm_eps) if options.pre_norm else y

    def heads(y, weight, bias):
        y = linear(y, weight, bias)
        return y.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, h, tokens, d)

    context_tokens = normed(context_tokens, context)
    q = heads(normed(tokens, x), w.w_q, w.b_q)
    k = heads(context_tokens, w.w_k, w.b_k)
    v = heads(context_tokens, w.w_v, w.b_v)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs = masked_softmax(logits, None if ignore is None else ignore[:, None, None], -1)
    if seed is not None and dropout_p:
        probs = probs * keep_mask(seed, probs.shape, dropout_p, 2 * direction) / (1 - dropout_p)
    attended = (probs.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    attn_out = linear(attended, w.w_o, w.b_o)
    if ignore is not None:  # a fully masked context gives A = 0, without b_o
        attn_out = attn_out.masked_fill(ignore.all(1)[:, None, None], 0.0)
    if seed is not None and dropout_p:
        kept = keep_mask(seed, attn_out.shape, dropout_p, 2 * direction + 1)
        attn_out = attn_out * kept / (1 - dropout_p)

    if options.gate == "none":
        out = tokens + attn_out
        if not options.pre_norm:
            assert x.norm is not None
            out = layer_norm(out, x.norm, options.norm_eps)
    else:
        # (B, N, D) or (B, N, 1)
        g = gate_logits(tokens, attn_out, context, w, options.indicator).sigmoid()
        out = g * attn_out + (1 - g) * tokens
    return out if unchanged is None else torch.where(unchanged[:, :, None], x.tokens, out)


def gate_logits(
    x: Tensor,
    attn_out: Tensor,
    context: Side,
    w: CrossAttentionWeights,
    indicator: Indicator,
) -> Tensor:
    """Return the logits of the gate, ``[x ; A ; e] W_g^T + b_g``."""
    assert w.w_g is not None
    parts = [x, attn_out]
    if indicator:
        e = indicator_of(context, x.shape[0], indicator, x)
        parts.append(e[:, None, None].expand(*x.shape[:2], 1))
    return linear(torch.cat(parts, -1), w.w_g, w.b_g)


def indicator_of(
    context: Side,
    batch: int,
    indicator: Indicator,
    like: Tensor,
) -> Tensor:
    """Return the indicator e (B,) in the dtype of ``like``: 1 if the context is present, else 0.

    With "batch", e is 1 for all samples if any sample has a context.
    """
    if context.absent is None:
        return like.new_ones(batch)
    present = ~context.absent
    if indicator == "batch":
        present = present.any().expand(batch)
    return present.to(like.dtype)


def unchanged_tokens(x: Side, context: Side, missing: Missing) -> Tensor | None:
    """Return a mask (B, N) of the tokens of x that are returned unchanged, or None.

    These are the masked tokens and, with "skip", all tokens of a sample in which x or the context
    is absent.
    """
    batch, length = x.tokens.shape[:2]
    masks = [] if x.ignore is None else [x.ignore]
    if missing == "skip":
        masks += [
            absent[:, None].expand(batch, length)
            for absent in (x.absent, context.absent)
            if absent is not None
        ]
    return torch.stack(masks).any(0) if masks else None


def read_context(
    context: Side,
    missing: Missing,
    collapse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the context's tokens, and a mask (B, M), True for tokens not attended to, or None.

    Tokens that are not attended to may be NaN and are set to 0. ``collapse``: whether, with
    "constant", only one token of an absent context is attended to.
    """
    batch, length = context.tokens.shape[:2]
    ignore = context.ignore
    if ignore is None and (context.absent is None or missing == "attend") and length:
        return context.tokens, None
    if ignore is None:
        ignore = torch.zeros(batch, length, dtype=torch.bool, device=context.tokens.device)
    if context.absent is not None:
        absent = context.absent[:, None]
        if missing in ("skip", "zero"):
            ignore = ignore | absent
        if missing == "constant" and collapse:
            # All tokens of an absent context are equal, so the first unmasked token is enough.
            first = (~ignore).to(torch.int32).cumsum(1) == 1
            ignore = ignore | (absent & ~first)
    return context.tokens.masked_fill(ignore[:, :, None], 0.0), ignore
