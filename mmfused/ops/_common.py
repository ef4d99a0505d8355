"""Functions that several operators share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import check_tensors, check_value


def padding_mask(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Return the padding mask (B, N), True = ignore, or None without padding.

    x: tokens (B, N, D).
    """
    if lengths is not None:
        return torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return mask


def masked_softmax(logits: Tensor, ignore: Tensor | None, dim: int) -> Tensor:
    """Compute the softmax over ``dim`` in float32 or float64.

    A fully masked row has output 0 and gradient 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if ignore is None:
        return logits.softmax(dim, dtype=dtype)
    # With -inf instead, the gradient of a fully masked row would be NaN.
    floor = torch.finfo(dtype).min
    return logits.to(dtype).masked_fill(ignore, floor).softmax(dim).masked_fill(ignore, 0.0)


def masked_logsumexp(logits: Tensor, ignore: Tensor | None, dim: int) -> Tensor:
    """Compute the log-sum-exp over ``dim`` in float32 or float64.

    A fully masked row has the value -inf and gradient 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if ignore is None:
        return logits.logsumexp(dim)
    # With -inf instead, the gradient of a fully masked row would be NaN.
    lse = logits.masked_fill(ignore, torch.finfo(logits.dtype).min).logsumexp(dim)
    return lse.masked_fill(ignore.all(dim), -math.inf)


def check_bool(
    op: str,
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    """Raise unless ``tensor`` is None or a bool tensor of ``shape``."""
    if tensor is None:
        return
    if tensor.dtype != torch.bool:
        raise TypeError(f"{op}: {name}: got dtype {tensor.dtype}, expected torch.bool")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {shape}")


def check_padding(
    op: str,
    batch: int,
    length: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    prefix: str = "",
) -> None:
    """Check the padding: a mask (batch, length), lengths (batch,), or neither.

    ``prefix``: start of the argument names in error messages, such as "context_".
    """
    mask_name, lengths_name = f"{prefix}key_padding_mask", f"{prefix}lengths"
    if mask is not None and lengths is not None:
        raise ValueError(
            f"{op}: {mask_name}: got a mask and {lengths_name}, expected at most one of the two"
        )
    check_bool(op, mask_name, mask, (batch, length))
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: {lengths_name}: got dtype {lengths.dtype}, expected torch.int32 or torch.int64"
        )
    if lengths.shape != (batch,):
        raise ValueError(
            f"{op}: {lengths_name}: got shape {tuple(lengths.shape)}, expected {(batch,)}"
        )
    check_value(
        lengths,
        lambda x: ((x >= 0) & (x <= length)).all(),
        lambda: f"{op}: {lengths_name}: got a value out of range, expected 0 to {length}",
    )


def check_dropout_seed(op: str, seed: Tensor | None) -> None:
    """Raise unless ``seed`` is None or an int64 scalar tensor."""
    if seed is not None and (seed.dtype != torch.int64 or seed.dim()):
        raise TypeError(
            f"{op}: dropout_seed: got dtype {seed.dtype} and shape {tuple(seed.shape)}, "
            "expected a torch.int64 scalar"
        )


def unit_rows(x: Tensor, may_be_ignored: bool = False) -> Tensor:
    """Scale each row to length 1 in float32 or float64; a row of zeros stays zero.

    With ``may_be_ignored``, a row that is not finite becomes NaN and passes its upstream gradient
    on unchanged. If the loss ignores such a row, the gradient of the row is 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not may_be_ignored:
        return F.normalize(wide, dim=-1)
    broken = ~wide.isfinite().all(-1, keepdim=True)
    rows = F.normalize(wide.masked_fill(broken, 0.0), dim=-1)
    return torch.where(broken, wide + float("nan"), rows)


def check_temperature(op: str, temperature: float | Tensor, query: Tensor) -> None:
    """Raise unless ``temperature`` is a number above 0 or a tensor that holds one such number."""
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise ValueError(f"{op}: temperature: got {temperature!r}, expected a number above 0")
        return
    check_tensors(op, query=query, temperature=temperature)
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            f"{op}: temperature: got shape {tuple(temperature.shape)} and dtype "
            f"{temperature.dtype}, expected a floating-point tensor of one element"
        )
    check_value(
        temperature,
        lambda x: (x > 0).all(),
        f"{op}: temperature: got a number not above 0, expected a number above 0",
    )


def valid_or_nan(temperature: float | Tensor) -> float | Tensor:
    """Return the temperature; a tensor that is not above 0 becomes NaN.

    This is for devices where ``check_value`` does not raise.
    """
    if isinstance(temperature, Tensor):
        return torch.where(temperature > 0, temperature, math.nan)
    return temperature
