"""The library's models in plain PyTorch: the baseline of benchmarks/models.py.

Each model's file is loaded a second time under another name. In this copy, the library's ops and
modules are replaced by the classes below and by the functions in torch_functions.py.

The classes are efficient PyTorch: they use SDPA, and one GEMM for all projections of the same
tokens. The classes support only what the models use.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.losses import expert_shares
from mmfused.models import moon2

from .torch_functions import (
    combine,
    compute_dtype,
    grouped_linear,
    grouped_product,
    masked_info_nce,
    topk_routing,
)

# Name of a Linear below -> names of the library's Linears whose outputs it concatenates.
STACKED = {
    "kv_proj": ("k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_a": ("to_a.q_proj", "to_b.k_proj", "to_b.v_proj"),
    "qkv_b": ("to_b.q_proj", "to_a.k_proj", "to_a.v_proj"),
}


def heads(x: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """Split (B, N, parts * D) into ``parts`` tensors (B, heads, N, D / heads)."""
    return [y.transpose(1, 2) for y in x.unflatten(-1, (parts, num_heads, -1)).unbind(2)]


def attend(q: Tensor, k: Tensor, v: Tensor, ignore: Tensor | None) -> Tensor:
    """Apply SDPA without the keys in ``ignore``: q (B, heads, L, D / heads) -> (B, L, D)."""
    mask = None if ignore is None else ~ignore[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# ---- query pooling -------------------------------------------------------------------------------


class Pooling(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, x: Tensor, ignore: Tensor | None) -> Tensor:
        queries = queries.expand(len(x), -1, -1) if queries.dim() == 3 else queries[None]
        (q,) = heads(self.q_proj(queries), 1, self.num_heads)
        k, v = heads(self.kv_proj(x), 2, self.num_heads)
        return self.out_proj(attend(q.expand(len(x), -1, -1, -1), k, v, ignore))


class QTransformBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn: int):
        super().__init__()
        self.pool = Pooling(dim, num_heads)
        self.norm_pool = nn.LayerNorm(dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))

    def forward(self, q: Tensor, x: Tensor, ignore: Tensor | None) -> Tensor:
        q = self.norm_pool(q + self.pool(q, x, ignore))
        return self.norm_ffn(q + self.ffn(q))


class QTransform(nn.Module):
    def __init__(self, dim, num_queries, depth=1, num_heads=1, *, ffn=None, dropout=0.0):
        super().__init__()
        without_dropout(dropout)
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.blocks = nn.ModuleList(
            QTransformBlock(dim, num_heads, 4 * dim if ffn is None else ffn) for _ in range(depth)
        )

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        q = self.queries
        for block in self.blocks:
            q = block(q, x, key_padding_mask)
        return q


def without_dropout(dropout: float) -> None:
    if dropout:
        raise ValueError(f"dropout: got {dropout}, expected 0")


# ---- cross-attention and self-attention ----------------------------------------------------------


class BidirectionalGatedCrossAttention(nn.Module):
    """The layers of UniECS and UniCA, without a concatenation of the gate's inputs.

    One GEMM per modality computes the queries of one direction, and the keys and values of the
    other direction.

    ``missing="skip"``: samples that lack a modality are computed like the others, then discarded.
    ``missing="constant"``: the tokens of a missing modality are equal, so the attention output is
    the value of the first token. With SDPA over equal tokens, rounding errors in the gradients
    would fail the accuracy check.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        gate,
        indicator,
        missing,
        pre_norm=True,
        share_weights=False,
        dropout=0.0,
    ):
        super().__init__()
        without_dropout(dropout)
        if (
            share_weights
            or (gate, indicator) not in (("channel", True), ("none", False))
            or missing not in ("skip", "constant")
        ):
            raise ValueError(
                f"options: got share_weights {share_weights}, gate {gate!r}, indicator {indicator} "
                f"and missing {missing!r}, expected the options of UniECS or UniCA"
            )
        self.num_heads, self.pre_norm, self.skips = num_heads, pre_norm, missing == "skip"
        for side in "ab":
            to = nn.Module()
            to.out_proj = nn.Linear(dim, dim)
            to.gate_proj = nn.Linear(2 * dim + 1, dim) if indicator else None
            self.add_module(f"to_{side}", to)
            self.add_module(f"norm_{side}", nn.LayerNorm(dim))
            self.add_module(f"qkv_{side}", nn.Linear(dim, 3 * dim))

    def forward(
        self,
        a,
        b,
        *,
        b_key_padding_mask=None,
        a_present=None,
        b_present=None,
    ) -> tuple[Tensor, Tensor]:
        normed = (self.norm_a(a), self.norm_b(b)) if self.pre_norm else (a, b)
        q_a, k_a, v_a = heads(self.qkv_a(normed[0]), 3, self.num_heads)
        q_b, k_b, v_b = heads(self.qkv_b(normed[1]), 3, self.num_heads)
        new_a = self.finish(
            a,
            self.to_a,
            self.norm_a,
            self.read(q_a, k_b, v_b, b_key_padding_mask, b_present),
            b_present,
        )
        new_b = self.finish(
            b, self.to_b, self.norm_b, self.read(q_b, k_a, v_a, None, a_present), a_present
        )
        if not self.skips:
            return new_a, new_b
        both = (a_present & b_present)[:, None, None]
        return torch.where(both, new_a, a), torch.where(both, new_b, b)

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ignore: Tensor | None,
        present: Tensor,
    ) -> Tensor:
        attended = attend(q, k, v, ignore)
        return (
            attended
            if self.skips
            else torch.where(present[:, None, None], attended, v[:, :, 0].flatten(1)[:, None])
        )

    def finish(
        self,
        x: Tensor,
        to: nn.Module,
        norm: nn.LayerNorm,
        attended: Tensor,
        present: Tensor,
    ) -> Tensor:
        attn_out = to.out_proj(attended)
        if to.gate_proj is None:
            return x + attn_out if self.pre_norm else norm(x + attn_out)
        dim = x.shape[-1]
        w_x, w_attn, w_flag = to.gate_proj.weight.split([dim, dim, 1], 1)
        logits = F.linear(x, w_x, to.gate_proj.bias) + F.linear(attn_out, w_attn)
        logits = logits + present.to(logits.dtype)[:, None, None] * w_flag[:, 0].to(logits.dtype)
        return torch.lerp(x, attn_out.to(x.dtype), logits.sigmoid().to(x.dtype))


class Block(nn.Module):
    """UniECS's transformer block, with one GEMM for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        without_dropout(dropout)
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Identity(), nn.Linear(4 * dim, dim)
        )
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        attended = attend(*heads(self.qkv_proj(self.norm1(x)), 3, self.num_heads), ignore)
        x = x + self.gamma1 * self.out_proj(attended)
        return x + self.gamma2 * self.ffn(self.norm2(x))


# ---- mixture of experts --------------------------------------------------------------------------


class Experts(moon2.Experts):
    """MOON2.0's mixture of experts, with the gate and up projections in one weight.

    Padding is sorted to the end, where grouped_mm does not read it.
    """

    def __init__(self, layer: nn.Module, config):
        super().__init__(layer, config)
        both = torch.cat([self.w_gate.detach(), self.w_up.detach()], 1)
        del self.w_gate, self.w_up
        self.w_gate_up = nn.Parameter(both)

    def forward(self, x: Tensor) -> Tensor:
        mask, reports = self.padding.flatten(), self.reports
        self.padding = self.reports = None
        tokens = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # 16-bit logits would change choices
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(tokens.to(wide), self.router.weight.to(wide))
        routing = topk_routing(logits, self.top_k, balance=self.routing["balance"], mask=mask)
        # grouped_mm leaves the gradients of padding undefined; masked_fill sets these to 0.
        tokens = tokens.to(compute_dtype(x)).masked_fill(mask[:, None], 0)
        rows = tokens.index_select(0, routing.order // self.top_k)
        gate, up = grouped_product(rows, self.w_gate_up, routing.offsets).chunk(2, -1)
        out = grouped_product(F.silu(gate) * up, self.w_down, routing.offsets)
        live = torch.arange(len(out), device=out.device) < routing.offsets[-1]
        out = combine(out.masked_fill(~live[:, None], 0), routing)
        reports.append((expert_shares(routing, len(x)), routing.balance_loss))
        return out.view_as(x)


# ---- contrastive losses --------------------------------------------------------------------------


class MaskedInfoNCE(nn.Module):
    def __init__(
        self,
        temperature: float,
        *,
        normalize: bool,
        gather: str,
        same_id: str,
        positive_weight: float,
    ):
        super().__init__()
        if normalize:
            raise ValueError(
                "normalize: got True, expected False (embeddings are normalized already)"
            )
        self.temperature = temperature
        self.options = {"same_id": same_id, "positive_weight": positive_weight}

    def forward(self, query: Tensor, candidate: Tensor, **ids: Tensor) -> Tensor:
        return masked_info_nce(
            query, candidate, temperature=self.temperature, **self.options, **ids
        )


# ---- the models ----------------------------------------------------------------------------------


def copy_of(name: str, **replaced) -> ModuleType:
    """Load a copy of mmfused.models.<name>, and set the globals ``replaced`` in the copy."""
    path = importlib.util.find_spec(f"mmfused.models.{name}").origin
    spec = importlib.util.spec_from_file_location(f"{__package__}.torch_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.compile look up modules there
    spec.loader.exec_module(module)
    unknown = sorted(name for name in replaced if not hasattr(module, name))
    if unknown:
        raise AttributeError(f"mmfused.models.{name} has no {', '.join(unknown)} to replace")
    vars(module).update(replaced)
    return module


@functools.cache
def models() -> SimpleNamespace:
    """Return a namespace with FLUID, UniECS, UniCA, MOON2 and UNITE in plain PyTorch."""
    nce = {"masked_info_nce": masked_info_nce}
    experts = {"topk_routing": topk_routing, "grouped_linear": grouped_linear}
    classifier = copy_of("fluid_experts", **experts).MoEClassifier
    fluid = copy_of("fluid", QTransform=QTransform, MoEClassifier=classifier, **nce)
    losses = copy_of("uniecs_losses", **nce)
    torch_losses = {"loss_terms": losses.loss_terms, "adaptive_loss": losses.adaptive_loss}
    cross = {"BidirectionalGatedCrossAttention": BidirectionalGatedCrossAttention}
    uniecs = copy_of("uniecs", Block=Block, **cross, **torch_losses)
    bica = copy_of("unica_bica", **cross).BiCA
    unica = copy_of("unica", MaskedInfoNCE=MaskedInfoNCE, BiCA=bica)
    objectives = copy_of("moon2_losses", **nce)
    torch_objectives = {
        "inter_losses": objectives.inter_losses,
        "intra_loss": objectives.intra_loss,
    }
    mixture = copy_of("moon2", Experts=Experts, **torch_objectives)
    unite = copy_of("unite", **nce)
    return SimpleNamespace(
        FLUID=fluid.FLUID,
        UniECS=uniecs.UniECS,
        UniCA=unica.UniCA,
        MOON2=mixture.MOON2,
        UNITE=unite.UNITE,
    )
