"""Swap known modules of other libraries for this library's ops, in place.

A module is recognised by its exact type and keeps its identity, parameters, hooks and state_dict:
only its ``__class__`` becomes a subclass of its own class, with another forward. No class is
patched and no library is imported. At every call the forward checks whether it can compute that
call; where equal results are not certain (attention weights requested, a mask that is not a padding
mask), the original forward runs.

Results are equal up to rounding, with two exceptions:

* In training, dropout of attention weights has the same distribution, but drops other weights for
  the same seed.
* A fully masked sample pools to 0. nn.MultiheadAttention gives NaN there, and SigLIP 2's head the
  mean over the padding.

BLIP-2 repeats a padding mask (B, N) for every query. Only its values show that, so such a call is
not pooled; pass ``mask.bool()[:, None, None]`` to the Q-Former instead: the numbers are the same,
and the call is pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

from .base import (
    KINDS,
    LEFT,
    Swap,
    change_class,
    fused_class,
    not_inspectable,
    own_class,
    path_of,
    replaced_method,
    version_mismatch,
)
from .report import FuseReport
from .selection import Selection


def fuse(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    dry_run: bool = False,
) -> FuseReport:
    """Make the known modules of this model, and of no other model, run on this library's ops.

    The known modules, by the words for ``only`` and ``skip``:

    * "pooling": timm's AttentionPoolLatent, open_clip's AttentionalPooler, the pooling heads of
      SigLIP, SigLIP 2, Idefics2 and Phi-4.
    * "attention": nn.MultiheadAttention that pools or attends to another input, the Q-Former
      cross-attention of BLIP-2 and InstructBLIP.
    * "experts": in transformers those of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next,
      Qwen3-VL-MoE and Qwen3.5-MoE (for other models: :func:`register_experts`).
    * "losses": ClipLoss of open_clip; of sentence-transformers 6 MultipleNegativesRankingLoss,
      CachedMultipleNegativesRankingLoss and their deprecated symmetric forms, alone, in
      MatryoshkaLoss and, where these accept them, in AdaptiveLayerLoss and Matryoshka2dLoss.

    Whether an nn.MultiheadAttention is self-attention is known only at each call; such a call runs
    the original forward. A module whose name ("self_attn") or parent already shows it is left.

    The report lists every known module that was left, with the reason. Examples are the
    bi-attention of GroundingDINO, which returns its attention weights; SigLipLoss, CoCaLoss and
    DistillClipLoss of open_clip; GISTEmbedLoss and its cached form; subclasses of known classes;
    and modules that were modified so that equal results are not certain. No module makes this
    function raise.

    The router beside experts is called as before, so its recorded logits and the loss computed from
    them stay. Experts are left where the router gives each token one expert and renormalises its
    weight: the router then learns nothing from that weight.

    Args:
        model: any module, also one of the known ones. Fusing it again swaps what is new and changes
            nothing else.
        only, skip: what to swap (default: everything), and what of that to leave. Each is a str or
            several: one of the four words, or a module's qualified name, which includes all modules
            inside ("", the root, includes everything). A name may be a shell pattern,
            ``"vision.*.attn"``, where ``*`` also matches dots. For a module with the name of one of
            the words use a pattern: ``"[l]osses"``. The modules inside a pooling head that was not
            chosen, such as its attention, are left too, unless an entry of ``only`` names them and
            not the head.
        dry_run: only report.

    Returns:
        A :class:`FuseReport`, to be printed. It does not list modules of unknown types.

    Raises:
        TypeError: ``model`` is not an nn.Module, or ``only`` or ``skip`` is not a str and does not
            hold strs. The model is unchanged.
        ValueError: an entry of ``only`` or ``skip`` is none of the words and matches no module. The
            model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model: got a {type(model).__name__}, expected a torch.nn.Module")
    report, found = _inspect(model, Selection(model, only, skip))
    if dry_run:
        return report
    for name, module, kind in found:
        try:
            change_class(module, kind, fused_class(kind, type(module)))
        except Exception as error:
            del report.swapped[name], report.expected[name]
            report.left[name] = not_inspectable(error)
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Undo :func:`fuse`: give every swapped module its own class again.

    Returns:
        The qualified names of these modules.

    Raises:
        TypeError: another library has derived a class from a fused one. The model is unchanged.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Swap)}
    for name, module in fused.items():
        if own_class(module) is type(module):
            raise TypeError(
                f"unfuse: {name or '(root)'}: got a {path_of(type(module))}, derived from a fused "
                "class, expected a fused class: undo that first"
            )
    for module in fused.values():
        change_class(module, type(module), own_class(module))
    return list(fused)


class _Found(NamedTuple):
    """A module to be swapped."""

    name: str
    module: nn.Module
    kind: type[Swap]


class _Owner(NamedTuple):
    """A module whose children are not swapped themselves."""

    name: str
    module: nn.Module | None  # set where it was not chosen: its children may still be chosen

    def owns(self, name: str, module: nn.Module, selection: Selection) -> bool:
        """Return whether ``module`` is inside and must not be swapped by itself."""
        inside = not self.name or name == self.name or name.startswith(f"{self.name}.")
        return inside and (self.module is None or not selection.names(module, self.module))


def _inspect(model: nn.Module, selection: Selection) -> tuple[FuseReport, list[_Found]]:
    """Return the report as if all were swapped already, and the modules to be swapped."""
    report, found = FuseReport(), []
    owners: list[_Owner] = []
    for name, module in model.named_modules():  # an owner comes before its children
        if any(owner.owns(name, module, selection) for owner in owners):
            continue
        cls = own_class(module)
        kind = KINDS.get(path_of(cls))
        if kind is None:
            reason = _why_unknown(cls)
            if reason is not None:
                report.classes[name], report.left[name] = cls.__name__, reason
            continue
        fused = isinstance(module, Swap)
        reason = None if fused else selection.why_not_chosen(module, kind.family)
        if kind.owns_children and reason is not None:
            owners.append(_Owner(name, module))
        if not fused and reason is None:
            reason = _why_not(kind, cls, module, name, model)
        for child in kind.owned_children:
            owners.append(_Owner(f"{name}.{child}" if name else child, None))
        report.classes[name] = cls.__name__
        if reason is not None:
            report.left[name] = reason
            continue
        if kind.owns_children:
            owners.append(_Owner(name, None))
        report.swapped[name], report.expected[name] = _describe(kind, module, fused)
        if not fused:
            found.append(_Found(name, module, kind))
    return report, found


def _why_unknown(cls: type) -> str | None:
    """Return why a module of no kind is left; None where nothing is known about its class."""
    if path_of(cls) in LEFT:
        return LEFT[path_of(cls)]
    known = next((base.__qualname__ for base in cls.__mro__ if path_of(base) in KINDS), None)
    return known and f"{cls.__qualname__} is a subclass of {known}, whose forward may differ."


def _why_not(
    kind: type[Swap],
    cls: type,
    module: nn.Module,
    name: str,
    model: nn.Module,
) -> str | None:
    try:
        reason = (
            version_mismatch(kind, cls, module)
            or kind.why_not(module)
            or replaced_method(kind, cls, module)
            or kind.why_not_here(module, name, model)
        )
        if reason is None:
            fused_class(kind, cls)
        return reason
    except Exception as error:
        return not_inspectable(error)


def _describe(kind: type[Swap], module: nn.Module, fused: bool) -> tuple[str, str]:
    """Return what the module does now, and the benefit expected of that."""
    description = _text(kind.describe, module, kind.description)
    benefit = _text(kind.estimate_benefit, module, kind.benefit)
    if not fused:
        return description, benefit
    reason = kind.why_not(module)
    if reason is not None:  # it was changed after the swap
        return f"already swapped, but runs the original: {reason.rstrip('.')}", ""
    return f"already swapped: {description}", benefit


def _text(describe: Callable[[nn.Module], str], module: nn.Module, default: str) -> str:
    try:
        return describe(module)
    except Exception:  # an attribute with a size is missing, which the swap does not need
        return default
