"""Pooling heads of timm, open_clip and transformers on :func:`mmfused.query_pooling`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..children import attached, dense, weights_of
from ..library import autocast_dtype
from ..ops.query_pooling import query_pooling
from .attention import Norm, attend_with, why_not_attention
from .base import KINDS, own_class, path_of
from .pooling_base import Pooling, Sizes, are_tokens, not_linear, padding_of, projections_of


def _sizes_inside(attention: nn.MultiheadAttention, queries: Tensor) -> Sizes:
    width = attention.embed_dim
    return attention.kdim, queries.shape[-2], width, width, attention.num_heads


def _unsupported_attention(attention: Any, queries: Tensor) -> str | None:
    """Return why the attention inside a head prevents swapping the head, or None."""
    if own_class(attention) is not nn.MultiheadAttention:
        return f"The attention inside is a {type(attention).__name__}, not nn.MultiheadAttention."
    if not attention.batch_first or queries.shape[-1] != attention.embed_dim:
        return "The attention inside is not batch-first, or not as wide as the queries."
    reason = why_not_attention(attention)
    if reason is not None:
        return reason
    hooks = attached(attention)
    return hooks and f"The attention inside {hooks}, which would be skipped."


# ---- timm ----------------------------------------------------------------------------------------


class _AttentionPoolLatent(Pooling):
    required = (
        "num_heads",
        "head_dim",
        "scale",
        "fused_attn",
        "pos_embed",
        "latent",
        "latent_len",
        "q",
        "kv",
        "q_norm",
        "k_norm",
        "proj",
        "proj_drop",
        "norm",
        "mlp",
        "pool",
    )
    description = (
        "pools with the latent as queries; a call with an attn_mask runs the original forward, "
        "unless the mask is a bool padding mask and fused_attn is True"
    )

    if TYPE_CHECKING:
        num_heads: int
        fused_attn: bool
        pos_embed: Tensor | None
        latent: Tensor
        latent_len: int
        q: nn.Module
        kv: nn.Module
        q_norm: nn.Module
        proj: nn.Module
        proj_drop: nn.Module
        norm: nn.Module
        mlp: nn.Module | None
        pool: str

    @staticmethod
    def sizes(module: Any) -> Sizes:
        width = module.kv.out_features // 2
        return module.kv.in_features, module.latent_len, width, width, module.num_heads

    @staticmethod
    def why_not(module: Any) -> str | None:
        k_norm, q_norm = type(module.k_norm), type(module.q_norm)
        if k_norm is not nn.Identity:
            return f"k_norm is a {k_norm.__name__}: the keys are not linear in the tokens."
        if not isinstance(module.q_norm, nn.Identity | nn.LayerNorm | nn.RMSNorm):
            return f"q_norm is a {q_norm.__name__}, which may not treat each query separately."
        if module.scale != module.head_dim**-0.5:
            return (
                f"scale is {module.scale}, not head_dim ** -0.5, and the original forward uses "
                "scale only without fused_attn."
            )
        hooks = attached(module.k_norm)
        reason = not_linear(module.kv, "kv")
        return reason or (hooks and f"k_norm {hooks}, which would be skipped.")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        fits = _AttentionPoolLatent.why_not(self) is None and are_tokens(x)
        ignore = None
        if fits and attn_mask is not None:
            ignore = padding_of(attn_mask, self.num_heads, self.latent_len, x)
            # Without fused_attn timm adds a bool mask to the logits.
            fits = ignore is not None and self.fused_attn
        if not fits:
            return super().forward(x) if attn_mask is None else super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        q = self.q_norm(self.q(self.latent[0]).unflatten(-1, (self.num_heads, -1))).flatten(-2)
        weight, bias = weights_of(self.kv)
        w_k, w_v = weight.chunk(2)
        b_k, b_v = (None, None) if bias is None else bias.chunk(2)
        x = query_pooling(
            x,
            q,
            w_k,
            w_v,
            b_v,
            b_k,
            num_heads=self.num_heads,
            key_padding_mask=ignore,
        )
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


# ---- open_clip -----------------------------------------------------------------------------------


class _AttentionalPooler(Pooling):
    required = ("query", "attn", "ln_q", "ln_k")
    description = (
        "pools; ln_k is folded into the projections if it is a plain LayerNorm and the tokens are "
        "not cast"
    )

    if TYPE_CHECKING:
        query: Tensor
        attn: nn.MultiheadAttention
        ln_q: nn.Module
        ln_k: Any

    @staticmethod
    def sizes(module: Any) -> Sizes:
        return _sizes_inside(module.attn, module.query)

    @staticmethod
    def dropout_of(module: Any) -> float:
        return module.attn.dropout

    @staticmethod
    def why_not(module: Any) -> str | None:
        return _unsupported_attention(module.attn, module.query)

    def forward(self, x: Tensor) -> Tensor:
        fits = _AttentionalPooler.why_not(self) is None and are_tokens(x)
        if not fits or not dense(*projections_of(self.attn)):
            return super().forward(x)
        norm = self._folded_norm(x)
        tokens = x if norm.weight is not None else self.ln_k(x)
        return attend_with(self.attn, tokens, self.ln_q(self.query), norm=norm)

    def _folded_norm(self, x: Tensor) -> Norm:
        """Return ln_k if it can be folded, else an empty Norm.

        ln_k is not folded if autocast would round the tokens, because rounding before the mean is
        subtracted loses precision.
        """
        ln = self.ln_k
        plain = path_of(type(ln)) in (
            "torch.nn.modules.normalization.LayerNorm",
            "open_clip.transformer.LayerNorm",
        )
        if not plain or ln.weight is None or ln.normalized_shape != x.shape[-1:] or attached(ln):
            return Norm()
        if x.dtype != (autocast_dtype(x.device.type) or ln.weight.dtype):
            return Norm()
        return Norm(ln.weight, ln.bias, ln.eps)


# ---- transformers --------------------------------------------------------------------------------


class _PoolingHead(Pooling):
    required = ("probe", "attention", "layernorm", "mlp")
    description = "pools, with its probe projected once for the batch"

    if TYPE_CHECKING:
        probe: Tensor
        attention: nn.MultiheadAttention
        layernorm: nn.Module
        mlp: nn.Module

    @staticmethod
    def sizes(module: Any) -> Sizes:
        return _sizes_inside(module.attention, module.probe)

    @staticmethod
    def dropout_of(module: Any) -> float:
        return module.attention.dropout

    @staticmethod
    def why_not(module: Any) -> str | None:
        return _unsupported_attention(module.attention, module.probe)

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not self._fits(hidden_state):
            return super().forward(hidden_state)
        return self._head(hidden_state)

    def _fits(self, x: Tensor) -> bool:
        fits = _PoolingHead.why_not(self) is None and are_tokens(x)
        return fits and dense(*projections_of(self.attention))

    def _head(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        x = attend_with(self.attention, x, self.probe[0], ignore)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class _MaskedPoolingHead(_PoolingHead):
    description = (
        "pools, with its probe projected once for the batch; an attention_mask that is not (B, N) "
        "runs the original forward"
    )

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, mask = hidden_state, attention_mask
        if not self._fits(x) or not self._is_padding(mask, x):
            return super(_PoolingHead, self).forward(x, mask)
        return self._head(x, None if mask is None else ~mask.bool())

    def _is_padding(self, mask: Tensor | None, x: Tensor) -> bool:
        """Return whether ``mask`` is None or a padding mask (B, N), nonzero = attend.

        The head of Phi-4, which has no config, needs a bool mask. The head of SigLIP 2 accepts any
        dtype; its mask is a padding mask if the attention implementation is "sdpa" or "eager".
        """
        if mask is None or not dense(mask) or mask.shape != x.shape[:2]:
            return mask is None
        config: Any = getattr(self, "config", None)
        if config is None:
            return mask.dtype == torch.bool
        return config._attn_implementation in ("sdpa", "eager")


KINDS |= {
    "timm.layers.attention_pool.AttentionPoolLatent": _AttentionPoolLatent,
    "open_clip.transformer.AttentionalPooler": _AttentionalPooler,
}
KINDS |= {
    f"transformers.models.{model}.modeling_{model}.{prefix}MultiheadAttentionPoolingHead": kind
    for model, prefix, kind in (
        ("siglip", "Siglip", _PoolingHead),
        ("siglip2", "Siglip2", _MaskedPoolingHead),
        ("idefics2", "Idefics2", _PoolingHead),
        ("phi4_multimodal", "Phi4MultimodalVision", _MaskedPoolingHead),
    )
}
