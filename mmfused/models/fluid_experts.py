"""FLUID's classifiers: a router with experts (eq. 9), and one expert for all tokens."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfused.library import no_autocast
from mmfused.ops.grouped_mlp import grouped_linear
from mmfused.ops.topk_routing import Routing, topk_routing

if TYPE_CHECKING:
    from mmfused.models.fluid import FLUIDConfig


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float64 if it is in float64, otherwise in float32."""
    return x if x.dtype == torch.float64 else x.float()


class ExpertLinear(nn.Module):
    """A Linear layer for each of E experts, and with ``norm`` a LayerNorm for each expert."""

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        inputs: int,
        outputs: int,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(num_experts, outputs))
        self.norm_weight = nn.Parameter(torch.empty(num_experts, outputs)) if norm else None
        self.norm_bias = nn.Parameter(torch.empty(num_experts, outputs)) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights between +-1 / sqrt(inputs); set biases to 0 and norm weights to 1."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        expert: Tensor,
        first: bool,
        last: bool,
    ) -> Tensor:
        """Apply to each row its expert.

        Args:
            x: rows (T*k, I) sorted by expert; if ``first``, tokens (T, I).
            routing: the routing of the T tokens.
            expert: (T*k, E) int64, the expert of each sorted row, one-hot.
            first: whether this is the first layer of the experts.
            last: whether this is the last layer of the experts.

        Returns:
            Rows (T*k, O) sorted by expert; if ``last``, tokens (T, O), weighted sums of rows.
        """
        x = grouped_linear(x, routing, self.weight, self.bias, gather=first, combine=last)
        if self.norm_weight is None or self.norm_bias is None:
            return x
        with no_autocast(x.device.type):
            # Products with one-hot rows select each row's scale and shift. In backward, products
            # sum the rows' gradients in a fixed order. Indexing would not.
            scale = expert.to(self.norm_weight.dtype) @ self.norm_weight
            shift = expert.to(self.norm_bias.dtype) @ self.norm_bias
        return F.layer_norm(x, x.shape[-1:]) * scale + shift


class MoEClassifier(nn.Module):
    """Router and experts (eq. 9): sum over the top k of G_i(x) E_i(x).

    Each expert is an MLP that returns class logits. The weighted sums are averaged over the tokens.
    """

    def __init__(self, config: FLUIDConfig) -> None:
        super().__init__()
        c, dim, drop = config, config.dim, config.head_dropout
        self.top_k: int = c.top_k
        self.balance: Literal["mse", "gshard"] = c.balance
        output = nn.Linear(dim, c.num_experts)
        hidden = [nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Dropout(drop)]
        self.router: nn.Module = nn.Sequential(*hidden, output) if c.router == "mlp" else output
        widths = (dim, *c.expert_hidden)
        layers = [
            ExpertLinear(c.num_experts, width, out, norm=True)
            for width, out in itertools.pairwise(widths)
        ]
        layers.append(ExpertLinear(c.num_experts, widths[-1], c.num_classes))
        self.experts: nn.ModuleList = nn.ModuleList(layers)
        self.drop: nn.Dropout = nn.Dropout(drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return the logits (B, C) of tokens x (B, R, D), and the routing."""
        tokens = x.flatten(0, 1)  # (T, D), T = B*R
        scores = at_least_float32(self.router(tokens))
        routing = topk_routing(scores, self.top_k, balance=self.balance)
        expert = F.one_hot(routing.indices.flatten()[routing.order], scores.shape[1])  # (T*k, E)
        out, last = tokens, len(self.experts) - 1
        for i, layer in enumerate(self.experts):
            if i > 0:
                out = self.drop(F.relu(out))
            out = layer(out, routing, expert, first=i == 0, last=i == last)
        return at_least_float32(out).view(*x.shape[:2], -1).mean(1), routing


class DenseClassifier(nn.Sequential):
    """Ablation of the mixture: one expert for all tokens."""

    def __init__(self, config: FLUIDConfig) -> None:
        layers: list[nn.Module] = []
        widths, drop = (config.dim, *config.expert_hidden), config.head_dropout
        for width, out in itertools.pairwise(widths):
            layers += [nn.Linear(width, out), nn.LayerNorm(out), nn.ReLU(), nn.Dropout(drop)]
        super().__init__(*layers, nn.Linear(widths[-1], config.num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C), averaged over the tokens x (B, R, D)."""
        return at_least_float32(super().forward(x)).mean(1)
