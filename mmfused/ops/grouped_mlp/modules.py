"""The mixture-of-experts layer of a transformer: router and experts with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from ...children import Called, read
from ..topk_routing import (
    Balance,
    Routing,
    RoutingOptions,
    Score,
    topk_routing,
    topk_routing_from_input,
    update_selection_bias,
)
from ..topk_routing.arguments import RoutingArguments
from .checks import Activation, check_activation
from .functional import grouped_mlp


class TopKMoE(nn.Module):
    """A mixture of two-layer MLPs with a router.

    The parameters for E experts are::

        router    nn.Linear without bias
        w_up      (E, hidden_dim, dim)
        w_gate    (E, hidden_dim, dim), with "swiglu" only
        w_down    (E, out_dim, hidden_dim)
        b_up      (E, hidden_dim)
        b_down    (E, out_dim)

    ``forward`` returns the output and a :class:`Routing`, which holds the losses. To balance the
    experts, add ``coefficient * routing.balance_loss`` to the training loss.

    Args:
        dim: width of the tokens.
        hidden_dim: width of an expert's hidden layer.
        num_experts: number of experts E.
        top_k: number of experts per token.
        out_dim: width of the output, default ``dim``.
        activation: "gelu", "relu" or "swiglu".
        bias: whether the experts have biases. The gate of "swiglu" never has one.
        selection_bias: whether to hold a buffer ``selection_bias`` (E,), which balances the experts
            without a loss. Call :meth:`update_selection_bias` after each optimizer step. The buffer
            stays in float32 when the module is cast to 16 bits.
        available: (num_segments, E) bool, True for the experts that a segment may use; held as a
            buffer.
        score, renormalize, num_segments, balance: as in :func:`topk_routing`.
        jitter: as in :func:`topk_routing`, in training only.

    Raises:
        ValueError: ``top_k`` or ``activation`` is invalid.

    Examples:
        >>> import torch, mmfused
        >>> moe = mmfused.TopKMoE(16, hidden_dim=32, num_experts=4, top_k=2, activation="swiglu")
        >>> x = torch.randn(3, 10, 16)  # (batch, tokens, dim)
        >>> out, routing = moe(x)
        >>> loss = out.square().mean() + 0.01 * routing.balance_loss
        >>> loss.backward()
        >>> out.shape, routing.indices.shape
        (torch.Size([3, 10, 16]), torch.Size([30, 2]))
    """

    selection_bias: Tensor | None
    available: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        out_dim: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        selection_bias: bool = False,
        available: Tensor | None = None,
        score: Score = "softmax",
        renormalize: bool = True,
        num_segments: int = 1,
        balance: Balance = "switch",
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"TopKMoE: top_k: got {top_k}, expected 1 to {num_experts}, the number of experts"
            )
        check_activation("TopKMoE", activation)
        out_dim = dim if out_dim is None else out_dim
        self.dim: int = dim
        self.num_experts: int = num_experts
        self.top_k: int = top_k
        self.activation: Activation = activation
        self.routing: RoutingOptions = {
            "score": score,
            "renormalize": renormalize,
            "num_segments": num_segments,
            "balance": balance,
            "jitter": jitter,
        }

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape))

        self.router: nn.Linear = nn.Linear(dim, num_experts, bias=False)
        self.w_up: nn.Parameter = parameter(hidden_dim, dim)
        self.w_gate: nn.Parameter | None = (
            parameter(hidden_dim, dim) if activation == "swiglu" else None
        )
        self.w_down: nn.Parameter = parameter(out_dim, hidden_dim)
        self.b_up: nn.Parameter | None = parameter(hidden_dim) if bias else None
        self.b_down: nn.Parameter | None = parameter(out_dim) if bias else None
        zeros = torch.zeros(num_experts, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        self.register_buffer("available", available)
        # reset_parameters needs these values after to_empty(). A meta tensor has no values.
        self._available = None if available is None or available.is_meta else available.tolist()
        self.register_load_state_dict_pre_hook(_widen_selection_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the buffers, and draw the parameters as nn.Linear does.

        nn.Linear draws uniformly from [-bound, bound], where bound is 1 / sqrt(number of inputs).
        """
        self.router.reset_parameters()
        for weight, bias in (
            (self.w_up, self.b_up),
            (self.w_gate, None),
            (self.w_down, self.b_down),
        ):
            for parameter in (weight, bias):
                if parameter is not None and weight is not None:
                    bound = weight.shape[2] ** -0.5
                    nn.init.uniform_(parameter, -bound, bound)
        if self.selection_bias is not None:
            self.selection_bias.zero_()
        if self.available is not None and self._available is not None:
            self.available.copy_(torch.tensor(self._available, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the selection bias in float32, since 16 bits would round away its updates."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        cast = self.selection_bias
        if bias is not None and cast is not None and cast.dtype in (torch.float16, torch.bfloat16):
            self.selection_bias = bias.to(cast.device)
        return self

    def forward(
        self,
        x: Tensor,
        *,
        token_padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Return the output (..., out_dim), and the :class:`Routing` of the T tokens.

        Args:
            x: (..., dim); the leading dimensions are flattened to T tokens.
            token_padding_mask: (...) bool, True = ignore. An ignored token has output 0.
            segments: (...) int64, the segment of each token.
            indices: (T, top_k) int64, the experts to use; see :func:`topk_routing`.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"TopKMoE: x: got shape {tuple(x.shape)}, expected (..., {self.dim})")
        for name, tensor in (("token_padding_mask", token_padding_mask), ("segments", segments)):
            if tensor is not None and tensor.shape != x.shape[:-1]:
                raise ValueError(
                    f"TopKMoE: {name}: got shape {tuple(tensor.shape)}, "
                    f"expected {tuple(x.shape[:-1])}"
                )
        tokens = x.reshape(-1, self.dim)
        mask = None if token_padding_mask is None else token_padding_mask.reshape(-1)
        segments = None if segments is None else segments.reshape(-1)
        options = self._routing_options(mask, segments, indices)
        weight, bias = read(self.router, "TopKMoE.router", self.num_experts, x.device.type)
        if isinstance(weight, Called):  # a router with an adapter or hooks
            # A masked token may be NaN.
            valid = tokens if mask is None else tokens.masked_fill(mask[:, None], 0.0)
            routing = topk_routing(weight(valid), self.top_k, **options)
        else:
            routing = topk_routing_from_input(tokens, weight, self.top_k, bias, **options)
        out = grouped_mlp(
            tokens,
            routing,
            self.w_up,
            self.w_down,
            b_up=self.b_up,
            b_down=self.b_down,
            w_gate=self.w_gate,
            activation=self.activation,
        )
        return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out, routing

    def _routing_options(
        self,
        mask: Tensor | None,
        segments: Tensor | None,
        indices: Tensor | None,
    ) -> RoutingArguments:
        """Return the keyword arguments of :func:`topk_routing`."""
        options: RoutingArguments = {
            **self.routing,
            "selection_bias": self.selection_bias,
            "available": self.available,
            "token_padding_mask": mask,
            "segments": segments,
            "indices": indices,
        }
        if not self.training:
            options["jitter"] = 0.0
        return options

    def update_selection_bias(
        self,
        counts: Tensor,
        rate: float = 1e-3,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Apply :func:`mmfused.update_selection_bias` to this layer.

        Call ``moe.update_selection_bias(routing.counts)`` on every rank, once after each optimizer
        step. The counts of this rank are added to those of the other ranks of ``group`` (default
        all ranks). With gradient accumulation, pass the sum over the micro-batches. Under
        DDP, call the method of ``ddp.module``.
        """
        if self.selection_bias is None:
            raise ValueError(
                "TopKMoE: selection_bias: got False, expected True for update_selection_bias"
            )
        update_selection_bias(self.selection_bias, counts, rate, group=group)

    def extra_repr(self) -> str:
        """Return the sizes and the activation for ``repr``."""
        experts, _, hidden = self.w_down.shape
        return (
            f"{self.dim}, hidden_dim={hidden}, num_experts={experts}, top_k={self.top_k}, "
            f"activation={self.activation!r}"
        )


def _widen_selection_bias(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """Cast a 16-bit bias in the state dict to float32: ``assign=True`` would keep the 16 bits."""
    bias = state_dict.get(prefix + "selection_bias")
    if bias is not None:
        wide = torch.promote_types(bias.dtype, torch.float32)
        state_dict[prefix + "selection_bias"] = bias.to(wide)
