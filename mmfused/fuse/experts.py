"""The experts of transformers' mixtures on :func:`mmfused.grouped_mlp`: swapped by ``fuse``, or
chosen by name as a backend.

What is swapped is the module ``experts`` of a sparse block, which gets tokens, chosen experts and
weights. The router beside it is called as before: its hooks, its recorded logits and the loss made
of them stay, and the choice is the same to the last bit.

transformers' ``load_balancing_loss_func`` is k times our "switch" balance, over the tokens of all
layers taken as one batch:

    load_balancing_loss_func((l_1, ..., l_L), E, k, attention_mask) = k * topk_routing(cat(l_1, ...,
        l_L), k, token_padding_mask=cat(~mask, ..., ~mask)).balance_loss

For one layer that is k times its own balance loss. For several it is k times their mean, less k E
sum_e Cov(f_e, P_e) over the layers: layers that are uneven in different ways make up for one
another there, and do not where each has a loss of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..children import attached, dense
from ..ops.grouped_mlp import grouped_linear, grouped_mlp
from ..ops.grouped_mlp.checks import FLOATS
from ..ops.topk_routing import Routing, routing_from_indices
from .base import KINDS, Swap, path_of

# What transformers' decorator notes of an experts class, and what the kernels take.
_LAYOUT = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_post_expert_norm": False,
}
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


def _other_layout(module) -> str | None:
    for name, value in _LAYOUT.items():
        if getattr(module, name, value) is not value:
            return f"{name} is {not value}: the kernels take experts (E, out, in), gate rows before up rows, no bias, no norm."
    return None


def _not_swiglu(module) -> str | None:
    """silu(gate) * up, by the gate of every experts class that defines none of its own."""
    # Of the class: torch 2.11's compiler compares the name of a bound method wrongly.
    gate = None if "_apply_gate" in module.__dict__ else type(module)._apply_gate
    if (
        not getattr(module, "has_gate", True)
        or getattr(gate, "__name__", "") != "_default_apply_gate"
    ):
        return "Its experts have no gate, or one of their own."
    act = type(module.act_fn)
    return None if path_of(act) in _SILU else f"act_fn is a {act.__name__}, not silu."


def _other_weights(module) -> str | None:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name)
        # FSDP's DTensors are plain when forward runs, which looks again
        if not (dense(weight) or type(weight).__name__ == "DTensor") or weight.dtype not in FLOATS:
            return f"{name} is a {type(weight).__name__} of {weight.dtype}: quantised, or computed elsewhere."
    return None


def _routing(module, index: Tensor, weights: Tensor) -> Routing:
    experts = len(module.down_proj)
    if not getattr(module, "_is_expert_parallel", False):
        return routing_from_indices(index, weights, experts)
    # Choices of another rank's experts carry a number from E on. As one more expert they sort to
    # the end; without the end of that expert, their rows are nobody's, like those of masked tokens.
    weights = weights.masked_fill(index >= experts, 0.0)
    routing = routing_from_indices(index.clamp(max=experts), weights, experts + 1)
    return routing._replace(
        counts=routing.counts[:, :-1], offsets=routing.offsets[:-1], tiles=routing.tiles[:0]
    )


def _experts(module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As the original's forward, in the dtype of ``x``."""
    down = module.down_proj
    routing = _routing(
        module, index, weights.to(torch.promote_types(weights.dtype, x.dtype))
    )  # float64: all of its digits
    takes = (x.dtype, torch.promote_types(x.dtype, torch.float32))
    tokens = (
        x if down.dtype in takes else x.to(down.dtype)
    )  # under autocast a float32 norm may come before 16-bit experts
    if _not_swiglu(module) is None:
        return grouped_mlp(tokens, routing, module.gate_up_proj, down, activation="swiglu").to(
            x.dtype
        )
    if getattr(module, "has_gate", True):
        hidden = module._apply_gate(grouped_linear(tokens, routing, module.gate_up_proj))
    else:
        hidden = module.act_fn(grouped_linear(tokens, routing, module.up_proj))
    return grouped_linear(hidden, routing, down, gather=False, combine=True).to(x.dtype)


def _experts_forward(
    self,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The backend "mmfused" of transformers' experts interface."""
    reason = _other_layout(self)
    if reason is not None:
        raise ValueError(
            f"experts_implementation='mmfused' cannot run {type(self).__name__}: {reason}"
        )
    return _experts(self, hidden_states, top_k_index, top_k_weights)


def register_experts() -> None:
    """Make ``"mmfused"`` an experts implementation of transformers; call it once, before it is
    named.

    Then ``from_pretrained(..., experts_implementation="mmfused")`` and
    ``model.set_experts_implementation("mmfused")`` run the experts of every model that uses
    transformers' experts interface: gated by silu on :func:`mmfused.grouped_mlp`, with other gates
    or none on :func:`mmfused.grouped_linear`, under expert parallelism too. Transposed, interleaved
    or biased experts (GPT-OSS) raise ``ValueError``. transformers has no way to find a backend by
    name alone, and ``import mmfused`` does not import transformers, hence the call; a process that
    unpickles such a model calls it as well. ``config.save_pretrained`` keeps no name.

    Raises: ``ImportError`` where transformers is missing or has no experts interface.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "register_experts: it takes transformers 5 or newer, with its experts interface."
        ) from error
    ExpertsInterface.register("mmfused", _experts_forward)


class _MoeExperts(Swap):
    family = "experts"
    needs = "gate_up_proj down_proj act_fn config _apply_gate"
    does = "its experts in one pass, whatever experts_implementation says; the router beside it is called as before"

    @staticmethod
    def why_not(module):
        if getattr(module, "_is_expert_parallel", False):
            return "Its experts are spread over ranks: use experts_implementation='mmfused' (mmfused.register_experts())."
        if getattr(module.config, "_experts_implementation", None) == "deepgemm_megamoe":
            return "experts_implementation is 'deepgemm_megamoe', which lays the weights out anew."
        reason = _other_layout(module) or _not_swiglu(module) or _other_weights(module)
        why = attached(module.act_fn)
        return reason or (why and f"act_fn {why}, which would not act.")

    @classmethod
    def expects(cls, module):
        chosen = getattr(module.config, "num_experts_per_tok", "k")
        numbers = f"by count {chosen} x {module.gate_up_proj.shape[-1]} numbers"
        gains = f"on a GPU the gathered copies of each token, {numbers}, are never written"
        return f"{gains}; nothing to gain on a CPU, where each expert is one product either way"

    @staticmethod
    def misplaced(module, name, model):
        gate = getattr(model.get_submodule(name.rpartition(".")[0]), "gate", None) if name else None
        if getattr(gate, "top_k", None) == 1 and getattr(
            gate, "norm_topk_prob", True
        ):  # a router without the option does it
            return "One expert for each token and renormalised weights: each weight is 1, and its router learns nothing from them."
        return None

    def forward(self, hidden_states, top_k_index, top_k_weights):
        given = (hidden_states, top_k_index, top_k_weights)
        if (
            _MoeExperts.why_not(self)
            or hidden_states.dim() != 2
            or not dense(*given, self.gate_up_proj, self.down_proj)
        ):
            return super().forward(*given)
        return _experts(self, *given)


# Classes with one and the same forward, beside a router `gate` of the same kind.
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
