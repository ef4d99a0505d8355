"""Swap known modules of other libraries for this library's ops, in place.

A module is recognised by its exact type and keeps its identity, parameters, hooks and state_dict.
Its ``__class__`` becomes a subclass of its own class with another forward. No class is patched, and
no other library is imported. In each call, the new forward checks whether its result will equal
the result of the original forward. If equality is not certain (attention weights are requested, or
a mask is not a padding mask), the original forward runs.

Results are equal up to rounding, with two exceptions:

* In training, dropout of attention weights has the same distribution, but drops different weights
  for the same seed.
* The attention output of a fully masked sample is 0. The original output is
  NaN in nn.MultiheadAttention, and the mean over the padding in the head of SigLIP 2.

BLIP-2 copies a padding mask (B, N) for every query. Comparing the copies would wait for the GPU, so
the original forward runs. If ``mask.bool()[:, None, None]`` is passed to the Q-Former instead, the
fused forward runs.
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
    """Make the known modules inside ``model`` run on this library's ops, in place.

    The known modules, grouped by the words that ``only`` and ``skip`` accept:

    * "pooling": timm's AttentionPoolLatent, open_clip's AttentionalPooler, and the pooling heads of
      SigLIP, SigLIP 2, Idefics2 and Phi-4.
    * "attention": nn.MultiheadAttention that pools or attends to another input, and the Q-Former
      cross-attention of BLIP-2 and InstructBLIP.
    * "experts": the experts of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Qwen3-VL-MoE and
      Qwen3.5-MoE in transformers (for other models see :func:`register_experts`).
    * "losses": open_clip's ClipLoss; sentence-transformers 6's MultipleNegativesRankingLoss and
      CachedMultipleNegativesRankingLoss, and the deprecated symmetric form of each, also inside
      MatryoshkaLoss, AdaptiveLayerLoss and Matryoshka2dLoss.

    A call of nn.MultiheadAttention as self-attention runs the original forward. A module is left
    unchanged if its name ("self_attn") or its parent shows that all of its calls are
    self-attention.

    The report lists every known module that was left unchanged, with the reason. Examples are the
    bi-attention of GroundingDINO, which returns its attention weights; SigLipLoss, CoCaLoss and
    DistillClipLoss of open_clip; GISTEmbedLoss and its cached form; subclasses of known classes;
    and modules that were modified so that equal results are not certain. A module that raises when
    it is inspected is left unchanged, too.

    The router of the experts is called as before. Its recorded logits do not change, nor does the
    loss computed from the logits. Experts are left unchanged if the router chooses one expert for
    each token and renormalises the weight: the weight is then always 1, without a gradient.

    Args:
        model: any module, which may itself be a known module. A second call swaps only modules that
            were added.
        only: which modules to swap, a str or an iterable of strs; default: all. An entry is
            one of the four words, the qualified name of a module, or a shell pattern such as
            ``"vision.*.attn"``, in which ``*`` also matches dots. A name includes all modules
            inside the named module; the root ``""`` includes everything. A module whose name is one
            of the words needs a pattern: ``"[l]osses"``. The attention inside a pooling head is
            chosen with the head, or by an entry that names the attention but not the head.
        skip: which of the modules in ``only`` to leave unchanged, in the same form.
        dry_run: return the report without changing the model.

    Returns:
        A :class:`FuseReport`, which prints as a table. Modules of unknown types are not listed.

    Raises:
        TypeError: ``model`` is not an nn.Module, or ``only`` or ``skip`` is neither a str nor an
            iterable of strs. The model is unchanged.
        ValueError: an entry of ``only`` or ``skip`` is not one of the words and matches no module.
            The model is unchanged.

    Examples:
        >>> import torch, mmfused
        >>> model = torch.nn.ModuleDict({"pool": torch.nn.MultiheadAttention(32, 4)})
        >>> probe, tokens = torch.randn(1, 3, 32), torch.randn(50, 3, 32)
        >>> before, _ = model["pool"](probe, tokens, tokens, need_weights=False)
        >>> print(mmfused.fuse(model))
        fuse: 1 swapped, 0 left
        module  class                        what it does now, or why it was left
        pool    MultiheadAttention  swapped  pools, or attends to another input, ...
        >>> after, _ = model["pool"](probe, tokens, tokens, need_weights=False)
        >>> torch.allclose(after, before, atol=1e-5)
        True
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
    """Undo :func:`fuse`: give every swapped module its own class again, in place.

    Args:
        model: any module.

    Returns:
        The qualified names of the modules that were swapped.

    Raises:
        TypeError: another library has derived the class of a module from a fused class. The model
            is unchanged.

    Examples:
        >>> import torch, mmfused
        >>> layer = torch.nn.TransformerDecoderLayer(32, 4)
        >>> report = mmfused.fuse(layer)
        >>> mmfused.unfuse(layer)
        ['multihead_attn']
        >>> type(layer.multihead_attn) is torch.nn.MultiheadAttention
        True
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Swap)}
    for name, module in fused.items():
        if own_class(module) is type(module):
            raise TypeError(
                f"unfuse: {name or '(root)'}: got a {path_of(type(module))}, derived from a fused "
                "class, expected a fused class: undo the derivation first"
            )
    for module in fused.values():
        change_class(module, type(module), own_class(module))
    return list(fused)


class _Found(NamedTuple):
    """A module to swap."""

    name: str
    module: nn.Module
    kind: type[Swap]


class _Owner(NamedTuple):
    """A module inside which no module is swapped."""

    name: str
    # None, or a module that was not chosen, whose children ``only`` may name.
    module: nn.Module | None

    def owns(
        self,
        name: str,
        module: nn.Module,
        selection: Selection,
    ) -> bool:
        """Return whether ``module`` is inside this owner and must not be swapped itself."""
        inside = not self.name or name == self.name or name.startswith(f"{self.name}.")
        return inside and (self.module is None or not selection.names(module, self.module))


def _inspect(model: nn.Module, selection: Selection) -> tuple[FuseReport, list[_Found]]:
    """Return the report of a swap of all chosen modules, and the modules to swap."""
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
    """Return why fuse does not swap a class that is not in KINDS; None for an unknown class."""
    if path_of(cls) in LEFT:
        return LEFT[path_of(cls)]
    name = next((base.__qualname__ for base in cls.__mro__ if path_of(base) in KINDS), None)
    return name and f"{cls.__qualname__} is a subclass of {name}, whose forward may differ."


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
    """Return what the swapped module does, and the expected benefit."""
    description = _text(kind.describe, module, kind.description)
    benefit = _text(kind.estimate_benefit, module, kind.benefit)
    if not fused:
        return description, benefit
    reason = kind.why_not(module)
    if reason is not None:  # the module was changed after the swap
        return f"already swapped, but runs the original: {reason.rstrip('.')}", ""
    return f"already swapped: {description}", benefit


def _text(describe: Callable[[nn.Module], str], module: nn.Module, default: str) -> str:
    try:
        return describe(module)
    except Exception:  # an attribute is missing that only this text needs
        return default
