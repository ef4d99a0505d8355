"""Input validation for gated cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ...children import Called
from ...library import check_fractions, check_numbers, check_tensors
from .._common import check_bool, check_dropout_seed, check_padding
from .reference import CrossAttentionOptions, CrossAttentionWeights, Gate, Missing, SideInput

GATES = get_args(Gate)
MISSING = get_args(Missing)
INDICATORS = (True, False, "batch")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(
    op: str,
    names: tuple[str, str],
    given: Sequence[SideInput],
    directions: Sequence[CrossAttentionWeights],
    options: CrossAttentionOptions,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` for arguments that no backend accepts."""
    check_options(
        op,
        options.gate,
        options.indicator,
        options.missing,
        options.pre_norm,
        dropout_p=options.dropout_p,
    )
    check_numbers(op, norm_eps=options.norm_eps)
    weights = _by_name(op, directions)
    floats = _floats(names, given, weights)
    check_tensors(op, **floats, **_masks(names, given), dropout_seed=options.dropout_seed)
    _check_dtypes(op, names, floats)
    _check_tokens(op, names, given, directions)
    check_num_heads(op, options.num_heads, given[0].tokens.shape[-1])
    if len(directions) == 2:
        _check_equal_widths(op, names, given)
    for name, w in weights.items():
        _check_weights(op, name, w, given, options)
    for i, name in enumerate(names):
        needed = i == 0 or options.pre_norm or len(directions) == 2
        _check_norm(op, f"norm_{name}", given[i], needed)
    for name, side in zip(names, given, strict=True):
        batch, length = side.tokens.shape[:2]
        check_padding(op, batch, length, side.key_padding_mask, side.lengths, f"{name}_")
        check_bool(op, f"{name}_present", side.present, (batch,))
    check_dropout_seed(op, options.dropout_seed)


def check_options(
    op: str,
    gate: str,
    indicator: bool | str,
    missing: str,
    pre_norm: bool,
    **dropout: float,
) -> None:
    """Check the options that are not tensors.

    ``dropout``: the dropout rate, by the name of the caller's argument.
    """
    for option, value, choices in (
        ("gate", gate, GATES),
        ("missing", missing, MISSING),
        ("indicator", indicator, INDICATORS),
    ):
        if value not in choices:
            raise ValueError(
                f"{op}: {option}: got {value!r}, expected one of {', '.join(map(str, choices))}"
            )
    if not pre_norm and gate != "none":
        raise ValueError(f"{op}: gate: got {gate!r} with pre_norm=False, expected 'none'")
    check_fractions(op, **dropout)


def check_num_heads(op: str, num_heads: int, dim: int) -> None:
    """Check that ``num_heads`` is positive and divides ``dim``."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{op}: num_heads: got {num_heads}, expected a divisor of dim = {dim}")


def _by_name(
    op: str,
    directions: Sequence[CrossAttentionWeights],
) -> dict[str, CrossAttentionWeights]:
    names = ("weights",) if len(directions) == 1 else ("to_a", "to_b")
    for name, w in zip(names, directions, strict=True):
        if not isinstance(w, CrossAttentionWeights):
            raise TypeError(
                f"{op}: {name}: got a {type(w).__name__}, expected CrossAttentionWeights"
            )
    return dict(zip(names, directions, strict=True))


def _floats(
    names: tuple[str, str],
    given: Sequence[SideInput],
    weights: dict[str, CrossAttentionWeights],
) -> dict[str, Any]:
    """Return the tokens, weights and norms by name, except modules that must be called."""
    floats: dict[str, Any] = dict(zip(names, (side.tokens for side in given), strict=True))
    for name, w in weights.items():
        for field, part in w._asdict().items():
            if not isinstance(part, Called):
                floats[f"{name}.{field}"] = part
    for name, side in zip(names, given, strict=True):
        if side.norm is not None and not isinstance(side.norm, Called):
            floats |= {f"norm_{name}[{i}]": part for i, part in enumerate(side.norm)}
    return floats


def _masks(names: tuple[str, str], given: Sequence[SideInput]) -> dict[str, Tensor | None]:
    kinds = ("key_padding_mask", "lengths", "present")
    return {
        f"{name}_{kind}": getattr(side, kind)
        for name, side in zip(names, given, strict=True)
        for kind in kinds
    }


def _check_dtypes(op: str, names: tuple[str, str], floats: dict[str, Any]) -> None:
    first, second = (floats[name] for name in names)
    if first.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {names[0]}: got dtype {first.dtype}, "
            "expected float32, float16, bfloat16 or float64"
        )
    # With tokens in 16 bits, the weights may be float32.
    allowed = {first.dtype, torch.promote_types(first.dtype, torch.float32)}
    expected = " or ".join(sorted(map(str, allowed)))
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {expected}, "
                f"as {names[0]} has {first.dtype}"
            )
    if second.dtype != first.dtype:
        raise TypeError(
            f"{op}: {names[1]}: got dtype {second.dtype}, expected {first.dtype}, as {names[0]} has"
        )


def _check_tokens(
    op: str,
    names: tuple[str, str],
    given: Sequence[SideInput],
    directions: Sequence[CrossAttentionWeights],
) -> None:
    x = given[0].tokens
    weights_name = "weights" if len(directions) == 1 else "to_a"
    for name, side in zip(names, given, strict=True):
        tokens = side.tokens
        if tokens.dim() != 3 or tokens.shape[0] != x.shape[0]:
            batch = x.shape[0] if x.dim() == 3 else "batch"
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tokens.shape)}, expected ({batch}, tokens, dim)"
            )
    for name, side, field in zip(names, given, ("w_q", "w_k"), strict=True):
        w = getattr(directions[0], field)
        width = side.tokens.shape[-1]
        if isinstance(w, Tensor) and w.dim() == 2 and w.shape[1] != width:
            raise ValueError(
                f"{op}: {name}: got width {width}, expected {w.shape[1]}, "
                f"the number of columns of {weights_name}.{field}"
            )


def _check_equal_widths(
    op: str,
    names: tuple[str, str],
    given: Sequence[SideInput],
) -> None:
    a, b = (side.tokens.shape[-1] for side in given)
    if a != b:
        raise ValueError(f"{op}: {names[1]}: got width {b}, expected {a}, as {names[0]} has")


def _check_weights(
    op: str,
    name: str,
    w: CrossAttentionWeights,
    given: Sequence[SideInput],
    options: CrossAttentionOptions,
) -> None:
    dim, context_dim = (side.tokens.shape[-1] for side in given)
    gate_shape: tuple[int, int] | None = None
    if options.gate != "none":
        gate_shape = (
            dim if options.gate == "channel" else 1,
            2 * dim + (1 if options.indicator else 0),
        )
    expected = dict(
        w_q=(dim, dim),
        w_k=(dim, context_dim),
        w_v=(dim, context_dim),
        w_o=(dim, dim),
        w_g=gate_shape,
        b_q=(dim,),
        b_k=(dim,),
        b_v=(dim,),
        b_o=(dim,),
        b_g=None if gate_shape is None else gate_shape[:1],
    )
    for field, shape in expected.items():
        tensor = getattr(w, field)
        optional = field.startswith("b_") or shape is None
        if isinstance(tensor, Called) or (tensor is None and optional):
            continue
        if tensor is None or shape is None or tuple(tensor.shape) != shape:
            got = "None" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(
                f"{op}: {name}.{field}: got {got} with gate {options.gate!r}, expected {shape}"
            )


def _check_norm(
    op: str,
    name: str,
    side: SideInput,
    needed: bool,
) -> None:
    norm, dim = side.norm, side.tokens.shape[-1]
    if needed and norm is None:
        raise ValueError(f"{op}: {name}: got None, expected a LayerNorm's weight and bias")
    if norm is not None and not needed:
        raise ValueError(f"{op}: {name}: got a norm with pre_norm=False, expected None")
    if norm is None or isinstance(norm, Called):
        return
    if any(part.shape != (dim,) for part in norm):
        shapes = [tuple(part.shape) for part in norm]
        raise ValueError(f"{op}: {name}: got shapes {shapes}, expected [({dim},), ({dim},)]")
