"""Attention of other libraries, as baselines of pooling and cross-attention.

Each function of this file is, or returns, an ``attend(q, k, v, p)``: attention with dropout ``p``
on tensors (B, tokens, heads, channels of a head), without a mask.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .measure import Unavailable, first_line

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Forced = Literal["FLASH", "EFFICIENT", "CUDNN"]
FLASH_CHANNELS = 256  # most channels of a head in FlashAttention


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    backend: SDPBackend | None = None,
) -> Tensor:
    """Return torch's attention with the given backend, or with the one that torch chooses."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)


def sdpa_with(
    name: Forced,
    heads: int,
    channels: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Attend:
    """Return torch's attention with a backend; raise Unavailable if it cannot compute the case.

    Args:
        name: the backend.
        heads: number of heads.
        channels: channels of a head.
        p: dropout.
        device: of the tensors.
        dtype: of the tensors.
    """
    if device.type != "cuda" and name != "FLASH":
        raise Unavailable("torch has this backend only on CUDA")
    attend = functools.partial(sdpa, backend=getattr(SDPBackend, f"{name}_ATTENTION"))
    x = torch.zeros(1, 16, heads, channels, device=device, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason that is against a backend
        try:
            attend(x, x, x, p).sum().backward()
        except RuntimeError as error:
            sizes = f"heads of {channels} channels, {dtype}, dropout {p}"
            raise Unavailable(f"this backend does not take {sizes}: {first_line(error)}") from error
    return attend


def flex() -> Attend:
    """Return torch's flex_attention, compiled: uncompiled, it would write all logits to memory."""
    from torch.nn.attention import flex_attention as module

    compiled = torch.compile(module.flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return compiled(q, k, v).transpose(1, 2)

    return attend


def flash_attention(
    version: Literal[2, 3],
    channels: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Attend:
    """Return the attention of FlashAttention's own packages; raise Unavailable if it cannot run.

    Args:
        version: 2 (package flash_attn) or 3 (package flash_attn_interface, for Hopper).
        channels: channels of a head.
        p: dropout.
        device: of the tensors.
        dtype: of the tensors.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable("its kernels need 16-bit tensors on CUDA")
    if channels > FLASH_CHANNELS:
        raise Unavailable(f"it takes at most {FLASH_CHANNELS} channels of a head, not {channels}")
    if version == 3 and p:
        raise Unavailable("it has no dropout")
    try:
        if version == 2:
            from flash_attn import flash_attn_func as function
        else:
            from flash_attn_interface import flash_attn_func as function
    except ImportError as error:
        name = "flash_attn" if version == 2 else "flash_attn_interface (FlashAttention 3)"
        raise Unavailable(f"{name} is not installed") from error

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        options = {"dropout_p": p} if version == 2 else {}
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out  # early versions return the sums too

    return attend
