"""fuse(model): the pooling modules a model already has, timm's, open_clip's, transformers' and torch's own, run on query_pooling.

A module found by its exact type keeps its identity, parameters, hooks and state_dict: only its ``__class__`` becomes a subclass of
its own class with another forward. No class is patched, no library is imported. Each forward says at every call whether it may
pool that call; what it cannot prove equal, attention weights or a mask that is no padding mask, runs the original forward.

Equal up to rounding, with one exception: a sample whose tokens are all masked pools to 0. There nn.MultiheadAttention gives NaN,
and SigLIP 2's head the mean over the padding. BLIP-2 repeats a padding mask (B, N) for every query, and only the values could tell,
so such a call is not pooled; give the Q-Former ``mask.bool()[:, None, None]`` instead: the same numbers, and pooled.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .library import autocast_dtype
from .ops.query_pooling import query_pooling
from .ops.query_pooling.function import dead_samples


@dataclass
class FuseReport:
    """What :func:`fuse` did: qualified names ("" is the root itself) -> what the module does now, or why it was left."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fuse: {len(self.swapped)} swapped, {len(self.left)} left"]
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            lines += [f"  {title} {name or '(root)'}: {phrase}" for name, phrase in entries.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, dry_run: bool = False) -> FuseReport:
    """Let the pooling modules of this model, and of no other, run on :func:`mmfused.query_pooling`.

    Known are nn.MultiheadAttention with learned queries beside it, timm's AttentionPoolLatent, open_clip's AttentionalPooler, the
    pooling heads of SigLIP, SigLIP 2, Idefics2 and Phi-4, and the Q-Former cross-attention of BLIP-2 and InstructBLIP.

    Args:
        model: any module; it may itself be one of the known ones. Fusing it again changes nothing.
        dry_run: report only.

    Returns: a :class:`FuseReport`; print it. Modules that are of no known type are in neither part.

    Raises: ``TypeError`` where ``model`` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model is a {type(model).__name__}; it takes a torch.nn.Module.")
    report, heads = FuseReport(), []
    for name, module in model.named_modules():  # a head comes before what it holds
        cls, fused = _own_class(module), isinstance(module, _Fused)
        kind = KINDS.get(_path(cls))
        if any(name.startswith(head) for head in heads):
            continue
        if kind is None:
            known = next((base.__qualname__ for base in cls.__mro__ if _path(base) in KINDS), None)
            reason = known and f"{cls.__qualname__} is a subclass of {known}, whose forward may be another."
        else:
            reason = _other_version(kind, cls, module) or kind.why_not(module) or kind.misplaced(module, name, model)
        if kind is not None and (fused or reason is None):
            report.swapped[name] = f"already swapped: {kind.does}" if fused else kind.does
            heads.append(f"{name}." if name else "")
            if not dry_run:
                module.__class__ = _fused_class(kind, cls)
        elif reason is not None:
            report.left[name] = reason
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Give every module that :func:`fuse` swapped its class back; returns their qualified names.

    Raises ``TypeError``, and changes nothing, where another library has made a class of its own from a fused one.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, _Fused)}
    for name, module in fused.items():
        if _own_class(module) is type(module):
            raise TypeError(f"unfuse: {name or '(root)'} is a {_path(type(module))}, made from a fused class; undo that first.")
    for module in fused.values():
        module.__class__ = _own_class(module)
    return list(fused)


_classes: dict[type, type] = {}  # a module's own class -> its fused subclass


class _Fused:
    """What the forwards below share.

    ``needs``: the attributes they read.  ``does``: a phrase for the report.  ``why_not(module)``: the reason against pooling it,
    or None; asked at every call too, for modules are edited after fusing.  ``misplaced``: the reason against its place in a model.
    """

    needs = does = ""

    @staticmethod
    def misplaced(module: nn.Module, name: str, model: nn.Module) -> str | None:
        return None

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the module's own class, which a fresh process can find, and derive the fused one again."""
        made, own = super().__reduce_ex__(protocol), _own_class(self)
        return made if own is type(self) else (_revive, (own,), *made[2:])

    def _get_name(self) -> str:
        return f"Fused{super()._get_name()}"  # printed only: other libraries look modules up by __name__, which stays


def _fused_class(kind: type, cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type(cls.__name__, (kind, cls), {"__doc__": cls.__doc__, "__module__": __name__})
    return _classes[cls]


def _revive(cls: type) -> nn.Module:
    return object.__new__(_fused_class(KINDS[_path(cls)], cls))


def _own_class(module: nn.Module) -> type:
    cls = type(module)
    return cls.__bases__[-1] if _classes.get(cls.__bases__[-1]) is cls else cls


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _other_version(kind: type, cls: type, module: nn.Module) -> str | None:
    """Another release may have built the class differently."""
    missing = [name for name in kind.needs.split() if not hasattr(module, name)]
    if missing:
        return f"This version of {cls.__qualname__} has no {', '.join(missing)}: its structure is another."
    new = inspect.signature(cls.forward).parameters.keys() - inspect.signature(kind.forward).parameters.keys()
    if new:
        return f"This version of {cls.__qualname__} takes {', '.join(sorted(new))}, which fuse does not know."
    return _touched(module, "this module", hooks=False)


def _touched(module: nn.Module, name: str, hooks: bool = True) -> str | None:
    """Hooks of a module whose weights are used without calling it would never run; a forward of its own would not be heard."""
    if "forward" in module.__dict__:
        return f"The forward of {name} was replaced on the instance."
    seen = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return f"Hooks on {name} would not run." if hooks and seen else None


def _not_linear(linear: nn.Module, name: str) -> str | None:
    if type(linear) is not nn.Linear:
        return f"{name} is a {type(linear).__name__}, not nn.Linear: its weight alone does not tell what it computes."
    if not linear.weight.is_floating_point():
        return f"{name} has {linear.weight.dtype} weights."
    return _touched(linear, name)


def _not_inner(attention: nn.Module, queries: Tensor) -> str | None:
    """Reasons against the nn.MultiheadAttention inside a head."""
    if type(attention) not in (nn.MultiheadAttention, _classes.get(nn.MultiheadAttention)):
        return f"The attention inside is a {type(attention).__name__}, not nn.MultiheadAttention."
    if not attention.batch_first or queries.shape[-1] != attention.embed_dim:
        return "The attention inside is not batch-first over the width of the queries."
    return _MultiheadAttention.why_not(attention) or _touched(attention, "the attention inside")


def _dense(*tensors: Tensor | None) -> bool:
    """Plain tensors: neither nested nor sparse nor a subclass (DTensor, quantised) that computes in its own way."""
    return all(
        t is None or (type(t).__name__ in ("Tensor", "Parameter", "FakeTensor") and t.layout is torch.strided and not t.is_nested)
        for t in tensors
    )


def _tokens(x: object) -> bool:
    return isinstance(x, Tensor) and _dense(x) and x.dim() == 3 and x.is_floating_point()


def _ignored(mask: object, heads: int, rows: int, x: Tensor) -> Tensor | None:
    """The key padding mask that an attention mask (B, heads, rows, N), True = attend, amounts to; None where that is not sure.

    One row, or one merely expanded, is alike for all. Comparing values, or finding a float mask all 0 or -inf, waits for the GPU.
    """
    if not isinstance(mask, Tensor) or not _dense(mask) or mask.dtype != torch.bool or mask.dim() != 4:
        return None
    fits = mask.shape[3] == x.shape[1] and all(mask.shape[d] in (1, n) for d, n in enumerate((x.shape[0], heads, rows)))
    alike = all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2))
    return ~mask[:, 0, 0].expand(x.shape[0], -1) if fits and alike else None


def _weights(mha: nn.MultiheadAttention) -> list[Tensor]:
    packed = mha.in_proj_weight
    inner = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight) if packed is None else (packed,)
    return [*inner, mha.out_proj.weight]


def _attend(mha, x, queries, key_padding_mask=None, *, batch_first=True, **norm) -> Tensor:
    """x (B, N, kdim), queries (L, E) or (B, L, E) -> what ``mha`` gives for them, (B, L, E) or (L, B, E)."""
    *weights, w_out = _weights(mha)
    w_q, w_k, w_v = weights[0].chunk(3) if len(weights) == 1 else weights
    b_q, b_k, b_v = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    q = F.linear(queries, w_q, b_q)
    out = query_pooling(x, q, w_k, w_v, b_v, b_k, num_heads=mha.num_heads, key_padding_mask=key_padding_mask, **norm)
    dead = dead_samples(key_padding_mask, None)
    if not batch_first:
        out = out.transpose(0, 1)  # before the projection, whose result is contiguous, as the original's
    out = F.linear(out, w_out, mha.out_proj.bias)
    return out if dead is None else out.masked_fill(dead[:, None, None] if batch_first else dead[None, :, None], 0.0)


class _MultiheadAttention(_Fused):
    needs = "embed_dim num_heads kdim vdim in_proj_weight q_proj_weight in_proj_bias out_proj bias_k"
    does = "pools where key is value, not query, all 3-D, with need_weights=False, no attn_mask and no float mask; else as before"

    @staticmethod
    def why_not(module):
        if module.dropout > 0:
            return f"dropout is {module.dropout} and acts on the attention weights: set it to 0."
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "It adds tokens of its own (add_bias_kv or add_zero_attn)."
        if module.kdim != module.vdim:
            return f"Keys and values differ in width: kdim {module.kdim}, vdim {module.vdim}."
        return None if all(w.is_floating_point() for w in _weights(module)) else "Its weights are no floating-point numbers."

    @staticmethod
    def misplaced(module, name, model):
        parent = model.get_submodule(name.rpartition(".")[0])
        for p in parent.parameters(recurse=False) if name else ():
            if p.shape[-1:] == (module.embed_dim,) and (p.dim() == 2 or (p.dim() == 3 and 1 in p.shape[:2])):
                return None
        return "No learned queries beside it: self-attention, or cross-attention between inputs." if name else None

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        usual = need_weights or is_causal or attn_mask is not None or key is not value or query is key
        if usual or _MultiheadAttention.why_not(self) or not self._fits(query, key, key_padding_mask):
            args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(*args)
        x, q = (key, query) if self.batch_first else (key.transpose(0, 1), query.transpose(0, 1))
        if q.shape[0] == 1 or q.stride(0) == 0:  # one set of queries expanded over the batch: project it once
            q = q[0]
        return _attend(self, x, q, key_padding_mask, batch_first=self.batch_first), None

    def _fits(self, query, key, mask) -> bool:
        if not (_tokens(key) and _tokens(query) and _dense(mask) and _dense(*_weights(self))):
            return False
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        same = (query.shape[batch], query.shape[2], key.shape[2]) == (key.shape[batch], self.embed_dim, self.kdim)
        return same and (mask is None or (mask.dtype == torch.bool and mask.shape == (key.shape[batch], key.shape[tokens])))


class _AttentionPoolLatent(_Fused):
    needs = "num_heads head_dim scale fused_attn pos_embed latent latent_len q kv q_norm k_norm proj proj_drop norm mlp pool"
    does = "pools the latent's tokens; an attn_mask other than a bool padding mask runs the original forward"

    @staticmethod
    def why_not(module):
        if type(module.k_norm) is not nn.Identity:
            return f"k_norm is a {type(module.k_norm).__name__}: the keys are not linear in the tokens."
        if not isinstance(module.q_norm, nn.Identity | nn.LayerNorm | nn.RMSNorm):
            return f"q_norm is a {type(module.q_norm).__name__}, which may not treat each query alone."
        if module.scale != module.head_dim**-0.5:
            return f"scale is {module.scale}, not head_dim ** -0.5, which only one of its two code paths follows."
        return _not_linear(module.kv, "kv") or _touched(module.k_norm, "k_norm")

    def forward(self, x, attn_mask=None):
        fits, ignore = _AttentionPoolLatent.why_not(self) is None and _tokens(x) and _dense(self.kv.weight), None
        if fits and attn_mask is not None:
            ignore = _ignored(attn_mask, self.num_heads, self.latent_len, x)
            fits = ignore is not None and self.fused_attn  # elsewhere timm adds a bool mask to the logits
        if not fits:
            return super().forward(x) if attn_mask is None else super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        q = self.q_norm(self.q(self.latent[0]).unflatten(-1, (self.num_heads, -1))).flatten(-2)
        (w_k, w_v), bias = self.kv.weight.chunk(2), self.kv.bias
        b_k, b_v = (None, None) if bias is None else bias.chunk(2)
        x = query_pooling(x, q, w_k, w_v, b_v, b_k, num_heads=self.num_heads, key_padding_mask=ignore)
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x


class _AttentionalPooler(_Fused):
    needs = "query attn ln_q ln_k"
    does = "pools with ln_k folded into the keys and values (applied before, where it is no plain LayerNorm or autocast rounds)"

    @staticmethod
    def why_not(module):
        return _not_inner(module.attn, module.query)

    def forward(self, x):
        if _AttentionalPooler.why_not(self) or not (_tokens(x) and _dense(*_weights(self.attn))):
            return super().forward(x)
        norm = self._folded(x)
        return _attend(self.attn, x if norm else self.ln_k(x), self.ln_q(self.query), **norm)

    def _folded(self, x: Tensor) -> dict:
        """ln_k, where autocast does not round the tokens first: before their mean is taken off that costs digits."""
        ln = self.ln_k
        plain = _path(type(ln)) in ("torch.nn.modules.normalization.LayerNorm", "open_clip.transformer.LayerNorm")
        if not plain or ln.weight is None or ln.normalized_shape != x.shape[-1:] or _touched(ln, "ln_k"):
            return {}
        same = x.dtype == (autocast_dtype(x.device.type) or ln.weight.dtype)
        return dict(norm_weight=ln.weight, norm_bias=ln.bias, norm_eps=ln.eps) if same else {}


class _PoolingHead(_Fused):
    needs = "probe attention layernorm mlp"
    does = "pools, its probe projected once for the batch"

    @staticmethod
    def why_not(module):
        return _not_inner(module.attention, module.probe)

    def forward(self, hidden_state):
        return self._head(hidden_state) if self._fits(hidden_state) else super().forward(hidden_state)

    def _fits(self, x: Tensor) -> bool:
        return _PoolingHead.why_not(self) is None and _tokens(x) and _dense(*_weights(self.attention))

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
        """Phi-4 takes a bool mask. In SigLIP 2 nonzero means attend; not every attention implementation makes a mask of it."""
        if mask is None or not _dense(mask) or mask.shape != x.shape[:2]:
            return mask is None
        config = getattr(self, "config", None)
        return mask.dtype == torch.bool if config is None else config._attn_implementation in ("sdpa", "eager")


# What a model hands down to its attention without meaning it: loss and output settings. Anything else set: the original forward.
_IDLE_KWARGS = ("output_hidden_states", "return_dict", "num_items_in_batch", "interpolate_pos_encoding", "use_cache")


class _QFormerCrossAttention(_Fused):
    needs = "config query key value num_attention_heads attention_head_size scaling attention_dropout"
    does = "pools encoder_hidden_states under sdpa, with no mask or a bool (B, 1, 1, N); any other call runs the original forward"

    @staticmethod
    def why_not(module):
        if module.attention_dropout > 0:
            return f"attention_probs_dropout_prob is {module.attention_dropout}: it must be 0, in the config before building."
        implementation = getattr(module.config, "_attn_implementation", None)
        if implementation != "sdpa":
            return f"The attention implementation is {implementation!r}, which may return attention weights: choose 'sdpa'."
        return _not_linear(module.key, "key") or _not_linear(module.value, "value")

    @staticmethod
    def misplaced(module, name, model):
        cross = not name or "crossattention" in name.split(".") or module.key.in_features != module.config.hidden_size
        return None if cross else "Self-attention: its tokens are its queries."

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        x, mask, ignore = encoder_hidden_states, encoder_attention_mask, None
        fits = _QFormerCrossAttention.why_not(self) is None and _tokens(x) and _tokens(hidden_states)
        fits = fits and hidden_states.shape[0] in (1, x.shape[0]) and _dense(self.key.weight, self.value.weight)
        if fits and mask is not None:
            ignore = _ignored(mask, self.num_attention_heads, hidden_states.shape[1], x)
            fits = ignore is not None
        if not fits or any(v is not None and v is not False and k not in _IDLE_KWARGS for k, v in kwargs.items()):
            return super().forward(hidden_states, attention_mask, x, mask, **kwargs)
        q, k, v = self.query(hidden_states), self.key, self.value
        q = q[0] if q.shape[0] == 1 else q  # one set of queries for the batch
        options = dict(num_heads=self.num_attention_heads, scale=self.scaling, key_padding_mask=ignore)
        return query_pooling(x, q, k.weight, v.weight, v.bias, k.bias, **options), None


_MODELS = "transformers.models"
KINDS: dict[str, type[_Fused]] = {
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
