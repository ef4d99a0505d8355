"""Benchmark of top-k routing from logits and from tokens x, with the sizes of FLUID and larger.

Every provider concatenates the routing weights and the three losses, which adds one kernel. The
order by expert is stored on the module, so that a compiler cannot remove the sort. Logits are
always float32; the option --dtype sets the dtype of x and of the router's weight.

Two libraries are not compared, because they compute something else. st-moe-pytorch builds
(T, E, capacity) tensors and drops tokens beyond the capacity. Transformer Engine's fused router
returns a (T, E) map of probabilities, without ranked choices, z-loss, entropy or order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfused
from mmfused import extension, library

from .measure import Problem, Provider, Unavailable, need_kernels

SIZES = "T, E, k, D, S"
OURS = ("composed", "fused C++", "fused")
# Least difference between logits that decide a choice; float32 rounding errors are far smaller.
MARGIN = 1e-4
# Upstream gradients of the balance loss, z-loss and entropy, in units of T, because the losses are
# means over T tokens.
LOSS_GRADIENTS = (1.0, 0.1, 0.5)


@dataclass(frozen=True)
class Case:
    """``T`` tokens, each routed to ``k`` of ``E`` experts.

    ``D``: width of the tokens, or 0 to start from logits.
    ``S``: number of segments. If S > 1, about a tenth of the tokens is padding.
    """

    name: str
    T: int
    E: int
    k: int
    D: int = 0
    S: int = 1
    headline: bool = False  # compiled with autotuning on CUDA
    cpu_T: int | None = None  # number of tokens on a CPU; None: not measured on a CPU


CASES = (
    Case("logits-16384", 16384, 16, 2, headline=True, cpu_T=16384),
    Case("logits-16384-s3", 16384, 16, 2, S=3, cpu_T=16384),
    Case("logits-8192-e128", 8192, 128, 8, cpu_T=4096),
    Case("logits-131072-e64", 131072, 64, 8),
    Case("fluid-256", 256, 16, 2, D=768),
    Case("fluid-512", 512, 16, 2, D=768, cpu_T=512),
    Case("fluid-2048", 2048, 16, 2, D=768, cpu_T=2048),
    Case("x-32768-e128", 32768, 128, 8, D=2048, headline=True, cpu_T=1024),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """Return the cases for a device; ``quick``: at most 64 tokens (1024 on CUDA)."""
    chosen = (
        CASES
        if device_type == "cuda"
        else [replace(case, T=case.cpu_T) for case in CASES if case.cpu_T]
    )
    limit = 1024 if device_type == "cuda" else 64
    return [replace(case, T=min(case.T, limit)) for case in chosen] if quick else list(chosen)


def custom(shape: dict[str, int]) -> Case:
    """Return a case with the sizes in ``shape``; D = 0, the default, starts from logits."""
    defaults = {"T": 16384, "E": 16, "k": 2, "D": 0, "S": 1}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"topk_routing: shape: got {', '.join(unknown)}, expected {', '.join(defaults)}"
        )
    sizes = defaults | shape
    if min(sizes["T"], sizes["k"], sizes["S"]) < 1 or sizes["E"] < max(2, sizes["k"]):
        raise ValueError(
            f"topk_routing: shape: got {sizes}, expected positive T, k and S, and E at least 2 "
            "and at least k"
        )
    return Case("custom-" + "-".join(f"{name}{size}" for name, size in sizes.items()), **sizes)


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Draw logits, or tokens whose logits have a variance of about 1.

    Logits that decide a choice differ by at least MARGIN, so that all providers choose the same
    experts.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    router = (randn(case.E, case.D) * case.D**-0.5).to(dtype) if case.D else None

    def draw(tokens):
        return randn(tokens, case.E) if router is None else randn(tokens, case.D).to(dtype)

    source, close = draw(case.T), torch.ones(case.T, dtype=torch.bool, device=device)
    while close.any():
        logits = source.double() if router is None else source.double() @ router.double().T
        best = logits.topk(min(case.k + 1, case.E)).values
        close = (best[:, :-1] - best[:, 1:]).amin(1) < MARGIN
        source[close] = draw(int(close.sum()))
    upstream = torch.cat(
        [randn(case.T * case.k), case.T * torch.tensor(LOSS_GRADIENTS, device=device)]
    )
    inputs = {"logits" if router is None else "x": source.requires_grad_()}
    return Problem(inputs, {} if router is None else {"router": router}, upstream)


def groups(case: Case, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return each token's segment (T,) and the padding mask (T,), or (None, None) if S = 1."""
    if case.S == 1:
        return None, None
    generator = torch.Generator().manual_seed(1)
    segments = torch.randint(case.S, (case.T,), generator=generator)
    return segments.to(device), (torch.rand(case.T, generator=generator) < 0.1).to(device)


# ---- providers -----------------------------------------------------------------------------------


class Router(nn.Module):
    """Base class of the providers' modules. ``forward`` returns weights and losses in one tensor.

    ``route`` returns the weights, the losses, and the order, positions and offsets by expert.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.E, self.k, self.S = case.E, case.k, case.S
        self.router = (
            nn.Parameter(torch.empty(case.E, case.D, device=device, dtype=dtype))
            if case.D
            else None
        )
        segments, mask = groups(case, device)
        self.register_buffer("segments", segments)
        self.register_buffer("mask", mask)

    def forward(self, source: Tensor) -> Tensor:
        weights, losses, self.sorted = self.route(source)
        return torch.cat([weights.flatten(), *(loss[None] for loss in losses)])


class Eager(Router):
    """The router of Switch Transformer in plain PyTorch, with a sort by expert.

    ``wide``: multiply 16-bit x and weight with a float32 result, without a cast to float32.
    """

    def __init__(self, case, device, dtype, wide: bool = False):
        super().__init__(case, device, dtype)
        self.wide = wide

    def route(self, source):
        logits = self.logits(source)
        probs = logits.softmax(-1)
        best, indices = probs.topk(self.k)
        weights = best / best.sum(-1, keepdim=True)
        z = logits.logsumexp(-1).square()
        entropy = -(probs * logits.log_softmax(-1)).sum(-1)
        expert, assigned = indices.flatten(), F.one_hot(indices, self.E).sum(1)
        if self.mask is not None:
            weights, assigned = (
                weights.masked_fill(self.mask[:, None], 0),
                assigned.masked_fill(self.mask[:, None], 0),
            )
            expert = expert.masked_fill(self.mask.repeat_interleave(self.k), self.E)
        return weights, self.losses(probs, assigned, z, entropy), self.by_expert(expert, assigned)

    def logits(self, source: Tensor) -> Tensor:
        if self.router is None:
            return source
        if self.wide:
            return WideProduct.apply(source, self.router)
        dtype = torch.promote_types(source.dtype, torch.float32)
        return F.linear(source.to(dtype), self.router.to(dtype))

    def losses(self, probs: Tensor, assigned: Tensor, z: Tensor, entropy: Tensor) -> list[Tensor]:
        if self.mask is None:
            share = assigned.to(probs.dtype).mean(0) / self.k
            return [self.E * (share * probs.mean(0)).sum(), z.mean(), entropy.mean()]
        member = F.one_hot(self.segments, self.S).masked_fill(self.mask[:, None], 0).to(probs.dtype)
        number = member.sum(0)[:, None]
        share, mean = member.T @ assigned.to(probs.dtype) / self.k, member.T @ probs
        balance = (
            self.E
            * (share * mean / number.clamp(min=1).square()).sum()
            / (number > 0).sum().clamp(min=1)
        )
        valid, count = ~self.mask, number.sum().clamp(min=1)
        return [balance, (z * valid).sum() / count, (entropy * valid).sum() / count]

    def by_expert(self, expert: Tensor, assigned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = expert.argsort(stable=True)
        position = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        return order, position, F.pad(assigned.sum(0).cumsum(0), (1, 0))


class WideProduct(torch.autograd.Function):
    """x W^T with 16-bit factors and a float32 result, which torch itself cannot differentiate.

    The products of the backward are in 16 bits.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, d_logits):
        x, weight = ctx.saved_tensors
        d_logits = d_logits.to(x.dtype)
        return d_logits @ weight, d_logits.T @ x


class Ours(Router):
    def route(self, source):
        options = {
            "token_padding_mask": self.mask,
            "segments": self.segments,
            "num_segments": self.S,
        }
        if self.router is None:
            routing = mmfused.topk_routing(source, self.k, **options)
        else:
            routing = mmfused.topk_routing_from_input(source, self.router, self.k, **options)
        losses = routing.balance_loss, routing.z_loss, routing.entropy
        return routing.weights, losses, (routing.order, routing.position, routing.offsets)


def layout(case: Case) -> dict[str, tuple[str, ...]]:
    return {"router": ("router",)} if case.D else {}


def has_wide_product(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype.itemsize == 2


def eager(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(Eager(case, device, dtype), layout(case))


def eager_wide(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not case.D:
        raise Unavailable("this case starts from logits")
    if not has_wide_product(device, dtype):
        raise Unavailable("a product of 16-bit factors with a float32 result needs CUDA")
    return Provider(Eager(case, device, dtype, wide=True), layout(case))


def reference(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    """Return "eager, 16-bit product" if x is 16-bit on CUDA, else the library's reference."""
    if case.D and has_wide_product(device, dtype):
        return eager_wide(case, device, dtype)
    return Provider(Ours(case, device, dtype), layout(case), "reference")


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(Ours(case, device, dtype), layout(case), "composed")


def fused_cpp(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    reasons = extension.why_not()
    if reasons:
        raise Unavailable("; ".join(reasons))
    return Provider(
        Ours(case, device, dtype),
        layout(case),
        "fused",
        within=functools.partial(library.router, "cuda"),
    )


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    return Provider(
        Ours(case, device, dtype),
        layout(case),
        "fused",
        within=functools.partial(library.router, "triton"),
    )


PROVIDERS = {
    "eager": eager,
    "eager, 16-bit product": eager_wide,
    "composed": composed,
    "fused C++": fused_cpp,
    "fused": fused,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Return the float64 results of the library's reference."""
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    inputs = {name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()}
    provider = Provider(Ours(case, problem.device, torch.float64), layout(case), "reference").load(
        parameters
    )
    return provider.results(Problem(inputs, parameters, problem.upstream.double()))


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return results


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Return the FLOPs and bytes of each stage of the best known algorithm.

    The probabilities are not stored. The logits l are float32. A choice has 4 bytes of index and 4
    bytes of weight. A multiply-add is 2 FLOPs, and each tensor is moved once in a stage.

        from logits
          forward   route    reads l, writes the choices
          backward  route    reads l, writes dl
        from x
          forward   route    l = x W^T                     2 T E D
                             reads x and W, writes the choices
          backward  route    dx = dl W, dW = dl^T x        4 T E D
                             reads x, W and l, writes dx and dW
        from either
          forward   order    writes order and position, 8 bytes per choice
          backward  weights  reads the choices and the gradients of their weights

    From x, writing l in the forward is not counted.
    """
    T, E, D, R = case.T, case.E, case.D, case.T * case.k
    logits, product = 4 * T * E, 2 * T * E * D

    def stage(name, flops, moved):
        return {"stage": name, "flops": flops, "bytes": moved}

    if D:
        x, router = T * D * itemsize, E * D * itemsize
        forward, backward = (
            stage("route", product, x + router + 8 * R),
            stage("route", 2 * product, 2 * x + 2 * router + logits),
        )
    else:
        forward, backward = stage("route", 0, logits + 8 * R), stage("route", 0, 2 * logits)
    return {
        "forward": [forward, stage("order", 0, 8 * R)],
        "backward": [backward, stage("weights", 0, 12 * R)],
    }
