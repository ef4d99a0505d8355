"""Benchmark of query pooling: cases, baselines, and the least work that the op needs.

The cases are the heads of FLUID and SigLIP. With ``block`` they have all the projections and biases
of nn.MultiheadAttention; without it they have only queries, W_K and W_V. All providers of a case
compute the same function of the same parameters.

FLUID has one head, so SDPA's head_dim is 768. The flash and cuDNN backends support head_dim only up
to 256, so torch uses a slower backend. With 8 heads, head_dim is 96; with 12 it is 64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import mmfused

from . import attention
from .measure import Problem, Provider, Unavailable, need_kernels

SIZES = "B, N, D, L queries, H heads"
OURS = ("composed", "fused")
EXACT_CHUNK = 64  # samples per float64 call


@dataclass(frozen=True)
class Case:
    """``B`` samples of ``N`` tokens of width ``D``, pooled by ``L`` queries with ``H`` heads.

    ``block``: project the queries and the output too, and use biases.
    """

    name: str
    B: int
    N: int
    D: int
    L: int
    H: int
    block: bool = True
    headline: bool = False  # compiled with autotuning on CUDA
    cpu_B: int | None = 8  # batch size on a CPU; None: not measured on a CPU


CASES = (
    Case("fluid", 1024, 197, 768, 32, 1, block=False, headline=True),
    Case("fluid-n512", 1024, 512, 768, 32, 1, block=False),
    Case("fluid-block", 1024, 197, 768, 32, 1, cpu_B=32),
    Case("fluid-h8-b128", 128, 197, 768, 32, 8),
    Case("fluid-h8-b1024", 1024, 197, 768, 32, 8, cpu_B=None),
    Case("siglip-head", 1024, 197, 768, 1, 12),
    Case("bottleneck", 1024, 32, 768, 2, 1, block=False),
    Case("fluid-l2-block", 1024, 197, 768, 2, 1, cpu_B=32),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """Return the cases for a device; ``quick``: at most 2 samples (64 on CUDA)."""
    chosen = list(CASES)
    if device_type != "cuda":
        chosen = [replace(case, B=case.cpu_B) for case in CASES if case.cpu_B]
    limit = 64 if device_type == "cuda" else 2
    return [replace(case, B=min(case.B, limit)) for case in chosen] if quick else chosen


def custom(shape: dict[str, int]) -> Case:
    """Return a case with ``block``; sizes that are not in ``shape`` are FLUID's, with B = 8."""
    defaults = {"B": 8, "N": 197, "D": 768, "L": 32, "H": 1}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"query_pooling: shape: got {', '.join(unknown)}, expected {', '.join(defaults)}"
        )
    sizes: dict[str, Any] = defaults | shape
    if min(sizes.values()) < 1 or sizes["D"] % sizes["H"]:
        raise ValueError(
            f"query_pooling: shape: got {sizes}, expected positive sizes where H divides D"
        )
    name = "-".join(f"{name}{size}" for name, size in sizes.items())
    return Case(f"custom-{name}", **sizes)


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Draw tokens, parameters and upstream gradient; logits have a variance of about 1."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    parameters = {"queries": randn(case.L, case.D)}
    for part in "qkvo" if case.block else "kv":
        parameters[f"w_{part}"] = randn(case.D, case.D, std=case.D**-0.5)
        if case.block:
            parameters[f"b_{part}"] = randn(case.D, std=0.1)
    x = randn(case.B, case.N, case.D).requires_grad_()
    return Problem({"x": x}, parameters, randn(case.B, case.L, case.D))


# ---- providers -----------------------------------------------------------------------------------


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention with queries that are repeated for each sample, as in FLUID."""

    def __init__(self, dim: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]


class ProjectedSDPA(nn.Module):
    """Attention with one GEMM for keys and values, and queries that are projected only once.

    ``attend(q, k, v, p)``: attention on tensors (B, tokens, H, D / H), by default torch's SDPA.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int,
        num_heads: int,
        block: bool,
        attend: attention.Attend = attention.sdpa,
    ) -> None:
        super().__init__()
        self.attend: attention.Attend = attend
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.q_proj = nn.Linear(dim, dim) if block else nn.Identity()
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=block)
        self.out_proj = nn.Linear(dim, dim) if block else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(self.queries).unflatten(-1, (self.num_heads, -1))  # (L, H, D/H)
        kv = self.kv_proj(x).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.unbind(2)  # (B, N, H, D/H)
        out = self.attend(q.expand(x.shape[0], -1, -1, -1), k, v, 0.0)
        return self.out_proj(out.flatten(2))


def linears(block: bool, **names: str) -> dict[str, tuple[str, ...]]:
    """Return the ``layout`` of a provider from names of Linears.

    For example, with ``kv_proj="kv"``, kv_proj.weight is the concatenation of w_k and w_v. With
    ``block``, kv_proj.bias is the concatenation of b_k and b_v.
    """
    kinds = {"weight": "w", "bias": "b"} if block else {"weight": "w"}
    return {
        f"{name}.{kind}": tuple(f"{letter}_{part}" for part in parts)
        for name, parts in names.items()
        for kind, letter in kinds.items()
    }


def multihead_attention(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not case.block:
        raise Unavailable("it always projects queries and output, which this case does not have")
    module = MultiheadAttention(case.D, case.L, case.H).to(device, dtype)
    layout = {
        "queries": ("queries",),
        "attention.in_proj_weight": ("w_q", "w_k", "w_v"),
        "attention.in_proj_bias": ("b_q", "b_k", "b_v"),
        "attention.out_proj.weight": ("w_o",),
        "attention.out_proj.bias": ("b_o",),
    }
    return Provider(module, layout)


def attention_pool_latent(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    try:
        from timm.layers import AttentionPoolLatent
    except ImportError as error:
        raise Unavailable("timm is not installed") from error
    options = {"num_heads": case.H, "latent_len": case.L, "pool_type": "", "qkv_bias": case.block}
    if not case.block:
        if "q_proj" not in inspect.signature(AttentionPoolLatent).parameters:
            raise Unavailable("this timm always projects the queries, which this case does not do")
        options["q_proj"] = False
    module = AttentionPoolLatent(case.D, case.D if case.block else 0, **options).to(device, dtype)
    module.mlp = None  # the MLP after the pooling is not part of the case
    names = {"q": "q", "kv": "kv", "proj": "o"} if case.block else {"kv": "kv"}
    return Provider(module, {"latent": ("queries",)} | linears(case.block, **names))


def projected_sdpa(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    attend: attention.Attend = attention.sdpa,
    uncompiled: str | None = None,
) -> Provider:
    module = ProjectedSDPA(case.D, case.L, case.H, case.block, attend).to(device, dtype)
    names = {"q_proj": "q", "kv_proj": "kv", "out_proj": "o"} if case.block else {"kv_proj": "kv"}
    layout = {"queries": ("queries",)} | linears(case.block, **names)
    return Provider(module, layout, uncompiled=uncompiled)


def forced(name: attention.Forced) -> Callable[..., Provider]:
    """Return a builder of SDPA with the given backend instead of the one that torch chooses."""

    def build(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
        attend = attention.sdpa_with(name, case.H, case.D // case.H, 0.0, device, dtype)
        reason = "SDPA is compiled only with the backend that torch chooses"
        return projected_sdpa(case, device, dtype, attend, reason)

    return build


def flash_attention(version: Literal[2, 3]) -> Callable[..., Provider]:
    """Return a builder with the attention of FlashAttention's own package."""

    def build(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
        attend = attention.flash_attention(version, case.D // case.H, 0.0, device, dtype)
        return projected_sdpa(case, device, dtype, attend, "its kernels are already compiled")

    return build


def flex_attention(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if device.type != "cuda" or case.H == 1:
        raise Unavailable("timed only on CUDA, and not with a head of all channels")
    reason = "the attention is compiled in any case"
    return projected_sdpa(case, device, dtype, attention.flex(), reason)


def _ours(backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    block = case.block
    module = mmfused.QueryPooling(
        case.D, case.L, case.H, q_proj=block, out_proj=block, bias=block
    ).to(device, dtype)
    names = {"k_proj": "k", "v_proj": "v"} | ({"q_proj": "q", "out_proj": "o"} if block else {})
    return Provider(module, {"queries": ("queries",)} | linears(block, **names), backend)


def reference(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _ours("reference", case, device, dtype)


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _ours("composed", case, device, dtype)


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    return _ours("fused", case, device, dtype)


PROVIDERS = {
    "nn.MultiheadAttention": multihead_attention,
    "timm AttentionPoolLatent": attention_pool_latent,
    "projected KV + SDPA": projected_sdpa,
    "projected KV + SDPA flash": forced("FLASH"),
    "projected KV + SDPA efficient": forced("EFFICIENT"),
    "projected KV + SDPA cuDNN": forced("CUDNN"),
    "projected KV + FlashAttention 2": flash_attention(2),
    "projected KV + FlashAttention 3": flash_attention(3),
    "projected KV + FlexAttention": flex_attention,
    "composed": composed,
    "fused": fused,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Return the float64 results of the reference, computed for a few samples at a time.

    The gradients of the parameters are summed over all samples.
    """
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    provider = reference(case, problem.device, torch.float64).load(parameters)
    outs: list[Tensor] = []
    dxs: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    tokens = problem.inputs["x"].detach()
    upstreams = problem.upstream.split(EXACT_CHUNK)
    for x, upstream in zip(tokens.split(EXACT_CHUNK), upstreams, strict=True):
        inputs = {"x": x.double().requires_grad_()}
        chunk = provider.results(Problem(inputs, parameters, upstream.double()))
        outs.append(chunk.pop("out"))
        dxs.append(chunk.pop("dx"))
        sums = {name: d + sums[name] if sums else d for name, d in chunk.items()}
    return {"out": torch.cat(outs), "dx": torch.cat(dxs)} | sums


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the gradients of each weight and its bias.

    The exact gradient of the key bias is zero, so its relative error alone would be meaningless.
    """
    joined = dict(results)
    for part in "qkvo":
        if f"db_{part}" in results:
            bias = joined.pop(f"db_{part}")
            joined[f"dw_{part}"] = torch.cat([results[f"dw_{part}"], bias[:, None]], 1)
    return joined


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Return the FLOPs and bytes of each stage of the best known algorithm.

    The algorithm moves W_K into the queries: the logits are S = Q' X^T, where Q' = Q W_K has
    R = H L rows and X (B, N, D) are the tokens. With the probabilities P = softmax(S), the pooled
    tokens are Z = P X. A multiply-add is 2 FLOPs, and each tensor is moved once in a stage. Only a
    case with ``block`` has q_proj and the stage "output".

        forward
          queries  Q' = Q W_K                         2 L D^2        + 2 L D^2 for q_proj
          pool     S = Q' X^T, Z = P X                4 B R N D      reads X, writes Z
          values   O = Z W_V^T, head by head          2 B L D^2      reads Z, writes O
          output   Y = O W_O^T                        2 B L D^2
        backward
          output   dO = dY W_O, dW_O = dY^T O         4 B L D^2
          values   dZ = dO W_V, dW_V = dO^T Z         4 B L D^2      reads dO and Z, writes dZ
          pool     S again, dP = dZ X^T, dQ' = dS X   3 * 2 B R N D  reads X, dZ, Z (rowsum(dZ Z))
                   dX = [P;dS]^T [dZ;Q']              4 B R N D      writes dX
          queries  dW_K and dQ from dQ'               4 L D^2        + 4 L D^2 for q_proj

    No bytes are counted for P, S, dP and dS, which stay on chip. K and V are not computed.
    """
    B, N, D, L, block = case.B, case.N, case.D, case.L, case.block
    R = case.H * L
    x, z, o, w = B * N * D, B * R * D, B * L * D, D * D  # elements of X, Z, O and a weight
    queries = (2 if block else 1) * L * w  # multiply-adds of Q W_K and of q_proj

    def stage(name: str, flops: int, elements: int) -> dict[str, Any]:
        return {"stage": name, "flops": flops, "bytes": elements * itemsize}

    query_weights = (2 if block else 1) * w
    forward = [
        stage("queries", 2 * queries, query_weights + (L + R) * D),
        stage("pool", 4 * R * N * D * B, x + z),
        stage("values", 2 * o * D, z + w + o),
    ]
    backward = [
        stage("values", 4 * o * D, o + 2 * z + 2 * w),
        stage("pool", 10 * R * N * D * B, 2 * x + 2 * z),
        stage("queries", 4 * queries, 2 * query_weights + 2 * (L + R) * D),
    ]
    if block:
        forward.append(stage("output", 2 * o * D, 2 * o + w))
        backward.insert(0, stage("output", 4 * o * D, 3 * o + 2 * w))
    return {"forward": forward, "backward": backward}
