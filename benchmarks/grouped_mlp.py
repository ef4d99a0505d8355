"""Benchmark of experts: FLUID's small layers, SwiGLU layers of large models, and baselines.

The experts of each token are drawn in advance and are the same for all providers. The routing
weights are an input, so that their gradient is checked too. Sorting tokens by expert is timed in
topk_routing.py. Here "grouped_mm pattern" and ScatterMoE get the order of the tokens; the loop and
Liger cannot use this order, and find the tokens of each expert in every call.

Not compared: st-moe-pytorch, because its experts drop tokens beyond a capacity; Transformer
Engine's GroupedLinear, which takes the number of tokens of each expert from the host, so that every
step of a model waits for the GPU; SonicMoE, whose releases need torch 2.9.1 or older.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfused

from .grouped_mlp_cases import ROUTED, Case, cases, choices, custom, make
from .measure import Problem, Provider, Unavailable, need_kernels

__all__ = [
    "OURS",
    "PROVIDERS",
    "ROUTED",
    "SIZES",
    "Case",
    "cases",
    "choices",
    "comparable",
    "custom",
    "exact",
    "make",
    "reference",
    "work",
]

SIZES = "T, D, I, E, k"
OURS = ("composed", "fused")
DENSE_HIDDEN = 2**31  # largest number of hidden values for which "dense, all experts" is measured


# ---- providers -----------------------------------------------------------------------------------


class Experts(nn.Module):
    """Base class of the providers' modules, with the parameters.

    For SwiGLU, the first I rows of w_up are the gate, and the last I rows the up projection.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype):
        super().__init__()
        rows = (2 if case.gated else 1) * case.I

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.E, self.k, self.gated = case.E, case.k, case.gated
        self.w_up, self.w_down = parameter(case.E, rows, case.D), parameter(case.E, case.D, case.I)
        self.b_up = None if case.gated else parameter(case.E, rows)
        self.b_down = None if case.gated else parameter(case.E, case.D)
        self.register_buffer("indices", choices(case).to(device))

    def activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(hidden)
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate) * up


class Loop(Experts):
    """Run one expert at a time on its tokens, like the first implementation of Mixtral."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        none = [None] * self.E
        # Use unbind, because the backward of each w[e] would allocate a tensor as large as w.
        parameters = [
            none if p is None else p.unbind()
            for p in (self.w_up, self.b_up, self.w_down, self.b_down)
        ]
        out = weights.new_zeros(x.shape)
        for e, (w_up, b_up, w_down, b_down) in enumerate(zip(*parameters, strict=True)):
            token, choice = torch.where(self.indices == e)
            hidden = F.linear(x.index_select(0, token), w_up, b_up)
            y = F.linear(self.activate(hidden), w_down, b_down)
            out.index_add_(0, token, y * weights[token, choice, None])
        return out.to(x.dtype)


class Dense(Experts):
    """Run every expert on every token, with batched products."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        hidden = self.product(x.expand(self.E, -1, -1), self.w_up, self.b_up)
        y = self.product(self.activate(hidden), self.w_down, self.b_down)
        spread = weights.new_zeros(len(x), self.E).scatter(1, self.indices, weights)
        return (y * spread.T[:, :, None]).sum(0).to(x.dtype)

    @staticmethod
    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (
            torch.bmm(rows, weight.mT)
            if bias is None
            else torch.baddbmm(bias[:, None], rows, weight.mT)
        )


class GroupedMM(Experts):
    """Order the rows by expert, call torch's grouped_mm, and restore the order of the tokens.

    transformers and torchtitan use the same operations. Here the order is computed in advance.
    """

    def __init__(self, case, device, dtype, grouped_mm):
        super().__init__(case, device, dtype)
        self.grouped_mm = grouped_mm
        expert, order = self.indices.flatten().sort(stable=True)
        ends = torch.bincount(expert, minlength=case.E).cumsum(0).int()
        for name, tensor in {
            "expert": expert,
            "order": order,
            "position": order.argsort(),
            "ends": ends,
        }.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        hidden = self.product(x[self.order // self.k], self.w_up, self.b_up)
        y = self.product(self.activate(hidden), self.w_down, self.b_down)
        y = y * weights.flatten()[self.order, None]
        return y[self.position].unflatten(0, (-1, self.k)).sum(1).to(x.dtype)

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = self.grouped_mm(rows, weight.mT, offs=self.ends)
        return out if bias is None else out + bias[self.expert]


class Liger(Experts):
    def __init__(self, case, device, dtype, function):
        super().__init__(case, device, dtype)
        self.function, self.indices = function, self.indices.int()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.function.apply(x, self.w_up, self.w_down, self.indices, weights)


class ScatterMoE(Experts):
    """Experts of two calls of scattermoe's ``parallel_linear``, which sorts while it multiplies.

    Its routing weights have the dtype of the tokens.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
        linear: Callable[..., Tensor],
    ) -> None:
        super().__init__(case, device, dtype)
        self.linear: Callable[..., Tensor] = linear
        expert, order = self.indices.flatten().sort(stable=True)
        ends = torch.bincount(expert, minlength=case.E).cumsum(0)
        for name, tensor in {"expert": expert, "order": order, "ends": ends}.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        sorted_by = (self.expert, self.order, self.ends)
        hidden = self.linear(
            x, self.w_up.mT, self.k, *sorted_by, expert_biases=self.b_up, grouped_out=True
        )
        return self.linear(
            self.activate(hidden),
            self.w_down.mT,
            1,
            *sorted_by,
            expert_biases=self.b_down,
            gates=weights.to(x.dtype),
            grouped_in=True,
        )


class Ours(Experts):
    """The library's experts. The routing is computed in advance, but its weights are an input."""

    def __init__(self, case, device, dtype, backend: str):
        super().__init__(case, device, dtype)
        weights = torch.zeros(
            case.T, case.k, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )
        with mmfused.backend(backend):
            self.routing = mmfused.routing_from_indices(self.indices, weights, case.E)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        routing = self.routing._replace(weights=weights)
        activation = "swiglu" if self.gated else "gelu"
        return mmfused.grouped_mlp(
            x,
            routing,
            self.w_up,
            self.w_down,
            b_up=self.b_up,
            b_down=self.b_down,
            activation=activation,
        )


def layout(case: Case) -> dict[str, tuple[str, ...]]:
    return {
        name: (name,) for name in ("w_up", "w_down", *(() if case.gated else ("b_up", "b_down")))
    }


def loop(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    reason = "the sizes depend on the data, so there is a graph break at each expert"
    return Provider(Loop(case, device, dtype), layout(case), uncompiled=reason)


def dense(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    hidden = case.T * case.E * case.I
    if hidden > DENSE_HIDDEN:
        raise Unavailable(f"it needs {case.E // case.k} times the FLOPs and {hidden:.2g} values")
    return Provider(Dense(case, device, dtype), layout(case))


def grouped_mm(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    function = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if function is None:
        raise Unavailable("this torch has no grouped_mm")
    if dtype == torch.float64:
        raise Unavailable("grouped_mm does not support float64")
    return Provider(GroupedMM(case, device, dtype, function), layout(case))


def liger(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not case.gated:
        raise Unavailable("it supports only SwiGLU without biases")
    if device.type != "cuda":
        raise Unavailable("its kernels need CUDA")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise Unavailable("liger_kernel is not installed, or has no fused_moe") from error
    return Provider(Liger(case, device, dtype, LigerFusedMoEFunction), layout(case))


def scatter_moe(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if device.type != "cuda":
        raise Unavailable("its kernels need CUDA")
    try:
        from scattermoe import parallel_linear
    except ImportError as error:
        raise Unavailable("scattermoe is not installed") from error
    if "expert_biases" not in inspect.signature(parallel_linear).parameters:
        raise Unavailable("this scattermoe has no biases; version 0.3 has")
    return Provider(ScatterMoE(case, device, dtype, parallel_linear), layout(case))


def _ours(backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(Ours(case, device, dtype, backend), layout(case), backend)


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _ours("composed", case, device, dtype)


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    return _ours("fused", case, device, dtype)


reference = loop  # not the library's reference, which runs every expert on every token
PROVIDERS = {
    "eager loop": loop,
    "dense, all experts": dense,
    "grouped_mm pattern": grouped_mm,
    "Liger fused_moe": liger,
    "ScatterMoE": scatter_moe,
    "composed": composed,
    "fused": fused,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Return the float64 results of the composed path, which tests compare with the reference."""
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    inputs = {name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()}
    provider = composed(case, problem.device, torch.float64).load(parameters)
    return provider.results(Problem(inputs, parameters, problem.upstream.double()))


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the gradients of each weight and its bias.

    "grouped_mm pattern" would fail a check of the bias gradients alone: in 16 bits, the backward of
    indexing rounds after every addition.
    """
    joined = dict(results)
    for part in ("up", "down"):
        if f"db_{part}" in results:
            joined[f"dw_{part}"] = torch.cat(
                [results[f"dw_{part}"], joined.pop(f"db_{part}")[..., None]], -1
            )
    return joined


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Return the FLOPs and bytes of each stage of the best known algorithm.

    There are R = T k rows. W_up holds u matrices: 2 for SwiGLU, else 1. The hidden rows H before
    the activation are saved for the backward; A = act(H) are the activations, and O is the output.
    A multiply-add is 2 FLOPs. Each tensor is moved once in a stage, and only the weights of chosen
    experts are read.

        forward   up     H = X W_up^T                      2 u R I D
                         reads X and W_up, writes H
                  down   Y = A W_down^T, O = sum of Y      2 R I D
                         reads W_down, writes O
        backward  down   dA = dO W_down, dW_down = dO^T A  4 R I D
                         reads dO, W_down and H, writes dW_down
                  up     dX = dH W_up, dW_up = dH^T X      4 u R I D
                         reads X and W_up, writes dX and dW_up

    The bytes of A, dA, dH and Y, and of biases, routing weights and indices, are not counted.
    """
    R, matrix, up = case.T * case.k, case.I * case.D, 2 if case.gated else 1
    tokens, hidden, touched = case.T * case.D, up * R * case.I, len(choices(case).unique())

    def stage(name, flops, elements):
        return {"stage": name, "flops": flops, "bytes": elements * itemsize}

    return {
        "forward": [
            stage("up", 2 * up * R * matrix, tokens + touched * up * matrix + hidden),
            stage("down", 2 * R * matrix, touched * matrix + tokens),
        ],
        "backward": [
            stage("down", 4 * R * matrix, tokens + hidden + (touched + case.E) * matrix),
            stage("up", 4 * up * R * matrix, 2 * tokens + (touched + case.E) * up * matrix),
        ],
    }
