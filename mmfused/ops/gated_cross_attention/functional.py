"""The public functions of gated cross-attention; the equations are in reference.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ...children import Called, why_no_weights
from ...library import choose, nan_unless, no_autocast, to_autocast
from ...random import draw_seed
from .autograd import CrossAttention, kernel_arguments
from .checks import check
from .composed import attend_composed, samples_to_compute, shared_norms
from .reference import (
    CrossAttentionOptions,
    CrossAttentionWeights,
    Gate,
    Indicator,
    Missing,
    Side,
    SideInput,
    attend_reference,
    side_of,
)


def gated_cross_attention(
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
    """Let x (B, N, D) attend to context (B, M, Dc), and blend x and the result with a gate.

    The output is ``g * A + (1 - g) * x``, where g is the gate and A the attention output. The
    equations are in :mod:`mmfused.ops.gated_cross_attention.reference`.

    Args:
        x: (B, N, D), float32, float16, bfloat16 or float64.
        context: (B, M, Dc), in the dtype of x.
        weights: a :class:`CrossAttentionWeights`.
        num_heads: number of heads, a divisor of D.
        norm_x: weight (D,) and bias (D,) of the LayerNorm of x. With ``pre_norm=False`` it is the
            LayerNorm of the output, ``norm_x(x + A)``.
        norm_context: weight (Dc,) and bias (Dc,) of the LayerNorm of the context; required with
            ``pre_norm=True``, and None with ``pre_norm=False``.
        gate: "channel": one gate per channel, w_g (D, 2D + 1). "token": one gate per token, w_g
            (1, 2D + 1). "none": no gate, the output is ``x + A``. ``pre_norm=False`` needs "none".
        indicator: True: the gate has an additional input, 1 if the sample has a context, else 0.
            Its weight is the last column of w_g. "batch": this input is 1 for all samples if any
            sample has a context (UniECS's released code). False: no such input, and w_g has 2D
            columns.
        missing: what to do if the context of a sample is absent or fully masked. "skip": return x
            unchanged; the context may be NaN. "zero": apply the gate with A = 0. "attend": attend
            to the unmasked tokens. "constant": like "attend", for absent contexts whose tokens are
            all equal; without dropout, only the first unmasked token of an absent context is
            attended to.
        pre_norm: whether to normalise x and the context before the projections.
        norm_eps: epsilon of the LayerNorms.
        dropout_p: dropout rate of the attention probabilities and of A, in [0, 1).
        dropout_seed: int64 scalar tensor, default drawn from the device's generator. A seed gives
            the same dropout masks on every backend (``mmfused.testing.dropout_mask``).
        context_key_padding_mask: (B, M) bool, True = ignore. Ignored tokens may be NaN.
        context_lengths: (B,) int; only the first ``context_lengths[b]`` tokens of the context of
            sample b count. An alternative to the mask.
        context_present: (B,) bool, default all True.

    Returns:
        The output (B, N, D), in the dtype of x, or in the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: bad input; raised before any kernel is launched.
        RuntimeError: ``backend("fused")`` cannot run; raised before any kernel is launched.

    Source: UniECS (arXiv 2508.13843), its released EnhancedCrossModalAttention; UniCA (arXiv
    2606.28350) with ``pre_norm=False``.

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.GatedCrossAttention(16, num_heads=2)  # holds weights and norms
        >>> norm = layer.norm_x.weight, layer.norm_x.bias
        >>> text, image = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
        >>> options = dict(num_heads=2, norm_x=norm, norm_context=norm)
        >>> has_image = torch.tensor([True, False])
        >>> out = mmfused.gated_cross_attention(
        ...     text, image, layer.weights(), **options, context_present=has_image
        ... )
        >>> torch.equal(out[1], text[1])  # unchanged, as this sample has no image
        True
    """
    masks = (context_key_padding_mask, context_lengths, context_present)
    options = CrossAttentionOptions(
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    call = _checked(
        "gated_cross_attention",
        ("x", "context"),
        (SideInput(x, norm_x), SideInput(context, norm_context, *masks)),
        [weights],
        options,
    )
    with no_autocast(x.device.type):
        if call.backend == "fused":
            outs = CrossAttention.apply(*kernel_arguments(*call.problem))
        else:
            outs = _attend_in_pytorch(call)
    (out,) = _nan_for_wrong_lengths(outs, call)
    return out


def bidirectional_gated_cross_attention(
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
    """Let a (B, N, D) attend to b (B, M, D) with ``to_a``, and b to a with ``to_b``.

    Each direction is a :func:`gated_cross_attention` of the given a and b; see there for the
    options. norm_a applies to a in both directions, and norm_b to b. The kernels compute both
    directions in the same launches. Masked tokens are returned unchanged. With ``missing="skip"``,
    both sides of a sample are returned unchanged if either side is absent.

    Returns:
        The outputs for a (B, N, D) and b (B, M, D).

    Examples:
        >>> import torch, mmfused
        >>> layer = mmfused.BidirectionalGatedCrossAttention(16, num_heads=2)
        >>> norm = layer.norm_a.weight, layer.norm_a.bias
        >>> weights = layer.to_a.weights(), layer.to_b.weights()
        >>> image, text = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
        >>> new_image, new_text = mmfused.bidirectional_gated_cross_attention(
        ...     image, text, *weights, num_heads=2, norm_a=norm, norm_b=norm
        ... )
        >>> one_way = mmfused.gated_cross_attention(
        ...     text, image, weights[1], num_heads=2, norm_x=norm, norm_context=norm
        ... )
        >>> torch.allclose(new_text, one_way, atol=1e-5)
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
        dropout_seed=dropout_seed,
    )
    call = _checked(
        "bidirectional_gated_cross_attention",
        ("a", "b"),
        (
            SideInput(a, norm_a, a_key_padding_mask, a_lengths, a_present),
            SideInput(b, norm_b, b_key_padding_mask, b_lengths, b_present),
        ),
        [to_a, to_b],
        options,
    )
    with no_autocast(a.device.type):
        if call.backend == "fused":
            outs = CrossAttention.apply(*kernel_arguments(*call.problem))
        else:
            outs = _attend_in_pytorch(call)
    out_a, out_b = _nan_for_wrong_lengths(outs, call)
    return out_a, out_b


class _Problem(NamedTuple):
    """The two sides, the weights of each direction (one or two), and the options."""

    sides: list[SideInput]
    directions: list[CrossAttentionWeights]
    options: CrossAttentionOptions


class _Call(NamedTuple):
    """The checked arguments of a call, and the backend to use."""

    problem: _Problem
    backend: Literal["reference", "composed", "fused"]
    uncast: list[Tensor]  # the tokens of both sides, before autocast
    lengths: list[Tensor | None]


def _checked(
    op: str,
    names: tuple[str, str],
    inputs: tuple[SideInput, SideInput],
    directions: list[CrossAttentionWeights],
    options: CrossAttentionOptions,
) -> _Call:
    """Cast and check the arguments, and pick a backend."""
    uncast = [side.tokens for side in inputs]
    # Cast before the checks: under autocast the arguments may have different dtypes.
    given = [_autocast(side) for side in inputs]
    directions = [_autocast_parts(w) for w in directions]
    check(op, names, given, directions, options)
    device, dtype = given[0].tokens.device, given[0].tokens.dtype
    sides = [_norm_in_dtype(side) for side in given]
    if options.dropout_p and options.dropout_seed is None:
        options = replace(options, dropout_seed=draw_seed(device))
    problem = _Problem(sides, [_in_dtype(w, dtype) for w in directions], options)
    backend = choose(op, device, dtype, why_no_weights(_parts(problem)))
    return _Call(problem, backend, uncast, [side.lengths for side in given])


def _parts(problem: _Problem) -> list[Any]:
    """Return all norms and weights."""
    return [
        *(side.norm for side in problem.sides),
        *(part for w in problem.directions for part in w),
    ]


def _nan_for_wrong_lengths(outs: Iterable[Tensor], call: _Call) -> list[Tensor]:
    """Return the outputs, with NaN for the samples whose lengths are out of range."""
    outs = list(outs)
    for side, lengths in zip(call.problem.sides, call.lengths, strict=True):
        if lengths is not None:
            outs = [nan_unless(lengths, side.tokens.shape[1], out) for out in outs]
    return outs


def _attend_in_pytorch(call: _Call) -> list[Tensor]:
    """Compute each direction without kernels.

    If a module must be called, no samples are skipped.
    """
    inputs, directions, options = call.problem
    sides = [side_of(side) for side in inputs]
    if options.pre_norm:
        sides = _call_norms(sides, call.uncast, len(directions), options)
    if call.backend == "reference":
        return _each(attend_reference, sides, directions, options)
    attend = functools.partial(attend_composed, normed=shared_norms(options))
    must_call = any(isinstance(part, Called) for part in _parts(call.problem))
    indices = None if must_call else samples_to_compute(sides, options)
    if indices is None:
        return _each(attend, sides, directions, options)
    outs = _each(attend, [_samples(side, indices) for side in sides], directions, options)
    pairs = zip(sides, outs, strict=False)
    return [side.tokens.index_copy(0, indices, out) for side, out in pairs]


def _each(
    attend: Callable[..., Tensor],
    sides: list[Side],
    directions: list[CrossAttentionWeights],
    options: CrossAttentionOptions,
) -> list[Tensor]:
    """Call ``attend`` for each direction."""
    pairs = ((sides[0], sides[1]), (sides[1], sides[0]))
    return [
        attend(x, context, w, options, direction=i)
        for i, ((x, context), w) in enumerate(zip(pairs, directions, strict=False))
    ]


def _samples(side: Side, indices: Tensor) -> Side:
    ignore = None if side.ignore is None else side.ignore[indices]
    return Side(side.tokens[indices], side.norm, ignore, None)


def _call_norms(
    sides: list[Side],
    uncast: list[Tensor],
    directions: int,
    options: CrossAttentionOptions,
) -> list[Side]:
    """Call the norms that must be called, on the tokens before autocast."""
    # With "zero" and two directions, the tokens of an absent side are still queries.
    hide_absent = options.missing == "skip" or (options.missing == "zero" and directions == 1)
    out = []
    for side, tokens in zip(sides, uncast, strict=True):
        if isinstance(side.norm, Called):
            if side.ignore is not None:
                tokens = tokens.masked_fill(side.ignore[:, :, None], 0.0)
            if hide_absent and side.absent is not None:
                tokens = tokens.masked_fill(side.absent[:, None, None], 0.0)
            side = side._replace(normed=side.norm(tokens).to(side.tokens.dtype))
        out.append(side)
    return out


def _norm_in_dtype(side: SideInput) -> SideInput:
    """Cast the norm to the tokens' dtype."""
    if side.norm is None or isinstance(side.norm, Called):
        return side
    return side._replace(norm=[part.to(side.tokens.dtype) for part in side.norm])


def _in_dtype(w: CrossAttentionWeights, dtype: Any) -> CrossAttentionWeights:
    parts: list[Any] = [part.to(dtype) if isinstance(part, Tensor) else part for part in w]
    return CrossAttentionWeights(*parts)


def _autocast(side: SideInput) -> SideInput:
    (tokens,) = to_autocast(side.tokens)
    return side._replace(tokens=tokens, norm=_autocast_parts(side.norm))


def _autocast_parts(parts: Any) -> Any:
    """Cast a norm or the weights of a direction; return other objects unchanged."""
    if not isinstance(parts, tuple | list):
        return parts
    cast = to_autocast(*parts)
    if isinstance(parts, CrossAttentionWeights):
        return CrossAttentionWeights(*cast)
    return type(parts)(cast)
