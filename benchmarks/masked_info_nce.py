"""Masked InfoNCE: the batches of CLIP and UNITE training, their baselines, and the least work the
loss takes.

All providers of a case compute the same loss of the same embeddings and temperature. Most baselines
know neither masks nor a second direction: those without masks serve the unmasked cases only; those
of one direction are called twice where a case is symmetric, which is what their users do. Gradient
filtering (Cut Cross-Entropy's default) drops most negatives of a large batch, so only its exact
mode is compared. "bare GEMMs" is no loss but the matrix products alone, the honest ceiling of
anything built on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmfused

from .measure import Problem, Provider, Unavailable, need_kernels

OURS = ("composed", "fused")
TEMPERATURE = 0.07
ROWS = 4096  # of a checkpointed chunk
WHOLE_PAIRS = 2**31  # beyond this many pairs a matrix of them, with its copies, does not fit


@dataclass(frozen=True)
class Case:
    """``B`` pairs of width ``D``; ``K`` modalities of equal size mask each other, 1: no mask."""

    name: str
    B: int
    D: int
    K: int = 1
    symmetric: bool = True
    headline: bool = False  # compiled with autotuning on CUDA
    cpu_B: int | None = 2048  # None: nothing new on a CPU


CASES = (
    Case("clip-65536", 65536, 768, headline=True),
    Case("clip-65536-k4", 65536, 768, K=4),
    Case("clip-16384-d256", 16384, 256, cpu_B=4096),
    Case("unite-4096-d1536", 4096, 1536, K=5, symmetric=False),
    Case("unite-4096-d3584", 4096, 3584, K=5, symmetric=False, cpu_B=None),
    Case("clip-262144", 262144, 768, cpu_B=None),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """The cases for a device: its batch sizes; a ``quick`` run keeps the widths and at most 64
    pairs (1024 on CUDA).
    """
    chosen = (
        CASES
        if device_type == "cuda"
        else [replace(case, B=case.cpu_B) for case in CASES if case.cpu_B]
    )
    limit = 1024 if device_type == "cuda" else 64
    return [replace(case, B=min(case.B, limit)) for case in chosen] if quick else list(chosen)


def custom(shape: dict[str, int]) -> Case:
    """Symmetric, with the user's own sizes."""
    defaults = {"B": 4096, "D": 768, "K": 1}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"shape has {', '.join(unknown)}; masked_info_nce takes {', '.join(defaults)}."
        )
    sizes = defaults | shape
    if min(sizes.values()) < 1:
        raise ValueError(f"shape is {sizes}; all sizes must be positive.")
    return Case("custom-" + "-".join(f"{name}{size}" for name, size in sizes.items()), **sizes)


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Unit embeddings as training meets them: a common mean (the "cone" of contrastive models) and
    pairs that are half aligned.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    cone, query = 0.5 * randn(1, case.D), randn(case.B, case.D)
    candidate = query + randn(case.B, case.D)
    embeddings = {"query": query + cone, "candidate": candidate + cone}
    inputs = {
        name: F.normalize(x, dim=-1).to(dtype).requires_grad_() for name, x in embeddings.items()
    }
    temperature = torch.full((1,), TEMPERATURE, device=device, dtype=dtype)
    return Problem(
        inputs, {"temperature": temperature}, torch.full((), 1.7, device=device, dtype=dtype)
    )


def modality(case: Case, device: torch.device) -> Tensor | None:
    """(B,) the key of each pair, in random order; None without a mask."""
    if case.K == 1:
        return None
    order = torch.randperm(case.B, generator=torch.Generator().manual_seed(1))
    return (order % case.K).to(device)


# ---- providers -----------------------------------------------------------------------------------


class Loss(nn.Module):
    """One direction, from query to candidate, in ``direction``; the mean of both where a case is
    symmetric.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.symmetric = case.symmetric
        self.temperature = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.register_buffer("key", modality(case, device))

    def forward(self, query: Tensor, candidate: Tensor) -> Tensor:
        loss = self.direction(query, candidate)
        if self.symmetric:
            loss = (loss + self.direction(candidate, query)) / 2
        return loss.to(query.dtype)


class Eager(Loss):
    """The usual loss with float32 logits; ``rounded``: logits in the embeddings' dtype, as a matmul
    under autocast gives them.
    """

    def __init__(self, case, device, dtype, rounded: bool = False):
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
    """A block of rows at a time, made again in backward; each direction by itself."""

    def direction(self, query: Tensor, candidate: Tensor) -> Tensor:
        total, rows = 0.0, torch.arange(len(query), device=query.device)
        for part, at in zip(query.split(ROWS), rows.split(ROWS), strict=True):
            total = total + checkpoint(self.block, part, candidate, at, use_reentrant=False)
        return total / len(query)

    def block(self, query: Tensor, candidate: Tensor, at: Tensor) -> Tensor:
        logits = query.float() @ candidate.float().T / self.temperature.float()
        if self.key is not None:
            logits = logits.masked_fill(self.key[at, None] != self.key, float("-inf"))
        return F.cross_entropy(logits, at, reduction="sum")


class Head(Loss):
    """A language model's fused head as a contrastive loss: the candidates are its weight, the
    temperature goes into the query.
    """

    def __init__(self, case, device, dtype, head):
        if case.K > 1:
            raise Unavailable("it has no masks")
        super().__init__(case, device, dtype)
        self.head = head

    def direction(self, query: Tensor, candidate: Tensor) -> Tensor:
        return self.head(
            query / self.temperature, candidate, torch.arange(len(query), device=query.device)
        )


class Ours(Loss):
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
    def forward(self, query: Tensor, candidate: Tensor) -> Tensor:
        return Products.apply(query, candidate, self.temperature)


class Products(torch.autograd.Function):
    """The logits forward; the logits again and both gradients backward: 8 B B D FLOPs, a block of
    rows at a time.
    """

    @staticmethod
    def forward(ctx, query, candidate, temperature):
        ctx.save_for_backward(query, candidate, temperature)
        for part in query.split(ROWS):
            torch.mm(part, candidate.T)
        return query.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        query, candidate, temperature = ctx.saved_tensors
        dq, dc = torch.empty_like(query), torch.zeros_like(candidate)
        for part, into in zip(query.split(ROWS), dq.split(ROWS), strict=True):
            logits = torch.mm(part, candidate.T)
            torch.mm(logits, candidate, out=into)
            dc.addmm_(logits.T, part)
        return dq, dc, torch.zeros_like(temperature)


LAYOUT = {"temperature": ("temperature",)}


def eager(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(whole(Eager, case, device, dtype), LAYOUT)


def eager_autocast(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if dtype == torch.float32:
        raise Unavailable("float32 logits are those of eager")
    return Provider(whole(Eager, case, device, dtype, rounded=True), LAYOUT)


def whole(
    kind: type[Loss],
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    **options,
) -> Loss:
    if case.B**2 > WHOLE_PAIRS:
        raise Unavailable(f"{case.B} x {case.B} logits and their copies do not fit")
    return kind(case, device, dtype, **options)


def chunked(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(Chunked(case, device, dtype), LAYOUT)


def torch_head(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy")
    try:
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
    except ImportError as error:
        raise Unavailable("this torch's linear_cross_entropy is not chunked") from error
    options = LinearCrossEntropyOptions(allow_retain_graph=True)
    return Provider(
        Head(case, device, dtype, lambda q, c, t: F.linear_cross_entropy(q, c, t, options=options)),
        LAYOUT,
    )


def cut_cross_entropy(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy
    except ImportError as error:
        raise Unavailable("cut_cross_entropy is not installed") from error
    # The package index has one without this mode (25.1.1), where no threshold means that nothing is
    # dropped.
    exact = (
        {"impl": "cce_exact"}
        if hasattr(LinearCrossEntropyImpl, "CCE_EXACT")
        else {"impl": "cce", "filter_eps": None}
    )
    return Provider(
        Head(case, device, dtype, lambda q, c, t: linear_cross_entropy(q, c, t, **exact)), LAYOUT
    )


def liger(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable("liger_kernel is not installed") from error
    head = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return Provider(Head(case, device, dtype, lambda q, c, t: head(c, q, t)), LAYOUT)


def inf_cl(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_cuda(device)
    try:
        from inf_cl.flash import cal_flash_loss
    except ImportError as error:
        raise Unavailable("inf_cl is not installed") from error
    return Provider(
        Head(case, device, dtype, lambda q, c, t: cal_flash_loss(q, c, t).mean()), LAYOUT
    )


def gemms(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    if case.K > 1:
        raise Unavailable(
            "the products of all pairs are no ceiling where a mask saves most of them"
        )
    return Provider(
        Gemms(case, device, dtype), LAYOUT, ceiling="no loss: the matrix products alone"
    )


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("its kernels need CUDA")


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return Provider(Ours(case, device, dtype), LAYOUT, "composed")


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    return Provider(Ours(case, device, dtype), LAYOUT, "fused")


reference = (
    chunked  # the formula in plain PyTorch, at any size: what the error budget is taken from
)
PROVIDERS = {
    "eager": eager,
    "eager, autocast": eager_autocast,
    "checkpointed chunks": chunked,
    "torch linear_cross_entropy": torch_head,
    "Cut Cross-Entropy, exact": cut_cross_entropy,
    "Liger, float32 accumulation": liger,
    "Inf-CL": inf_cl,
    "bare GEMMs": gemms,
    "composed": composed,
    "fused": fused,
}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """The formula in float64, a block of rows at a time."""
    parameters = {name: tensor.double() for name, tensor in problem.parameters.items()}
    inputs = {name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()}
    with mmfused.backend(
        "composed"
    ):  # equal to the reference to 1e-10 in float64, which the tests show
        return (
            composed(case, problem.device, torch.float64)
            .load(parameters)
            .results(Problem(inputs, parameters, problem.upstream.double()))
        )


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return results


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict]]:
    """FLOPs and bytes, stage by stage, of the best algorithm known: logits never in memory, one
    tile of them for both directions.

    A share f = 1 / K of the B x B pairs is allowed; a multiply-add is 2 FLOPs, a tensor moves once
    in a stage.

        forward   S = Q C^T                        2 f B B D     reads Q and C
        backward  S again                          2 f B B D     reads Q and C
                  dQ = dS C, dC = dS^T Q           4 f B B D     reads Q and C, writes dQ and dC

    One direction could keep a chunk of S from the forward to the backward; no such form is built,
    so its floor is the same 8."""
    pairs, both = case.B * case.B / case.K, 2 * case.B * case.D * itemsize

    def stage(name, flops, moved):
        return {"stage": name, "flops": flops, "bytes": moved}

    return {
        "forward": [stage("logits", 2 * pairs * case.D, both)],
        "backward": [
            stage("logits", 2 * pairs * case.D, both),
            stage("gradients", 4 * pairs * case.D, 2 * both),
        ],
    }
