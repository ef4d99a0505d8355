"""Gated cross-attention: one modality reads another, and a gate decides how much of it to keep
(UniECS; UniCA without the gate).

    A = Drop( MHA(q = LN_x(x), k = v = LN_c(context), dropout on the probabilities) W_o^T + b_o ) g
    = sigmoid( [x ; A ; e] W_g^T + b_g )         e = 1 where the context is there, 0 where it is
    missing out = g * A + (1 - g) * x                      x un-normalised; a gate per channel, or
    one per token

Both directions of a pair, a reads b and b reads a, both old, run in the same launches. The kernels
normalise tokens as they load them for the projections (one product per modality: queries of its own
direction, keys and values of the other), attend where there is something to attend to, and end with
output projection, dropout, gate and blend together. The gate sees no concatenation: [x ; A ; e]
W_g^T = x W_gx^T + A W_ga^T + e w_e. FLOPs of a sample, both directions: 12 (N_a + N_b) D^2 + 8 N_a
N_b D forward, twice that backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...children import Called, layer_norm, linear, no_weights
from ...library import (
    choose,
    distinct,
    nan_unless,
    no_autocast,
    once_differentiable,
    register,
    to_autocast,
)
from ...random import draw_seed, keep_mask
from .._common import masked_softmax
from .._sdpa import attention
from .checks import check
from .reference import (
    CrossAttentionWeights,
    Side,
    attend_reference,
    flag_of,
    gate_logits,
    read_keys,
    side_of,
    stays,
)

FIELDS = len(CrossAttentionWeights._fields)


def _attend_composed(
    x: Side,
    context: Side,
    w: CrossAttentionWeights,
    *,
    normed,
    num_heads,
    gate,
    indicator,
    missing,
    pre_norm,
    norm_eps,
    dropout_p,
    dropout_seed,
    stream,
) -> Tensor:
    """As the reference, with one product for keys and values, torch's attention, and no
    concatenation for the gate.

    ``normed(tokens, norm)``: the LayerNorm of ``pre_norm``, which both directions share where no
    mask sets them apart."""
    batch, _, dim = x.tokens.shape
    keys, ignore = read_keys(context, missing, collapse=dropout_p == 0)
    unchanged = stays(x, context, missing)
    tokens = x.tokens if unchanged is None else x.tokens.masked_fill(unchanged[:, :, None], 0.0)

    q = linear(normed(tokens, x), w.w_q, w.b_q)
    k, v = _keys_and_values(normed(keys, context), w)
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    attended = _attention(q, k, v, ignore, dropout_p, dropout_seed, 2 * stream)
    attended = linear(attended.transpose(1, 2).flatten(2), w.w_o, w.b_o)
    if ignore is not None:
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
        if isinstance(w.w_g, Called):
            logits = gate_logits(tokens, attended, context, w, indicator)
        else:
            logits = F.linear(tokens, w.w_g[:, :dim], w.b_g) + F.linear(
                attended, w.w_g[:, dim : 2 * dim]
            )
            if indicator:
                logits = (
                    logits
                    + flag_of(context, batch, indicator, logits)[:, None, None] * w.w_g[:, -1]
                )
        out = torch.lerp(
            tokens, attended, logits.sigmoid()
        )  # keeps both for backward, which others keep anyway
    return out if unchanged is None else torch.where(unchanged[:, :, None], x.tokens, out)


def _keys_and_values(keys: Tensor, w: CrossAttentionWeights) -> tuple[Tensor, Tensor]:
    """One product, unless either child must be called."""
    if isinstance(w.w_k, Called) or isinstance(w.w_v, Called):
        return linear(keys, w.w_k, w.b_k), linear(keys, w.w_v, w.b_v)
    biases = [
        weight.new_zeros(len(weight)) if b is None else b
        for weight, b in ((w.w_k, w.b_k), (w.w_v, w.b_v))
    ]
    return F.linear(keys, torch.cat([w.w_k, w.w_v]), torch.cat(biases)).chunk(2, -1)


def _norms(pre_norm: bool, eps: float) -> Callable[[Tensor, Side], Tensor]:
    """LayerNorm of the tokens of a side, once where both directions read the same."""
    known: list[tuple[Tensor, Side, Tensor]] = []

    def normed(tokens, side):
        if not pre_norm:
            return tokens
        for seen, of, out in known:
            if seen is tokens and of is side:
                return out
        known.append((tokens, side, side.norm_tokens(tokens, eps)))
        return known[-1][2]

    return normed


def _attention(q, k, v, ignore, dropout_p, dropout_seed, stream) -> Tensor:
    if dropout_p == 0:
        if ignore is None:
            return attention(q, k, v)
        # A dead row attends to everything and is zeroed after: not every SDPA backend returns 0 and
        # zero gradients for it.
        attend = ~(ignore & ~ignore.all(1, keepdim=True))[:, None, None]
        return attention(q, k, v, attend)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs = masked_softmax(logits, None if ignore is None else ignore[:, None, None], -1)
    return (probs * keep_mask(dropout_seed, probs.shape, dropout_p, stream) / (1 - dropout_p)).to(
        v.dtype
    ) @ v


# ---- the kernels under autograd ------------------------------------------------------------------

# Lists, for one direction or two: tokens and what goes with them by side (the first side asks in
# the first direction, the other in the second), weights flat, FIELDS of each direction. None cannot
# be in a list of tensors: an empty tensor stands for it.
_LISTS = "Tensor[] tokens, Tensor[] norms, Tensor[] ignores, Tensor[] absents, Tensor[] weights, Tensor[] flags"
_OPTIONS = "int num_heads, str gate, str missing, bool pre_norm, float norm_eps, float dropout_p, Tensor? dropout_seed"


def _widths(directions: int, dim: int) -> tuple[int, int]:
    """Columns of each side's projections: queries, or keys and values, or with two directions all
    three.
    """
    return (3 * dim, 3 * dim) if directions == 2 else (dim, 2 * dim)


def _fake_forward(
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
    num_heads,
    gate,
    missing,
    pre_norm,
    norm_eps,
    dropout_p,
    seed,
):
    directions, dim = len(weights) // FIELDS, tokens[0].shape[-1]
    asking = tokens[:directions]
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in asking]
    projected = [
        x.new_empty(*x.shape[:2], width)
        for x, width in zip(tokens, _widths(directions, dim), strict=True)
    ]
    moments = [x.new_empty(2, *x.shape[:2], dtype=torch.float32) for x in tokens]
    attended = [x.new_empty(x.shape) for x in asking]
    lse = [x.new_empty(x.shape[0], num_heads, x.shape[1], dtype=torch.float32) for x in asking]
    kept = [x.new_empty(x.shape) for x in asking]
    return [*outs, *projected, *moments, *attended, *lse, *kept]


def _fake_backward(d_outs, tokens, norms, ignores, absents, weights, flags, saved, *options):
    wide = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
    return wide + [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*norms, *weights)
    ]


def _products(tokens, weights, gate) -> tuple[int, int, int, int]:
    """FLOPs forward of projections, attention, output projections and gates, from shapes."""
    directions, (batch, _, dim) = len(weights) // FIELDS, tokens[0]
    asking = batch * sum(x[1] for x in tokens[:directions])
    project = sum(
        2 * batch * x[1] * x[2] * width
        for x, width in zip(tokens, _widths(directions, dim), strict=True)
    )
    attend = 4 * directions * batch * tokens[0][1] * tokens[1][1] * dim
    gates = 0 if gate == "none" else weights[CrossAttentionWeights._fields.index("w_g")][0]
    return project, attend, 2 * asking * dim * dim, 4 * asking * dim * gates


def _forward_flops(
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
    num_heads,
    gate,
    *rest,
    out_shape,
):
    return sum(_products(tokens, weights, gate))


def _backward_flops(
    d_outs,
    tokens,
    norms,
    ignores,
    absents,
    weights,
    flags,
    saved,
    num_heads,
    gate,
    *rest,
    out_shape,
):
    """Each product twice, and again the scores and the gate."""
    project, attend, output, gates = _products(tokens, weights, gate)
    return 2 * project + attend // 2 * 5 + 2 * output + 3 * gates


def _launch_forward(*args):
    from ...kernels import gated_cross_attention as kernels

    return kernels.forward(*args)


def _launch_backward(*args):
    from ...kernels import gated_cross_attention as kernels

    return kernels.backward(*args)


register(
    "gated_cross_attention_fwd",
    f"({_LISTS}, {_OPTIONS}) -> Tensor[]",
    _launch_forward,
    _fake_forward,
    _forward_flops,
)
register(
    "gated_cross_attention_bwd",
    f"(Tensor[] d_outs, {_LISTS}, Tensor[] saved, {_OPTIONS}) -> Tensor[]",
    _launch_backward,
    _fake_backward,
    _backward_flops,
)


class _Fused(torch.autograd.Function):
    """Saves tokens, projections, the attention's output and what it became after W_o and dropout:
    no probabilities, no gate.
    """

    @staticmethod
    def forward(ctx, options, directions, *flat):
        ctx.options, ctx.directions = options, directions
        lists = _split(flat, directions)
        seed = flat[-1]
        results = torch.ops.mmfused.gated_cross_attention_fwd(*lists, *options, seed)
        ctx.save_for_backward(*flat, *results[directions:])
        ctx.inputs = len(flat)
        return tuple(results[:directions])

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outs):
        tensors = ctx.saved_tensors  # once: a checkpoint unpacks them once
        flat, saved = tensors[: ctx.inputs], tensors[ctx.inputs :]
        lists, seed = _split(flat, ctx.directions), flat[-1]
        gradients = torch.ops.mmfused.gated_cross_attention_bwd(
            [d.contiguous() for d in d_outs], *lists, list(saved), *ctx.options, seed
        )
        tokens, rest = gradients[:2], gradients[2:]
        norms, weights = rest[:4], rest[4:]
        full = [*tokens, *norms, *[None] * 4, *weights, *[None] * ctx.directions, None]
        return (
            None,
            None,
            *(g if need else None for g, need in zip(full, ctx.needs_input_grad[2:], strict=True)),
        )


def _split(flat, directions):
    """tokens (2), norms (4), ignores (2), absents (2), weights, flags, seed."""
    ends = [2, 6, 8, 10, 10 + FIELDS * directions, 10 + (FIELDS + 1) * directions]
    return [list(flat[first:end]) for first, end in zip([0, *ends], ends, strict=False)]


def _attend_fused(
    sides,
    directions,
    *,
    num_heads,
    gate,
    indicator,
    missing,
    pre_norm,
    norm_eps,
    dropout_p,
    dropout_seed,
):
    tokens = [
        side.tokens if side.tokens.stride(-1) == 1 else side.tokens.contiguous() for side in sides
    ]
    none = tokens[0].new_empty(0)
    no_flag = none.bool()
    norms = [part.contiguous() for side in sides for part in (side.norm or (none, none))]
    ignores = [no_flag if side.ignore is None else side.ignore.contiguous() for side in sides]
    absents = [no_flag if side.absent is None else side.absent for side in sides]
    weights = [none if weight is None else weight.contiguous() for w in directions for weight in w]
    like, batch = tokens[0].new_empty(0, dtype=torch.float32), tokens[0].shape[0]
    flags = [
        flag_of(sides[1 - i], batch, indicator, like) if indicator else like
        for i in range(len(directions))
    ]
    options = (num_heads, gate, missing, pre_norm, norm_eps, dropout_p)
    flat = (*tokens, *norms, *ignores, *absents, *weights, *flags, dropout_seed)
    if (
        torch.compiler.is_compiling()
    ):  # one stand-in serves for all that is not there, and both directions may share weights
        flat = distinct(*flat)
    return _Fused.apply(options, len(directions), *flat)


# ---- the functions -------------------------------------------------------------------------------


def gated_cross_attention(
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
    """Let x (B, N, D) read context (B, M, Dc) and blend in, by a gate, what it read; returns x' (B,
    N, D).

    Args: weights: a :class:`CrossAttentionWeights`; D divides by ``num_heads``. norm_x,
        norm_context: weight and bias of a LayerNorm over the tokens; with ``pre_norm`` both, else
        norm_x alone, which then
            normalises the sum: ``norm_x(x + A)``, only with ``gate="none"``.
        gate: "channel", w_g (D, 2D + 1); "token", w_g (1, 2D + 1), a scalar a token; "none", ``x +
        A``.
        indicator: the gate sees whether the context is there, one column of w_g; "batch": one flag
            for the whole batch, 1 if any sample's is (UniECS's released code); False: w_g has 2D
            columns.
        missing: what a sample gets whose context is absent or has no token that may be read: "skip"
            x, unchanged, and no work is done; the context may hold NaN. "zero" A = 0, and the gate
            acts. "attend" it reads the tokens as they stand. "constant" the same, where the caller
            knows them to be equal to the first that may be read: without dropout that one is read
            alone.
        dropout_p: of the probabilities and of A. dropout_seed: () int64 tensor, None draws one from
            the device's generator; a seed drops the same elements on every backend
            (``mmfused.testing.dropout_mask``).
        context_key_padding_mask: (B, M) bool, True = ignore the token, or context_lengths: (B,)
            int, keep the first; not both. Ignored tokens may hold NaN. context_present: (B,) bool,
            default all.

    Raises: ``TypeError``, ``ValueError`` on bad input, ``RuntimeError`` where ``backend("fused")``
    cannot run, before any launch.

    Source: UniECS (arXiv 2508.13843), its released EnhancedCrossModalAttention; UniCA (arXiv
    2606.28350) as ``pre_norm=False``."""
    sides = (
        (x, norm_x, None, None, None),
        (context, norm_context, context_key_padding_mask, context_lengths, context_present),
    )
    return _run(
        "gated_cross_attention",
        ("x", "context"),
        sides,
        [weights],
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )[0]


def bidirectional_gated_cross_attention(
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
    """a (B, N, D) reads b (B, M, D) with ``to_a``, b reads a with ``to_b``, both as they were;
    returns (a', b').

    As :func:`gated_cross_attention` twice, in the same launches. A token that its own side's mask
    ignores comes back unchanged, and with ``missing="skip"`` both sides do where either is absent.
    norm_a and norm_b serve both directions."""
    sides = (
        (a, norm_a, a_key_padding_mask, a_lengths, a_present),
        (b, norm_b, b_key_padding_mask, b_lengths, b_present),
    )
    outs = _run(
        "bidirectional_gated_cross_attention",
        ("a", "b"),
        sides,
        [to_a, to_b],
        num_heads=num_heads,
        gate=gate,
        indicator=indicator,
        missing=missing,
        pre_norm=pre_norm,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    return outs[0], outs[1]


def _run(op, names, given, directions, *, dropout_p, dropout_seed, **options):
    # Before the checks, which want one dtype: autocast takes any.
    uncast = [side[0] for side in given]
    given = [(*to_autocast(tokens), _cast_all(norm), *masks) for tokens, norm, *masks in given]
    directions = [_cast_all(w) for w in directions]
    check(op, names, given, directions, dropout_p=dropout_p, dropout_seed=dropout_seed, **options)
    outs = _outputs(
        op, given, uncast, directions, dropout_p=dropout_p, dropout_seed=dropout_seed, **options
    )
    for tokens, _, _, lengths, _ in given:
        if lengths is not None:
            outs = [nan_unless(lengths, tokens.shape[1], out) for out in outs]
    return outs


def _outputs(op, given, uncast, directions, *, dropout_p, dropout_seed, **options):
    device, dtype = given[0][0].device, given[0][0].dtype
    sides = [side_of(*side) for side in given]
    if dropout_p and dropout_seed is None:
        dropout_seed = draw_seed(device)
    options |= dict(dropout_p=dropout_p, dropout_seed=dropout_seed)
    with no_autocast(device.type):
        directions = [
            CrossAttentionWeights(*(t.to(dtype) if isinstance(t, Tensor) else t for t in w))
            for w in directions
        ]
        parts = (*(side.norm for side in sides), *(part for w in directions for part in w))
        chosen = choose(op, device, dtype, no_weights(parts))
        if chosen == "fused":
            return _attend_fused(sides, directions, **options)
        called = any(isinstance(part, Called) for part in parts)
        if options["pre_norm"]:
            zero = (
                options["missing"] == "zero" and len(directions) == 1
            )  # of two, each side's own tokens stay
            hide = zero or options["missing"] == "skip"
            sides = [_call_norm(*pair, hide) for pair in zip(sides, uncast, strict=True)]
        if chosen == "reference":
            return _each(attend_reference, sides, directions, options)
        attend = functools.partial(
            _attend_composed, normed=_norms(options["pre_norm"], options["norm_eps"])
        )
        keep = (
            None
            if called
            else _worth_gathering(sides, missing=options["missing"], dropout_p=dropout_p)
        )
        if keep is None:  # children that are called get the whole batch
            return _each(attend, sides, directions, options)
        ignores = [None if side.ignore is None else side.ignore[keep] for side in sides]
        picked = [
            Side(side.tokens[keep], side.norm, ignore, None)
            for side, ignore in zip(sides, ignores, strict=True)
        ]
        outs = _each(attend, picked, directions, options)
        return [
            side.tokens.index_copy(0, keep, out) for side, out in zip(sides, outs, strict=False)
        ]


def _call_norm(side: Side, tokens: Tensor, hide_absent: bool) -> Side:
    """A norm that must be called is called once, as autocast has not yet rounded the tokens; with 0
    for what may hold NaN.
    """
    if not isinstance(side.norm, Called):
        return side
    hidden = [] if side.ignore is None else [side.ignore[:, :, None]]
    hidden += [side.absent[:, None, None]] if hide_absent and side.absent is not None else []
    for mask in hidden:
        tokens = tokens.masked_fill(mask, 0.0)
    return side._replace(normed=side.norm(tokens).to(side.tokens.dtype))


def _cast_all(parts):
    """A norm or the weights of a direction as autocast has them; what is neither is for the checks."""
    if not isinstance(parts, tuple | list):
        return parts
    cast = to_autocast(*parts)
    return (
        CrossAttentionWeights(*cast)
        if isinstance(parts, CrossAttentionWeights)
        else type(parts)(cast)
    )


def _each(
    attend,
    sides: list[Side],
    directions: list[CrossAttentionWeights],
    options: dict,
) -> list[Tensor]:
    pairs = ((sides[0], sides[1]), (sides[1], sides[0]))
    return [
        attend(*pair, w, **options, stream=i)
        for i, (pair, w) in enumerate(zip(pairs, directions, strict=False))
    ]


def _worth_gathering(sides: list[Side], missing: str, dropout_p: float) -> Tensor | None:
    """On a CPU, where nothing has to wait for it, the samples that "skip" does not skip; None where
    there is nothing to skip. Under dropout the elements are drawn by sample, so all stay where they
    are."""
    absents = [side.absent for side in sides if side.absent is not None]
    if (
        missing != "skip"
        or dropout_p
        or not absents
        or absents[0].device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        return None
    absent = torch.stack(absents).any(0)
    return (~absent).nonzero()[:, 0] if absent.any() else None
