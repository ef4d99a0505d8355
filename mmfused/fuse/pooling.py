"""The pooling modules of torch, timm, open_clip and transformers on :func:`mmfused.query_pooling`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..children import attached, dense, weights_of, why_called
from ..library import autocast_dtype
from ..ops.query_pooling import query_pooling
from . import counts
from .attention import attend, self_attention
from .base import KINDS, Swap, own_class, path_of


def _not_linear(linear: nn.Module, name: str) -> str | None:
    why = why_called(linear)
    return why and f"{name} {why}: its weight alone does not tell what it computes."


def _not_inner(attention: nn.Module, queries: Tensor) -> str | None:
    """Reasons against the nn.MultiheadAttention inside a head."""
    if own_class(attention) is not nn.MultiheadAttention:
        return f"The attention inside is a {type(attention).__name__}, not nn.MultiheadAttention."
    if not attention.batch_first or queries.shape[-1] != attention.embed_dim:
        return "The attention inside is not batch-first over the width of the queries."
    why = attached(attention)
    return _MultiheadAttention.why_not(attention) or (
        why and f"The attention inside {why}, which would not act."
    )


def _tokens(x: object) -> bool:
    return isinstance(x, Tensor) and dense(x) and x.dim() == 3 and x.is_floating_point()


def _ignored(mask: object, heads: int, rows: int, x: Tensor) -> Tensor | None:
    """The key padding mask that an attention mask (B, heads, rows, N), True = attend, amounts to;
    None where that is not sure.

    One row, or one merely expanded, is alike for all. Comparing values, or finding a float mask all
    0 or -inf, waits for the GPU."""
    if (
        not isinstance(mask, Tensor)
        or not dense(mask)
        or mask.dtype != torch.bool
        or mask.dim() != 4
    ):
        return None
    fits = mask.shape[3] == x.shape[1] and all(
        mask.shape[d] in (1, n) for d, n in enumerate((x.shape[0], heads, rows))
    )
    alike = all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2))
    return ~mask[:, 0, 0].expand(x.shape[0], -1) if fits and alike else None


def _weights(mha: nn.MultiheadAttention) -> list[Tensor]:
    packed = mha.in_proj_weight
    inner = (
        (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight) if packed is None else (packed,)
    )
    return [*inner, mha.out_proj.weight]


def _attend(mha, x, queries, key_padding_mask=None, *, batch_first=True, **norm) -> Tensor:
    """x (B, N, kdim), queries (L, E) or (B, L, E) -> what ``mha`` gives for them, (B, L, E) or (L,
    B, E).
    """
    *weights, w_out = _weights(mha)
    w_q, w_k, w_v = weights[0].chunk(3) if len(weights) == 1 else weights
    b_q, b_k, b_v = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    q = F.linear(queries, w_q, b_q)
    options = dict(
        num_heads=mha.num_heads,
        key_padding_mask=key_padding_mask,
        dropout_p=mha.dropout if mha.training else 0.0,
    )
    out = attend(x, q, w_k, w_v, b_v, b_k, **options, **norm)
    dead = None if key_padding_mask is None else key_padding_mask.all(1)
    if not batch_first:
        out = out.transpose(
            0, 1
        )  # before the projection, whose result is contiguous, as the original's
    out = F.linear(out, w_out, mha.out_proj.bias)
    return (
        out
        if dead is None
        else out.masked_fill(dead[:, None, None] if batch_first else dead[None, :, None], 0.0)
    )


class _Pooling(Swap):
    family = "pooling"
    # Of one module: width of the tokens, queries (None: a call brings them), width of keys and of
    # values, heads.
    sizes = None

    @classmethod
    def expects(cls, module):
        return counts.pooling(*cls.sizes(module))

    @staticmethod
    def dropout_of(module: nn.Module) -> float:
        """The share of attention weights it drops in training."""
        return 0.0

    @classmethod
    def says(cls, module):
        p = cls.dropout_of(module)
        return cls.does + (
            f"; dropout {p} of attention weights acts as before, on others than with the same seed"
            if p
            else ""
        )


def _sizes_inside(attention: nn.MultiheadAttention, queries: Tensor) -> tuple:
    return attention.kdim, queries.shape[-2], *[attention.embed_dim] * 2, attention.num_heads


def _not_dropout(p: float, name: str) -> str | None:
    return None if 0 <= p < 1 else f"{name} is {p}: query_pooling takes a number from 0 to below 1."


class _MultiheadAttention(_Pooling):
    family = "attention"
    sizes = staticmethod(lambda m: (m.kdim, None, m.embed_dim, m.embed_dim, m.num_heads))
    needs = (
        "embed_dim num_heads kdim vdim in_proj_weight q_proj_weight in_proj_bias out_proj bias_k"
    )
    does = (
        "pools, or reads another input, where key is value, not query, all 3-D, with need_weights=False, no attn_mask and no float "
        "mask; else, self-attention too, as before"
    )

    @staticmethod
    def dropout_of(module):
        return module.dropout

    @staticmethod
    def why_not(module):
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "It adds tokens of its own (add_bias_kv or add_zero_attn)."
        if module.kdim != module.vdim:
            return f"Keys and values differ in width: kdim {module.kdim}, vdim {module.vdim}."
        if is_parametrized(module) or is_parametrized(module.out_proj):
            return "Its weights are parametrized, which the original forms once a call."
        if not all(w.is_floating_point() for w in _weights(module)):
            return "Its weights are no floating-point numbers."
        return _not_dropout(module.dropout, "dropout")

    @staticmethod
    def misplaced(module, name, model):
        path, _, own = name.rpartition(".")
        return self_attention(own, model.get_submodule(path)) if name else None

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        usual = (
            need_weights or is_causal or attn_mask is not None or key is not value or query is key
        )
        if (
            usual
            or _MultiheadAttention.why_not(self)
            or not self._fits(query, key, key_padding_mask)
        ):
            args = (
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
            return super().forward(*args)
        x, q = (key, query) if self.batch_first else (key.transpose(0, 1), query.transpose(0, 1))
        if len(q) == 1 or (
            len(q) and q.stride(0) == 0
        ):  # one set of queries expanded over the batch: project it once
            q = q[0]
        return _attend(self, x, q, key_padding_mask, batch_first=self.batch_first), None

    def _fits(self, query, key, mask) -> bool:
        if not (_tokens(key) and _tokens(query) and dense(mask) and dense(*_weights(self))):
            return False
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        same = (query.shape[batch], query.shape[2], key.shape[2]) == (
            key.shape[batch],
            self.embed_dim,
            self.kdim,
        )
        return same and (
            mask is None
            or (mask.dtype == torch.bool and mask.shape == (key.shape[batch], key.shape[tokens]))
        )


class _AttentionPoolLatent(_Pooling):
    sizes = staticmethod(
        lambda m: (m.kv.in_features, m.latent_len, *[m.kv.out_features // 2] * 2, m.num_heads),
    )
    needs = "num_heads head_dim scale fused_attn pos_embed latent latent_len q kv q_norm k_norm proj proj_drop norm mlp pool"
    does = "pools the latent's tokens; an attn_mask other than a bool padding mask runs the original forward"

    @staticmethod
    def why_not(module):
        if type(module.k_norm) is not nn.Identity:
            return f"k_norm is a {type(module.k_norm).__name__}: the keys are not linear in the tokens."
        if not isinstance(module.q_norm, nn.Identity | nn.LayerNorm | nn.RMSNorm):
            return (
                f"q_norm is a {type(module.q_norm).__name__}, which may not treat each query alone."
            )
        if module.scale != module.head_dim**-0.5:
            return f"scale is {module.scale}, not head_dim ** -0.5, which only one of its two code paths follows."
        why = attached(module.k_norm)
        return _not_linear(module.kv, "kv") or (why and f"k_norm {why}, which would not act.")

    def forward(self, x, attn_mask=None):
        fits, ignore = _AttentionPoolLatent.why_not(self) is None and _tokens(x), None
        if fits and attn_mask is not None:
            ignore = _ignored(attn_mask, self.num_heads, self.latent_len, x)
            fits = (
                ignore is not None and self.fused_attn
            )  # elsewhere timm adds a bool mask to the logits
        if not fits:
            return super().forward(x) if attn_mask is None else super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        q = self.q_norm(self.q(self.latent[0]).unflatten(-1, (self.num_heads, -1))).flatten(-2)
        weight, bias = weights_of(self.kv)
        w_k, w_v = weight.chunk(2)
        b_k, b_v = (None, None) if bias is None else bias.chunk(2)
        x = query_pooling(
            x, q, w_k, w_v, b_v, b_k, num_heads=self.num_heads, key_padding_mask=ignore
        )
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x


class _AttentionalPooler(_Pooling):
    sizes = staticmethod(lambda m: _sizes_inside(m.attn, m.query))
    needs = "query attn ln_q ln_k"
    does = "pools with ln_k folded into the keys and values (applied before, where it is no plain LayerNorm or autocast rounds)"

    @staticmethod
    def dropout_of(module):
        return module.attn.dropout

    @staticmethod
    def why_not(module):
        return _not_inner(module.attn, module.query)

    def forward(self, x):
        if _AttentionalPooler.why_not(self) or not (_tokens(x) and dense(*_weights(self.attn))):
            return super().forward(x)
        norm = self._folded(x)
        return _attend(self.attn, x if norm else self.ln_k(x), self.ln_q(self.query), **norm)

    def _folded(self, x: Tensor) -> dict:
        """ln_k, where autocast does not round the tokens first: before their mean is taken off that
        costs digits.
        """
        ln = self.ln_k
        plain = path_of(type(ln)) in (
            "torch.nn.modules.normalization.LayerNorm",
            "open_clip.transformer.LayerNorm",
        )
        if not plain or ln.weight is None or ln.normalized_shape != x.shape[-1:] or attached(ln):
            return {}
        same = x.dtype == (autocast_dtype(x.device.type) or ln.weight.dtype)
        return dict(norm_weight=ln.weight, norm_bias=ln.bias, norm_eps=ln.eps) if same else {}


class _PoolingHead(_Pooling):
    sizes = staticmethod(lambda m: _sizes_inside(m.attention, m.probe))
    needs = "probe attention layernorm mlp"
    does = "pools, its probe projected once for the batch"

    @staticmethod
    def dropout_of(module):
        return module.attention.dropout

    @staticmethod
    def why_not(module):
        return _not_inner(module.attention, module.probe)

    def forward(self, hidden_state):
        return (
            self._head(hidden_state) if self._fits(hidden_state) else super().forward(hidden_state)
        )

    def _fits(self, x: Tensor) -> bool:
        return (
            _PoolingHead.why_not(self) is None and _tokens(x) and dense(*_weights(self.attention))
        )

    def _head(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        x = _attend(self.attention, x, self.probe[0], ignore)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class _MaskedPoolingHead(_PoolingHead):
    does = "pools, its probe projected once for the batch; an attention_mask that is not (B, N) runs the original forward"

    def forward(self, hidden_state, attention_mask=None):
        x, mask = hidden_state, attention_mask
        if not self._fits(x) or not self._takes(mask, x):
            return super(_PoolingHead, self).forward(x, mask)
        return self._head(x, None if mask is None else ~mask.bool())

    def _takes(self, mask: Tensor | None, x: Tensor) -> bool:
        """Phi-4 takes a bool mask. In SigLIP 2 nonzero means attend; not every attention
        implementation makes a mask of it.
        """
        if mask is None or not dense(mask) or mask.shape != x.shape[:2]:
            return mask is None
        config = getattr(self, "config", None)
        return (
            mask.dtype == torch.bool
            if config is None
            else config._attn_implementation in ("sdpa", "eager")
        )


# What a model hands down to its attention without meaning it: loss and output settings. Anything
# else set: the original forward.
_IDLE_KWARGS = (
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
    "interpolate_pos_encoding",
    "use_cache",
)


class _QFormerCrossAttention(_Pooling):
    family = "attention"
    sizes = staticmethod(
        lambda m: (
            m.key.in_features,
            None,
            m.key.out_features,
            m.value.out_features,
            m.num_attention_heads,
        ),
    )
    needs = (
        "config query key value num_attention_heads attention_head_size scaling attention_dropout"
    )
    does = "pools encoder_hidden_states under sdpa, with no mask or a bool (B, 1, 1, N); any other call runs the original forward"

    @staticmethod
    def dropout_of(module):
        return module.attention_dropout

    @staticmethod
    def why_not(module):
        implementation = getattr(module.config, "_attn_implementation", None)
        if implementation != "sdpa":
            return f"The attention implementation is {implementation!r}, which may return attention weights: choose 'sdpa'."
        reason = _not_linear(module.key, "key") or _not_linear(module.value, "value")
        return reason or _not_dropout(module.attention_dropout, "attention_probs_dropout_prob")

    @staticmethod
    def misplaced(module, name, model):
        cross = (
            not name
            or "crossattention" in name.split(".")
            or module.key.in_features != module.config.hidden_size
        )
        return None if cross else "Self-attention: its tokens are its queries."

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        **kwargs,
    ):
        x, mask, ignore = encoder_hidden_states, encoder_attention_mask, None
        fits = (
            _QFormerCrossAttention.why_not(self) is None and _tokens(x) and _tokens(hidden_states)
        )
        fits = fits and hidden_states.shape[0] in (1, x.shape[0])
        if fits and mask is not None:
            ignore = _ignored(mask, self.num_attention_heads, hidden_states.shape[1], x)
            fits = ignore is not None
        if not fits or any(
            v is not None and v is not False and k not in _IDLE_KWARGS for k, v in kwargs.items()
        ):
            return super().forward(hidden_states, attention_mask, x, mask, **kwargs)
        q = self.query(hidden_states)
        (w_k, b_k), (w_v, b_v) = weights_of(self.key), weights_of(self.value)
        q = q[0] if q.shape[0] == 1 else q  # one set of queries for the batch
        options = dict(
            num_heads=self.num_attention_heads, scale=self.scaling, key_padding_mask=ignore
        )
        options["dropout_p"] = self.attention_dropout if self.training else 0.0
        return query_pooling(x, q, w_k, w_v, b_v, b_k, **options), None


_MODELS = "transformers.models"
KINDS |= {
    "torch.nn.modules.activation.MultiheadAttention": _MultiheadAttention,
    "timm.layers.attention_pool.AttentionPoolLatent": _AttentionPoolLatent,
    "open_clip.transformer.AttentionalPooler": _AttentionalPooler,
    f"{_MODELS}.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": _PoolingHead,
    f"{_MODELS}.siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead": _MaskedPoolingHead,
    f"{_MODELS}.idefics2.modeling_idefics2.Idefics2MultiheadAttentionPoolingHead": _PoolingHead,
    f"{_MODELS}.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionMultiheadAttentionPoolingHead": _MaskedPoolingHead,
    f"{_MODELS}.blip_2.modeling_blip_2.Blip2QFormerMultiHeadAttention": _QFormerCrossAttention,
    f"{_MODELS}.instructblip.modeling_instructblip.InstructBlipQFormerMultiHeadAttention": _QFormerCrossAttention,
    f"{_MODELS}.instructblipvideo.modeling_instructblipvideo.InstructBlipVideoQFormerMultiHeadAttention": _QFormerCrossAttention,
}
