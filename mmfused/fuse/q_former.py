"""The cross-attention of BLIP-2's and InstructBLIP's Q-Formers on :func:`mmfused.query_pooling`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..children import weights_of
from ..ops.query_pooling import query_pooling
from .base import KINDS
from .pooling_base import Pooling, Sizes, are_tokens, not_linear, padding_of, unsupported_dropout

# Arguments that models pass to the attention, where these arguments have no effect. If any other
# keyword argument is set, the original forward runs.
_UNUSED_KWARGS = (
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
    "interpolate_pos_encoding",
    "use_cache",
)


class _QFormerCrossAttention(Pooling):
    family = "attention"
    required = (
        "config",
        "query",
        "key",
        "value",
        "num_attention_heads",
        "attention_head_size",
        "scaling",
        "attention_dropout",
    )
    description = (
        "pools encoder_hidden_states with sdpa and either no mask or a bool mask (B, 1, 1, N); any "
        "other call runs the original forward"
    )

    if TYPE_CHECKING:
        query: nn.Module
        key: nn.Module
        value: nn.Module
        num_attention_heads: int
        scaling: float
        attention_dropout: float

    @staticmethod
    def sizes(module: Any) -> Sizes:
        return (
            module.key.in_features,
            None,
            module.key.out_features,
            module.value.out_features,
            module.num_attention_heads,
        )

    @staticmethod
    def dropout_of(module: Any) -> float:
        return module.attention_dropout

    @staticmethod
    def why_not(module: Any) -> str | None:
        implementation = getattr(module.config, "_attn_implementation", None)
        if implementation != "sdpa":
            return (
                f"The attention implementation is {implementation!r}, which may return attention "
                "weights: choose 'sdpa'."
            )
        reason = not_linear(module.key, "key") or not_linear(module.value, "value")
        dropout = module.attention_dropout
        return reason or unsupported_dropout(dropout, "attention_probs_dropout_prob")

    @staticmethod
    def why_not_here(module: Any, name: str, model: nn.Module) -> str | None:
        if not name or "crossattention" in name.split("."):
            return None
        other_width = module.key.in_features != module.config.hidden_size
        return None if other_width else "Self-attention: its tokens are its queries."

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        x, mask, ignore = encoder_hidden_states, encoder_attention_mask, None
        fits = _QFormerCrossAttention.why_not(self) is None
        fits = fits and are_tokens(x) and are_tokens(hidden_states)
        fits = fits and hidden_states.shape[0] in (1, x.shape[0])
        if fits and mask is not None:
            ignore = padding_of(mask, self.num_attention_heads, hidden_states.shape[1], x)
            fits = ignore is not None
        if not fits or _has_effect(kwargs):
            return super().forward(hidden_states, attention_mask, x, mask, **kwargs)
        q = self.query(hidden_states)
        (w_k, b_k), (w_v, b_v) = weights_of(self.key), weights_of(self.value)
        out = query_pooling(
            x,
            q[0] if q.shape[0] == 1 else q,  # one set of queries for the batch
            w_k,
            w_v,
            b_v,
            b_k,
            num_heads=self.num_attention_heads,
            scale=self.scaling,
            key_padding_mask=ignore,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return out, None


def _has_effect(kwargs: dict[str, Any]) -> bool:
    return any(
        value is not None and value is not False and name not in _UNUSED_KWARGS
        for name, value in kwargs.items()
    )


for _model, _prefix in (
    ("blip_2", "Blip2"),
    ("instructblip", "InstructBlip"),
    ("instructblipvideo", "InstructBlipVideo"),
):
    _path = f"transformers.models.{_model}.modeling_{_model}"
    KINDS[f"{_path}.{_prefix}QFormerMultiHeadAttention"] = _QFormerCrossAttention
