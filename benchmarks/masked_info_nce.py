"""Benchmark of masked InfoNCE: batches of CLIP and UNITE training, and baselines.

All providers of a case compute the same loss of the same embeddings and temperature. Most baselines
have no masks, so they run only the cases without masks. Most compute only one direction, so they
are called twice in a symmetric case. Cut Cross-Entropy runs without its gradient filter, which
would drop most negatives of a large batch. "bare GEMMs" is not a loss: it runs only the matrix
products of a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmfused

from .masked_info_nce_cases import Case, cases, custom, make, modality
from .measure import Problem, Provider, Unavailable, need_kernels

__all__ = [
    "OURS",
    "PROVIDERS",
    "SIZES",
    "Case",
    "cases",
    "comparable",
    "custom",
    "exact",
    "make",
    "modality",
    "reference",
    "work",
]

SIZES = "B, D, K"
OURS = ("composed", "fused")
OWN_KERNELS = "its kernels are already compiled"
ROWS = 4096  # rows of logits computed at a time
MAX_LOGITS = 2**31  # providers that store all logits skip larger cases


# ---- providers -----------------------------------------------------------------------------------


class Loss(nn.Module):
    """Base class of the losses; ``forward`` averages both directions in a symmetric case."""

    key: Tensor | None

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.symmetric: bool = case.symmetric
        self.temperature: nn.Parameter = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.register_buffer("key", modality(case, device))

    def direction(self, query: Tensor, candidate: Tensor) -> Tensor:
        """Return the loss from query to candidate."""
        raise NotImplementedError

    def forward(self, query: Tensor, candidate: Tensor) -> Tensor:
        loss = self.direction(query, candidate)
        if self.symmetric:
            loss = (loss + self.direction(candidate, query)) / 2
        return loss.to(query.dtype)


class Eager(Loss):
    """F.cross_entropy of the matrix of logits, in float32.

    ``rounded``: compute the logits in the dtype of the embeddings, as autocast does.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
        rounded: bool = False,
    ) -> None:
        super().__init__(case, device, dtype)
        self.rounded = rounded

    def forward(self, query: Tensor, candidate: Tensor) -> Tensor:
        temperature = self.temperature.float()
        logits = query @ candidate.T if self.rounded else query.float() @ candidate.float().T
        logits = logits / temperature
        if self.key is not None:
            logits = logits.masked_fill(self.key[:, None] != self.key, float("-inf"))
        target = torch.arange(len(query), device=query.device)
        loss = F.cross_entropy(logits.float(), target)
        if self.symmetric:
            loss = (loss + F.cross_entropy(logits.float().T, target)) / 2
        return loss.to(query.dtype)


class Chunked(Loss):
    """A loss over checkpointed blocks of rows: the backward computes their logits again."""

    def direction(self, query: Tensor, candidate: Tensor) -> Tensor:
        total: Any = 0.0
        rows = torch.arange(len(query), device=query.device)
        for part, at in zip(query.split(ROWS), rows.split(ROWS), strict=True):
            total = total + checkpoint(self.block, part, candidate, at, use_reentrant=False)
        return total / len(query)

    def block(self, query: Tensor, candidate: Tensor, at: Tensor) -> Tensor:
        """Return the sum of the loss over the rows with indices ``at``."""
        logits = query.float() @ candidate.float().T / self.temperature.float()
        if self.key is not None:
            logits = logits.masked_fill(self.key[at, None] != self.key, float("-inf"))
        return F.cross_entropy(logits, at, reduction="sum")


class Head(Loss):
    """A fused linear cross-entropy for language models, used as a contrastive loss.

    The candidates are the weight of the linear layer.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
        head: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        if case.K > 1:
            raise Unavailable("it has no masks")
        super().__init__(case, device, dtype)
        self.head = head

    def direction(self, query: Tensor, candidate: Tensor) -> Tensor:
        target = torch.arange(len(query), device=query.device)
        return self.head(query / self.temperature, candidate, target)


class Ours(Loss):
    """The loss of this library."""

    def forward(self, query: Tensor, candidate: Tensor) -> Tensor:
        loss = mmfused.masked_info_nce(
            query,
            candidate,
            temperature=self.temperature,
            query_key=self.key,
            candidate_key=self.key,
            symmetric=self.symmetric,
        )
        return loss.to(query.dtype)


class Gemms(Loss):
    """Only the matrix products of the loss."""

    def forward(self, query: Tensor, candidate: Tensor) -> Tensor:
        return Products.apply(query, candidate, self.temperature)


class Products(torch.autograd.Function):
    """The products for the logits in the forward; for logits and both gradients in the backward.

    The products are computed for a block of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidate: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(query, candidate, temperature)
        for part in query.split(ROWS):
            torch.mm(part, candidate.T)
        return query.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, candidate, temperature = ctx.saved_tensors
        dq, dc = torch.empty_like(query), torch.zeros_like(candidate)
        for part, into in zip(query.split(ROWS), dq.split(ROWS), strict=True):
            logits = torch.mm(part, candidate.T)
            torch.mm(logits, candidate, out=into)
            dc.addmm_(logits.T, part)
        return dq, dc, torch.zeros_like(temperature)


LAYOUT: dict[str, tuple[str, ...]] = {"temperature": ("temperature",)}


def eager(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(with_all_logits(Eager, case, device, dtype), LAYOUT)


def eager_autocast(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if dtype == torch.float32:
        raise Unavailable("in float32 it is the same as eager")
    return Provider(with_all_logits(Eager, case, device, dtype, rounded=True), LAYOUT)


def with_all_logits(
    loss: type[Loss],
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    **options: Any,
) -> Loss:
    """Build a loss that stores all logits; raise Unavailable if they do not fit into memory."""
    if case.B**2 > MAX_LOGITS:
        raise Unavailable(f"{case.B} x {case.B} logits and their copies do not fit into memory")
    return loss(case, device, dtype, **options)


def chunked(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    blocks = "torch.compile would compile each of its blocks of rows"
    uncompiled = None if case.B <= 4 * ROWS else blocks
    return Provider(Chunked(case, device, dtype), LAYOUT, uncompiled=uncompiled)


def torch_head(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy")
    try:
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
    except ImportError as error:
        raise Unavailable("this torch's linear_cross_entropy is not chunked") from error
    options = LinearCrossEntropyOptions(allow_retain_graph=True)

    def head(query: Tensor, candidate: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(query, candidate, target, options=options)

    return Provider(Head(case, device, dtype, head), LAYOUT)


def cut_cross_entropy(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy
    except ImportError as error:
        raise Unavailable("cut_cross_entropy is not installed") from error
    # Version 25.1.1 has no cce_exact, but filter_eps=None turns the filter off.
    exact = {"impl": "cce", "filter_eps": None}
    if hasattr(LinearCrossEntropyImpl, "CCE_EXACT"):
        exact = {"impl": "cce_exact"}

    def head(query: Tensor, candidate: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(query, candidate, target, **exact)

    return Provider(Head(case, device, dtype, head), LAYOUT, uncompiled=OWN_KERNELS)


def liger(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable("liger_kernel is not installed") from error
    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def head(query: Tensor, candidate: Tensor, target: Tensor) -> Tensor:
        return loss(candidate, query, target)

    return Provider(Head(case, device, dtype, head), LAYOUT, uncompiled=OWN_KERNELS)


def inf_cl(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from inf_cl.flash import cal_flash_loss
    except ImportError as error:
        raise Unavailable("inf_cl is not installed") from error

    def head(query: Tensor, candidate: Tensor, target: Tensor) -> Tensor:
        return cal_flash_loss(query, candidate, target).mean()

    return Provider(Head(case, device, dtype, head), LAYOUT, uncompiled=OWN_KERNELS)


def quack(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise Unavailable("quack is not installed") from error

    def head(query: Tensor, candidate: Tensor, target: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(query, candidate, target)

    return Provider(Head(case, device, dtype, head), LAYOUT, uncompiled=OWN_KERNELS)


def gemms(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if case.K > 1:
        raise Unavailable("with masks, a loss needs fewer products")
    ceiling = "not a loss: only the matrix products"
    return Provider(Gemms(case, device, dtype), LAYOUT, ceiling=ceiling)


def need_cuda(device: torch.device) -> None:
    """Raise Unavailable if the device is not a CUDA device."""
    if device.type != "cuda":
        raise Unavailable("its kernels need CUDA")


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(Ours(case, device, dtype), LAYOUT, "composed")


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    return Provider(Ours(case, device, dtype), LAYOUT, "fused")


reference = chunked  # not the library's reference, whose logits do not fit into memory
PROVIDERS: dict[str, Callable[[Case, torch.device, torch.dtype], Provider]] = {
    "eager": eager,
    "eager, autocast": eager_autocast,
    "checkpointed chunks": chunked,
    "torch linear_cross_entropy": torch_head,
    "Cut Cross-Entropy, exact": cut_cross_entropy,
    "Liger, float32 accumulation": liger,
    "Inf-CL": inf_cl,
    "QuACK": quack,
    "bare GEMMs": gemms,
    "composed": composed,
    "fused": fused,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Return the float64 results of the composed path, which tests compare with the reference."""
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    inputs = {name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()}
    with mmfused.backend("composed"):
        provider = composed(case, problem.device, torch.float64).load(parameters)
        return provider.results(Problem(inputs, parameters, problem.upstream.double()))


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the results unchanged."""
    return results


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Return the FLOPs and bytes of each stage of the best known algorithm.

    The logits S are not stored, and both directions use the same S. Masks leave a fraction
    f = 1 / K of the B x B pairs of queries Q and candidates C. A multiply-add is 2 FLOPs, and each
    tensor is moved once in a stage.

        forward   S = Q C^T                  2 f B B D   reads Q and C
        backward  S again                    2 f B B D   reads Q and C
                  dQ = dS C, dC = dS^T Q     4 f B B D   reads Q and C, writes dQ and dC
    """
    pairs = case.B * case.B / case.K
    embeddings = 2 * case.B * case.D * itemsize  # bytes of Q and C

    def stage(name: str, flops: float, moved: int) -> dict[str, Any]:
        return {"stage": name, "flops": flops, "bytes": moved}

    return {
        "forward": [stage("logits", 2 * pairs * case.D, embeddings)],
        "backward": [
            stage("logits", 2 * pairs * case.D, embeddings),
            stage("gradients", 4 * pairs * case.D, 2 * embeddings),
        ],
    }
