"""The module over :func:`masked_info_nce`: normalisation, the temperature, and the other ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .function import loss_over_ranks, masked_info_nce

GATHERS = (None, "global", "local")
OPTIONS = ("same_id", "symmetric", "positive_weight", "label_smoothing", "false_negative_margin")


class MaskedInfoNCE(nn.Module):
    """:func:`masked_info_nce` with its temperature, over one process or all of them.

    Args:
        temperature: the (initial) temperature, a number that no cast and no state changes.
        learnable_temperature: the parameter ``log_scale`` = log(1 / temperature), the only one of the state. In training it is
            clamped to log(``max_scale``) before use, in place. Without it the state is empty; one that holds a ``log_scale`` loads.
        normalize: bring query and candidate to unit length first, in float32 at least.
        gather: None, this process's candidates only. "global": those of all ranks; each returns (W / N) times the sum of its own
            rows' losses, and candidate gradients return to their rank, so that DDP's average is the gradient of one process with
            the whole batch, also with unequal batches and for the temperature. "local": the same values, but the other ranks'
            candidates are constants: cheaper, and biased; not with ``symmetric``, whose columns would get only their own rank's
            share of the gradient. Without a process group, as None. A loss that evaluates its own slice of the whole
            batch on every rank (UNITE's, VISTA's) has "global"'s gradient divided by W.
        options: ``same_id``, ``symmetric``, ``positive_weight``, ``label_smoothing``, ``false_negative_margin``, ``reduction`` of
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
            raise ValueError(f"MaskedInfoNCE: temperature is {temperature}; it takes a number above 0.")
        if gather not in GATHERS:
            raise ValueError(f"MaskedInfoNCE: gather is {gather!r}; it takes None, 'global' or 'local'.")
        if gather is not None and reduction != "mean":
            raise ValueError(f"MaskedInfoNCE: reduction is {reduction!r}; with gather it takes 'mean'.")
        if gather == "local" and options.get("symmetric"):
            raise ValueError("MaskedInfoNCE: gather is 'local' and symmetric is True; symmetric takes gather='global'.")
        if not max_scale > 0:
            raise ValueError(f"MaskedInfoNCE: max_scale is {max_scale}; it takes a number above 0.")
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(f"MaskedInfoNCE: {unknown[0]!r} is no option; it takes {', '.join(OPTIONS)} and reduction.")
        self.temperature, self.max_scale, self.normalize, self.gather = temperature, max_scale, normalize, gather
        self.options = {**options, "reduction": reduction}
        self.register_parameter("log_scale", nn.Parameter(torch.empty(())) if learnable_temperature else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``log_scale`` as it was at first."""
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.fill_(-math.log(self.temperature))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.log_scale is None:  # older states hold a fixed temperature too
            state_dict.pop(f"{prefix}log_scale", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, query: Tensor, candidate: Tensor, **keys: Tensor) -> Tensor:
        """query (B, D), candidate (C, D); ``keys``: target, query_key, candidate_key, query_id, candidate_id, row_weight."""
        if self.training and self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        if self.normalize:
            query, candidate = unit(query), unit(candidate)
        temperature = self.temperature if self.log_scale is None else (-self.log_scale).exp()
        if self.gather is None or not dist.is_available() or not dist.is_initialized():
            return masked_info_nce(query, candidate, temperature=temperature, **keys, **self.options)
        return loss_over_ranks(query, candidate, self.gather == "global", temperature=temperature, **keys, **self.options)

    def extra_repr(self) -> str:
        learned = "fixed" if self.log_scale is None else "learned"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{learned} temperature={self.temperature:g}, normalize={self.normalize}, gather={self.gather!r}{options}"


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, computed in float32 at least. One that is not finite becomes NaN; if the loss ignores it, its gradient is
    0 all the same."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    broken = ~wide.isfinite().all(-1, keepdim=True)
    nan = torch.zeros_like(wide[:, :1]).masked_fill(broken, float("nan"))
    return (F.normalize(wide.nan_to_num(0.0, 0.0, 0.0), dim=-1) + nan).to(x.dtype)
