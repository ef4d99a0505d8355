"""Benchmark of gated cross-attention in both directions: providers, and the least work needed.

The cases are the layers of UniECS and UniCA: modality a attends to modality b, and b to a. All
providers of a case compute the same function of the same parameters. The two outputs are
concatenated, which adds one kernel to every provider. Samples that lack a modality are returned
unchanged. "SDPA, samples with both gathered" and the library's providers compute only the samples
with both modalities; the remaining providers compute all samples and select with torch.where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import attention
from .gated_cross_attention_cases import Case, cases, custom, make
from .gated_cross_attention_modules import Merged, Ours, Plain, WithMultiheadAttention
from .measure import Problem, Provider, Unavailable, need_kernels

__all__ = [
    "OURS",
    "PROVIDERS",
    "SIZES",
    "Case",
    "cases",
    "comparable",
    "custom",
    "exact",
    "make",
    "reference",
    "work",
]

SIZES = "B, N, M, D, H"
OURS = ("composed", "fused")
EXACT_CHUNK = 48  # samples per float64 call; a multiple of 3, the period of present()
ONLY_HEADLINE = "compiled only in the headline case, to keep a run short"


# ---- providers: plain layers ---------------------------------------------------------------------


def _layout(case: Case, **names: str) -> dict[str, tuple[str, ...]]:
    """Return the ``layout`` of a provider from names of Linears and norms, with {} for the side.

    For example, {"norm_{}": "n"} maps norm_a.weight to a.w_n and norm_a.bias to a.b_n, and so on
    for side b.
    """
    return {
        f"{name.format(side)}.{kind}": tuple(f"{side}.{kind[0]}_{part}" for part in parts)
        for side in "ab"
        for name, parts in names.items()
        for kind in ("weight", "bias")
        if parts != "g" or not case.post_norm
    }


def eager(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    names = {f"attention_{{}}.{part}": part for part in "qkvo"} | {"norm_{}": "n", "gate_{}": "g"}
    uncompiled = None if case.headline else ONLY_HEADLINE
    return Provider(
        Plain(case, device).to(device, dtype),
        _layout(case, **names),
        uncompiled=uncompiled,
        drops=case.p > 0,
    )


def multihead_attention(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    layout = _layout(case, **{"attention_{}.out_proj": "o", "norm_{}": "n", "gate_{}": "g"})
    for side in "ab":
        for kind in ("weight", "bias"):
            layout[f"attention_{side}.in_proj_{kind}"] = tuple(
                f"{side}.{kind[0]}_{part}" for part in "qkv"
            )
    uncompiled = None if case.headline else ONLY_HEADLINE
    return Provider(
        WithMultiheadAttention(case, device).to(device, dtype),
        layout,
        uncompiled=uncompiled,
        drops=case.p > 0,
    )


# ---- providers: efficient layers -----------------------------------------------------------------


def merged(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    attend: Callable[..., Tensor],
    gathered: bool = False,
    uncompiled: str | None = None,
    blend: Callable[..., Tensor] | None = None,
) -> Provider:
    """Build the provider of a ``Merged`` layer; qkv_a and qkv_b hold parameters of both sides."""
    layout = _layout(case, **{"out_{}": "o", "norm_{}": "n"})
    for side, other in ("ab", "ba"):
        for kind in ("weight", "bias"):
            letter = kind[0]
            layout[f"qkv_{side}.{kind}"] = (
                f"{side}.{letter}_q",
                f"{other}.{letter}_k",
                f"{other}.{letter}_v",
            )
        if not case.post_norm:
            layout |= {
                f"gate_{side}.weight": (f"{side}.w_gx",),
                f"gate_{side}.bias": (f"{side}.b_g",),
                f"gate_read_{side}.weight": (f"{side}.w_ga",),
                f"gate_flag_{side}.weight": (f"{side}.w_ge",),
            }
    module = Merged(case, device, attend, gathered, blend).to(device, dtype)
    return Provider(module, layout, uncompiled=uncompiled, drops=case.p > 0)


def sdpa_gathered(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not case.missing:
        raise Unavailable("every sample has both modalities")
    return merged(
        case,
        device,
        dtype,
        attention.sdpa,
        gathered=True,
        uncompiled="the number of samples with both modalities depends on the data",
    )


def triton_gate(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    """Build SDPA with one Triton kernel per direction for the gate's sigmoid and blend."""
    if case.post_norm:
        raise Unavailable("there is no gate in this case")
    need_kernels(device, dtype)
    from .gated_cross_attention_gate import blend

    return merged(
        case,
        device,
        dtype,
        attention.sdpa,
        blend=blend,
        uncompiled="torch.compile generates an equivalent kernel itself",
    )


def forced(name: attention.Forced) -> Callable[..., Provider]:
    """Return a builder of SDPA with the given backend instead of the one that torch chooses."""

    def build(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
        attend = attention.sdpa_with(name, case.H, case.D // case.H, case.p, device, dtype)
        reason = "SDPA is compiled only with the backend that torch chooses"
        return merged(case, device, dtype, attend, uncompiled=reason)

    return build


def flash_attention(version: Literal[2, 3]) -> Callable[..., Provider]:
    """Return a builder of the layer with the attention of FlashAttention's own package."""

    def build(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
        attend = attention.flash_attention(version, case.D // case.H, case.p, device, dtype)
        return merged(case, device, dtype, attend, uncompiled="its kernels are already compiled")

    return build


def flex_attention(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if device.type != "cuda" or not case.headline:
        raise Unavailable(
            "timed only in the headline case on CUDA, because it compiles for each shape and has "
            "no dropout"
        )
    return merged(case, device, dtype, attention.flex())


def varlen(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable("this version of torch has no varlen_attn") from error
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or case.p:
        raise Unavailable("varlen_attn needs 16-bit tensors on CUDA and has no dropout")
    starts = {
        n: torch.arange(case.B + 1, device=device, dtype=torch.int32) * n for n in (case.N, case.M)
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        n, m = q.shape[1], k.shape[1]
        q, k, v = (y.flatten(0, 1) for y in (q, k, v))
        out: Any = varlen_attn(q, k, v, starts[n], starts[m], n, m)
        return out.unflatten(0, (-1, n))

    return merged(case, device, dtype, attend, uncompiled=None if case.headline else ONLY_HEADLINE)


# ---- providers: ours -----------------------------------------------------------------------------


def _ours(backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if backend == "fused":
        need_kernels(device, dtype)
    names = {
        f"layer.to_{{}}.{name}_proj": part
        for name, part in zip(("q", "k", "v", "out", "gate"), "qkvog", strict=True)
    }
    layout = _layout(case, **names, **{"layer.norm_{}": "n"})
    return Provider(Ours(case, device).to(device, dtype), layout, backend, drops=case.p > 0)


def reference(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _ours("reference", case, device, dtype)


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _ours("composed", case, device, dtype)


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _ours("fused", case, device, dtype)


PROVIDERS: dict[str, Callable[..., Provider]] = {
    "SDPA": functools.partial(merged, attend=attention.sdpa),
    "eager": eager,
    "nn.MultiheadAttention": multihead_attention,
    "SDPA, samples with both gathered": sdpa_gathered,
    "SDPA, gate in Triton": triton_gate,
    "SDPA flash": forced("FLASH"),
    "SDPA efficient": forced("EFFICIENT"),
    "SDPA cuDNN": forced("CUDNN"),
    "FlashAttention 2": flash_attention(2),
    "FlashAttention 3": flash_attention(3),
    "FlexAttention": flex_attention,
    "varlen_attn": varlen,
    "composed": composed,
    "fused": fused,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Return the float64 results of the reference, computed for a few samples at a time.

    The gradients of the parameters are summed over all samples.
    """
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    tensors = (problem.inputs["a"].detach(), problem.inputs["b"].detach(), problem.upstream)
    parts: list[dict[str, Tensor]] = []
    sums: dict[str, Tensor] = {}
    for a, b, upstream in zip(*(x.split(EXACT_CHUNK) for x in tensors), strict=True):
        small = replace(case, B=len(a))
        provider = reference(small, problem.device, torch.float64).load(parameters)
        inputs = {"a": a.double().requires_grad_(), "b": b.double().requires_grad_()}
        chunk = provider.results(Problem(inputs, parameters, upstream.double()))
        parts.append({name: chunk.pop(name) for name in ("out", "da", "db")})
        sums = {name: d + sums[name] if sums else d for name, d in chunk.items()}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | sums


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the gradients of each weight and its bias, and of the gate's weight columns.

    The exact gradient of a key bias is zero, so its relative error alone would be meaningless.
    """
    joined = dict(results)
    for side in "ab":
        if f"d{side}.w_gx" in joined:
            columns = [joined.pop(f"d{side}.w_g{part}") for part in "xae"]
            joined[f"d{side}.w_g"] = torch.cat(columns, 1)
        for part in "qkvog":
            if f"d{side}.b_{part}" in joined:
                bias = joined.pop(f"d{side}.b_{part}")[:, None]
                joined[f"d{side}.w_{part}"] = torch.cat([joined[f"d{side}.w_{part}"], bias], 1)
    return joined


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Return the FLOPs and bytes of each stage of the best known algorithm.

    Each pass reads and writes only what is listed; all other results stay on chip. There are
    T = B (N + M) tokens x, and R = B N M pairs of tokens in each direction. A multiply-add is
    2 FLOPs.

        forward
          project  q of a token, k and v for the other direction  6 T D^2   reads x and weights
          attend   q k^T, and probabilities times v               8 R D
          output   out_proj                                       2 T D^2   reads weights
          gate     [x ; output] W_g^T, blend                      4 T D^2   reads weights, writes y
        backward
          each GEMM twice, for the gradients of its two factors   24 T D^2
          attention, with q k^T computed again                    20 R D
          reads x, dy and the weights, writes dx and the gradients of the weights

    In a post-norm layer there is no stage "gate", and "output" writes y. Samples that lack a
    modality are only copied (stage "unchanged"). Exponentials, biases, norms and flags are not
    counted.
    """
    B, N, M, D = case.B, case.N, case.M, case.D
    if case.missing:
        B = (case.B + 2) // 3  # samples with both modalities
    tokens = B * (N + M) * D  # elements of x
    square = D * D  # elements of a weight
    unchanged = (case.B - B) * (N + M) * D  # elements of samples that lack a modality
    pairs = B * N * M * D  # R D

    def stage(name: str, flops: int, elements: int) -> dict[str, Any]:
        return {"stage": name, "flops": flops, "bytes": elements * itemsize}

    forward = [
        stage("project", 6 * tokens * D, tokens + 6 * square),
        stage("attend", 8 * pairs, 0),
        stage("output", 2 * tokens * D, 2 * square + (tokens if case.post_norm else 0)),
    ]
    backward = [
        stage("output", 4 * tokens * D, 4 * square + (2 * tokens if case.post_norm else 0)),
        stage("attend", 20 * pairs, 0),
        stage("project", 12 * tokens * D, tokens + 12 * square),
    ]
    if not case.post_norm:
        forward.append(stage("gate", 4 * tokens * D, tokens + 4 * square))
        backward.insert(0, stage("gate", 8 * tokens * D, 2 * tokens + 8 * square))
    if unchanged:
        forward.append(stage("unchanged", 0, 2 * unchanged))
        backward.append(stage("unchanged", 0, 2 * unchanged))
    return {"forward": forward, "backward": backward}
