"""Cross-attention of nn.MultiheadAttention as query pooling.

Keys and values are not computed if the absorbed form of query pooling saves enough FLOPs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..children import dense
from ..library import current_backend
from ..ops.query_pooling import query_pooling
from ..ops.query_pooling.composed import cheaper_form
from .base import KINDS, LEFT, path_of
from .pooling_base import Pooling, Sizes, are_tokens, projections_of, unsupported_dropout


class Norm(NamedTuple):
    """A LayerNorm of the tokens, before the projections to keys and values."""

    weight: Tensor | None = None  # (D,); None: no LayerNorm
    bias: Tensor | None = None  # (D,)
    eps: float = 1e-5


def attend(
    x: Tensor,
    queries: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    b_k: Tensor | None,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    norm: Norm,
) -> Tensor:
    """Compute :func:`mmfused.query_pooling`.

    With the backends "auto" and "composed", torch's attention computes the projected form.
    """
    absorbed = cheaper_form(x, queries, w_k, w_v, num_heads) == "absorbed"
    if absorbed or current_backend() in ("reference", "fused"):
        return query_pooling(
            x,
            queries,
            w_k,
            w_v,
            b_v,
            b_k,
            num_heads=num_heads,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            form="absorbed" if absorbed else "auto",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
        )
    valid_keys = fully_masked = None
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[:, :, None], 0.0)  # ignored tokens may hold NaN
        # A fully masked sample attends to all tokens here, and its output is set to 0 below.
        fully_masked = key_padding_mask.all(1)
        valid_keys = ~(key_padding_mask & ~fully_masked[:, None])[:, None, None]
    if norm.weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    bias = None if b_k is None or b_v is None else torch.cat([b_k, b_v])
    kv = F.linear(x, torch.cat([w_k, w_v]), bias)
    q = queries.expand(x.shape[0], *queries.shape[-2:])
    q, k, v = (
        y.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for y in (q, *kv.split([len(w_k), len(w_v)], -1))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid_keys, dropout_p=dropout_p)
    if fully_masked is not None:
        out = out.masked_fill(fully_masked[:, None, None, None], 0.0)
    return out.transpose(1, 2).flatten(2)


def why_not_attention(module: nn.MultiheadAttention) -> str | None:
    """Return the reason not to swap an nn.MultiheadAttention, or None."""
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "It adds extra tokens (add_bias_kv or add_zero_attn)."
    if module.kdim != module.vdim:
        return f"Keys and values differ in width: kdim {module.kdim}, vdim {module.vdim}."
    if is_parametrized(module) or is_parametrized(module.out_proj):
        return "Its weights are parametrized, and the original computes them once per call."
    if not all(weight.is_floating_point() for weight in projections_of(module)):
        return "Its weights are not floating-point."
    return unsupported_dropout(module.dropout, "dropout")


# At run time the fused class inherits from the module's own class.
if TYPE_CHECKING:
    _Original = nn.MultiheadAttention
else:
    _Original = object


class _MultiheadAttention(Pooling, _Original):
    family = "attention"
    required = (
        "embed_dim",
        "num_heads",
        "kdim",
        "vdim",
        "in_proj_weight",
        "q_proj_weight",
        "in_proj_bias",
        "out_proj",
        "bias_k",
    )
    description = (
        "pools, or attends to another input, in calls with 3-D inputs, key is value, key is not "
        "query, need_weights=False, no attn_mask and no float key_padding_mask; any other call, "
        "including self-attention, runs the original forward"
    )

    @staticmethod
    def sizes(module: nn.MultiheadAttention) -> Sizes:
        return module.kdim, None, module.embed_dim, module.embed_dim, module.num_heads

    @staticmethod
    def dropout_of(module: nn.MultiheadAttention) -> float:
        return module.dropout

    @staticmethod
    def why_not(module: nn.MultiheadAttention) -> str | None:
        return why_not_attention(module)

    @staticmethod
    def why_not_here(
        module: nn.MultiheadAttention,
        name: str,
        model: nn.Module,
    ) -> str | None:
        path, _, own = name.rpartition(".")
        return _never_fits(own, model.get_submodule(path)) if name else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        fits = not need_weights and not is_causal and attn_mask is None
        fits = fits and key is value and query is not key
        fits = fits and _MultiheadAttention.why_not(self) is None
        if not fits or not self._fits(query, key, key_padding_mask):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        x, q = (key, query) if self.batch_first else (key.transpose(0, 1), query.transpose(0, 1))
        if len(q) == 1 or (len(q) and q.stride(0) == 0):
            q = q[0]  # queries that are the same for all samples are projected once
        out = attend_with(self, x, q, key_padding_mask, batch_first=self.batch_first)
        return out, None

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
    ) -> bool:
        if not are_tokens(key) or not are_tokens(query):
            return False
        if not dense(mask) or not dense(*projections_of(self)):
            return False
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        got = (query.shape[batch], query.shape[2], key.shape[2])
        if got != (key.shape[batch], self.embed_dim, self.kdim):
            return False
        if mask is None:
            return True
        return mask.dtype == torch.bool and mask.shape == (key.shape[batch], key.shape[tokens])


def attend_with(
    mha: nn.MultiheadAttention,
    x: Tensor,
    queries: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    batch_first: bool = True,
    norm: Norm = Norm(),  # noqa: B008, it is immutable
) -> Tensor:
    """Return the output of ``mha`` for x (B, N, kdim) and queries (L, E) or (B, L, E).

    The output is (B, L, E), or (L, B, E) without ``batch_first``. As in the original without
    attention weights, a sample of which all tokens are ignored gives the bias of ``out_proj``.
    """
    *weights, w_out = projections_of(mha)
    w_q, w_k, w_v = weights[0].chunk(3) if len(weights) == 1 else weights
    b_q, b_k, b_v = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    out = attend(
        x,
        F.linear(queries, w_q, b_q),
        w_k,
        w_v,
        b_v,
        b_k,
        num_heads=mha.num_heads,
        key_padding_mask=key_padding_mask,
        dropout_p=mha.dropout if mha.training else 0.0,
        norm=norm,
    )
    if not batch_first:
        # Transposed before the projection, so that the result is contiguous as in the original.
        out = out.transpose(0, 1)
    return F.linear(out, w_out, mha.out_proj.bias)


def _never_fits(name: str, parent: nn.Module) -> str | None:
    """Return why the fused forward can never run for the attention ``name``, or None."""
    is_clip_block = path_of(type(parent)) == "open_clip.transformer.ResidualAttentionBlock"
    if is_clip_block and hasattr(parent, "ln_1_kv"):
        return "Its keys and values are normalised separately, so key is not value."
    if is_clip_block or "self" in name:
        return "Self-attention: its tokens are its queries."
    return None


KINDS["torch.nn.modules.activation.MultiheadAttention"] = _MultiheadAttention

_RETURNS_WEIGHTS = (
    "It returns the attention weights of both directions in every call, which query_pooling does "
    "not compute."
)
LEFT |= {
    f"transformers.models.{model}.modeling_{model}.{prefix}BiMultiHeadAttention": _RETURNS_WEIGHTS
    for model, prefix in {
        "grounding_dino": "GroundingDino",
        "mm_grounding_dino": "MMGroundingDino",
    }.items()
}
