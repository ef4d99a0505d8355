"""The module of masked InfoNCE, which normalises the embeddings and holds the temperature."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._common import unit_rows
from .arguments import OptionArguments, Reduction
from .functional import loss_over_ranks, masked_info_nce

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .arguments import LabelArguments

Gather = Literal["global", "local"]
GATHERS = (None, "global", "local")


class MaskedInfoNCE(nn.Module):
    """Masked InfoNCE loss with a fixed or learned temperature, on one process or across ranks.

    Args:
        temperature: the fixed temperature, or the initial value of a learned temperature. A fixed
            temperature is not in the state dict, and casting the module does not round it.
        learnable_temperature: whether ``log_scale`` = log(1 / temperature) is a parameter. In
            training, ``forward`` clamps the parameter in place to at most log(``max_scale``).
        max_scale: the largest 1 / temperature of a learned temperature in training.
        normalize: whether to scale queries and candidates to unit length first, in float32 or
            float64.
        gather: which candidates the loss uses. Without a process group, this has no effect.

            - None: the candidates of this process.
            - "global": the candidates of all W ranks. With N rows in total, each rank returns W / N
              times the sum of the losses of its own rows. The gradients of candidates are sent to
              the ranks that own the candidates. DDP's average over ranks is then the gradient of
              one process with the whole batch, also for the temperature. Ranks may have different
              numbers of rows, or none. All ranks raise if the inputs of one rank are bad, or if
              options, dtypes or requires_grad differ between ranks.
            - "local": the same loss as "global", but the candidates of other ranks are constants.
              "local" is cheaper, but the gradients are biased. It cannot be combined with
              ``symmetric``, since the gradient of a column would lack the rows of other ranks.

            The public code of UNITE and VISTA yields the gradient of "global" divided by W.
        reduction: as in :func:`masked_info_nce`; must be "mean" with ``gather``.
        options: ``same_id``, ``symmetric``, ``positive_weight``, ``label_smoothing`` and
            ``false_negative_margin`` of :func:`masked_info_nce`.

    Raises:
        TypeError: an option is unknown.
        ValueError: ``temperature``, ``max_scale``, ``gather`` or ``reduction`` is invalid, or
            ``gather="local"`` is combined with ``symmetric``.

    Examples:
        >>> import torch, mmfused
        >>> from torch.nn.functional import cross_entropy, normalize
        >>> clip_loss = mmfused.MaskedInfoNCE(0.07, learnable_temperature=True, symmetric=True)
        >>> image, text = torch.randn(4, 16), torch.randn(4, 16)
        >>> loss = clip_loss(image, text)
        >>> logits = normalize(image, dim=-1) @ normalize(text, dim=-1).T / 0.07
        >>> target = torch.arange(4)
        >>> both = cross_entropy(logits, target) + cross_entropy(logits.T, target)
        >>> torch.allclose(loss, both / 2, atol=1e-5)
        True
    """

    log_scale: Tensor  # a parameter if the temperature is learned

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable_temperature: bool = False,
        max_scale: float = 100.0,
        normalize: bool = True,
        gather: Gather | None = None,
        reduction: Reduction = "mean",
        **options: Unpack[OptionArguments],
    ) -> None:
        super().__init__()
        _check_numbers(temperature=temperature, max_scale=max_scale)
        _check_options(gather, reduction, options)
        self.temperature = temperature
        self.learnable_temperature = learnable_temperature
        self.max_scale = max_scale
        self.normalize = normalize
        self.gather = gather
        self.reduction: Reduction = reduction
        self.options = options
        # A fixed temperature is not a buffer, so state dicts omit it and casts do not round it.
        device = None if learnable_temperature else "cpu"
        log_scale = torch.tensor(-math.log(temperature), device=device)
        self.log_scale = nn.Parameter(log_scale) if learnable_temperature else log_scale
        self.register_load_state_dict_pre_hook(_without_fixed_scale)

    def reset_parameters(self) -> None:
        """Set a learned temperature to its initial value."""
        if self.learnable_temperature:
            with torch.no_grad():
                self.log_scale.fill_(-math.log(self.temperature))

    def forward(
        self,
        query: Tensor,
        candidate: Tensor,
        **labels: Unpack[LabelArguments],
    ) -> Tensor:
        """Compute the loss.

        Args:
            query: (B, D).
            candidate: (C, D).
            labels: target, query_key, candidate_key, query_id, candidate_id and row_weight of
                :func:`masked_info_nce`.

        Returns:
            A scalar, or (B,) with reduction "none"; float32 or float64.
        """
        temperature = self._temperature()
        if self.normalize:
            of_candidates = (labels.get("candidate_key"), labels.get("candidate_id"))
            may_be_ignored = any(x is not None for x in of_candidates)
            query = _unit(query, may_be_ignored=False)
            candidate = _unit(candidate, may_be_ignored=may_be_ignored)
        if self.gather is None or not dist.is_available() or not dist.is_initialized():
            return masked_info_nce(
                query,
                candidate,
                temperature=temperature,
                reduction=self.reduction,
                **labels,
                **self.options,
            )
        return loss_over_ranks(
            query,
            candidate,
            share_gradients=self.gather == "global",
            temperature=temperature,
            **labels,
            **self.options,
        )

    def _temperature(self) -> float | Tensor:
        if not self.learnable_temperature:
            return self.temperature
        log_scale = self._clamped() if self.training else self.log_scale
        wide = torch.promote_types(log_scale.dtype, torch.float32)
        return (-log_scale.to(wide)).exp()

    def _clamped(self) -> Tensor:
        largest, log_scale = math.log(self.max_scale), self.log_scale
        if torch._C._are_functorch_transforms_active():  # the parameter must not change in place
            bound = largest + (log_scale - log_scale.detach())  # keeps the gradient of log_scale
            return torch.where(log_scale > largest, bound, log_scale)
        with torch.no_grad():
            log_scale.clamp_(max=largest)
        return log_scale

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        learned = "learned, initial" if self.learnable_temperature else "fixed"
        options = {**self.options, "reduction": self.reduction}
        return (
            f"{learned} temperature={self.temperature:g}, normalize={self.normalize}, "
            f"gather={self.gather!r}"
            + "".join(f", {name}={value!r}" for name, value in options.items())
        )


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"MaskedInfoNCE: {name}: got {number}, expected a number above 0")


def _check_options(
    gather: Gather | None,
    reduction: Reduction,
    options: OptionArguments,
) -> None:
    if gather not in GATHERS:
        raise ValueError(
            f"MaskedInfoNCE: gather: got {gather!r}, expected None, 'global' or 'local'"
        )
    if gather is not None and reduction != "mean":
        raise ValueError(
            f"MaskedInfoNCE: reduction: got {reduction!r} with gather, expected 'mean'"
        )
    if gather == "local" and options.get("symmetric"):
        raise ValueError(
            "MaskedInfoNCE: symmetric: got True with gather='local', expected gather='global'"
        )
    names = OptionArguments.__annotations__
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise TypeError(
            f"MaskedInfoNCE: {unknown[0]}: got an unknown option, expected {', '.join(names)}, "
            "reduction, learnable_temperature, max_scale, normalize or gather"
        )


def _unit(x: Tensor, may_be_ignored: bool) -> Tensor:
    if not isinstance(x, Tensor):  # the loss function raises, on all ranks
        return x
    return unit_rows(x, may_be_ignored).to(x.dtype)


def _without_fixed_scale(
    module: MaskedInfoNCE,
    state_dict: dict[str, Any],
    prefix: str,
    *_: object,
) -> None:
    """Drop ``log_scale`` from a state dict of version 0.1 if the temperature is fixed."""
    if module.learnable_temperature:
        return
    log_scale = state_dict.pop(prefix + "log_scale", None)
    if log_scale is None or log_scale.is_meta:
        return
    stored, fixed = math.exp(-log_scale.item()), module.temperature
    if abs(stored / fixed - 1) > 0.01:  # 16-bit state dicts hold a rounded temperature
        warnings.warn(
            f"MaskedInfoNCE: the temperature in the state dict is {stored:.4g}; "
            f"the module keeps its own, {fixed}",
            stacklevel=2,
        )
