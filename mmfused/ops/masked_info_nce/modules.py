"""The module over :func:`masked_info_nce`: normalisation, the temperature, and the other ranks."""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._common import unit_rows
from .functional import loss_over_ranks, masked_info_nce

GATHERS = (None, "global", "local")
OPTIONS = ("same_id", "symmetric", "positive_weight", "label_smoothing", "false_negative_margin")


class MaskedInfoNCE(nn.Module):
    """:func:`masked_info_nce` with its temperature, over one process or all of them.

    Args: temperature: the temperature, or where it is learned its initial value. A fixed one is a
        number: no state
            dict holds it and no cast rounds it.
        learnable_temperature: ``log_scale`` = log(1 / temperature) is a parameter. In training it
            is clamped to log(``max_scale``) before use, in place.
        normalize: bring query and candidate to unit length first, in float32 at least.
        gather: None, this process's candidates only. "global": those of all ranks; each returns (W
            / N) times the sum of its own rows' losses, and candidate gradients return to their
            rank, so that DDP's average is the gradient of one process with the whole batch, also
            with unequal batches, one without rows, and for the temperature. What one rank refuses,
            and options, dtypes or needs of gradients that differ, raise on all ranks. "local": the
            same values, but the other ranks' candidates are constants: cheaper, and biased; not
            with ``symmetric``, whose columns would get only their own rank's share of the gradient.
            Without a process group, as None. A loss that evaluates its own slice of the whole batch
            on every rank (UNITE's, VISTA's) has "global"'s gradient divided by W.
        options: ``same_id``, ``symmetric``, ``positive_weight``, ``label_smoothing``,
        ``false_negative_margin``, ``reduction`` of
            :func:`masked_info_nce`; with ``gather`` the reduction is "mean".
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable_temperature: bool = False,
        max_scale: float = 100.0,
        normalize: bool = True,
        gather: str | None = None,
        reduction: str = "mean",
        **options,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f"MaskedInfoNCE: temperature: got {temperature}, expected a number above 0"
            )
        if gather not in GATHERS:
            raise ValueError(
                f"MaskedInfoNCE: gather: got {gather!r}, expected None, 'global' or 'local'"
            )
        if gather is not None and reduction != "mean":
            raise ValueError(
                f"MaskedInfoNCE: reduction is {reduction!r}; with gather it takes 'mean'."
            )
        if gather == "local" and options.get("symmetric"):
            raise ValueError(
                "MaskedInfoNCE: gather is 'local' and symmetric is True; symmetric takes gather='global'."
            )
        if not max_scale > 0:
            raise ValueError(
                f"MaskedInfoNCE: max_scale: got {max_scale}, expected a number above 0"
            )
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(
                f"MaskedInfoNCE: {unknown[0]!r}: got no option, expected {', '.join(OPTIONS)} and reduction"
            )
        self.temperature, self.learnable_temperature = temperature, learnable_temperature
        # Of a fixed temperature it is there to be read alone, and not registered: no state holds it
        # and no cast rounds it.
        log_scale = torch.tensor(
            -math.log(temperature), device=None if learnable_temperature else "cpu"
        )
        self.log_scale = nn.Parameter(log_scale) if learnable_temperature else log_scale
        self.max_scale, self.normalize, self.gather = max_scale, normalize, gather
        self.options = {**options, "reduction": reduction}
        self.register_load_state_dict_pre_hook(_without_fixed_scale)

    def reset_parameters(self) -> None:
        """A learned temperature takes its initial value again."""
        if self.learnable_temperature:
            with torch.no_grad():
                self.log_scale.fill_(-math.log(self.temperature))

    def forward(self, query: Tensor, candidate: Tensor, **keys: Tensor) -> Tensor:
        """query (B, D), candidate (C, D); ``keys``: target, query_key, candidate_key, query_id,
        candidate_id, row_weight.
        """
        temperature = self.temperature
        if self.learnable_temperature:
            log_scale = self._clamped() if self.training else self.log_scale
            wide = torch.promote_types(log_scale.dtype, torch.float32)
            temperature = (-log_scale.to(wide)).exp()
        if self.normalize:
            masked = keys.get("candidate_key") is not None or keys.get("candidate_id") is not None
            query, candidate = _unit(query), _unit(candidate, may_be_ignored=masked)
        if self.gather is None or not dist.is_available() or not dist.is_initialized():
            return masked_info_nce(
                query, candidate, temperature=temperature, **keys, **self.options
            )
        return loss_over_ranks(
            query,
            candidate,
            self.gather == "global",
            temperature=temperature,
            **keys,
            **self.options,
        )

    def _clamped(self) -> Tensor:
        largest, log_scale = math.log(self.max_scale), self.log_scale
        if torch._C._are_functorch_transforms_active():  # no parameter may change
            bound = largest + (log_scale - log_scale.detach())  # with its gradient
            return torch.where(log_scale > largest, bound, log_scale)
        with torch.no_grad():
            log_scale.clamp_(max=largest)
        return log_scale

    def extra_repr(self) -> str:
        learned = "learned, initial" if self.learnable_temperature else "fixed"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{learned} temperature={self.temperature:g}, normalize={self.normalize}, gather={self.gather!r}{options}"


def _unit(x: Tensor, may_be_ignored: bool = False) -> Tensor:
    # What is no tensor is refused by the loss: over ranks, by all of them.
    return unit_rows(x, may_be_ignored).to(x.dtype) if isinstance(x, Tensor) else x


def _without_fixed_scale(module, state_dict, prefix, *_) -> None:
    """Earlier states hold a fixed temperature too; the one asked for counts."""
    kept = None if module.learnable_temperature else state_dict.pop(prefix + "log_scale", None)
    if kept is None or kept.is_meta:
        return
    stored, own = math.exp(-kept.item()), module.temperature
    if abs(stored / own - 1) > 0.01:  # of 16 bits it is rounded
        warnings.warn(
            f"MaskedInfoNCE: the state's temperature is {stored:.4g}; the module keeps its own, {own}.",
            stacklevel=2,
        )
