"""Gated cross-attention, both directions: the layers of UniECS and UniCA, their baselines, and the
least work they take.

All providers of a case compute one function of one set of parameters: a reads b, b reads a, both as
they were; what is timed is one tensor (a ``cat``: one kernel more for everybody). Where samples
lack a modality they come back unchanged: providers that cannot skip compute them and choose, and
one gathers the samples that have both.

Dropout draws elements of its own in every provider: it acts when timed, and the gate judges without
it. Torch's own attention may give wrong gradients at these lengths (cuDNN: NaN with 64 keys and a
mask, pytorch #196678): the gate looks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmfused

from .gated_cross_attention_cases import Case, cases, custom, make, present
from .measure import Problem, Provider, Unavailable, need_kernels

__all__ = [
    "OURS",
    "PROVIDERS",
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
OURS = ("composed", "fused", "fused, one block kernel")
EXACT_CHUNK = 48  # samples in float64 at a time: a multiple of 3, as what samples lack repeats
ONCE = "compiled in the headline case alone: a run has minutes"


# ---- providers: plain layers ---------------------------------------------------------------------


class Plain(nn.Module):
    """UniECS's released layer, or UniCA's: each projection a Linear, softmax of all logits, a
    concatenation for the gate.
    """

    def __init__(self, case: Case, device: torch.device):
        super().__init__()
        self.case, dim = case, case.D
        for side, here in zip("ab", present(case, device), strict=True):
            self.register_buffer(f"present_{side}", here)
            self.add_module(f"norm_{side}", nn.LayerNorm(dim))
            self.add_module(f"attention_{side}", self.attention())
            if not case.post_norm:
                self.add_module(f"gate_{side}", nn.Linear(2 * dim + 1, dim))
        self.drop = nn.Dropout(case.p)

    def attention(self) -> nn.Module:
        return Softmax(self.case.D, self.case.H, self.case.p)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        sides = {"a": a, "b": b}
        normed = (
            sides
            if self.case.post_norm
            else {side: getattr(self, f"norm_{side}")(x) for side, x in sides.items()}
        )
        outs = []
        for side, other in ("ab", "ba"):
            x, here = sides[side], getattr(self, f"present_{other}")
            read = self.drop(
                self.read(getattr(self, f"attention_{side}"), normed[side], normed[other])
            )
            if self.case.post_norm:
                out = getattr(self, f"norm_{side}")(x + read)
            else:
                flag = x.new_ones(len(x)) if here is None else here.to(x)
                parts = [x, read, flag[:, None, None].expand(-1, x.shape[1], 1)]
                g = torch.sigmoid(getattr(self, f"gate_{side}")(torch.cat(parts, -1)))
                out = g * read + (1 - g) * x
            outs.append(
                out
                if here is None
                else torch.where((self.present_a & self.present_b)[:, None, None], out, x)
            )
        return torch.cat(outs, 1)

    def read(self, attention: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return attention(x, context)


class Softmax(nn.Module):
    def __init__(self, dim: int, num_heads: int, p: float):
        super().__init__()
        self.num_heads, self.drop = num_heads, nn.Dropout(p)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.q(x), self.k(context), self.v(context))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in parts)
        probs = self.drop((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1))
        return self.o((probs @ v).transpose(1, 2).flatten(2))


class WithMultiheadAttention(Plain):
    def attention(self) -> nn.Module:
        return nn.MultiheadAttention(
            self.case.D, self.case.H, dropout=self.case.p, batch_first=True
        )

    def read(self, attention: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return attention(x, context, context, need_weights=False)[0]


def _stacked(case: Case, **names: str) -> dict[str, tuple[str, ...]]:
    """A layout: for each side, Linears and norms and the letters of what is stacked in them."""
    return {
        f"{name.format(side)}.{kind}": tuple(f"{side}.{kind[0]}_{part}" for part in parts)
        for side in "ab"
        for name, parts in names.items()
        for kind in ("weight", "bias")
        if parts != "g" or not case.post_norm
    }


def eager(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    names = {f"attention_{{}}.{part}": part for part in "qkvo"} | {"norm_{}": "n", "gate_{}": "g"}
    uncompiled = None if case.headline else ONCE
    return Provider(
        Plain(case, device).to(device, dtype),
        _stacked(case, **names),
        uncompiled=uncompiled,
        drops=case.p > 0,
    )


def multihead_attention(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    layout = _stacked(case, **{"attention_{}.out_proj": "o", "norm_{}": "n", "gate_{}": "g"})
    for side in "ab":
        for kind in ("weight", "bias"):
            layout[f"attention_{side}.in_proj_{kind}"] = tuple(
                f"{side}.{kind[0]}_{part}" for part in "qkv"
            )
    uncompiled = None if case.headline else ONCE
    return Provider(
        WithMultiheadAttention(case, device).to(device, dtype),
        layout,
        uncompiled=uncompiled,
        drops=case.p > 0,
    )


# ---- providers: written well ---------------------------------------------------------------------


class Merged(nn.Module):
    """Torch at its best: one product a modality (its own queries, the other direction's keys and
    values), no concatenation.

    ``attend(q, k, v, p)`` takes and gives (B, tokens, H, D / H).  ``gathered``: the samples that
    have both alone are computed. ``blend(x, read, logits)``: the end of the gate."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        attend,
        gathered: bool = False,
        blend=None,
    ):
        super().__init__()
        self.case, self.attend, self.gathered, dim = case, attend, gathered, case.D
        self.blend = blend or (lambda x, read, logits: torch.lerp(x, read, logits.sigmoid()))
        for side in "ab":
            self.add_module(f"norm_{side}", nn.LayerNorm(dim))
            self.add_module(f"qkv_{side}", nn.Linear(dim, 3 * dim))
            self.add_module(f"out_{side}", nn.Linear(dim, dim))
            if not case.post_norm:
                self.add_module(f"gate_{side}", nn.Linear(dim, dim))
                self.add_module(f"gate_read_{side}", nn.Linear(dim, dim, bias=False))
                self.add_module(f"gate_flag_{side}", nn.Linear(1, dim, bias=False))
        there = present(case, device)
        self.register_buffer("both", there[0] & there[1] if case.missing else None)
        self.drop = nn.Dropout(case.p)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.gathered:
            outs = self.layer(a, b)
            if self.both is not None:
                outs = [
                    torch.where(self.both[:, None, None], out, x)
                    for out, x in zip(outs, (a, b), strict=True)
                ]
            return torch.cat(outs, 1)
        index = self.both.nonzero().squeeze(1)
        outs = self.layer(a.index_select(0, index), b.index_select(0, index))
        return torch.cat(
            [x.index_copy(0, index, out) for x, out in zip((a, b), outs, strict=True)], 1
        )

    def layer(self, a: Tensor, b: Tensor) -> list[Tensor]:
        heads, post_norm = self.case.H, self.case.post_norm
        parts = []
        for x, norm, qkv in ((a, self.norm_a, self.qkv_a), (b, self.norm_b, self.qkv_b)):
            parts.append(qkv(x if post_norm else norm(x)).unflatten(-1, (3, heads, -1)).unbind(2))
        (q_a, k_a, v_a), (q_b, k_b, v_b) = parts
        p = self.case.p if self.training else 0.0
        reads = self.attend(q_a, k_b, v_b, p), self.attend(q_b, k_a, v_a, p)
        return [
            self.end(side, x, read.flatten(2))
            for side, x, read in zip("ab", (a, b), reads, strict=True)
        ]

    def end(self, side: str, x: Tensor, read: Tensor) -> Tensor:
        read = self.drop(getattr(self, f"out_{side}")(read))
        if self.case.post_norm:
            return getattr(self, f"norm_{side}")(x + read)
        gate = getattr(self, f"gate_{side}")
        bias = (
            gate.bias + getattr(self, f"gate_flag_{side}").weight[:, 0]
        )  # whoever is computed has both
        logits = F.linear(x, gate.weight, bias) + getattr(self, f"gate_read_{side}")(read)
        return self.blend(x, read, logits)


def merged(
    case: Case,
    device,
    dtype,
    attend: Callable[..., Tensor],
    gathered=False,
    uncompiled=None,
    blend=None,
) -> Provider:
    layout = _stacked(case, **{"out_{}": "o", "norm_{}": "n"})
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
            }
            layout |= {
                f"gate_read_{side}.weight": (f"{side}.w_ga",),
                f"gate_flag_{side}.weight": (f"{side}.w_ge",),
            }
    module = Merged(case, device, attend, gathered, blend).to(device, dtype)
    return Provider(module, layout, uncompiled=uncompiled, drops=case.p > 0)


def attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    backend: SDPBackend | None = None,
) -> Tensor:
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v)), dropout_p=p
        ).transpose(1, 2)


def sdpa_gathered(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not case.missing:
        raise Unavailable("no sample lacks a modality")
    return merged(
        case,
        device,
        dtype,
        attend_sdpa,
        gathered=True,
        uncompiled="how many samples have both is data",
    )


def triton_gate(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    """SDPA, and what many would then write: sigmoid and blend as one elementwise kernel, forward
    and backward.
    """
    if case.post_norm:
        raise Unavailable("there is no gate")
    need_kernels(device, dtype)
    from .gated_cross_attention_gate import blend

    return merged(
        case,
        device,
        dtype,
        attend_sdpa,
        blend=blend,
        uncompiled="compiled, torch writes such a kernel itself",
    )


def forced(name: str) -> Callable[..., Provider]:
    """SDPA on one of its backends, whatever torch would choose."""
    backend = getattr(SDPBackend, f"{name}_ATTENTION")

    def build(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
        if device.type != "cuda" and name != "FLASH":
            raise Unavailable("torch has it for CUDA alone")
        why = "SDPA is compiled with the backend that torch chooses"
        return merged(
            case, device, dtype, functools.partial(attend_sdpa, backend=backend), uncompiled=why
        )

    return build


def flex_attention(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if device.type != "cuda" or not case.headline:
        raise Unavailable(
            "timed on CUDA in the headline case alone: it compiles for each shape, and has no dropout"
        )
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(
        flex.flex_attention, dynamic=False
    )  # not compiled it writes all logits

    def attend(q, k, v, p):
        return compiled(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)

    return merged(case, device, dtype, attend)


def varlen(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable("this torch has no varlen_attn") from error
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or case.p:
        raise Unavailable("varlen_attn takes 16-bit tensors on CUDA, and has no dropout")
    starts = {
        n: torch.arange(case.B + 1, device=device, dtype=torch.int32) * n for n in (case.N, case.M)
    }

    def attend(q, k, v, p):
        n, m = q.shape[1], k.shape[1]
        packed = (y.flatten(0, 1) for y in (q, k, v))
        return varlen_attn(*packed, starts[n], starts[m], n, m).unflatten(0, (-1, n))

    return merged(case, device, dtype, attend, uncompiled=None if case.headline else ONCE)


# ---- providers: ours -----------------------------------------------------------------------------


class Ours(nn.Module):
    def __init__(self, case: Case, device: torch.device):
        super().__init__()
        options = dict(gate="none", pre_norm=False) if case.post_norm else {}
        self.layer = mmfused.BidirectionalGatedCrossAttention(
            case.D, case.H, dropout=case.p, **options
        )
        for side, here in zip("ab", present(case, device), strict=True):
            self.register_buffer(f"present_{side}", here)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat(self.layer(a, b, a_present=self.present_a, b_present=self.present_b), 1)


def _ours(backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if backend == "fused":
        need_kernels(device, dtype)
    names = {
        f"layer.to_{{}}.{name}_proj": part
        for name, part in zip(("q", "k", "v", "out", "gate"), "qkvog", strict=True)
    }
    layout = _stacked(case, **names, **{"layer.norm_{}": "n"})
    return Provider(Ours(case, device).to(device, dtype), layout, backend, drops=case.p > 0)


reference, composed, fused = (
    functools.partial(_ours, backend) for backend in ("reference", "composed", "fused")
)


def block(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    """Forward in 3 launches, not 4, which read T D elements less (see ``work``): what attention has
    written for backward alone. The FLOPs are those of fused, but for rows: the tiles of each sample
    are filled up by themselves."""
    provider = fused(case, device, dtype)
    from mmfused.kernels.gated_cross_attention import plans

    if not plans.block_takes(case.D, case.D // case.H, dtype):
        raise Unavailable(
            "the block kernel takes D <= 256 and heads of at most 64 channels, 32 in float32"
        )
    return replace(provider, within=functools.partial(plans.form, "block"))


PROVIDERS = {
    "SDPA": functools.partial(
        merged, attend=attend_sdpa
    ),  # first, as the baseline that must be compiled
    "eager": eager,
    "nn.MultiheadAttention": multihead_attention,
    "SDPA, samples with both gathered": sdpa_gathered,
    "SDPA, gate in Triton": triton_gate,
    "SDPA flash": forced("FLASH"),
    "SDPA efficient": forced("EFFICIENT"),
    "SDPA cuDNN": forced("CUDNN"),
    "FlexAttention": flex_attention,
    "varlen_attn": varlen,
    "composed": composed,
    "fused": fused,
    "fused, one block kernel": block,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """The reference in float64, a few samples at a time: samples are independent, gradients of
    parameters add up.
    """
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    chunks = zip(
        *(x.detach().split(EXACT_CHUNK) for x in (*problem.inputs.values(), problem.upstream)),
        strict=True,
    )
    parts, sums = [], {}
    for a, b, upstream in chunks:
        provider = reference(replace(case, B=len(a)), problem.device, torch.float64).load(
            parameters
        )
        inputs = {"a": a.double().requires_grad_(), "b": b.double().requires_grad_()}
        chunk = provider.results(Problem(inputs, parameters, upstream.double()))
        parts.append({name: chunk.pop(name) for name in ("out", "da", "db")})
        sums = {
            name: gradient + sums[name] if sums else gradient for name, gradient in chunk.items()
        }
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | sums


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns of the gate as one; weight and bias of an affine map side by side.

    The gradient of the key bias is exactly zero: what rounding leaves of it has no scale of its
    own, only its map's."""
    joined = dict(results)
    for side in "ab":
        if f"d{side}.w_gx" in joined:
            joined[f"d{side}.w_g"] = torch.cat(
                [joined.pop(f"d{side}.w_g{part}") for part in "xae"], 1
            )
        for part in "qkvog":
            if f"d{side}.b_{part}" in joined:
                bias = joined.pop(f"d{side}.b_{part}")[:, None]
                joined[f"d{side}.w_{part}"] = torch.cat([joined[f"d{side}.w_{part}"], bias], 1)
    return joined


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict]]:
    """FLOPs and bytes, stage by stage, of the best algorithm known: tokens are read once and
    written once, all else stays on chip.

    T = B (N + M) tokens, twice the samples' pairs P = B N M for the two directions; a multiply-add
    is 2 FLOPs.

        forward   project    q of its own direction, k and v of the other   6 T D^2    reads the
                  tokens and 6 D^2 weights attend     S = Q K^T, O = P V, both directions
                  8 P D output     A = O W_o^T                                    2 T D^2    reads 2
                  D^2 weights gate       [x ; A] W_g^T, blend (none post-norm)          4 T D^2
                  reads 4 D^2 weights, writes the tokens
        backward  each product twice, with respect to either factor: 24 T D^2 and, with S again, 20
                             P D reads the tokens and their gradients, writes gradients of tokens
                             and weights

    Samples that lack a modality come back as they are: read and written, no FLOPs. The 2 P H
    exponentials run beside the products. Biases, norms and flags are small beside the rest."""
    B, D = (case.B + 2) // 3 if case.missing else case.B, case.D
    tokens, pairs, square = B * (case.N + case.M) * D, B * case.N * case.M * D, D * D
    idle = (case.B - B) * (case.N + case.M) * D

    def stage(name, flops, elements):
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
    if idle:
        forward.append(stage("unchanged", 0, 2 * idle))
        backward.append(stage("unchanged", 0, 2 * idle))
    return {"forward": forward, "backward": backward}
