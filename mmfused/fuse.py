"""fuse(model): pooling, cross-attention, experts and contrastive losses of other libraries in a model run on the ops of this one.

A module found by its exact type keeps its identity, parameters, hooks and state_dict: only its ``__class__`` becomes a subclass of
its own class with another forward. No class is patched, no library is imported. Each forward says at every call whether it may
serve that call; what it cannot prove equal, attention weights or a mask that is no padding mask, runs the original forward.

Equal up to rounding, with two exceptions: dropout of attention weights, in training, is distributed as before but drops others than
the same seed did; and a sample whose tokens are all masked pools to 0. There nn.MultiheadAttention gives NaN, and SigLIP 2's head
the mean over the padding. BLIP-2 repeats a padding mask (B, N) for every query, and only the values could tell, so such a call is
not pooled; give the Q-Former ``mask.bool()[:, None, None]`` instead: the same numbers, and pooled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .swaps import KINDS, LEFT
from .swaps.base import Swap, fused_class, other_version, own_class, path_of


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
    """Let the known modules of this model, and of no other, run on the ops of this library.

    Known are nn.MultiheadAttention that pools or reads another input, timm's AttentionPoolLatent, open_clip's AttentionalPooler,
    the pooling heads of SigLIP, SigLIP 2, Idefics2 and Phi-4, and the Q-Former cross-attention of BLIP-2 and InstructBLIP; in
    transformers the experts of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Qwen3-VL-MoE and Qwen3.5-MoE (of other models:
    :func:`register_experts`); the losses ClipLoss of open_clip and MultipleNegativesRankingLoss of sentence-transformers.

    Whether an nn.MultiheadAttention is self-attention only a call tells, and such a call runs as before; one whose name
    ("self_attn") or place tells already is left. So is the bi-attention of GroundingDINO, which returns its attention weights.

    The router beside experts is called as before, so its recorded logits and the loss made of them stay. Where it gives a token one
    expert and renormalises the one weight, it learns nothing from it: those experts are left, with that reason.

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
        cls, fused = own_class(module), isinstance(module, Swap)
        kind = KINDS.get(path_of(cls))
        if any(name.startswith(head) for head in heads):
            continue
        if kind is None:
            known = next((base.__qualname__ for base in cls.__mro__ if path_of(base) in KINDS), None)
            subclass = known and f"{cls.__qualname__} is a subclass of {known}, whose forward may be another."
            reason = LEFT.get(path_of(cls), subclass)
        else:
            reason = other_version(kind, cls, module) or kind.why_not(module) or kind.misplaced(module, name, model)
        if kind is not None and (fused or reason is None):
            report.swapped[name] = f"already swapped: {kind.says(module)}" if fused else kind.says(module)
            if kind.whole:
                heads.append(f"{name}." if name else "")
            if not dry_run:
                module.__class__ = fused_class(kind, cls)
        elif reason is not None:
            report.left[name] = reason
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Give every module that :func:`fuse` swapped its class back; returns their qualified names.

    Raises ``TypeError``, and changes nothing, where another library has made a class of its own from a fused one.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Swap)}
    for name, module in fused.items():
        if own_class(module) is type(module):
            raise TypeError(f"unfuse: {name or '(root)'} is a {path_of(type(module))}, made from a fused class; undo that first.")
    for module in fused.values():
        module.__class__ = own_class(module)
    return list(fused)
