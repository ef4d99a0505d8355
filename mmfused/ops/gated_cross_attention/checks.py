"""What gated cross-attention refuses, in one sentence each, before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...children import Called
from ...library import check_fractions, check_numbers, check_tensors
from .._common import check_bool, check_dropout_seed, check_padding
from .reference import CrossAttentionWeights

GATES = ("channel", "token", "none")
MISSING = ("skip", "zero", "attend", "constant")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(
    op,
    names,
    given,
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
) -> None:
    check_options(op, gate, indicator, missing, pre_norm, dropout_p=dropout_p)
    check_numbers(op, norm_eps=norm_eps)
    floats = dict(zip(names, (side[0] for side in given), strict=True))
    for name, w in zip(
        ("weights",) if len(directions) == 1 else ("to_a", "to_b"), directions, strict=True
    ):
        if not isinstance(w, CrossAttentionWeights):
            raise TypeError(
                f"{op}: {name}: got a {type(w).__name__}, expected CrossAttentionWeights"
            )
        floats |= {
            f"{name}.{field}": part
            for field, part in w._asdict().items()
            if not isinstance(part, Called)
        }
    for name, (_, norm, *_) in zip(names, given, strict=True):
        if norm is not None and not isinstance(norm, Called):
            floats |= {f"norm_{name}[{i}]": part for i, part in enumerate(norm)}
    check_tensors(op, **floats, **_masks(names, given), dropout_seed=dropout_seed)
    first = floats[names[0]]
    if first.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {names[0]}: got dtype {first.dtype}, expected float32, float16, bfloat16 or float64"
        )
    takes = {
        first.dtype,
        torch.promote_types(first.dtype, torch.float32),
    }  # master weights may stay in float32
    for name, tensor in floats.items():
        if tensor is not None and tensor.dtype not in takes:
            raise TypeError(
                f"{op}: {name}: got dtype {tensor.dtype}, expected {' or '.join(sorted(map(str, takes)))}, as {names[0]} has "
                f"{first.dtype}."
            )
    if floats[names[1]].dtype != first.dtype:
        raise TypeError(
            f"{op}: {names[1]}: got dtype {floats[names[1]].dtype}, expected {first.dtype}, as {names[0]} has"
        )
    _check_shapes(op, names, given, directions, num_heads, gate, indicator, pre_norm)
    for name, side in zip(names, given, strict=True):
        tokens, _, mask, lengths, present = side
        batch, length = tokens.shape[:2]
        check_padding(op, batch, length, mask, lengths, f"{name}_")
        check_bool(op, f"{name}_present", present, (batch,))
    check_dropout_seed(op, dropout_seed)


def check_options(
    op: str,
    gate: str,
    indicator: bool | str,
    missing: str,
    pre_norm: bool,
    **dropout: float,
) -> None:
    """``dropout``: the one number, by the name that the caller knows."""
    for option, value, choices in (
        ("gate", gate, GATES),
        ("missing", missing, MISSING),
        ("indicator", indicator, (True, False, "batch")),
    ):
        if value not in choices:
            raise ValueError(
                f"{op}: {option}: got {value!r}, expected one of {', '.join(map(str, choices))}"
            )
    if not pre_norm and gate != "none":
        raise ValueError(
            f"{op}: pre_norm is False and gate is {gate!r}; a norm after the sum takes gate 'none'."
        )
    check_fractions(op, **dropout)


def _masks(names, given) -> dict[str, Tensor | None]:
    return {
        f"{name}_{kind}": tensor
        for name, (_, _, *masks) in zip(names, given, strict=True)
        for kind, tensor in zip(("key_padding_mask", "lengths", "present"), masks, strict=True)
    }


def _check_shapes(op, names, given, directions, num_heads, gate, indicator, pre_norm) -> None:
    (x, norm_x, *_), (context, norm_context, *_) = given
    for name, tokens in zip(names, (x, context), strict=True):
        if tokens.dim() != 3 or tokens.shape[0] != x.shape[0]:
            batch = x.shape[0] if x.dim() == 3 else "batch"
            raise ValueError(
                f"{op}: {name}: got shape {tuple(tokens.shape)}, expected ({batch}, tokens, dim)"
            )
    dims = x.shape[-1], context.shape[-1]
    first = "weights" if len(directions) == 1 else "to_a"
    for name, dim, field in zip(names, dims, ("w_q", "w_k"), strict=True):
        w = getattr(directions[0], field)
        if isinstance(w, Tensor) and w.dim() == 2 and w.shape[1] != dim:
            raise ValueError(
                f"{op}: {name}: got width {dim}, expected {w.shape[1]}, as {first}.{field} has columns"
            )
    if num_heads < 1 or dims[0] % num_heads:
        raise ValueError(
            f"{op}: num_heads is {num_heads}; it must be positive and divide dim = {dims[0]}."
        )
    if len(directions) == 2 and dims[0] != dims[1]:
        raise ValueError(
            f"{op}: {names[1]}: got width {dims[1]}, expected {dims[0]}, as {names[0]} has"
        )
    for w, name in zip(
        directions, ("weights",) if len(directions) == 1 else ("to_a", "to_b"), strict=True
    ):
        dim, read = dims
        gates = (
            None
            if gate == "none"
            else (dim if gate == "channel" else 1, 2 * dim + (1 if indicator else 0))
        )
        expected = dict(w_q=(dim, dim), w_k=(dim, read), w_v=(dim, read), w_o=(dim, dim), w_g=gates)
        expected |= {bias: (dim,) for bias in ("b_q", "b_k", "b_v", "b_o")} | dict(
            b_g=None if gates is None else gates[:1]
        )
        for field, shape in expected.items():
            tensor = getattr(w, field)
            optional = field.startswith("b_") or shape is None
            if isinstance(tensor, Called) or (tensor is None and optional):
                continue
            if tensor is None or shape is None or tuple(tensor.shape) != shape:
                got = None if tensor is None else tuple(tensor.shape)
                raise ValueError(
                    f"{op}: {name}.{field} has shape {got}; with gate {gate!r} it takes {shape}."
                )
    wanted = [
        (names[0], norm_x, dims[0], True),
        (names[1], norm_context, dims[1], pre_norm or len(directions) == 2),
    ]
    for name, norm, dim, needed in wanted:
        if needed and norm is None:
            raise ValueError(f"{op}: norm_{name}: got None, expected a LayerNorm's weight and bias")
        if norm is not None and not needed:
            raise ValueError(
                f"{op}: norm_{name} is given with pre_norm=False, where nothing normalises {name}."
            )
        if not (norm is None or isinstance(norm, Called)) and any(
            part.shape != (dim,) for part in norm
        ):
            raise ValueError(
                f"{op}: norm_{name}: got shapes {[tuple(part.shape) for part in norm]}, expected twice ({dim},)"
            )
