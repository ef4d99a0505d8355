"""fuse(model): pooling, cross-attention, experts and contrastive losses of other libraries in a
model run on the ops of this one.

A module found by its exact type keeps its identity, parameters, hooks and state_dict: only its
``__class__`` becomes a subclass of its own class with another forward. No class is patched, no
library is imported. Each forward says at every call whether it may serve that call; what it cannot
prove equal, attention weights or a mask that is no padding mask, runs the original forward.

Equal up to rounding, with two exceptions: dropout of attention weights, in training, is distributed
as before but drops others than the same seed did; and a sample whose tokens are all masked pools to
0. There nn.MultiheadAttention gives NaN, and SigLIP 2's head the mean over the padding. BLIP-2
repeats a padding mask (B, N) for every query, and only the values could tell, so such a call is not
pooled; give the Q-Former ``mask.bool()[:, None, None]`` instead: the same numbers, and pooled."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

from torch import nn

from .base import (
    KINDS,
    LEFT,
    Swap,
    change_class,
    fused_class,
    other_version,
    own_class,
    path_of,
    replaced,
    unclear,
)
from .selection import Selection


@dataclass
class FuseReport:
    """What :func:`fuse` did, by qualified name ("" is the root itself); printed, it is a table.

    ``swapped``: what the module does now.  ``left``: why it was left.  ``expected``, of those that
    were swapped: what that is to bring and where it brings nothing. Nothing of it is measured: "by
    count" means FLOPs or numbers counted from the module's sizes.  ``classes``: their own classes.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        cls, rows = self.classes.get, []
        for name, text in self.swapped.items():
            expected = self.expected.get(name)
            text = f"{text}.\nexpected: {expected}." if expected else f"{text}."
            rows.append((name, cls(name, ""), "swapped", text))
        rows += [(name, cls(name, ""), "left", text) for name, text in self.left.items()]
        title = f"fuse: {len(self.swapped)} swapped, {len(self.left)} left"
        return "\n".join([title, *_table(rows)])


def fuse(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    dry_run: bool = False,
) -> FuseReport:
    """Let the known modules of this model, and of no other, run on the ops of this library.

    Known are, by the word that ``only`` and ``skip`` take for them:

    * "pooling": timm's AttentionPoolLatent, open_clip's AttentionalPooler, the pooling heads of
      SigLIP, SigLIP 2, Idefics2 and Phi-4.
    * "attention": nn.MultiheadAttention that pools or reads another input, the Q-Former
      cross-attention of BLIP-2 and InstructBLIP.
    * "experts": in transformers those of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next,
      Qwen3-VL-MoE and Qwen3.5-MoE (of other models: :func:`register_experts`).
    * "losses": ClipLoss of open_clip; of sentence-transformers 6 MultipleNegativesRankingLoss,
      CachedMultipleNegativesRankingLoss and their deprecated symmetric forms, alone, in
      MatryoshkaLoss and, where that takes them, in AdaptiveLayerLoss and Matryoshka2dLoss.

    Whether an nn.MultiheadAttention is self-attention only a call tells, and such a call runs as
    before; one whose name ("self_attn") or place tells already is left. The report names what is
    known and left, with the reason: such as the bi-attention of GroundingDINO, which returns its
    attention weights, SigLipLoss, CoCaLoss and DistillClipLoss of open_clip, GISTEmbedLoss and its
    cached form, subclasses of known classes, and modules that somebody changed so that equal
    numbers are not certain. Whatever a module is made of, it does not make this function raise.

    The router beside experts is called as before, so its recorded logits and the loss made of them
    stay. Where it gives a token one expert and renormalises the one weight, it learns nothing from
    it: those experts are left, with that reason.

    Args:
        model: any module; it may itself be one of the known ones. Fusing it again adds what is new
            and changes nothing else.
        only, skip: what to swap, all by default, and what of it to leave: a str or several, each
            one of the four words or a module's qualified name, which covers what is inside it ("",
            the root, covers all). A name may be a shell pattern, ``"vision.*.attn"``, whose ``*``
            goes across dots. A module named like one of the words takes a pattern:
            ``"[l]osses"``. What belongs to a pooling head that was not chosen, the attention
            inside, is left with it, unless an entry of ``only`` names that and not the head.
        dry_run: report only.

    Returns: a :class:`FuseReport`; print it. Modules that are of no known type are in neither part.

    Raises: ``TypeError`` where ``model`` is no nn.Module, or ``only`` or ``skip`` is no str and
    holds none; ``ValueError`` where an entry of these is no such word and matches no module. Then
    nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model: got a {type(model).__name__}, expected a torch.nn.Module")
    selection = Selection(model, only, skip)
    report, found = FuseReport(), []
    heads = []  # (name of what holds others, itself if it was not chosen)
    for name, module in model.named_modules():  # a head comes before what it holds
        around = [head for outer, head in heads if _inside(name, outer)]
        if any(head is None or not selection.names(module, head) for head in around):
            continue
        cls, fused = own_class(module), isinstance(module, Swap)
        kind = KINDS.get(path_of(cls))
        if kind is None:
            reason = _why_unknown(cls)
            if reason is None:
                continue
        else:
            reason = None if fused else selection.against(module, kind.family)
            if kind.whole and reason is not None:
                heads.append((name, module))
            if not fused and reason is None:
                reason = _why_not(kind, cls, module, name, model)
            heads += [(f"{name}.{part}" if name else part, None) for part in kind.parts]
        report.classes[name] = cls.__name__
        if reason is not None:
            report.left[name] = reason
            continue
        if kind.whole:
            heads.append((name, None))
        report.swapped[name], report.expected[name] = _describe(kind, module, fused)
        if not fused:
            found.append((name, module, kind))
    if not dry_run:
        for name, module, kind in found:
            try:
                change_class(module, kind, fused_class(kind, type(module)))
            except Exception as error:
                del report.swapped[name], report.expected[name]
                report.left[name] = unclear(error)
    return report


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _why_unknown(cls: type) -> str | None:
    """Why a module of no kind is left, where anything is known of its class."""
    if path_of(cls) in LEFT:
        return LEFT[path_of(cls)]
    known = next((base.__qualname__ for base in cls.__mro__ if path_of(base) in KINDS), None)
    return known and f"{cls.__qualname__} is a subclass of {known}, whose forward may be another."


def _why_not(
    kind: type[Swap],
    cls: type,
    module: nn.Module,
    name: str,
    model: nn.Module,
) -> str | None:
    try:
        reason = other_version(kind, cls, module) or kind.why_not(module)
        reason = reason or replaced(kind, cls, module) or kind.misplaced(module, name, model)
        if reason is None:
            fused_class(kind, cls)
        return reason
    except Exception as error:
        return unclear(error)


def _describe(kind: type[Swap], module: nn.Module, fused: bool) -> tuple[str, str]:
    """What it does now, and what that is expected to bring."""
    says = _text(kind.says, module, kind.does)
    reason = kind.why_not(module) if fused else None
    if reason is not None:  # it was changed afterwards
        return f"already swapped, but runs the original: {reason.rstrip('.')}", ""
    return f"already swapped: {says}" if fused else says, _text(kind.expects, module, kind.gains)


def _text(say: Callable[[nn.Module], str], module: nn.Module, otherwise: str) -> str:
    try:
        return say(module)
    except Exception:  # some size is not where it is looked for; the swap does not need it
        return otherwise


def unfuse(model: nn.Module) -> list[str]:
    """Give every module that :func:`fuse` swapped its class back; returns their qualified names.

    Raises ``TypeError``, and changes nothing, where another library has made a class of its own
    from a fused one."""
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Swap)}
    for name, module in fused.items():
        if own_class(module) is type(module):
            raise TypeError(
                f"unfuse: {name or '(root)'} is a {path_of(type(module))}, made from a fused class; undo that first."
            )
    for module in fused.values():
        change_class(module, type(module), own_class(module))
    return list(fused)


# ---- the printed table ------------------------------------------------------------------------

_WIDTH, _GAP = 100, "  "


class _Breaks(textwrap.TextWrapper):
    """Breaks names after dots and before capitals."""

    wordsep_simple_re = re.compile(r"(?<=\.)|(?<=[a-z0-9])(?=[A-Z])")


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Lines of at most 100 characters; rows that differ only in the numbers in their names are one,
    with their number."""
    groups: dict[tuple, list[str]] = {}
    for name, *rest in rows:
        groups.setdefault((re.sub(r"\d+", "*", name), *rest), []).append(name or "(root)")
    cells = [("module", "class", "", "what it does now, or why it was left")] if groups else []
    for (pattern, *rest), names in groups.items():
        cells.append((names[0] if len(names) == 1 else f"{pattern} ({len(names)})", *rest))
    limits = enumerate((30, 26, 7))
    widths = [min(max((len(row[i]) for row in cells), default=0), most) for i, most in limits]
    widths.append(_WIDTH - sum(widths) - 3 * len(_GAP))
    return [line for row in cells for line in _lines(row, widths)]


def _lines(row: tuple[str, ...], widths: list[int]) -> list[str]:
    columns = []
    for cell, width in zip(row, widths, strict=True):
        breaks = _Breaks if len(columns) < 3 else textwrap.TextWrapper
        wrap = breaks(width, break_on_hyphens=False).wrap
        columns.append([line for part in cell.splitlines() for line in wrap(part)])
    lines = []
    for cells in zip_longest(*columns, fillvalue=""):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(_GAP.join(padded).rstrip())
    return lines
