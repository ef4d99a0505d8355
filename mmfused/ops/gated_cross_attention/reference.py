"""Gated cross-attention: the equations, and what each missing mode means. One line per rule, any
floating dtype, any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...children import Called, layer_norm, linear
from ...random import draw_seed, keep_mask
from .._common import masked_softmax


class CrossAttentionWeights(NamedTuple):
    """One direction's parameters, laid out as ``nn.Linear``'s; every bias may be None."""

    w_q: Tensor  # (D, D), of the tokens that ask
    w_k: Tensor  # (D, Dc), of the context
    w_v: Tensor  # (D, Dc)
    w_o: Tensor  # (D, D)
    w_g: Tensor | None = (
        None  # (D or 1, 2D or 2D + 1): columns for x, for A and for the indicator; None without a gate
    )
    b_q: Tensor | None = None  # (D,)
    b_k: Tensor | None = None
    b_v: Tensor | None = None
    b_o: Tensor | None = None
    b_g: Tensor | None = None  # (D,) or (1,)


class Side(NamedTuple):
    """Tokens of one modality: (B, N, D), its norm's weight and bias (None without), what to ignore
    (B, N), who is absent (B,).
    """

    tokens: Tensor
    norm: tuple[Tensor, Tensor] | None
    ignore: Tensor | None
    absent: Tensor | None  # present flags and masks taken together; None: nobody
    normed: Tensor | None = None  # (B, N, D), where a norm has been called

    def norm_tokens(self, tokens: Tensor, eps: float) -> Tensor:
        """The LayerNorm of these tokens, which are the side's own but for some that count for
        nothing.
        """
        return layer_norm(tokens, self.norm, eps) if self.normed is None else self.normed


def gated_cross_attention_reference(
    x: Tensor,
    context: Tensor,
    weights: CrossAttentionWeights,
    *,
    num_heads: int,
    norm_x: tuple[Tensor, Tensor] | None = None,
    norm_context: tuple[Tensor, Tensor] | None = None,
    gate: str = "channel",
    indicator: bool | str = True,
    missing: str = "skip",
    pre_norm: bool = True,
    norm_eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    context_key_padding_mask: Tensor | None = None,
    context_lengths: Tensor | None = None,
    context_present: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`gated_cross_attention`: any floating dtype, any device."""
    sides = (
        side_of(x, norm_x),
        side_of(context, norm_context, context_key_padding_mask, context_lengths, context_present),
    )
    return attend_reference(
        *sides,
        weights,
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=_seed(dropout_p, dropout_seed, x),
        stream=0,
    )


def bidirectional_gated_cross_attention_reference(
    a: Tensor,
    b: Tensor,
    to_a: CrossAttentionWeights,
    to_b: CrossAttentionWeights,
    *,
    num_heads: int,
    norm_a: tuple[Tensor, Tensor] | None = None,
    norm_b: tuple[Tensor, Tensor] | None = None,
    gate: str = "channel",
    indicator: bool | str = True,
    missing: str = "skip",
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
    """The specification of :func:`bidirectional_gated_cross_attention`: each side reads the other
    as it was.
    """
    options = dict(
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=_seed(dropout_p, dropout_seed, a),
    )
    a = side_of(a, norm_a, a_key_padding_mask, a_lengths, a_present)
    b = side_of(b, norm_b, b_key_padding_mask, b_lengths, b_present)
    return attend_reference(a, b, to_a, **options, stream=0), attend_reference(
        b, a, to_b, **options, stream=1
    )


def _seed(dropout_p: float, dropout_seed: Tensor | None, like: Tensor) -> Tensor | None:
    return draw_seed(like.device) if dropout_p and dropout_seed is None else dropout_seed


def side_of(
    tokens: Tensor,
    norm=None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    present: Tensor | None = None,
) -> Side:
    """Mask and lengths as one mask; absent where the flag says so or nothing may be read."""
    ignore = mask
    if lengths is not None:
        ignore = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    absents = [] if present is None else [~present]
    if not tokens.shape[1]:  # no token that may be read, mask or no mask
        absents.append(torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device))
    elif ignore is not None:
        absents.append(ignore.all(1))
    absent = torch.stack(absents).any(0) if absents else None
    if not (norm is None or isinstance(norm, Called)):
        norm = tuple(part.to(tokens.dtype) for part in norm)
    return Side(tokens, norm, ignore, absent)


def attend_reference(
    x: Side,
    context: Side,
    weights: CrossAttentionWeights,
    *,
    num_heads: int,
    gate: str,
    indicator,
    missing: str,
    pre_norm: bool,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    stream: int,
) -> Tensor:
    """x' of one direction. ``stream``: 0 or 1, so that two directions of one seed drop different
    elements.
    """
    w = weights
    batch, length, dim = x.tokens.shape
    keys, ignore = read_keys(context, missing, collapse=dropout_p == 0)
    unchanged = stays(x, context, missing)
    # A token that stays as it is may hold NaN.
    tokens = x.tokens if unchanged is None else x.tokens.masked_fill(unchanged[:, :, None], 0.0)

    def normed(y, side):
        return side.norm_tokens(y, norm_eps) if pre_norm else y

    def heads(y, weight, bias):
        return (
            linear(y, weight, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        )  # (B, h, tokens, d)

    keys = normed(keys, context)
    q, k, v = (
        heads(normed(tokens, x), w.w_q, w.b_q),
        heads(keys, w.w_k, w.b_k),
        heads(keys, w.w_v, w.b_v),
    )
    probs = masked_softmax(
        q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5,
        None if ignore is None else ignore[:, None, None],
        -1,
    )
    if dropout_p:
        probs = (
            probs * keep_mask(dropout_seed, probs.shape, dropout_p, 2 * stream) / (1 - dropout_p)
        )
    attended = linear((probs.to(v.dtype) @ v).transpose(1, 2).flatten(2), w.w_o, w.b_o)
    if ignore is not None:  # nothing to attend to: 0, without the bias
        attended = attended.masked_fill(ignore.all(1)[:, None, None], 0.0)
    if dropout_p:
        attended = (
            attended
            * keep_mask(dropout_seed, attended.shape, dropout_p, 2 * stream + 1)
            / (1 - dropout_p)
        )

    if gate == "none":
        out = tokens + attended
        out = out if pre_norm else layer_norm(out, x.norm, norm_eps)
    else:
        g = gate_logits(tokens, attended, context, w, indicator).sigmoid()  # (B, N, D) or (B, N, 1)
        out = g * attended + (1 - g) * tokens
    return out if unchanged is None else torch.where(unchanged[:, :, None], x.tokens, out)


def gate_logits(
    x: Tensor,
    attended: Tensor,
    context: Side,
    w: CrossAttentionWeights,
    indicator: bool | str,
) -> Tensor:
    """``[x ; A ; e] W_g^T + b_g``."""
    parts = [x, attended]
    if indicator:
        e = flag_of(context, x.shape[0], indicator, x)
        parts.append(e[:, None, None].expand(*x.shape[:2], 1))
    return linear(torch.cat(parts, -1), w.w_g, w.b_g)


def flag_of(context: Side, batch: int, indicator: bool | str, like: Tensor) -> Tensor:
    """e (B,): 1 where the context is there; "batch": where any sample's is."""
    if context.absent is None:
        return like.new_ones(batch)
    there = ~context.absent
    return (there.any().expand(batch) if indicator == "batch" else there).to(like.dtype)


def stays(x: Side, context: Side, missing: str) -> Tensor | None:
    """(B, N): tokens that come back unchanged: what their own mask ignores, and with "skip" samples
    that lack either side.
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


def read_keys(context: Side, missing: str, collapse: bool) -> tuple[Tensor, Tensor | None]:
    """The context's tokens with 0 in place of those that nobody may read, and which these are (B,
    M); None: there are none such.
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
        if (
            missing == "constant" and collapse
        ):  # all tokens of an absent sample are equal: the first that may be read says it all
            first = (~ignore).to(torch.int32).cumsum(1) == 1
            ignore = ignore | (absent & ~first)
    return context.tokens.masked_fill(ignore[:, :, None], 0.0), ignore
