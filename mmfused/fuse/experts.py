"""The experts of transformers' mixtures on :func:`mmfused.grouped_mlp`.

Either ``fuse`` swaps the experts, or a model selects the experts implementation "mmfused".

The swapped module is ``experts`` of a sparse block. The forward of ``experts`` gets tokens, indices
of the chosen experts, and routing weights. The router of the block is called as before: its hooks
run, and its logits and choices are the same.

With router logits l_1, ..., l_L of L layers, and k of E experts for each token, transformers'
``load_balancing_loss_func`` is k times the "switch" balance loss of this library over the tokens of
all layers as one batch:

    mask = attention_mask.bool().flatten()
    load_balancing_loss_func((l_1, ..., l_L), E, k, attention_mask)
        = k * topk_routing(
            cat(l_1, ..., l_L), k, token_padding_mask=cat(~mask, ..., ~mask)
        ).balance_loss

For one layer, the result is k times the balance loss of the layer. For several layers, the result
is k times the mean of the layers' balance losses, minus k E sum_e Cov(f_e, P_e). In a layer, f_e is
the share of expert e in all assignments, and P_e the mean probability of expert e; Cov is the
covariance over the layers. Layers that are unbalanced in different ways can thus compensate for
each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..children import attached, dense
from ..ops.grouped_mlp import grouped_linear, grouped_mlp
from ..ops.grouped_mlp.checks import FLOATS
from ..ops.topk_routing import Routing, routing_from_indices
from .base import KINDS, Swap, path_of

# The weight layout that the kernels need, as attributes that transformers sets on the classes.
_LAYOUT = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_post_expert_norm": False,
}
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


def _layout_mismatch(module: nn.Module) -> str | None:
    for name, value in _LAYOUT.items():
        if getattr(module, name, value) is not value:
            return (
                f"{name} is {not value}: the kernels take weights (E, out, in) with gate rows "
                "before up rows, without bias or norm."
            )
    return None


def _not_swiglu(module: Any) -> str | None:
    """Return why the experts are not silu(gate) * up, or None."""
    # Read from the class: torch 2.11's compiler gets the name of a bound method wrong.
    gate = None if "_apply_gate" in module.__dict__ else type(module)._apply_gate
    default_gate = getattr(gate, "__name__", "") == "_default_apply_gate"
    if not default_gate or not getattr(module, "has_gate", True):
        return "Its experts have no gate, or a custom one."
    act = type(module.act_fn)
    return None if path_of(act) in _SILU else f"act_fn is a {act.__name__}, not silu."


def _unsupported_weights(module: nn.Module) -> str | None:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name)
        # FSDP turns DTensors into plain tensors before forward, and forward checks the weights.
        plain = dense(weight) or type(weight).__name__ == "DTensor"
        if not plain or weight.dtype not in FLOATS:
            return (
                f"{name} is a {type(weight).__name__} of {weight.dtype}: quantised, or a tensor "
                "subclass."
            )
    return None


def _routing(module: Any, index: Tensor, weights: Tensor) -> Routing:
    experts = len(module.down_proj)
    if not getattr(module, "_is_expert_parallel", False):
        return routing_from_indices(index, weights, experts)
    # Indices >= E are experts on another rank. They are routed to one extra expert, whose rows
    # are sorted to the end. The extra expert is then removed, so that its rows are not computed.
    weights = weights.masked_fill(index >= experts, 0.0)
    routing = routing_from_indices(index.clamp(max=experts), weights, experts + 1)
    return routing._replace(
        counts=routing.counts[:, :-1],
        offsets=routing.offsets[:-1],
        tiles=routing.tiles[:0],
    )


def _experts(
    module: Any,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the output of the experts in the dtype of ``x``."""
    down = module.down_proj
    # With x in float64, the routing weights become float64, too.
    weights = weights.to(torch.promote_types(weights.dtype, x.dtype))
    routing = _routing(module, index, weights)
    # Under autocast, x may be the float32 output of a norm while the experts are 16-bit.
    supported = (x.dtype, torch.promote_types(x.dtype, torch.float32))
    tokens = x if down.dtype in supported else x.to(down.dtype)
    if _not_swiglu(module) is None:
        out = grouped_mlp(tokens, routing, module.gate_up_proj, down, activation="swiglu")
        return out.to(x.dtype)
    if getattr(module, "has_gate", True):
        hidden = module._apply_gate(grouped_linear(tokens, routing, module.gate_up_proj))
    else:
        hidden = module.act_fn(grouped_linear(tokens, routing, module.up_proj))
    return grouped_linear(hidden, routing, down, gather=False, combine=True).to(x.dtype)


def _experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run experts as the implementation "mmfused" in transformers' experts interface."""
    reason = _layout_mismatch(self)
    if reason is not None:
        raise ValueError(
            f"experts_implementation='mmfused' cannot run {type(self).__name__}: "
            f"{reason.removesuffix('.')}"
        )
    return _experts(self, hidden_states, top_k_index, top_k_weights)


def register_experts() -> None:
    """Register ``"mmfused"`` as an experts implementation of transformers.

    Call this function once, before a model selects the implementation with ``from_pretrained(...,
    experts_implementation="mmfused")`` or ``model.set_experts_implementation("mmfused")``. The
    implementation runs the experts of models that use transformers' experts interface, also under
    expert parallelism. Experts with a silu gate run on :func:`mmfused.grouped_mlp`, and other
    experts on :func:`mmfused.grouped_linear`. Transposed, interleaved or biased experts (GPT-OSS)
    raise ``ValueError``.

    A process that unpickles such a model must call this function, too. ``config.save_pretrained``
    does not save the implementation's name.

    Raises:
        ImportError: transformers is missing or has no experts interface.

    Examples:
        >>> import torch, mmfused
        >>> from transformers import MixtralConfig, MixtralModel
        >>> mmfused.register_experts()
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
        >>> sizes |= dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
        >>> model = MixtralModel(MixtralConfig(vocab_size=100, **sizes))
        >>> input_ids = torch.tensor([[5, 17, 3, 99]])
        >>> before = model(input_ids).last_hidden_state
        >>> model.set_experts_implementation("mmfused")
        >>> torch.allclose(model(input_ids).last_hidden_state, before, atol=1e-5)
        True
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "register_experts needs transformers 5 or newer, with its experts interface"
        ) from error
    ExpertsInterface.register("mmfused", _experts_forward)


class _MoeExperts(Swap):
    family = "experts"
    required = ("gate_up_proj", "down_proj", "act_fn", "config", "_apply_gate")
    description = (
        "computes its experts in one pass, whatever experts_implementation is set; the router of "
        "the block is called as before"
    )

    if TYPE_CHECKING:
        gate_up_proj: Tensor
        down_proj: Tensor

    @staticmethod
    def why_not(module: Any) -> str | None:
        if getattr(module, "_is_expert_parallel", False):
            return (
                "Its experts are distributed over ranks: use experts_implementation='mmfused' "
                "(mmfused.register_experts())."
            )
        if getattr(module.config, "_experts_implementation", None) == "deepgemm_megamoe":
            return (
                "experts_implementation is 'deepgemm_megamoe', which changes the weights' layout."
            )
        reason = _layout_mismatch(module) or _not_swiglu(module) or _unsupported_weights(module)
        hooks = attached(module.act_fn)
        return reason or (hooks and f"act_fn {hooks}, which would be skipped.")

    @classmethod
    def estimate_benefit(cls, module: Any) -> str:
        chosen = getattr(module.config, "num_experts_per_tok", "k")
        numbers = f"by count {chosen} x {module.gate_up_proj.shape[-1]} numbers"
        return (
            f"on a GPU the gathered copies of each token, {numbers}, are never written; "
            "no benefit on a CPU, where each expert is one product either way"
        )

    @staticmethod
    def why_not_here(module: Any, name: str, model: nn.Module) -> str | None:
        if not name:
            return None
        gate = getattr(model.get_submodule(name.rpartition(".")[0]), "gate", None)
        # A router without the option renormalises.
        renormalised = getattr(gate, "norm_topk_prob", True)
        if getattr(gate, "top_k", None) == 1 and renormalised:
            return (
                "One expert for each token and renormalised weights: each weight is 1, and its "
                "router learns nothing from it."
            )
        return None

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        given = (hidden_states, top_k_index, top_k_weights)
        fits = _MoeExperts.why_not(self) is None and hidden_states.dim() == 2
        if not fits or not dense(*given, self.gate_up_proj, self.down_proj):
            return super().forward(*given)
        return _experts(self, *given)


# These classes have the same forward, and their blocks have the same kind of router, `gate`.
KINDS |= {
    f"transformers.models.{model}.modeling_{model}.{prefix}Experts": _MoeExperts
    for model, prefix in {
        "mixtral": "Mixtral",
        "olmoe": "Olmoe",
        "qwen2_moe": "Qwen2Moe",
        "qwen3_moe": "Qwen3Moe",
        "qwen3_next": "Qwen3Next",
        "qwen3_vl_moe": "Qwen3VLMoeText",
        "qwen3_5_moe": "Qwen3_5Moe",
    }.items()
}
