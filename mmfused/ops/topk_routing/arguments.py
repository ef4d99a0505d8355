"""Types that group the arguments of routing, except the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from torch import Tensor
from typing_extensions import Unpack

Score = Literal["softmax", "sigmoid"]
Balance = Literal["switch", "gshard", "mse"]


class Inputs(NamedTuple):
    """The optional tensors of :func:`topk_routing`."""

    selection_bias: Tensor | None = None  # (E,)
    token_padding_mask: Tensor | None = None  # (T,) bool
    segments: Tensor | None = None  # (T,) int64
    available: Tensor | None = None  # (S, E) bool
    indices: Tensor | None = None  # (T, k) int64
    jitter_seed: Tensor | None = None  # () int64


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`topk_routing` that are not tensors."""

    k: int
    score: Score = "softmax"
    renormalize: bool = True
    num_segments: int = 1
    balance: Balance = "switch"
    jitter: float = 0.0

    @property
    def renormalizes(self) -> bool:
        """Whether to divide the chosen scores by their sum.

        With k = 1 and softmax, the result would always be 1, so the score itself is used.
        """
        return self.renormalize and (self.k > 1 or self.score == "sigmoid")


class RoutingOptions(TypedDict, total=False):
    """Keyword arguments of :func:`topk_routing` that are not tensors."""

    score: Score
    renormalize: bool
    num_segments: int
    balance: Balance
    jitter: float


class RoutingArguments(RoutingOptions, total=False):
    """All keyword arguments of :func:`topk_routing`."""

    selection_bias: Tensor | None
    token_padding_mask: Tensor | None
    segments: Tensor | None
    available: Tensor | None
    indices: Tensor | None
    jitter_seed: Tensor | None


def grouped(k: int, **arguments: Unpack[RoutingArguments]) -> tuple[Inputs, Options]:
    """Group keyword arguments into inputs and options. An unknown name raises ``TypeError``."""
    rest: dict = dict(arguments)
    tensors = {name: rest.pop(name) for name in Inputs._fields if name in rest}
    return Inputs(**tensors), Options(k, **rest)
