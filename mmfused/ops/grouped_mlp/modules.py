"""The layer of a transformer that a mixture of experts takes the place of: router, experts and
their parameters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...children import Called, read
from ..topk_routing import Routing, topk_routing, topk_routing_from_input, update_selection_bias
from .checks import ACTIVATIONS
from .functional import grouped_mlp

ROUTING_OPTIONS = ("score", "renormalize", "num_segments", "balance", "jitter")


class TopKMoE(nn.Module):
    """A mixture of MLPs: :func:`topk_routing_from_input`, :func:`grouped_mlp` and their parameters.

    Args: dim, hidden_dim, out_dim: widths of tokens, of an expert's hidden layer and of the output
        (default ``dim``). num_experts, top_k: E experts, of which a token uses k. activation:
        "gelu", "relu" or "swiglu".  bias: of the experts; a "swiglu" gate has none. selection_bias:
        hold a buffer ``selection_bias`` (E,) for balance without a loss: after each optimizer step
        call
            :meth:`update_selection_bias`. It stays in float32 when the module is cast to 16 bits.
        available: (num_segments, E) bool, the experts each segment may use; kept as a buffer.
        score, renormalize, num_segments, balance, jitter: as :func:`topk_routing`; jitter acts in
        training.

    Parameters: router (nn.Linear without bias), w_up and with "swiglu" w_gate (E, hidden_dim, dim),
    w_down (E, out_dim, hidden_dim), b_up, b_down. The losses are in the Routing that forward
    returns: add ``coefficient * routing.balance_loss``."""

    def __init__(
        self,
        dim,
        hidden_dim,
        num_experts,
        top_k=2,
        *,
        out_dim=None,
        activation="gelu",
        bias=True,
        selection_bias=False,
        available=None,
        **routing,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"TopKMoE: top_k: got {top_k}, expected 1 to {num_experts}, the number of experts"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"TopKMoE: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        unknown = sorted(routing.keys() - set(ROUTING_OPTIONS))
        if unknown:
            raise TypeError(
                f"TopKMoE: it takes no option {', '.join(unknown)}; of routing it takes {', '.join(ROUTING_OPTIONS)}."
            )
        out_dim = dim if out_dim is None else out_dim
        self.dim, self.num_experts, self.top_k, self.activation, self.routing = (
            dim,
            num_experts,
            top_k,
            activation,
            routing,
        )
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w_gate = (
            nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
            if activation == "swiglu"
            else None
        )
        self.w_down = nn.Parameter(torch.empty(num_experts, out_dim, hidden_dim))
        self.b_up = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.b_down = nn.Parameter(torch.empty(num_experts, out_dim)) if bias else None
        self.register_buffer(
            "selection_bias",
            torch.zeros(num_experts, dtype=torch.float32) if selection_bias else None,
        )
        self.register_buffer("available", available)
        # What to_empty would lose; None of a meta tensor, which has no values.
        self._available = None if available is None or available.is_meta else available.tolist()
        self.register_load_state_dict_pre_hook(_keep_bias_wide)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's: uniform within one over the square root of the inputs. The buffers begin
        anew too.
        """
        self.router.reset_parameters()
        for weight, bias in (
            (self.w_up, self.b_up),
            (self.w_gate, None),
            (self.w_down, self.b_down),
        ):
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)
        if self.selection_bias is not None:
            self.selection_bias.zero_()
        if self._available is not None:
            self.available.copy_(torch.tensor(self._available, device="cpu"))

    def _apply(self, fn, recurse=True):
        """The selection bias stays in float32 when the module is cast: 16 bits lose its steps."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias.dtype in (torch.float16, torch.bfloat16):
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def forward(
        self,
        x: Tensor,
        *,
        token_padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """x (..., dim) -> (..., out_dim) and the :class:`Routing` of its T tokens, first dimensions
        flattened.

        token_padding_mask (...) bool, True = ignore: such a token gives 0. segments (...) int64.
        indices (T, k): replay a routing."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"TopKMoE: x: got shape {tuple(x.shape)}, expected (..., {self.dim})")
        for name, tensor in (("token_padding_mask", token_padding_mask), ("segments", segments)):
            if tensor is not None and tensor.shape != x.shape[:-1]:
                raise ValueError(
                    f"TopKMoE: {name}: got shape {tuple(tensor.shape)}, expected {tuple(x.shape[:-1])}"
                )
        tokens = x.reshape(-1, self.dim)
        options = self.routing if self.training else {**self.routing, "jitter": 0.0}
        mask = None if token_padding_mask is None else token_padding_mask.reshape(-1)
        options = dict(
            options,
            selection_bias=self.selection_bias,
            available=self.available,
            token_padding_mask=mask,
            segments=None if segments is None else segments.reshape(-1),
            indices=indices,
        )
        weight, bias = read(self.router, "TopKMoE.router", self.num_experts, x.device.type)
        if isinstance(weight, Called):  # masked tokens may hold NaN
            logits = weight(tokens if mask is None else tokens.masked_fill(mask[:, None], 0.0))
            routing = topk_routing(logits, self.top_k, **options)
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

    def update_selection_bias(
        self,
        counts: Tensor,
        rate: float = 1e-3,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """:func:`mmfused.update_selection_bias` of this layer:
        ``moe.update_selection_bias(routing.counts)``.

        Once after each optimizer step, on every rank with its own counts, which are summed over the
        ranks of ``group`` (None: all); under DDP too (call it on the module inside). With gradient
        accumulation ``counts`` is the sum over the micro-batches."""
        if self.selection_bias is None:
            raise ValueError(
                "TopKMoE: selection_bias is False; update_selection_bias takes a module that has one."
            )
        update_selection_bias(self.selection_bias, counts, rate, group=group)

    def extra_repr(self) -> str:
        experts, _, hidden = self.w_down.shape
        return f"{self.dim}, hidden_dim={hidden}, num_experts={experts}, top_k={self.top_k}, activation={self.activation!r}"


def _keep_bias_wide(module, state_dict, prefix, *_) -> None:
    """A state that was cast to 16 bits would else bring such a bias, with ``assign=True``."""
    bias = state_dict.get(prefix + "selection_bias")
    if bias is not None:
        state_dict[prefix + "selection_bias"] = bias.to(
            torch.promote_types(bias.dtype, torch.float32)
        )
